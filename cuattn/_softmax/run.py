"""The calls of the softmax functions on a device: plan, allocate, launch.

What depends on shapes, strides, dtypes and options alone is planned once and remembered; a warm
call looks it up, allocates, packs its pointers and launches.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import checks, row_layout
from cuattn._arrays.row_layout import ArraySpec, spec_of
from cuattn._device.kernel import Limits
from cuattn._device.params import SOFTMAX_HEAD
from cuattn._softmax.plan import SoftmaxPlan, plan_softmax
from cuattn._softmax.problem import SoftmaxProblem
from cuattn._softmax.request import NAMES, Call, Expected, Operands, Request, expect

UINT8 = np.dtype(np.uint8)


class Outputs(NamedTuple):
    """What a call makes: the transform, and one number per row (lse, or m and l of a state)."""

    out: Any
    stat: Any
    stat_l: Any


class Planned(NamedTuple):
    """Everything of a call that does not change with its pointers."""

    expected: Expected
    plan: SoftmaxPlan | None  # None: nothing to launch
    out_order: tuple[int, ...] | None  # axes of a new result, slowest first; None: C order


def run(call: Call) -> Outputs:
    """Launch a call on the device of x; results that are not given are allocated."""
    runtime, request, operands, factor, out, stat, wants_stat = call
    x, y, where, weight, scale, offsets = operands
    device = runtime.device(x)
    alone = y is where is weight is scale is offsets is out is stat is None  # as most calls are
    for i, array in enumerate((x,) if alone else (*operands, out, stat)):
        if array is not None and runtime.address(array) % array.itemsize:
            expect(request)  # so that its errors win over this one
            raise checks.misaligned((*NAMES[request.y is not None], "out", "out")[i], array)
    with runtime.on(device):
        if weight is not None or scale is not None or offsets is not None:
            request, operands = _cast(runtime.xp, request, operands)
        aligned, limits = runtime.address(x) % 16 == 0, runtime.limits(device)
        specs = (None, None) if alone else (spec_of(out), spec_of(stat))
        planned = _planned(request, *specs, aligned, limits)
        if planned is None:
            request, copies = _copied(runtime.xp, request, operands)
            wants_stat = wants_stat or stat is not None
            copy = run(Call(runtime, request, copies, factor, wants_stat=wants_stat))
            return Outputs(_into(out, copy.out), _into(stat, copy.stat), copy.stat_l)
        outputs = _allocated(runtime, request, planned, x, out, stat, wants_stat)
        if planned.plan is None:
            _into(outputs.stat, -np.inf)
            _into(outputs.stat_l, 0)
        else:
            _launch(runtime, planned.plan, operands, factor, outputs)
        return outputs


def _launch(
    runtime: Any, plan: SoftmaxPlan, operands: Operands, factor: float, outputs: Outputs
) -> None:
    x, y, where, weight, scale, offsets = operands
    out, stat, stat_l = outputs
    address = runtime.address
    partial = None
    if plan.workspace_bytes:
        partial = runtime.empty((plan.workspace_bytes,), UINT8)
    head = SOFTMAX_HEAD.pack(
        x=address(x),
        y=0 if y is None else address(y),
        where=0 if where is None else address(where),
        weight=0 if weight is None else address(weight),
        scale=0 if scale is None else address(scale),
        out=0 if out is None else address(out),
        stat=0 if stat is None else address(stat),
        stat_l=0 if stat_l is None else address(stat_l),
        partial=0 if partial is None else address(partial),
        offsets=0 if offsets is None else address(offsets),
        scale_value=factor,
    )
    writes = (out, stat, stat_l, partial)
    for kernel in plan.kernels:
        runtime.launch(kernel, head + plan.geometry, operands, writes)


@lru_cache(maxsize=4096)
def _planned(
    request: Request, out: ArraySpec | None, stat: ArraySpec | None, aligned: bool, limits: Limits
) -> Planned | None:
    """Plan of a checked request; None if no kernel can follow the strides of its arrays.

    `aligned`: the first element of x is on a 16-byte boundary.
    """
    expected = expect(request)
    x = request.x
    order = row_layout.memory_order(x)
    if out is None:
        out = ArraySpec(
            x.shape, row_layout.packed(x.shape, order, expected.dtype.itemsize), expected.dtype
        )
    if stat is None:
        stat = ArraySpec(
            expected.stat_shape,
            row_layout.packed(expected.stat_shape, None, expected.stat_dtype.itemsize),
            expected.stat_dtype,
        )
    if not request.keepdims:
        stat = row_layout.expanded(stat, request.axes)
    shape, axes, scale = x.shape, request.axes, request.scale
    operands = [x, request.y, request.where, request.weight, scale, out, stat]
    if request.offsets is not None:
        # Ragged rows: a new first dimension, the segments, in which x and out do not move.
        shape, axes = (expected.row_shape[0], *shape), (1,)
        scale = scale and row_layout.expanded(
            row_layout.padded(scale, len(expected.row_shape)), axes
        )
        operands = [x, None, None, None, scale, out, None]
    steps = [row_layout.element_strides(operand, shape) for operand in operands]
    if any(s is False for s in steps):
        return None
    layout = row_layout.join_dimensions(shape, axes, tuple(steps), request.offsets is not None)
    if layout is None:
        return None
    if layout.rows == 0 or layout.cols == 0:
        return Planned(expected, None, order)
    row_bytes = [stride * x.dtype.itemsize for stride in layout.row_stride[0]]
    problem = SoftmaxProblem(
        result=request.result,
        x=x.dtype.name,
        acc=expected.acc.name,
        out=expected.dtype.name,
        layout=layout,
        masked=request.where is not None,
        weighted=request.weight is not None,
        aligned=aligned and all(step % 16 == 0 for step in row_bytes),
        offsets=None if request.offsets is None else request.offsets.dtype.name,
        segments=0 if request.offsets is None else expected.row_shape[0],
    )
    plan = plan_softmax(problem, limits.compute_capability, limits.num_sms)
    return Planned(expected, plan, order)


def _allocated(
    runtime: Any,
    request: Request,
    planned: Planned,
    x: Any,
    out: Any,
    stat: Any,
    wants_stat: bool,
) -> Outputs:
    """The results, new ones where none are given: the transform in the memory order of x."""
    expected = planned.expected
    stat_l = None
    if request.result in ("lse", "state"):
        wants_stat = True
    elif out is None:
        order = planned.out_order
        if order is None:
            out = runtime.empty(x.shape, expected.dtype)
        else:
            packed = runtime.empty(tuple(x.shape[d] for d in order), expected.dtype)
            out = packed.transpose(tuple(order.index(d) for d in range(len(order))))
    if wants_stat and stat is None:
        stat = runtime.empty(expected.stat_shape, expected.stat_dtype)
    if request.result == "state":
        stat_l = runtime.empty(expected.stat_shape, expected.stat_dtype)
    return Outputs(out, stat, stat_l)


def _cast(xp: Any, request: Request, operands: Operands) -> tuple[Request, Operands]:
    """Scales, weights and offsets as kernels read them: the accumulator's dtype; contiguous."""
    expected = expect(request)
    cast = {}
    for name in ("scale", "weight"):
        array = getattr(operands, name)
        if array is not None and array.dtype != expected.acc:
            cast[name] = array.astype(expected.acc)
    if operands.offsets is not None and operands.offsets.strides != (operands.offsets.itemsize,):
        cast["offsets"] = xp.ascontiguousarray(operands.offsets)
    if not cast:
        return request, operands
    specs: dict[str, Any] = {name: spec_of(array) for name, array in cast.items()}
    return request._replace(**specs, dtype=expected.dtype), operands._replace(**cast)


def _copied(xp: Any, request: Request, operands: Operands) -> tuple[Request, Operands]:
    """The same call on C-contiguous copies, for layouts that no kernel follows (RANKS)."""
    shape = operands.x.shape
    copies = {}
    for name, array in operands._asdict().items():
        if array is not None:
            wide = xp.broadcast_to(array, shape) if name in ("where", "weight") else array
            copies[name] = xp.ascontiguousarray(wide).reshape(wide.shape)
    specs: dict[str, Any] = {name: spec_of(array) for name, array in copies.items()}
    return request._replace(**specs), Operands(**copies)


def _into(target: Any, value: Any) -> Any:
    """`value`, written into `target` if there is one."""
    if target is None:
        return value
    target[...] = value
    return target
