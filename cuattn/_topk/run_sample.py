"""The calls of `sample` and `sample_state` on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn._arrays import checks, row_layout
from cuattn._arrays.outputs import into
from cuattn._arrays.row_layout import FLOAT64, OPERANDS, ArraySpec, spec_of
from cuattn._device.kernel import Kernel, Limits
from cuattn._device.launches import Block, Launches, Made, Prepared
from cuattn._device.params import (
    RADIX_WORKSPACE,
    SAMPLE,
    SOFTMAX_HEAD,
    TOPK,
    sample_strides,
)
from cuattn._topk.request import INT64
from cuattn._topk.request_sample import Call, Operands, Request, expect, fields
from cuattn._topk.run import STATS, UINT8, direct_outs, layout_of, state_of_rows

if TYPE_CHECKING:
    from cuattn._topk.plan_sample import SamplePlan
    from cuattn._topk.problem import SampleProblem

# What kernels call the results and the operands.
RESULTS = {"log_prob": "out", "logits": "out", "m": "stat", "l": "stat_l"}
ARRAYS = {name: "numbers" if name == "rows" else name for name in Operands._fields}
NUMBERS = ("scale_value", "seed_value", "offset_value", "index_offset", "top_p", "log_min_p")
ALIKE = (("out", "values", "indices"), STATS)


def prepare(call: Call, kind: Callable[..., Any]) -> Any:
    """A call with its launches; where it takes more than these, or none, its results."""
    runtime, request, expected, operands, options, outs = call
    names = {field: name for name, field in ARRAYS.items()}
    results = [RESULTS.get(name, name) for name in call.fields]
    outs = dict(zip(results, outs.values(), strict=False))
    names |= {name: f"out[{i}]" if len(outs) > 1 else "out" for i, name in enumerate(outs)}
    given = {ARRAYS[n]: array for n, array in operands._asdict().items() if array is not None}
    for name, array in (*given.items(), *outs.items()):
        if runtime.address(array) % array.itemsize:
            raise checks.misaligned(names[name], array)
    device = runtime.device(operands.x)
    with runtime.on(device):
        if 0 in (operands.x.size, request.num):
            return kind(*_nothing(call, outs))
        operands = _converted(operands, expected.acc)
        request = request._replace(**{n: spec_of(a) for n, a in operands._asdict().items()})
        call = call._replace(request=request, operands=operands)
        aligned, limits = runtime.address(operands.x) % 16 == 0, runtime.limits(device)
        direct = direct_outs(outs, ALIKE)
        specs = tuple((name, spec_of(array)) for name, array in direct.items())
        launches = _planned(request, aligned, limits, specs)
        if launches is None:
            made = prepare(_copied(call), lambda *found: list(found))
            found = made.launch() if isinstance(made, Prepared) else made
            return kind(*map(into, map(outs.get, results), found))
        top_p = options.top_p if request.top_p else 2.0
        log_min_p = math.log(options.min_p) if request.min_p else -math.inf
        numbers = (*options[: NUMBERS.index("top_p")], top_p, log_min_p)
        arrays = {ARRAYS[name]: array for name, array in operands._asdict().items()}
        arrays |= direct
        # What needs the states of rows comes after them.
        needs_state = "stat" in launches.given[: launches.reads]
        if needs_state:
            state = state_of_rows(call, direct)
            arrays |= {"stat": state.m, "stat_l": state.l}
        made = Prepared(runtime, launches, arrays, numbers, kind, names)
        if not needs_state and len(direct) == len(outs):
            return made
        own = [name for name in results if not needs_state or name not in STATS]
        by_name = dict(zip(own, made.results(), strict=True))
        if needs_state:
            by_name |= {"stat": state.m, "stat_l": state.l}
        return kind(*(into(outs.get(name), by_name[name]) for name in results))


def _nothing(call: Call, outs: Mapping[str, Any]) -> list[Any]:
    """Results where nothing can be drawn: there are no elements, or no draws."""
    runtime, expected = call.runtime, call.expected
    state = state_of_rows(call, outs) if call.request.result == "state" else None
    found = []
    for name in call.fields:
        field = RESULTS.get(name, name)
        if field in STATS:
            array = getattr(state, name)
        elif field == "indices":
            array = runtime.xp.full(expected.shape, -1, INT64)
        else:
            dtype = FLOAT64 if name == "values" else expected.acc
            array = runtime.xp.full(expected.shape, -np.inf, dtype)
        found.append(into(outs.get(field), array))
    return found


def _converted(operands: Operands, acc: np.dtype) -> Operands:
    """Numbers of rows as kernels read them: scales as accumulators, integers of 64 bits."""
    scale, *integers = operands[2:]
    if scale is not None and scale.dtype != acc:
        scale = scale.astype(acc)
    wide = (
        one if one is None or one.dtype.itemsize == 8 else one.astype(np.int64) for one in integers
    )
    return Operands(*operands[:2], scale, *wide)


def _copied(call: Call) -> Call:
    """The same call on C-contiguous copies, for layouts that no kernel follows (RANKS)."""
    runtime, xp = call.runtime, call.runtime.xp
    x, axis = call.operands.x, call.request.axis
    copies: dict[str, Any] = {}
    for name, array in call.operands._asdict().items():
        if array is not None:
            like = x.shape if name in ("x", "where") else (*x.shape[:axis], 1, *x.shape[axis + 1 :])
            per_row = name == "seed" and not array.ndim  # a number, though it is on the device
            copies[name] = array if per_row else xp.ascontiguousarray(xp.broadcast_to(array, like))
    specs: dict[str, Any] = {name: spec_of(array) for name, array in copies.items()}
    request = call.request._replace(**specs)
    return Call(runtime, request, call.expected, Operands(**copies), call.options)


@lru_cache(maxsize=4096)
def _planned(
    request: Request, aligned: bool, limits: Limits, outs: tuple[tuple[str, ArraySpec], ...]
) -> Launches | None:
    """Launches of a checked request; None if no kernel can follow the strides of its arrays.

    `outs`: the results that come in.
    """
    from cuattn._topk.plan_sample import plan_sample

    found = _problem(request, aligned, dict(outs))
    if found is None:
        return None
    problem, strides = found
    plan = plan_sample(problem, request.num, request.top_k, request.top_p, request.min_p, *limits)
    reads = [ARRAYS[name] for name in Operands._fields if getattr(request, name) is not None]
    returned = [RESULTS.get(name, name) for name in fields(request.result)]
    if plan.needs_state:
        reads += STATS
        returned = [name for name in returned if name not in STATS]
    expected = expect(request)
    dtypes = {"indices": INT64, "values": FLOAT64}
    made = {
        name: Made(
            expected.stat_shape if name in STATS else expected.shape,
            dtypes.get(name, expected.acc),
        )
        for name in returned
    }
    writes = [name for name, _ in outs if name in made]
    made = {name: one for name, one in made.items() if name not in writes}
    places = _places(plan, problem.layout.rows)
    if workspace := places.pop("end"):
        made["partial"] = Made((workspace,), UINT8)

    def derived(at: list[int]) -> list[int]:
        return [at[-1] + place if workspace else 0 for place in places.values()]

    return Launches(
        reads,
        writes,
        made,
        returned,
        [*_kernels(plan, request, strides, "partial" if workspace else 0)],
        numbers=NUMBERS,
        derived=([*places], derived),
    )


def _problem(
    request: Request, aligned: bool, given: Mapping[str, ArraySpec]
) -> tuple[SampleProblem, bytes] | None:
    """The problem of a checked request and the strides of seeds, offsets and numbers of rows; None
    if no kernel can follow those of its arrays."""
    from cuattn._topk.problem import SampleProblem

    shape = (*request.x.shape[: request.axis], 1, *request.x.shape[request.axis + 1 :])
    of_rows: list[Any] = [
        row_layout.element_strides(one, shape)
        for one in (request.seed, request.offset, request.rows)
    ]
    if request.rows is None and request.counts_rows:
        of_rows[-1] = row_layout.packed(shape, None, 1)  # a row's offset is its number
    if False in of_rows:
        return None
    outs = dict([("out", given[name]) for name in ALIKE[0] if name in given][:1])
    outs |= {name: spec for name, spec in given.items() if name == "stat"}
    layout = layout_of(request, expect(request), outs, tuple(of_rows))
    if layout is None:
        return None
    known, more = layout.row_stride[: len(OPERANDS)], layout.row_stride[len(OPERANDS) :]
    seed, offset, number = more
    tail = sample_strides(len(layout.row_size)).pack(
        seed_stride=seed, offset_stride=offset, number_stride=number
    )
    row_bytes = [stride * request.x.dtype.itemsize for stride in known[0]]
    problem = SampleProblem(
        x=request.x.dtype.name,
        layout=replace(layout, row_stride=known),
        k=0,
        masked=request.where is not None,
        aligned=aligned and all(step % 16 == 0 for step in row_bytes),
    )
    return problem, tail


def _places(plan: SamplePlan, rows: int) -> dict[str, int]:
    """Where in the workspace things lie, and its end: what passes use one after the other; then
    which rows are finished, their cuts, and states."""
    from cuattn._topk.plan_sample import CANDIDATE

    places = {f"lists{i}": one.plan.lists_offset for i, one in enumerate(plan.passes)}
    end = plan.lists_bytes
    if len(plan.passes) > 1:
        for name, size in (("finished", CANDIDATE), ("cut", CANDIDATE), ("own_m", 8), ("own_l", 8)):
            places[name] = end
            end += rows * size
    return {**places, "end": end}


def _kernels(
    plan: SamplePlan, request: Request, strides: bytes, workspace: str | int
) -> Iterator[tuple[Kernel, Block]]:
    """Kernels with their parameters."""
    from cuattn._topk.plan import OUTPUTS

    output = OUTPUTS["state" if request.result == "state" else "log_prob"]
    top_k = request.top_k or request.x.shape[request.axis]
    for i, one in enumerate(plan.passes):
        shared = one.finishes or one.looks
        stats: dict[str, Any] = {"stat": "own_m", "stat_l": "own_l"} if shared else {}
        if plan.needs_state and one.lists:  # which adds them up once more
            stats = {"stat": 0, "stat_l": 0}
        block: Block = (
            (SOFTMAX_HEAD, stats),
            one.plan.geometry,
            (TOPK, {"lists": f"lists{i}", "k": one.k, "output": output}),
            (
                SAMPLE,
                {
                    "finished": "finished" if shared else 0,
                    "cut": "cut" if one.cuts else 0,
                    "num": request.num,
                    "top_k": top_k,
                },
            ),
            strides,
        )
        if one.plan.radix:
            block = (*block, (RADIX_WORKSPACE, {"workspace": workspace}))
        for kernel, end in one.plan.launches:
            yield kernel, (*block, end)
