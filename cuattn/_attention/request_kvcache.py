"""The calls over a KV cache: whether their arguments fit, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import scalars
from cuattn._arrays.checks import out_array, read_only
from cuattn._arrays.inputs import Owner, as_array, as_arrays
from cuattn._arrays.interchange import is_read_only, on_host
from cuattn._arrays.outputs import as_outputs, extent
from cuattn._arrays.row_layout import spec_of
from cuattn._attention import checks, request
from cuattn._attention import checks_kvcache as own_checks
from cuattn._attention.request_kvcache_specs import Expected, expect, expect_append
from cuattn._attention.request_score import expression, named
from cuattn._attention.views import Shape, fractional
from cuattn._attention.views_kvcache import Arrays, Sizes, is_per_token
from cuattn._device.runtime import runtime_of

FLOAT32 = np.finfo(np.float32)


class Options(NamedTuple):
    """Numbers of one call."""

    scores: request.Options
    split_size: int | str | None
    k_scale: float = 1.0  # 1 where the scale is an array
    v_scale: float = 1.0


class Append(NamedTuple):
    """One call whose arguments fit, of what writes into a cache."""

    runtime: Any  # None: NumPy computes it
    arrays: Arrays
    specs: Arrays  # of the arrays
    sizes: Sizes
    k_scale: float  # 1 where the scale is an array
    v_scale: float
    layout: str

    @property
    def acc(self) -> np.dtype:
        """What new numbers are divided by their scales in: float32 where all are numbers of it."""
        tiny, largest = float(FLOAT32.tiny), float(FLOAT32.max)
        within = all(tiny <= scale <= largest for scale in (self.k_scale, self.v_scale))
        return request.accumulator(self.specs.k_new.dtype) if within else np.dtype(np.float64)


class Call(NamedTuple):
    """One call of `attention_kvcache` whose arguments fit."""

    runtime: Any
    arrays: Arrays
    specs: Arrays
    expected: Expected
    options: Options
    layout: str
    outs: tuple[Any, ...] | None  # out, or out and lse; None: to be allocated
    return_lse: bool
    score_args: Mapping[str, Any] = MappingProxyType({})  # by the names that errors give them

    @property
    def results(self) -> list[tuple[Shape, np.dtype]]:
        """Shape and dtype of each result."""
        dtype, acc, out_shape, lse_shape, _ = self.expected
        return [(out_shape, dtype), (lse_shape, acc)][: 1 + self.return_lse]

    @property
    def append(self) -> Append | None:
        """What writes its new keys, of which a sequence has as many as queries, if it has any."""
        arrays, specs = (a._replace(new_lens=a.q_lens) for a in (self.arrays, self.specs))
        if arrays.k_new is None:
            return None
        scales = self.options.k_scale, self.options.v_scale
        return Append(self.runtime, arrays, specs, self.expected.sizes, *scales, self.layout)


def attention_kvcache(
    required: dict[str, Any],
    optional: dict[str, Any],
    scales: dict[str, Any],
    value_dim: Any,
    q_offset: Any,
    split_size: Any,
    layout: Any,
    numbers: tuple[Any, ...],
    dtype: Any,
    return_lse: Any,
    out: Any,
    score: Any = None,
    score_args: Any = None,
) -> Call:
    """A call: arrays by name, and options as they were given.

    `numbers`: is_causal, window, scale, softcap and precision.
    """
    scalars.one_of("layout", layout, ("BHSD", "BSHD"))
    value_dim = None if value_dim is None else scalars.integer("value_dim", value_dim)
    required = _values(required, optional, scales, value_dim is not None)
    if optional["k_new"] is not None:
        own_checks.together("kv_lens", optional["kv_lens"] is not None, "k_new", True)
    factors, scale_arrays = _scales(scales)
    indexed = named(score, score_args)
    optional = {**optional, **scale_arrays}
    given, offset = request.as_given({**required, **indexed}, optional, q_offset)
    indexed = {name: given.pop(name) for name in indexed}
    arrays = Arrays(**given)
    specs = Arrays(*map(spec_of, arrays))
    expected = expect(specs, layout, value_dim)
    _check_scales(scales, arrays)
    check_values(arrays, expected.sizes)
    scores = request.options_of(offset, expected.sizes.head_dim, specs.q.dtype, *numbers)
    scores = scores._replace(score=expression(score, indexed))
    expected = expected._replace(dtype=checks.result_dtype(dtype, specs.q.dtype))
    options = Options(scores, own_checks.split_size(split_size), *factors)
    return_lse = scalars.flag("return_lse", return_lse)
    runtime = runtime_of(arrays.q)
    call = Call(runtime, arrays, specs, expected, options, layout, None, return_lse, indexed)
    inputs = [*zip(arrays._fields, arrays, strict=True), *indexed.items()]
    if out is not None:
        call = call._replace(outs=as_outputs(out, call.results, inputs, in_place=False))
    if arrays.k_new is not None:
        _check_written(arrays, {**required, **scales}, inputs)
    if runtime is not None:
        limits = runtime.limits(runtime.device(arrays.q))
        checks.capability("q", limits.compute_capability)
        _check_addresses(runtime, inputs, call.outs)
    return call


def kv_append(
    required: dict[str, Any], optional: dict[str, Any], scales: dict[str, Any], layout: Any
) -> Append:
    """A call of `kv_append`: arrays by name."""
    scalars.one_of("layout", layout, ("BHSD", "BSHD"))
    shared = required["v_cache"] is None and required["v_new"] is None
    if shared:
        required = {n: array for n, array in required.items() if n[0] != "v"}
        if scales["v_scale"] is not None:
            raise own_checks.two_values("v_scale")
    factors, scale_arrays = _scales(scales)
    optional = {n: array for n, array in optional.items() if array is not None}
    arrays = Arrays(**as_arrays({**required, **optional, **scale_arrays}))
    specs = Arrays(*map(spec_of, arrays))
    sizes = expect_append(specs, layout)
    _check_scales(scales, arrays)
    check_values(arrays, sizes)
    inputs = list(zip(arrays._fields, arrays, strict=True))
    _check_written(arrays, {**required, **scales}, inputs)
    runtime = runtime_of(arrays.k_cache)
    if runtime is not None:
        _check_addresses(runtime, inputs, None)
    return Append(runtime, arrays, specs, sizes, *factors, layout)


def _values(
    required: dict[str, Any], optional: dict[str, Any], scales: dict[str, Any], shared: bool
) -> dict[str, Any]:
    """The required arrays, without v_cache where it is `shared`: the first columns of k_cache."""
    if not shared:
        if required["v_cache"] is None:
            raise own_checks.no_values()
        new = [optional[name] is not None for name in ("v_new", "k_new")]
        own_checks.together("v_new", new[0], "k_new", new[1])
        return required
    for name, array in {**required, **optional, **scales}.items():
        if name in ("v_cache", "v_new", "v_scale") and array is not None:
            raise own_checks.two_values(name)
    return {name: array for name, array in required.items() if name != "v_cache"}


def _scales(scales: dict[str, Any]) -> tuple[tuple[float, float], dict[str, Any]]:
    """k_scale and v_scale: numbers, 1 where there is none, and those that are arrays."""
    numbers, arrays = {"k_scale": 1.0, "v_scale": 1.0}, {}
    for name, value in scales.items():
        host = None if value is None else on_host(value)
        if host:
            value = as_array(name, value)
        if host is False or (host and value.ndim):
            arrays[name] = value
        elif value is not None:
            numbers[name] = own_checks.scale(name, value)
    return (numbers["k_scale"], numbers["v_scale"]), arrays


def _check_scales(scales: dict[str, Any], arrays: Arrays) -> None:
    """Only numbers of 8 bits have a scale."""
    for name, value in scales.items():
        if value is not None and arrays.k_cache.dtype.name not in own_checks.EIGHT_BITS:
            raise own_checks.no_scale(name, f"{name[0]}_cache", arrays.k_cache.dtype)


def _check_written(arrays: Arrays, given: dict[str, Any], inputs: list[Owner]) -> None:
    """Check what is written to, and that nothing else of the call lies there."""
    written = {"k_cache": arrays.k_cache, "v_cache": arrays.v_cache}
    for name, cache in list(written.items()):
        scale = getattr(arrays, f"{name[0]}_scale")
        if cache is not None and is_per_token(scale, cache):
            written[f"{name[0]}_scale"] = scale
    for name, array in written.items():
        if array is None:
            continue
        if array is not given[name] and is_read_only(given[name]):
            raise read_only(name)
        out_array(name, array, array.shape, array.dtype)
        low, high = extent(array)
        for other, read in inputs:
            if read is not None and other[2:] not in ("cache", "scale"):
                first, last = extent(read)
                if first < high and low < last:
                    raise own_checks.overlaps(other, name)


def _check_addresses(runtime: Any, inputs: list[Owner], outs: Any) -> None:
    """Check what only a device asks of addresses and strides; nothing here is copied."""
    request.check_alignment(runtime, inputs, outs)
    for name, array in inputs:
        if array is not None and fractional(spec_of(array)):
            raise checks.fractional(name, array.strides, array.itemsize)


def check_values(given: Arrays, sizes: Sizes) -> None:
    """Check the values of lengths that are NumPy arrays; those on a device are trusted."""
    new: Any = sizes.new_rows
    for name, most in (("q_lens", sizes.q_rows), ("new_lens", sizes.new_rows)):
        values = getattr(given, name)
        if isinstance(values, np.ndarray):
            checks.lengths(name, values, most)
            new = np.minimum(values, sizes.new_rows)
    if isinstance(given.kv_lens, np.ndarray):
        checks.lengths("kv_lens", given.kv_lens, sizes.capacity - new)
    if isinstance(given.q_offset, np.ndarray):
        checks.offset_values(given.q_offset)
