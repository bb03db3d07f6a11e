"""The lists of a block mask: of arrays by NumPy or CuPy, of expressions by NumPy or a kernel."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from cuattn._arrays.results import BlockMask
from cuattn._arrays.row_layout import ArraySpec, spec_of
from cuattn._attention import request_mask
from cuattn._attention.numpy_mask import seen_by_tile
from cuattn._attention.request_mask import Predicate
from cuattn._attention.run_score import score_arrays_of
from cuattn._attention.views import whole_elements
from cuattn._device.kernel import ceil_div
from cuattn._device.launches import Launches
from cuattn._device.params import ATTENTION_BLOCK_MASK
from cuattn._device.runtime import runtime_of


def block_mask_of(mask: Any, rows: int, columns: int, block: tuple[int, int]) -> BlockMask:
    """Of a mask of rows x columns, or 1 of either."""
    runtime = runtime_of(mask)
    if runtime is None:
        return _of_array(np, mask, rows, columns, block)
    with runtime.on(runtime.device(mask)):
        return _of_array(runtime.xp, mask, rows, columns, block)


def block_mask_of_expression(call: request_mask.Call) -> BlockMask:
    """Of a mask that no array holds."""
    runtime, owner, mask, predicate, block = call
    if runtime is None:
        seen = seen_by_tile(predicate, tuple(mask.args.values()), block)
        return _listed(np, seen > 0, seen == _sizes(np, mask.shape, block), mask, block)
    with runtime.on(runtime.device(owner)):
        arrays = {n: whole_elements(runtime.xp, array) for n, array in mask.args.items()}
        specs = tuple((name, spec_of(array)) for name, array in arrays.items())
        kinds = runtime.empty((*mask.shape[:-2], *_tiles(mask.shape, block)), np.dtype(np.uint8))
        if kinds.size:
            _planned(predicate, specs, block).run(runtime, [*arrays.values(), kinds])
        return _listed(runtime.xp, kinds > 0, kinds == 2, mask, block)


@lru_cache(maxsize=1024)
def _planned(
    predicate: Predicate, arrays: tuple[tuple[str, ArraySpec], ...], block: tuple[int, int]
) -> Launches:
    """The launch that finds the kind of each tile."""
    from cuattn._attention.plan_mask import plan_block_mask, plan_mask

    *lead, rows, columns = predicate.shape
    tile_rows, tile_cols = _tiles(predicate.shape, block)
    fields: dict[str, Any] = {"tile_rows": tile_rows, "tile_cols": tile_cols}
    fields |= {"batch": (1, 1, *lead)[-2], "heads": (1, 1, *lead)[-1]}
    fields |= {"queries": rows, "keys": columns}
    fields |= {"block_queries": block[0], "block_keys": block[1]}
    tiles = fields["batch"] * fields["heads"] * tile_rows * tile_cols
    mask = plan_mask(predicate.expression, tuple(spec.dtype.name for _, spec in arrays))
    params = (ATTENTION_BLOCK_MASK, fields), score_arrays_of(dict(arrays))
    names = [name for name, _ in arrays]
    return Launches(names, ["kinds"], {}, ["kinds"], [(plan_block_mask(mask, tiles), params)])


def _of_array(xp: Any, mask: Any, rows: int, columns: int, block: tuple[int, int]) -> BlockMask:
    mask = xp.broadcast_to(mask, (*mask.shape[:-2], rows, columns))
    seen = _seen(xp, mask, block)
    return _listed(xp, seen > 0, seen == _sizes(xp, mask.shape, block), mask, block)


def _listed(xp: Any, some: Any, every: Any, mask: Any, block: tuple[int, int]) -> BlockMask:
    """Of the tiles in which some query sees some key, and in which every one sees all."""
    counts = some.sum(axis=-1, dtype=np.int32)
    # A tile that is not empty goes behind those of its row before it; an empty one behind all.
    *lead, tiles = some.shape
    lists = xp.full((*lead, tiles + 1), -1, np.int32)
    place = xp.where(some, xp.cumsum(some, axis=-1, dtype=np.int64) - 1, tiles)
    first = xp.arange(counts.size, dtype=np.int64).reshape(*lead, 1) * (tiles + 1)
    lists.reshape(-1)[first + place] = xp.broadcast_to(xp.arange(tiles, dtype=np.int32), some.shape)
    indices = xp.ascontiguousarray(lists[..., :tiles])
    full = xp.take_along_axis(every, xp.maximum(indices, 0), axis=-1) & (indices >= 0)
    return BlockMask(counts, indices, full, mask, block)


def _seen(xp: Any, mask: Any, block: tuple[int, int]) -> Any:
    """How many keys the queries of each tile see together."""
    *lead, rows, columns = mask.shape
    shape = _tiles(mask.shape, block)
    whole = tuple(n * size for n, size in zip(shape, block, strict=True))
    if whole != (rows, columns):
        padded = xp.zeros((*lead, *whole), bool)
        padded[..., :rows, :columns] = mask
        mask = padded
    tiles = mask.reshape(*lead, shape[0], block[0], shape[1], block[1])
    return tiles.sum(axis=(-3, -1), dtype=np.int64)


def _sizes(xp: Any, shape: tuple[int, ...], block: tuple[int, int]) -> Any:
    """How many keys they would see at most."""
    m, n = (
        xp.minimum(size, length - xp.arange(count, dtype=np.int64) * size)
        for size, length, count in zip(block, shape[-2:], _tiles(shape, block), strict=True)
    )
    return m[:, None] * n


def _tiles(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles."""
    return ceil_div(shape[-2], block[0]), ceil_div(shape[-1], block[1])
