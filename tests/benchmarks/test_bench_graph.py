"""The benchmarked chain of calls: as a graph it gives the same bits, of what its operands hold."""

from __future__ import annotations

import numpy as np
from conftest import on_a_gpu

import cuattn
from bench import bench_graph
from bench.peers._cupy import Cupy


@on_a_gpu
def test_the_graph_is_the_chain(backend, monkeypatch):
    monkeypatch.setattr(bench_graph, "LAYERS", 2)
    xp = backend.xp
    stream, results = xp.cuda.Stream(non_blocking=True), []

    def run():
        results[:] = bench_graph.step(*arrays)

    with stream:
        arrays = bench_graph.operands(xp)
        replay = Cupy().capture(run, stream)
        captured = list(results)
        for array in arrays:
            array *= 0.5
        want = bench_graph.step(*arrays)
        replay()
        stream.synchronize()
    for a, b in zip(captured, want, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(a), backend.asnumpy(b))
    best = cuattn.reference.softmax_topk(backend.asnumpy(arrays[-1]), bench_graph.BEST)
    np.testing.assert_array_equal(backend.asnumpy(want[2]), best.indices)
