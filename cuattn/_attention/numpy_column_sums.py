"""Sums of the probabilities of NumPy arrays, tile by tile.

All queries of some heads belong to one thread, which adds up tiles in float64. What decides how
that goes are the sizes and options of a sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from cuattn._arrays import blocks
from cuattn._attention.numpy_attention import (
    Lengths,
    alike,
    blas_has_one_thread,
    heads_of,
    is_copied,
    lengths_of,
    slices,
    tile,
)
from cuattn._attention.numpy_scores import ALL, Heads, key_tiles, seen, to_scores, varies, wide
from cuattn._attention.numpy_tile import products, usable
from cuattn._attention.request_column_sums import ColumnSumsCall
from cuattn._attention.views import canonical_views


@blocks.quiet
def run_numpy(call: ColumnSumsCall) -> Any:
    """The result of a call on NumPy arrays."""
    sizes, (shape, dtype) = call.expected.sizes, call.result
    arrays, lse = call.cast(np)
    x = canonical_views(arrays, (arrays.q, lse), sizes, call.layout, np)
    sums = np.zeros((sizes.batch, sizes.heads, sizes.seqlen_k))
    if x.lse.size:
        work = x.lse.size * sizes.seqlen_k + x.k.size
        blocks.each(_add_up, _blocks(x, call.options, sums), work if blas_has_one_thread() else 0)
    out = np.empty(shape, dtype) if call.out is None else call.out
    out[...] = sums.reshape(shape)
    return out


def _blocks(x: Any, o: Any, sums: np.ndarray) -> Iterator[tuple[Any, ...]]:
    """Heads of neighbouring sequences of equal lengths, with the sizes of their tiles."""
    for b, lengths in _runs(x, o):
        heads = heads_of(x, o, b, lengths)
        own = sums[b].reshape(*heads.q.shape[:3], -1)
        rows, keys, matrices = tile(heads, is_copied(heads))
        batch, heads_kv = heads.k.shape[:2]
        for i in slices(batch, max(1, matrices // heads_kv)):
            for h in slices(heads_kv, min(matrices, heads_kv)):
                yield heads.tile(i, h, ALL), own[i, h], rows, keys


def _runs(x: Any, o: Any) -> Iterator[tuple[slice, Lengths]]:
    for lengths, which in alike(lengths_of(x, o)):
        for run in np.split(which, np.flatnonzero(np.diff(which) != 1) + 1):
            yield slice(run[0], run[-1] + 1), lengths


def _add_up(x: Heads, sums: np.ndarray, rows: int, keys: int) -> None:
    """All queries of some heads, by `rows` of them and `keys`."""
    acc = blocks.accumulator(x.q.dtype, blocks.FLOAT32)
    for i in slices(x.q.shape[3], rows):
        part = x.tile(ALL, ALL, i)
        for j in key_tiles(part, keys):
            found = _tile_sums(part, j, acc)
            if acc != blocks.FLOAT64 and not np.isfinite(found).all():  # of what float32 holds not
                found = _tile_sums(part, j, blocks.FLOAT64)
            sums[..., j] += found


def _tile_sums(x: Heads, j: slice, acc: np.dtype) -> np.ndarray:
    """Of some queries over the keys j, (B, G, g, N), computed in float32 or float64."""
    batch, heads, group, rows, dim = x.q.shape
    shape = batch, heads, group * rows
    q = (wide(x.q, acc) * acc.type(x.scale)).reshape(*shape, dim)
    lse = wide(x.lse, acc).reshape(*shape, 1)
    p = products(q, usable(x.k[:, :, j], acc), varies(x.mask) or varies(x.bias))
    sees = functools.partial(seen, x, p, j) if to_scores(p, x, j) else None
    p -= np.where(lse == -np.inf, acc.type(np.inf), lse)
    if np.maximum.reduce(p, axis=None, initial=-np.inf) > 0:  # lse has been rounded
        np.copyto(p, 0, where=(p > 0) & (p < np.inf))  # infinite where a mask meets NaN
    np.exp(p, out=p)
    if sees is not None and not np.isfinite(p).all():
        np.copyto(p, 0, where=~sees())
    by_head = p.reshape(batch, heads, group, rows, p.shape[3])
    found = np.add.reduce(by_head, axis=3)
    np.copyto(found, np.nan, where=found == np.inf)
    return found
