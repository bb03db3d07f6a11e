"""Draws from the softmax of each row, and what has to be known of a row to draw from it."""

from __future__ import annotations

from typing import Any, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from cuattn._arrays import types
from cuattn._arrays.results import Sample, SampleState
from cuattn._arrays.types import Host, Other, Unpack
from cuattn._device.launches import one_or_all
from cuattn._device.signatures import remembered
from cuattn._topk import request_sample
from cuattn._topk.run_sample_host import prepare


@overload
def sample(
    x: Host, num: SupportsIndex = 1, /, **options: Unpack[types.SampleAlone]
) -> NDArray[np.int64]: ...
@overload
def sample(
    x: Host, num: SupportsIndex = 1, /, **options: Unpack[types.SampleWithLogProb]
) -> Sample: ...
@overload
def sample(x: Other, num: SupportsIndex = 1, /, **options: Unpack[types.SampleOpen]) -> Any: ...
@remembered("scale", "seed", "offset")
def sample(
    x: Any,
    num: SupportsIndex = 1,
    /,
    *,
    seed: Any,
    offset: Any = 0,
    axis: SupportsIndex | None = -1,
    scale: Any = None,
    where: Any = None,
    top_k: SupportsIndex | None = None,
    top_p: Any = None,
    min_p: Any = None,
    return_log_prob: bool = False,
    out: Any = None,
) -> Any:
    """Indices drawn from the softmax along an axis, without the softmax.

    `num` different ones of each row, in the order of the draw. The same seed, offset and row give
    the same draws on every device, in any batch and however the row is split.

    Parameters
    ----------
    x : cupy.ndarray or numpy.ndarray
        Logits: float16, bfloat16, float32 or float64, of any shape and strides. An array of another
        library is taken without a copy. A 0-dimensional array is a row of one element.
    num : int, optional
        Not negative. What a row has not is filled up.
    seed : int or array of integers
        From 0 to 2^64 - 1. An array has one for each row, as those of `scale`: each row then draws
        as if it were the only one, whatever its place.
    offset : int or array of integers, optional
        From 0 to 2^63 - 1, or one for each row: what to count up between calls of one seed. Arrays
        are read when the kernel runs.
    axis : int or None, optional
        None: all elements, in C order.
    scale, where
        As `softmax`: scale is 1 / temperature.
    top_k : int, optional
        Only the `top_k` largest may be drawn, at least 1; ties by the lower index.
    top_p : float, optional
        Of these the fewest, largest first, whose probabilities among these add up to `top_p`, above
        0 and at most 1.
    min_p : float, optional
        Of these, those whose probability is at least `min_p` times the largest; from 0 to 1.
    return_log_prob : bool, optional
        Also return log-probabilities.
    out : array or tuple of two arrays, optional
        Where to write: exactly the shapes and dtypes of the results, any strides, apart from every
        input.

    Returns
    -------
    indices : array of int64, shape of x but for `axis`, which has length num
        -1 where a row has no more that can be drawn.
    log_prob : array, shape of indices
        Log-probability of each in the softmax of the whole row, before `top_k`, `top_p` and
        `min_p`; -inf beside -1. float32, or float64 where x is float64. Only with
        `return_log_prob`, as the second field of a `Sample`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax_topk`; or if seed, offset, top_k, top_p or min_p is out of its range, or a row
        has more than 2^34 elements.

    See Also
    --------
    sample_state : The same of a part of a row.
    softmax_topk : The most probable elements.

    Notes
    -----
    The draws of a row are the largest ``scale * x + g``, g being Gumbel noise [1]_ that depends on
    nothing but seed, offset, row and index. x is read once, but for `num` or `top_k` above 256, and
    for rows of which `top_p` or `min_p` keeps more than 256 elements. A row that holds NaN or +inf,
    or nothing but -inf, has no probabilities: -1, and NaN.

    References
    ----------
    .. [1] W. Kool, H. van Hoof, M. Welling, "Stochastic beams and where to find them: the
       Gumbel-top-k trick for sampling sequences without replacement", arXiv:1903.06059.

    Examples
    --------
    >>> x = numpy.log(numpy.array([[0.1, 0.2, 0.7], [0.1, 0.2, 0.7]]))
    >>> cuattn.sample(x, seed=3)
    array([[1],
           [2]])
    >>> cuattn.sample(x, 2, seed=3, top_k=1)
    array([[ 2, -1],
           [ 2, -1]])
    """
    call = request_sample.sample(
        x, num, seed, offset, axis, scale, where, top_k, top_p, min_p, return_log_prob, out
    )
    return prepare(call, Sample if return_log_prob else one_or_all)


@overload
def sample_state(
    x: Host, num: SupportsIndex = 1, /, **options: Unpack[types.SampleState]
) -> SampleState: ...
@overload
def sample_state(
    x: Other, num: SupportsIndex = 1, /, **options: Unpack[types.SampleState]
) -> Any: ...
@remembered("scale", "seed", "offset")
def sample_state(
    x: Any,
    num: SupportsIndex = 1,
    /,
    *,
    seed: Any,
    offset: Any = 0,
    axis: SupportsIndex | None = -1,
    scale: Any = None,
    rows: Any = None,
    index_offset: SupportsIndex = 0,
    out: Any = None,
) -> SampleState:
    """What has to be known of a row to draw from it, in a form that merges.

    For rows whose parts never meet: the merged states of any parts have exactly the draws of the
    whole, ``merge(a, b).indices``.

    Parameters
    ----------
    x, num, seed, offset, axis, scale
        As `sample`.
    rows : array of integers, optional
        Numbers of the rows in the whole array, in the shape that `scale` has. By default they are
        counted in C order; with a seed for each row, they are all 0.
    index_offset : int, optional
        Where in the row this part begins. Not negative.
    out : tuple of five arrays, optional
        Where to write the fields: exactly their shapes and dtypes, any strides, apart from every
        input.

    Returns
    -------
    state : SampleState
        m and l as those of `softmax_state`. ``values``, float64, by which the draws are ordered,
        ``logits``, their ``scale * x`` in float32 (float64 for float64), and ``indices``, int64,
        have the shape of m and one more axis of length num, the last one whatever `axis` is. What a
        row lacks is -inf, -inf and -1.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `sample`.

    See Also
    --------
    merge : The state of two parts of a row.
    sample : With filters.

    Notes
    -----
    To draw from the k largest of a row in parts, merge those of `softmax_topk_state`, draw from
    their ``values`` and take what ``indices`` has there.

    Examples
    --------
    >>> x = numpy.log(numpy.array([0.1, 0.2, 0.3, 0.4]))
    >>> a = cuattn.sample_state(x[:2], 3, seed=1)
    >>> b = cuattn.sample_state(x[2:], 3, seed=1, index_offset=2)
    >>> cuattn.merge(a, b).indices
    array([2, 3, 1])
    >>> cuattn.sample(x, 3, seed=1)
    array([2, 3, 1])
    """
    call = request_sample.sample_state(x, num, seed, offset, axis, scale, rows, index_offset, out)
    return prepare(call, SampleState)
