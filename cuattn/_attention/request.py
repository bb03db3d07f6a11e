"""Attention's arguments: whether they fit, what comes out, and canonical views of them.

Canonical is (B, H, S, D), and (B, H, S) for lse: any layout, and any leading axes that the caller
left out, become strides. Ragged sequences lie end to end on S, with B = 1.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import checks as _check
from cuattn._arrays.interchange import on_host
from cuattn._arrays.row_layout import Meta
from cuattn._attention import checks as _check_attention
from cuattn._softmax import request as _call

INT64 = np.dtype(np.int64)
Shape = tuple[int, ...]


class Arrays(NamedTuple):
    """Arrays of one call, or their metas; the fields of AttentionOperands that a caller gives."""

    q: Any
    k: Any
    v: Any
    mask: Any = None
    bias: Any = None
    alibi_slopes: Any = None
    sinks: Any = None
    q_offset: Any = None
    q_lens: Any = None
    kv_lens: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None


class Results(NamedTuple):
    """Dtypes and shapes of a call."""

    dtype: np.dtype
    acc: np.dtype
    out_shape: Shape  # in the layout of the caller
    lse_shape: Shape
    heads: int
    head_dim: int
    batch: int  # of the options: sequences
    seqlen_q: int  # of one sequence, or of all where they are ragged
    seqlen_k: int
    fractional: tuple[str, ...]  # arrays whose elements lie at fractions of one from each other


def enter(given: dict[str, Any]) -> dict[str, Any]:
    """All arrays of a call, of one library and on one device; the first two must be there."""
    name, value = next(iter(given.items()))
    host = on_host(value)
    for other, array in given.items():  # before any enters, as that touches its device
        if host is not None and array is not value and on_host(array) is (not host):
            raise _check.no_mix(other, array, name, value)
    first = (name, _call.enter(name, value))
    return {name: first[1]} | {n: _call.enter(n, a, first) for n, a in given.items() if n != name}


def arrays(
    required: dict[str, Any], options: dict[str, Any], q_offset: Any
) -> tuple[Arrays, int | None]:
    """Arrays of a call, and q_offset if it is one number."""
    given = {**required, **{n: array for n, array in options.items() if array is not None}}
    number, host = None, None if q_offset is None else on_host(q_offset)
    if host:
        q_offset = _call.enter("q_offset", q_offset)
    if host is False or (host and q_offset.ndim):
        given["q_offset"] = q_offset
    elif q_offset is not None:
        number = _check_attention.offset(q_offset)
    return Arrays(**enter(given)), number


def metas(given: Arrays) -> Arrays:
    """Metas of the arrays of a call."""
    return Arrays(*map(_call.meta, given))


def canonical(array: Any, layout: str) -> Any:
    """The view (B, H, S, D)."""
    ndim = array.ndim
    if layout == "BSHD" and ndim > 2:
        array = array.swapaxes(-3, -2)
    return array if ndim == 4 else array[(None,) * (4 - ndim)]


@lru_cache(maxsize=4096)
def canonical_shape(shape: Shape, layout: str) -> Shape:
    """The shape of the view (B, H, S, D)."""
    if layout == "BSHD" and len(shape) > 2:
        shape = (*shape[:-3], shape[-2], shape[-3], shape[-1])
    return (1,) * (4 - len(shape)) + shape


@lru_cache(maxsize=4096)
def results(metas: Arrays, layout: str) -> Results:
    """Check metas, and say what comes out. Ragged sequences are one (total, H, D)."""
    q, k, v = metas.q, metas.k, metas.v
    varlen = metas.cu_seqlens_q is not None
    _check.floating("q", q.dtype)
    for name, meta in (("k", k), ("v", v)):
        _check_attention.same_dtype(name, meta.dtype, "q", q.dtype)
    ndim = len(q.shape)
    _check_attention.dimensions("q", q.shape, layout, *((3, 3) if varlen else ()))
    batch, heads, seqlen_q, dim = q_shape = canonical_shape(q.shape, layout)
    for name, meta in (("k", k), ("v", v)):
        shape = canonical_shape(meta.shape, layout)
        _check_attention.key_shape(name, meta.shape, shape, q.shape, q_shape)
        _check_attention.sizes(name, shape)
    _check_attention.sizes("q", q_shape)
    k_shape, v_shape = (canonical_shape(meta.shape, layout) for meta in (k, v))
    same = _check_attention.same_size
    same("k", "head dimension", k.shape, k_shape[3], "q", dim)
    same("v", "number of heads", v.shape, v_shape[1], "k", k_shape[1])
    same("v", "length", v.shape, v_shape[2], "k", k_shape[2])
    if varlen:
        for name, meta in (("q", metas.cu_seqlens_q), ("k", metas.cu_seqlens_k)):
            _check_attention.offsets_dtype(f"cu_seqlens_{name}", meta.dtype, meta.shape)
        shape = metas.cu_seqlens_q.shape
        same_shape = _check_attention.one_of_shapes
        same_shape("cu_seqlens_k", metas.cu_seqlens_k.shape, (shape,), "that of cu_seqlens_q")
        batch = shape[0] - 1
    _check_options(metas, (batch, heads, seqlen_q, k_shape[2]), ndim, varlen)
    out_shape = (*q.shape[:-1], v.shape[-1])
    lse_shape = (batch, heads, seqlen_q)[4 - ndim :] if not varlen else (heads, seqlen_q)
    acc = _call.FLOAT64 if q.dtype == _call.FLOAT64 else _call.FLOAT32
    large = zip(metas._fields[:5], metas[:5], strict=True)
    fractional = tuple(name for name, meta in large if meta is not None and _fractional(meta))
    sizes = heads, dim, batch, seqlen_q, k_shape[2]
    return Results(q.dtype, acc, out_shape, lse_shape, *sizes, fractional)


def _check_options(metas: Arrays, sizes: Shape, ndim: int, varlen: bool) -> None:
    batch, heads, *_ = sizes
    if metas.mask is not None:
        _check_attention.mask_dtype(metas.mask.dtype)
    if metas.bias is not None:
        _check.floating("bias", metas.bias.dtype)
    for name in ("mask", "bias"):
        meta = getattr(metas, name)
        if meta is not None and varlen:
            _check_attention.mask_of_sequences(name, meta.shape, (batch, heads))
        elif meta is not None:
            _check_attention.mask_shape(name, meta.shape, sizes[4 - ndim :])
    shapes: tuple[Shape, ...] = ((heads,), (batch, heads))
    for name in ("alibi_slopes", "sinks"):
        meta = getattr(metas, name)
        if meta is not None:
            _check.floating_or_integer(name, meta.dtype)
            fits = shapes if name == "alibi_slopes" else shapes[:1]
            fits += ((),) if ndim == 2 else ()
            _check_attention.one_of_shapes(name, meta.shape, fits, "one value a head")
    for name in ("q_offset", "q_lens", "kv_lens"):
        meta = getattr(metas, name)
        if meta is not None:
            _check_attention.integers(name, meta.dtype)
            fits = ((batch,),) if ndim == 4 or varlen else ((batch,), ())
            _check_attention.one_of_shapes(name, meta.shape, fits, "one value a sequence")


def check_values(given: Arrays, made: Results) -> None:
    """Check the values of options that are NumPy arrays; those on a device are trusted."""
    if isinstance(given.cu_seqlens_q, np.ndarray):
        _check_attention.offsets("cu_seqlens_q", given.cu_seqlens_q, made.seqlen_q, "q")
        _check_attention.offsets("cu_seqlens_k", given.cu_seqlens_k, made.seqlen_k, "k")
    if isinstance(given.q_offset, np.ndarray):
        _check_attention.offset_values(given.q_offset)
    for name, cu_seqlens, most in (
        ("q_lens", given.cu_seqlens_q, made.seqlen_q),
        ("kv_lens", given.cu_seqlens_k, made.seqlen_k),
    ):
        values = getattr(given, name)
        if isinstance(values, np.ndarray):
            _check_attention.lengths(
                name, values, most if cu_seqlens is None else np.diff(cu_seqlens)
            )


def check_out(
    out: Any, expected: list[tuple[Shape, np.dtype]], inputs: list[tuple[str, Any]]
) -> tuple[Any, ...]:
    """The arrays of `out`, fit for the results and apart from the inputs."""
    given = _call.check_out(out, expected, inputs)
    extents = [(name, _call._extent(array)) for name, array in inputs if array is not None]
    for i, array in enumerate(given):
        low, high = _call._extent(array)
        for name, (other_low, other_high) in extents:
            if low < other_high and other_low < high:
                raise _check_attention.apart("out" if len(given) == 1 else f"out[{i}]", name)
    return given


def check_alignment(runtime: Any, inputs: list[tuple[str, Any]], outs: Any) -> None:
    """Check what only a device asks of the arrays' addresses."""
    names = ("out",) if outs is None or len(outs) == 1 else ("out[0]", "out[1]")
    for name, array in (*inputs, *zip(names, outs or (), strict=False)):
        if array is not None and runtime.address(array) % array.itemsize:
            raise _check.misaligned(name, array)
    for name, array in zip(names, outs or (), strict=False):
        if _fractional(_call.meta(array)):
            raise _check_attention.fractional(name, array.strides, array.itemsize)


