"""What the harness measured, as pytest-benchmark shows and stores it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from test_checkup import CELLS, record

from bench import conftest
from bench.timing import environment

# A benchmark file and a conftest.py as in bench/, on cells that have been measured elsewhere.
CONFTEST = """
from bench import conftest, grids
from bench.timing import measure
from bench.conftest import *
from test_checkup import CELLS, record

ceiling = {"unit": "B/s", "formula": "", "work": 2e6, "samples": [1.0]}
conftest.device = lambda: "a device"
conftest.device_ceilings = lambda: {"copy": ceiling}
conftest.measured_cell = lambda cell: record(cell, {"torch": "wrong"} if cell is CELLS[0] else {})
grids.cells = lambda operations: CELLS[:2]
measure.others = lambda cell, operation: [type("Peer", (), {"name": n}) for n in ("torch", "jax")]
"""
BENCHMARKS = """
OPERATIONS = {"softmax": None}


def bench_softmax(benchmark, measured):
    measured.replay(benchmark)
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "bench_fake.py").write_text(BENCHMARKS)
    tests = environment.ROOT / "tests"
    path = os.pathsep.join(map(str, (tests / "benchmarks", tests, environment.ROOT)))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-c", str(environment.ROOT / "setup.cfg"), "--rootdir", str(folder), str(folder)]
    command += ["--benchmark-only", f"--benchmark-json={folder / 'out.json'}"]
    variables = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        command, env={**variables, "PYTHONPATH": path}, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "out.json").read_text()), done.stdout


def test_the_statistics_are_those_of_the_samples(stored):
    for benchmark in stored[0]["benchmarks"]:
        cold, stats = benchmark["group"].endswith("cold"), benchmark["stats"]
        assert stats["data"] == pytest.approx([2e-3, 1e-3, 3e-3] if cold else [1e-3, 1e-3, 2e-3])
        assert (stats["median"], stats["rounds"]) == (pytest.approx(2e-3 if cold else 1e-3), 3)


def test_contestants_of_a_cell_and_state_are_a_group(stored):
    groups: dict[str, int] = {}
    for benchmark in stored[0]["benchmarks"]:
        groups[benchmark["group"]] = groups.get(benchmark["group"], 0) + 1
    key = "softmax/quack/cols8-rows{}/float32 {}"
    assert groups == {  # the wrong peer is skipped
        key.format(1, "cold"): 2,
        key.format(1, "warm"): 2,
        key.format(2, "cold"): 3,
        key.format(2, "warm"): 3,
    }
    assert "2 skipped" in stored[1]


def test_rates_and_the_machine_are_stored(stored):
    document = stored[0]
    assert document["machine_info"]["gpu"] == environment.gpu()
    assert document["machine_info"]["packages"]["numpy"]
    for benchmark in document["benchmarks"]:
        extra, warmth = benchmark["extra_info"], 1 + benchmark["group"].endswith("warm")
        assert (extra["rate"], extra["unit"]) == (pytest.approx(warmth * 1000 / 2e-3), "B/s")
        assert extra["percent_of_ceiling"] == pytest.approx(warmth * 25)
        assert extra["rate_predicted_by_model"] is None  # softmax has no model
        assert extra["formula"] == "read x + write y"


@pytest.mark.parametrize(
    ("name", "outcome"), [("cuattn", pytest.fail.Exception), ("torch", pytest.skip.Exception)]
)
def test_a_wrong_result_has_no_statistics(name, outcome):
    cell = record(CELLS[0], {name: "wrong"})
    with pytest.raises(BaseException, match="wrong") as caught:  # a skip must not pass for a fail
        conftest.Measured(cell, name, "cold", {"ceilings": {}}).replay(None)
    assert caught.type is outcome


def test_without_a_gpu_the_benchmarks_are_skipped():
    if environment.gpu():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    files = ["bench_softmax.py", "bench_top_k.py", "bench_softmax_topk.py"]
    files += ["bench_attention.py", "bench_transformer.py", "bench_graph.py"]
    files += ["bench_cross_entropy.py", "bench_sample.py"]
    files += ["bench_column_sums.py", "bench_attention_topk.py", "bench_score.py"]
    command += [*(f"bench/{name}" for name in files), "--benchmark-only"]
    done = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True)
    assert f"{len(files) + 1} skipped" in done.stdout, done.stdout + done.stderr
