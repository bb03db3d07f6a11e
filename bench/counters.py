"""What every regime of the plans costs, counted on the emulator: no GPU needed.

Each row is a call of the public API on random data: global bytes and 32-byte sectors, bank
conflicts, exponentials and barriers, and the device memory that the call allocates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import cuattn
from bench import inside  # noqa: F401 - makes `import emulator` find tests/emulator

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


def count(
    archs: tuple[str, ...] = ("sm_80", "sm_90"), shapes: tuple[tuple[int, int], ...] = SHAPES
) -> list[dict[str, Any]]:
    """The `counters` of a result."""
    rng = np.random.default_rng()
    return [
        count_call(name, arch, rows, cols, rng)
        for arch in archs
        for name in CALLS
        for rows, cols in shapes
        if cols >= CALLS[name].least_cols
    ]


def count_call(
    name: str, arch: str, rows: int, cols: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Counters of one call on float32 rows, as they are and per element of an operand."""
    import emulator

    call = CALLS[name]
    arrays = [rng.standard_normal((rows, cols), np.float32) for _ in range(call.operands)]
    allocated = []

    def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        allocated.append(emulator.empty(shape, dtype))
        return allocated[-1]

    with emulator.activate(arch, NUM_SMS) as runtime:
        runtime.empty = empty
        call.function(*arrays)
        total, size = runtime.total(), arrays[0].nbytes
        return {
            "operation": name,
            "arch": arch,
            "rows": rows,
            "cols": cols,
            "dtype": "float32",
            "kernels": [kernel.name for kernel in runtime.kernels],
            "reads": total.global_bytes_read / size,
            "writes": total.global_bytes_written / size,
            "sectors": (total.global_sectors_read + total.global_sectors_written) * 32 / size,
            "exponentials": total.exps / arrays[0].size,
            "conflicts": total.shared_wavefronts - total.shared_wavefronts_ideal,
            "barriers": total.barriers,
            "allocated_bytes": sum(array.nbytes for array in allocated),
        }
