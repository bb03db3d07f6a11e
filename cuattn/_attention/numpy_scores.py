"""The heads of a call of attention: what makes scores of products, and which keys a query sees."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays.blocks import widen
from cuattn._attention.numpy_mask import Mask
from cuattn._attention.numpy_score import Chains, Score

ALL = slice(0, None)


class Heads(NamedTuple):
    """Sequences of equal lengths; of their heads G share no k and v, and g do."""

    q: Any  # (B, G, g, M, D)
    k: Any  # (B, G, N, D)
    v: Any  # (B, G, N, E)
    out: Any  # (B, G, g, M, E), written
    lse: Any  # (B, G, g, M), written, or None
    mask: Any  # (B, G, g, M, N), or less of M and N: False beyond; or None
    bias: Any  # likewise, 0 beyond
    slopes: Any  # (B, G, g, 1, 1), or None
    sinks: Any  # (1, G, g, 1), or None
    place: int  # of query 0 among the keys
    scale: float
    softcap: float
    left: int | None
    right: int | None
    score: Score | None = None
    listed: Any = None  # (B, G, g, M', N') bool: the tiles of a block mask that are not empty
    block: tuple[int, int] | None = None  # queries and keys of such a tile; the first begins at 0
    predicate: Mask | None = None  # a mask that is an expression

    def tile(self, b: slice, h: slice, i: slice) -> Heads:
        """Sequences b, heads h of k and v, queries i."""
        if b is h is i is ALL:
            return self
        names = "q", "out", "lse", "mask", "bias"
        cut = {n: a[b, h, :, i] for n in names if (a := getattr(self, n)) is not None}
        if self.block is not None:
            end = None if i.stop is None else -(-i.stop // self.block[0])
            cut["listed"] = self.listed[b, h, :, i.start // self.block[0] : end]
        if self.slopes is not None:
            cut["slopes"] = self.slopes[b, h]
        if self.sinks is not None:
            cut["sinks"] = self.sinks[:, h]
        if self.score is not None:
            cut["score"] = self.score.tile(b, h)
        if self.predicate is not None:
            cut["predicate"] = self.predicate.tile(b, h, i)
        return self._replace(k=self.k[b, h], v=self.v[b, h], place=self.place + i.start, **cut)


def key_tiles(x: Heads, keys: int) -> list[slice]:
    """The keys that some query sees, by `keys`; of causal attention and a window no others."""
    rows, columns = x.q.shape[3], x.k.shape[2]
    first = 0 if x.left is None else max(0, x.place - x.left)
    last = columns if x.right is None else min(columns, x.place + rows + x.right)
    tiles = [
        slice(j, min(j + keys, end, last))
        for begin, end in _listed_keys(x, columns)
        for j in range(max(first, begin), min(last, end), keys)
    ]
    return tiles if x.mask is None else [j for j in tiles if once(x.mask[..., j]).any()]


def listed_tiles(x: Any, b: slice | np.ndarray) -> np.ndarray:
    """Of sequences b, whether a block mask lists each of its tiles: (B, H, M', N') bool."""
    counts, indices = x.block_counts[b], x.block_indices[b]
    tiles = indices.shape[3]
    listed = np.zeros((*indices.shape[:3], tiles + 1), bool)
    counted = np.arange(tiles) < counts[..., None]
    np.put_along_axis(listed, np.where(counted, indices.clip(0, tiles), tiles), True, axis=3)
    return listed[..., :tiles]


def _listed_keys(x: Heads, columns: int) -> list[tuple[int, int]]:
    """First and last key of what lies in tiles that some row of a block mask lists."""
    if x.block is None:
        return [(0, columns)]
    listed = np.diff(once(x.listed).any(axis=(0, 1, 2, 3)), prepend=False, append=False)
    borders = np.flatnonzero(listed) * x.block[1]
    return [*zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True)]


def to_scores(s: np.ndarray, x: Heads, j: slice, chains: Chains | None = None) -> bool:
    """Products to scores, of hidden keys -inf; whether there are any. `chains`: take the
    derivatives of a score expression."""
    if x.softcap:
        cap = s.dtype.type(x.softcap)
        s /= cap
        np.tanh(s, out=s)
        s *= cap
    by_head = s.reshape(*x.q.shape[:4], s.shape[3])
    if x.bias is not None:
        bias = x.bias[..., j]
        part = by_head[..., : bias.shape[3], : bias.shape[4]]
        part += once(bias, s.dtype)
    if x.slopes is not None:
        by_head -= x.slopes.astype(s.dtype) * distances(x, j, by_head)
    if x.score is not None:
        of_heads = {by: a.reshape(by_head.shape) for by, a in (chains or {}).items()}
        x.score.change(by_head, x.place, j, of_heads)
    return _hide(by_head, x, j)


def distances(x: Heads, j: slice, s: np.ndarray) -> np.ndarray:
    """How far keys lie from the queries' places, (M, N), laid out as s."""
    rows, columns = np.arange(x.q.shape[3], dtype=s.dtype), np.arange(j.start, j.stop) - x.place
    found = np.subtract(columns.astype(s.dtype), rows[:, None], order=_order(s))
    return np.abs(found, out=found)


