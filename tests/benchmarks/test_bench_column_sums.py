"""The benchmark of sums of probabilities: what it verifies, counts, and hands to its peers."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
from test_bench_attention import cell_of, run

from bench.peers._cupy import Cupy
from bench.timing import analysis, measure

OPERATION = measure.operations()["attention_column_sums"]


def cell(**sizes):
    return cell_of("attention_column_sums", grid="llama", **sizes)


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
    (expression,) = Cupy(np, scipy.special).contestants("attention_column_sums", None, bool(causal))
    others = [expression] if dtype == "float16" else []
    for name, entry in run(cell(dtype=dtype, causal=causal, **sizes), others=others).items():
        assert entry["status"] == "ok", (name, entry["detail"])
        assert 0 < entry["max_error"] < entry["allowed_error"]


@pytest.mark.parametrize("how", ["first", "last", "heads", "keys", "a little"])
def test_wrong_sums_are_seen(how):
    def spoil(sums):
        found = np.array(sums)
        if how in ("first", "last"):
            found[(0,) * 3 if how == "first" else (-1,) * 3] += 1
        elif how == "a little":  # as if it were added up in float16
            found *= 1 + 2.0**-10
        else:
            found[...] = found[:, ::-1] if how == "heads" else np.roll(found, 1, 2)
        return found

    entry = run(cell(causal=1), spoil)[analysis.OURS]
    assert (entry["status"], entry["cold"]) == ("wrong", []) and "error" in entry["detail"]


@pytest.mark.parametrize("causal", [0, 1])
def test_work(causal):
    """One product, and each array once."""
    work = OPERATION.work(cell(causal=causal, batch=1))
    assert work.flops == 2 * 4 * 40 * 40 * 32 // (1 + causal)
    assert eval(work.formula, {}, cell(causal=causal, batch=1).shape) == work.flops
    assert work.bytes == (4 + 2) * 40 * 32 * 2 + 2 * 4 * 40 * 4
