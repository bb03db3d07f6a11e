"""The calls of the softmax functions on a device: plan, and copy what no kernel can read.

What depends on shapes, strides, dtypes and options alone is planned once and remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from cuattn._arrays import checks, row_layout
from cuattn._arrays.outputs import into
from cuattn._arrays.row_layout import ArraySpec, spec_of
from cuattn._device.host import HOST, Computed
from cuattn._device.kernel import Limits
from cuattn._device.launches import Launches, Made, Prepared, one_or_all
from cuattn._device.params import SOFTMAX_HEAD
from cuattn._softmax import numpy_logits, numpy_segments, numpy_softmax
from cuattn._softmax.request import (
    NAMES,
    NAMES_OF_GRADIENT,
    NAMES_OF_STATE,
    NAMES_OF_TWO,
    Call,
    Operands,
    Request,
    expect,
)

UINT8 = np.dtype(np.uint8)
INT64_MAX = np.iinfo(np.int64).max

# What a call returns: the transform, and numbers per row (of a state all, with m the first).
RETURNED = {
    **dict.fromkeys(("prob", "log_prob", "grad", "log_grad", "loss_grad"), ("out",)),
    "prob_lse": ("out", "stat"),
    **dict.fromkeys(("lse", "loss", "entropy"), ("stat",)),
    **dict.fromkeys(("state", "loss_lse"), ("stat", "stat_l")),
    "logits": ("stat", "stat_l", "stat_t", "stat_logit"),
}
CHECKED = ("offsets", "labels")  # whose values are, at every call, where they are on the host
MISALIGNED = {"m": "state.m", "l": "state.l"}  # what errors call what signatures number
SELECTED = ("state[2]", "state[3]")  # values and indices of a state, which nothing is made of
OF_NOTHING = {"out": 0, "stat": -np.inf, "stat_l": 0, "stat_t": 0, "stat_logit": np.nan}
NUMBERS = ("scale_value", "grad_value", "ignore_index", "index_offset")  # all but one: of labels


def prepare(call: Call, kind: Callable[..., Any] = one_or_all) -> Any:
    """A call with its launches; where it takes more than these, or none, its results."""
    runtime, request, operands, out, stat = call[:3] + (call.out, call.stat)
    returned = RETURNED[request.result]
    names = NAMES if request.y is None else NAMES_OF_GRADIENT
    if out is not None and stat is not None:
        names = NAMES_OF_TWO
    elif call.stat_l is not None:
        names = NAMES_OF_STATE
    numbers: tuple[float, ...] = (call.scale,)
    if request.labels is not None:
        numbers += (call.grad, call.ignore_index, call.index_offset)
    unread = SELECTED if operands.m is not None else ()
    if runtime is None:
        checked = any(getattr(operands, name) is not None for name in CHECKED)
        if out is not None or stat is not None or checked:
            return kind(*_compute(call))
        arrays = {n: array for n, array in operands._asdict().items() if array is not None}
        computed = _computed(call, tuple(arrays))
        return Prepared(HOST, computed, arrays, numbers, kind, names, unread)
    device = runtime.device(operands.x)
    arrays = {**operands._asdict(), **{name: getattr(call, name) for name in returned}}
    for field, array in arrays.items():
        if array is not None and runtime.address(array) % array.itemsize:
            expect(request)  # so that its errors win over this one
            raise checks.misaligned(MISALIGNED.get(field, names[field]), array)
    for name in CHECKED:
        if isinstance(getattr(operands, name), np.ndarray):
            names = names | {name: ""}
    with runtime.on(device):
        request, cast = _cast(runtime.xp, request, operands)
        aligned, limits = runtime.address(operands.x) % 16 == 0, runtime.limits(device)
        given = [arrays[name] for name in returned]
        # Kernels write numbers of a row at one offset; where those given differ, beside them.
        direct = call.stat_l is None or row_layout.alike(given)
        launches = _planned(
            request, spec_of(out), spec_of(stat if direct else None), aligned, limits
        )
        if launches is None:
            request, copies = _copied(runtime.xp, request, cast)
            nothing: dict[str, Any] = dict.fromkeys(returned)
            call = call._replace(request=request, operands=copies, **nothing)
            return kind(*map(into, given, run(call)))
        if cast is not operands:
            arrays |= cast._asdict()
        prepared = Prepared(runtime, launches, arrays, numbers, kind, names, unread)
        if launches.kernels and direct:
            return prepared
        results = prepared.results()
        if not launches.kernels:
            of_nothing = OF_NOTHING | ({"stat": 0} if request.result == "entropy" else {})
            results = [*map(into, results, (of_nothing[name] for name in returned))]
        return kind(*map(into, given, results))


def run(call: Call) -> list[Any]:
    """All results of a call."""
    made = prepare(call, lambda *results: list(results))
    return made.launch() if isinstance(made, Prepared) else made


def _compute(call: Call) -> list[Any]:
    """All results of a call on NumPy arrays."""
    result = call.request.result
    if result in numpy_logits.RESULTS:
        return numpy_logits.run(call)
    found = (numpy_softmax if call.operands.offsets is None else numpy_segments).run(call)
    return [getattr(found, name) for name in RETURNED[result]]


def _computed(call: Call, given: tuple[str, ...]) -> Computed:
    """What is left of a call on NumPy arrays, without these arrays."""
    call, few = call._replace(operands=Operands(None)), numpy_softmax.few(call.request, given)

    def run(runtime: Any, arrays: list[Any], numbers: tuple[Any, ...]) -> list[Any]:
        if few is not None and numbers[0] == 1 and (found := few(arrays[0])) is not None:
            return found
        operands = Operands(**dict(zip(given, arrays, strict=True)))
        return _compute(call._replace(operands=operands, scale=numbers[0]))

    return Computed(given, run)


@lru_cache(maxsize=4096)
def _planned(
    request: Request, out: ArraySpec | None, stat: ArraySpec | None, aligned: bool, limits: Limits
) -> Launches | None:
    """Launches of a checked request; None if no kernel can follow the strides of its arrays.

    `aligned`: the first element of x is on a 16-byte boundary.
    """
    from cuattn._softmax.plan import plan_softmax
    from cuattn._softmax.problem import SoftmaxProblem

    expected = expect(request)
    x, returned = request.x, RETURNED[request.result]
    reads = [name for name in Operands._fields if getattr(request, name) is not None]
    stats = [name for name in returned if name != "out"]
    given = {"out": out, **dict.fromkeys(stats, stat)}
    writes = [name for name, spec in given.items() if spec is not None]
    order = row_layout.memory_order(x)
    made = {}
    if out is None:
        strides = row_layout.packed(x.shape, order, expected.dtype.itemsize)
        out = ArraySpec(x.shape, strides, expected.dtype)
        made["out"] = Made(x.shape, expected.dtype, order)
    if stat is None:
        strides = row_layout.packed(expected.stat_shape, None, expected.stat_dtype.itemsize)
        stat = ArraySpec(expected.stat_shape, strides, expected.stat_dtype)
        made |= dict.fromkeys(stats, Made(expected.stat_shape, expected.stat_dtype))
    made = {name: one for name, one in made.items() if name in returned}
    if not request.keepdims:
        stat = row_layout.expanded(stat, request.axes)
    shape, axes, scale = x.shape, request.axes, request.scale
    operands = [x, request.y, request.where, request.weight, scale, out, stat]
    if request.m is not None and request.l is not None:
        # In the places of what only gradients and weighted sums have.
        operands[1], operands[3] = (row_layout.expanded(s, axes) for s in (request.m, request.l))
    if request.labels is not None:
        operands[1] = row_layout.expanded(request.labels, axes)
    if request.lse is not None:
        grad = request.grad and row_layout.padded(request.grad, len(expected.stat_shape))
        operands[2] = grad and row_layout.expanded(grad, axes)
        operands[3] = row_layout.expanded(request.lse, axes)
    if request.offsets is not None:
        # Ragged rows: a new first dimension, the segments, in which x and out do not move.
        shape, axes = (expected.row_shape[0], *shape), (1,)
        scale = scale and row_layout.expanded(
            row_layout.padded(scale, len(expected.row_shape)), axes
        )
        operands = [x, request.y, None, None, scale, out, None]
    steps = [row_layout.element_strides(operand, shape) for operand in operands]
    if any(s is False for s in steps):
        return None
    layout = row_layout.join_dimensions(shape, axes, tuple(steps), request.offsets is not None)
    if layout is None:
        return None
    # Of no columns, too: an lse that is given, a loss of rows whose labels are ignored.
    of_nothing = (request.m or request.result in ("loss", "loss_lse")) and "stat" in returned
    if layout.rows == 0 or (layout.cols == 0 and not of_nothing):
        return Launches(reads, writes, made, returned, ())
    row_bytes = [stride * x.dtype.itemsize for stride in layout.row_stride[0]]
    problem = SoftmaxProblem(
        result="loss" if request.result == "loss_lse" else request.result,
        x=x.dtype.name,
        acc=expected.acc.name,
        out=expected.dtype.name,
        layout=layout,
        masked=request.where is not None,
        weighted=request.weight is not None,
        aligned=aligned and all(step % 16 == 0 for step in row_bytes),
        offsets=None if request.offsets is None else request.offsets.dtype.name,
        segments=0 if request.offsets is None else expected.row_shape[0],
        state=(state := request.m or request.lse) and state.dtype.name,
    )
    plan = plan_softmax(problem, limits.compute_capability, limits.num_sms)
    if plan.workspace_bytes:
        made["partial"] = Made((plan.workspace_bytes,), UINT8)
    places: dict[str, Any] = {} if request.m is None else {"y": "m", "weight": "l"}
    if request.labels is not None:
        places = {"y": "labels", "label_bytes": request.labels.dtype.itemsize}
        places["in_part"] = int(request.in_part)
        places |= {} if request.lse is None else {"weight": "lse"}
        places |= {} if request.grad is None else {"where": "grad"}
    kernels = [(kernel, ((SOFTMAX_HEAD, places), plan.geometry)) for kernel in plan.kernels]
    in_place = request.m is None or "stat" not in writes  # else an lse may stand where m does
    numbers = NUMBERS[: 1 if request.labels is None else None]
    return Launches(reads, writes, made, returned, kernels, numbers=numbers, in_place=in_place)


def _cast(xp: Any, request: Request, operands: Operands) -> tuple[Request, Operands]:
    """Scales, weights and offsets as kernels read them: the accumulator's dtype; contiguous."""
    expected = expect(request)
    cast = {}
    for name in ("scale", "weight", "grad"):
        array = getattr(operands, name)
        if array is not None and array.dtype != expected.acc:
            cast[name] = array.astype(expected.acc)
    if operands.labels is not None and operands.labels.dtype not in (np.int32, np.int64):
        cast["labels"] = _signed(xp, operands.labels)
    if operands.offsets is not None and operands.offsets.strides != (operands.offsets.itemsize,):
        cast["offsets"] = xp.ascontiguousarray(operands.offsets)
    if not cast:
        return request, operands
    specs: dict[str, Any] = {name: spec_of(array) for name, array in cast.items()}
    return request._replace(**specs, dtype=expected.dtype), operands._replace(**cast)


def _signed(xp: Any, labels: Any) -> Any:
    """Labels as int64: those beyond it are no element of any row, and stay so."""
    if labels.dtype == np.uint64:
        labels = xp.minimum(labels, np.uint64(INT64_MAX))
    return labels.astype(np.int64)


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
