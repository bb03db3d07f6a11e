"""cuattn.dask beside what dask itself offers, where x has twice the memory of all workers.

    pip install "cuattn[dask]" distributed tqdm
    python -m bench.out_of_core [--limit 192] [--rows 64] [--only softmax]

Time, tasks and the peak of a worker (USS), one run each in two processes of one thread. x is made
chunk by chunk, as if it were read from a file. What is returned is small: of softmax the sum of
each row and one column.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import dask
import dask.array as da
import numpy as np
import psutil
from distributed import Client, LocalCluster, wait
from tqdm import tqdm

import cuattn
import cuattn.dask

WIDTH = 1 << 16  # of a chunk
K = 50


class Made:
    """Rows of float32 with many ties, of which only the parts that are read exist."""

    def __init__(self, rows: int, columns: int) -> None:
        self.shape, self.dtype, self.ndim = (rows, columns), np.dtype(np.float32), 2

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        shape = [one.stop - one.start for one in part]
        seed = [one.start for one in part]
        return np.random.default_rng(seed).integers(-1000, 1000, shape, np.int16) / np.float32(64)


def shown(y: np.ndarray) -> np.ndarray:
    """What is returned of a chunk of probabilities."""
    return np.concatenate([y.sum(axis=1, keepdims=True), y[:, :1]], axis=1)


def few(y: Any) -> Any:
    return y.map_blocks(shown, chunks=(y.chunks[0], (2,) * y.numblocks[1]))


def plain_softmax(x: Any) -> list[Any]:
    e = da.exp(x - x.max(axis=-1, keepdims=True))
    return [few(e / e.sum(axis=-1, keepdims=True))]


def plain_logsumexp(x: Any) -> list[Any]:
    m = x.max(axis=-1, keepdims=True)
    return [da.log(da.exp(x - m).sum(axis=-1)) + m[:, 0]]


METHODS: dict[str, Callable[[Any], list[Any]]] = {
    "softmax: da.exp(x - x.max()) / sum": plain_softmax,
    "softmax: cuattn.dask": lambda x: [few(cuattn.dask.softmax(x))],
    "softmax: cuattn.dask, keep=False": lambda x: [few(cuattn.dask.softmax(x, keep=False))],
    "logsumexp: da.log(da.exp(x - m).sum()) + m": plain_logsumexp,
    "logsumexp: cuattn.dask": lambda x: [cuattn.dask.logsumexp(x, -1)],
    "top_k: da.topk, da.argtopk": lambda x: [da.topk(x, K, -1), da.argtopk(x, K, -1)],
    "top_k: cuattn.dask": lambda x: [*cuattn.dask.top_k(x, K)],
    "softmax_topk: cuattn.dask": lambda x: [*cuattn.dask.softmax_topk(x, K)],
}


class Figures(NamedTuple):
    seconds: float
    peak: int  # bytes of a worker, the larger one
    tasks: int
    is_right: bool


def measure(x: Any, method: str, client: Client, expected: list[np.ndarray]) -> Figures:
    """One run; the first row is compared."""
    lazy = METHODS[method](x)
    tasks = {key for one in dask.optimize(*lazy) for key in one.__dask_graph__().keys()}
    workers = [psutil.Process(pid) for pid in client.run(os.getpid).values()]
    done, peaks = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.1):
            peaks.append(max(worker.memory_full_info().uss for worker in workers))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        futures = client.compute(lazy)
        wait(futures, timeout=180)
        results = [future.result() for future in futures]
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    found = [result[0] for result in results]
    if method.startswith("softmax:"):
        found = [found[0][::2].sum(), found[0][1]]
    close = [np.allclose(a, b, 1e-5) for a, b in zip(found, expected, strict=True)]
    return Figures(seconds, max(peaks), len(tasks), all(close))


def answers(x: Made) -> dict[str, list[np.ndarray]]:
    """Of the first row."""
    parts = (x[0 : x.shape[0], at : at + WIDTH][0] for at in range(0, x.shape[1], WIDTH))
    row = np.concatenate([*parts])
    best = [*cuattn.reference.top_k(row, K)]
    p = cuattn.reference.softmax(row)
    return {
        "softmax": [np.ones(()), p[0]],
        "logsumexp": [cuattn.reference.logsumexp(row)],
        "top_k": best,
        "softmax_topk": [p[best[1]], best[1]],
    }


def table(limit: int, rows: int, only: str) -> Iterator[str]:
    made = Made(rows, 4 * limit // (4 * rows * WIDTH) * WIDTH)
    x = da.from_array(made, (rows, WIDTH), name=False, asarray=False, fancy=False,
                      inline_array=True, meta=np.empty((0, 0), np.float32))  # fmt: skip
    yield f"x: {made.shape}, {x.nbytes >> 20} MiB; two workers of {limit >> 20} MiB\n"
    yield "| method | seconds | peak, MiB | tasks | row 0 |\n|---|--:|--:|--:|---|\n"
    expected = answers(made)
    for method in tqdm([name for name in METHODS if name.startswith(only)]):
        with (
            LocalCluster(
                n_workers=2, threads_per_worker=1, memory_limit=limit, dashboard_address=None
            ) as cluster,
            Client(cluster) as client,
        ):
            try:
                run = measure(x, method, client, expected[method.partition(":")[0]])
            except Exception as error:  # a worker that is killed, or no end
                yield f"| {method} | {type(error).__name__} | | | |\n"
                continue
        told = "right" if run.is_right else "wrong"
        yield f"| {method} | {run.seconds:.0f} | {run.peak >> 20} | {run.tasks} | {told} |\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", type=int, default=192, help="MiB of a worker")
    parser.add_argument("--rows", type=int, default=64, help="rows of x, which are one of chunks")
    parser.add_argument("--only", default="", help="methods whose names begin so")
    arguments = parser.parse_args()
    lines = table(arguments.limit << 20, arguments.rows, arguments.only)
    tqdm.write("".join(lines))
