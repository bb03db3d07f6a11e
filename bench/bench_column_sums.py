"""Sums of the probabilities of each key against what peers write by hand; needs a GPU.

    python -m pytest bench/bench_column_sums.py --benchmark-only -k "llama"

Cells, contestants and cache states as in bench/bench_attention.py. The log-sum-exp is that of a
forward call, which is not timed, and every contestant is given it. FLOPs are those of one product,
half of them where the mask is causal.
"""

from __future__ import annotations

import cuattn
from bench import inside
from bench.bench_attention import HEADS, ROWS, options, some
from bench.bench_attention import inputs as forward_inputs
from bench.timing.harness import Operation, Work
from bench.timing.verification import Sample


def bench_column_sums(benchmark, measured):
    measured.replay(benchmark)


def inputs(cell, xp, rng):
    """Normal deviates q and k, and the log-sum-exp of the forward call."""
    q, k, v = forward_inputs(cell, xp, rng)
    _, lse = cuattn.attention(q, k, v, is_causal=options(cell)["causal"], return_lse=True)
    return q, k, lse


def call(q, k, lse, causal, out=None):
    return cuattn.attention_column_sums(q, k, lse, is_causal=causal, out=out)


def result(cell):
    return tuple(cell.shape[name] for name in ("batch", "heads", "seqlen_k"))


def samples(cell, inputs, asnumpy):
    """Some keys of some heads of two sequences, over all queries, in float64."""
    q, k, lse = inputs
    (batch, heads, seqlen_q, _), (kv_heads, seqlen_k) = q.shape, k.shape[1:3]
    offset, causal = seqlen_k - seqlen_q, options(cell)["causal"]
    chosen, found = some(HEADS, heads), []
    for b in sorted({0, batch - 1}):
        queries, sums = (asnumpy(a[b])[chosen] for a in (q, lse))
        keys = asnumpy(k[b])[[h * kv_heads // heads for h in chosen]]
        for start in some(3, max(1, seqlen_k - ROWS + 1)):
            rows = slice(start, start + ROWS)
            arrays = queries, keys[:, rows], sums
            truth = inside.truth_column_sums(*arrays, causal, offset - start, cell.dtype)
            expected, ours, others = truth
            where = {"part": (0, chosen, rows)}
            found.append(Sample(slice(b, b + 1), expected, ours, **where, holds_for_peers=False))
            found.append(Sample(slice(b, b + 1), expected, others, **where))
    return found


def work(cell):
    """FLOPs of the scores, and bytes of q, k, lse and the result."""
    shape = cell.shape
    item = inside.dtype_of(cell.dtype).itemsize
    queries = shape["batch"] * shape["heads"] * shape["seqlen_q"]
    keys = shape["batch"] * shape["kv_heads"] * shape["seqlen_k"]
    flops = 2 * queries * shape["seqlen_k"] * shape["head_dim"]
    formula = "2 * batch * heads * seqlen_q * seqlen_k * head_dim"
    if shape["causal"]:
        flops, formula = flops // 2, f"{formula} / 2"
    sums = queries + shape["batch"] * shape["heads"] * shape["seqlen_k"]
    return Work((queries + keys) * shape["head_dim"] * item + 4 * sums, flops, formula)


OPERATIONS = {
    "attention_column_sums": Operation(
        ceiling="matmul",
        inputs=inputs,
        ours=call,
        samples=samples,
        work=work,
        result=result,
        dtype=lambda cell: "float32",
        options=options,
    )
}
