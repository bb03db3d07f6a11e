"""`attention_topk` of NumPy arrays: tiles of scores, of which each query keeps its best.

The scores of one head of k are a matrix, as in numpy_tile.py. No array has a score for each query
and key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import blocks
from cuattn._arrays.blocks import FLOAT32, FLOAT64
from cuattn._arrays.order import at, in_order, ranks
from cuattn._attention.numpy_attention import (
    COPIED,
    KEYS,
    SCORES,
    alike,
    blas_has_one_thread,
    heads_of,
    lengths_of,
    slices,
)
from cuattn._attention.numpy_scores import Heads, key_tiles, once, to_scores, wide
from cuattn._attention.numpy_tile import products, usable
from cuattn._attention.request_topk import TopKCall
from cuattn._attention.views import Operands, canonical, canonical_views, cast

Index = tuple[Any, ...]


class Results(NamedTuple):
    """Results with heads that share keys on an axis of their own, (B, G, g, M) and more."""

    m: Any
    l: Any  # noqa: E741
    values: Any  # (..., num)
    indices: Any


class Best(NamedTuple):
    """What is known of rows: the state of their softmax, and their best scores, best first."""

    m: np.ndarray  # (R, 1)
    l: np.ndarray  # noqa: E741
    scores: np.ndarray  # (R, num); -inf: there are no more
    columns: np.ndarray


def run(call: TopKCall) -> list[Any]:
    """The results of a call, in the order of its fields; new where none are given."""
    expected, layout = call.expected, call.layout
    made = call.outs or tuple(np.empty(*one) for one in call.results.values())
    named = dict(zip(call.results, made, strict=True))
    sizes, acc = expected.sizes, expected.acc
    arrays = cast(call.arrays, acc, expected.fractional, np)
    values, indices = (canonical(named[name], layout) for name in ("out", "indices"))
    m, l = (  # noqa: E741
        canonical(named[name][..., None], layout)[..., 0]
        if name in named
        else np.empty(values.shape[:3], acc)
        for name in ("lse", "l")
    )
    values[...] = 0 if call.output == "prob" else -np.inf
    indices[...], m[...], l[...] = -1, -np.inf, 0
    given = arrays._replace(v=arrays.k[..., :0])
    operands = canonical_views(given, (named["out"],), sizes, layout, np)
    groups = max(1, operands.k.shape[1])
    by_key = (
        a.reshape(len(a), groups, a.shape[1] // groups, *a.shape[2:])
        for a in (m, l, values, indices)
    )
    work = m.size * sizes.seqlen_k + operands.k.size
    if m.size:
        tiles = _tiles(call, operands, Results(*by_key))
        blocks.each(_store, tiles, work if blas_has_one_thread() else 0)
    return [*made]


def _tiles(call: TopKCall, x: Operands, results: Results) -> Iterator[tuple[Any, ...]]:
    """The arguments of `_store` for tiles: queries of some heads of k of some sequences."""
    for lengths, which in alike(lengths_of(x, call.options)):
        for run in np.split(which, np.flatnonzero(np.diff(which) != 1) + 1):
            heads = heads_of(x, call.options, slice(run[0], run[-1] + 1), lengths)
            batch, groups, group, rows, dim = heads.q.shape
            dim, columns = max(1, dim), heads.k.shape[2]
            keys = max(1, min(columns, KEYS // dim, max(call.num, SCORES // rows)))
            some = max(1, min(rows, SCORES // (keys * group), COPIED // dim))
            matrices = max(1, min(SCORES // (some * keys * group), COPIED // (some * group * dim)))
            for b in slices(batch, max(1, matrices // groups)):
                for h in slices(groups, min(matrices, groups)):
                    for i in slices(rows, some):
                        own = slice(b.start + run[0], b.stop + run[0]), h, slice(None), i
                        yield call, heads.tile(b, h, i), results, own, keys


def _store(call: TopKCall, x: Heads, results: Results, where: Index, keys: int) -> None:
    """The results of a tile."""
    acc = call.expected.acc
    best = search(x, call.num, keys, acc)
    lacks = best.scores == -np.inf
    found, m = best.scores, best.m
    if call.output == "prob":
        found = np.exp(best.scores - m)
        found /= np.where(np.isfinite(m), best.l, acc.type(np.nan))
        found[lacks] = 0
    elif call.output == "log_prob":
        found = best.scores - m - np.log(best.l)
        found[lacks] = -np.inf
    columns = np.where(lacks, -1, best.columns + call.index_offset)
    for result, part in zip(results, (m, best.l, found, columns), strict=True):
        own = result[where]
        own[...] = part.reshape(own.shape)


def search(x: Heads, num: int, keys: int, acc: np.dtype) -> Best:
    """The `num` best keys of the queries of a tile, by `keys` of them at a time."""
    batch, heads, group, queries, dim = x.q.shape
    q = wide(x.q, acc).reshape(batch, heads, group * queries, dim)
    if x.bias is not None and acc == FLOAT32 and x.bias.dtype == FLOAT64:
        x = x._replace(bias=_finite(x.bias))
    rows = batch * heads * group * queries
    m, l = np.full((rows, 1), -np.inf, acc), np.zeros((rows, 1), acc)  # noqa: E741
    scores, columns = np.full((rows, num), -np.inf, acc), np.zeros((rows, num), np.int64)
    for j in key_tiles(x, keys):
        s = _scores(q, x, j)
        top = np.maximum.reduce(s, axis=1, keepdims=True)
        if num:
            # A NaN may be wanted where there are fewer numbers.
            wanted = np.flatnonzero(~(top <= scores[:, -1:]))
            _merge(scores, columns, s[wanted], j.start, wanted)
        old, m = m, np.maximum(m, top)
        shift = np.where(np.isfinite(m), m, acc.type(0))
        s -= shift
        np.exp(s, out=s)
        l *= np.exp(old - shift)  # noqa: E741
        l += np.add.reduce(s, axis=1, keepdims=True)  # noqa: E741
    return Best(m, l, scores, columns)


def _scores(q: np.ndarray, x: Heads, j: slice) -> np.ndarray:
    """The scores (R, N) of keys j, of hidden ones -inf."""
    s = products(q, usable(x.k[:, :, j], q.dtype), True)
    s *= q.dtype.type(x.scale)
    to_scores(s, x, j)
    s = np.ascontiguousarray(s).reshape(-1, s.shape[3])
    if x.mask is not None and np.maximum.reduce(s, axis=None) == np.inf:
        s[(s == np.inf) & np.isnan(_scores(q, x._replace(mask=None), j))] = np.nan  # it was a NaN
    return s


def _merge(
    scores: np.ndarray, columns: np.ndarray, s: np.ndarray, first: int, rows: np.ndarray
) -> None:
    """Merge scores of keys from `first` on into the best of some rows."""
    if not len(rows):
        return
    both = np.concatenate([scores[rows], s], axis=1)
    places = np.concatenate(
        [columns[rows], np.broadcast_to(np.arange(first, first + s.shape[1]), s.shape)], axis=1
    )
    order = ranks(both, True)
    last = np.iinfo(order.dtype).max
    order[order == last] = last - 1  # NaN is before what does not count
    order[both == -np.inf] = last
    kept = in_order(order, np.broadcast_to(np.arange(both.shape[1]), both.shape), scores.shape[1])
    scores[rows], columns[rows] = at(both, kept), at(places, kept)


def _finite(bias: np.ndarray) -> np.ndarray:
    """A bias of float64 for scores in float32, in whose range what is finite stays."""
    own, most = once(bias), float(np.finfo(FLOAT32).max)
    own = np.where(np.isfinite(own), np.clip(own, -most, most), own)
    return np.broadcast_to(own, bias.shape)
