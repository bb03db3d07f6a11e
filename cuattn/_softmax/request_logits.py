"""The calls of what is known of rows of logits: losses of labels, entropies and states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from cuattn._arrays import checks, scalars
from cuattn._arrays.inputs import as_array, as_arrays, as_factor, as_scale, as_where
from cuattn._arrays.outputs import as_outputs, into
from cuattn._arrays.row_layout import spec_of
from cuattn._device.launches import one_or_all
from cuattn._device.runtime import runtime_of
from cuattn._softmax.request import Call, Operands, Request, expect, placed_where


def loss(
    x: Any, labels: Any, axis: Any, scale: Any, ignore_index: Any, out: Any, return_lse: Any
) -> Call:
    """A call of `cross_entropy`."""
    both = as_arrays({"x": x, "labels": labels})
    owner = ("x", both["x"])
    factors, factor = as_scale(scale, owner)
    inputs = [*both.items(), ("scale", factors)]
    ignore_index = scalars.int64("ignore_index", ignore_index)
    result = "loss_lse" if scalars.flag("return_lse", return_lse) else "loss"
    x, axis, factors = _rows(both["x"], axis, factors)
    labels = both["labels"]
    request = Request(result, (axis,), spec_of(x), labels=spec_of(labels), scale=spec_of(factors))
    expected = expect(request)
    if isinstance(labels, np.ndarray):
        checks.labels("labels", labels, x.shape[axis], ignore_index)
    stat = lse = None
    if out is not None:
        shapes = [(expected.stat_shape, expected.stat_dtype)] * (1 + return_lse)
        stat, lse = (*as_outputs(out, shapes, inputs), None)[:2]
    operands = Operands(x, labels=labels, scale=factors)
    call = Call(runtime_of(x), request, operands, factor, stat=stat, stat_l=lse)
    return call._replace(ignore_index=ignore_index)


def loss_gradient(
    grad: Any,
    x: Any,
    labels: Any,
    lse: Any,
    axis: Any,
    scale: Any,
    ignore_index: Any,
    index_offset: Any,
    out: Any,
) -> tuple[Call, Callable[..., Any]]:
    """A call of `cross_entropy_backward`, and what makes the result of that of its request."""
    arrays = as_arrays({"x": x, "labels": labels, "lse": lse})
    whole = arrays["x"]
    owner = ("x", whole)
    gradients, gradient = as_factor("grad", grad, owner)
    factors, factor = as_scale(scale, owner)
    inputs = [*arrays.items(), ("grad", gradients), ("scale", factors)]
    ignore_index = scalars.int64("ignore_index", ignore_index)
    x, axis, factors = _rows(whole, axis, factors)
    labels = arrays["labels"]
    request = Request(
        "loss_grad",
        (axis,),
        spec_of(x),
        labels=spec_of(labels),
        lse=spec_of(arrays["lse"]),
        grad=spec_of(gradients),
        scale=spec_of(factors),
        in_part=index_offset is not None,
    )
    offset = _offset(index_offset, x.shape[axis]) if request.in_part else 0
    expect(request)
    if isinstance(labels, np.ndarray) and not request.in_part:
        checks.labels("labels", labels, x.shape[axis], ignore_index)
    if out is not None:
        (out,) = as_outputs(out, [(whole.shape, whole.dtype)], inputs)
    dx, kind = out, one_or_all
    if x.ndim != whole.ndim:  # all elements are one row
        in_place = out is not None and out.flags.c_contiguous
        dx = out.reshape(-1) if in_place else None
        kind = partial(_whole, whole.shape, out, in_place)
    operands = Operands(x, labels=labels, lse=arrays["lse"], grad=gradients, scale=factors)
    call = Call(runtime_of(x), request, operands, factor, dx)
    more = {"grad": gradient, "ignore_index": ignore_index, "index_offset": offset}
    return call._replace(**more), kind


def _offset(index_offset: Any, size: int) -> int:
    """Where in the row a part of this size begins."""
    why = ", so that every index is an int64"
    return scalars.count("index_offset", index_offset, scalars.MAX_INDEX - size, why)


def _whole(shape: tuple[int, ...], out: Any, in_place: bool, dx: Any) -> Any:
    """The gradient of all elements, in the shape of x; `in_place`: it stands in `out`."""
    return out if in_place else into(out, dx.reshape(shape))


def entropy(x: Any, axis: Any, scale: Any, where: Any, keepdims: Any, out: Any) -> Call:
    """A call of `entropy`."""
    x = as_array("x", x)
    owner = ("x", x)
    factors, factor = as_scale(scale, owner)
    where = as_where(where, owner)
    request = Request(
        "entropy",
        scalars.axes(axis, x.ndim),
        spec_of(x),
        where=spec_of(where),
        scale=spec_of(factors),
        keepdims=scalars.flag("keepdims", keepdims),
    )
    if out is not None:
        expected = expect(request)
        inputs = [owner, ("scale", factors), ("where", where)]
        (out,) = as_outputs(out, [(expected.stat_shape, expected.stat_dtype)], inputs)
    runtime = runtime_of(x)
    where = placed_where(where, runtime, x, request)
    return Call(runtime, request, Operands(x, where=where, scale=factors), factor, stat=out)


def state(x: Any, labels: Any, axis: Any, scale: Any, index_offset: Any, out: Any) -> Call:
    """A call of `logits_state`; a label may be of another part of the row."""
    both = as_arrays({"x": x, "labels": labels})
    owner = ("x", both["x"])
    factors, factor = as_scale(scale, owner)
    inputs = [*both.items(), ("scale", factors)]
    x, axis, factors = _rows(both["x"], axis, factors)
    offset = _offset(index_offset, x.shape[axis])
    request = Request(
        "logits", (axis,), spec_of(x), labels=spec_of(both["labels"]), scale=spec_of(factors)
    )
    expected = expect(request)
    outs: tuple[Any, ...] = (None,) * 4
    if out is not None:
        outs = as_outputs(out, [(expected.stat_shape, expected.stat_dtype)] * 4, inputs)
    operands = Operands(x, labels=both["labels"], scale=factors)
    names = ("stat", "stat_l", "stat_t", "stat_logit")
    call = Call(runtime_of(x), request, operands, factor, **dict(zip(names, outs, strict=True)))
    return call._replace(index_offset=offset)


def _rows(x: Any, axis: Any, scale: Any) -> tuple[Any, int, Any]:
    """x, one axis of it and the scale of its rows; axis None is that of all elements, in C order:
    no other order has a label's element in its place."""
    axis = None if axis is None else scalars.one_axis(axis, x.ndim)
    if x.ndim and (axis is not None or x.ndim == 1):
        return x, axis or 0, scale
    one = scale is not None and scale.size == 1 and scale.ndim <= x.ndim
    return x.reshape(-1), 0, scale.reshape(1) if one else scale
