"""The calls of `sample` and `sample_state`, wherever they run; on NumPy arrays here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuattn._device.host import HOST, Computed
from cuattn._device.launches import Prepared
from cuattn._topk import numpy_sample
from cuattn._topk.request_sample import Call, Operands

NAMES = {name: name for name in Operands._fields}
NUMBERS = 3  # of Options, which the next call of its signature may have changed


def prepare(call: Call, kind: Callable[..., Any]) -> Any:
    """A call with all that it takes; where that is not to be remembered, its results."""
    if call.runtime is not None:
        from cuattn._topk import run_sample

        return run_sample.prepare(call, kind)
    if call.outs:
        return kind(*numpy_sample.run(call))
    arrays = {n: array for n, array in call.operands._asdict().items() if array is not None}
    computed = _computed(call, tuple(arrays))
    return Prepared(HOST, computed, arrays, call.options[:NUMBERS], kind, NAMES)


def _computed(call: Call, given: tuple[str, ...]) -> Computed:
    """What is left of a call on NumPy arrays, without these arrays."""
    call = call._replace(operands=Operands(None))

    def run(runtime: Any, arrays: list[Any], numbers: tuple[Any, ...]) -> list[Any]:
        operands = Operands(**dict(zip(given, arrays, strict=True)))
        options = call.options._replace(scale=numbers[0], seed=numbers[1], offset=numbers[2])
        return numpy_sample.run(call._replace(operands=operands, options=options))

    return Computed(given, run)
