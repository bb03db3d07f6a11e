"""The calls of attention: whether their arguments fit, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import scalars
from cuattn._arrays.checks import (
    bool_dtype,
    ends,
    ends_spec,
    floating,
    floating_or_integer,
    misaligned,
)
from cuattn._arrays.expression import Expression
from cuattn._arrays.inputs import Owner, as_array, as_arrays
from cuattn._arrays.interchange import on_host
from cuattn._arrays.outputs import as_outputs
from cuattn._arrays.row_layout import FLOAT32, FLOAT64, spec_of
from cuattn._attention import checks, request_block_mask, request_mask
from cuattn._attention.request_score import expression, named
from cuattn._attention.views import Arrays, Shape, Sizes, canonical_shape, fractional, specs_of
from cuattn._device.runtime import runtime_of


class Options(NamedTuple):
    """Numbers of one call."""

    scale: float
    softcap: float = 0.0  # 0: none
    left: int | None = None
    right: int | None = None
    q_offset: int | None = None  # None, and no array: bottom-right
    tf32: bool = False
    score: Expression | None = None
    block: tuple[int, int] | None = None  # queries and keys of a tile of a block mask
    mask: request_mask.Predicate | None = None  # an expression in the place of a mask array


class Expected(NamedTuple):
    """Dtypes and shapes of what a call returns."""

    dtype: np.dtype
    acc: np.dtype
    out_shape: Shape  # in the layout of the caller
    lse_shape: Shape
    head_dim: int
    sizes: Sizes
    fractional: tuple[str, ...]  # arrays whose elements lie at fractions of one from each other


class Call(NamedTuple):
    """One call whose arguments fit."""

    runtime: Any  # None: NumPy computes it
    arrays: Arrays
    specs: Arrays  # of the arrays
    expected: Expected
    options: Options
    layout: str
    outs: tuple[Any, ...] | None  # out, or out and lse; None: to be allocated
    return_lse: bool
    score_args: Mapping[str, Any] = MappingProxyType({})  # by the names that errors give them
    mask_args: Mapping[str, Any] = MappingProxyType({})  # likewise, of a mask expression

    @property
    def results(self) -> list[tuple[Shape, np.dtype]]:
        """Shape and dtype of each result."""
        dtype, acc, out_shape, lse_shape, *_ = self.expected
        return [(out_shape, dtype), (lse_shape, acc)][: 1 + self.return_lse]


def attention(
    required: dict[str, Any],
    optional: dict[str, Any],
    q_offset: Any,
    layout: Any,
    numbers: tuple[Any, ...],
    dtype: Any,
    return_lse: Any,
    out: Any,
    score: Any = None,
    score_args: Any = None,
    block_mask: Any = None,
) -> Call:
    """A call of `attention` or `attention_varlen`: arrays by name, and options as they were given.

    `numbers`: is_causal, window, scale, softcap and precision.
    """
    scalars.one_of("layout", layout, ("BHSD", "BSHD"))
    lists, masked, mask, block = request_block_mask.lists(block_mask, optional.get("mask"))
    indexed = named(score, score_args)
    given, offset = as_given({**required, **indexed, **masked}, {**optional, **lists}, q_offset)
    indexed, masked = ({name: given.pop(name) for name in some} for some in (indexed, masked))
    arrays = Arrays(**request_block_mask.fields_of(given))
    specs = specs_of(arrays)
    expected = expect(specs, layout)
    predicate = None
    if block is not None:
        predicate = None if mask is None else request_mask.predicate_of(mask, masked)
        request_block_mask.check(specs, predicate, expected.sizes, block)
    check_values(arrays, expected.sizes)
    options = options_of(offset, expected.head_dim, specs.q.dtype, *numbers)
    options = options._replace(score=expression(score, indexed), block=block, mask=predicate)
    expected = expected._replace(dtype=checks.result_dtype(dtype, specs.q.dtype))
    return_lse = scalars.flag("return_lse", return_lse)
    runtime = runtime_of(arrays.q)
    call = Call(
        runtime, arrays, specs, expected, options, layout, None, return_lse, indexed, masked
    )
    names = [request_block_mask.name_of(name, block is not None) for name in arrays._fields]
    inputs = [*zip(names, arrays, strict=True), *indexed.items(), *masked.items()]
    if out is not None:
        call = call._replace(outs=as_outputs(out, call.results, inputs, in_place=False))
    if runtime is not None:
        limits = runtime.limits(runtime.device(arrays.q))
        checks.capability("q", limits.compute_capability)
        check_alignment(runtime, inputs, call.outs)
    return call


def as_given(
    required: dict[str, Any], options: dict[str, Any], q_offset: Any
) -> tuple[dict[str, Any], int | None]:
    """Arrays of a call by name, and q_offset if it is one number."""
    given = {**required, **{n: array for n, array in options.items() if array is not None}}
    number, host = None, None if q_offset is None else on_host(q_offset)
    if host:
        q_offset = as_array("q_offset", q_offset)
    if host is False or (host and q_offset.ndim):
        given["q_offset"] = q_offset
    elif q_offset is not None:
        number = checks.offset(q_offset)
    return as_arrays(given), number


def accumulator(dtype: np.dtype) -> np.dtype:
    """What a result is added up in."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def options_of(
    offset: int | None,
    head_dim: int,
    dtype: np.dtype,
    is_causal: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    precision: Any,
) -> Options:
    """Numbers of a call, checked."""
    left, right = checks.window(window)
    acc, factor = accumulator(dtype), max(head_dim, 1) ** -0.5
    if scale is not None:
        factor = checks.normal(scalars.number("scale", scale), acc)
    return Options(
        scale=factor,
        softcap=checks.normal(checks.softcap(softcap), acc),
        left=left,
        right=0 if scalars.flag("is_causal", is_causal) else right,
        q_offset=offset,
        tf32=checks.precision(precision, dtype),
    )


