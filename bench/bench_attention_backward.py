"""Gradients of attention against every peer that is installed; needs a GPU.

    python -m pytest bench/bench_attention_backward.py --benchmark-only -k "flash-attention"

Cells, contestants and cache states as in bench/bench_attention.py. y and the log-sum-exp are those
of a forward call, which is not timed, as that of each peer is not. FLOPs are FlashAttention's: five
products, and half of them where the mask is causal; ours are seven, without a sum by atomics. What
a model of these predicts (bench/timing/prediction.py) is stored beside what is measured.
"""

from __future__ import annotations

import cuattn
from bench import inside
from bench.bench_attention import ROWS, options, q_shape, some
from bench.bench_attention import inputs as forward_inputs
from bench.bench_attention import work as forward_work
from bench.bench_softmax import normal
from bench.timing import environment, prediction
from bench.timing.harness import Operation, Work
from bench.timing.verification import Sample


def bench_attention_backward(benchmark, measured):
    measured.replay(benchmark)


def inputs(cell, xp, rng):
    """Normal deviates grad, q, k and v, and the results of the forward call."""
    q, k, v = forward_inputs(cell, xp, rng)
    grad = normal(xp, rng, q_shape(cell), cell.dtype)
    y, lse = cuattn.attention(q, k, v, is_causal=options(cell)["causal"], return_lse=True)
    return grad, q, k, v, y, lse


def call(grad, q, k, v, y, lse, causal):
    return cuattn.attention_backward(grad, q, k, v, y, lse, is_causal=causal)[:3]


def samples(cell, inputs, asnumpy):
    """Rows of dq, and of dk and dv, of some heads of two sequences, in float64."""
    grad, q, k, v, y, lse = inputs
    (batch, heads, seqlen_q, _), (kv_heads, seqlen_k) = q.shape, k.shape[1:3]
    group, offset, causal = heads // kv_heads, seqlen_k - seqlen_q, options(cell)["causal"]
    found = []
    for b in sorted({0, batch - 1}):
        for g in some(2, kv_heads):
            shared = slice(g * group, (g + 1) * group)
            of_queries = [asnumpy(a[b, shared]) for a in (grad, q, y, lse)]
            keys, values = (asnumpy(a[b, g : g + 1]) for a in (k, v))
            for start in some(3, max(1, seqlen_q - ROWS + 1)):  # dq of queries, with all keys
                rows = slice(start, start + ROWS)
                own_grad, own_q, own_y, own_lse = (a[:, rows] for a in of_queries)
                arrays = [own_grad, own_q, keys, values, own_y, own_lse]
                truth = inside.truth_attention_backward(arrays, causal, start + offset, cell.dtype)
                where = (0, shared, rows)
                found.append(Sample(slice(b, b + 1), *truth[0], part=where, which=0))
            for start in some(2, max(1, seqlen_k - ROWS + 1)):  # dk and dv, with all queries
                rows = slice(start, start + ROWS)
                own_grad, own_q, own_y, own_lse = of_queries
                arrays = [own_grad, own_q, keys[:, rows], values[:, rows], own_y, own_lse]
                truth = inside.truth_attention_backward(arrays, causal, offset - start, cell.dtype)
                for which in (1, 2):
                    where = (0, slice(g, g + 1), rows)
                    found.append(Sample(slice(b, b + 1), *truth[which], part=where, which=which))
    return sorted(found, key=lambda sample: sample.which)


def work(cell):
    """FLOPs of the FlashAttention papers, and bytes of what is read and written once."""
    forward = forward_work(cell)
    shape = cell.shape
    sums = 4 * shape["batch"] * shape["heads"] * shape["seqlen_q"]
    formula = forward.formula.replace("4 *", "10 *", 1)
    return Work(2 * forward.bytes + sums, forward.flops // 2 * 5, formula)


def predicted(cell, kernels):
    return prediction.attention_backward(cell.shape, kernels, environment.gpu())


OPERATIONS = {
    "attention_backward": Operation(
        ceiling="matmul",
        inputs=inputs,
        ours=call,
        samples=samples,
        work=work,
        result=None,  # three of them
        options=options,
        predicted=predicted,
    )
}
