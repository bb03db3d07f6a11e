"""Attention of NumPy arrays over a KV cache, and what writes into one.

Arrays are canonical (views_kvcache). Sequences of equal lengths are computed together, each with
the bits that it has alone. A tile takes its own keys out of the pages, and looks at no others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from cuattn._arrays import blocks
from cuattn._attention.numpy_attention import Lengths, alike, blas_has_one_thread, slices, tile
from cuattn._attention.numpy_score import Score
from cuattn._attention.numpy_scores import ALL, Heads
from cuattn._attention.numpy_tile import attend, is_usable
from cuattn._attention.views_kvcache import Arrays, Sizes

RANGE = {"float8_e4m3fn": (-448.0, 448.0), "int8": (-128.0, 127.0)}  # of numbers with a scale


class Keys:
    """The first keys of some sequences and heads, or their values: copies of those asked for."""

    def __init__(self, cache: Any, scale: Any, pages: Any, columns: int, acc: np.dtype) -> None:
        self.cache, self.scale = cache, scale  # (pages, G, page size, D), (pages, G, page size)
        self.pages, self.acc = pages, acc  # of each sequence, all within the cache
        self.shape = len(pages), cache.shape[1], columns, cache.shape[3]

    def __getitem__(self, at: tuple[slice, ...]) -> Any:
        """``[b, h]``: fewer sequences and heads. ``[:, :, j]``: an array (B, G, keys, D)."""
        if len(at) == 2:
            b, h = at
            scale = None if self.scale is None else self.scale[:, h]
            return Keys(self.cache[:, h], scale, self.pages[b], self.shape[2], self.acc)
        columns, rows = np.divmod(np.arange(at[2].start, at[2].stop), self.cache.shape[2])
        pages = self.pages[:, columns]
        keys = self.cache[pages, :, rows]  # (B, keys, G, D)
        if keys.dtype.name in RANGE:
            keys = _numbers(keys.dtype, self.acc)[keys.view(np.uint8)]
            if self.scale is not None:
                keys *= self.scale[pages, :, rows][..., None]
        return keys.swapaxes(1, 2)


@functools.lru_cache(maxsize=16)
def _numbers(dtype: np.dtype, acc: np.dtype) -> np.ndarray:
    """All numbers of 8 bits, in the order of these."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(acc)


# ---- Attention ----


def attention(
    x: Arrays,
    sizes: Sizes,
    o: Any,
    indexed: tuple[Any, ...],
    out: np.ndarray,
    lse: np.ndarray | None,
) -> None:
    """out (B, H, S_q, D_v) and lse (B, H, S_q) of a cache that has its new keys already.

    `o` are the options of scores, a request.Options, and `indexed` the arrays of an expression.
    """
    if x.q_lens is not None:
        out[...] = 0
        if lse is not None:
            lse[...] = -np.inf
    if out.size or (lse is not None and lse.size):
        lengths = _lengths(x, sizes, o.q_offset)
        rows, columns = lengths[:, 2], lengths[:, 3]
        work = sizes.heads * int(rows @ columns)
        work += sizes.kv_heads * sizes.head_dim * int(columns.sum())
        score = None if o.score is None else _score(o.score, indexed, sizes, x.q.dtype)
        given = _blocks(x, sizes, o, score, lengths)
        todo = ((*block, out, lse) for block in given)
        blocks.each(_attend, todo, work if blas_has_one_thread() else 0)


def _lengths(x: Arrays, sizes: Sizes, q_offset: int | None) -> np.ndarray:
    """`Lengths` of each sequence, (B, 5)."""
    lengths, most = np.empty((sizes.batch, 5), np.int64), sizes.capacity
    lengths[:, :2] = sizes.q_rows, most
    lengths[:, 2] = sizes.q_rows if x.q_lens is None else np.clip(x.q_lens, 0, sizes.q_rows)
    lengths[:, 3] = most if x.kv_lens is None else np.clip(x.kv_lens, 0, most)
    new = sizes.new_rows if x.q_lens is None else np.minimum(lengths[:, 2], sizes.new_rows)
    lengths[:, 3] = np.minimum(lengths[:, 3] + new, most)
    lengths[:, 4] = lengths[:, 3] - lengths[:, 2]
    if x.q_offset is not None:
        lengths[:, 4] = x.q_offset
    elif q_offset is not None:
        lengths[:, 4] = q_offset
    return lengths