def check_alignment(runtime: Any, inputs: list[Owner], outs: Any) -> None:
    """Check what only a device asks of the arrays' addresses."""
    outs = outs or ()
    results = [("out" if len(outs) == 1 else f"out[{i}]", one) for i, one in enumerate(outs)]
    for name, array in (*inputs, *results):
        if array is not None and runtime.address(array) % array.itemsize:
            raise misaligned(name, array)
    for name, array in results:
        if fractional(spec_of(array)):
            raise checks.fractional(name, array.strides, array.itemsize)


# ---- What comes out ----


@lru_cache(maxsize=4096)
def expect(specs: Arrays, layout: str, most: int = checks.MAX_FORWARD_DIM) -> Expected:
    """Check specs, and say what comes out. Ragged sequences are one (total, H, D).

    `most`: columns of a head.
    """
    q, k, v = specs.q, specs.k, specs.v
    varlen = specs.cu_seqlens_q is not None
    floating("q", q.dtype)
    for name, spec in (("k", k), ("v", v)):
        checks.same_dtype(name, spec.dtype, "q", q.dtype)
    ndim = len(q.shape)
    checks.dimensions("q", q.shape, layout, *((3, 3) if varlen else ()))
    batch, heads, seqlen_q, dim = q_shape = canonical_shape(q.shape, layout)
    for name, spec in (("k", k), ("v", v)):
        shape = canonical_shape(spec.shape, layout)
        checks.key_shape(name, spec.shape, shape, q.shape, q_shape)
        checks.sizes(name, shape, most)
    checks.sizes("q", q_shape, most)
    k_shape, v_shape = (canonical_shape(spec.shape, layout) for spec in (k, v))
    same = checks.same_size
    same("k", "head dimension", k.shape, k_shape[3], "q", dim)
    same("v", "number of heads", v.shape, v_shape[1], "k", k_shape[1])
    same("v", "length", v.shape, v_shape[2], "k", k_shape[2])
    if varlen:
        for name, spec in (("q", specs.cu_seqlens_q), ("k", specs.cu_seqlens_k)):
            ends_spec(f"cu_seqlens_{name}", spec.shape, spec.dtype, "sequences")
        shape = specs.cu_seqlens_q.shape
        same_shape = checks.one_of_shapes
        same_shape("cu_seqlens_k", specs.cu_seqlens_k.shape, (shape,), "that of cu_seqlens_q")
        batch = shape[0] - 1
    sizes = Sizes(batch, heads, seqlen_q, k_shape[2])
    _check_options(specs, sizes, ndim, varlen)
    out_shape = (*q.shape[:-1], v.shape[-1])
    lse_shape = (batch, heads, seqlen_q)[4 - ndim :] if not varlen else (heads, seqlen_q)
    large = zip(specs._fields[:5], specs[:5], strict=True)
    copied = tuple(name for name, spec in large if spec is not None and fractional(spec))
    return Expected(q.dtype, accumulator(q.dtype), out_shape, lse_shape, dim, sizes, copied)


def _check_options(specs: Arrays, sizes: Sizes, ndim: int, varlen: bool) -> None:
    batch, heads, _, _ = sizes
    blocked = specs.block_counts is not None
    if specs.mask is not None:
        name = request_block_mask.name_of("mask", blocked)
        bool_dtype(name, specs.mask.dtype, "what is added is bias")
    if specs.bias is not None:
        floating("bias", specs.bias.dtype)
    for name in ("mask", "bias"):
        spec = getattr(specs, name)
        if spec is not None and varlen:
            checks.mask_of_sequences(name, spec.shape, (batch, heads))
        elif spec is not None:
            name = request_block_mask.name_of(name, blocked)
            checks.mask_shape(name, spec.shape, sizes[4 - ndim :])
    shapes: tuple[Shape, ...] = ((heads,), (batch, heads))
    for name in ("alibi_slopes", "sinks"):
        spec = getattr(specs, name)
        if spec is not None:
            floating_or_integer(name, spec.dtype)
            fits = shapes if name == "alibi_slopes" else shapes[:1]
            fits += ((),) if ndim == 2 else ()
            checks.one_of_shapes(name, spec.shape, fits, "one value per head")
    for name in ("q_offset", "q_lens", "kv_lens"):
        spec = getattr(specs, name)
        if spec is not None:
            checks.integers(name, spec.dtype)
            fits = ((batch,),) if ndim == 4 or varlen else ((batch,), ())
            checks.one_of_shapes(name, spec.shape, fits, "one value per sequence")


def check_values(given: Arrays, sizes: Sizes) -> None:
    """Check the values of options that are NumPy arrays; those on a device are trusted."""
    if isinstance(given.cu_seqlens_q, np.ndarray):
        ends("cu_seqlens_q", given.cu_seqlens_q, sizes.seqlen_q, "q")
        ends("cu_seqlens_k", given.cu_seqlens_k, sizes.seqlen_k, "k")
    if isinstance(given.q_offset, np.ndarray):
        checks.offset_values(given.q_offset)
    for name, cu_seqlens, most in (
        ("q_lens", given.cu_seqlens_q, sizes.seqlen_q),
        ("kv_lens", given.cu_seqlens_k, sizes.seqlen_k),
    ):
        values = getattr(given, name)
        if isinstance(values, np.ndarray):
            checks.lengths(name, values, most if cu_seqlens is None else np.diff(cu_seqlens))
