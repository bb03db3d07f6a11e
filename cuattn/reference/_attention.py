"""Attention in float64.

A part of `cuattn.reference`, whose rules hold here. Inside, arrays are canonical: q and out
(B, H, S_q, ·), k and v (B, H_kv, S_k, ·), lse (B, H, S_q).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cuattn._arrays.results import BlockMask, MaskExpression
from cuattn.reference._heads import (
    cut,
    dense,
    each_head,
    nothing,
    of_sequence,
    segments,
    shift,
)
from cuattn.reference._numerics import Option, quiet, result, wide
from cuattn.reference._score import leading_axes, mask_of, score_of

Window = tuple[int | None, int | None]


@quiet
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    /,
    *,
    is_causal: bool = False,
    q_offset: Option = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mask: Option = None,
    bias: Option = None,
    alibi_slopes: Option = None,
    sinks: Option = None,
    score: Any = None,
    score_args: Mapping[str, Any] | None = None,
    q_lens: Option = None,
    kv_lens: Option = None,
    layout: str = "BHSD",
    precision: str | None = None,
    dtype: DTypeLike | None = None,
    return_lse: bool = False,
    out: Any = None,
    block_mask: BlockMask | None = None,
) -> Any:
    """``softmax(scale * q @ k.T) @ v`` of each head; with ``return_lse=True`` also the lse.

    Every score is kept at once, `precision` changes nothing. `score` may also be a function of s,
    b, h, q and k.
    """
    ndim = np.ndim(q)
    if block_mask is not None:
        own = block_mask.mask
        mask = mask_of(*own) if isinstance(own, MaskExpression) else own
    queries, keys, values = (canonical(np.asarray(a), layout) for a in (q, k, v))
    numbers = numbers_of(queries, scale, softcap, window, is_causal)
    full, full_lse = nothing((*queries.shape[:-1], values.shape[-1]), wide(queries[:0]).dtype)
    arrays = queries, keys, values, mask, bias, alibi_slopes, sinks, q_offset, q_lens, kv_lens
    score = score_of(score, score_args) if isinstance(score, str) else score
    for b, h, head in each_head(*arrays, *numbers, score=score):
        full[b, h, : len(head.q)], full_lse[b, h, : len(head.q)] = dense(head)
    return in_layout(full, full_lse, layout, ndim, return_lse, out, dtype)


@quiet
def block_mask(
    mask: ArrayLike | str,
    q_len: Any = None,
    k_len: Any = None,
    /,
    *,
    args: Mapping[str, Any] | None = None,
    batch: int | None = None,
    heads: int | None = None,
    like: Any = None,
    block: tuple[int, int] = (128, 128),
) -> BlockMask:
    """The tiles of a mask that are not empty, row by row, and which of them hide nothing.

    Of an expression all elements, which are the result's `mask`; `like` changes nothing.
    """
    if isinstance(mask, str):
        mask = mask_of(mask, args, (*leading_axes(mask, batch, heads), q_len, k_len))
    given = np.asarray(mask)
    shape = (*given.shape[:-2], given.shape[-2] if q_len is None else q_len)
    given = np.broadcast_to(given, (*shape, given.shape[-1] if k_len is None else k_len))
    starts = [range(0, size, step) for size, step in zip(given.shape[-2:], block, strict=True)]
    lists = (*given.shape[:-2], *map(len, starts))
    counts, indices = np.zeros(lists[:-1], np.int32), np.full(lists, -1, np.int32)
    full = np.zeros(lists, bool)
    for row in np.ndindex(lists[:-1]):
        for j, first in enumerate(starts[1]):
            i = starts[0][row[-1]]
            tile = given[row[:-1]][i : i + block[0], first : first + block[1]]
            if tile.any():
                place = counts[row]
                indices[row][place], full[row][place], counts[row] = j, tile.all(), place + 1
    return BlockMask(counts, indices, full, given, block)


@quiet
def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    /,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    is_causal: bool = False,
    q_offset: Option = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mask: Option = None,
    bias: Option = None,
    alibi_slopes: Option = None,
    sinks: Option = None,
    score: Any = None,
    score_args: Mapping[str, Any] | None = None,
    q_lens: Option = None,
    kv_lens: Option = None,
    precision: str | None = None,
    dtype: DTypeLike | None = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """`attention` of each sequence; sequences are laid end to end along axis 0 of q, k and v."""
    queries, keys, values = (np.asarray(a) for a in (q, k, v))
    total, heads, _ = queries.shape
    full, full_lse = nothing((heads, total, values.shape[-1]), wide(queries[:0]).dtype)
    slopes = None if alibi_slopes is None else np.asarray(alibi_slopes)
    score = score_of(score, score_args) if isinstance(score, str) else score
    for b, (i, j) in enumerate(segments(np.asarray(cu_seqlens_q), np.asarray(cu_seqlens_k))):
        sizes = i.stop - i.start, j.stop - j.start
        one, full_lse[:, i] = attention(
            queries[i],
            keys[j],
            values[j],
            is_causal=is_causal,
            q_offset=of_sequence(q_offset, b),
            window=window,
            scale=scale,
            softcap=softcap,
            mask=cut(mask, b, *sizes, False),
            bias=cut(bias, b, *sizes, 0),
            alibi_slopes=slopes if slopes is None or slopes.ndim == 1 else of_sequence(slopes, b),
            sinks=sinks,
            score=score and partial(of_batch, score, b),
            q_lens=of_sequence(q_lens, b),
            kv_lens=of_sequence(kv_lens, b),
            layout="BSHD",
            return_lse=True,
        )
        full[:, i] = one.swapaxes(0, 1)
    return in_layout(full[None], full_lse[None], "BSHD", 3, return_lse, out, dtype)


def of_batch(score: Any, b: int, s: Any, _: int, h: int, q: Any, k: Any) -> Any:
    """What `score` makes of a sequence that is attended to alone."""
    return score(s, b, h, q, k)


# -- merging -------------------------------------------------------------------------------------


@quiet
def merge(outs: list[Any], lses: list[Any], out: Any, lse: Any) -> None:
    """Merge results over parts of the keys: outs (B, H, S, D_v), lses (B, H, S)."""
    parts = [wide(part) for part in lses]
    m = np.max([np.full(lse.shape, -np.inf), *parts], axis=0)
    weights = [np.exp(part - shift(m)) for part in parts]
    l = sum(weights, np.zeros(lse.shape))  # noqa: E741
    total = np.zeros(out.shape, l.dtype)
    for part, weight, o in zip(parts, weights, outs, strict=True):
        total += np.where((part == -np.inf)[..., None], 0, weight[..., None] * wide(o))
    out[...] = np.where(l[..., None] == 0, 0, total / l[..., None])
    lse[...] = np.where(l == 0, -np.inf, m + np.log(l))


@quiet
def merge_attention_states(
    outs: ArrayLike,
    lses: ArrayLike,
    /,
    *,
    axis: int = 0,
    layout: str = "BHSD",
    out: Any = None,
) -> tuple[Any, Any]:
    """out and lse of queries whose keys have been split: parts weigh as ``exp(lse)``."""
    axis = axis % np.ndim(outs)
    parts, part_lses = (np.moveaxis(wide(a), axis, 0) for a in (outs, lses))
    ndim = parts.ndim - 1
    shape = canonical(np.empty(parts.shape[1:]), layout).shape
    full, full_lse = nothing(shape, parts.dtype)
    lead = (None,) * (4 - ndim)
    merge([canonical(o, layout) for o in parts], [one[lead] for one in part_lses], full, full_lse)
    return in_layout(full, full_lse, layout, ndim, True, out)


@quiet
def merge_attention(
    out_a: ArrayLike,
    lse_a: ArrayLike,
    out_b: ArrayLike,
    lse_b: ArrayLike,
    /,
    *,
    layout: str = "BHSD",
    out: Any = None,
) -> tuple[Any, Any]:
    """`merge_attention_states` of two."""
    outs, lses = (np.stack([wide(a), wide(b)]) for a, b in ((out_a, out_b), (lse_a, lse_b)))
    return merge_attention_states(outs, lses, layout=layout, out=out)


# -- options and layouts --------------------------------------------------------------------------


def numbers_of(
    q: np.ndarray,
    scale: float | None,
    softcap: float | None,
    window: Window | None,
    is_causal: bool,
) -> tuple[Any, ...]:
    """scale, softcap, left and right of a call."""
    left, right = (None, None) if window is None else window
    right = 0 if is_causal else right  # a window's is not negative
    scale = 1 / max(q.shape[-1], 1) ** 0.5 if scale is None else scale
    return scale, softcap or 0.0, left, right


def canonical(array: Any, layout: str) -> Any:
    """A view (B, H, S, D) of what lies in `layout`, with or without its leading axes."""
    array = array.swapaxes(-3, -2) if layout == "BSHD" and array.ndim > 2 else array
    return array[(None,) * (4 - array.ndim)]


def uncanonical(full: Any, layout: str, ndim: int) -> Any:
    """A canonical array (B, H, S, D) in `layout`, and with as many axes as the caller's."""
    y = full[(0,) * (4 - ndim)]
    return y.swapaxes(-3, -2) if layout == "BSHD" and ndim > 2 else y


def in_layout(
    full: Any, full_lse: Any, layout: str, ndim: int, return_lse: bool, out: Any, dtype: Any = None
) -> Any:
    """Canonical results as the caller wants them."""
    y = uncanonical(full, layout, ndim)
    if not return_lse:
        return result(y, dtype, out)
    out, lse = (None, None) if out is None else out
    return result(y, dtype, out), result(full_lse[(0,) * (4 - ndim)], out=lse)
