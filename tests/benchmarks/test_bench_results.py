"""From samples to numbers: results whose every number is known, and damaged ones."""

from __future__ import annotations

import copy
import json
import math
import re
import sys

import pytest
import synthetic_results as synthetic

from bench.report import schema
from bench.timing import analysis


@pytest.fixture(scope="module")
def full():
    return synthetic.full()


# -- The schema --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [synthetic.full, synthetic.empty])
def test_a_result_is_valid_and_survives_the_file(tmp_path, make):
    result, path = make(), tmp_path / "new" / "result.json"
    assert schema.validate(result) is True
    assert schema.save(result, path) is True
    assert schema.load(path) == result
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_a_file_has_sorted_keys_and_a_line_for_each_list_of_samples(tmp_path):
    result = synthetic.empty() | {"import_time": {"numpy": [0.1, 1 / 3, 2e-17], "cuattn": [1e22]}}
    result["environment"]["cpu"] = "[\n1,\n2\n]"  # a string is not a list
    schema.save(result, tmp_path / "a.json")
    backwards = dict(reversed(result.items()))
    schema.save(backwards, tmp_path / "b.json")
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "[0.1, 0.3333333333333333, 2e-17]" in text and "[1e+22]" in text
    assert schema.load(tmp_path / "a.json") == result
    assert (tmp_path / "b.json").read_text(encoding="utf-8") == text


OURS = ("cells", 0, "contestants", 0)
WRONG = ("cells", 4, "contestants", 1)  # bfloat16, 4096 columns: torch.compile is wrong
REMOVED = object()


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("peers",), REMOVED, "the result: 'peers'"),
        (("more",), 1, "the result:"),
        (("schema",), 2, "schema:"),
        (("environment", "gpu", "name"), REMOVED, "environment.gpu: 'name'"),
        (("environment", "commit"), "0123456", "environment.commit:"),
        (("environment", "date"), "yesterday", "environment.date:"),
        (("parts", 0, "status"), "fine", "parts[0].status:"),
        (("ceilings", "write"), {}, "ceilings:"),
        (("ceilings", "copy", "samples"), [], "ceilings.copy.samples:"),
        (("ceilings", "copy", "unit"), "FLOP/s", "ceilings.copy.unit:"),
        (("cells", 0, "dtype"), "float8", "cells[0].dtype:"),
        (("cells", 0, "ceiling"), "write", "cells[0].ceiling:"),
        (("cells", 0, "shape", "rows"), 2.5, "cells[0].shape.rows:"),
        (("cells", 0, "work", "bytes"), -1, "cells[0].work.bytes:"),
        ((*OURS, "cold", 1), -1e-6, "cells[0].contestants[0].cold[1]:"),
        ((*OURS, "cold", 1), 0, "cells[0].contestants[0].cold[1]:"),
        ((*OURS, "cold", 1), math.nan, "cells[0].contestants[0].cold[1]: a number that is not"),
        ((*OURS, "max_error"), math.inf, "cells[0].contestants[0].max_error: a number that is not"),
        ((*OURS, "cold"), [], "cells[0].contestants[0].cold:"),
        ((*OURS, "warm"), [], "cells[0].contestants[0].warm:"),
        ((*OURS, "clock"), None, "cells[0].contestants[0].clock:"),
        ((*OURS, "status"), "good", "cells[0].contestants[0].status:"),
        ((*OURS, "status"), "wrong", "cells[0].contestants[0].cold:"),
        ((*OURS, "plan"), REMOVED, "cells[0].contestants[0]: 'plan'"),
        ((*WRONG, "warm"), [1.0], "cells[4].contestants[1].warm:"),
        ((*WRONG, "status"), "ok", "cells[4].contestants[1].clock:"),
        (("ladder", 0, "group"), "attention", "ladder[0].group:"),
        (("kernels", 0, "occupancy", "warps"), REMOVED, "kernels[0].occupancy: 'warps'"),
        (("kernels", 0, "mix", "mufu"), "8", "kernels[0].mix.mufu:"),
        (("host_cost", 0, "seconds", 0), 0, "host_cost[0].seconds[0]:"),
        (("compile_time", 0, "what"), "tepid", "compile_time[0].what:"),
        (("import_time", "numpy"), 0.1, "import_time.numpy:"),
    ],
)
def test_damage_is_refused_by_its_path(full, tmp_path, path, value, named):
    damaged = copy.deepcopy(full)
    *parents, key = path
    where = damaged
    for parent in parents:
        where = where[parent]
    if value is REMOVED:
        del where[key]
    else:
        where[key] = value
    with pytest.raises(ValueError, match=f"^{re.escape(named)}"):
        schema.validate(damaged)
    with pytest.raises(ValueError, match=f"^{re.escape(named)}"):
        schema.save(damaged, tmp_path / "result.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "result.json").write_text(json.dumps(damaged), encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(named)}"):
        schema.load(tmp_path / "result.json")


