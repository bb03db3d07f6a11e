"""What the paper's algorithms and cuattn cost, and the table of it in bench/README.md."""

from __future__ import annotations

import json
import sys

import emulator
import numpy as np
import pytest

from bench import baselines
from bench.counted import ladder
from bench.report import tables as report_tables

# Reads, writes and exponentials of an element.
COST = {
    "naive softmax": (2, 1, 2),
    "safe softmax": (3, 1, 2),
    "online softmax": (2, 1, 3),
    "cuattn.softmax": (1, 1, 1),
    "safe softmax, then top-5": (4, 1, 2),
    "online softmax with top-5": (1, 0, 2),
    "cuattn.softmax_topk": (1, 0, 1),
}


@pytest.mark.parametrize("shape", [(3, 8000), (2, 20_001)])
def test_cost(rng, shape):
    counted = ladder.count(*shape, seed=rng.integers(2**32))
    groups = {"softmax": [3, 4, 3, 2], "softmax+topk": [5, 1, 1]}
    for group, accesses in groups.items():
        found = [row["accesses"] for row in counted if row["group"] == group]
        assert found == pytest.approx(accesses, rel=0.01)
    for row in counted:
        reads, writes, exponentials = COST[row["algorithm"]]
        assert row["reads"] == pytest.approx(reads, rel=0.01)
        assert row["writes"] == pytest.approx(writes, rel=0.01, abs=0.01)
        # The merges of the 256 threads of a block, and of their warps, come on top.
        blocks = 4 if row["algorithm"] == "cuattn.softmax_topk" else 1  # a cluster shares a row
        most = exponentials + 600 * blocks / shape[1] + 0.15
        assert exponentials <= row["exponentials"] <= most
        assert row["overflows"] is (row["algorithm"] == "naive softmax")
        assert (ladder.README.parents[1] / row["file"]).is_file()
        assert row["ours"] is row["file"].startswith("cuda_src/")


def test_counters_are_those_of_the_context(rng):
    x = rng.standard_normal((4, 100), np.float32)
    with baselines.emulated("sm_80") as outer:
        baselines.safe_softmax_topk(x, 2)
        with baselines.emulated() as inner:
            baselines.online_softmax(x)
        baselines.naive_softmax(x)
    baselines.naive_softmax(x)
    assert (outer.arch, inner.arch) == ("sm_80", "sm_90")
    read = [[c.global_bytes_read // x.nbytes for c in d.counters] for d in (outer, inner)]
    assert read == [[3, 1, 2], [2]]


def test_the_context_says_on_what(monkeypatch):
    seen = []
    monkeypatch.setattr(emulator, "launch_source", lambda *a, **options: seen.append(options))
    with baselines.emulated("sm_80", 5):
        baselines.naive_softmax(np.zeros((1, 1), np.float32))
    assert (seen[0]["arch"], seen[0]["seed"]) == ("sm_80", 5)


@pytest.mark.parametrize("algorithm", ["safe softmax", "online softmax with top-5"])
def test_a_wrong_result_is_not_counted(monkeypatch, algorithm):
    steps = [step for step in ladder.steps() if step.algorithm == algorithm]

    def wrong(x, *k):
        y = np.array(x)
        y[-1, -1] += 1
        return steps[0].call(y, *k)

    monkeypatch.setattr(ladder, "steps", lambda: [steps[0]._replace(call=wrong)])
    with pytest.raises(AssertionError):
        ladder.count(3, 5)


def test_readme_shows_what_is_counted():
    text = ladder.README.read_text(encoding="utf-8")
    assert ladder.update_readme(text) == text
    stale = text.replace("| safe softmax | 3.00", "| safe softmax | 2.00")
    assert stale != text == ladder.update_readme(stale)
    with pytest.raises(ValueError, match="ladder"):
        ladder.update_readme(text.replace("<!-- ladder", "<!-- latter"))


def test_main(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ladder, "SHAPES", ((2, 300), (1, 500)))
    monkeypatch.setattr(ladder, "README", tmp_path / "README.md")
    ladder.README.write_text(
        "a\n<!-- ladder: python -m bench.counted.ladder -->\n<!-- end -->\nb\n"
    )
    monkeypatch.setattr(sys, "argv", ["ladder", "--readme", "--json", str(tmp_path / "l.json")])
    ladder.main()
    counted = json.loads((tmp_path / "l.json").read_text())
    assert {(row["rows"], row["cols"]) for row in counted} == {(2, 300), (1, 500)}
    printed = capsys.readouterr().out
    assert printed.strip() == report_tables.ladder_table(counted)
    first = report_tables.ladder_table([row for row in counted if row["rows"] == 2])
    assert f"\n\n{first}\n\n<!-- end -->" in ladder.README.read_text()
    assert printed.count("| naive softmax | 2.00 | 1.00 | 3.00 |") == 2
