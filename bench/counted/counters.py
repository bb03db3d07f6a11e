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


def count(
    archs: tuple[str, ...] = ("sm_80", "sm_90"), shapes: tuple[tuple[int, int], ...] = SHAPES
) -> list[dict[str, Any]]:
    """The `counters` of a result: the calls on rows."""
    rng = np.random.default_rng()
    return [
        count_call(name, arch, rows, cols, rng)
        for arch in archs
        for name in CALLS
        for rows, cols in shapes
        if cols >= CALLS[name].least_cols
    ]


def count_attention(
    archs: tuple[str, ...] = ("sm_80", "sm_90"), calls: tuple[Attention, ...] = ATTENTION
) -> list[dict[str, Any]]:
    """The `counters` of a result: attention."""
    rng = np.random.default_rng()
    return [count_one_attention(call, arch, rng) for arch in archs for call in calls]


def count_call(
    name: str, arch: str, rows: int, cols: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Counters of one call on float32 rows, as they are and per element of an operand."""
    call = CALLS[name]
    arrays = [rng.standard_normal((rows, cols), np.float32) for _ in range(call.operands)]
    size, where = arrays[0].nbytes, (name, arch, rows, cols, "float32")
    return _counted(where, lambda: call.function(*arrays), (size, size), arrays[0].size)


def count_one_attention(call: Attention, arch: str, rng: np.random.Generator) -> dict[str, Any]:
    """Counters of one call of attention."""
    op, heads, kv_heads, seqlen_q, seqlen_k, head_dim, options = call
    dtype = "float32" if op == "tf32" else op
    shapes = [(heads, seqlen_q, head_dim), *[(kv_heads, seqlen_k, head_dim)] * 2]
    q, k, v = (rng.standard_normal(shape).astype(inside.dtype_of(dtype)) for shape in shapes)
    precision = "tf32" if op == "tf32" else None
    words = [op] if op == "tf32" else []
    words += [f"{heads} heads on {kv_heads}"] if heads > kv_heads else []
    name = ", ".join(["attention", f"head_dim {head_dim}", *words, *map(OPTION_NAMES.get, options)])
    rows = heads * seqlen_q
    return _counted(
        (name, arch, rows, seqlen_k, dtype),
        lambda: cuattn.attention(q, k, v, precision=precision, **options),
        (q.nbytes + k.nbytes + v.nbytes, q.nbytes),
        rows * seqlen_k,
    )


def _counted(
    where: tuple[str, str, int, int, str],
    call: Callable[[], Any],
    sizes: tuple[int, int],
    scores: int,
) -> dict[str, Any]:
    """Counters of a call; `sizes` are the bytes that reads and writes are measured in."""
    import emulator

    name, arch, rows, cols, dtype = where
    allocated = []

    def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        allocated.append(emulator.empty(shape, dtype))
        return allocated[-1]

    with emulator.activate(arch, NUM_SMS) as runtime:
        runtime.empty = empty
        call()
        total = runtime.total()
        return {
            "operation": name,
            "arch": arch,
            "rows": rows,
            "cols": cols,
            "dtype": dtype,
            "kernels": [kernel.name for kernel in runtime.kernels],
            "reads": total.global_bytes_read / sizes[0],
            "writes": total.global_bytes_written / sizes[1],
            "sectors": (total.global_sectors_read + total.global_sectors_written) * 32 / sizes[0],
            "exponentials": total.exps / scores,
            "mma": total.mma,
            "ldmatrix": total.ldmatrix,
            "conflicts": total.shared_wavefronts - total.shared_wavefronts_ideal,
            "barriers": total.barriers,
            "allocated_bytes": sum(array.nbytes for array in allocated),
        }
