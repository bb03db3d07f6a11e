"""The second half of every selection on a device: plan, allocate, launch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import checks as _check
from cuattn._arrays import row_layout as _layout
from cuattn._arrays.row_layout import Layout
from cuattn._device import runtime as _jit
from cuattn._device.params import RADIX_WORKSPACE, SOFTMAX_HEAD, TOPK
from cuattn._softmax import request as _call
from cuattn._softmax import run as _run
from cuattn._softmax.problem import TopKProblem
from cuattn._topk import plan as _plan_topk
from cuattn.results import SoftmaxState

UINT8, INT64 = np.dtype(np.uint8), np.dtype(np.int64)


class Operands(NamedTuple):
    """Arrays of one call, on one device; the fields that a TopKRequest has metas for."""

    x: Any
    where: Any = None
    scale: Any = None


class Options(NamedTuple):
    """What changes nothing but numbers that the kernels are given."""

    scale: float = 1.0  # in top_k -1: the smallest elements
    renormalize: bool = False
    index_offset: int = 0
    wants_lse: bool = False


class Made(NamedTuple):
    """What a call made; `stat` and `stat_l` are one number a row (lse, or m and l of a state)."""

    values: Any
    indices: Any
    stat: Any
    stat_l: Any


def run(request: _call.TopKRequest, operands: Operands, options: Options) -> Made:
    """Launch a checked request on the device of x."""
    runtime = _jit.runtime_of(operands.x)
    device = runtime.device(operands.x)
    expected = _call.topk_results(request)
    for name, array in zip(Operands._fields, operands, strict=True):
        if array is not None and runtime.address(array) % array.itemsize:
            raise _check.misaligned(name, array)
    with runtime.on(device):
        if operands.scale is not None and operands.scale.dtype != expected.acc:
            operands = operands._replace(scale=operands.scale.astype(expected.acc))
            request = request._replace(scale=_call.meta(operands.scale))
        aligned = runtime.address(operands.x) % 16 == 0
        problem = _problem(request, aligned)
        if problem is None:
            return run(*_copied(runtime.xp, request, operands), options)
        made = _allocated(runtime, request, options)
        if problem.layout.rows:
            if request.k == 0 or problem.layout.cols == 0:
                made = made._replace(  # every entry is missing
                    values=runtime.xp.full(made.values.shape, -np.inf, made.values.dtype),
                    indices=runtime.xp.full(made.indices.shape, -1, INT64),
                )
                if made.stat is not None:
                    _store_states(made, _states(request, operands, options))
            else:
                _launch(runtime, runtime.limits(device), problem, operands, options, made, request)
        return made


def _launch(
    runtime: Any,
    limits: _jit.Limits,
    problem: TopKProblem,
    operands: Operands,
    options: Options,
    made: Made,
    request: _call.TopKRequest,
) -> None:
    plan = _plan_topk.plan_topk(problem, limits.compute_capability, limits.num_sms)
    workspace = None
    if plan.workspace_bytes:
        workspace = runtime.empty((plan.workspace_bytes,), UINT8)
    x, where, scale = operands
    values, indices, stat, stat_l = made
    reads: tuple[Any, ...] = operands
    relative = request.result in ("prob", "log_prob") and not options.renormalize
    if plan.radix and problem.softmax and (relative or made.stat is not None):
        state = _states(request, operands, options)
        stat, stat_l = state
        reads = (*operands, *state)
        _store_states(made, state)

    address = runtime.address
    start = 0 if workspace is None else address(workspace)
    params = SOFTMAX_HEAD.pack(
        x=address(x),
        y=0,
        where=0 if where is None else address(where),
        weight=0,
        scale=0 if scale is None else address(scale),
        out=address(values),
        stat=0 if stat is None else address(stat),
        stat_l=0 if stat_l is None else address(stat_l),
        partial=start,
        offsets=0,
        scale_value=options.scale,
    )
    params += plan.geometry
    params += TOPK.pack(
        indices=address(indices),
        lists=start + plan.lists_offset,
        k=problem.k,
        index_offset=options.index_offset,
        tiles=plan.tiles,
        output=_plan_topk.OUTPUTS.get(request.result, 0),
        renormalize=options.renormalize,
    )
    if plan.radix:
        params += RADIX_WORKSPACE.pack(workspace=start)
    for kernel, end in plan.launches:
        runtime.launch(kernel, params + end, (*reads, workspace), (*made, workspace))


@lru_cache(maxsize=4096)
def _problem(request: _call.TopKRequest, aligned: bool) -> TopKProblem | None:
    """The problem of a checked request; None if no kernel can follow the strides of its arrays."""
    expected = _call.topk_results(request)
    x, axis = request.x, request.axis
    shape, out_shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :]), expected.shape
    at = len(shape) - 1 if request.result == "state" else axis  # of the selected elements
    out = _layout.packed(out_shape, None, 1)
    out_rows = (*(out[:at] + out[at + 1 :])[:axis], 0, *(out[:at] + out[at + 1 :])[axis:])
    stat = _layout.packed((*expected.stat_shape[:axis], 1, *expected.stat_shape[axis:]), None, 1)
    given: list[Any] = [_layout.element_strides(m, x.shape) for m in (x, request.where)]
    given.append(_layout.element_strides(request.scale, shape))
    if any(strides is False for strides in given):
        return None
    x_strides, where, scale = given
    strides = (x_strides, None, where, None, scale, out_rows, stat)
    rows = _layout.join_dimensions(shape, (axis,), strides)
    if rows is None:
        return None
    cols = tuple((0 if s is None else s[axis],) for s in (x_strides, None, where, None))
    cols += ((0,), (out[at],), (0,))
    layout = Layout(rows.row_size, (x.shape[axis],), rows.row_stride, cols)
    steps = [stride * x.dtype.itemsize for stride in layout.row_stride[0]]  # bytes
    return TopKProblem(
        x=x.dtype.name,
        layout=layout,
        k=request.k,
        softmax=request.result != "top_k",
        masked=request.where is not None,
        aligned=aligned and all(step % 16 == 0 for step in steps),
    )


def _allocated(runtime: Any, request: _call.TopKRequest, options: Options) -> Made:
    expected = _call.topk_results(request)
    state = request.result == "state"
    stat = stat_l = None
    if state or options.wants_lse:
        stat = runtime.empty(expected.stat_shape, expected.acc)
    if state:
        stat_l = runtime.empty(expected.stat_shape, expected.acc)
    values = runtime.empty(expected.shape, expected.dtype)
    return Made(values, runtime.empty(expected.shape, INT64), stat, stat_l)


def _states(request: _call.TopKRequest, operands: Operands, options: Options) -> SoftmaxState:
    """m and l of each row, by a pass of their own."""
    acc = _call.topk_results(request).acc
    rows = _call.Request(
        "state", (request.axis,), request.x, where=request.where, scale=request.scale, dtype=acc
    )
    row_operands = _run.Operands(operands.x, where=operands.where, scale=operands.scale)
    made = _run.run(rows, row_operands, options.scale)
    return SoftmaxState(made.stat, made.stat_l)


def _store_states(made: Made, state: SoftmaxState) -> None:
    """What the call wants of its rows' states."""
    if made.stat_l is not None:
        made.stat[...], made.stat_l[...] = state
    elif made.stat is not None:
        made.stat[...] = state.lse


def _copied(
    xp: Any, request: _call.TopKRequest, operands: Operands
) -> tuple[_call.TopKRequest, Operands]:
    """The same call on C-contiguous copies, for layouts that no kernel follows (_layout.RANKS)."""
    copies = Operands(
        *(
            array
            if array is None
            else xp.ascontiguousarray(
                xp.broadcast_to(array, operands.x.shape) if name == "where" else array
            )
            for name, array in zip(Operands._fields, operands, strict=True)
        )
    )
    metas: dict[str, Any] = {
        name: _call.meta(array) for name, array in zip(Operands._fields, copies, strict=True)
    }
    return request._replace(**metas), copies
