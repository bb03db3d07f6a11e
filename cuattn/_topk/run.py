"""The calls of selections on a device: plan, and what they need beside launches."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn._arrays import checks, row_layout
from cuattn._arrays.row_layout import Layout, spec_of
from cuattn._device.host import HOST, Computed
from cuattn._device.kernel import Limits
from cuattn._device.launches import Block, Launches, Made, Prepared
from cuattn._device.params import (
    RADIX_WORKSPACE,
    SOFTMAX_HEAD,
    STATE_MERGE,
    TOPK,
    TOPK_STATE_MERGE,
)
from cuattn._softmax import request as softmax_request
from cuattn._softmax.run import run as run_softmax
from cuattn._topk import numpy_topk
from cuattn._topk.request import Call, MergeCall, Operands, Request, expect
from cuattn.results import SoftmaxState

if TYPE_CHECKING:
    from cuattn._topk.problem import TopKProblem

UINT8, INT64 = np.dtype(np.uint8), np.dtype(np.int64)
NAMES = {name: name for name in Operands._fields}
NUMBERS = ("scale_value", "renormalize", "index_offset")  # the first of Options


def prepare(call: Call, kind: Callable[..., Any]) -> Any:
    """A call with its launches; where it takes more than these, or none, its results."""
    runtime, request, expected, operands, options = call
    if runtime is None:
        arrays = {n: array for n, array in operands._asdict().items() if array is not None}
        computed = _computed(call, tuple(arrays))
        return Prepared(HOST, computed, arrays, options[: len(NUMBERS)], kind, NAMES)
    device = runtime.device(operands.x)
    for name, array in operands._asdict().items():
        if array is not None and runtime.address(array) % array.itemsize:
            raise checks.misaligned(name, array)
    with runtime.on(device):
        if operands.scale is not None and operands.scale.dtype != expected.acc:
            operands = operands._replace(scale=operands.scale.astype(expected.acc))
            request = request._replace(scale=spec_of(operands.scale))
            call = Call(runtime, request, expected, operands, options)
        aligned, limits = runtime.address(operands.x) % 16 == 0, runtime.limits(device)
        launches = _planned(request, options.renormalize, options.wants_lse, aligned, limits)
        if launches is None:
            made = prepare(_copied(call), kind)
            return made.launch() if isinstance(made, Prepared) else made
        arrays = operands._asdict()
        made = Prepared(runtime, launches, arrays, options[: len(NUMBERS)], kind, NAMES)
        state: Any = None
        if not launches.kernels and 0 not in expected.stat_shape:  # every entry is missing
            values = runtime.xp.full(expected.shape, -np.inf, expected.dtype)
            indices = runtime.xp.full(expected.shape, -1, INT64)
            if options.wants_lse or request.result == "state":
                state = _state(call)
        elif "stat" in launches.given:  # by radix, what is relative to the rows comes after them
            state = _state(call)
            arrays |= {"stat": state.m, "stat_l": state.l}
            values, indices = made.results()
        else:
            return made
        if request.result == "state":
            return kind(*state, values, indices)
        return kind(values, indices, state.lse) if options.wants_lse else kind(values, indices)


def _computed(call: Call, given: tuple[str, ...]) -> Computed:
    """What is left of a call on NumPy arrays, without these arrays."""
    call = call._replace(operands=Operands(None))

    def run(runtime: Any, arrays: list[Any], numbers: tuple[Any, ...]) -> list[Any]:
        operands = Operands(**dict(zip(given, arrays, strict=True)))
        options = call.options._replace(scale=numbers[0])
        return numpy_topk.run(call._replace(operands=operands, options=options))

    return Computed(given, run)


@lru_cache(maxsize=4096)
def _planned(
    request: Request, renormalize: bool, wants_lse: bool, aligned: bool, limits: Limits
) -> Launches | None:
    """Launches of a checked request; None if no kernel can follow the strides of its arrays."""
    from cuattn._topk.plan import OUTPUTS, plan_topk

    problem = _problem(request, aligned)
    if problem is None:
        return None
    expected = expect(request)
    reads = [name for name in Operands._fields if getattr(request, name) is not None]
    made = {"out": Made(expected.shape, expected.dtype), "indices": Made(expected.shape, INT64)}
    returned, stats = ["out", "indices"], ["stat"] if wants_lse else []
    if request.result == "state":
        stats = ["stat", "stat_l"]
    empty = 0 in (problem.layout.rows, problem.layout.cols, problem.k)
    plan = None if empty else plan_topk(problem, limits.compute_capability, limits.num_sms)
    relative = request.result in ("prob", "log_prob") and not renormalize
    if plan is not None and plan.radix and problem.softmax and (relative or stats):
        reads += ["stat", "stat_l"]
    else:
        made |= dict.fromkeys(stats, Made(expected.stat_shape, expected.acc))
        returned = stats + returned if request.result == "state" else returned + stats
    if plan is None:
        return Launches(reads, (), made, returned, ())
    if plan.workspace_bytes:
        made["partial"] = Made((plan.workspace_bytes,), UINT8)
    fields = {"k": problem.k, "output": OUTPUTS.get(request.result, 0)}
    block: Block = (SOFTMAX_HEAD, plan.geometry, (TOPK, fields))
    if plan.radix:
        workspace = "partial" if plan.workspace_bytes else 0
        block = (*block, (RADIX_WORKSPACE, {"workspace": workspace}))
    kernels = [(kernel, (*block, end)) for kernel, end in plan.launches]

    def lists(at: list[int]) -> list[int]:
        return [(at[-1] if plan.workspace_bytes else 0) + plan.lists_offset]

    return Launches(
        reads, (), made, returned, kernels, numbers=NUMBERS, derived=(("lists",), lists)
    )


def _problem(request: Request, aligned: bool) -> TopKProblem | None:
    """The problem of a checked request; None if no kernel can follow the strides of its arrays."""
    from cuattn._topk.problem import TopKProblem

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


def _state(call: Call) -> SoftmaxState:
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
    return SoftmaxState(*run_softmax(softmax_request.Call(runtime, rows, arrays, options.scale)))


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


def prepare_merge(call: MergeCall) -> Any:
    """A merge of two states with its launch."""
    runtime, arrays = call.runtime, call.arrays
    kind: Any = call.kind
    with runtime.on(runtime.device(arrays[0])):
        arrays = [
            array if array.flags.c_contiguous else runtime.xp.ascontiguousarray(array)
            for array in arrays
        ]
    fields = kind._fields
    names = {f"{field}_{side}": f"{side}[{i}]" for side in "ab" for i, field in enumerate(fields)}
    launches = _planned_merge(kind, tuple((a.shape, a.dtype) for a in arrays[: len(fields)]))
    return Prepared(runtime, launches, dict(zip(names, arrays, strict=True)), (), kind, names)


@lru_cache(maxsize=4096)
def _planned_merge(kind: Any, specs: tuple[tuple[tuple[int, ...], np.dtype], ...]) -> Launches:
    """The launch that merges two states of these shapes and dtypes."""
    from cuattn._softmax.plan import plan_state_merge
    from cuattn._topk.plan_radix import plan_topk_state_merge

    made = {field: Made(*spec) for field, spec in zip(kind._fields, specs, strict=True)}
    (shape, dtype), k = specs[0], made["values"].shape[-1] if "values" in made else 0
    fields = kind._fields if k else ("m", "l")  # nothing selected
    reads = [f"{field}_{side}" for side in "ab" for field in fields]
    n = math.prod(shape)
    kernels: list[Any] = []
    if n and k:
        block = [(TOPK_STATE_MERGE, {"rows": n, "k": k})]
        kernels.append((plan_topk_state_merge(dtype.name, n, k), block))
    elif n:
        kernels.append((plan_state_merge(dtype.name, n), [(STATE_MERGE, {"n": n})]))
    return Launches(reads, (), made, kind._fields, kernels)
