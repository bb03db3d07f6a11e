"""What every regime of the plans costs, counted on the emulator: no GPU needed.

Each row is a call of the public API on random data: global bytes and 32-byte sectors, bank
conflicts, exponentials and barriers, tensor-core instructions (`mma`, `ldmatrix`), and the device
memory that the call allocates. A row of attention has all queries as its rows and the keys as its
columns; bytes are then per byte of q, k and v, written ones per byte of the result, and
exponentials per score.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import cuattn
from bench import inside  # also makes `import emulator` find tests/emulator

# (rows, columns) from part of a warp to a row that is split; few, so that a count takes seconds.
SHAPES = ((64, 100), (32, 1000), (16, 4096), (4, 30_000), (2, 128_256), (1, 400_000))
NUM_SMS = 132

KS = (5, 64, 256)


class Call(NamedTuple):
    """A call, its number of operands, and the shortest rows that it takes."""

    function: Callable[..., Any]
    operands: int = 1
    least_cols: int = 1


def _top(function: Callable[..., Any], k: int) -> Call:
    return Call(lambda x: function(x, k), 1, k)


CALLS = {
    "softmax": Call(cuattn.softmax),
    "log_softmax": Call(cuattn.log_softmax),
    "logsumexp": Call(partial(cuattn.logsumexp, axis=-1)),
    "softmax_backward": Call(cuattn.softmax_backward, 2),
    "log_softmax_backward": Call(cuattn.log_softmax_backward, 2),
    **{f"top_k, k = {k}": _top(cuattn.top_k, k) for k in KS},
    **{f"softmax_topk, k = {k}": _top(cuattn.softmax_topk, k) for k in KS},
    f"softmax_topk_state, k = {KS[0]}": _top(cuattn.softmax_topk_state, KS[0]),
}


class Attention(NamedTuple):
    """A call of attention: sizes of q, k and v, and what else it is given."""

    op: str  # dtype, or "tf32": float32 with that precision
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    options: dict[str, Any] = {}


# Of each multiplication and tile size one, one query, a mask, and two that hide half of the keys.
ATTENTION = (
    Attention("float16", 1, 1, 256, 384, 64),
    Attention("bfloat16", 1, 1, 256, 384, 128),
    Attention("float16", 1, 1, 128, 128, 256),
    Attention("float16", 4, 1, 256, 256, 64, {"is_causal": True}),
    Attention("float16", 1, 1, 256, 256, 64, {"window": (64, 64)}),
    Attention("float16", 1, 1, 1, 512, 128),
    Attention("float16", 1, 1, 128, 128, 64, {"mask": np.eye(128, dtype=bool)}),
    Attention("tf32", 1, 1, 128, 128, 64),
    Attention("float32", 1, 1, 128, 128, 64),
    Attention("float64", 1, 1, 64, 128, 64),
)
OPTION_NAMES = {"is_causal": "causal", "window": "window", "mask": "mask"}


class Case(NamedTuple):
    """A call on data: `call` is given what brings an array to where it runs."""

    operation: str
    rows: int
    cols: int
    dtype: str
    call: Callable[[Callable[[np.ndarray], Any]], Any]
    sizes: tuple[int, int]  # bytes that reads and writes are measured in
    scores: int  # or elements, that exponentials and instructions are measured in

    def where(self, arch: str) -> dict[str, Any]:
        """The keys of a result that tell this case from all others."""
        keys = ("operation", "rows", "cols", "dtype")
        return {"arch": arch, **{key: getattr(self, key) for key in keys}}


def row_cases(shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[Case]:
    """The calls on float32 rows."""
    rng = np.random.default_rng()
    return [
        _row_case(name, rows, cols, rng)
        for name in CALLS
        for rows, cols in shapes
        if cols >= CALLS[name].least_cols
    ]


def attention_cases(calls: tuple[Attention, ...] = ATTENTION) -> list[Case]:
    """The calls of attention."""
    rng = np.random.default_rng()
    return [_attention_case(call, rng) for call in calls]


def count(
    archs: tuple[str, ...] = ("sm_80", "sm_90"), shapes: tuple[tuple[int, int], ...] = SHAPES
) -> list[dict[str, Any]]:
    """The `counters` of a result: the calls on rows."""
    return [_counted(case, arch) for arch in archs for case in row_cases(shapes)]


def count_attention(
    archs: tuple[str, ...] = ("sm_80", "sm_90"), calls: tuple[Attention, ...] = ATTENTION
) -> list[dict[str, Any]]:
    """The `counters` of a result: attention."""
    return [_counted(case, arch) for arch in archs for case in attention_cases(calls)]


def _row_case(name: str, rows: int, cols: int, rng: np.random.Generator) -> Case:
    call = CALLS[name]
    arrays = [rng.standard_normal((rows, cols), np.float32) for _ in range(call.operands)]
    size = arrays[0].nbytes
    return Case(
        name,
        rows,
        cols,
        "float32",
        lambda asarray: call.function(*map(asarray, arrays)),
        (size, size),
        arrays[0].size,
    )


def _attention_case(call: Attention, rng: np.random.Generator) -> Case:
    op, heads, kv_heads, seqlen_q, seqlen_k, head_dim, options = call
    dtype = "float32" if op == "tf32" else op
    shapes = [(heads, seqlen_q, head_dim), *[(kv_heads, seqlen_k, head_dim)] * 2]
    arrays = [rng.standard_normal(shape).astype(inside.dtype_of(dtype)) for shape in shapes]
    q, k, v = arrays
    precision = "tf32" if op == "tf32" else None
    words = [op] if op == "tf32" else []
    words += [f"{heads} heads on {kv_heads}"] if heads > kv_heads else []
    name = ", ".join(["attention", f"head_dim {head_dim}", *words, *map(OPTION_NAMES.get, options)])
    rows = heads * seqlen_q

    def run(asarray: Callable[[np.ndarray], Any]) -> Any:
        given = {
            key: asarray(value) if isinstance(value, np.ndarray) else value
            for key, value in options.items()
        }
        return cuattn.attention(*map(asarray, arrays), precision=precision, **given)

    sizes = (q.nbytes + k.nbytes + v.nbytes, q.nbytes)
    return Case(name, rows, seqlen_k, dtype, run, sizes, rows * seqlen_k)


def _counted(case: Case, arch: str) -> dict[str, Any]:
    """Counters of a call, as they are and per element of an operand."""
    import emulator

    allocated = []

    def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        allocated.append(emulator.empty(shape, dtype))
        return allocated[-1]

    with emulator.activate(arch, NUM_SMS) as runtime:
        runtime.empty = empty
        case.call(lambda array: array)
        total = runtime.total()
        sectors = total.global_sectors_read + total.global_sectors_written
        return {
            **case.where(arch),
            "kernels": [kernel.name for kernel in runtime.kernels],
            "reads": total.global_bytes_read / case.sizes[0],
            "writes": total.global_bytes_written / case.sizes[1],
            "sectors": sectors * 32 / case.sizes[0],
            "exponentials": total.exps / case.scores,
            "mma": total.mma,
            "ldmatrix": total.ldmatrix,
            "conflicts": total.shared_wavefronts - total.shared_wavefronts_ideal,
            "barriers": total.barriers,
            "allocated_bytes": sum(array.nbytes for array in allocated),
        }
