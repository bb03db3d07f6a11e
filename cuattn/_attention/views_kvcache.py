"""The arrays of a call over a KV cache: as they are given, and as canonical views.

Canonical caches are (pages, H_kv, page size, D): a dense one has a page for each sequence. What the
caller left out, and any layout, become strides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cuattn._arrays.row_layout import ArraySpec
from cuattn._attention.views import (
    Shape,
    broadcast_spec,
    canonical,
    canonical_shape,
    canonical_spec,
)


class Arrays(NamedTuple):
    """Arrays of one call, or their specs; None: not given."""

    q: Any = None  # None: of kv_append
    k_cache: Any = None
    v_cache: Any = None  # None: the first columns of k_cache
    k_new: Any = None
    v_new: Any = None
    mask: Any = None
    alibi_slopes: Any = None
    sinks: Any = None
    q_offset: Any = None
    q_lens: Any = None
    kv_lens: Any = None
    new_lens: Any = None
    page_table: Any = None
    k_scale: Any = None
    v_scale: Any = None


class Sizes(NamedTuple):
    """Of one call."""

    batch: int
    heads: int  # of q; 0 where there is none
    kv_heads: int
    q_rows: int
    new_rows: int  # keys that come with the call
    pages: int
    page_size: int
    capacity: int  # keys that a sequence may have
    head_dim: int
    value_dim: int


def cache_sizes(k: Any, layout: str) -> tuple[int, int, int, int]:
    """Pages, heads, page size and head dimension of the spec of a cache."""
    pages, heads, page_size, dim = canonical_shape(k.shape, layout)
    return pages, heads, page_size, dim


def is_per_token(scale: Any, cache: Any) -> bool:
    """Whether each token and head of a cache has a scale of its own: arrays, or their specs."""
    return scale is not None and 0 < len(scale.shape) == len(cache.shape) - 1


def canonical_views(given: Arrays, sizes: Sizes, layout: str, xp: Any) -> Arrays:
    """Canonical views of the arrays of a call.

    A mask is (B or 1, H or 1, S_q or 1, M), alibi_slopes are (B, H), scales (pages, H_kv, page
    size), with strides of 0 where one is for several. v_cache is there in any case.
    """
    views = {n: canonical(a, layout) for n, a in zip(given._fields[:5], given, strict=False)
             if a is not None}  # fmt: skip
    if given.v_cache is None:
        views["v_cache"] = views["k_cache"][..., : sizes.value_dim]
    if given.mask is not None:
        views["mask"] = given.mask[(None,) * (4 - given.mask.ndim)]
    if given.alibi_slopes is not None:
        views["alibi_slopes"] = xp.broadcast_to(given.alibi_slopes, (sizes.batch, sizes.heads))
    for name in ("q_offset", "q_lens", "kv_lens", "new_lens"):
        if (array := getattr(given, name)) is not None:
            views[name] = array if array.ndim else array[None]
    for name in ("k_scale", "v_scale"):
        if (array := getattr(given, name)) is not None:
            views[name] = _scales(array, given.k_cache, sizes, layout, xp)
    return given._replace(**views)


def _scales(scale: Any, cache: Any, sizes: Sizes, layout: str, xp: Any) -> Any:
    shape: Shape = (sizes.pages, sizes.kv_heads, sizes.page_size)
    if not is_per_token(scale, cache):
        return xp.broadcast_to(scale[:, None] if scale.ndim else scale, shape)
    if layout == "BSHD":
        scale = scale.swapaxes(-1, -2)
    return scale if scale.ndim == 3 else scale[None]


def canonical_specs(given: Arrays, sizes: Sizes, layout: str) -> Arrays:
    """Specs of these views; v_new, too, is there wherever k_new is."""
    views = {n: canonical_spec(a, layout) for n, a in zip(given._fields[:5], given, strict=False)
             if a is not None}  # fmt: skip
    for values, keys in (("v_cache", "k_cache"), ("v_new", "k_new")):
        if given.v_cache is None and keys in views:
            own = views[keys]
            views[values] = own._replace(shape=(*own.shape[:3], sizes.value_dim))
    if given.mask is not None:
        shape = (1,) * (4 - len(given.mask.shape)) + given.mask.shape
        views["mask"] = broadcast_spec(given.mask, shape)
    if given.alibi_slopes is not None:
        views["alibi_slopes"] = broadcast_spec(given.alibi_slopes, (sizes.batch, sizes.heads))
    for name in ("q_offset", "q_lens", "kv_lens", "new_lens"):
        if (spec := getattr(given, name)) is not None:
            views[name] = broadcast_spec(spec, (sizes.batch,))
    for name in ("k_scale", "v_scale"):
        if (spec := getattr(given, name)) is not None:
            views[name] = _scale_spec(spec, given.k_cache, sizes, layout)
    return given._replace(**views)


def _scale_spec(scale: ArraySpec, cache: ArraySpec, sizes: Sizes, layout: str) -> ArraySpec:
    shape, strides = (sizes.pages, sizes.kv_heads, sizes.page_size), scale.strides
    if not is_per_token(scale, cache):
        return ArraySpec(shape, (0, *(strides or (0,)), 0), scale.dtype)
    if layout == "BSHD":
        strides = (*strides[:-2], strides[-1], strides[-2])
    return ArraySpec(shape, (0,) * (3 - len(strides)) + strides, scale.dtype)


def wide_bits(specs: Arrays, names: tuple[str, ...]) -> int:
    """Bit i: the array called names[i] is of int64."""
    found = (getattr(specs, name) for name in names)
    return sum(1 << i for i, a in enumerate(found) if a is not None and a.dtype.itemsize == 8)
