"""The best keys of queries, exact search among vectors by inner product; needs a GPU.

    python -m pytest bench/bench_attention_topk.py --benchmark-only -k float16

One benchmark a cell (bench/grids.py), contestant and cache state, in groups of one cell and state.
Beside ours are cuVS's exact search, and what is written by hand, which stores the products of all
pairs: a matrix product and a selection from it, by CuPy, RAFT or PyTorch. A peer may choose others
among equal products.
"""

from __future__ import annotations

import numpy as np

import cuattn
from bench import inside
from bench.bench_attention import some
from bench.bench_softmax import normal
from bench.timing.harness import Operation, Work
from bench.timing.verification import Sample
from cuattn import reference

INDEX_BYTES = 8
QUERIES = 2  # that are verified


def bench_attention_topk(benchmark, measured):
    measured.replay(benchmark)


def inputs(cell, xp, rng):
    """Normal deviates: queries, and the vectors among which they search."""
    shapes = ((cell.shape[name], cell.shape["head_dim"]) for name in ("seqlen_q", "seqlen_k"))
    return tuple(normal(xp, rng, shape, cell.dtype) for shape in shapes)


def call(q, k, num):
    return cuattn.attention_topk(q, k, num, scale=1, output="logit")


def samples(cell, inputs, asnumpy):
    """Whole rows of some queries: values, and what the indices select."""
    q, k = map(asnumpy, inputs)
    size = np.sqrt(q.shape[1]) * (np.finfo(np.float32).eps if cell.dtype == "float32" else 2e-3)
    found = []
    for i in some(QUERIES, len(q)):
        part = slice(i, i + 1)
        rows = q[part].astype(np.float64) @ k.astype(np.float64).T
        best = reference.top_k(rows, cell.shape["k"])
        allowed = 8 * float(size) * float(np.abs(best.values).max())
        found += [
            Sample(part, best.values, allowed, which=0),
            Sample(part, best.values, allowed, which=1, selects_from=rows),
        ]
    return found


def work(cell):
    """FLOPs of the products, and bytes of one read of q and k, and of the results."""
    shape, item = cell.shape, inside.dtype_of(cell.dtype).itemsize
    queries, keys, dim = shape["seqlen_q"], shape["seqlen_k"], shape["head_dim"]
    size = (queries + keys) * dim * item + queries * shape["k"] * (item + INDEX_BYTES)
    return Work(size, 2 * queries * keys * dim, "2 * seqlen_q * seqlen_k * head_dim")


OPERATIONS = {
    "attention_topk": Operation(
        ceiling="matmul",
        inputs=inputs,
        ours=call,
        samples=samples,
        work=work,
        result=None,
        options=lambda cell: {"num": cell.shape["k"]},
    )
}
