"""Softmax, top-k and attention as parts of JAX programs: in `jax.jit`, `jax.grad`, `jax.vmap` and
`jax.lax.scan`.

Arguments and results are those of the functions of the same names in `cuattn`. Arrays are JAX's,
tracers too, or NumPy's; all other options are static. A call that does not fit is an error when it
is traced. There is no `out`: results are written into the memory that XLA has for them.

A call runs when the program comes to it: on a GPU as kernels on XLA's stream, on the CPU by NumPy.
Arrays are not copied, and however deep in `vmap` it is one call. Gradients are for reverse mode,
once; forward mode and second derivatives are errors of JAX.

A call is not partitioned: where an array is sharded over devices, `jax.jit` first gathers it. In
`jax.shard_map` each device computes its own part.

Without ``jax_enable_x64`` what `cuattn` returns as float64 is float32, and int64 is int32, as in
all of JAX.
"""

from __future__ import annotations

from typing import Any, SupportsIndex

from cuattn._arrays.keywords import explained
from cuattn._arrays.results import SoftmaxTopK, SoftmaxTopKLse, TopK
from cuattn._arrays.types import Axis, Mode, Output
from cuattn._softmax import request as softmax_request
from cuattn._topk import request as topk_request
from cuattn.jax import _arguments
from cuattn.jax._attention import attention

__all__ = ["attention", "log_softmax", "logsumexp", "softmax", "softmax_topk", "top_k"]


@explained
def softmax(
    x: Any,
    /,
    axis: Axis = -1,
    *,
    scale: Any = None,
    where: Any = None,
    dtype: Any = None,
    return_lse: bool = False,
) -> Any:
    """Softmax along an axis, as `cuattn.softmax`.

    Parameters
    ----------
    x, axis, scale, where, dtype, return_lse
        As `cuattn.softmax`.

    Returns
    -------
    y : jax.Array, shape of x
    lse : jax.Array, shape of x without `axis`
        Only with `return_lse`.

    See Also
    --------
    cuattn.softmax : The same of arrays of CuPy and NumPy.

    Notes
    -----
    Gradients of x, and of `scale` where it is an array: by `cuattn.softmax_backward`.

    Examples
    --------
    >>> x = jax.numpy.zeros(2)
    >>> jax.jit(jax.grad(lambda x: cuattn.jax.softmax(2 * x)[0]))(x)
    Array([ 0.5, -0.5], dtype=float32)
    """
    arrays, shown = _arguments.taken(x=x, scale=scale, where=where)
    given = shown["x"], axis, shown["scale"], shown["where"]
    call = softmax_request.transform("prob", *given, dtype, None, return_lse, None)
    found = _arguments.rows("softmax", arrays, call, return_lse=call.wants_stat)
    return tuple(found) if call.wants_stat else found[0]


@explained
def log_softmax(
    x: Any, /, axis: Axis = -1, *, scale: Any = None, where: Any = None, dtype: Any = None
) -> Any:
    """Logarithm of the softmax along an axis, as `cuattn.log_softmax`.

    Parameters
    ----------
    x, axis, scale, where, dtype
        As `cuattn.log_softmax`.

    Returns
    -------
    y : jax.Array, shape of x

    See Also
    --------
    cuattn.log_softmax : The same of arrays of CuPy and NumPy.

    Notes
    -----
    Gradients of x, and of `scale` where it is an array: by `cuattn.log_softmax_backward`.

    Examples
    --------
    >>> x = jax.numpy.zeros((3, 2))
    >>> jax.vmap(cuattn.jax.log_softmax)(x)[0].round(3)
    Array([-0.693, -0.693], dtype=float32)
    """
    arrays, shown = _arguments.taken(x=x, scale=scale, where=where)
    given = shown["x"], axis, shown["scale"], shown["where"]
    call = softmax_request.transform("log_prob", *given, dtype, None, False, None)
    return _arguments.rows("log_softmax", arrays, call)[0]


