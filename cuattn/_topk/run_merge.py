"""The merges of states on a device."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from cuattn._arrays.outputs import into
from cuattn._arrays.results import LogitsState, SoftmaxState
from cuattn._device.launches import Launches, Made, Prepared
from cuattn._device.params import STATE_MERGE, TOPK_STATE_MERGE
from cuattn._topk.request import MergeCall


def prepare_merge(call: MergeCall) -> Any:
    """A merge of two states with its launch; its results where they are copied."""
    runtime, arrays = call.runtime, call.arrays
    kind: Any = call.kind
    with runtime.on(runtime.device(arrays[0])):
        arrays = [
            array if array.flags.c_contiguous else runtime.xp.ascontiguousarray(array)
            for array in arrays
        ]
        fields = kind._fields
        names = {
            f"{field}_{side}": f"{side}[{i}]" for side in "ab" for i, field in enumerate(fields)
        }
        given = dict(zip(names, arrays, strict=True))
        outs = dict(zip(fields, call.outs, strict=False))
        direct = {field: array for field, array in outs.items() if array.flags.c_contiguous}
        specs = tuple((a.shape, a.dtype) for a in arrays[: len(fields)])
        launches = _planned_merge(kind, specs, tuple(direct))
        names |= {field: f"out[{i}]" for i, field in enumerate(outs)}
        prepared = Prepared(runtime, launches, given | direct, (), kind, names)
        if len(direct) == len(outs):
            return prepared
        return kind(*map(into, call.outs, prepared.results()))


@lru_cache(maxsize=4096)
def _planned_merge(
    kind: Any, specs: tuple[tuple[tuple[int, ...], np.dtype], ...], writes: tuple[str, ...]
) -> Launches:
    """The launch that merges two states of these shapes and dtypes; `writes`: what comes in."""
    from cuattn._softmax.plan import plan_state_merge
    from cuattn._topk.plan_radix import plan_topk_state_merge

    made = {field: Made(*spec) for field, spec in zip(kind._fields, specs, strict=True)}
    (shape, dtype), k = specs[0], made["values"].shape[-1] if "values" in made else 0
    logits = kind is LogitsState
    fields = kind._fields if k or logits else ("m", "l")  # nothing selected
    reads = [f"{field}_{side}" for side in "ab" for field in fields]
    n = math.prod(shape)
    kernels: list[Any] = []
    if n and k:
        kernel = plan_topk_state_merge(dtype.name, made["values"].dtype.name, n, k)
        kernels.append((kernel, [(TOPK_STATE_MERGE, {"rows": n, "k": k})]))
    elif n:
        kernels.append((plan_state_merge(dtype.name, n, logits), [(STATE_MERGE, {"n": n})]))
    made = {field: one for field, one in made.items() if field not in writes}
    in_place = kind in (SoftmaxState, LogitsState)
    return Launches(reads, writes, made, kind._fields, kernels, in_place=in_place)
