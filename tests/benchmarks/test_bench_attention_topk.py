"""Benchmarks of nearest neighbours: ours and the expressions by hand are verified, by values."""

from __future__ import annotations

import sys
import types

import emulator
import numpy as np
import pytest
import scipy.special
from test_bench_harness import Arrays, Device

from bench import bench_attention_topk, grids, inside, peers
from bench.peers import _base, _rapids
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


def peer(library):
    """Its name and a call that takes `num`."""
    (contestant,) = library.variants("attention_topk", num=9)
    return contestant.name, lambda q, k, num: contestant.call(q, k)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_ours_and_the_expression_are_right(dtype):
    with emulator.activate("sm_90"):
        entries = run(dtype, others=[peer(Cupy(np, scipy.special))])
    for entry in entries.values():
        assert entry["status"] == "ok", entry["detail"]


def test_torch_is_right():
    pytest.importorskip("torch")
    from bench.peers import _torch

    library = _torch.Torch()
    (name, call) = peer(library)

    def on_host(*arrays, num):
        return tuple(map(library.asnumpy, call(*map(library.asarray, arrays), num)))

    assert run("float32", others=[(name, on_host)])[name]["status"] == "ok"


# ---- RAPIDS, by stubs with its signatures ----


class Resources:
    """Those of both packages."""

    def __init__(self, stream=None):
        self.stream = stream


def build(dataset, metric="sqeuclidean", metric_arg=2.0, resources=None):
    assert metric == "inner_product" and isinstance(resources, Resources)
    return types.SimpleNamespace(vectors=dataset, uses=0)


def search(index, queries, k, neighbors=None, distances=None, resources=None, prefilter=None):
    assert index.vectors.dtype == queries.dtype and isinstance(resources, Resources)
    index.uses += 1
    products = queries.astype(np.float32) @ index.vectors.astype(np.float32).T
    neighbors[...] = np.argsort(-products, axis=1)[:, :k]
    distances[...] = np.take_along_axis(products, neighbors, 1)


def select_k(dataset, k=None, distances=None, indices=None, select_min=True, handle=None):
    assert dataset.dtype == np.float32 and not select_min and isinstance(handle, Resources)
    best = np.argpartition(-dataset, distances.shape[1], axis=1)[:, : distances.shape[1]]
    indices[...] = np.sort(best, axis=1)
    distances[...] = np.take_along_axis(dataset, indices, 1)


@pytest.fixture
def rapids(monkeypatch):
    """Both libraries."""
    brute_force = types.SimpleNamespace(build=build, search=search)
    for name, contents in {
        "cuvs": {"__version__": "26.6"},
        "cuvs.common": {"Resources": Resources},
        "cuvs.neighbors": {"brute_force": brute_force},
        "pylibraft": {"__version__": "26.6"},
        "pylibraft.common": {"DeviceResources": Resources},
        "pylibraft.matrix": {"select_k": select_k},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    return [kind(np, scipy.special) for kind in (_rapids.Cuvs, _rapids.Raft)]


def test_rapids_is_called_as_it_is_to_be(rapids):
    for library in rapids:
        library.on_stream(None)
        name, call = peer(library)
        assert library.version == "26.6"
        assert not [*library.contestants("softmax", None, False), *library.samplers(None)]
        assert not list(library.variants("attention_score", pattern="t5"))
        for dtype in ("float16", "float32"):
            entry = run(dtype, others=[(name, call)])[name]
            right = "unsupported" if "RAFT" in name and dtype == "float16" else "ok"
            assert entry["status"] == right, entry["detail"]


def test_an_index_is_built_once(rapids, monkeypatch, rng):
    made = []
    monkeypatch.setattr(
        rapids[0].package, "build", lambda *a, **k: made.append(build(*a, **k)) or made[-1]
    )
    rapids[0].on_stream(None)
    _, call = peer(rapids[0])
    q, *vectors = (rng.standard_normal((n, 8), np.float32) for n in (3, 20, 20))
    for _ in range(3):
        for k in vectors:
            call(q, k, 9)
    assert [index.uses for index in made] == [3, 3]


def test_work_goes_to_our_stream(rapids):
    for library in rapids:
        for stream in (types.SimpleNamespace(ptr=7), types.SimpleNamespace(ptr=9)):
            library.on_stream(stream)
            assert library.resources.stream == stream.ptr


@pytest.mark.parametrize("which", [0, 1], ids=["values", "indices"])
def test_a_wrong_result_is_seen(which):
    def change(found):
        arrays = [np.array(array) for array in found]
        arrays[which][:, 0] = arrays[which][:, 8]
        return type(found)(*arrays)

    assert run("float32", change)[analysis.OURS]["status"] == "wrong"


def test_all_products_need_room(monkeypatch):
    monkeypatch.setattr(_base, "SCORE_BYTES", 100)
    by_hand = peer(Cupy(np, scipy.special))
    assert run("float32", others=[by_hand])[by_hand[0]]["status"] == "unsupported"