def test_without_jsonschema_a_result_is_saved_with_a_warning(full, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.warns(UserWarning, match="not validated"):
        assert schema.save(full, tmp_path / "result.json") is False
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == full


def test_the_file_name_says_what_was_measured(full):
    assert schema.file_name(full) == "nvidia-test-gpu-2031-02-03-0123456.json"
    changed = synthetic.empty()
    changed["environment"].update(commit=None, dirty=True)
    assert schema.file_name(changed) == "no-gpu-2031-02-03-unknown-dirty.json"


# -- Arithmetic --------------------------------------------------------------------------------


def test_median_and_spread():
    assert analysis.median([5.0, 1.0, 2.0]) == 2.0
    assert analysis.median([4.0, 1.0, 2.0, 100.0]) == 3.0
    assert analysis.spread([6.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 5.0)
    assert analysis.median([]) is None and analysis.spread([]) is None
    assert analysis.geometric_mean([2.0, 8.0, 4.0]) == pytest.approx(4.0)
    assert analysis.geometric_mean([]) is None


def two_cells():
    """A bandwidth cell, and a throughput cell whose best peer differs with the L2 cache."""
    of = synthetic.contestant
    slow_first = of("a", 2e-3) | {"warm": [0.1e-3]}
    first = [of("cuattn", 1e-3), slow_first, of("b", 3e-3, clock="host")]
    second = [of("cuattn", 4e-3), of("a", 3e-3), of("b", status="hung")]
    shape = {"rows": 2, "cols": 4}
    result = synthetic.full()
    result["cells"] = [
        synthetic.cell("f", "x", shape, "float32", first, (10**9, 5)),
        synthetic.cell("g", "x", shape, "float32", second, (7, 8 * 10**11), "matmul"),
        synthetic.cell("g", "y", shape, "float32", [of("a", 1.0), of("cuattn", status="wrong")]),
        synthetic.cell("g", "z", shape, "float32", [of("b", status="failed")]),
        synthetic.cell("h", "z", shape, "float32", [of("cuattn", 1.0)], ceiling="read"),
    ]
    return result


def test_rates_are_of_the_right_work_and_ceiling():
    result = two_cells()
    first, second, wrong, _, alone = result["cells"]
    assert analysis.ceiling_rate(result, "copy") == pytest.approx(4e12)
    assert analysis.ceiling_rate(result, "read") is None
    assert analysis.rate(first) == pytest.approx(1e12)
    assert analysis.rate(first, state="warm") == pytest.approx(2e12)
    assert analysis.rate(first, "b") == pytest.approx(1e9 / 3e-3)
    assert analysis.percent_of_ceiling(result, first) == pytest.approx(25)
    assert analysis.rate(second) == pytest.approx(2e14)
    assert analysis.percent_of_ceiling(result, second) == pytest.approx(25)
    assert analysis.rate(wrong) is None and analysis.percent_of_ceiling(result, wrong) is None
    assert analysis.rate(first, "unheard of") is None
    assert analysis.percent_of_ceiling(result, alone) is None


def test_ratios_and_best_peers():
    first, second, wrong, failed, alone = two_cells()["cells"]
    assert analysis.ratio(first, "a") == pytest.approx(2.0)
    assert analysis.ratio(first, "a", "warm") == pytest.approx(0.2)
    assert analysis.ratio(second, "a") == pytest.approx(0.75)
    assert analysis.ratio(second, "b") is None and analysis.ratio(wrong, "a") is None
    peers = [analysis.best_peer(cell) for cell in (first, second, wrong, failed, alone)]
    assert peers == ["a", "a", "a", None, None]


def test_summary_counts_every_cell():
    result = two_cells()
    found = analysis.summary(result)
    first, second, wrong, failed, _ = result["cells"]
    assert (found.cells, found.compared, found.ahead) == (5, 3, 1)
    assert found.failures == [wrong, failed]
    assert found.geometric_mean == pytest.approx(math.sqrt(2.0 * 0.75))
    assert [(each.cell, each.peer) for each in found.worst] == [(second, "a"), (first, "a")]
    a, b = found.peers
    assert (a.name, a.cells, a.not_ok, a.other_clock) == ("a", 2, 0, 0)
    assert a.geometric_mean == pytest.approx(math.sqrt(2.0 * 0.75))
    assert a.worst.cell == second and a.worst.ratio == pytest.approx(0.75)
    assert (b.name, b.cells, b.not_ok, b.other_clock) == ("b", 1, 2, 1)
    assert analysis.summary(result, state="warm").ahead == 0
    assert analysis.summary(result, "f").worst[0].ratio == pytest.approx(2.0)
    alone = analysis.summary(result, "h")
    assert (alone.cells, alone.compared, alone.geometric_mean, alone.worst) == (1, 0, None, [])
    assert [each.cell for each in analysis.losing_cells(result)] == [second]
    assert [each.cell for each in analysis.losing_cells(result, "warm")] == [first, second]


def test_the_lowest_ratios_come_first(full):
    worst = analysis.summary(full).worst
    assert [each.ratio for each in worst] == pytest.approx([0.5, 0.8, 1.1])
    assert [each.peer for each in worst] == ["torch", "torch.compile", "flash_attn"]
    assert analysis.losing_cells(full) == worst[:2]


def test_only_ok_has_times_whatever_else_is_in_the_file():
    (cell,) = two_cells()["cells"][:1]
    peer = analysis.entry(cell, "a")
    for status in ("wrong", "failed", "hung", "crashed", "unsupported"):
        peer["status"] = status  # with its samples still there
        assert analysis.ratio(cell, "a") is None
        assert analysis.best_peer(cell) == "b"


def test_nothing_was_measured():
    found = analysis.summary(synthetic.empty())
    assert (found.cells, found.compared, found.ahead, found.failures) == (0, 0, 0, [])
    assert found.geometric_mean is None and found.worst == found.peers == []
    assert analysis.losing_cells(synthetic.empty()) == []
    assert analysis.tables(synthetic.empty()) == {}
