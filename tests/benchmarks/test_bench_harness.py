"""The harness of bench/ on a device that only counts: clock, cache, order, failures."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import cuattn
from bench import grids, inside
from bench.bench_softmax import CHECKED, OPERATIONS, places
from bench.peers import Contestant, Library, Unsupported
from bench.report import schema
from bench.timing import analysis, harness

CELL = grids.Cell("softmax", "quack", "float32", (("rows", 7), ("cols", 33)), 1)
FLUSH = 80e-6  # seconds that a flush takes


class Device:
    """A clock that only calls, flushes and delays move on, and a cache that remembers operands."""

    xp, stream = np, None

    def __init__(self):
        self.now, self.log, self.operands, self.hot = 0.0, [], [], set()
        self.lost, self.busy, self.free = False, False, 1 << 30

    def current(self):
        return contextlib.nullcontext()

    def flush(self):
        self.now += FLUSH
        self.busy = True
        self.hot.clear()
        self.log.append("flush")

    def delay(self, seconds):
        self.now += seconds
        self.log.append("delay")

    def mark(self):
        return self.now

    def seconds(self, start, end):
        self.busy = False  # it waits for the second event
        return end - start

    def synchronize(self):
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered")
        self.busy = False

    def free_bytes(self):
        return self.free


class Arrays(Library):
    """NumPy arrays; a captured call is the call itself."""

    name, version = "numpy", np.__version__

    def __init__(self, clock="events", captures=True):
        self.clock, self.captures, self.waits, self.releases = clock, captures, 0, 0

    def asarray(self, array):
        return array

    asnumpy = asarray

    def on_stream(self, stream):
        return contextlib.nullcontext()

    def capture(self, call, stream):
        if not self.captures:
            raise Unsupported("cannot be captured")
        return call

    def wait(self, native):
        self.waits += 1

    def release(self):
        self.releases += 1

    def peak_bytes(self, call):
        call()
        return 7


def contestant(device, name, cold, warm, function=cuattn.softmax, library=None):
    """Takes `cold` seconds of the device, or `warm` where its operand is in the cache."""
    library = library or Arrays()

    def call(x, **options):
        assert library.clock == "events" or not device.busy  # or the clock sees what was before
        device.log.append(name)
        device.operands.append(id(x))
        device.now += warm if id(x) in device.hot else cold
        device.hot.add(id(x))
        return function(x, **options)

    return Contestant(name, library, call)


def measure(device, ours, *peers, **options):
    options = {"seconds": 0.0, "plan": inside.launched, **options}
    return harness.measure(CELL, OPERATIONS["softmax"], ours, peers, device, **options)


@pytest.fixture
def device():
    return Device()


@pytest.fixture(autouse=True)
def _device_clock(device, monkeypatch):
    """The host takes no time of its own."""
    monkeypatch.setattr(harness.time, "perf_counter", lambda: device.now)


@pytest.mark.parametrize(("cold", "warm", "clock"), [(3e-3, 2e-3, "events"), (5e-6, 2e-6, "graph")])
def test_a_sample_is_the_time_of_one_call(device, cold, warm, clock):
    cell = measure(device, contestant(device, "cuattn", cold, warm))
    ours = analysis.entry(cell)
    assert (ours["status"], ours["clock"], ours["peak_bytes"]) == ("ok", clock, 7)
    least, _ = harness.ROUNDS
    assert ours["cold"] == pytest.approx([cold] * least)
    assert ours["warm"] == pytest.approx([warm] * least)
    calls = 1 if clock == "events" else min(harness.MOST_CALLS, round(harness.SAMPLE / cold))
    *_, last_cold, before, last_warm = np.array(device.operands[-3 * calls :]).reshape(3, calls)
    assert len(set(last_cold)) == calls  # none is hot because of the one before
    assert set(last_warm) == set(before) == {device.operands[0]}


def test_short_calls_that_cannot_be_captured_are_launched(device):
    library = Arrays(captures=False)
    ours = contestant(device, "cuattn", 5e-6, 2e-6, library=library)
    found = analysis.entry(measure(device, ours))
    assert found["clock"] == "events"
    assert found["cold"] == pytest.approx([5e-6] * harness.ROUNDS[0])


def test_the_clock_of_the_host_includes_its_wait(device):
    library = Arrays(clock="host")
    ours = contestant(device, "cuattn", 3e-3, 2e-3)
    cell = measure(device, ours, contestant(device, "jax", 6e-3, 5e-3, library=library))
    peer = analysis.entry(cell, "jax")
    assert (peer["clock"], peer["cold"][0]) == ("host", pytest.approx(6e-3))
    assert library.waits > 2 * harness.ROUNDS[0]
    assert analysis.ratio(cell, "jax", "warm") == pytest.approx(2.5)


def test_contestants_take_turns(device):
    names = ("cuattn", "a", "b")
    measure(device, *(contestant(device, name, 2e-3, 1e-3) for name in names))
    least, _ = harness.ROUNDS
    timed = device.log[-least * 3 * len("name delay flush name name delay name".split()) :]
    one = {name: [name, "delay", "flush", name, name, "delay", name] for name in names}
    expected = []
    for turn in range(least):
        for i in range(3):
            expected += one[names[(turn + i) % 3]]
    assert timed == expected


def test_rounds_go_on_while_there_is_time(device):
    delay = 2 * 2e-3 + 20e-6  # here a call keeps the host busy as long as the device
    one_round = 3e-3 + 3 * 2e-3 + FLUSH + 2 * delay
    cell = measure(device, contestant(device, "cuattn", 3e-3, 2e-3), seconds=8 * one_round)
    assert 7 <= len(analysis.entry(cell)["cold"]) <= 10
    cell = measure(device, contestant(device, "cuattn", 3e-3, 2e-3), seconds=1e3)
    assert len(analysis.entry(cell)["cold"]) == harness.ROUNDS[1]


def test_caches_of_large_cells_do_not_pile_up(device):
    """Between turns the memory goes back; within one, both samples find it there."""
    rows = CELL.shape["rows"] * CELL.shape["cols"] * 4
    for free, releases in ((16 * rows, 1), (16 * rows - 1, 1 + harness.ROUNDS[0])):
        device.free = free
        ours = contestant(device, "cuattn", 3e-3, 2e-3)
        measure(device, ours)
        assert ours.library.releases == releases


def nearly(x, out=None):
    """One value in one row is off."""
    y = cuattn.softmax(x, out=out)
    y[-1, 3] *= 1.01
    return y


def test_a_wrong_peer_is_not_timed(device):
    wrong = contestant(device, "wrong", 1e-3, 1e-3, nearly)
    cell = measure(device, contestant(device, "cuattn", 3e-3, 2e-3), wrong)
    entry = analysis.entry(cell, "wrong")
    assert (entry["status"], entry["cold"], entry["warm"]) == ("wrong", [], [])
    assert entry["max_error"] > entry["allowed_error"] > 0
    assert device.log.count("wrong") == 1  # the call that showed it
    assert analysis.status(cell) == "ok"
    assert analysis.best_peer(cell) is None


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (nearly, "error"),
        (lambda x, out: out, "error nan"),
        (lambda x, out: cuattn.softmax(x, out=out)[:, 1:], "shape"),
        (lambda x, out: cuattn.softmax(x), "231 of 231 elements of the result were not written"),
    ],
)
def test_our_wrong_result_stops_the_cell(device, function, why):
    peer = contestant(device, "peer", 1e-3, 1e-3)
    cell = measure(device, contestant(device, "cuattn", 1e-3, 1e-3, function), peer)
    (entry,) = cell["contestants"]
    assert (entry["status"], entry["cold"]) == ("wrong", [])
    assert why in entry["detail"]
    assert entry["max_error"] is None or np.isfinite(entry["max_error"])
    assert "peer" not in device.log


def raising(error):
    def function(x, out=None):
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "status", "detail"),
    [
        (MemoryError("no memory\nsecond line"), "failed", "MemoryError: no memory"),
        (Unsupported("rows too long"), "unsupported", "rows too long"),
    ],
)
def test_a_failing_peer_costs_only_itself(device, error, status, detail):
    broken = contestant(device, "broken", 1e-3, 1e-3, raising(error))
    other = contestant(device, "other", 1e-3, 1e-3)
    cell = measure(device, contestant(device, "cuattn", 3e-3, 2e-3), broken, other)
    entry = analysis.entry(cell, "broken")
    assert (entry["status"], entry["detail"], entry["cold"]) == (status, detail, [])
    assert analysis.best_peer(cell) == "other"


def test_a_peer_that_fails_while_it_is_timed_has_no_samples(device):
    count = 0

    def sometimes(x):
        nonlocal count
        count += 1
        if count > 9:
            raise RuntimeError("out of resources")
        return cuattn.softmax(x)

    peer = contestant(device, "peer", 1e-3, 1e-3, sometimes)
    cell = measure(device, contestant(device, "cuattn", 3e-3, 2e-3), peer)
    entry = analysis.entry(cell, "peer")
    assert (entry["status"], entry["cold"], entry["clock"]) == ("failed", [], None)
    assert count == 10  # it is not asked again
    assert len(analysis.entry(cell)["cold"]) == harness.ROUNDS[0]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_lost_device_ends_the_process(device, at_once):
    def crash(x):
        device.lost = True
        if at_once:
            raise RuntimeError("an illegal memory access was encountered")
        return cuattn.softmax(x)

    told = []
    peer = contestant(device, "peer", 1e-3, 1e-3, crash)
    with pytest.raises(harness.DeviceLost, match="after peer"):
        measure(device, contestant(device, "cuattn", 1e-3, 1e-3), peer, note=told.append)
    assert told[-1] == "peer"


@pytest.mark.parametrize("status", ["hung", "crashed"])
def test_who_is_excluded_does_not_run(device, status):
    ours, peer = (contestant(device, name, 1e-3, 1e-3) for name in ("cuattn", "peer"))
    cell = measure(device, ours, peer, excluded={"peer": status})
    assert "peer" not in device.log
    assert analysis.status(cell, "peer") == status
    cell = measure(device, ours, peer, excluded={"cuattn": status})
    assert "peer" not in device.log
    assert [entry["status"] for entry in cell["contestants"]] == [status]


def test_rate_and_percent_of_ceiling(device):
    cell = measure(device, contestant(device, "cuattn", 2e-3, 1e-3))
    work = 2 * 7 * 33 * 4
    assert cell["work"]["bytes"] == work
    ceiling = {"unit": "B/s", "formula": "", "work": 2.0 * work, "samples": [3e-3, 2e-3, 1e-3]}
    result = {"ceilings": {"copy": ceiling}}
    assert analysis.rate(cell) == pytest.approx(work / 2e-3)
    assert analysis.percent_of_ceiling(result, cell) == pytest.approx(50)
    assert analysis.percent_of_ceiling(result, cell, state="warm") == pytest.approx(100)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_verifies(device, operation, dtype):
    """Operands, truth and our call of each operation fit together; a wrong call is seen."""
    sizes = (("segments", 50), ("cols", 40)) if operation == "segment_softmax" else CELL.sizes
    cell = grids.Cell(operation, "quack", dtype, sizes, 1)
    table = OPERATIONS[operation]

    def call(*operands, out=None):
        device.now += 1e-3
        return table.ours(*operands, out=out)

    def wrong(*operands, out=None):
        y = call(*operands, out=out)
        y.reshape(-1)[-1] += 0.5
        return y

    for function, status in ((call, "ok"), (wrong, "wrong")):
        ours = Contestant("cuattn", Arrays(), function)
        plan = inside.launched
        measured = harness.measure(cell, table, ours, [], device, seconds=0, plan=plan)
        assert analysis.status(measured) == status, measured["contestants"]
        assert measured["work"]["bytes"] % (np.prod([n for _, n in sizes])) == 0


@pytest.mark.parametrize("rows", [1, 2, 5000, 10**6])
def test_first_last_and_other_rows_are_verified(rows):
    found = places(rows, 4096)
    assert found[0].start == 0
    assert found[-1].stop == rows
    assert all(0 < part.stop - part.start <= max(1, CHECKED // 4096) for part in found)
    assert len({places(rows, 4096)[len(found) // 2].start for _ in range(20)}) > (rows > 5000)


def test_transposed_rows_are_a_view():
    cell = grids.Cell("softmax", "columns", "float32", (*CELL.sizes, ("transposed", 1)), 1)
    (x,) = OPERATIONS["softmax"].inputs(cell, np, np.random.default_rng())
    assert (x.shape, x.strides) == ((7, 33), (4, 28))


def test_cells_have_names_of_their_own():
    others = ["top_k", "softmax_topk", "attention", "attention_backward", "attention_kvcache"]
    others += ["cross_entropy", "cross_entropy_backward", "entropy", "sample"]
    others += ["attention_column_sums", "attention_topk"]
    others += ["attention_score", "attention_block_mask"]
    cells = grids.cells([*OPERATIONS, *others, "transformer"])
    assert len({cell.key for cell in cells}) == len(cells) > 300
    assert [cell.priority for cell in cells] == sorted(cell.priority for cell in cells)
    operations = {name for grid in grids.GRIDS.values() for name in grid.operations}
    assert {cell.operation for cell in cells} == operations


def test_a_measured_cell_follows_the_schema(device):
    ours = contestant(device, "cuattn", 2e-3, 1e-3)
    peers = [
        contestant(device, "slower", 4e-3, 3e-3),
        contestant(device, "wrong", 1e-3, 1e-3, nearly),
        contestant(device, "broken", 1e-3, 1e-3, raising(MemoryError())),
    ]
    from bench.checkup import __main__ as checkup

    result = checkup.empty_result()
    result["cells"] = [measure(device, ours, *peers)]
    schema.validate(result)
