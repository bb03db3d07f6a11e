"""The calls of selections on a device: plan, allocate, launch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import checks, row_layout
from cuattn._arrays.row_layout import Layout, spec_of
from cuattn._device.kernel import Limits
from cuattn._device.params import (
    RADIX_WORKSPACE,
    SOFTMAX_HEAD,
    STATE_MERGE,
    TOPK,
    TOPK_STATE_MERGE,
)
from cuattn._softmax import request as softmax_request
from cuattn._softmax.plan import plan_state_merge
from cuattn._softmax.run import run as run_softmax
from cuattn._topk.plan import OUTPUTS, plan_topk
from cuattn._topk.plan_radix import plan_topk_state_merge
from cuattn._topk.problem import TopKProblem
from cuattn._topk.request import Call, MergeCall, Operands, Request, expect
from cuattn.results import SoftmaxState

UINT8, INT64 = np.dtype(np.uint8), np.dtype(np.int64)


class Outputs(NamedTuple):
    """What a call makes; `stat`, `stat_l`: one number per row (lse, or m and l of a state)."""

    values: Any
    indices: Any
    stat: Any
    stat_l: Any


def run(call: Call) -> Outputs:
    """Launch a call on the device of x."""
    runtime, request, expected, operands, options = call
    device = runtime.device(operands.x)
    for i, array in enumerate(operands):
        if array is not None and runtime.address(array) % array.itemsize:
            raise checks.misaligned(Operands._fields[i], array)
    with runtime.on(device):
        if operands.scale is not None and operands.scale.dtype != expected.acc:
            operands = operands._replace(scale=operands.scale.astype(expected.acc))
            request = request._replace(scale=spec_of(operands.scale))
            call = Call(runtime, request, expected, operands, options)
        aligned = runtime.address(operands.x) % 16 == 0
        problem = _problem(request, aligned)
        if problem is None:
            return run(_copied(call))
        outputs = _allocated(call)
        if problem.layout.rows:
            if request.k == 0 or problem.layout.cols == 0:
                outputs = outputs._replace(  # every entry is missing
                    values=runtime.xp.full(outputs.values.shape, -np.inf, outputs.values.dtype),
                    indices=runtime.xp.full(outputs.indices.shape, -1, INT64),
                )
                if outputs.stat is not None:
                    _store_states(outputs, _states(call))
            else:
                _launch(call, runtime.limits(device), problem, outputs)
        return outputs


def _launch(call: Call, limits: Limits, problem: TopKProblem, outputs: Outputs) -> None:
    runtime, request, _, operands, options = call
    plan = plan_topk(problem, limits.compute_capability, limits.num_sms)
    workspace = None
    if plan.workspace_bytes:
        workspace = runtime.empty((plan.workspace_bytes,), UINT8)
    x, where, scale = operands
    values, indices, stat, stat_l = outputs
    reads: tuple[Any, ...] = operands
    relative = request.result in ("prob", "log_prob") and not options.renormalize
    if plan.radix and problem.softmax and (relative or outputs.stat is not None):
        state = _states(call)
        stat, stat_l = state
        reads = (*operands, *state)
        _store_states(outputs, state)

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
        output=OUTPUTS.get(request.result, 0),
        renormalize=options.renormalize,
    )
    if plan.radix:
        params += RADIX_WORKSPACE.pack(workspace=start)
    for kernel, end in plan.launches:
        runtime.launch(kernel, params + end, (*reads, workspace), (*outputs, workspace))


@lru_cache(maxsize=4096)
def _problem(request: Request, aligned: bool) -> TopKProblem | None:
    """The problem of a checked request; None if no kernel can follow the strides of its arrays."""
    expected = expect(request)
    x, axis = request.x, request.axis
    shape, out_shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :]), expected.shape
    at = len(shape) - 1 if request.result == "state" else axis  # of the selected elements
    out = row_layout.packed(out_shape, None, 1)
    out_rows = (*(out[:at] + out[at + 1 :])[:axis], 0, *(out[:at] + out[at + 1 :])[axis:])
    stat = row_layout.packed((*expected.stat_shape[:axis], 1, *expected.stat_shape[axis:]), None, 1)
    given: list[Any] = [row_layout.element_strides(m, x.shape) for m in (x, request.where)]
    given.append(row_layout.element_strides(request.scale, shape))
    if any(strides is False for strides in given):
        return None
    x_strides, where, scale = given
    strides = (x_strides, None, where, None, scale, out_rows, stat)
    rows = row_layout.join_dimensions(shape, (axis,), strides)
    if rows is None:
        return None
    cols = tuple((0 if s is None else s[axis],) for s in (x_strides, None, where, None))
    cols += ((0,), (out[at],), (0,))
    layout = Layout(rows.row_size, (x.shape[axis],), rows.row_stride, cols)
    row_bytes = [stride * x.dtype.itemsize for stride in layout.row_stride[0]]
    return TopKProblem(
        x=x.dtype.name,
        layout=layout,
        k=request.k,
        softmax=request.result != "top_k",
        masked=request.where is not None,
        aligned=aligned and all(step % 16 == 0 for step in row_bytes),
    )


def _allocated(call: Call) -> Outputs:
    runtime, request, expected, _, options = call
    state = request.result == "state"
    stat = stat_l = None
    if state or options.wants_lse:
        stat = runtime.empty(expected.stat_shape, expected.acc)
    if state:
        stat_l = runtime.empty(expected.stat_shape, expected.acc)
    values = runtime.empty(expected.shape, expected.dtype)
    return Outputs(values, runtime.empty(expected.shape, INT64), stat, stat_l)


def _states(call: Call) -> SoftmaxState:
    """m and l of each row, by a pass of their own."""
    runtime, request, expected, operands, options = call
    rows = softmax_request.Request(
        "state",
        (request.axis,),
        request.x,
        where=request.where,
        scale=request.scale,
        dtype=expected.acc,
    )
    arrays = softmax_request.Operands(operands.x, where=operands.where, scale=operands.scale)
    _, m, l = run_softmax(softmax_request.Call(runtime, rows, arrays, options.scale))  # noqa: E741
    return SoftmaxState(m, l)


def _store_states(outputs: Outputs, state: SoftmaxState) -> None:
    """What the call wants of its rows' states."""
    if outputs.stat_l is not None:
        outputs.stat[...], outputs.stat_l[...] = state
    elif outputs.stat is not None:
        outputs.stat[...] = state.lse