def cast(given: Arrays, made: Results, xp: Any) -> Arrays:
    """Arrays of a checked call as kernels read them: whole elements apart, small ones cast."""
    changed = {name: xp.ascontiguousarray(getattr(given, name)) for name in made.fractional}
    if given.alibi_slopes is not None:
        changed["alibi_slopes"] = given.alibi_slopes.astype(made.acc, copy=False)
    if given.sinks is not None:
        changed["sinks"] = xp.ascontiguousarray(given.sinks, made.acc)
    for name in ("q_offset", "q_lens", "kv_lens", "cu_seqlens_q", "cu_seqlens_k"):
        if getattr(given, name) is not None:
            changed[name] = xp.ascontiguousarray(getattr(given, name), INT64)
    return given._replace(**changed) if changed else given


def canonical_strides(
    metas: Arrays, outs: tuple[Meta, ...], made: Results, layout: str
) -> dict[str, Meta]:
    """What canonical views of cast arrays and results would have, by name."""
    found = {}
    for name, meta in (("q", metas.q), ("k", metas.k), ("v", metas.v), ("out", outs[0])):
        shape, strides = canonical_shape(meta.shape, layout), canonical_shape(meta.strides, layout)
        found[name] = Meta(shape, strides, meta.dtype)
    if len(outs) > 1:
        lack = (1,) * (3 - len(outs[1].shape))
        found["lse"] = Meta(lack + outs[1].shape, lack + outs[1].strides, outs[1].dtype)
    rows = (made.batch, made.heads)
    for name, meta in (("mask", metas.mask), ("bias", metas.bias)):
        if meta is not None:
            found[name] = _broadcast(meta, (*rows, *_mask_sizes(made, meta)))
    if metas.alibi_slopes is not None:
        found["alibi_slopes"] = _broadcast(metas.alibi_slopes, rows)
    return found


