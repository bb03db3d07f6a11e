"""Gradients of calls, in reverse mode: where cuattn has a backward pass, by that."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from cuattn.jax import _batching
from cuattn.jax._calls import Arrays, Call


@functools.partial(jax.jit, static_argnums=0, inline=True)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(call: Call, arrays: Arrays) -> list[Any]:
    """The results of a call, with their gradients."""
    return _batching.run(call, arrays)


def _forward(call: Call, given: Any) -> tuple[list[Any], Any]:
    arrays = {name: primal.value for name, primal in given.items()}
    wanted = {name: () for name, primal in given.items() if primal.perturbed}
    results = _batching.run(call, arrays)
    return results, (arrays, results, wanted)


def _backward(call: Call, saved: Any, grads: list[Any]) -> tuple[Arrays]:
    arrays, results, wanted = saved
    dense = [None if isinstance(grad, SymbolicZero) else grad for grad in grads]
    found = dict.fromkeys(arrays)
    if any(grad is not None for grad in dense):
        rule = RULES[call.function]
        for name, grad in rule(call, arrays, results, dense, wanted).items():
            if name in wanted:
                found[name] = _summed(grad, arrays[name].shape).astype(arrays[name].dtype)
    return (found,)


run.__wrapped__.defvjp(_forward, _backward, symbolic_zeros=True)


# ---- Rules: gradients by the names of arrays, broadcast or not ----


def _softmax(call: Call, arrays: Arrays, results: Any, grads: Any, wanted: Any) -> Arrays:
    options, y, (grad, dlse) = dict(call.options), results[0], (*grads, None)[:2]
    learned = "scale" in wanted
    names = ("axis",) if learned else ("axis", "scale")
    dx: Any = 0
    if grad is not None:
        how = {name: options[name] for name in names if name in options}
        given = {name: arrays[name] for name in ("where", *names) if name in arrays}
        rows = {"grad": grad, "y": y, **given}
        backward = Call(f"{call.function}_backward", tuple(how.items()), ((y.shape, y.dtype),))
        (dx,) = _batching.run(backward, rows)
    if dlse is not None:
        more = jnp.expand_dims(dlse, options["axis"]) * y
        dx = dx + (more if learned else _scale(call, arrays) * more)
    return _scaled(call, arrays, dx) if learned else {"x": dx}


def _logsumexp(call: Call, arrays: Arrays, results: Any, grads: Any, wanted: Any) -> Arrays:
    b = arrays.get("b")
    if b is None:
        return {"x": grads[0] * _probabilities(call, arrays)}
    p = _probabilities(call, arrays | {"where": (b != 0) & arrays.get("where", True)})
    total = jnp.sum(b * p, dict(call.options)["axis"], keepdims=True)
    share = jnp.where(p == 0, 0, grads[0] * p / total)
    return {"x": b * share, "b": share}


def _top_k(call: Call, arrays: Arrays, results: Any, grads: Any, wanted: Any) -> Arrays:
    return {"x": _scattered(call, arrays, results[1], grads[0])}


def _softmax_topk(call: Call, arrays: Arrays, results: Any, grads: Any, wanted: Any) -> Arrays:
    options, acc = dict(call.options), jnp.promote_types(results[0].dtype, jnp.float32)
    axis, output = options["axis"], options["output"]
    values, (grad, _, dlse) = results[0].astype(acc), (*grads, None)[:3]
    chosen = jnp.zeros_like(values) if grad is None else grad.astype(acc)
    whole: Any = None  # what every element of a row loses, times its probability
    if output != "logit" and grad is not None:
        p = values if output == "prob" else jnp.exp(values)
        chosen = chosen * p if output == "prob" else chosen
        whole = chosen.sum(axis, keepdims=True)
        if options["renormalize"]:
            chosen, whole = chosen - p * whole, None
    if dlse is not None:
        whole = -jnp.expand_dims(dlse, axis) + (0 if whole is None else whole)
    dz = _scattered(call, arrays, results[1], chosen)
    if whole is not None:
        dz = dz - _probabilities(call, arrays, acc) * whole
    return _scaled(call, arrays, jnp.where(arrays["where"], dz, 0) if "where" in arrays else dz)


def _attention(call: Call, arrays: Arrays, results: Any, grads: Any, wanted: Any) -> Arrays:
    given, (y, lse), (grad, dlse) = dict(arrays), results, grads
    dtype, sinks = arrays["q"].dtype, given.pop("sinks", None)
    grad = jnp.zeros_like(y) if grad is None else grad
    given |= {"grad": grad.astype(dtype), "y": y.astype(dtype), "lse": lse}
    given |= {} if dlse is None else {"grad_lse": dlse}
    names = ["q", "k", "v"] + [name for name in ("bias", "alibi_slopes") if name in wanted]
    options = {name: value for name, value in call.options if name not in ("dtype", "return_lse")}
    options["return_dbias"] = "bias" in wanted
    specs = [(arrays[name].shape, arrays[name].dtype) for name in names]
    if "alibi_slopes" in wanted:
        specs[-1] = specs[-1][0], lse.dtype
    backward = Call("attention_backward", tuple(options.items()), tuple(specs))
    found = dict(zip(names, _batching.run(backward, given), strict=True))
    if sinks is not None and "sinks" in wanted:
        # A sink takes its weight of a row from the other keys, and adds nothing to y.
        inner = jnp.sum(grad.astype(lse.dtype) * y.astype(lse.dtype), -1)
        inner = inner if options["layout"] == "BHSD" else inner.swapaxes(1, 2)
        weight = jnp.exp(sinks.astype(lse.dtype)[:, None] - lse)
        weight = jnp.where(lse == -jnp.inf, 0, weight)  # padding has none
        found["sinks"] = jnp.sum(weight * ((0 if dlse is None else dlse) - inner), (0, 2))
    return found


RULES = {
    "softmax": _softmax,
    "log_softmax": _softmax,
    "logsumexp": _logsumexp,
    "top_k": _top_k,
    "softmax_topk": _softmax_topk,
    "attention": _attention,
}


# ---- What rules share ----


def _probabilities(call: Call, arrays: Arrays, dtype: Any = None) -> Any:
    """Those of the rows of a call."""
    options, x = dict(call.options), arrays["x"]
    dtype = dtype or call.results[0][1]
    how = [(name, options[name]) for name in ("axis", "scale") if name in options]
    given: Arrays = {name: arrays[name] for name in ("x", "where", "scale") if name in arrays}
    softmax = Call("softmax", (*how, ("dtype", dtype)), ((x.shape, dtype),))
    return _batching.run(softmax, given)[0]


def _scattered(call: Call, arrays: Arrays, indices: Any, values: Any) -> Any:
    """Zeros of the shape of x, but for the values at the indices."""
    zeros, axis = jnp.zeros(arrays["x"].shape, values.dtype), dict(call.options)["axis"]
    return jnp.put_along_axis(zeros, indices, values, axis, inplace=False)


def _scale(call: Call, arrays: Arrays) -> Any:
    return arrays.get("scale", dict(call.options).get("scale", 1.0))


def _scaled(call: Call, arrays: Arrays, dz: Any) -> Arrays:
    """Gradients of x and scale from that of scale * x."""
    acc = jnp.promote_types(dz.dtype, jnp.float32)
    dz = dz.astype(acc)
    return {
        "x": _scale(call, arrays) * dz,
        "scale": jnp.where(dz == 0, 0, arrays["x"].astype(acc) * dz),
    }


def _summed(grad: Any, shape: tuple[int, ...]) -> Any:
    """A gradient, summed up where its array has been broadcast."""
    axes = tuple(i for i, size in enumerate(shape) if size != grad.shape[i])
    return grad.sum(axes, keepdims=True)
