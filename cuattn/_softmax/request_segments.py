"""The calls of functions of ragged rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn._arrays import checks
from cuattn._arrays.inputs import as_arrays, as_scale
from cuattn._arrays.outputs import as_outputs
from cuattn._arrays.row_layout import spec_of
from cuattn._device.runtime import runtime_of
from cuattn._softmax.request import Call, Operands, Request, expect


def segments(given: dict[str, Any], cu_seqlens: Any, scale: Any, out: Any) -> Call:
    """A call of `segment_softmax` (of x), or of its gradient (of grad and y)."""
    *rows, offsets = as_arrays({**given, "cu_seqlens": cu_seqlens}).values()
    x, y = (*rows, None)[:2]
    owner, *others = zip(given, rows, strict=True)
    name, _ = owner
    checks.at_least_1d(name, x.shape)
    checks.ends_spec("cu_seqlens", offsets.shape, offsets.dtype, "segments")
    if isinstance(offsets, np.ndarray):
        checks.ends("cu_seqlens", offsets, x.shape[0], name)
    factors, factor = (None, 1.0) if scale is None else as_scale(scale, owner)
    request = Request(
        "prob" if y is None else "grad",
        (0,),
        spec_of(x),
        spec_of(y),
        scale=spec_of(factors),
        offsets=spec_of(offsets),
    )
    expected = expect(request)
    if out is not None:
        inputs = [owner, *others, ("cu_seqlens", offsets), ("scale", factors)]
        (out,) = as_outputs(out, [(x.shape, expected.dtype)], inputs)
    operands = Operands(x, y, scale=factors, offsets=offsets)
    return Call(runtime_of(x), request, operands, factor, out)
