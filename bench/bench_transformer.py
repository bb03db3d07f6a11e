"""FlashAttention's headlines on our ground: forward passes of BERT-large and of GPT-2 medium and XL
with random weights, attention written by hand against `cuattn.attention`; needs a GPU.

    python -m pytest bench/bench_transformer.py --benchmark-only

The model is bench/transformer.py, all else in it being the same code for both: matrix products by
cuBLAS. Time and peak memory of both come from bench/timing/harness.py; the cells of the grid
"transformer-attention" have them for the attention of one layer alone.

The result of the first and the last sequence is compared with the same model in float32, computed
on the device; half precision with an attention written by hand says what error is allowed.
"""

from __future__ import annotations

import math

import numpy as np

from bench import inside, transformer
from bench.bench_softmax import normal
from bench.peers._cupy import Cupy
from bench.report import attention as report_attention
from bench.timing.harness import Operation, Work
from bench.timing.verification import Sample

PLAIN = report_attention.BASELINE
FOCUS = 1.5  # standard deviation of q, k and v: of some hundred keys a few count


def bench_transformer(benchmark, measured):
    measured.replay(benchmark)


def sizes(cell):
    """Layers, batch, sequence length and hidden size."""
    shape = cell.shape
    hidden = shape["heads"] * shape["head_dim"]
    return shape["layers"], shape["batch"], shape["seqlen_q"], hidden


def inputs(cell, xp, rng):
    """Tokens and weights; the weights keep the size of what they multiply."""
    layers, batch, seqlen, hidden = sizes(cell)

    def matrices(rows, columns, gain):
        shape = (layers, rows + 1, columns)
        return normal(xp, rng, shape, cell.dtype, lambda z: z * np.float32(gain / math.sqrt(rows)))

    norms = normal(xp, rng, (layers, 2, 2, hidden), cell.dtype, lambda z: z * np.float32(0.1))
    norms[:, :, 0] += 1
    x = normal(xp, rng, (batch, seqlen, hidden), cell.dtype)
    columns = {"qkv": 3 * hidden, "project": hidden, "up": 4 * hidden}
    weights = [matrices(hidden, n, FOCUS if name == "qkv" else 1) for name, n in columns.items()]
    return x, norms, *weights, matrices(4 * hidden, hidden, 1)


def ours(x, *weights, heads, causal):
    return transformer.forward(x, transformer.Weights(*weights), heads, causal, transformer.fused)


def by_hand(x, *weights, heads, causal):
    attention = transformer.unfused(np if isinstance(x, np.ndarray) else Cupy().xp)
    return transformer.forward(x, transformer.Weights(*weights), heads, causal, attention)


def samples(cell, inputs, asnumpy):
    """The first and the last sequence."""
    x, *weights = inputs
    found = []
    for b in sorted({0, len(x) - 1}):
        index = slice(b, b + 1)
        plain = by_hand(x[index], *weights, **options(cell))
        exact = in_float32(x[index], weights, **options(cell))
        expected = asnumpy(exact).astype(np.float64)
        allowed = inside.allowed(expected, asnumpy(plain), abs(expected), cell.dtype)
        found.append(Sample(index, expected, allowed))
    return found


def in_float32(x, weights, **options):
    """The model in float32, one layer at a time: the weights of all would need twice the memory."""
    x = x.astype(np.float32)
    for layer in range(len(weights[0])):
        one = [array[layer : layer + 1].astype(np.float32) for array in weights]
        x = by_hand(x, *one, **options)
    return x


def options(cell):
    return {"heads": cell.shape["heads"], "causal": bool(cell.shape["causal"])}


def work(cell):
    """FLOPs of the products, and bytes of the weights."""
    layers, batch, seqlen, hidden = sizes(cell)
    halved = 2 if cell.shape["causal"] else 1
    tokens = batch * seqlen
    flops = layers * (24 * tokens * hidden**2 + 4 * tokens * seqlen * hidden // halved)
    formula = "layers * (24 * tokens * hidden^2 + 4 * tokens * seqlen * hidden"
    formula += " / 2)" if cell.shape["causal"] else ")"
    size = 12 * layers * hidden**2 * inside.dtype_of(cell.dtype).itemsize
    return Work(size, flops, formula)


OPERATIONS = {
    "transformer": Operation(
        ceiling="matmul",
        inputs=inputs,
        ours=ours,
        samples=samples,
        work=work,
        result=None,
        options=options,
        others={PLAIN: by_hand},
    )
}