def _score(expression: Any, indexed: tuple[Any, ...], sizes: Sizes, dtype: np.dtype) -> Score:
    """The expression of all sequences and heads."""
    heads = np.arange(sizes.heads, dtype=np.int64).reshape(1, sizes.kv_heads, -1, 1, 1)
    sequences = np.arange(sizes.batch, dtype=np.int64).reshape(-1, 1, 1, 1, 1)
    return Score(expression, indexed, sequences, heads, blocks.accumulator(dtype, blocks.FLOAT32))


def _blocks(
    x: Arrays, sizes: Sizes, o: Any, score: Score | None, lengths: np.ndarray
) -> Iterator[tuple[Any, ...]]:
    """Pieces of the work: heads of some sequences, which of their queries, where results go, and
    the number of keys of a tile.
    """
    acc = blocks.accumulator(x.q.dtype, blocks.FLOAT32)
    copied = x.page_table is not None or not all(is_usable(a, acc) for a in (x.k_cache, x.v_cache))
    group = sizes.heads // sizes.kv_heads
    for own, which in alike(lengths):
        rows, keys, matrices = tile(_heads(x, sizes, o, score, which[:1], own), copied)
        step = max(1, matrices // sizes.kv_heads)
        for b in (which[first : first + step] for first in range(0, len(which), step)):
            heads = _heads(x, sizes, o, score, b, own)
            for h in slices(sizes.kv_heads, min(matrices, sizes.kv_heads)):
                for i in slices(own[2], rows):
                    to = b, slice(group * h.start, group * h.stop), i
                    yield heads.tile(ALL, h, i), keys, acc, to


def _attend(
    x: Heads, keys: int, acc: np.dtype, to: tuple[Any, ...], out: np.ndarray, lse: Any
) -> None:
    found, found_lse = attend(x, keys, acc)
    batch, heads, group, rows, _ = x.q.shape
    rounded = np.empty((batch, heads * group, rows, x.v.shape[3]), out.dtype)
    blocks.narrow(found.reshape(rounded.shape), rounded)
    out[to] = rounded
    if lse is not None:
        lse[to] = found_lse.reshape(rounded.shape[:3])


def _heads(
    x: Arrays, sizes: Sizes, o: Any, score: Score | None, b: np.ndarray, lengths: Lengths
) -> Heads:
    """Sequences b, which have these lengths."""
    _, _, m, n, place = lengths

    def by_key(a: Any) -> Any:
        return a.reshape(len(a), sizes.kv_heads, a.shape[1] // sizes.kv_heads, *a.shape[2:])

    at: Any = b
    if b[-1] - b[0] == len(b) - 1:  # neighbours: views
        at = slice(b[0], b[-1] + 1)
    k, v, exists = _keys(x, sizes, b, at, n)
    mask = _mask(x, at, m, n, exists)
    if mask is not None:
        mask = by_key(np.broadcast_to(mask, (len(b), sizes.heads, m, n)))
    slopes = None if x.alibi_slopes is None else by_key(x.alibi_slopes[at])[..., None, None]
    sinks = None if x.sinks is None else by_key(x.sinks[None])[..., None]
    q, numbers = by_key(x.q[at, :, :m]), (place, o.scale, o.softcap, o.left, o.right)
    score = score and score._replace(b=score.b[b])
    return Heads(q, k, v, None, None, mask, None, slopes, sinks, *numbers, score)


def _keys(
    x: Arrays, sizes: Sizes, b: np.ndarray, at: Any, n: int
) -> tuple[Any, Any, np.ndarray | None]:
    """The first n keys of sequences b, their values, and which keys there are; None: all."""
    caches = (x.k_cache, x.k_scale), (x.v_cache, x.v_scale)
    seen = None
    if x.page_table is None:
        if isinstance(at, slice) and x.k_cache.dtype.name not in RANGE:
            return x.k_cache[at, :, :n], x.v_cache[at, :, :n], None
        pages = b[:, None]
    else:
        pages = x.page_table[at, : -(-n // max(1, sizes.page_size))]
        exists = (pages >= 0) & (pages < sizes.pages)
        if not exists.all():
            pages = np.where(exists, pages, 0)  # any: nobody sees it
            seen = np.repeat(exists, sizes.page_size, axis=1)[:, :n]
    acc = blocks.accumulator(x.q.dtype, blocks.FLOAT32)
    k, v = (Keys(*cache, pages, n, acc) for cache in caches)
    return k, v, seen


def _mask(x: Arrays, at: Any, m: int, n: int, exists: np.ndarray | None) -> np.ndarray | None:
    """Which keys queries see, (B or 1, H or 1, m or 1, n); None: all."""
    seen = None if exists is None else exists[:, None, None]
    if x.mask is None:
        return seen
    mask = (x.mask[at] if len(x.mask) > 1 else x.mask)[:, :, :m]
    last = min(n, mask.shape[3])
    tree = np.ones((*mask.shape[:3], n), bool)
    tree[..., n - last :] = mask[..., mask.shape[3] - last :]
    return tree if seen is None else tree & seen


# ---- What is written ----


@blocks.quiet
def append(x: Arrays, sizes: Sizes, computed: tuple[bool, bool], acc: np.dtype) -> None:
    """k_new and v_new behind the first `kv_lens` keys; what has no place is dropped.

    `computed`: whether k_scale and v_scale are those of each token and head, which follow from it.
    Numbers are divided by their scales as numbers of `acc`.
    """
    rows = np.arange(sizes.new_rows)
    place = np.clip(x.kv_lens, 0, sizes.capacity).astype(np.int64)[:, None] + rows
    fits = place < sizes.capacity
    if x.new_lens is not None:
        fits &= rows < x.new_lens[:, None]
    b, i = np.nonzero(fits)
    pages, rows = b, place[b, i]
    if x.page_table is not None:
        columns, rows = np.divmod(rows, max(1, sizes.page_size))
        pages = x.page_table[b, columns]
        fits = (pages >= 0) & (pages < sizes.pages)
        b, i, pages, rows = (a[fits] for a in (b, i, pages, rows))
    for cache, new, scale, own in (
        (x.k_cache, x.k_new, x.k_scale, computed[0]),
        (x.v_cache, x.v_new, x.v_scale, computed[1]),
    ):
        if new is None:
            continue
        numbers = new[b, :, i]  # (tokens, H_kv, D)
        if cache.dtype.name in RANGE:
            numbers = numbers.astype(acc)
            if own:
                most = np.abs(numbers).max(axis=2, initial=0) / acc.type(RANGE[cache.dtype.name][1])
                scale[pages, :, rows] = most
            factors = None if scale is None else scale[pages, :, rows][..., None].astype(acc)
            numbers = _quantised(numbers, factors, cache.dtype)
        cache[pages, :, rows] = numbers


def _quantised(x: np.ndarray, scale: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """The nearest numbers of 8 bits; of more than the largest that one, of a scale of 0 zeros."""
    if scale is not None:
        x = np.where(scale == 0, 0, x / scale)
    x = np.clip(x, *RANGE[dtype.name])
    if dtype.name == "int8":
        return np.nan_to_num(np.rint(x)).astype(dtype)
    # astype alone would round float64 to float32 first. No NaN has a sign.
    step = np.ldexp(x.dtype.type(1), np.maximum(np.frexp(x)[1], -5) - 4)
    return np.nan_to_num(np.rint(x / step) * step, nan=np.nan).astype(dtype)
