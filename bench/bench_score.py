"""Score expressions and block masks against every peer that is installed; needs a GPU.

    python -m pytest bench/bench_score.py --benchmark-only -k "documents and bfloat16"

Cells, contestants and cache states as in bench/bench_attention.py; the expressions and masks are
those of bench/patterns.py, the former under a causal mask. What does not depend on q, k and v is
made before any clock runs, as for all layers of a model: our lists of tiles and FlexAttention's,
and the bias or mask that PyTorch's fused attention takes. FLOPs of a block mask are those of the
pairs that it shows.
"""

from __future__ import annotations

import cuattn
from bench import bench_attention, patterns
from bench.timing.harness import Operation, Work


def bench_score(benchmark, measured):
    measured.replay(benchmark)


def options(cell):
    return {"pattern": patterns.named(cell.shape)}


# -- Score expressions ---------------------------------------------------------------------------


def score_inputs(cell, xp, rng):
    """q, k and v, and the array of the expression, if it has one."""
    tables = patterns.score_tables(patterns.named(cell.shape), cell.shape)
    return (*bench_attention.inputs(cell, xp, rng), *map(xp.asarray, tables))


def with_score(q, k, v, *table, pattern, out=None):
    how = {"score": patterns.SCORES[pattern], "score_args": dict(zip(["table"], table))}  # noqa: B905
    return cuattn.attention(q, k, v, is_causal=True, out=out, **how)


def score_samples(cell, inputs, asnumpy):
    pattern, tables = patterns.named(cell.shape), [asnumpy(table) for table in inputs[3:]]

    def scored(b, heads, rows):
        part = heads if pattern == "t5" else slice(b, b + 1)
        args = {"table": tables[0][part]} if tables else {}
        return {"is_causal": True, "score": patterns.SCORES[pattern], "score_args": args}

    return bench_attention.samples(cell, inputs[:3], asnumpy, scored)


# -- Block masks ---------------------------------------------------------------------------------


def mask_inputs(cell, xp, rng):
    """q, k and v, a mask and its lists, and what the mask was made from."""
    pattern, size = patterns.named(cell.shape), cell.shape["seqlen_k"]
    table = xp.asarray(patterns.mask_table(pattern, size))
    counts, indices, full, mask, _ = cuattn.block_mask(patterns.mask(pattern, xp, table, size))
    return (*bench_attention.inputs(cell, xp, rng), mask, counts, indices, full, table)


def with_block_mask(q, k, v, mask, counts, indices, full, table, pattern, out=None):
    lists = cuattn.BlockMask(counts, indices, full, mask, (patterns.TILE, patterns.TILE))
    return cuattn.attention(q, k, v, block_mask=lists, out=out)


def mask_samples(cell, inputs, asnumpy):
    q, k, v, mask, *_ = inputs
    return bench_attention.samples(
        cell, (q, k, v), asnumpy, lambda b, heads, rows: {"mask": asnumpy(mask[rows])}
    )


def mask_work(cell):
    """FLOPs of the pairs that are shown, and bytes of q, k, v and the result."""
    shape = cell.shape
    pairs = patterns.pairs(patterns.named(shape), shape["seqlen_k"])
    flops = 4 * shape["batch"] * shape["heads"] * pairs * shape["head_dim"]
    formula = f"4 * batch * heads * {pairs} * head_dim"
    return Work(bench_attention.work(cell).bytes, flops, formula)


def operation(**functions):
    shared = {"ceiling": "matmul", "result": bench_attention.q_shape, "options": options}
    return Operation(**shared, **functions)


OPERATIONS = {
    "attention_score": operation(
        inputs=score_inputs, ours=with_score, samples=score_samples, work=bench_attention.work
    ),
    "attention_block_mask": operation(
        inputs=mask_inputs, ours=with_block_mask, samples=mask_samples, work=mask_work
    ),
}
