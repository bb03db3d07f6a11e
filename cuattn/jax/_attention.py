"""Attention, for sequences of one length."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from cuattn._arrays.attention_types import Layout, Precision, Window
from cuattn._arrays.keywords import explained
from cuattn._attention import request
from cuattn.jax._arguments import results_of, taken
from cuattn.jax._calls import Arrays


@explained
def attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    is_causal: bool = False,
    q_offset: Any = None,
    window: Window | None = None,
    scale: Any = None,
    softcap: Any = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    q_lens: Any = None,
    kv_lens: Any = None,
    layout: Layout = "BHSD",
    precision: Precision | None = None,
    dtype: Any = None,
    return_lse: bool = False,
) -> Any:
    """Scaled dot-product attention, as `cuattn.attention`.

    Parameters
    ----------
    q, k, v, is_causal, window, scale, softcap, mask, bias, alibi_slopes, sinks, layout
        As `cuattn.attention`.
    q_offset : int or array of int, shape (B,) or (), optional
        As `cuattn.attention`. As an array without dimensions one for all sequences, which may be
        what `jax.lax.scan` counts.
    q_lens, kv_lens, precision, dtype, return_lse
        As `cuattn.attention`. On the CPU a length that is out of range is an error when it runs.

    Returns
    -------
    out : jax.Array
    lse : jax.Array
        Only with `return_lse`.

    See Also
    --------
    cuattn.attention : The same of arrays of CuPy and NumPy.

    Notes
    -----
    Gradients of q, k, v, `bias`, `alibi_slopes` and `sinks`: by `cuattn.attention_backward`. That
    of a bias is computed only where it is asked for. In `vmap` k and v that all have in common are
    copied for each.

    Examples
    --------
    >>> q = k = jax.numpy.zeros((2, 4))
    >>> v = jax.numpy.array([[1.0], [3.0]])
    >>> jax.jit(lambda *qkv: cuattn.jax.attention(*qkv, is_causal=True))(q, k, v)
    Array([[1.],
           [2.]], dtype=float32)
    """
    optional = {"mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    optional |= {"q_lens": q_lens, "kv_lens": kv_lens, "q_offset": q_offset}
    arrays, shown = taken(q=q, k=k, v=v, **optional)
    required = {name: shown.pop(name) for name in ("q", "k", "v")}
    numbers = is_causal, window, scale, softcap, precision
    offset = shown.pop("q_offset")
    call = request.attention(required, shown, offset, layout, numbers, dtype, return_lse, None)
    options = {"is_causal": is_causal, "window": window, "scale": scale, "softcap": softcap}
    options |= {"precision": precision, "layout": layout, "return_lse": True}
    options["dtype"] = call.expected.dtype
    if "q_offset" not in arrays:
        options["q_offset"] = offset
    y, lse = _heads(arrays, call, options)
    return (y, lse) if call.return_lse else y


def _heads(arrays: Arrays, call: Any, options: dict[str, Any]) -> list[Any]:
    """Results of attention: with all of its axes, and without those that q has not."""
    expected, layout, ndim = call.expected, options["layout"], arrays["q"].ndim
    batch = expected.sizes.batch
    for name, array in arrays.items():
        if name in ("q", "k", "v") and layout == "BSHD" and ndim == 2:
            array = array[:, None]
        if name in ("q", "k", "v", "mask", "bias"):
            array = array.reshape((1,) * (4 - array.ndim) + array.shape)
        elif not array.ndim:  # one for all
            array = jnp.broadcast_to(array, (batch if name == "q_offset" else 1,))
        arrays[name] = array
    y_shape = *arrays["q"].shape[:-1], arrays["v"].shape[-1]
    results = [(y_shape, expected.dtype), (tuple(expected.sizes[:3]), expected.acc)]
    y, lse = results_of("attention", arrays, options, results)
    return [y.reshape(expected.out_shape), lse.reshape(expected.lse_shape)]
