"""cuattn on NumPy arrays beside the plain NumPy expression and PyTorch: CPU time of one thread.

    export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
    python -m bench.bench_numpy [--readme bench/README.md]

The contestants of a cell take turns in one process on the same data; the median of each counts.
All are first compared with float64. CPU time of the process, not time on the wall: neighbours on
the machine cost less of it.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import cuattn
from bench import inside
from bench.report import formats, markdown
from bench.timing import environment

BUDGET = 1.0  # seconds a cell
ROUNDS = 5  # at least
SHORTEST = 1e-3  # seconds: shorter calls are repeated within a round

ROWS = [
    *[("float32", shape, -1) for shape in ((10,), (32, 128), (1, 50257), (524288, 8), (65536, 64))],
    *[("float32", shape, -1) for shape in ((16384, 256), (4096, 1024), (128, 32768), (4, 1 << 20))],
    *[("float32", (1024, 4096), 0), ("float32", (64, 256, 256), 1)],
    *[("float32", (64, 256, 256), (0, 2))],
    *[("bfloat16", shape, -1) for shape in ((65536, 64), (4096, 1024), (128, 32768), (4, 1 << 20))],
    *[("float16", shape, -1) for shape in ((65536, 64), (4096, 1024), (128, 32768), (4, 1 << 20))],
    *[("float64", shape, -1) for shape in ((65536, 64), (4096, 1024), (4, 1 << 20))],
]
FEW_ROWS = [(d, s, -1) for d in ("float32", "bfloat16") for s in ((4096, 1024), (32, 131072))]
SELECTIONS = [
    *[("float32", (1, 32000), k) for k in (1, 5, 50, 1000)],
    *[("float32", (16, 128256), k) for k in (1, 5, 50, 1000)],
    *[("float32", (64, 201088), 5), ("float32", (4000, 5000), 5), ("float32", (1024, 4096), 50)],
    *[("float32", (65536, 128), 8), ("float16", (16, 128256), 50), ("bfloat16", (16, 128256), 50)],
]
# batch, query heads, key heads, queries, keys, head dimension, causal
ATTENTION = [
    *[(1, 1, 1, 8, 8, 64, False), (1, 12, 12, 16, 16, 64, False), (1, 12, 12, 128, 128, 64, False)],
    *[(64, 12, 12, 64, 64, 64, False), (1, 8, 8, 1024, 1024, 64, False)],
    *[(1, 12, 12, 1024, 1024, 64, True), (1, 8, 8, 2048, 2048, 128, True)],
    *[(1, 32, 8, 1, 256, 128, False), (1, 32, 8, 1, 4096, 128, False)],
    *[(16, 32, 8, 1, 1024, 128, False)],
]


class Cell(NamedTuple):
    """One row of the table."""

    operation: str
    dtype: str
    what: str
    calls: dict[str, Callable[[], Any]]  # by contestant; the first is cuattn


def torch() -> Any:
    """PyTorch with one thread, or None."""
    try:
        import torch

        torch.set_num_threads(1)
    except ImportError:
        return None
    return torch


# ---- What is written without cuattn ----


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) if x.itemsize == 2 else x


def softmax(x: np.ndarray, axis: Any) -> np.ndarray:
    e = np.exp(wide(x) - wide(x).max(axis, keepdims=True))
    return (e / e.sum(axis, keepdims=True)).astype(x.dtype, copy=False)


def log_softmax(x: np.ndarray, axis: Any) -> np.ndarray:
    s = wide(x) - wide(x).max(axis, keepdims=True)
    return (s - np.log(np.exp(s).sum(axis, keepdims=True))).astype(x.dtype, copy=False)


def logsumexp(x: np.ndarray, axis: Any) -> np.ndarray:
    m = wide(x).max(axis, keepdims=True)
    return (np.log(np.exp(wide(x) - m).sum(axis)) + np.squeeze(m, axis)).astype(x.dtype, copy=False)


def top_k(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    i = np.argpartition(-wide(x), k - 1, axis=-1)[..., :k]
    values = np.take_along_axis(x, i, -1)
    order = np.argsort(-wide(values), axis=-1)
    return np.take_along_axis(values, order, -1), np.take_along_axis(i, order, -1)


def softmax_topk(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    return top_k(softmax(x, -1), k)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a, group, axis=1) for a in (k, v))
    s = q.shape[-1] ** -0.5 * (q @ k.swapaxes(-1, -2))
    if causal:
        s = np.where(np.tri(*s.shape[-2:], s.shape[-1] - s.shape[-2], bool), s, -np.inf)
    return softmax(s, -1) @ v


# ---- Cells ----


def tensor(library: Any, x: np.ndarray) -> Any:
    if x.dtype.name == "bfloat16":
        return library.from_numpy(x.view(np.int16)).view(library.bfloat16)
    return library.from_numpy(x)


def cells(rng: np.random.Generator) -> Iterator[Cell]:
    library = torch()
    for operation, grid in (
        ("softmax", ROWS),
        ("log_softmax", FEW_ROWS),
        ("logsumexp", FEW_ROWS),
    ):
        for dtype, shape, axis in grid:
            x = rng.standard_normal(shape).astype(inside.dtype_of(dtype))
            ours, plain = getattr(cuattn, operation), globals()[operation]
            calls: dict[str, Any] = {"cuattn": lambda f=ours, x=x, a=axis: f(x, a)}
            calls["plain"] = lambda f=plain, x=x, a=axis: f(x, a)
            if library is not None and not isinstance(axis, tuple):
                f, t = getattr(library, operation), tensor(library, x)
                calls["torch"] = lambda f=f, t=t, a=axis: f(t, a)
            yield Cell(operation, dtype, f"{_shape(shape)}, axis {axis}", calls)
    for operation in ("top_k", "softmax_topk"):
        for dtype, shape, k in SELECTIONS:
            x = rng.standard_normal(shape).astype(inside.dtype_of(dtype))
            ours, plain = getattr(cuattn, operation), globals()[operation]
            calls = {"cuattn": lambda f=ours, x=x, k=k: f(x, k)}
            calls["plain"] = lambda f=plain, x=x, k=k: f(x, k)
            if library is not None:
                t = tensor(library, x)
                calls["torch"] = lambda t=t, k=k: library.topk(t, k)
                if operation == "softmax_topk":
                    calls["torch"] = lambda t=t, k=k: library.topk(library.softmax(t, -1), k)
            yield Cell(operation, dtype, f"{_shape(shape)}, k {k}", calls)
    for batch, heads, kv_heads, queries, keys, dim, causal in ATTENTION:
        q = rng.standard_normal((batch, heads, queries, dim)).astype(np.float32)
        k, v = (rng.standard_normal((batch, kv_heads, keys, dim), np.float32) for _ in "kv")
        calls = {"cuattn": lambda a=(q, k, v), c=causal: cuattn.attention(*a, is_causal=c)}
        calls["plain"] = lambda a=(q, k, v), c=causal: attention(*a, c)
        if library is not None and (queries == keys or not causal):  # its mask is to the top left
            sdpa = library.nn.functional.scaled_dot_product_attention
            given = tuple(map(library.from_numpy, (q, k, v)))
            options = {"is_causal": causal, "enable_gqa": heads != kv_heads}
            calls["torch"] = lambda f=sdpa, a=given, o=options: f(*a, **o)
        what = f"B {batch}, H {heads}/{kv_heads}, S {queries}/{keys}, D {dim}"
        yield Cell("attention", "float32", what + ", causal" * causal, calls)


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


# ---- Times ----


def first(result: Any) -> np.ndarray:
    """What of a result is compared, in float64."""
    result = result[0] if isinstance(result, tuple) else result
    result = result.float().numpy() if hasattr(result, "numpy") else result
    return np.asarray(result).astype(np.float64)


def measure(cell: Cell) -> dict[str, float]:
    """Median CPU seconds of each contestant, after their results have been compared."""
    expected = first(cell.calls["plain"]())
    tolerance = 2e-2 if cell.dtype in ("float16", "bfloat16") else 1e-4
    spent = {}
    for name, call in cell.calls.items():
        np.testing.assert_allclose(first(call()), expected, rtol=tolerance, atol=tolerance)
        began = time.process_time()
        call()
        spent[name] = max(time.process_time() - began, 1e-7)
    repeats = {name: max(1, math.ceil(SHORTEST / seconds)) for name, seconds in spent.items()}
    times: dict[str, list[float]] = {name: [] for name in cell.calls}
    end = time.perf_counter() + BUDGET
    while time.perf_counter() < end or min(map(len, times.values())) < ROUNDS:
        for name, call in cell.calls.items():
            began = time.process_time()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.process_time() - began) / repeats[name])
    return {name: statistics.median(found) for name, found in times.items()}


def table(seed: int = 0) -> str:
    """Every cell, and the geometric mean against PyTorch of each operation and dtype."""
    rows, ratios = [], {}
    for cell in tqdm(list(cells(np.random.default_rng(seed))), unit="cell", disable=None):
        found = measure(cell)
        ours, plain, other = found["cuattn"], found["plain"], found.get("torch")
        rows.append(
            [
                f"`{cell.operation}`",
                cell.dtype,
                cell.what,
                _milliseconds(ours),
                _milliseconds(plain),
            ]
            + [f"{ours / plain:.2f}"]
            + (["–", "–"] if other is None else [_milliseconds(other), f"{ours / other:.2f}"])
        )
        if other is not None:
            ratios.setdefault((cell.operation, cell.dtype), []).append(ours / other)
    means = [
        f"{operation} {dtype} {statistics.geometric_mean(found):.2f}"
        for (operation, dtype), found in ratios.items()
    ]
    facts = environment.facts()
    machine = f"{facts['cpu']}, one thread; NumPy {facts['packages']['numpy']}"
    library = torch()
    if library is not None:
        machine += f", PyTorch {library.__version__}"
    header = ["call", "dtype", "size", ">ms", ">plain NumPy, ms", ">× plain"]
    header += [">PyTorch, ms", ">× PyTorch"]
    text = [f"{machine}. Medians of CPU time; × is cuattn's time divided by the other's."]
    text.append(formats.table(header, rows))
    if means:
        text.append(f"Geometric means of × PyTorch: {', '.join(means)}.")
    return "\n\n".join(text)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.bench_numpy", description=__doc__.split("\n")[0])
    parser.add_argument("--readme", type=Path, help="a README whose section is rewritten")
    given = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1" or os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1 and OPENBLAS_NUM_THREADS=1: CPU time is of one thread")
    text = table()
    if given.readme is None:
        print(text)
        return
    old = given.readme.read_text(encoding="utf-8")
    given.readme.write_text(markdown.update_readme(old, {"numpy": text}), encoding="utf-8")


if __name__ == "__main__":
    main()
