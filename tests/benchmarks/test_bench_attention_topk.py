"""Benchmarks of nearest neighbours: ours and the expressions by hand are verified, by values."""

from __future__ import annotations

import emulator
import numpy as np
import pytest
import scipy.special
from test_bench_harness import Arrays, Device

from bench import bench_attention_topk, grids, inside, peers
from bench.peers._cupy import Cupy
from bench.timing import analysis, harness

OPERATION = bench_attention_topk.OPERATIONS["attention_topk"]
SIZES = (("seqlen_q", 3), ("seqlen_k", 200), ("head_dim", 16), ("k", 9))


def run(dtype, change=lambda found: found, others=()):
    """Contestant to its entry, of a cell that is measured without a GPU."""
    cell, clock = grids.Cell("attention_topk", "neighbours", dtype, SIZES, 1), Device()

    def timed(call):
        def slow(*arrays):
            clock.now += 1e-3
            return call(*arrays, **OPERATION.options(cell))

        return slow

    def ours(q, k, num):
        return change(OPERATION.ours(q, k, num))

    first, *rest = (
        peers.Contestant(name, Arrays(), timed(call))
        for name, call in ((analysis.OURS, ours), *others)
    )
    measured = harness.measure(
        cell, OPERATION, first, rest, clock, seconds=0.0, plan=inside.launched
    )
    return {entry["name"]: entry for entry in measured["contestants"]}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_ours_and_the_expression_are_right(monkeypatch, dtype):
    monkeypatch.setattr(bench_attention_topk, "Cupy", lambda: Cupy(np, scipy.special))
    (name, by_hand), _ = OPERATION.others.items()
    with emulator.activate("sm_90"):
        entries = run(dtype, others=[(name, by_hand)])
    for entry in entries.values():
        assert entry["status"] == "ok", entry["detail"]


@pytest.mark.parametrize("which", [0, 1], ids=["values", "indices"])
def test_a_wrong_result_is_seen(which):
    def change(found):
        arrays = [np.array(array) for array in found]
        arrays[which][:, 0] = arrays[which][:, 8]
        return type(found)(*arrays)

    assert run("float32", change)[analysis.OURS]["status"] == "wrong"


def test_all_products_need_room(monkeypatch):
    monkeypatch.setattr(bench_attention_topk, "SCORE_BYTES", 100)
    name, by_hand = next(iter(OPERATION.others.items()))
    assert run("float32", others=[(name, by_hand)])[name]["status"] == "unsupported"
