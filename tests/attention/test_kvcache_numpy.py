"""attention_kvcache on NumPy arrays: what only this path can do wrong. The rest is on every
backend."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from kvcache_cases import Cached, verify
from test_kvcache import EightBits, bits

import cuattn
from cuattn._arrays import blocks
from cuattn._attention import numpy_attention

pytestmark = pytest.mark.parametrize("backend", ["numpy"], indirect=True)


@pytest.mark.parametrize("tile", [(8, 32), (40, 1000)], ids=["8x4", "40x25"])
@pytest.mark.parametrize("page_size", [None, 5, 64])
def test_tiles(backend, rng, monkeypatch, tile, page_size):
    """Borders of tiles of keys, of queries and of heads inside pages, and beside missing ones."""
    monkeypatch.setattr(numpy_attention, "ROWS", tile[0])
    monkeypatch.setattr(numpy_attention, "SCORES", tile[1])
    missing = [] if page_size is None else [(0, 1), (2, 0)]
    how = {"lens": [83, 20, 83, 7], "rows": 19, "page_size": page_size, "heads": (6, 2)}
    how["missing"] = missing
    for op in ("bfloat16", "float32"):
        verify(backend, rng, op, **how, is_causal=True)
        verify(backend, rng, op, **how, window=(11, 2), tree=rng.random((19, 30)) < 0.7)
    for scales in ("head", "token"):
        cached = EightBits(rng, "int8", scales, lens=[83, 20], rows=9, page_size=page_size)
        cached.problem.check(*cached.run(backend))


def test_threads(backend, rng, monkeypatch):
    """Bit by bit as without."""
    cached = Cached(rng, "float32", lens=[300, 7, 300, 90], page_size=16, rows=40, new=3)
    alone = cached.run(backend)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setattr(blocks, "THREADED", 1)
    monkeypatch.setattr(blocks, "thread_limit", lambda: 3)
    monkeypatch.setattr(blocks, "_pool", None)
    assert bits(cached.run(backend)) == bits(alone)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("swap", [False, True])
def test_no_more_memory_than_tiles(backend, rng, dtype, swap):
    """Neither of a large pool nor of a long sequence there is a copy."""
    pool = np.ones((2048, 8, 16, 64), dtype)  # 16 MiB of int8
    pool = np.ascontiguousarray(pool.swapaxes(1, 2)).swapaxes(1, 2) if swap else pool
    table, lens = rng.permutation(2048).reshape(1, -1), np.array([2048 * 16])
    q = np.ones((1, 8, 1, 64), np.float32 if dtype == "int8" else dtype)
    tracemalloc.start()
    try:
        out = cuattn.attention_kvcache(q, pool, pool, kv_lens=lens, page_table=table)
        dense = pool[None, :1, :, :, :].reshape(8, 1, 16, 64)
        cuattn.attention_kvcache(np.repeat(q, 8, 0)[:, :1], dense, dense)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(out, 1, rtol=1e-3)
    assert peak < pool.nbytes / 2, peak


def test_a_window_reads_its_own_keys(backend, rng):
    """Pages before it are not looked at: NaN there has no cost, and no table entry counts."""
    cached = Cached(rng, "float32", lens=[900, 500], page_size=10, window=(25, 0), is_causal=True)
    want = cached.run(backend)
    cached.problem.check(*want)
    table = cached.options["page_table"]
    table[0, :87] = table[1, :47] = -7
    assert bits(cached.run(backend)) == bits(want)
