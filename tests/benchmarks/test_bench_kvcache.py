"""Benchmarks of attention over a KV cache: verification, bytes, lengths; the paged example."""

from __future__ import annotations

import emulator
import numpy as np
import pytest
from conftest import on_a_gpu
from test_bench_attention import SPOILED, run
from test_bench_device import patient  # noqa: F401

from bench import attention_shapes, bench_kvcache, grids, inside, paged_cache
from bench.timing import analysis, device, measure

OPERATION = measure.operations()["attention_kvcache"]
KINDS = {
    "pages": {},
    "dense": {"page_size": 64},
    "page of one": {"page_size": 1},
    "spread": {"spread": 1},
    "one long": {"one_long": 1, "seqlen_k": 700},
    "several queries": {"seqlen_q": 3, "spread": 1},
    "e4m3": {"e4m3": 1},
}


def cell_of(dtype="float16", **sizes):
    shape = {**attention_shapes.cache_shape(3, 4, 2, 64, 16), "head_dim": 32, **sizes}
    return grids.Cell("attention_kvcache", "decode", dtype, tuple(shape.items()), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_ours_is_right(kind, dtype):
    ours = run(cell_of(dtype, **KINDS[kind]))[analysis.OURS]
    assert ours["status"] == "ok", ours["detail"]
    assert 0 < ours["max_error"] < ours["allowed_error"] < 0.05


@pytest.mark.parametrize("kind", ["spread", "several queries", "e4m3"])
def test_ours_is_right_in_kernels(kind):
    with emulator.activate("sm_80"):
        ours = run(cell_of("bfloat16", **KINDS[kind]))[analysis.OURS]
    assert ours["status"] == "ok", ours["detail"]


@on_a_gpu
@pytest.mark.parametrize("kind", ["spread", "dense", "e4m3"])
@pytest.mark.usefixtures("patient")
def test_a_cell_on_a_gpu(backend, kind):
    """The whole of the harness on the real thing, and every peer that is there."""
    cell = cell_of(**KINDS[kind])
    found = measure.measure_cell(cell, OPERATION, device.CudaDevice())["contestants"]
    entries = {entry["name"]: entry for entry in found}
    assert entries["cuattn"]["status"] == "ok", entries["cuattn"]["detail"]
    wanted = "unsupported" if kind == "e4m3" else "ok"
    assert entries["gather, attention"]["status"] == wanted
    assert [e["name"] for e in found if e["status"] in ("wrong", "failed")] == []


@pytest.mark.parametrize("how", SPOILED)
def test_a_wrong_result_is_seen(how):
    entry = run(cell_of(seqlen_q=5), SPOILED[how])[analysis.OURS]
    assert (entry["status"], entry["cold"]) == ("wrong", [])


def test_values_that_are_columns_of_keys(monkeypatch):
    monkeypatch.setattr(bench_kvcache, "VALUE_DIM", 24)
    cell = cell_of(kv_heads=1, value_dim=24)
    assert run(cell)[analysis.OURS]["status"] == "ok"
    rows = 3 * 4 * (32 + 24) * 2
    assert OPERATION.work(cell).bytes == 3 * 64 * 32 * 2 + rows


def test_gathered_pages_give_the_same(rng):
    for kind in ("pages", "spread", "several queries"):
        cell = cell_of("float32", **KINDS[kind])
        arrays = bench_kvcache.inputs(cell, np, rng)
        ours, other = (
            f(*arrays, causal=True) for f in (bench_kvcache.call, bench_kvcache.gathered)
        )
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-5)


def test_bytes_are_those_of_what_exists(rng):
    """Each page of the pool belongs to one sequence."""
    for sizes in KINDS.values():
        cell = cell_of(**sizes)
        q, k, v, lens, table = bench_kvcache.inputs(cell, np, rng)
        used = -(-lens // k.shape[2])
        own = [page for row, n in zip(table, used, strict=True) for page in row[:n]]
        assert sorted(own) == list(range(len(k)))
        assert cell.shape["seqlen_q"] <= lens.min() <= lens.max() <= cell.shape["seqlen_k"]
        size = int(lens.sum()) * (k[0, :, 0].nbytes + v[0, :, 0].nbytes)
        assert OPERATION.work(cell).bytes == size + 2 * q.nbytes
        assert (k.dtype == inside.E4M3) is bool(sizes.get("e4m3"))
        assert np.isfinite(k.astype(np.float32)).all()
    assert OPERATION.ceiling == "copy" and OPERATION.options(cell) == {"causal": True}


def test_cells_are_those_of_the_targets():
    """Half a GB however it lies; every shape has pages for its lengths."""
    cells = grids.cells(["attention_kvcache"])
    assert len({cell.key for cell in cells}) == len(cells) == 14
    sizes = [bench_kvcache.work(cell).bytes / 2**20 for cell in cells]
    assert [s for s in sizes if 510 < s < 514] and sum(size > 250 for size in sizes) >= 8
    assert all(np.diff(bench_kvcache.pages(cell)).size + 1 == cell.shape["batch"] for cell in cells)


def test_the_example_reuses_pages(rng, capsys):
    assert paged_cache.main() == 0
    assert "6 sequences of 28 pages in a pool of 24" in capsys.readouterr().out
    sequences = paged_cache.draw(rng, np)
    outs = paged_cache.serve(sequences, np)
    assert paged_cache.error(sequences, outs) <= paged_cache.TOLERANCE
    sequences[2].v[0, 5] += 1  # the key of one token, which later ones see
    assert paged_cache.error(sequences, outs) > 1e-3


@on_a_gpu
def test_the_example_on_a_gpu(backend, rng):
    sequences = paged_cache.draw(rng, backend.xp)
    outs = paged_cache.serve(sequences, backend.xp)
    assert paged_cache.error(sequences, outs) <= paged_cache.TOLERANCE


def test_pages_are_counted():
    pages = paged_cache.Pages(3, 4, 2, 2)
    pages.grow(0, 4)
    pages.grow(0, 1)
    pages.grow(1, 3)
    assert pages.free == [] and sorted(pages.table.ravel()) == [-1, 0, 1, 2]
    with pytest.raises(IndexError):
        pages.grow(1, 2)
    pages.end(0)
    assert len(pages.free) == 2 and (pages.table[0] == -1).all() and pages.lens.tolist() == [0, 3]
