"""The lists of a block mask, by NumPy or CuPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn._arrays.results import BlockMask
from cuattn._device.kernel import ceil_div
from cuattn._device.runtime import runtime_of


def block_mask_of(mask: Any, rows: int, columns: int, block: tuple[int, int]) -> BlockMask:
    """Of a mask of rows x columns, or 1 of either."""
    runtime = runtime_of(mask)
    if runtime is None:
        return _listed(np, mask, rows, columns, block)
    with runtime.on(runtime.device(mask)):
        return _listed(runtime.xp, mask, rows, columns, block)


def _listed(xp: Any, mask: Any, rows: int, columns: int, block: tuple[int, int]) -> BlockMask:
    mask = xp.broadcast_to(mask, (*mask.shape[:-2], rows, columns))
    seen, size = _seen(xp, mask, block)
    some = seen > 0
    counts = some.sum(axis=-1, dtype=np.int32)
    # A tile that is not empty goes behind those of its row before it; an empty one behind all.
    *lead, tiles = some.shape
    lists = xp.full((*lead, tiles + 1), -1, np.int32)
    place = xp.where(some, xp.cumsum(some, axis=-1, dtype=np.int64) - 1, tiles)
    first = xp.arange(counts.size, dtype=np.int64).reshape(*lead, 1) * (tiles + 1)
    lists.reshape(-1)[first + place] = xp.broadcast_to(xp.arange(tiles, dtype=np.int32), some.shape)
    indices = xp.ascontiguousarray(lists[..., :tiles])
    full = xp.take_along_axis(seen == size, xp.maximum(indices, 0), axis=-1) & (indices >= 0)
    return BlockMask(counts, indices, full, mask, block)


def _seen(xp: Any, mask: Any, block: tuple[int, int]) -> tuple[Any, Any]:
    """How many keys the queries of each tile see together, and how many would be all."""
    *lead, rows, columns = mask.shape
    shape = ceil_div(rows, block[0]), ceil_div(columns, block[1])
    whole = tuple(n * size for n, size in zip(shape, block, strict=True))
    if whole != (rows, columns):
        padded = xp.zeros((*lead, *whole), bool)
        padded[..., :rows, :columns] = mask
        mask = padded
    tiles = mask.reshape(*lead, shape[0], block[0], shape[1], block[1])
    m, n = (
        xp.minimum(size, length - xp.arange(count, dtype=np.int64) * size)
        for size, length, count in zip(block, (rows, columns), shape, strict=True)
    )
    return tiles.sum(axis=(-3, -1), dtype=np.int64), m[:, None] * n
