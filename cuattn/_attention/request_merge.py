"""The calls of merges: whether their arguments fit, and what comes out."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import scalars
from cuattn._arrays.checks import floating, same_shape_and_dtype
from cuattn._arrays.inputs import as_arrays
from cuattn._arrays.outputs import as_outputs
from cuattn._arrays.row_layout import FLOAT32, FLOAT64, ArraySpec, spec_of
from cuattn._attention import checks
from cuattn._attention.request import check_alignment
from cuattn._attention.views import Shape, canonical, canonical_shape, whole_elements
from cuattn._device.runtime import runtime_of


class MergeCall(NamedTuple):
    """One call whose arguments fit."""

    runtime: Any  # None: NumPy computes it
    owner: Any  # an array on their device
    outs: list[Any]  # parts
    lses: list[Any]
    expected: tuple[tuple[Shape, np.dtype], tuple[Shape, np.dtype]]  # of out and lse
    layout: str
    out: tuple[Any, ...] | None  # None: to be allocated

    def views(self, out: Any, lse: Any) -> tuple[list[Any], list[Any], Any, Any]:
        """Canonical views of the parts and of the results, on the host."""
        lead = (None,) * (3 - lse.ndim)
        return (
            [canonical(whole_elements(np, part), self.layout) for part in self.outs],
            [whole_elements(np, part)[lead] for part in self.lses],
            canonical(out, self.layout),
            lse[lead],
        )


def pair(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, layout: Any, out: Any) -> MergeCall:
    """A call of `merge_attention`."""
    scalars.one_of("layout", layout, ("BHSD", "BSHD"))
    given = as_arrays({"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b})
    specs = {name: spec_of(array) for name, array in given.items()}
    expected = expect(
        (("out_a", specs["out_a"]), ("out_b", specs["out_b"])),
        (("lse_a", specs["lse_a"]), ("lse_b", specs["lse_b"])),
        layout,
    )
    inputs = list(given.items())
    if out is not None:
        out = as_outputs(out, list(expected), inputs, in_place=False)
    runtime = runtime_of(given["out_a"])
    if runtime is not None:
        check_alignment(runtime, inputs, out)
    outs, lses = [given["out_a"], given["out_b"]], [given["lse_a"], given["lse_b"]]
    return MergeCall(runtime, outs[0], outs, lses, expected, layout, out)


def stacked(outs: Any, lses: Any, axis: Any, layout: Any, out: Any) -> MergeCall:
    """A call of `merge_attention_states`."""
    scalars.one_of("layout", layout, ("BHSD", "BSHD"))
    given = as_arrays({"outs": outs, "lses": lses})
    outs, lses = given["outs"], given["lses"]
    checks.states("outs", outs.shape, layout)
    axis = checks.state_axis(axis, outs.ndim)
    checks.same_parts(outs.shape, lses.shape, axis)
    specs = [
        spec_of(array)._replace(shape=array.shape[:axis] + array.shape[axis + 1 :])
        for array in (outs, lses)
    ]
    expected = expect((("outs", specs[0]),), (("lses", specs[1]),), layout)
    inputs = list(given.items())
    if out is not None:
        out = as_outputs(out, list(expected), inputs, in_place=False)
    runtime = runtime_of(outs)
    if runtime is not None:
        check_alignment(runtime, inputs, out)
    out_parts, lse_parts = (
        [array[(slice(None),) * axis + (i,)] for i in range(outs.shape[axis])]
        for array in (outs, lses)
    )
    return MergeCall(runtime, outs, out_parts, lse_parts, expected, layout, out)


@lru_cache(maxsize=4096)
def expect(
    outs: tuple[tuple[str, ArraySpec], ...], lses: tuple[tuple[str, ArraySpec], ...], layout: str
) -> tuple[tuple[Shape, np.dtype], tuple[Shape, np.dtype]]:
    """Check specs of parts, and say what comes out: shape and dtype of out and lse."""
    (name, first), *others = outs
    floating(name, first.dtype)
    checks.dimensions(name, first.shape, layout)
    for other, spec in others:
        same_shape_and_dtype(other, spec.shape, spec.dtype, name, first.shape, first.dtype)
    acc = FLOAT64 if first.dtype == FLOAT64 else FLOAT32
    shape = canonical_shape(first.shape, layout)[4 - len(first.shape) : 3]
    for other, spec in lses:
        checks.lse(other, spec.dtype, acc, spec.shape, shape, name)
    return (first.shape, first.dtype), (shape, acc)
