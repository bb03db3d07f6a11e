"""Attention over a KV cache in float64.

A part of `cuattn.reference`, whose rules hold here. Inside, arrays are canonical: a cache
(pages, H_kv, page size, ·), of which a dense one has a page for each sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cuattn.reference._attention import Window, attention, canonical, in_layout, of_batch
from cuattn.reference._heads import nothing, of_sequence
from cuattn.reference._numerics import Option, quiet, wide
from cuattn.reference._score import score_of

RANGE = {"float8_e4m3fn": (-448.0, 448.0), "int8": (-128.0, 127.0)}


@quiet
def attention_kvcache(
    q: ArrayLike,
    k_cache: Any,
    v_cache: Any,
    /,
    *,
    kv_lens: Option = None,
    page_table: Option = None,
    k_new: Option = None,
    v_new: Option = None,
    value_dim: int | None = None,
    k_scale: Option = None,
    v_scale: Option = None,
    split_size: int | str | None = "auto",
    is_causal: bool = False,
    q_offset: Option = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mask: Option = None,
    alibi_slopes: Option = None,
    sinks: Option = None,
    score: Any = None,
    score_args: Mapping[str, Any] | None = None,
    q_lens: Option = None,
    layout: str = "BHSD",
    precision: str | None = None,
    dtype: DTypeLike | None = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """`attention` of each sequence over the keys that it has in a cache, the new ones among them.

    `split_size` and `precision` change nothing.
    """
    return _attended(
        q,
        (),
        k_cache,
        v_cache,
        kv_lens=kv_lens,
        page_table=page_table,
        k_new=k_new,
        v_new=v_new,
        value_dim=value_dim,
        k_scale=k_scale,
        v_scale=v_scale,
        is_causal=is_causal,
        q_offset=q_offset,
        window=window,
        scale=scale,
        softcap=softcap,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        score=score_of(score, score_args) if isinstance(score, str) else score,
        q_lens=q_lens,
        layout=layout,
        dtype=dtype,
        return_lse=return_lse,
        out=out,
    )


@quiet
def attention_cascade(
    q: ArrayLike,
    prefixes: Any,
    k_cache: Any,
    v_cache: Any,
    /,
    *,
    kv_lens: Option = None,
    page_table: Option = None,
    k_new: Option = None,
    v_new: Option = None,
    value_dim: int | None = None,
    k_scale: Option = None,
    v_scale: Option = None,
    split_size: int | str | None = "auto",
    is_causal: bool = False,
    q_offset: Option = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mask: Option = None,
    alibi_slopes: Option = None,
    sinks: Option = None,
    q_lens: Option = None,
    layout: str = "BHSD",
    precision: str | None = None,
    dtype: DTypeLike | None = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """`attention_kvcache` of sequences that begin with the keys of the prefixes, side by side."""
    return _attended(
        q,
        prefixes,
        k_cache,
        v_cache,
        kv_lens=kv_lens,
        page_table=page_table,
        k_new=k_new,
        v_new=v_new,
        value_dim=value_dim,
        k_scale=k_scale,
        v_scale=v_scale,
        is_causal=is_causal,
        q_offset=q_offset,
        window=window,
        scale=scale,
        softcap=softcap,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        q_lens=q_lens,
        layout=layout,
        dtype=dtype,
        return_lse=return_lse,
        out=out,
    )


def _attended(
    q: ArrayLike,
    prefixes: Any,
    k_cache: Any,
    v_cache: Any,
    *,
    kv_lens: Option,
    page_table: Option,
    k_new: Option,
    v_new: Option,
    value_dim: int | None,
    k_scale: Option,
    v_scale: Option,
    mask: Option,
    alibi_slopes: Option,
    q_offset: Option,
    score: Any = None,
    q_lens: Option,
    layout: str,
    dtype: DTypeLike | None,
    return_lse: bool,
    out: Any,
    **options: Any,
) -> Any:
    queries, new = canonical(np.asarray(q), layout), 0
    before = [
        [canonical(np.asarray(a), layout)[0] for a in (k, k[..., :value_dim] if v is None else v)]
        for k, v in prefixes
    ]
    first = np.ones((*queries.shape[1:3], sum(k.shape[1] for k, _ in before)), bool)
    if k_new is not None:
        how = {"kv_lens": kv_lens, "page_table": page_table, "new_lens": q_lens}
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        kv_append(k_cache, v_cache, k_new, v_new, **how, **scales, layout=layout)
        new = canonical(np.asarray(k_new), layout).shape[2]
    keys = _numbers(k_cache, k_scale, layout)
    values = keys[..., :value_dim] if v_cache is None else _numbers(v_cache, v_scale, layout)
    batch, heads, rows, _ = queries.shape
    capacity = keys.shape[2] * (1 if page_table is None else np.shape(page_table)[1])
    old = np.broadcast_to(capacity if kv_lens is None else kv_lens, batch)
    lens = np.broadcast_to(rows if q_lens is None else q_lens, batch)
    ends = np.clip(old, 0, capacity) + (new if q_lens is None else np.clip(lens, 0, new))
    slopes = None if alibi_slopes is None else np.broadcast_to(alibi_slopes, (batch, heads))
    tree = np.broadcast_to(True, (1, 1)) if mask is None else np.asarray(mask)
    tree = np.broadcast_to(tree, (batch, heads, rows, tree.shape[-1]))
    full, full_lse = nothing((batch, heads, rows, values.shape[-1]), wide(queries[:0]).dtype)
    for b in range(batch):
        n = min(int(ends[b]), capacity)
        page, row, exists = _places(keys, page_table, b, np.arange(n))
        seen = np.broadcast_to(exists, (heads, rows, n)).copy()
        last = min(n, tree.shape[-1])
        seen[..., n - last :] &= tree[b, ..., tree.shape[-1] - last :]
        k, v = (np.zeros((a.shape[1], n, a.shape[3]), a.dtype) for a in (keys, values))
        k[:, exists], v[:, exists] = (a[page, :, row].swapaxes(0, 1) for a in (keys, values))
        full[b], full_lse[b] = attention(
            queries[b],
            np.concatenate([*(pair[0] for pair in before), k], axis=1),
            np.concatenate([*(pair[1] for pair in before), v], axis=1),
            q_offset=of_sequence(q_offset, b),
            mask=np.concatenate([first, seen], axis=-1),
            alibi_slopes=None if slopes is None else slopes[b],
            score=score and partial(of_batch, score, b),
            q_lens=lens[b : b + 1],
            return_lse=True,
            **options,
        )
    return in_layout(full, full_lse, layout, np.ndim(q), return_lse, out, dtype)


@quiet
def kv_append(
    k_cache: Any,
    v_cache: Any,
    k_new: Option,
    v_new: Option,
    /,
    *,
    kv_lens: Option,
    page_table: Option = None,
    new_lens: Option = None,
    k_scale: Any = None,
    v_scale: Any = None,
    layout: str = "BHSD",
) -> None:
    """Write new keys and values behind the first `kv_lens` ones; what has no place is dropped."""
    for cache, new, scale in ((k_cache, k_new, k_scale), (v_cache, v_new, v_scale)):
        if cache is None:
            continue
        pages, rows = canonical(cache, layout), canonical(np.asarray(new), layout)
        scales, own = _scales(scale, cache, layout), np.ndim(scale) == np.ndim(cache) - 1 > 0
        lens = np.broadcast_to(0 if kv_lens is None else kv_lens, len(rows))
        counts = np.broadcast_to(rows.shape[2] if new_lens is None else new_lens, len(rows))
        for b, x in enumerate(rows):
            x = x[:, : max(0, int(counts[b]))].swapaxes(0, 1)
            page, row, exists = _places(pages, page_table, b, int(lens[b]) + np.arange(len(x)))
            x = x[exists]
            if cache.dtype.name in RANGE and own:
                scales[page, :, row] = abs(wide(x)).max(-1, initial=0) / RANGE[cache.dtype.name][1]
            pages[page, :, row] = _quantised(x, scales[page, :, row], cache.dtype)


def _places(cache: Any, page_table: Any, b: int, j: Any) -> tuple[Any, Any, Any]:
    """Page and row of those keys j of sequence b that have any, and which these are."""
    size = cache.shape[2]
    page, row = np.full_like(j, b), j
    if page_table is not None:
        entries = np.append(np.asarray(page_table)[b], -1)
        page = entries[np.minimum(j // max(size, 1), len(entries) - 1)]
        row = j % max(size, 1)
    exists = (page >= 0) & (page < len(cache)) & (row < size)
    return page[exists], row[exists], exists


def _scales(scale: Any, cache: Any, layout: str) -> Any:
    """The scale of each token and head, (pages, H_kv, page size): a view where it is one."""
    shape = canonical(cache, layout).shape[:3]
    if scale is None or np.ndim(scale) < 2:
        scale = np.asarray(1 if scale is None else scale)
        return np.broadcast_to(scale[:, None] if scale.ndim else scale, shape)
    return canonical(scale[..., None], layout)[..., 0]


def _numbers(cache: Any, scale: Any, layout: str) -> Any:
    """What a cache stands for."""
    pages = canonical(cache, layout)
    if cache.dtype.name not in RANGE:
        return pages
    return wide(pages.astype(np.float64)) * _scales(scale, cache, layout)[..., None]


def _quantised(x: Any, scale: Any, dtype: np.dtype) -> Any:
    """x over its scale, as the nearest number of 8 bits; 0 where that is 0."""
    if dtype.name not in RANGE:
        return x
    scale = wide(scale)[..., None]
    x = np.clip(np.where(scale == 0, 0, wide(x) / scale), *RANGE[dtype.name])
    if dtype.name == "int8":
        return np.nan_to_num(np.rint(x)).astype(dtype)
    step = np.ldexp(1.0, np.maximum(np.frexp(x)[1], -5) - 4)  # from 2^-6 on 4 digits
    return (np.rint(x / step) * step).astype(dtype)