def _broadcast(meta: Meta, shape: Shape) -> Meta:
    """What `numpy.broadcast_to` makes of an array."""
    lack = len(shape) - len(meta.shape)
    strides = (0,) * lack + tuple(
        0 if size == 1 else stride for size, stride in zip(meta.shape, meta.strides, strict=True)
    )
    return Meta(shape, strides, meta.dtype)


def _mask_sizes(made: Results, mask: Any) -> Shape:
    """Queries and keys that a mask or bias has values for: its own sizes, but for those of 1."""
    own = (1, 1, *mask.shape)[-2:]
    sizes = zip(own, (made.seqlen_q, made.seqlen_k), strict=True)
    return tuple(all_ if size == 1 else size for size, all_ in sizes)


def operands(given: Arrays, made: Results, layout: str, xp: Any) -> dict[str, Any]:
    """Canonical views of cast arrays."""
    given = cast(given, made, xp)
    views: dict[str, Any] = {n: array for n, array in given._asdict().items() if array is not None}
    rows = (made.batch, made.heads)
    for name in ("q", "k", "v"):
        views[name] = canonical(views[name], layout)
    for name in {"mask", "bias", "alibi_slopes"} & set(views):
        sizes = () if name == "alibi_slopes" else _mask_sizes(made, views[name])
        views[name] = xp.broadcast_to(views[name], (*rows, *sizes))
    for name in {"sinks", "q_offset", "q_lens", "kv_lens"} & set(views):
        views[name] = views[name].reshape(rows[name == "sinks"])
    return views


def whole_elements(xp: Any, array: Any) -> Any:
    """The array, or a copy where elements lie at fractions of one from each other."""
    return xp.ascontiguousarray(array) if _fractional(_call.meta(array)) else array


def _fractional(meta: Meta) -> bool:
    return any(
        stride % meta.dtype.itemsize and size > 1
        for size, stride in zip(meta.shape, meta.strides, strict=True)
    )


@lru_cache(maxsize=4096)
def merge_results(
    outs: tuple[tuple[str, Meta], ...], lses: tuple[tuple[str, Meta], ...], layout: str
) -> tuple[tuple[Shape, np.dtype], tuple[Shape, np.dtype]]:
    """Check metas of parts, and say what comes out: shape and dtype of out and lse."""
    (name, first), *others = outs
    _check.floating(name, first.dtype)
    _check_attention.dimensions(name, first.shape, layout)
    for other, meta in others:
        _check.same_shape_and_dtype(other, meta.shape, meta.dtype, name, first.shape, first.dtype)
    acc = _call.FLOAT64 if first.dtype == _call.FLOAT64 else _call.FLOAT32
    shape = canonical_shape(first.shape, layout)[4 - len(first.shape) : 3]
    for other, meta in lses:
        _check_attention.lse(other, meta.dtype, acc, meta.shape, shape, name)
    return (first.shape, first.dtype), (shape, acc)
