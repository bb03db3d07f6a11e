"""The calls of selections on a device: plan, and what they need beside launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn._arrays import checks, row_layout
from cuattn._arrays.outputs import into
from cuattn._arrays.results import SoftmaxState
from cuattn._arrays.row_layout import ArraySpec, Layout, spec_of
from cuattn._device.host import HOST, Computed
from cuattn._device.kernel import Limits
from cuattn._device.launches import Block, Launches, Made, Prepared
from cuattn._device.params import (
    RADIX_WORKSPACE,
    SOFTMAX_HEAD,
    TOPK,
)
from cuattn._softmax import request as softmax_request
from cuattn._softmax.run import run as run_softmax
from cuattn._topk import numpy_topk
from cuattn._topk.request import (
    INT64,
    Call,
    Expected,
    Operands,
    Request,
    expect,
    fields,
)

if TYPE_CHECKING:
    from cuattn._topk.problem import TopKProblem
    from cuattn._topk.request_sample import Call as SampleCall
    from cuattn._topk.request_sample import Expected as SampleExpected
    from cuattn._topk.request_sample import Request as SampleRequest

UINT8 = np.dtype(np.uint8)
NAMES = {name: name for name in Operands._fields}
PAIR = ("out", "indices")  # values, and where they are
STATS = ("stat", "stat_l")
NUMBERS = ("scale_value", "renormalize", "index_offset")  # the first of Options


def prepare(call: Call, kind: Callable[..., Any]) -> Any:
    """A call with its launches; where it takes more than these, or none, its results."""
    runtime, request, expected, operands, options, outs = call
    if runtime is None:
        if outs:
            return kind(*numpy_topk.run(call))
        arrays = {n: array for n, array in operands._asdict().items() if array is not None}
        computed = _computed(call, tuple(arrays))
        return Prepared(HOST, computed, arrays, options[: len(NUMBERS)], kind, NAMES)
    device = runtime.device(operands.x)
    names = NAMES
    if outs:
        names = NAMES | {field: f"out[{i}]" for i, field in enumerate(call.fields)}
    for name, array in (*operands._asdict().items(), *outs.items()):
        if array is not None and runtime.address(array) % array.itemsize:
            raise checks.misaligned(names[name], array)
    with runtime.on(device):
        if operands.scale is not None and operands.scale.dtype != expected.acc:
            operands = operands._replace(scale=operands.scale.astype(expected.acc))
            request = request._replace(scale=spec_of(operands.scale))
            call = call._replace(request=request, operands=operands)
        aligned, limits = runtime.address(operands.x) % 16 == 0, runtime.limits(device)
        direct = direct_outs(outs)
        specs = tuple((name, spec_of(array)) for name, array in direct.items())
        wants_lse = options.wants_lse
        launches = _planned(request, options.renormalize, wants_lse, aligned, limits, specs)
        if launches is None:
            made = prepare(_copied(call), lambda *results: list(results))
            results = made.launch() if isinstance(made, Prepared) else made
            return kind(*map(into, map(outs.get, call.fields), results))
        arrays = {**operands._asdict(), **direct}
        made = Prepared(runtime, launches, arrays, options[: len(NUMBERS)], kind, names)
        # By radix, what is relative to the rows comes after their states.
        by_radix = "stat" in launches.given[: launches.reads]
        # Nothing is selected, but there are rows: their states alone, and entries that are missing.
        alone = not launches.kernels and "stat" in call.fields and 0 not in expected.stat_shape
        if not by_radix and not alone and len(direct) == len(outs):
            return made
        state: Any = state_of_rows(call, direct) if by_radix or alone else None
        if by_radix:
            arrays |= {"stat": state.m, "stat_l": state.l}
        found = dict(zip(PAIR if by_radix else call.fields, made.results(), strict=True))
        if alone:
            found["out"] = runtime.xp.full(expected.shape, -np.inf, expected.dtype)
            found["indices"] = runtime.xp.full(expected.shape, -1, INT64)
        if state is not None:
            m_or_lse = state.m if request.result == "state" else state.lse
            found |= {"stat": m_or_lse, "stat_l": state.l}
        return kind(*(into(outs.get(name), found[name]) for name in call.fields))


def direct_outs(
    outs: Mapping[str, Any], alike: tuple[tuple[str, ...], ...] = (PAIR, STATS)
) -> Mapping[str, Any]:
    """The given results that kernels can write: these have their strides in common."""
    direct = dict(outs)
    for group in alike:
        if not row_layout.alike(outs[name] for name in group if name in outs):
            direct = {name: array for name, array in direct.items() if name not in group}
    return direct


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
    request: Request,
    renormalize: bool,
    wants_lse: bool,
    aligned: bool,
    limits: Limits,
    outs: tuple[tuple[str, ArraySpec], ...],
) -> Launches | None:
    """Launches of a checked request; None if no kernel can follow the strides of its arrays.

    `outs`: the results that come in.
    """
    from cuattn._topk.plan import MAX_LIST, OUTPUTS, plan_topk

    given = dict(outs)
    if request.k > MAX_LIST and request.result != "state":  # no kernel of them writes an lse
        given.pop("stat", None)
    problem = _problem(request, aligned, given)
    if problem is None:
        return None
    expected = expect(request)
    reads = [name for name in Operands._fields if getattr(request, name) is not None]
    returned: tuple[str, ...] = fields(request, wants_lse)
    results = {"out": Made(expected.shape, expected.dtype), "indices": Made(expected.shape, INT64)}
    stats = dict.fromkeys(returned, Made(expected.stat_shape, expected.acc))
    empty = 0 in (problem.layout.rows, problem.layout.cols, problem.k)
    plan = None if empty else plan_topk(problem, limits.compute_capability, limits.num_sms)
    relative = request.result in ("prob", "log_prob") and not renormalize
    if plan is not None and plan.radix and problem.softmax and (relative or "stat" in returned):
        reads += ["stat", "stat_l"]
        returned = PAIR
    else:
        results = stats | results
    writes = [name for name, _ in outs if name in results]
    made = {name: one for name, one in results.items() if name not in writes}
    if plan is None:
        return Launches(reads, writes, made, returned, ())
    if plan.workspace_bytes:
        made["partial"] = Made((plan.workspace_bytes,), UINT8)
    known = {"k": problem.k, "output": OUTPUTS.get(request.result, 0)}
    block: Block = (SOFTMAX_HEAD, plan.geometry, (TOPK, known))
    if plan.radix:
        workspace = "partial" if plan.workspace_bytes else 0
        block = (*block, (RADIX_WORKSPACE, {"workspace": workspace}))
    kernels = [(kernel, (*block, end)) for kernel, end in plan.launches]

    def lists(at: list[int]) -> list[int]:
        return [(at[-1] if plan.workspace_bytes else 0) + plan.lists_offset]

    return Launches(
        reads, writes, made, returned, kernels, numbers=NUMBERS, derived=(("lists",), lists)
    )


def _problem(request: Request, aligned: bool, given: Mapping[str, ArraySpec]) -> TopKProblem | None:
    """The problem of a checked request; None if no kernel can follow the strides of its arrays."""
    from cuattn._topk.problem import TopKProblem

    layout = layout_of(request, expect(request), given)
    if layout is None:
        return None
    row_bytes = [stride * request.x.dtype.itemsize for stride in layout.row_stride[0]]
    return TopKProblem(
        x=request.x.dtype.name,
        layout=layout,
        k=request.k,
        softmax=request.result != "top_k",
        masked=request.where is not None,
        aligned=aligned and all(step % 16 == 0 for step in row_bytes),
    )


def layout_of(
    request: Request | SampleRequest,
    expected: Expected | SampleExpected,
    given: Mapping[str, ArraySpec],
    per_row: tuple[tuple[int, ...], ...] = (),
) -> Layout | None:
    """Rows and columns of a selection; None if no kernel can follow the strides of its arrays.

    `given`: the results that come in; `per_row`: strides of more operands.
    """
    x, axis = request.x, request.axis
    shape, out_shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :]), expected.shape
    at = len(shape) - 1 if request.result == "state" else axis  # of the selected elements
    steps: Any = (
        row_layout.element_strides(given[name], like)
        if name in given
        else row_layout.packed(like, None, 1)
        for name, like in (("out", out_shape), ("stat", expected.stat_shape))
    )
    out, stat = steps
    out_rows = (*(out[:at] + out[at + 1 :])[:axis], 0, *(out[:at] + out[at + 1 :])[axis:])
    stat = (*stat[:axis], 0, *stat[axis:])
    reads: list[Any] = [row_layout.element_strides(m, x.shape) for m in (x, request.where)]
    reads.append(row_layout.element_strides(request.scale, shape))
    if any(strides is False for strides in reads):
        return None
    x_strides, where, scale = reads
    strides = (x_strides, None, where, None, scale, out_rows, stat, *per_row)
    rows = row_layout.join_dimensions(shape, (axis,), strides)
    if rows is None:
        return None
    cols = tuple((0 if s is None else s[axis],) for s in (x_strides, None, where, None))
    cols += ((0,), (out[at],), (0,))
    return Layout(rows.row_size, (x.shape[axis],), rows.row_stride, cols)


def state_of_rows(call: Call | SampleCall, direct: Mapping[str, Any]) -> SoftmaxState:
    """m and l of each row, by a pass of their own; in the results, if it is a state's."""
    runtime, request, expected, operands, options, _ = call
    rows = softmax_request.Request(
        "state",
        (request.axis,),
        request.x,
        where=request.where,
        scale=request.scale,
        dtype=expected.acc,
    )
    arrays = softmax_request.Operands(operands.x, where=operands.where, scale=operands.scale)
    of_rows = softmax_request.Call(runtime, rows, arrays, options.scale)
    if request.result == "state" and "stat" in direct:
        of_rows = of_rows._replace(stat=direct["stat"], stat_l=direct["stat_l"])
    return SoftmaxState(*run_softmax(of_rows))


def _copied(call: Call) -> Call:
    """The same call on C-contiguous copies, for layouts that no kernel follows (RANKS)."""
    runtime, request, expected, operands, options, _ = call
    copies = {}
    for name, array in operands._asdict().items():
        if array is not None:
            wide = array
            if name == "where":
                wide = runtime.xp.broadcast_to(array, operands.x.shape)
            copies[name] = runtime.xp.ascontiguousarray(wide)
    specs: dict[str, Any] = {name: spec_of(array) for name, array in copies.items()}
    return Call(runtime, request._replace(**specs), expected, Operands(**copies), options)