def _copied(call: Call) -> Call:
    """The same call on C-contiguous copies, for layouts that no kernel follows (RANKS)."""
    runtime, request, expected, operands, options = call
    copies = {}
    for name, array in operands._asdict().items():
        if array is not None:
            wide = array
            if name == "where":
                wide = runtime.xp.broadcast_to(array, operands.x.shape)
            copies[name] = runtime.xp.ascontiguousarray(wide)
    specs: dict[str, Any] = {name: spec_of(array) for name, array in copies.items()}
    return Call(runtime, request._replace(**specs), expected, Operands(**copies), options)


def merge(call: MergeCall) -> Any:
    """Launch the merge of two states."""
    runtime, kind, arrays = call
    with runtime.on(runtime.device(arrays[0])):
        arrays = [
            array if array.flags.c_contiguous else runtime.xp.ascontiguousarray(array)
            for array in arrays
        ]
        size = len(arrays) // 2
        merged = [runtime.empty(array.shape, array.dtype) for array in arrays[:size]]
        m, k = arrays[0], arrays[2].shape[-1] if size > 2 else 0
        if m.size:
            fields = size if k else 2  # nothing selected: m and l alone
            parts = arrays[:fields], arrays[size : size + fields], merged[:fields]
            addresses = [runtime.address(array) for part in parts for array in part]
            if k:
                kernel = plan_topk_state_merge(m.dtype.name, m.size, k)
                params = TOPK_STATE_MERGE.struct.pack(*addresses, m.size, k)
            else:
                kernel = plan_state_merge(m.dtype.name, m.size)
                params = STATE_MERGE.struct.pack(*addresses, m.size)
            runtime.launch(kernel, params, tuple(arrays), tuple(merged))
    return kind(*merged)
