"""The table of NumPy arrays: every kind of cell is computed, compared and shown."""

from __future__ import annotations

import pytest

from bench import bench_numpy


def test_a_small_table(monkeypatch):
    monkeypatch.setattr(bench_numpy, "BUDGET", 0)
    monkeypatch.setattr(
        bench_numpy, "ROWS", [("float16", (3, 70), -1), ("float64", (4, 5, 6), (0, 2))]
    )
    monkeypatch.setattr(bench_numpy, "FEW_ROWS", [("bfloat16", (3, 70), -1)])
    monkeypatch.setattr(bench_numpy, "SELECTIONS", [("float32", (3, 400), 5)])
    monkeypatch.setattr(bench_numpy, "ATTENTION", [(1, 4, 2, 5, 9, 8, True)])
    text = bench_numpy.table()
    for operation in ("softmax", "log_softmax", "logsumexp", "top_k", "softmax_topk", "attention"):
        assert f"| `{operation}` |" in text
    monkeypatch.setattr(bench_numpy, "softmax", lambda x, axis: x)
    with pytest.raises(AssertionError):
        bench_numpy.table()
