"""The road every softmax function takes: check → plan → allocate → launch, or check →
cuattn.reference.

What depends on shapes, strides, dtypes and options alone is worked out once and remembered
(`results`, `_planned`); a warm call looks it up, allocates, packs its pointers and launches.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuattn import _check, _jit, _layout, _plan
from cuattn._layout import Meta

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


class Request(NamedTuple):
    """One call without its data: metas of its arrays, sorted non-negative axes, the result's dtype if it was given."""

    result: str  # a key of _plan.RESULTS, "grad" or "log_grad"
    axes: tuple[int, ...]
    x: Meta
    y: Meta | None = None
    where: Meta | None = None
    weight: Meta | None = None
    scale: Meta | None = None
    offsets: Meta | None = None
    dtype: np.dtype | None = None
    keepdims: bool = False


class Results(NamedTuple):
    """Dtypes and shapes of a call: `stat` is one number a row (lse or state)."""

    dtype: np.dtype
    acc: np.dtype
    stat_dtype: np.dtype
    row_shape: tuple[int, ...]  # with reduced axes of length 1
    stat_shape: tuple[int, ...]


class Planned(NamedTuple):
    """Everything of a call that does not change with its pointers."""

    plan: _plan.SoftmaxPlan | None  # None: nothing to launch
    out_order: tuple[int, ...] | None  # axes of a new result, slowest first; None: C order


# ---- Arguments
# -------------------------------------------------------------------------------------------------------


def meta(array: Any) -> Meta | None:
    return None if array is None else Meta(array.shape, array.strides, array.dtype)


def enter(name: str, value: Any, first: tuple[str, Any] | None = None) -> Any:
    """`value` as a NumPy or CuPy array; of the library and the device of `first`, an array that entered before."""
    if type(value) is np.ndarray and (first is None or isinstance(first[1], np.ndarray)):
        return value
    if not _jit.is_array(value):
        raise _check.not_an_array(name, value)
    if first is not None and isinstance(value, np.ndarray) != isinstance(first[1], np.ndarray):
        raise _check.no_mix(name, value, *first)
    if isinstance(value, np.ndarray):
        return value
    array = _jit.adopt(value)
    if first is not None:
        device = _jit.runtime_of(array).device
        _check.one_device(name, device(array), first[0], device(first[1]))
    return array


def enter_pair(name: str, value: Any, other: str, other_value: Any) -> tuple[Any, Any]:
    """Two arrays that must be of one library and on one device."""
    # Before either enters: taking in another library's array touches its device.
    if isinstance(value, np.ndarray) != isinstance(other_value, np.ndarray) and (
        _jit.is_array(value) and _jit.is_array(other_value)
    ):
        raise _check.no_mix(other, other_value, name, value)
    first = (name, enter(name, value))
    return first[1], enter(other, other_value, first)


def array_or_number(name: str, value: Any, first: tuple[str, Any]) -> tuple[Any, float]:
    """An option that is one number or an array of them: (array, 1.0) or (None, number)."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (np.generic, int, float, complex, str, bytes)):
        return None, _check.real_scalar(name, value)
    array = enter(name, value, first)
    _check.real(name, array.dtype)
    return array, 1.0


def scale(value: Any, first: tuple[str, Any]) -> tuple[Any, float]:
    return (None, 1.0) if value is None else array_or_number("scale", value, first)


def mask(where: Any, first: tuple[str, Any]) -> Any:
    """`where` as an array; True, as in NumPy's functions, means no mask."""
    if where is None or where is True:
        return None
    return enter("where", where, first)


def cast(array: Any, dtype: np.dtype) -> Any:
    return None if array is None else array.astype(dtype, copy=False)


