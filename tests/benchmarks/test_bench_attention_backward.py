"""The benchmark of attention's gradients: what it verifies, counts, and hands to its peers."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
from test_bench_attention import cell_of, run
from test_bench_harness import Arrays

import cuattn
from bench import grids, peers
from bench.peers._base import BSHD
from bench.peers._cupy import Cupy
from bench.timing import analysis, measure

OPERATION = measure.operations()["attention_backward"]


def cell(**sizes):
    return cell_of("attention_backward", **sizes)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        ("float16", {}),
        ("bfloat16", {"seqlen_q": 33, "seqlen_k": 301}),
        ("float16", {"seqlen_q": 1, "seqlen_k": 5, "heads": 2, "batch": 1}),
    ],
)
def test_ours_and_the_baseline_are_right(dtype, sizes, causal):
    (expression,) = Cupy(np, scipy.special).contestants("attention_backward", None, bool(causal))
    others = [expression] if dtype == "float16" else []
    for name, entry in run(cell(dtype=dtype, causal=causal, **sizes), others=others).items():
        assert entry["status"] == "ok", (name, entry["detail"])
        assert 0 < entry["max_error"] < entry["allowed_error"]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("how", ["first", "last", "heads", "rows", "sign"])
def test_a_wrong_gradient_is_seen(which, how):
    def spoil(gradients):
        found = [np.array(one) for one in gradients]
        one = found[which]
        if how in ("first", "last"):
            one[(0,) * 4 if how == "first" else (-1,) * 4] += 1
        else:
            one[...] = {"heads": one[:, ::-1], "rows": np.roll(one, 1, 2), "sign": -one}[how]
        return tuple(found)

    entry = run(cell(causal=1), spoil)[analysis.OURS]
    assert (entry["status"], entry["cold"]) == ("wrong", []) and "error" in entry["detail"]


def test_the_other_mask_is_seen():
    for causal in (0, 1):
        wrong = peers.Contestant(
            "other", Arrays(), lambda *a, c=causal: OPERATION.ours(*a, causal=not c)
        )
        assert run(cell(causal=causal), others=[wrong])["other"]["status"] == "wrong"


class Turned(BSHD, Arrays):
    """A library whose arrays are (batch, seqlen, heads, head_dim)."""


def test_layouts_of_peers():
    """Arrays of four axes are turned round for them, the log-sum-exp is not."""
    seen = []

    def turned(*arrays):
        seen.extend(a.shape for a in arrays)
        grad, q, k, v, y, lse = arrays
        return cuattn.attention_backward(grad, q, k, v, y, lse, layout="BSHD")[:3]

    entry = run(cell(), others=[peers.Contestant("turned", Turned(), turned)])["turned"]
    assert entry["status"] == "ok", entry["detail"]
    assert {(2, 40, 4, 32), (2, 40, 2, 32), (2, 4, 40)} == set(seen)


def test_work_is_that_of_the_papers():
    """Five products of two FLOPs; six arrays, four of them read, and the log-sum-exp."""
    for causal in (0, 1):
        work = OPERATION.work(cell(causal=causal))
        assert work.flops == 10 * 2 * 4 * 40 * 40 * 32 // (1 + causal)
        assert eval(work.formula, dict(cell(causal=causal).shape)) == work.flops
        of_queries, of_keys = 2 * 4 * 40 * 32 * 2, 2 * 2 * 40 * 32 * 2
        assert work.bytes == 4 * of_queries + 4 * of_keys + 2 * 4 * 40 * 4
    assert any(
        cell.operation == "attention_backward" for cell in grids.cells(["attention_backward"])
    )
