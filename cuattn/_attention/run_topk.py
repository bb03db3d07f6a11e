"""The calls of `attention_topk` on a device: plan, and cast what no kernel can read."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from cuattn._arrays.results import SoftmaxTopK, SoftmaxTopKState
from cuattn._arrays.row_layout import ArraySpec, packed, spec_of
from cuattn._attention import numpy_topk
from cuattn._attention.request import Expected, Options
from cuattn._attention.request_topk import OUTPUTS, TopKCall, stat_shape
from cuattn._attention.run import INTEGERS
from cuattn._attention.run_problem import problem_of, tail_of
from cuattn._attention.run_score import score_arrays_of
from cuattn._attention.views import (
    Arrays,
    canonical_spec,
    canonical_specs,
    cast,
    is_vector,
    specs_of,
    strides_of,
)
from cuattn._device.host import HOST, Computed
from cuattn._device.kernel import Limits
from cuattn._device.launches import Block, Launches, Made, Prepared
from cuattn._device.params import ATTENTION_POINTERS, ATTENTION_TOPK

UINT8 = np.dtype(np.uint8)
READS = tuple(name for name in Arrays._fields if name != "v")


def prepare_topk(call: TopKCall) -> Any:
    """A call with its launches."""
    runtime, outs = call.runtime, call.outs or ()
    kind: Any = SoftmaxTopKState if call.output == "state" else SoftmaxTopK
    arrays = call.arrays._asdict()
    given = {name: arrays[name] for name in READS if arrays[name] is not None}
    names = {name: name for name in READS}
    if runtime is None:
        if outs or any(name in given for name in INTEGERS):  # whose values are checked
            return kind(*numpy_topk.run(call))
        return Prepared(HOST, _computed(call, tuple(given)), given, (), kind, names)
    device = runtime.device(call.arrays.q)
    with runtime.on(device):
        cast_arrays = cast(call.arrays, call.expected.acc, call.expected.fractional, runtime.xp)
    aligned = not any(runtime.address(array) % 16 for array in cast_arrays[:2])
    launches = _planned(
        specs_of(cast_arrays),
        tuple(map(spec_of, outs)),
        call.expected,
        call.layout,
        call.options,
        (call.num, call.output, call.index_offset),
        aligned,
        runtime.limits(device),
    )
    results = dict(zip(call.results, outs, strict=False))
    names |= {field: f"out[{i}]" for i, field in enumerate(results)}
    if runtime.xp is np:  # the values of integers are checked at every call
        names |= dict.fromkeys(INTEGERS, "")
    return Prepared(runtime, launches, {**cast_arrays._asdict(), **results}, (), kind, names)


def _computed(call: TopKCall, given: tuple[str, ...]) -> Computed:
    """What is left of a call on NumPy arrays, without these arrays."""
    call = call._replace(arrays=call.specs)

    def run(runtime: Any, arrays: list[Any], numbers: tuple[Any, ...]) -> list[Any]:
        named = dict(zip(given, arrays, strict=True))
        return numpy_topk.run(call._replace(arrays=Arrays(v=named["k"], **named)))

    return Computed(given, run)


@lru_cache(maxsize=4096)
def _planned(
    given: Arrays,
    outs: tuple[ArraySpec, ...],
    expected: Expected,
    layout: str,
    options: Options,
    selection: tuple[int, str, int],
    aligned: bool,
    limits: Limits,
) -> Launches:
    """Launches of a call, if there is anything to compute.

    `outs` may be empty. `selection`: num, output and index_offset. `aligned`: q and k start on
    16-byte boundaries, as new memory does.
    """
    from cuattn._attention.plan_topk import plan_topk

    num, output, index_offset = selection
    call = TopKCall(None, given, given, expected, options, layout, num, output, index_offset)
    results = call.results
    reads = [name for name in READS if getattr(given, name) is not None]
    writes: tuple[str, ...] = ()
    made = {name: Made(*one) for name, one in results.items()}
    specs = {name: ArraySpec(one.shape, packed(one.shape, None, one.dtype.itemsize), one.dtype)
             for name, one in made.items()}  # fmt: skip
    if outs:
        writes, made, specs = tuple(results), {}, dict(zip(results, outs, strict=True))
    sizes = expected.sizes
    if not sizes.batch * sizes.heads * sizes.seqlen_q or (not num and output != "state"):
        return Launches(reads, writes, made, tuple(results), ())
    operands = canonical_specs(given, (specs["out"],), sizes, layout)
    stats = {
        name: _stat_spec(specs[name], layout) if name in specs else None for name in ("lse", "l")
    }
    operands = operands._replace(lse=stats["lse"])
    vector = aligned and is_vector(operands.q) and is_vector(operands.k)
    problem = problem_of(operands, options, sizes.batch, False, vector, False)
    plan = plan_topk(problem, num, limits.num_sms)
    tail = tail_of(operands, options, problem, plan.row_blocks, plan.heads_in_l2, False)
    ends = [*accumulate(plan.bytes)]
    if ends[-1]:
        made["partial"] = Made((ends[-1],), UINT8)
    known = {
        "index_offset": index_offset,
        "part": plan.part,
        "parts": plan.parts,
        "splits": plan.splits,
        "output": OUTPUTS.index(output),
        "indices_stride": strides_of(canonical_spec(specs["indices"], layout), 4),
        "l_stride": strides_of(stats["l"], 3),
    }
    kernels = []
    for first, number in plan.passes:
        fields = known | {"first": first, "count": number}
        block: Block = (ATTENTION_POINTERS, tail, score_arrays_of({}), (ATTENTION_TOPK, fields))
        kernels += [(kernel, block) for kernel in (plan.kernel, plan.merge) if kernel is not None]

    def workspace(at: list[int]) -> list[int]:
        """Addresses of states, lists and bounds; 0: none."""
        starts = zip((0, *ends), plan.bytes, strict=False)
        return [at[-1] + start if size else 0 for start, size in starts]

    derived = ("states", "lists", "bounds"), workspace
    return Launches(reads, writes, made, tuple(results), kernels, derived=derived)


def _stat_spec(spec: ArraySpec, layout: str) -> ArraySpec:
    """The spec of the canonical view of m or l."""
    shape, strides = (stat_shape(one, layout) for one in spec[:2])
    return ArraySpec(shape, strides, spec.dtype)