@explained
def logsumexp(
    x: Any,
    /,
    axis: Axis = None,
    *,
    b: Any = None,
    where: Any = None,
    keepdims: bool = False,
    dtype: Any = None,
) -> Any:
    """Logarithm of a sum of exponentials, as `cuattn.logsumexp`.

    Parameters
    ----------
    x, axis, b, where, keepdims, dtype
        As `cuattn.logsumexp`.

    Returns
    -------
    lse : jax.Array

    See Also
    --------
    cuattn.logsumexp : The same of arrays of CuPy and NumPy.

    Notes
    -----
    Gradients of x, and of `b` where it is an array: by `cuattn.softmax`. That of a weight of 0,
    whose element does not take part, is 0.

    Examples
    --------
    >>> jax.grad(cuattn.jax.logsumexp)(jax.numpy.zeros(4))
    Array([0.25, 0.25, 0.25, 0.25], dtype=float32)
    """
    arrays, shown = _arguments.taken(x=x, b=b, where=where)
    given = shown["x"], axis, shown["b"], shown["where"]
    call = softmax_request.reduction(*given, keepdims, dtype, None)
    weight = {} if b is None or "b" in arrays else {"b": b}
    (lse,) = _arguments.rows("logsumexp", arrays, call, keepdims=True, **weight)
    return lse.reshape(softmax_request.expect(call.request).stat_shape)


@explained
def top_k(
    x: Any,
    k: SupportsIndex,
    /,
    *,
    axis: SupportsIndex | None = -1,
    mode: Mode = "largest",
    sorted: bool = True,
) -> TopK:
    """The k largest or smallest elements along an axis, as `cuattn.top_k`.

    Parameters
    ----------
    x, k, axis, mode, sorted
        As `cuattn.top_k`.

    Returns
    -------
    values : jax.Array
    indices : jax.Array of int64, or int32 without ``jax_enable_x64``

    See Also
    --------
    cuattn.top_k : The same of arrays of CuPy and NumPy.

    Notes
    -----
    The gradient of x is that of `values`, at `indices`.

    Examples
    --------
    >>> values, indices = jax.jit(lambda x: cuattn.jax.top_k(x, 2))(jax.numpy.array([3, 1, 3]))
    >>> indices
    Array([0, 2], dtype=int32)
    """
    arrays, shown = _arguments.taken(x=x)
    call = topk_request.top_k(shown["x"], k, axis, mode, sorted, None)
    return TopK(*_arguments.selection("top_k", arrays, call, axis, mode=mode))


@explained
def softmax_topk(
    x: Any,
    k: SupportsIndex,
    /,
    *,
    axis: SupportsIndex | None = -1,
    scale: Any = None,
    where: Any = None,
    renormalize: bool = False,
    output: Output = "prob",
    return_lse: bool = False,
) -> SoftmaxTopK | SoftmaxTopKLse:
    """The k most probable elements of the softmax along an axis, as `cuattn.softmax_topk`.

    Parameters
    ----------
    x, k, axis, scale, where, renormalize, output, return_lse
        As `cuattn.softmax_topk`.

    Returns
    -------
    values : jax.Array
    indices : jax.Array of int64, or int32 without ``jax_enable_x64``
    lse : jax.Array
        Only with `return_lse`.

    See Also
    --------
    cuattn.softmax_topk : The same of arrays of CuPy and NumPy.

    Notes
    -----
    Gradients of x, and of `scale` where it is an array, are those of `values` and `lse` at fixed
    `indices`: with a gradient g of probabilities p, p * (g - sum(g * p)) at `indices` and
    -p * sum(g * p) elsewhere, for which `cuattn.softmax` computes all p of the row. With
    `renormalize`, and of logits, nothing elsewhere.

    Examples
    --------
    >>> x = jax.numpy.log(jax.numpy.array([1.0, 4.0, 5.0]))
    >>> jax.grad(lambda x: cuattn.jax.softmax_topk(x, 1).values[0])(x).round(3)
    Array([-0.05, -0.2 ,  0.25], dtype=float32)
    """
    arrays, shown = _arguments.taken(x=x, scale=scale, where=where)
    given = shown["x"], k, axis, shown["scale"], shown["where"], renormalize, output
    call = topk_request.softmax_topk(*given, None, return_lse)
    how = {"renormalize": renormalize, "output": output, "return_lse": return_lse}
    found = _arguments.selection("softmax_topk", arrays, call, axis, **how)
    return SoftmaxTopKLse(*found) if call.options.wants_lse else SoftmaxTopK(*found)
