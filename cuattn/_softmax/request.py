"""The calls of the softmax functions: whether their arguments fit, and what comes out."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import checks, scalars
from cuattn._arrays.inputs import (
    Owner,
    as_array,
    as_arrays,
    as_number_or_array,
    as_scale,
    as_where,
    placed,
)
from cuattn._arrays.outputs import as_outputs, rounded
from cuattn._arrays.results import LogitsState, SoftmaxState, SoftmaxTopKState
from cuattn._arrays.row_layout import FLOAT32, FLOAT64, ArraySpec, spec_of
from cuattn._device.runtime import runtime_of


class Operands(NamedTuple):
    """Arrays of one call, of one library and on one device."""

    x: Any
    y: Any = None
    where: Any = None
    weight: Any = None
    labels: Any = None
    lse: Any = None
    grad: Any = None
    scale: Any = None
    offsets: Any = None
    m: Any = None
    l: Any = None  # noqa: E741


# What users call the fields of Operands and results: of a call, of a gradient's, with two results.
NAMES = {
    "x": "x",
    "y": "y",
    "where": "where",
    "weight": "b",
    "labels": "labels",
    "lse": "lse",
    "grad": "grad",
    "scale": "scale",
    "offsets": "cu_seqlens",
    "m": "state[0]",
    "l": "state[1]",
    "out": "out",
    "stat": "out",
}
NAMES_OF_GRADIENT = NAMES | {"x": "grad"}
NAMES_OF_STATE = NAMES | {
    name: f"out[{i}]" for i, name in enumerate(("stat", "stat_l", "stat_t", "stat_logit"))
}
NAMES_OF_TWO = NAMES | {"out": "out[0]", "stat": "out[1]"}


class Request(NamedTuple):
    """One call without its data: what its plan depends on."""

    result: str  # a key of problem.RESULTS or, of a gradient, "grad", "log_grad", "loss_grad"
    axes: tuple[int, ...]  # sorted, not negative
    x: ArraySpec
    y: ArraySpec | None = None
    where: ArraySpec | None = None
    weight: ArraySpec | None = None
    labels: ArraySpec | None = None  # of rows: one element of each
    lse: ArraySpec | None = None  # of rows whose loss has a gradient; `grad`: that of the loss
    grad: ArraySpec | None = None
    scale: ArraySpec | None = None
    offsets: ArraySpec | None = None
    m: ArraySpec | None = None  # of the whole rows that x is a part of
    l: ArraySpec | None = None  # noqa: E741
    dtype: np.dtype | None = None  # of the result, if it was given
    keepdims: bool = False
    in_part: bool = False  # a label may be in another part of its row


class Expected(NamedTuple):
    """Dtypes and shapes of what a call returns: `stat` is one number per row (lse or state)."""

    dtype: np.dtype
    acc: np.dtype
    stat_dtype: np.dtype
    row_shape: tuple[int, ...]  # with reduced axes of length 1
    stat_shape: tuple[int, ...]


class Call(NamedTuple):
    """One call whose arguments have been taken in."""

    runtime: Any  # None: NumPy computes it, by `cuattn.reference`
    request: Request
    operands: Operands
    scale: float = 1.0  # where operands have none
    out: Any = None
    stat: Any = None  # as out
    wants_stat: bool = False
    stat_l: Any = None  # given where stat is, of a state; or the lse beside a loss
    stat_t: Any = None
    stat_logit: Any = None
    grad: float = 1.0  # where operands have none
    ignore_index: int = 0
    index_offset: int = 0

    @property
    def factor(self) -> Any:
        """The scale of either kind, for a reference."""
        return self.scale if self.operands.scale is None else self.operands.scale


# ---- The functions ----


def transform(
    result: str,
    x: Any,
    axis: Any,
    scale: Any,
    where: Any,
    dtype: Any,
    out: Any,
    return_lse: Any,
    state: Any,
) -> Call:
    """A call of `softmax` ("prob") or `log_softmax` ("log_prob")."""
    x = as_array("x", x)
    return_lse = scalars.flag("return_lse", return_lse)
    owner = ("x", x)
    factors, factor = (None, 1.0) if scale is None else as_scale(scale, owner)
    if where is not None:
        where = as_where(where, owner)
    m = l = None  # noqa: E741
    whole: list[Owner] = []
    if state is not None:
        checks.state("state", state, SoftmaxState, SoftmaxTopKState, LogitsState)
        m, l = as_array("state.m", state.m, owner), as_array("state.l", state.l, owner)  # noqa: E741
        whole = [("state.m", m), ("state.l", l)]
    request = Request(
        "prob_lse" if return_lse else result,
        scalars.axes(axis, x.ndim),
        spec_of(x),
        where=None if where is None else spec_of(where),
        scale=None if factors is None else spec_of(factors),
        m=None if m is None else spec_of(m),
        l=None if l is None else spec_of(l),
        dtype=None if dtype is None else scalars.float_dtype(dtype),
    )
    y = lse = None
    if out is not None:
        expected = expect(request)
        shapes = [(x.shape, expected.dtype), (expected.stat_shape, expected.stat_dtype)][
            : 1 + return_lse
        ]
        inputs = [owner, ("scale", factors), ("where", where)]
        y, lse = (*as_outputs(out, shapes, inputs, kept=whole), None)[:2]
    runtime = runtime_of(x)
    where = placed_where(where, runtime, x, request)
    operands = Operands(x, where=where, scale=factors, m=m, l=l)
    return Call(runtime, request, operands, factor, y, lse, return_lse)


def gradient(result: str, grad: Any, y: Any, axis: Any, scale: Any, where: Any, out: Any) -> Call:
    """A call of `softmax_backward` ("grad") or `log_softmax_backward` ("log_grad")."""
    grad, y = as_arrays({"grad": grad, "y": y}).values()
    owner = ("grad", grad)
    factors, factor = (None, 1.0) if scale is None else as_scale(scale, owner)
    if where is not None:
        where = as_where(where, owner)
    request = Request(
        result,
        scalars.axes(axis, grad.ndim, "grad"),
        spec_of(grad),
        spec_of(y),
        where=spec_of(where),
        scale=spec_of(factors),
    )
    if out is not None:
        expect(request)
        inputs = [owner, ("y", y), ("scale", factors), ("where", where)]
        (out,) = as_outputs(out, [(grad.shape, grad.dtype)], inputs)
    runtime = runtime_of(grad)
    where = placed_where(where, runtime, grad, request)
    operands = Operands(grad, y, where=where, scale=factors)
    return Call(runtime, request, operands, factor, out)


def reduction(x: Any, axis: Any, b: Any, where: Any, keepdims: Any, dtype: Any, out: Any) -> Call:
    """A call of `logsumexp`; on NumPy arrays a weight may be a float."""
    x = as_array("x", x)
    owner = ("x", x)
    weight = None if b is None else as_number_or_array("b", b, owner)
    weak = isinstance(weight, float)  # a number of Python leaves the dtype to x
    where = as_where(where, owner)
    request = Request(
        "lse",
        scalars.axes(axis, x.ndim),
        spec_of(x),
        where=spec_of(where),
        weight=None if weak else spec_of(weight),
        dtype=None if dtype is None else scalars.float_dtype(dtype),
        keepdims=scalars.flag("keepdims", keepdims),
    )
    expected = expect(request)
    if out is not None:
        inputs = [owner, ("where", where), ("b", None if weak else weight)]
        (out,) = as_outputs(out, [(expected.stat_shape, expected.stat_dtype)], inputs)
    runtime = runtime_of(x)
    if runtime is not None:
        if weak:
            weight = rounded(weight, expected.acc)
        if weight is not None and not weight.ndim:
            weight = placed(weight, runtime, x)
            request = request._replace(weight=spec_of(weight), dtype=expected.dtype)
        where = placed_where(where, runtime, x, request)
    return Call(runtime, request, Operands(x, where=where, weight=weight), stat=out)


def state(x: Any, axis: Any, scale: Any, out: Any) -> Call:
    """A call of `softmax_state`."""
    x = as_array("x", x)
    owner = ("x", x)
    factors, factor = as_scale(scale, owner)
    request = Request("state", scalars.axes(axis, x.ndim), spec_of(x), scale=spec_of(factors))
    m = l = None  # noqa: E741
    if out is not None:
        expected = expect(request)
        shapes = [(expected.stat_shape, expected.stat_dtype)] * 2
        m, l = as_outputs(out, shapes, [owner, ("scale", factors)])  # noqa: E741
    operands = Operands(x, scale=factors)
    return Call(runtime_of(x), request, operands, factor, stat=m, stat_l=l)


def placed_where(where: Any, runtime: Any, x: Any, request: Request) -> Any:
    """`where`, on the device of x; errors of the request win over what that allocates."""
    if runtime is None or where is None or where.ndim:
        return where
    expect(request)
    return placed(where, runtime, x)


# ---- What comes out ----


@lru_cache(maxsize=4096)
def expect(request: Request) -> Expected:
    """Check specs and options, and say what comes out."""
    x, name = request.x, "x"
    if request.y is not None:
        name = "grad"
        checks.floating("grad", x.dtype)
        checks.same_shape_and_dtype("y", request.y.shape, request.y.dtype, "grad", x.shape, x.dtype)
    elif request.result == "loss_grad":
        checks.floating("x", x.dtype)
    else:
        checks.floating_or_integer("x", x.dtype)
    weight = None if request.weight is None else request.weight.dtype
    dtype = checks.result_dtype(request.dtype, x.dtype, weight)
    row_shape = tuple(1 if d in request.axes else size for d, size in enumerate(x.shape))
    if request.offsets is not None:
        row_shape = (request.offsets.shape[0] - 1, *x.shape[1:])
    if request.scale is not None:
        checks.broadcastable("scale", request.scale.shape, row_shape, "one value per row")
    if request.where is not None:
        checks.bool_dtype("where", request.where.dtype, "compare with 0")
        checks.broadcastable("where", request.where.shape, x.shape, f"the shape of {name}")
    if request.weight is not None:
        checks.broadcastable("b", request.weight.shape, x.shape, "the shape of x")
    acc = FLOAT64 if dtype == FLOAT64 else FLOAT32
    stat_shape = row_shape
    if not request.keepdims:
        stat_shape = tuple(size for d, size in enumerate(row_shape) if d not in request.axes)
    if request.labels is not None:
        checks.integer("labels", request.labels.dtype)
        checks.row_shape("labels", request.labels.shape, stat_shape)
    if request.lse is not None:
        checks.state_dtype("lse", request.lse.dtype)
        checks.row_shape("lse", request.lse.shape, stat_shape)
    if request.grad is not None:
        checks.broadcastable("grad", request.grad.shape, stat_shape, "the shape of the loss")
    if request.m is not None and request.l is not None:
        m, l = request.m, request.l  # noqa: E741
        checks.state_dtype("state.m", m.dtype)
        checks.row_shape("state.m", m.shape, stat_shape)
        checks.same_shape_and_dtype("state.l", l.shape, l.dtype, "state.m", m.shape, m.dtype)
    return Expected(dtype, acc, dtype if request.result == "lse" else acc, row_shape, stat_shape)