@lru_cache(maxsize=4096)
def results(request: Request) -> Results:
    """Check metas and options, and say what comes out."""
    x = request.x
    if request.y is not None:
        _check.floating("grad", x.dtype)
        _check.same_shape_and_dtype("y", request.y.shape, request.y.dtype, "grad", x.shape, x.dtype)
    else:
        _check.floating_or_integer("x", x.dtype)
    weight = None if request.weight is None else request.weight.dtype
    dtype = _check.result_dtype(request.dtype, x.dtype, weight)
    row_shape = tuple(1 if d in request.axes else size for d, size in enumerate(x.shape))
    if request.offsets is not None:
        row_shape = (request.offsets.shape[0] - 1, *x.shape[1:])
    if request.scale is not None:
        _check.broadcastable("scale", request.scale.shape, row_shape, "one value a row")
    if request.where is not None:
        _check.where_dtype(request.where.dtype)
        _check.broadcastable("where", request.where.shape, x.shape, "the shape of x")
    if request.weight is not None:
        _check.broadcastable("b", request.weight.shape, x.shape, "the shape of x")
    acc = FLOAT64 if dtype == FLOAT64 else FLOAT32
    stat_shape = row_shape
    if not request.keepdims:
        stat_shape = tuple(size for d, size in enumerate(row_shape) if d not in request.axes)
    return Results(dtype, acc, dtype if request.result == "lse" else acc, row_shape, stat_shape)


def check_out(
    out: Any, expected: list[tuple[tuple[int, ...], np.dtype]], inputs: list[tuple[str, Any]]
) -> tuple[Any, ...]:
    """The arrays of `out`, fit for results of the expected shapes and dtypes."""
    arrays = []
    given = _check.out_count(out, len(expected))
    for i, (array, (shape, dtype)) in enumerate(zip(given, expected, strict=True)):
        name = "out" if len(expected) == 1 else f"out[{i}]"
        array = enter(name, array, inputs[0])
        _check.out_array(name, array, shape, dtype)
        for other, input_ in [*inputs, *((f"out[{j}]", a) for j, a in enumerate(arrays))]:
            if input_ is None:
                continue
            _check.no_partial_overlap(name, array, _extent(array), other, input_, _extent(input_))
        arrays.append(array)
    return tuple(arrays)


def _extent(array: Any) -> tuple[int, int]:
    address = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return _check.extent(address, array)


# ---- Plans
# -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _planned(
    request: Request, out: Meta | None, stat: Meta | None, aligned: bool, limits: _jit.Limits
) -> Planned | None:
    """Plan of a checked request. None: some array has more dimensions, or odder strides, than a kernel can follow."""
    expected = results(request)
    x = request.x
    order = _layout.memory_order(x)
    if out is None:
        out = Meta(x.shape, _layout.packed(x.shape, order, expected.dtype.itemsize), expected.dtype)
    if stat is None:
        stat = Meta(
            expected.stat_shape,
            _layout.packed(expected.stat_shape, None, expected.stat_dtype.itemsize),
            expected.stat_dtype,
        )
    if not request.keepdims:
        stat = _layout.expanded(stat, request.axes)
    weight = request.weight and request.weight._replace(dtype=expected.acc)
    scale = request.scale and request.scale._replace(dtype=expected.acc)
    shape, axes = x.shape, request.axes
    operands = [x, request.y, request.where, weight, scale, out, stat]
    if request.offsets is not None:
        # Ragged rows: a new first dimension, the segments, in which x and out do not move.
        shape, axes = (expected.row_shape[0], *shape), (1,)
        scale = scale and _layout.expanded(_layout.padded(scale, len(expected.row_shape)), axes)
        operands = [x, None, None, None, scale, out, None]
    strides = [_layout.element_strides(operand, shape) for operand in operands]
    if any(s is False for s in strides):
        return None
    layout = _layout.join_dimensions(shape, axes, tuple(strides), request.offsets is not None)
    if layout is None:
        return None
    if layout.rows == 0 or layout.cols == 0:
        return Planned(None, order)
    first_bytes = [16 * bool(stride * x.dtype.itemsize % 16) for stride in layout.row_stride[0]]
    problem = _plan.SoftmaxProblem(
        result=request.result,
        x=x.dtype.name,
        acc=expected.acc.name,
        out=expected.dtype.name,
        layout=layout,
        masked=request.where is not None,
        weighted=weight is not None,
        aligned=aligned and not any(first_bytes),
        offsets=None if request.offsets is None else request.offsets.dtype.name,
        segments=0 if request.offsets is None else expected.row_shape[0],
    )
    return Planned(_plan.plan_softmax(problem, limits.compute_capability, limits.num_sms), order)


