"""What softmax with a selection has to know of a row, and the merge of states."""

from __future__ import annotations

from typing import Any, SupportsIndex, TypeVar, overload

from cuattn import reference
from cuattn._arrays import types
from cuattn._arrays.outputs import into, rounded
from cuattn._arrays.results import LogitsState, SampleState, SoftmaxState, SoftmaxTopKState
from cuattn._arrays.types import Array, Host, Other, Unpack
from cuattn._device.signatures import remembered
from cuattn._topk import request
from cuattn._topk.run import prepare
from cuattn._topk.run_merge import prepare_merge

State = TypeVar("State", SoftmaxState, LogitsState, SoftmaxTopKState, SampleState)


@overload
def softmax_topk_state(
    x: Host, k: SupportsIndex, /, **options: Unpack[types.SoftmaxTopKState]
) -> SoftmaxTopKState: ...
@overload
def softmax_topk_state(
    x: Other, k: SupportsIndex, /, **options: Unpack[types.SoftmaxTopKState]
) -> Any: ...
@remembered("scale")
def softmax_topk_state(
    x: Any,
    k: SupportsIndex,
    /,
    *,
    axis: SupportsIndex | None = -1,
    scale: Any = None,
    index_offset: SupportsIndex = 0,
    out: Any = None,
) -> SoftmaxTopKState:
    """What a softmax and its k most probable elements have to know of a row, in a form that merges.

    For rows whose parts never meet: shards of a vocabulary on several GPUs, chunks of a large
    projection. Probabilities are ``softmax(state.values, state=state)``.

    Parameters
    ----------
    x, axis, scale
        As `softmax_topk`.
    k : int
        Not negative; more than the row has are filled up.
    index_offset : int, optional
        Added to every index: where in the row this part begins. Not negative.
    out : tuple of four arrays, optional
        Where to write m, l, values and indices, as a state has them: exactly the shapes and dtypes
        of the results, any strides, apart from every input.

    Returns
    -------
    state : SoftmaxTopKState
        m and l as those of `softmax_state`. ``values``, the k largest of ``scale * x`` in float32
        (float64 for float64), best first, and ``indices``, int64, have the shape of m and one more
        axis of length k, the last one whatever `axis` is. What a row lacks has value -inf and
        index -1.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax_topk`.

    See Also
    --------
    merge : The state of two parts of a row.
    softmax : With `state`, probabilities of values or of the elements of a part.

    Examples
    --------
    >>> state = cuattn.softmax_topk_state(numpy.array([1.0, 3.0]), 1, index_offset=10)
    >>> state.values, state.indices
    (array([3.]), array([11]))
    >>> cuattn.softmax(state.values, state=state).round(3)
    array([0.881])
    """
    call = request.softmax_topk_state(x, k, axis, scale, index_offset, out)
    return prepare(call, SoftmaxTopKState)


@remembered()
def merge(a: State, b: State, /, *, out: tuple[Array, ...] | None = None) -> State:
    """State of a row from the states of two parts of it: associative up to rounding.

    Parameters
    ----------
    a, b : SoftmaxState, LogitsState, SoftmaxTopKState or SampleState
        Both of one kind, shape and dtype. Empty are the states of nothing: ``(-inf, 0)``, with a t
        of 0 and a logit of NaN, and for the selection -inf and -1 in every place.
    out : state of their kind or tuple of its arrays, optional
        Where to write: exactly the shapes and dtypes of a, any strides. A state may be a or b
        itself, or have arrays of theirs; of a selection all must be apart from every input.

    Returns
    -------
    state : state of their kind
        Of a selection the k best of both, in the order of `softmax_topk_state`; values and indices
        are those of the whole row exactly, however it was split. So are the draws of
        `sample_state`, which a row that turns out to hold NaN or +inf has none of. Of logits the
        one that is a number.

    Raises
    ------
    TypeError
        If a or b is not a state, or they or their arrays differ in kind, library or dtype.
    ValueError
        If their shapes differ, they are on different devices, or `out` overlaps an input.

    See Also
    --------
    softmax_state : The state of a row or of a part of it.
    softmax_topk_state : With the k largest elements.
    logits_state : With the score of a label, and what entropies are made of.
    sample_state : With draws.

    References
    ----------
    .. [1] M. Milakov, N. Gimelshein, arXiv:1805.02867, section 3.1.

    Examples
    --------
    >>> x = numpy.array([0.0, 1.0, 2.0, 3.0])
    >>> whole = cuattn.merge(cuattn.softmax_state(x[:1]), cuattn.softmax_state(x[1:]))
    >>> bool(numpy.isclose(whole.lse, cuattn.logsumexp(x)))
    True
    """
    call = request.merge(a, b, out)
    if call.runtime is not None:
        return prepare_merge(call)
    size = len(call.arrays) // 2
    both = reference.merge(call.kind(*call.arrays[:size]), call.kind(*call.arrays[size:]))
    found = (rounded(part, like.dtype) for part, like in zip(both, call.arrays, strict=False))
    return call.kind(*(map(into, call.outs, found) if call.outs else found))