def _hide(s: np.ndarray, x: Heads, j: slice) -> bool:
    """-inf for the keys that a query does not see, (B, G, g, M, N); whether there are any."""
    hides, (rows, columns) = False, s.shape[3:]
    if x.mask is not None or x.predicate is not None:
        mask = x.mask[..., j] if x.predicate is None else x.predicate.seen(j)
        m, n = mask.shape[3:]
        s[..., m:, :] = s[..., n:] = -np.inf
        mask = once(mask)
        hides = (m, n) != (rows, columns) or not mask.all()
        if hides:  # a minimum with infinity or -infinity: `where=` takes 30 times as long
            part, limits = s[..., :m, :n], mask.astype(s.dtype)
            limits -= 0.5
            limits *= np.inf
            np.fmin(part, limits, out=part)
    place = x.place - j.start  # of the first query among these keys
    i = np.arange(rows, dtype=np.int32)[:, None]
    if x.right is not None and place + x.right < columns - 1:
        first = max(0, place + x.right + 1)
        key = np.arange(first - place - x.right, columns - place - x.right, dtype=np.int32)
        np.copyto(s[..., first:], -np.inf, where=np.greater(key, i, order=_order(s)))
        hides = True
    if x.left is not None and place + rows - 1 > x.left:
        last = min(columns, place + rows - 1 - x.left)
        key = np.arange(x.left - place, x.left - place + last, dtype=np.int32)
        np.copyto(s[..., :last], -np.inf, where=np.less(key, i, order=_order(s)))
        hides = True
    return hides


def seen(x: Heads, s: np.ndarray, j: slice) -> np.ndarray:
    """Which of the keys j each query sees, in the shape of s."""
    zeros = np.zeros_like(s)
    _hide(zeros.reshape(*x.q.shape[:4], s.shape[3]), x, j)
    return zeros == 0


def _order(s: np.ndarray) -> Any:
    """How the last two axes lie in memory."""
    return "F" if s.strides[3] < s.strides[4] else "C"


def varies(a: np.ndarray | None) -> bool:
    """Whether each query and each key has a value of its own."""
    return a is not None and bool(a.strides[3] and a.strides[4])


def once(a: np.ndarray, acc: np.dtype | None = None) -> np.ndarray:
    """Mask or bias with an axis of 1 where it is repeated; in `acc`."""
    a = a[tuple(ALL if stride else slice(0, 1) for stride in a.strides)]
    return a if acc is None else wide(a, acc)


def wide(a: np.ndarray, acc: np.dtype) -> np.ndarray:
    """`a` in `acc`, a copy only where it is not."""
    if a.dtype == acc:
        return a
    y = np.empty(a.shape, acc)
    widen(a, y)
    return y
