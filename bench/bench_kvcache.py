"""Attention over a KV cache against every peer that is installed; needs a GPU.

    python -m pytest bench/bench_kvcache.py --benchmark-only -k "decode and page_size16"

One benchmark a cell (bench/grids.py), contestant and cache state, in groups of one cell and state.
The work is the bytes of those keys and values that exist, of q and of the result: the rate is a
share of the copy speed that the same run measures. "gather, attention" copies the pages of each
sequence side by side first. Pages lie in the pool at random; where a sequence has but one, the
cache is dense. `bench_paged_cache` is bench/paged_cache.py on NumPy arrays, and needs no GPU.
"""

from __future__ import annotations

import numpy as np

import cuattn
from bench import inside, paged_cache
from bench.bench_attention import some
from bench.bench_softmax import normal
from bench.peers import Unsupported
from bench.timing.harness import Operation, Work
from bench.timing.verification import Sample

HEADS = 3  # that are verified: of the first, last, shortest and longest sequence
VALUE_DIM = 512  # of multi-head latent attention
SHORT = 500  # keys of the others beside one long sequence


def bench_kvcache(benchmark, measured):
    measured.replay(benchmark)


def bench_paged_cache(benchmark):
    assert benchmark(paged_cache.main) == 0


def lengths(cell):
    """Keys of each sequence: all as many, or one of many and others of few, or spread widely."""
    batch, most = cell.shape["batch"], cell.shape["seqlen_k"]
    found = np.full(batch, most)
    if cell.shape.get("one_long"):
        found[1:] = min(SHORT, most)
    elif cell.shape.get("spread"):
        found = np.maximum(1, most * np.random.default_rng(0).random(batch) ** 2).astype(np.int64)
    return np.maximum(found, cell.shape["seqlen_q"]).astype(np.int32)


def pages(cell):
    """Pages of each sequence."""
    return -(-lengths(cell) // cell.shape["page_size"])


def is_dense(cell):
    return cell.shape["page_size"] >= cell.shape["seqlen_k"]


def inputs(cell, xp, rng):
    """q, k_cache, v_cache, kv_lens and page_table; v_cache is empty where values are columns of
    keys."""
    shape, counts = cell.shape, pages(cell)
    total = int(counts.sum())
    order = np.arange(total) if is_dense(cell) else rng.permutation(total)
    table = np.zeros((len(counts), counts.max()), np.int32)
    table[np.arange(table.shape[1]) < counts[:, None]] = order
    lead = total, shape["kv_heads"], shape["page_size"]
    dims = shape["head_dim"], 0 if "value_dim" in shape else shape["head_dim"]
    caches = [cache(cell, xp, rng, (*lead, dim)) for dim in dims]
    q = normal(xp, rng, (*result(cell)[:3], shape["head_dim"]), cell.dtype)
    return q, *caches, xp.asarray(lengths(cell)), xp.asarray(table)


def cache(cell, xp, rng, shape):
    """Normal deviates or, of 8 bits, codes of numbers below 2."""
    if not cell.shape.get("e4m3"):
        return normal(xp, rng, shape, cell.dtype)
    codes = xp.random.default_rng(int(rng.integers(1 << 62))).integers(0, 256, shape, xp.uint8)
    return (codes & np.uint8(0xBF)).view(inside.E4M3)


def result(cell):
    shape = cell.shape
    return *(shape[n] for n in ("batch", "heads", "seqlen_q")), value_dim(cell)


def value_dim(cell):
    return cell.shape.get("value_dim", cell.shape["head_dim"])


def call(q, k_cache, v_cache, kv_lens, page_table, causal, out=None):
    """The new keys are in the cache already."""
    how = {"kv_lens": kv_lens, "is_causal": causal, "out": out}
    if page_table.shape[1] > 1:
        how["page_table"] = page_table
    if v_cache.size == 0:
        v_cache, how["value_dim"] = None, VALUE_DIM
    return cuattn.attention_kvcache(q, k_cache, v_cache, **how)


def gathered(q, k_cache, v_cache, kv_lens, page_table, causal):
    """The pages of each sequence side by side, then attention over all that there is room for."""
    if v_cache.size == 0 or k_cache.dtype != q.dtype:
        raise Unsupported("attention has no such cache")
    k, v = (
        a[page_table].swapaxes(1, 2).reshape(len(q), a.shape[1], -1, a.shape[3])
        for a in (k_cache, v_cache)
    )
    return cuattn.attention(q, k, v, kv_lens=kv_lens, is_causal=causal)


def samples(cell, inputs, asnumpy):
    """Some heads of some sequences, in float64."""
    q, k_cache, v_cache, _, page_table = inputs
    lens, group, found = lengths(cell), q.shape[1] // k_cache.shape[1], []
    chosen = some(HEADS, q.shape[1])
    for b in sorted({0, int(lens.argmin()), int(lens.argmax()), len(lens) - 1}):
        own = asnumpy(page_table[b])[: pages(cell)[b]]
        caches = [cache for cache in (k_cache, v_cache) if cache.size]
        parts = [side_by_side(a, own, lens[b], cell.dtype, asnumpy) for a in caches]
        keys, values = parts[0], parts[-1][..., : value_dim(cell)]
        heads = [h // group for h in chosen]
        queries = np.stack([asnumpy(q[b, h]) for h in chosen])
        first = int(lens[b]) - q.shape[2]
        expected, allowed = inside.truth_attention(
            queries, keys[heads], values[heads], first, cell.dtype, is_causal=True
        )
        found.append(Sample(slice(b, b + 1), expected, allowed, part=(0, chosen)))
    return found


def side_by_side(cache, own, n, dtype, asnumpy):
    """The first n keys of a sequence, whose pages these are, (H_kv, n, D); CuPy moves e4m3 as
    integers only."""
    pages = asnumpy(cache.view(f"u{cache.itemsize}")[own]).view(cache.dtype)
    rows = pages.swapaxes(0, 1).reshape(cache.shape[1], -1, cache.shape[3])[:, :n]
    return rows.astype(inside.dtype_of(dtype))


def work(cell):
    """Bytes of keys and values that exist, of q and of the result; FLOPs of two products."""
    shape, keys = cell.shape, int(lengths(cell).sum())
    item = inside.dtype_of(cell.dtype).itemsize
    dims = shape["head_dim"] + (0 if "value_dim" in shape else shape["head_dim"])
    queries = shape["batch"] * shape["heads"] * shape["seqlen_q"]
    both = shape["head_dim"] + value_dim(cell)
    size = keys * shape["kv_heads"] * dims * (1 if shape.get("e4m3") else item)
    flops = 2 * keys * shape["heads"] * shape["seqlen_q"] * both
    return Work(size + queries * both * item, flops, "keys and values that exist, q and the result")


def options(cell):
    return {"causal": True}


OPERATIONS = {
    "attention_kvcache": Operation(
        ceiling="copy",
        inputs=inputs,
        ours=call,
        samples=samples,
        work=work,
        result=result,
        options=options,
        others={"gather, attention": gathered},
    )
}
