"""The specs of calls over a KV cache: whether they fit, and what comes out."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cuattn._arrays import scalars
from cuattn._arrays.checks import bool_dtype, floating, floating_or_integer
from cuattn._arrays.row_layout import ArraySpec
from cuattn._attention import checks, request
from cuattn._attention import checks_kvcache as own_checks
from cuattn._attention.views import Shape, canonical_shape
from cuattn._attention.views_kvcache import Arrays, Sizes, cache_sizes


class Expected(NamedTuple):
    """Dtypes, shapes and sizes of a call."""

    dtype: np.dtype
    acc: np.dtype
    out_shape: Shape  # in the layout of the caller
    lse_shape: Shape
    sizes: Sizes


@lru_cache(maxsize=4096)
def expect(specs: Arrays, layout: str, value_dim: int | None) -> Expected:
    """Check specs of `attention_kvcache`, and say what comes out."""
    q = specs.q
    floating("q", q.dtype)
    checks.dimensions("q", q.shape, layout, 3 if specs.page_table is None else 4)
    batch, heads, rows, dim = q_shape = canonical_shape(q.shape, layout)
    most = checks.MAX_HEAD_DIM if value_dim is None else own_checks.MAX_SHARED_DIM
    checks.sizes("q", q_shape, most)
    for name, spec in (("k_cache", specs.k_cache), ("v_cache", specs.v_cache)):
        if spec is not None:
            shape = canonical_shape(spec.shape, layout)
            shape = shape if specs.page_table is None else (batch, *shape[1:])
            checks.key_shape(name, spec.shape, shape, q.shape, q_shape)
    checks.same_size("k_cache", "head dimension", specs.k_cache.shape, specs.k_cache.shape[-1],
                     "q", dim)  # fmt: skip
    if value_dim is not None:
        scalars.count("value_dim", value_dim, dim, ", the head dimension of k_cache")
    sizes = _cache(specs, layout, batch, most)._replace(heads=heads, q_rows=rows)
    own_checks.rows(heads, sizes.kv_heads, rows)
    sizes = sizes if value_dim is None else sizes._replace(value_dim=value_dim)
    _check_options(specs, sizes, len(q.shape))
    out_shape, lse_shape = (*q.shape[:-1], sizes.value_dim), (batch, heads, rows)
    acc = request.accumulator(q.dtype)
    return Expected(q.dtype, acc, out_shape, lse_shape[4 - len(q.shape) :], sizes)


@lru_cache(maxsize=4096)
def expect_append(specs: Arrays, layout: str) -> Sizes:
    """Check specs of `kv_append`; its sizes."""
    paged, ndim = specs.page_table is not None, len(specs.k_cache.shape)
    checks.dimensions("k_cache", specs.k_cache.shape, layout, 4 if paged else 3)
    batch = canonical_shape(specs.k_cache.shape, layout)[0]
    if paged:
        own_checks.page_table(specs.page_table.shape, None, 0)
        batch = specs.page_table.shape[0]
    sizes = _cache(specs, layout, batch, own_checks.MAX_SHARED_DIM)
    _check_lengths(specs, batch, ndim)
    return sizes


def _cache(specs: Arrays, layout: str, batch: int, most: int) -> Sizes:
    """Check the specs of caches, of what is appended to them, and of their scales; the sizes."""
    k, v, table = specs.k_cache, specs.v_cache, specs.page_table
    eight = own_checks.cache_dtype("k_cache", k.dtype, specs.q and specs.q.dtype)
    pages, heads, page_size, dim = cache_sizes(k, layout)
    value_dim = 0
    checks.sizes("k_cache", (pages, heads, page_size, dim), most)
    if v is not None:
        checks.same_dtype("v_cache", v.dtype, "k_cache", k.dtype)
        wanted = *k.shape[:-1], "D_v"
        own_checks.shape_of("v_cache", v.shape, wanted)
        value_dim = v.shape[-1]
        checks.sizes("v_cache", (pages, heads, page_size, value_dim), most)
    if table is not None:
        own_checks.int32_or_int64("page_table", table.dtype)
        own_checks.page_table(table.shape, batch, page_size)
    new_rows = _new_rows(specs, layout, (batch, heads), (dim, value_dim), eight)
    for name, cache in (("k_scale", k), ("v_scale", v)):
        scale = getattr(specs, name)
        if scale is not None:
            tokens = cache.shape[:-1]
            own_checks.scale_array(name, scale.shape, scale.dtype, heads, tokens)
    capacity = page_size * (1 if table is None else table.shape[1])
    return Sizes(batch, 0, heads, 0, new_rows, pages, page_size, capacity, dim, value_dim)


def _new_rows(
    specs: Arrays, layout: str, lead: tuple[int, int], dims: tuple[int, int], eight: bool
) -> int:
    """Check the specs of keys and values to append; how many there are of a sequence."""
    rows: int | str = "S_new"
    for name, spec, dim in (("k_new", specs.k_new, dims[0]), ("v_new", specs.v_new, dims[1])):
        if spec is None:
            continue
        if specs.q is not None:
            checks.same_dtype(name, spec.dtype, "q", specs.q.dtype)
        elif not eight:
            checks.same_dtype(name, spec.dtype, "k_cache", specs.k_cache.dtype)
        elif name == "k_new":
            floating(name, spec.dtype)
        else:
            checks.same_dtype(name, spec.dtype, "k_new", specs.k_new.dtype)
        batch, heads = lead
        wanted = (batch, heads, rows, dim) if layout == "BHSD" else (batch, rows, heads, dim)
        own_checks.shape_of(name, spec.shape, wanted[4 - len(specs.k_cache.shape) :])
        shape = canonical_shape(spec.shape, layout)
        checks.sizes(name, shape, own_checks.MAX_SHARED_DIM)
        rows = shape[2]
    return rows if isinstance(rows, int) else 0


def _check_options(specs: Arrays, sizes: Sizes, ndim: int) -> None:
    batch, heads = sizes.batch, sizes.heads
    if specs.mask is not None:
        bool_dtype("mask", specs.mask.dtype, "cast it with mask.astype(bool)")
        own_checks.tree_mask(specs.mask.shape, (batch, heads, sizes.q_rows)[4 - ndim :])
    shapes: tuple[Shape, ...] = ((heads,), (batch, heads))
    for name in ("alibi_slopes", "sinks"):
        spec = getattr(specs, name)
        if spec is not None:
            floating_or_integer(name, spec.dtype)
            fits = shapes if name == "alibi_slopes" else shapes[:1]
            checks.one_of_shapes(name, spec.shape, fits, "one value per head")
    _check_lengths(specs, batch, ndim)


def _check_lengths(specs: Arrays, batch: int, ndim: int) -> None:
    for name in ("q_offset", "q_lens", "kv_lens", "new_lens"):
        spec: ArraySpec | None = getattr(specs, name)
        if spec is not None:
            own_checks.int32_or_int64(name, spec.dtype)
            fits: tuple[Shape, ...] = ((batch,),) if ndim == 4 else ((batch,), ())
            checks.one_of_shapes(name, spec.shape, fits, "one value per sequence")
