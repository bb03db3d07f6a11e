"""The calls of `attention_topk`: whether their arguments fit, and what comes out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import scalars
from cuattn._arrays.outputs import as_outputs
from cuattn._attention import checks
from cuattn._attention.request import (
    Expected,
    Options,
    as_given,
    check_alignment,
    check_values,
    expect,
    options_of,
)
from cuattn._attention.views import Arrays, Shape, canonical_shape, specs_of
from cuattn._device.runtime import runtime_of

INT64 = np.dtype(np.int64)
OUTPUTS = ("prob", "log_prob", "logit", "state")  # AttentionTopKOutput


class TopKCall(NamedTuple):
    """One call whose arguments fit. Where attention has values it has its keys again."""

    runtime: Any  # None: NumPy computes it
    arrays: Arrays
    specs: Arrays  # of the arrays
    expected: Expected  # dtype and shape of the values, and shape of what a state has of a query
    options: Options
    layout: str
    num: int
    output: str
    index_offset: int
    outs: tuple[Any, ...] | None = None  # None: to be allocated

    @property
    def results(self) -> dict[str, tuple[Shape, np.dtype]]:
        """Shape and dtype of each result by its field: m is "lse", values are "out"."""
        dtype, acc, shape, stat_shape, *_ = self.expected
        found = {"out": (shape, dtype), "indices": (shape, INT64)}
        if self.output != "state":
            return found
        return {"lse": (stat_shape, acc), "l": (stat_shape, acc), **found}


def attention_topk(
    q: Any,
    k: Any,
    num: Any,
    optional: dict[str, Any],
    q_offset: Any,
    layout: Any,
    numbers: tuple[Any, ...],
    index_offset: Any,
    output: Any,
    out: Any,
) -> TopKCall:
    """A call; `numbers`: is_causal, window, scale, softcap and precision."""
    scalars.one_of("layout", layout, ("BHSD", "BSHD"))
    scalars.one_of("output", output, OUTPUTS)
    given, offset = as_given({"q": q, "k": k}, optional, q_offset)
    arrays = Arrays(v=given["k"], **given)
    specs = specs_of(arrays)
    expected = expect(specs, layout, checks.MAX_HEAD_DIM)
    check_values(arrays, expected.sizes)
    options = options_of(offset, expected.head_dim, specs.q.dtype, *numbers)
    keys = expected.sizes.seqlen_k
    most, why = (checks.MAX_SIZE, "") if output == "state" else (keys, ", the number of keys")
    num = scalars.count("num", num, most, why)
    why = ", so that every index is an int64"
    index_offset = scalars.count("index_offset", index_offset, scalars.MAX_INDEX - keys, why)
    expected = expected._replace(
        dtype=expected.acc if output == "state" else expected.dtype,
        out_shape=(*specs.q.shape[:-1], num),
        lse_shape=specs.q.shape[:-1],
        fractional=tuple(name for name in expected.fractional if name != "v"),
    )
    runtime = runtime_of(arrays.q)
    call = TopKCall(runtime, arrays, specs, expected, options, layout, num, output, index_offset)
    inputs = [one for one in zip(arrays._fields, arrays, strict=True) if one[0] != "v"]
    if out is not None:
        specs_out = list(call.results.values())
        call = call._replace(outs=as_outputs(out, specs_out, inputs, in_place=False))
    if runtime is not None:
        limits = runtime.limits(runtime.device(arrays.q))
        checks.capability("q", limits.compute_capability)
        check_alignment(runtime, inputs, call.outs)
    return call


def stat_shape(shape: Shape, layout: str) -> Shape:
    """Canonical shape, or strides, of m and l of a state."""
    return canonical_shape((*shape, 1), layout)[:3]
