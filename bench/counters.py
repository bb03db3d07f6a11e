"""What every regime of the plans costs, counted on the emulator: no GPU needed.

Each row is a call of the public API on random data: global bytes and 32-byte sectors, bank
conflicts, exponentials and barriers, and the device memory that the call allocates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import cuattn
from bench import inside  # noqa: F401 - makes `import emulator` find tests/emulator

# (rows, columns) from part of a warp to a row that is split; few, so that a count takes seconds.
SHAPES = ((64, 100), (32, 1000), (16, 4096), (4, 30_000), (2, 128_256), (1, 400_000))
NUM_SMS = 132

Call = Callable[..., Any]
CALLS: dict[str, tuple[Call, int]] = {  # name to call and number of operands
    "softmax": (cuattn.softmax, 1),
    "log_softmax": (cuattn.log_softmax, 1),
    "logsumexp": (lambda x: cuattn.logsumexp(x, axis=-1), 1),
    "softmax_backward": (cuattn.softmax_backward, 2),
    "log_softmax_backward": (cuattn.log_softmax_backward, 2),
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
    ]


def count_call(
    name: str, arch: str, rows: int, cols: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Counters of one call on float32 rows, as they are and per element of an operand."""
    call, operands = CALLS[name]
    import emulator

    arrays = [rng.standard_normal((rows, cols), np.float32) for _ in range(operands)]
    allocated = []

    def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        allocated.append(emulator.empty(shape, dtype))
        return allocated[-1]

    with emulator.activate(arch, NUM_SMS) as runtime:
        runtime.empty = empty
        call(*arrays)
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
