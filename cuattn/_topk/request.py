"""The calls of selections: whether their arguments fit, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import checks, scalars
from cuattn._arrays.inputs import Owner, as_array, as_scale, as_where, placed
from cuattn._arrays.outputs import as_outputs
from cuattn._arrays.results import LogitsState, SampleState, SoftmaxState, SoftmaxTopKState
from cuattn._arrays.row_layout import FLOAT32, FLOAT64, ArraySpec, spec_of
from cuattn._device.runtime import runtime_of

INT64 = np.dtype(np.int64)
NONE: Mapping[str, Any] = MappingProxyType({})


class Operands(NamedTuple):
    """Arrays of one call, of one library and on one device."""

    x: Any
    where: Any = None
    scale: Any = None


class Request(NamedTuple):
    """One call without its data: what its plan depends on."""

    result: str  # "top_k", or a key of plan.OUTPUTS: what softmax_topk returns, "state"
    axis: int  # not negative
    k: int
    x: ArraySpec
    where: ArraySpec | None = None
    scale: ArraySpec | None = None


class Options(NamedTuple):
    """What changes nothing but numbers that the kernels are given."""

    scale: float = 1.0  # where operands have none; in top_k -1: the smallest elements
    renormalize: bool = False
    index_offset: int = 0
    wants_lse: bool = False


class Expected(NamedTuple):
    """Dtypes and shapes of what a call returns: values and indices, and one number per row."""

    dtype: np.dtype
    acc: np.dtype
    shape: tuple[int, ...]
    stat_shape: tuple[int, ...]


class Call(NamedTuple):
    """One call whose arguments have been taken in."""

    runtime: Any  # None: x is a NumPy array
    request: Request
    expected: Expected
    operands: Operands
    options: Options
    outs: Mapping[str, Any] = NONE  # what was given of the fields of results

    @property
    def fields(self) -> tuple[str, ...]:
        """What it returns, in this order."""
        return fields(self.request, self.options.wants_lse)

    @property
    def factor(self) -> Any:
        """The scale of either kind."""
        return self.options.scale if self.operands.scale is None else self.operands.scale


class MergeCall(NamedTuple):
    """The merge of two states that fit each other."""

    runtime: Any  # None: NumPy computes it, by `cuattn.reference`
    kind: type  # SoftmaxState, LogitsState, SoftmaxTopKState or SampleState
    arrays: list[Any]  # fields of one state of that kind, and then of the other
    outs: tuple[Any, ...]  # results that are given: all or none


# ---- The functions ----


def top_k(x: Any, k: Any, axis: Any, mode: Any, sorted: Any, out: Any) -> Call:
    """A call of `top_k`."""
    x = as_array("x", x)
    owner, runtime = ("x", x), runtime_of(x)
    x, axis, _ = one_axis(runtime, x, axis, None)
    scalars.one_of("mode", mode, ("largest", "smallest"))
    scalars.flag("sorted", sorted)
    request = Request("top_k", axis, _count(k, x, axis), spec_of(x))
    options, expected = Options(1.0 if mode == "largest" else -1.0), expect(request)
    outs = _outs(out, request, options, [owner])
    return Call(runtime, request, expected, Operands(x), options, outs)


def softmax_topk(
    x: Any,
    k: Any,
    axis: Any,
    scale: Any,
    where: Any,
    renormalize: Any,
    output: Any,
    out: Any,
    return_lse: Any,
) -> Call:
    """A call of `softmax_topk`."""
    x = as_array("x", x)
    owner, runtime = ("x", x), runtime_of(x)
    factors, factor = as_scale(scale, owner)
    where = as_where(where, owner)
    inputs = [owner, ("scale", factors), ("where", where)]
    x, axis, where, factors = one_axis(runtime, x, axis, where, factors)
    scalars.one_of("output", output, ("prob", "log_prob", "logit"))
    request = Request(
        output,
        axis,
        _count(k, x, axis),
        spec_of(x),
        where=spec_of(where),
        scale=spec_of(factors),
    )
    options = Options(
        factor,
        scalars.flag("renormalize", renormalize),
        wants_lse=scalars.flag("return_lse", return_lse),
    )
    expected = expect(request)
    outs = _outs(out, request, options, inputs)
    if runtime is not None and where is not None and not where.ndim:
        where = placed(where, runtime, x)
    return Call(runtime, request, expected, Operands(x, where, factors), options, outs)


def softmax_topk_state(x: Any, k: Any, axis: Any, scale: Any, index_offset: Any, out: Any) -> Call:
    """A call of `softmax_topk_state`: a k beyond the row fills up what it lacks."""
    x = as_array("x", x)
    owner, runtime = ("x", x), runtime_of(x)
    factors, factor = as_scale(scale, owner)
    inputs = [owner, ("scale", factors)]
    x, axis, _, factors = one_axis(runtime, x, axis, None, factors)
    rows = max(x.size // max(x.shape[axis], 1), 1)
    why = ", so that the result can be addressed"
    k = scalars.count("k", k, scalars.MAX_INDEX // (8 * rows), why)
    why = ", so that every index is an int64"
    largest = scalars.MAX_INDEX - x.shape[axis]
    offset = scalars.count("index_offset", index_offset, largest, why)
    request = Request("state", axis, k, spec_of(x), scale=spec_of(factors))
    operands, options = Operands(x, scale=factors), Options(factor, index_offset=offset)
    outs = _outs(out, request, options, inputs)
    return Call(runtime, request, expect(request), operands, options, outs)


def merge(a: Any, b: Any, out: Any) -> MergeCall:
    """A call of `merge`."""
    others = (SoftmaxTopKState, SampleState, LogitsState)
    kind: Any = next((one for one in others if isinstance(a, one)), SoftmaxState)
    checks.state("a", a, kind)
    checks.state("b", b, kind)
    m: Any = as_array("a.m", a.m)
    owner, shape, dtype, runtime = ("a.m", m), m.shape, m.dtype, runtime_of(m)
    checks.state_dtype("a.m", dtype)
    inputs: list[Owner] = []
    expected: list[tuple[tuple[int, ...], np.dtype]] = []
    selected: tuple[int, ...] = ()
    for side, state in (("a", a), ("b", b)):
        for field, value in zip(state._fields, state, strict=True):
            name = f"{side}.{field}"
            array = as_array(name, value, owner)
            like: Any = ("a.m", shape, dtype)
            if name == "a.values":
                selected = (*shape, *array.shape[-1:])
            if field in ("values", "logits", "indices"):
                own = {"indices": INT64}.get(field, dtype)
                if field == "values" and kind is SampleState:
                    own = FLOAT64
                like = ("a.m with one more axis", selected, own)
            if (array.shape, array.dtype) != like[1:]:
                checks.same_shape_and_dtype(name, array.shape, array.dtype, *like)
            inputs.append((name, array))
            expected.append(like[1:])
    outs: tuple[Any, ...] = ()
    if out is not None:
        # A place of a selection may come from any one of the lists, which must stay as they are.
        specs = expected[: len(kind._fields)]
        outs = as_outputs(out, specs, inputs, in_place=kind in (SoftmaxState, LogitsState))
    if runtime is not None:
        for name, array in (*inputs, *((f"out[{i}]", one) for i, one in enumerate(outs))):
            if runtime.address(array) % array.itemsize:
                raise checks.misaligned(name, array)
    return MergeCall(runtime, kind, [array for _, array in inputs], outs)


def one_axis(runtime: Any, x: Any, axis: Any, where: Any, *per_row: Any) -> tuple[Any, ...]:
    """x, one axis of it, `where`, and arrays of numbers per row; axis None is that of all elements,
    in C order."""
    axis = None if axis is None else scalars.one_axis(axis, x.ndim)
    if axis is not None and x.ndim:
        return (x, axis, where, *per_row)
    if where is not None and where.ndim:
        if x.ndim:
            checks.broadcastable("where", where.shape, x.shape, "the shape of x")
            where = (np if runtime is None else runtime.xp).broadcast_to(where, x.shape)
        where = where.reshape(-1)
    ones = (
        one.reshape(1) if one is not None and one.size == 1 and one.ndim <= x.ndim else one
        for one in per_row
    )
    return (x.reshape(-1), 0, where, *ones)


def _count(k: Any, x: Any, axis: int) -> int:
    """k of a selection from the whole row."""
    return scalars.count("k", k, x.shape[axis], ", the length of the axis")


def _outs(out: Any, request: Request, options: Options, inputs: list[Owner]) -> Mapping[str, Any]:
    """The arrays of `out` by their fields."""
    if out is None:
        return NONE
    names, expected = fields(request, options.wants_lse), expect(request)
    stat, found = (expected.stat_shape, expected.acc), (expected.shape, expected.dtype)
    specs = {"out": found, "indices": (expected.shape, INT64), "stat": stat, "stat_l": stat}
    arrays = as_outputs(out, [specs[name] for name in names], inputs, in_place=False)
    return dict(zip(names, arrays, strict=True))


# ---- What comes out ----


def fields(request: Request, wants_lse: bool) -> tuple[str, ...]:
    """What a call returns: values are "out", lse or m "stat", and l "stat_l"."""
    if request.result == "state":
        return "stat", "stat_l", "out", "indices"
    return ("out", "indices", "stat")[: 2 + wants_lse]


@lru_cache(maxsize=4096)
def expect(request: Request) -> Expected:
    """Check specs and options, and say what comes out."""
    x, axis = request.x, request.axis
    if request.result == "top_k":
        checks.floating_or_integer("x", x.dtype)
    else:
        checks.floating("x", x.dtype)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    if request.scale is not None:
        target = (*before, 1, *after)
        checks.broadcastable("scale", request.scale.shape, target, "one value per row")
    if request.where is not None:
        checks.bool_dtype("where", request.where.dtype, "compare with 0")
        checks.broadcastable("where", request.where.shape, x.shape, "the shape of x")
    acc = FLOAT64 if x.dtype == FLOAT64 else FLOAT32
    if request.result == "state":  # where the selected elements lie on the last axis
        return Expected(acc, acc, (*before, *after, request.k), before + after)
    return Expected(x.dtype, acc, (*before, request.k, *after), before + after)
