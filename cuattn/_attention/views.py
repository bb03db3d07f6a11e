"""The arrays of a call of attention: as they are given, and as canonical views.

Canonical is (B, H, S, D), and (B, H, S) for lse: any layout, and any leading axes that the caller
left out, become strides. Ragged sequences lie end to end on S, with B = 1.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays.row_layout import ArraySpec, spec_of

INT64 = np.dtype(np.int64)
LISTS = ("block_counts", "block_indices", "block_full")  # of a block mask
Shape = tuple[int, ...]


class Arrays(NamedTuple):
    """Arrays of one call, or their specs; the fields of Operands that a caller gives."""

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
    block_counts: Any = None
    block_indices: Any = None
    block_full: Any = None


class Operands(NamedTuple):
    """Canonical arrays of one call, or their specs; strides are 0 where an array is broadcast.

    Ragged calls have ``cu_seqlens``: q, k, v, out and lse have batch 1 then and all tokens in
    their rows, everything else has the batch of the sequences.
    """

    q: Any  # (B, H, S_q, D)
    k: Any  # (B, H_kv, S_k, D)
    v: Any  # (B, H_kv, S_k, D_v)
    out: Any  # (B, H, S_q, D_v), written
    lse: Any = None  # (B, H, S_q), written
    mask: Any = None  # bool (B, H, M, N)
    bias: Any = None  # (B, H, M, N)
    alibi_slopes: Any = None  # (B, H)
    sinks: Any = None  # (H,)
    q_offset: Any = None  # (B,) int64, contiguous, as what follows
    q_lens: Any = None  # (B,)
    kv_lens: Any = None  # (B,)
    cu_seqlens_q: Any = None  # (B + 1,)
    cu_seqlens_k: Any = None  # (B + 1,)
    block_counts: Any = None  # (B, H, M') int32: of a mask of M' x N' tiles, those that are listed
    block_indices: Any = None  # (B, H, M', N') int32
    block_full: Any = None  # (B, H, M', N') bool
    score_args: tuple[Any, ...] = ()  # of a score expression, in the order of their names
    mask_args: tuple[Any, ...] = ()  # likewise, of a mask expression


class Sizes(NamedTuple):
    """What the options of a call have the shapes of."""

    batch: int  # sequences
    heads: int
    seqlen_q: int  # of one sequence, or of all where they are ragged
    seqlen_k: int


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


def specs_of(arrays: Arrays) -> Arrays:
    """Specs of the arrays of a call."""
    return Arrays(*map(spec_of, arrays))


def fractional(spec: ArraySpec) -> bool:
    """Whether elements lie at fractions of one from each other."""
    return any(
        stride % spec.dtype.itemsize and size > 1
        for size, stride in zip(spec.shape, spec.strides, strict=True)
    )


def whole_elements(xp: Any, array: Any) -> Any:
    """The array, or a copy where its elements lie at fractions of one from each other."""
    return xp.ascontiguousarray(array) if fractional(spec_of(array)) else array


def cast(given: Any, acc: np.dtype, fractional: tuple[str, ...], xp: Any) -> Any:
    """`Arrays` of a call, and whatever lies beside them, as kernels read them: `fractional` ones
    copied, small ones cast."""
    changed = {name: xp.ascontiguousarray(getattr(given, name)) for name in fractional}
    if given.alibi_slopes is not None:
        changed["alibi_slopes"] = given.alibi_slopes.astype(acc, copy=False)
    if given.sinks is not None:
        changed["sinks"] = xp.ascontiguousarray(given.sinks, acc)
    for name in ("q_offset", "q_lens", "kv_lens", "cu_seqlens_q", "cu_seqlens_k"):
        if getattr(given, name) is not None:
            changed[name] = xp.ascontiguousarray(getattr(given, name), INT64)
    for name in LISTS:
        if (array := getattr(given, name, None)) is not None:
            changed[name] = xp.ascontiguousarray(array)
    return given._replace(**changed) if changed else given


def canonical_views(
    given: Arrays, outs: tuple[Any, ...], sizes: Sizes, layout: str, xp: Any
) -> Operands:
    """Canonical views of cast arrays and of results."""
    views: dict[str, Any] = {n: array for n, array in given._asdict().items() if array is not None}
    for name in ("q", "k", "v"):
        views[name] = canonical(views[name], layout)
    for name in {"mask", "bias", "alibi_slopes"} & set(views):
        own = () if name == "alibi_slopes" else _mask_sizes(sizes, views[name])
        views[name] = xp.broadcast_to(views[name], (*sizes[:2], *own))
    for name in {*LISTS} & set(views):
        own = views["block_indices"].shape[-2:][: 1 + (name != "block_counts")]
        views[name] = xp.broadcast_to(views[name], (*sizes[:2], *own))
    for name in {"sinks", "q_offset", "q_lens", "kv_lens"} & set(views):
        views[name] = views[name].reshape(sizes.heads if name == "sinks" else sizes.batch)
    views["out"] = canonical(outs[0], layout)
    if len(outs) > 1:
        views["lse"] = outs[1][(None,) * (3 - outs[1].ndim)]
    return Operands(**views)


def canonical_specs(
    given: Arrays, outs: tuple[ArraySpec, ...], sizes: Sizes, layout: str
) -> Operands:
    """Specs of these views, of all that have strides of their own."""
    large = (("q", given.q), ("k", given.k), ("v", given.v), ("out", outs[0]))
    found = {name: canonical_spec(spec, layout) for name, spec in large}
    if len(outs) > 1:
        found["lse"] = canonical_lse(outs[1])
    for name, spec in (("mask", given.mask), ("bias", given.bias)):
        if spec is not None:
            found[name] = broadcast_spec(spec, (*sizes[:2], *_mask_sizes(sizes, spec)))
    if given.alibi_slopes is not None:
        found["alibi_slopes"] = broadcast_spec(given.alibi_slopes, sizes[:2])
    if given.block_counts is not None:
        own = given.block_indices.shape[-2:]
        found["block_counts"] = broadcast_spec(given.block_counts, (*sizes[:2], own[0]))
        found["block_indices"] = broadcast_spec(given.block_indices, (*sizes[:2], *own))
    return Operands(**found)


def canonical_spec(spec: ArraySpec, layout: str) -> ArraySpec:
    """The spec of a view (B, H, S, D)."""
    shape, strides = canonical_shape(spec.shape, layout), canonical_shape(spec.strides, layout)
    return ArraySpec(shape, strides, spec.dtype)


def canonical_lse(spec: ArraySpec) -> ArraySpec:
    """The spec of a view (B, H, S)."""
    lack = (1,) * (3 - len(spec.shape))
    return ArraySpec(lack + spec.shape, lack + spec.strides, spec.dtype)


def broadcast_spec(spec: ArraySpec, shape: Shape) -> ArraySpec:
    """What `numpy.broadcast_to` makes of an array."""
    lack = len(shape) - len(spec.shape)
    strides = (0,) * lack + tuple(
        0 if size == 1 else stride for size, stride in zip(spec.shape, spec.strides, strict=True)
    )
    return ArraySpec(shape, strides, spec.dtype)


def _mask_sizes(sizes: Sizes, mask: Any) -> Shape:
    """Queries and keys that a mask or bias has values for: its own sizes, but for those of 1."""
    own = (1, 1, *mask.shape)[-2:]
    return tuple(all_ if size == 1 else size for size, all_ in zip(own, sizes[2:], strict=True))


def strides_of(array: ArraySpec | None, ndim: int) -> tuple[int, ...]:
    """Strides in elements."""
    if array is None:
        return (0,) * ndim
    return tuple(stride // array.dtype.itemsize for stride in array.strides)


def is_widened(q: ArraySpec, out: ArraySpec) -> bool:
    """Whether the result is float32, and q has 16 bits."""
    return out.dtype.itemsize > q.dtype.itemsize


def is_vector(array: ArraySpec, chunk: int = 16) -> bool:
    """Whether every row is whole chunks of so many bytes, each on a boundary if the first is."""
    *outer, columns = zip(array.shape, array.strides, strict=True)
    return (
        columns[0] * array.dtype.itemsize % chunk == 0
        and columns[1] == array.dtype.itemsize
        and all(size <= 1 or stride % chunk == 0 for size, stride in outer)
    )
