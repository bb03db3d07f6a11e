"""The calls of merges on a device: allocate, pack, launch."""

from __future__ import annotations

from typing import Any

from cuattn._arrays.row_layout import spec_of
from cuattn._attention.plan import plan_attention_merge
from cuattn._attention.request_merge import MergeCall
from cuattn._attention.views import is_vector, strides_of
from cuattn._device.params import ATTENTION_MERGE


def run_merge(call: MergeCall) -> tuple[Any, Any]:
    """Launch a merge on the device of its arrays; results that are not given are allocated."""
    runtime, results = call.runtime, call.out
    with runtime.on(runtime.device(call.owner)):
        if results is None:
            out_spec, lse_spec = call.expected
            results = runtime.empty(*out_spec), runtime.empty(*lse_spec)
        outs, lses, out, lse = call.views(runtime.xp, *results)
        if lse.size:
            _launch(runtime, _alike(runtime, outs), _alike(runtime, lses), out, lse)
    return results[0], results[1]


def _launch(runtime: Any, outs: list[Any], lses: list[Any], out: Any, lse: Any) -> None:
    parts = [*outs, out]
    specs, addresses = list(map(spec_of, parts)), list(map(runtime.address, parts))
    vector = all(map(is_vector, specs)) and not any(a % 16 for a in addresses)
    kernel = plan_attention_merge(out.dtype.name, lse.dtype.name, lse.size, out.shape[-1], vector)
    batch, heads, rows, columns = out.shape
    part_strides = strides_of(specs[0] if outs else None, 4)
    part_lse_strides = strides_of(spec_of(lses[0]) if lses else None, 3)
    params = ATTENTION_MERGE.pack(
        outs=addresses[0] if outs else 0,
        lses=runtime.address(lses[0]) if lses else 0,
        out=addresses[-1],
        lse=runtime.address(lse),
        parts=len(outs),
        batch=batch,
        heads=heads,
        rows=rows,
        columns=columns,
        outs_stride=(_spacing(runtime, outs), *part_strides),
        lses_stride=(_spacing(runtime, lses), *part_lse_strides),
        out_stride=strides_of(specs[-1], 4),
        lse_stride=strides_of(spec_of(lse), 3),
    )
    runtime.launch(kernel, params, (*outs, *lses), (out, lse))


def _alike(runtime: Any, arrays: list[Any]) -> list[Any]:
    """Arrays of equal strides, equally far apart: as they are, or copies."""
    strides = {array.strides for array in arrays}
    addresses = [runtime.address(array) for array in arrays]
    steps = {b - a for a, b in zip(addresses, addresses[1:], strict=False)}
    if len(strides) <= 1 and len(steps) <= 1 and all(s % arrays[0].itemsize == 0 for s in steps):
        return arrays
    return list(runtime.xp.stack(arrays))


def _spacing(runtime: Any, arrays: list[Any]) -> int:
    """Elements from one part to the next."""
    if len(arrays) < 2:
        return 0
    return (runtime.address(arrays[1]) - runtime.address(arrays[0])) // arrays[0].itemsize
