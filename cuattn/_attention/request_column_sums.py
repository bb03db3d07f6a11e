"""The calls of attention_column_sums: whether their arguments fit, and what comes out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import scalars
from cuattn._arrays.outputs import as_outputs
from cuattn._arrays.row_layout import spec_of
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
from cuattn._attention.views import Arrays, Shape, cast, specs_of, whole_elements
from cuattn._device.runtime import runtime_of


class ColumnSumsCall(NamedTuple):
    """One call whose arguments fit."""

    runtime: Any  # None: NumPy computes it
    arrays: Arrays  # those of the forward call, but for v, in whose place k stands again
    lse: Any
    expected: Expected  # of the forward call
    options: Options
    layout: str
    out: Any  # None: to be allocated

    @property
    def result(self) -> tuple[Shape, np.dtype]:
        """Shape and dtype of the result."""
        return (*self.expected.lse_shape[:-1], self.expected.sizes.seqlen_k), self.expected.acc

    def cast(self, xp: Any) -> tuple[Arrays, Any]:
        """The arrays, and lse, as kernels read them."""
        copied = tuple(name for name in self.expected.fractional if name != "v")
        arrays = cast(self.arrays, self.expected.acc, copied, xp)
        return arrays._replace(v=arrays.k), whole_elements(xp, self.lse)


def column_sums(
    required: dict[str, Any],
    optional: dict[str, Any],
    q_offset: Any,
    layout: Any,
    numbers: tuple[Any, ...],
    out: Any,
) -> ColumnSumsCall:
    """A call of `attention_column_sums`: arrays by name, and options as they were given.

    `numbers`: is_causal, window, scale, softcap and precision.
    """
    scalars.one_of("layout", layout, ("BHSD", "BSHD"))
    given, offset = as_given(required, optional, q_offset)
    inputs, lse = list(given.items()), given.pop("lse")
    arrays = Arrays(**given, v=given["k"])
    expected, of_lse = expect(specs_of(arrays), layout, checks.MAX_HEAD_DIM), spec_of(lse)
    wanted = "the forward's lse"
    checks.lse("lse", of_lse.dtype, expected.acc, of_lse.shape, expected.lse_shape, wanted)
    check_values(arrays, expected.sizes)
    options = options_of(offset, expected.head_dim, expected.dtype, *numbers)
    runtime = runtime_of(arrays.q)
    call = ColumnSumsCall(runtime, arrays, lse, expected, options, layout, None)
    if out is not None:
        (out,) = as_outputs(out, [call.result], inputs, in_place=False)
        call = call._replace(out=out)
    if runtime is not None:
        limits = runtime.limits(runtime.device(arrays.q))
        checks.capability("q", limits.compute_capability)
        check_alignment(runtime, inputs, None if out is None else (out,))
    return call