# ---- Launch
# ----------------------------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """Arrays of one call, on one device."""

    x: Any
    y: Any = None
    where: Any = None
    weight: Any = None
    scale: Any = None
    offsets: Any = None


def run(
    runtime: Any,
    request: Request,
    operands: Operands,
    scale_value: float,
    out: Any = None,
    stat: Any = None,
    wants_stat: bool = False,
) -> tuple[Any, Any, Any]:
    """Launch a checked request; returns (transform, lse or m, l), None for what the request does not have."""
    x = operands.x
    reduces = request.result in ("lse", "state")
    wants_stat = wants_stat or reduces
    expected = results(request)
    address = runtime.address
    x_address = address(x)
    planned = _planned(
        request, meta(out), meta(stat), x_address % 16 == 0, runtime.limits(runtime.device(x))
    )
    if planned is None:
        return _run_on_copies(runtime, request, operands, scale_value, out, stat, wants_stat)

    stat_l = None
    if not reduces and out is None:
        out = _new_like(runtime, x, planned.out_order, expected.dtype)
    if wants_stat and stat is None:
        stat = runtime.empty(x, expected.stat_shape, expected.stat_dtype)
    if request.result == "state":
        stat_l = runtime.empty(x, expected.stat_shape, expected.stat_dtype)
    plan = planned.plan
    if plan is None:
        if stat is not None:
            stat[...] = -np.inf
        if stat_l is not None:
            stat_l[...] = 0
        return out, stat, stat_l

    workspace = None
    if plan.workspace_bytes:
        workspace = runtime.empty(x, (plan.workspace_bytes,), np.dtype(np.uint8))
    _, y, where, weight, scale, offsets = operands
    params = (
        _plan.HEAD.pack(
            x_address,
            0 if y is None else address(y),
            0 if where is None else address(where),
            0 if weight is None else address(weight),
            0 if scale is None else address(scale),
            0 if out is None else address(out),
            0 if stat is None else address(stat),
            0 if stat_l is None else address(stat_l),
            0 if workspace is None else address(workspace),
            0 if offsets is None else address(offsets),
            scale_value,
        )
        + plan.geometry
    )
    writes = tuple(a for a in (out, stat, stat_l, workspace) if a is not None)
    for kernel in plan.kernels:
        runtime.launch(kernel, params, operands, writes)
    return out, stat, stat_l


def _new_like(runtime: Any, x: Any, order: tuple[int, ...] | None, dtype: np.dtype) -> Any:
    """New array of the shape of x in the memory order of x."""
    if order is None:
        return runtime.empty(x, x.shape, dtype)
    packed = runtime.empty(x, tuple(x.shape[d] for d in order), dtype)
    return packed.transpose(tuple(order.index(d) for d in range(len(order))))


def _run_on_copies(runtime, request, operands, scale_value, out, stat, wants_stat):
    """The same on C-contiguous copies, for layouts beyond a kernel's reach (_layout.RANKS)."""
    xp = runtime.xp
    copies = Operands(
        *(
            None if a is None else xp.ascontiguousarray(xp.broadcast_to(a, a.shape))
            for a in operands
        )
    )
    full = {}
    for name in ("where", "weight"):
        array = getattr(copies, name)
        if array is not None:
            full[name] = xp.ascontiguousarray(xp.broadcast_to(array, copies.x.shape))
    copies = copies._replace(**full)
    request = request._replace(
        **{
            name: meta(getattr(copies, name))
            for name in ("x", "y", "where", "weight", "scale", "offsets")
        }
    )
    made = run(runtime, request, copies, scale_value, None, None, wants_stat)
    given = []
    for target, array in zip((out, stat, None), made, strict=True):
        if target is not None:
            target[...] = array
        given.append(array if target is None else target)
    return tuple(given)
