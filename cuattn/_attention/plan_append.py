"""How new keys and values are written into a cache: which threads have which rows.

Plain integers in, frozen dataclasses out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cuattn._device.kernel import CTYPES, ITEMSIZE, Kernel, ceil_div, power_of_two

THREADS = 128  # a few small blocks: one token of a sequence is some KiB
CODES = 8  # numbers of 8 bits that a thread rounds at a time


@dataclass(frozen=True)
class NewRows:
    """New keys, or new values."""

    columns: int
    vector: bool  # whole aligned chunks
    own_scale: bool = False  # each row has one, which is computed


@dataclass(frozen=True)
class AppendPlan:
    """The kernel of a call, and what its parameters say of the threads."""

    kernel: Kernel
    lanes: tuple[int, ...]  # of a row of keys, and of values
    key_blocks: int


@lru_cache(maxsize=4096)
def plan_append(
    dtype: str, quotients: str | None, tokens: int, parts: tuple[NewRows, ...]
) -> AppendPlan | None:
    """The launch that writes `tokens` rows of keys, and of values where there are any.

    `dtype` is that of the new numbers. `quotients`: the dtype in which they are divided by their
    scales; None: the cache has the same numbers. None where nothing is written.
    """
    lanes, blocks = [], []
    for part in parts:
        chunk = 16 // ITEMSIZE[dtype] if part.vector else 1
        chunk = chunk if quotients is None else CODES
        lanes.append(min(32, power_of_two(ceil_div(part.columns, chunk))))
        rows = tokens if part.columns or part.own_scale else 0
        blocks.append(ceil_div(rows * lanes[-1], THREADS))
    if not sum(blocks):
        return None
    row = "Copied" if quotients is None else f"Quantized<{CTYPES[quotients]}>"
    arguments = {"Row": row, "kThreads": THREADS}
    kernel = Kernel("attention_kv_append", arguments, sum(blocks), THREADS)
    return AppendPlan(kernel, (*lanes, 1)[:2], blocks[0])
