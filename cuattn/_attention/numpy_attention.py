"""Attention of NumPy arrays: the sequences of a call, their tiles, and threads over these."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cuattn._arrays import blocks
from cuattn._arrays.row_layout import packed
from cuattn._attention.numpy_mask import mask_of
from cuattn._attention.numpy_score import score_of
from cuattn._attention.numpy_scores import ALL, Heads, listed_tiles
from cuattn._attention.numpy_tile import attend, is_usable, products

SCORES = 1 << 17  # of a tile: with what is made of them they stay in L2
ROWS = 256  # queries of a tile, those of all heads that share k and v
KEYS = 1 << 20  # elements of k or v of a tile
COPIED = 1 << 18  # elements of a tile's q, and of k or v where BLAS cannot take them as they are
SMALL = 1 << 15  # scores of a call that is computed as the formula has it
SHORT = 1 << 16  # elements of k and v of a sequence that is copied to its like, not computed alone

Lengths = tuple[int, int, int, int, int]  # of q, k, both without padding, and place of query 0


def attention(operands: Any, options: Any) -> None:
    """out and lse of canonical arrays, written where `operands` has them.

    `operands` and `options` are those of `cuattn._attention`: views.Operands, request.Options.
    """
    x = operands
    if x.q_lens is not None:
        x.out[...] = 0
        if x.lse is not None:
            x.lse[...] = -np.inf
    if x.out.size or (x.lse is not None and x.lse.size):
        batch, heads, rows, _ = x.q.shape
        ragged = 1 if x.cu_seqlens_q is None else len(x.cu_seqlens_q) - 1
        work = batch * heads * rows * x.k.shape[2] // ragged + x.k.size
        blocks.each(_run, _blocks(x, options), work if blas_has_one_thread() else 0)


def few(call: Any, given: tuple[str, ...]) -> Callable[..., list[Any] | None] | None:
    """What computes a small call of q, k and v alone, as the formula has it: there the machinery of
    this file takes longer. The bits are the same. None, of it too: the machinery is needed."""
    o, acc, lse_shape = call.options, call.expected.acc, call.expected.lse_shape
    q, k, v = specs = call.specs[:3]
    shapes = [(1,) * (4 - len(a.shape)) + a.shape for a in specs]
    (batch, heads, m, dim), (*_, n, _), (*_, value_dim) = shapes
    plain = (
        given == ("q", "k", "v")
        and call.layout == "BHSD"
        and o.left is o.right is None
        and not o.softcap
        and o.score is None
        and all(a.strides == packed(a.shape, None, acc.itemsize) for a in specs)
        and q.dtype == acc
        and shapes[0][1] == shapes[1][1]  # each head has its own keys
        and m <= ROWS
        and n * max(dim, value_dim) <= KEYS
        and 0 < batch * heads * m * n <= SMALL
    )
    if not plain:
        return None
    scale, ones = acc.type(o.scale), np.ones(n, acc)
    return_lse, out_shape = call.return_lse, call.expected.out_shape

    @blocks.quiet
    def formula(q: Any, k: Any, v: Any) -> list[Any] | None:
        if q.ndim < 4:
            q, k, v = (a.reshape(shape) for a, shape in zip((q, k, v), shapes, strict=True))
        s = products(q * scale, k, False)
        m, least = np.maximum.reduce(s, axis=3, keepdims=True), np.minimum.reduce(s, axis=None)
        s -= m
        np.exp(s, out=s)
        l, out = np.matmul(s, ones)[..., None], np.matmul(s, v)  # noqa: E741
        if not (least > -np.inf and math.isfinite(np.add.reduce(out, axis=None))):
            return None
        out /= l
        results = [out.reshape(out_shape)]
        if return_lse:
            lse = np.log(l)
            lse += m
            results.append(lse.reshape(lse_shape))
        return results

    return formula


def blas_has_one_thread() -> bool:
    """Whether OpenBLAS leaves the other cores to threads of ours.

    Its own threads share each product, and those of two pools wait for each other: on a busy
    machine that took up to 10 times as long as either alone.
    """
    given = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    return given == "1"


def _run(function: Callable[..., None], *block: Any) -> None:
    function(*block)


def _attend(x: Heads, b: slice, h: slice, i: slice, keys: int) -> None:
    """Sequences b, heads h of k, queries i."""
    x = x.tile(b, h, i)
    out, lse = attend(x, keys, blocks.accumulator(x.q.dtype, blocks.FLOAT32))
    blocks.narrow(out.reshape(x.out.shape), x.out)
    if x.lse is not None:
        x.lse[...] = lse.reshape(x.lse.shape)


def _attend_copies(x: Any, o: Any, b: np.ndarray, lengths: Lengths, keys: int) -> None:
    """Short sequences b from all over the batch, laid side by side."""
    heads = heads_of(x, o, b, lengths)
    _attend(heads, ALL, ALL, ALL, keys)
    for own, one in ((x.out, heads.out), (x.lse, heads.lse)):
        if own is not None:
            one = one.reshape(len(b), -1, *one.shape[3:])
            if x.cu_seqlens_q is None:
                own[b, :, : lengths[2]] = one
            else:
                tokens = _tokens(x.cu_seqlens_q, b, lengths[2])
                own[0].swapaxes(0, 1)[tokens] = one.swapaxes(1, 2)


# ---- Blocks ----


def _blocks(x: Any, o: Any) -> Iterator[tuple[Any, ...]]:
    """A function of a block and its arguments."""
    if all(a is None for a in (x.cu_seqlens_q, x.q_offset, x.q_lens, x.kv_lens)):
        m, n = x.q.shape[2], x.k.shape[2]
        place = n - m if o.q_offset is None else o.q_offset
        yield from _tiles(heads_of(x, o, ALL, (m, n, m, n, place)))
        return
    for lengths, which in alike(lengths_of(x, o)):
        borders = np.flatnonzero(np.diff(which) != 1) + 1
        if len(borders):
            one = heads_of(x, o, slice(which[0], which[0] + 1), lengths)
            rows, keys, matrices = tile(one, is_copied(one))
            if rows == one.q.shape[3] and one.k.size + one.v.size <= SHORT:
                most = COPIED // (1 + one.k.size + one.v.size)
                step = max(1, min(matrices // one.k.shape[1], most))
                for first in range(0, len(which), step):
                    yield _attend_copies, x, o, which[first : first + step], lengths, keys
                continue
        for run in np.split(which, borders):
            yield from _tiles(heads_of(x, o, slice(run[0], run[-1] + 1), lengths))


def _tiles(x: Heads) -> Iterator[tuple[Any, ...]]:
    batch, heads, _, rows, _ = x.q.shape
    some, keys, matrices = tile(x, is_copied(x))
    if some == rows and batch * heads <= matrices:
        yield _attend, x, ALL, ALL, ALL, keys
        return
    for b in slices(batch, max(1, matrices // heads)):
        for h in slices(heads, min(matrices, heads)):
            for i in slices(rows, some):
                yield _attend, x, b, h, i, keys


def is_copied(x: Heads) -> bool:
    """Whether BLAS takes k or v as a copy."""
    acc = blocks.accumulator(x.q.dtype, blocks.FLOAT32)
    return not (is_usable(x.k, acc) and is_usable(x.v, acc))


def tile(x: Heads, copied: bool) -> tuple[int, int, int]:
    """Queries of each head and keys that a tile takes, and the heads of k that it may have."""
    _, _, group, rows, dim = x.q.shape
    columns, value_dim = x.v.shape[2:]
    dim = max(1, dim, value_dim)
    most, least = (COPIED, 2 * ROWS) if copied else (KEYS, ROWS)  # the more, the fewer copies
    rows = min(rows, max(1, least // group))
    keys = max(1, min(columns, most // dim, SCORES // (group * rows)))
    matrices = min(SCORES // (group * rows * keys), COPIED // (group * rows * dim))
    return rows, keys, max(1, min(matrices, COPIED // (keys * dim)) if copied else matrices)


def slices(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


# ---- Sequences ----


def alike(lengths: np.ndarray) -> Iterator[tuple[Lengths, np.ndarray]]:
    """The sequences of equal `Lengths`, but for those without queries."""
    order = np.lexsort(lengths.T)
    ordered = lengths[order]
    borders = np.flatnonzero((ordered[1:] != ordered[:-1]).any(axis=1)) + 1
    for first, last in zip([0, *borders], [*borders, len(order)], strict=True):
        if len(order) and ordered[first, 2]:
            yield tuple(ordered[first].tolist()), order[first:last]


def lengths_of(x: Any, o: Any) -> np.ndarray:
    """`Lengths` of each sequence, (B, 5)."""
    batch = len(x.q) if x.cu_seqlens_q is None else len(x.cu_seqlens_q) - 1
    lengths = np.empty((batch, 5), np.int64)
    for i, (a, ends, lens) in enumerate(
        ((x.q, x.cu_seqlens_q, x.q_lens), (x.k, x.cu_seqlens_k, x.kv_lens))
    ):
        lengths[:, i] = a.shape[2] if ends is None else np.diff(ends)
        lengths[:, 2 + i] = lengths[:, i] if lens is None else np.clip(lens, 0, lengths[:, i])
    lengths[:, 4] = lengths[:, 3] - lengths[:, 2]
    if x.q_offset is not None or o.q_offset is not None:
        lengths[:, 4] = o.q_offset if x.q_offset is None else x.q_offset
    return lengths


def heads_of(x: Any, o: Any, b: slice | np.ndarray, lengths: Lengths) -> Heads:
    """Views of neighbouring sequences, or copies of any."""
    m_all, n_all, m, n, place = lengths
    heads_kv = x.k.shape[1]

    def rows(a: Any, ends: Any, whole: int, length: int) -> Any:
        if ends is None:
            return a[b, :, :length]
        if not isinstance(b, slice):
            return a[0].swapaxes(0, 1)[_tokens(ends, b, length)].swapaxes(1, 2)
        a = a[0, :, ends[b.start] : ends[b.stop]]
        shape = len(a), b.stop - b.start, whole, *a.shape[2:]
        return a.reshape(shape).swapaxes(0, 1)[:, :, :length]

    def by_key(a: Any) -> Any:
        shape = len(a), heads_kv, a.shape[1] // heads_kv, *a.shape[2:]
        return a.reshape(shape)

    q, out = (by_key(rows(a, x.cu_seqlens_q, m_all, m)) for a in (x.q, x.out))
    k, v = (rows(a, x.cu_seqlens_k, n_all, n) for a in (x.k, x.v))
    lse = None if x.lse is None else by_key(rows(x.lse, x.cu_seqlens_q, m_all, m))
    mask, bias = (None if a is None else by_key(a[b, :, :m, :n]) for a in (x.mask, x.bias))
    listed = None if x.block_counts is None else by_key(listed_tiles(x, b))
    slopes = None if x.alibi_slopes is None else by_key(x.alibi_slopes[b])[..., None, None]
    sinks = None if x.sinks is None else by_key(x.sinks[None])[..., None]
    arrays = q, k, v, out, lse, mask, bias, slopes, sinks
    score = None if o.score is None else score_of(x, o.score, b)
    rule = place, o.scale, o.softcap, o.left, o.right, score, listed, o.block
    return Heads(*arrays, *rule, mask_of(x, o.mask, b, m))


def _tokens(ends: np.ndarray, b: np.ndarray, length: int) -> np.ndarray:
    """Where the first tokens of sequences lie, (sequences, length)."""
    return ends[b][:, None] + np.arange(length)
