"""From the arrays of a call of attention to its results: by NumPy, or by kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn._arrays import scalars as _check_option
from cuattn._attention import checks as _check_attention
from cuattn._attention import request as _call_attention
from cuattn._attention import run as _run_attention
from cuattn._device import runtime as _jit
from cuattn.reference import _attention as _reference_attention


def attention(
    given: _call_attention.Arrays,
    offset: int | None,
    layout: str,
    numbers: tuple[Any, ...],
    return_lse: bool,
    out: Any,
) -> Any:
    """The results of `attention` and `attention_varlen` for arrays that have been taken in.

    `numbers`: is_causal, window, scale, softcap and precision, as they were given.
    """
    metas = _call_attention.metas(given)
    made = _call_attention.results(metas, layout)
    _call_attention.check_values(given, made)
    options = _run_attention.options(offset, made, *numbers)
    return_lse = _check_option.flag("return_lse", return_lse)
    expected = [(made.out_shape, made.dtype), (made.lse_shape, made.acc)][: 1 + return_lse]
    inputs = list(zip(given._fields, given, strict=True))
    outs: Any = None if out is None else _call_attention.check_out(out, expected, inputs)
    runtime = _jit.runtime_of(given.q)
    if runtime is None:
        outs = [np.empty(*one) for one in expected] if outs is None else outs
        views = _call_attention.operands(given, made, layout, np)
        out_view, lse = _call_attention.canonical(outs[0], layout), (*outs, None)[1]
        lse = lse if lse is None else lse[(None,) * (3 - lse.ndim)]
        operands = _run_attention.AttentionOperands(**views, out=out_view, lse=lse)
        _reference_attention.run(operands, options)
        return tuple(outs) if return_lse else outs[0]
    device = runtime.device(given.q)
    _check_attention.capability("q", runtime.limits(device).compute_capability)
    _call_attention.check_alignment(runtime, inputs, outs)
    with runtime.on(device):
        outs = [runtime.empty(*one) for one in expected] if outs is None else outs
        if any(one.size for one in outs):
            arrays = _call_attention.cast(given, made, runtime.xp)
            metas = metas if arrays is given else _call_attention.metas(arrays)
            _run_attention.run(arrays, metas, tuple(outs), layout, options)
    return tuple(outs) if return_lse else outs[0]
