"""The calls of merges on a device: plan, and copy parts that are not alike."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from cuattn._arrays.row_layout import ArraySpec, packed, spec_of
from cuattn._attention import numpy_merge
from cuattn._attention.request_merge import MergeCall
from cuattn._attention.views import (
    canonical_lse,
    canonical_spec,
    is_vector,
    strides_of,
    whole_elements,
)
from cuattn._device.launches import Launches, Made, Prepared, one_or_all
from cuattn._device.params import ATTENTION_MERGE

RESULTS = ("out", "lse")
# Of `merge_attention`; what `merge_attention_states` merges are views of its arguments.
NAMES = {"out0": "out_a", "out1": "out_b", "lse0": "lse_a", "lse1": "lse_b"}
NAMES |= {"out": "out[0]", "lse": "out[1]"}


def prepare_merge(call: MergeCall) -> Any:
    """A merge with its launch on the device of its arrays, or merged where NumPy computes it."""
    runtime, given = call.runtime, call.out or ()
    if runtime is None:
        results = given or tuple(np.empty(*one) for one in call.expected)
        numpy_merge.merge(*call.views(*results))
        return results
    with runtime.on(runtime.device(call.owner)):
        outs, lses = (
            _alike(runtime, [whole_elements(runtime.xp, part) for part in parts])
            for parts in (call.outs, call.lses)
        )
    aligned = not any(runtime.address(array) % 16 for array in (*outs, *given[:1]))
    specs = tuple(spec_of(parts[0]) for parts in (outs, lses) if parts)
    results = tuple(map(spec_of, given)) or tuple(
        ArraySpec(shape, packed(shape, None, dtype.itemsize), dtype)
        for shape, dtype in call.expected
    )
    launches = _planned(specs, results, len(outs), bool(given), call.layout, aligned)
    arrays = {f"out{i}": part for i, part in enumerate(outs)}
    arrays |= {f"lse{i}": part for i, part in enumerate(lses)}
    arrays |= {"owner": call.owner, **dict(zip(RESULTS, given, strict=False))}
    return Prepared(runtime, launches, arrays, (), one_or_all, NAMES)


@lru_cache(maxsize=4096)
def _planned(
    parts: tuple[ArraySpec, ...],
    results: tuple[ArraySpec, ...],
    count: int,
    given: bool,
    layout: str,
    aligned: bool,
) -> Launches:
    """The launch that merges `count` parts, out and lse of the first of which are `parts`.

    `given`: the results come in. `aligned`: parts and out start on 16-byte boundaries, as new
    memory does.
    """
    from cuattn._attention.plan import plan_attention_merge

    out, lse = canonical_spec(results[0], layout), canonical_lse(results[1])
    first = parts or results  # of no part, strides that nobody asks for
    part, part_lse = canonical_spec(first[0], layout), canonical_lse(first[1])
    reads = [*(f"out{i}" for i in range(count)), *(f"lse{i}" for i in range(count))] or ["owner"]
    made = {n: Made(r.shape, r.dtype) for n, r in zip(RESULTS, results, strict=True)}
    kernels = []
    batch, heads, rows, columns = out.shape
    size = batch * heads * rows
    if size:
        vector = aligned and is_vector(part) and is_vector(out)
        kernel = plan_attention_merge(out.dtype.name, lse.dtype.name, size, columns, vector)
        fields = {
            "outs": "out0" if count else 0,
            "lses": "lse0" if count else 0,
            "parts": count,
            "batch": batch,
            "heads": heads,
            "rows": rows,
            "columns": columns,
            "outs_stride": ("outs_step", *strides_of(part, 4)),
            "lses_stride": ("lses_step", *strides_of(part_lse, 3)),
            "out_stride": strides_of(out, 4),
            "lse_stride": strides_of(lse, 3),
        }
        kernels.append((kernel, [(ATTENTION_MERGE, fields)]))

    def steps(at: list[int]) -> tuple[int, ...]:
        """Elements from one part to the next."""
        if count < 2:
            return 0, 0
        return (at[1] - at[0]) // out.dtype.itemsize, (
            at[count + 1] - at[count]
        ) // lse.dtype.itemsize

    derived = ("outs_step", "lses_step"), steps
    writes = RESULTS if given else ()
    made = {} if given else made
    return Launches(reads, writes, made, RESULTS, kernels, derived=derived)


def _alike(runtime: Any, arrays: list[Any]) -> list[Any]:
    """Arrays of equal strides, equally far apart: as they are, or copies."""
    strides = {array.strides for array in arrays}
    addresses = [runtime.address(array) for array in arrays]
    steps = {b - a for a, b in zip(addresses, addresses[1:], strict=False)}
    if len(strides) <= 1 and len(steps) <= 1 and all(s % arrays[0].itemsize == 0 for s in steps):
        return arrays
    return list(runtime.xp.stack(arrays))
