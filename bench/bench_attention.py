"""Forward attention against every peer that is installed; needs a GPU.

    python -m pytest bench/bench_attention.py --benchmark-only -k "flash-attention and causal1"

One benchmark a cell (bench/grids.py), contestant and cache state, in groups of one cell and state.
The baseline is what a user of CuPy writes by hand, "CuPy expression": `softmax(scale * q @ k.T) @
v`, with the matrix of the scores in memory. FLOPs are FlashAttention's: two products, and half of
them where the mask is causal, whatever a kernel computes of the tiles on the diagonal.
"""

from __future__ import annotations

import numpy as np

import cuattn
from bench import inside
from bench.bench_softmax import normal
from bench.timing.harness import Operation, Work
from bench.timing.verification import Sample

HEADS, ROWS = 3, 16  # that are verified: of the first and the last sequence, in three places each


def bench_attention(benchmark, measured):
    measured.replay(benchmark)


def q_shape(cell):
    return tuple(cell.shape[name] for name in ("batch", "heads", "seqlen_q", "head_dim"))


def inputs(cell, xp, rng):
    """Normal deviates q, k and v."""
    kv_shape = tuple(cell.shape[name] for name in ("batch", "kv_heads", "seqlen_k", "head_dim"))
    return tuple(normal(xp, rng, shape, cell.dtype) for shape in (q_shape(cell), *[kv_shape] * 2))


def call(q, k, v, causal, out=None):
    return cuattn.attention(q, k, v, is_causal=causal, out=out)


def some(count, size):
    """`count` of `size`, in order: the first, the last, and some between."""
    between = np.random.default_rng().permutation(np.arange(1, size - 1))[: max(0, count - 2)]
    return sorted({0, size - 1, *map(int, between)})


def causal(cell):
    """Options of attention for any rows of a sequence `b`."""
    return lambda b, heads, rows: {"is_causal": options(cell)["causal"]}


def samples(cell, inputs, asnumpy, how=None):
    """Rows of some heads of two sequences, in float64; `how` gives the options of these.

    The index on the device is a whole sequence: peers have the other axes in orders of their own.
    """
    q, k, v = inputs
    batch, heads, seqlen_q, _ = q.shape
    group, offset = heads // k.shape[1], k.shape[2] - seqlen_q
    chosen, found, how = some(HEADS, heads), [], how or causal(cell)
    for b in sorted({0, batch - 1}):
        keys, values = (np.stack([asnumpy(x[b, h // group]) for h in chosen]) for x in (k, v))
        queries = np.stack([asnumpy(q[b, h]) for h in chosen])
        for start in some(3, max(1, seqlen_q - ROWS + 1)):
            rows = slice(start, start + ROWS)
            arrays = queries[:, rows], keys, values
            expected, allowed = inside.truth_attention(
                *arrays, start + offset, cell.dtype, **how(b, chosen, rows)
            )
            found.append(Sample(slice(b, b + 1), expected, allowed, part=(0, chosen, rows)))
    return found


def work(cell):
    """FLOPs of the FlashAttention papers, and bytes of q, k, v and the result."""
    shape = cell.shape
    item = inside.dtype_of(cell.dtype).itemsize
    queries = shape["batch"] * shape["heads"] * shape["seqlen_q"]
    keys = shape["batch"] * shape["kv_heads"] * shape["seqlen_k"]
    flops = 4 * queries * shape["seqlen_k"] * shape["head_dim"]
    formula = "4 * batch * heads * seqlen_q * seqlen_k * head_dim"
    if shape["causal"]:
        flops, formula = flops // 2, f"{formula} / 2"
    return Work(2 * (queries + keys) * shape["head_dim"] * item, flops, formula)


def options(cell):
    return {"causal": bool(cell.shape["causal"])}


OPERATIONS = {
    "attention": Operation(
        ceiling="matmul",
        inputs=inputs,
        ours=call,
        samples=samples,
        work=work,
        result=q_shape,
        options=options,
    )
}
