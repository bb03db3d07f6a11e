"""A chain of small calls, one by one and as a CUDA graph: what their launches cost; needs a GPU.

    python -m pytest bench/bench_graph.py --benchmark-only

The chain is a step of decoding: in each layer, attention of one query per head over the two halves
of its keys and the merge of both, then the best tokens. It is timed by the host's clock, from the
first call to the end of the last kernel.
"""

from __future__ import annotations

from typing import Any

import pytest

import cuattn
from bench import conftest
from bench.peers._cupy import Cupy

LAYERS, HEADS, KEYS, DIM, TOKENS, BEST = 8, 8, 256, 64, 4096, 50


def operands(xp: Any) -> tuple[Any, ...]:
    """q, k and v of all layers, logits."""
    kv = xp.sin(xp.arange(2 * LAYERS * HEADS * KEYS * DIM, dtype=xp.float32))
    k, v = kv.reshape(2, LAYERS, 1, HEADS, KEYS, DIM).astype(xp.float16)
    return k[0, :, :, :1], k, v, xp.sin(xp.arange(TOKENS, dtype=xp.float32))


def step(q: Any, k: Any, v: Any, logits: Any) -> tuple[Any, ...]:
    """The last layer's result, the best tokens and their probabilities."""
    halves = slice(KEYS // 2), slice(KEYS // 2, None)
    for keys, values in zip(k, v, strict=True):
        parts = [
            cuattn.attention(q, keys[:, :, half], values[:, :, half], return_lse=True)
            for half in halves
        ]
        q, _ = cuattn.merge_attention(*parts[0], *parts[1])
    return q, *cuattn.softmax_topk(logits, BEST)


@pytest.mark.gpu
@pytest.mark.benchmark(group="a step of decoding, on the host's clock")
@pytest.mark.parametrize("launched", ["call by call", "as a graph"])
def bench_graph(benchmark: Any, launched: str) -> None:
    device = conftest.device()
    if device is None:
        pytest.skip("no GPU")
    with device.current():
        arrays = operands(device.xp)
        run = lambda: step(*arrays)  # noqa: E731
        if launched == "as a graph":
            run = Cupy().capture(run, device.stream)

        def run_and_wait() -> None:
            run()
            device.stream.synchronize()

        benchmark(run_and_wait)
