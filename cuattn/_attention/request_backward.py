"""The calls of attention_backward: whether their arguments fit, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import scalars
from cuattn._arrays.checks import FLOATS, same_shape_and_dtype
from cuattn._arrays.outputs import as_outputs
from cuattn._arrays.row_layout import spec_of
from cuattn._attention import checks, request_dscore
from cuattn._attention.request import (
    Expected,
    Options,
    as_given,
    check_alignment,
    check_values,
    expect,
    options_of,
)
from cuattn._attention.request_score import expression, named
from cuattn._attention.views import Arrays, Shape, fractional
from cuattn._device.runtime import runtime_of


class BackwardArrays(NamedTuple):
    """Arrays of one call, or their specs."""

    grad: Any
    y: Any
    lse: Any
    q: Any
    k: Any
    v: Any
    grad_lse: Any = None
    mask: Any = None
    bias: Any = None
    alibi_slopes: Any = None
    sinks: Any = None
    q_offset: Any = None
    q_lens: Any = None
    kv_lens: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None

    @property
    def forward(self) -> Arrays:
        """Those of the forward call."""
        return Arrays(*(getattr(self, name, None) for name in Arrays._fields))


class Call(NamedTuple):
    """One call whose arguments fit."""

    runtime: Any  # None: NumPy computes it
    arrays: BackwardArrays
    specs: BackwardArrays  # of the arrays
    expected: Expected  # of the forward call
    options: Options
    layout: str
    outs: tuple[Any, ...] | None  # dq, dk, dv and, with return_dbias, dbias; None: to be allocated
    return_dbias: bool
    score_args: Mapping[str, Any] = MappingProxyType({})  # by the names that errors give them
    dscore: tuple[str, ...] = ()  # names of those whose gradients are returned

    @property
    def results(self) -> list[tuple[str, Shape, np.dtype]]:
        """Name, shape and dtype of each result; those of `outs` come first."""
        specs, acc = self.specs, self.expected.acc
        large = {"dq": specs.q, "dk": specs.k, "dv": specs.v}
        large |= {"dbias": specs.bias} if self.return_dbias else {}
        small = {"dalibi_slopes": specs.alibi_slopes, "dsinks": specs.sinks}
        return [
            *((name, spec.shape, spec.dtype) for name, spec in large.items()),
            *(
                (name, spec.shape, acc)
                for name, spec in small.items()
                if spec is not None and spec.dtype.name in FLOATS  # integers have no gradient
            ),
            *((f"d{name}", array.shape, array.dtype) for name, array in self.indexed.items()),
        ]

    @property
    def indexed(self) -> dict[str, Any]:
        """The arrays of `dscore`, by the names that errors give them."""
        names = map("score_args[{!r}]".format, self.dscore)
        return {name: self.score_args[name] for name in names}

    @property
    def fractional(self) -> tuple[str, ...]:
        """Arrays whose elements lie at fractions of one from each other."""
        names = ("grad", "y", "lse", "grad_lse")
        own = ((name, getattr(self.specs, name)) for name in names)
        copied = (name for name, spec in own if spec is not None and fractional(spec))
        return (*copied, *self.expected.fractional)


def backward(
    required: dict[str, Any],
    optional: dict[str, Any],
    q_offset: Any,
    layout: Any,
    numbers: tuple[Any, ...],
    return_dbias: Any,
    out: Any,
    score: Any = None,
    score_args: Any = None,
    return_dscore: Any = False,
) -> Call:
    """A call of `attention_backward[_varlen]`: arrays by name, and options as they were given.

    `numbers`: is_causal, window, scale, softcap and precision.
    """
    scalars.one_of("layout", layout, ("BHSD", "BSHD"))
    indexed = named(score, score_args)
    given, offset = as_given({**required, **indexed}, optional, q_offset)
    indexed = {name: given.pop(name) for name in indexed}
    arrays = BackwardArrays(**given)
    specs = BackwardArrays(*map(spec_of, arrays))
    expected = expect(specs.forward, layout, checks.MAX_HEAD_DIM)
    _check_specs(specs, expected)
    check_values(arrays.forward, expected.sizes)
    options = options_of(offset, expected.head_dim, expected.dtype, *numbers)
    options = options._replace(score=expression(score, indexed))
    return_dbias = scalars.flag("return_dbias", return_dbias)
    if return_dbias and specs.bias is None:
        raise checks.no_bias()
    dscore = request_dscore.asked(return_dscore, options.score, indexed)
    runtime = runtime_of(arrays.q)
    call = Call(
        runtime, arrays, specs, expected, options, layout, None, return_dbias, indexed, dscore
    )
    inputs = [*zip(arrays._fields, arrays, strict=True), *indexed.items()]
    if out is not None:
        results = [(shape, dtype) for _, shape, dtype in call.results[: 3 + return_dbias]]
        call = call._replace(outs=as_outputs(out, results, inputs, in_place=False))
    if runtime is not None:
        limits = runtime.limits(runtime.device(arrays.q))
        checks.capability("q", limits.compute_capability)
        check_alignment(runtime, inputs, call.outs)
    return call


def _check_specs(specs: BackwardArrays, expected: Expected) -> None:
    """Check what the forward call gave, and what comes back for it."""
    grad, y = specs.grad, specs.y
    checks.same_dtype("y", y.dtype, "q", expected.dtype)
    checks.one_of_shapes("y", y.shape, (expected.out_shape,), "that of the forward's result")
    same_shape_and_dtype("grad", grad.shape, grad.dtype, "y", y.shape, y.dtype)
    for name in ("lse", "grad_lse"):
        spec, shape = getattr(specs, name), expected.lse_shape
        if spec is not None:
            checks.lse(name, spec.dtype, expected.acc, spec.shape, shape, "the forward's lse")
