"""The best keys of each query, and their share in its attention."""

from __future__ import annotations

from typing import Any, SupportsIndex, overload

from cuattn._arrays.attention_types import (
    Layout,
    Precision,
    TopKAlone,
    TopKOpen,
    TopKState,
    Window,
)
from cuattn._arrays.results import SoftmaxTopK, SoftmaxTopKState
from cuattn._arrays.types import Host, Other, Output, Unpack
from cuattn._attention import request_topk
from cuattn._attention.run_topk import prepare_topk
from cuattn._device.signatures import remembered


@overload
def attention_topk(
    q: Host, k: Host, num: SupportsIndex, /, **options: Unpack[TopKAlone]
) -> SoftmaxTopK: ...
@overload
def attention_topk(
    q: Host, k: Host, num: SupportsIndex, /, **options: Unpack[TopKState]
) -> SoftmaxTopKState: ...
@overload
def attention_topk(
    q: Other, k: Other, num: SupportsIndex, /, **options: Unpack[TopKOpen]
) -> Any: ...
@remembered()
def attention_topk(
    q: Any,
    k: Any,
    num: SupportsIndex,
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
    q_lens: Any = None,
    kv_lens: Any = None,
    layout: Layout = "BHSD",
    precision: Precision | None = None,
    index_offset: SupportsIndex = 0,
    output: Output | str = "prob",
    out: Any = None,
) -> SoftmaxTopK | SoftmaxTopKState:
    """The keys with the largest scores of each query, and their probabilities among all it sees.

    The same as `softmax_topk` of the scores of `attention`, which are never written: one pass over
    k for `num` up to 64, and one more for every further 64.

    Parameters
    ----------
    q, k
        As `attention`; D is at most 256.
    num : int
        How many keys, from 0 to S_k; with ``output="state"`` more are filled up.
    is_causal, q_offset, window, scale, softcap, mask, bias, alibi_slopes
        As `attention`.
    q_lens, kv_lens, layout, precision
        As `attention`.
    index_offset : int, optional
        Added to every index: where in all keys these begin. Not negative.
    output : {"prob", "log_prob", "logit", "state"}, optional
        Probabilities, their natural logarithms, scores, or what merges with the same of other keys.
    out : tuple of arrays, optional
        Where to write values and indices, or m, l, values and indices: exactly the shapes and
        dtypes of the results, any strides, apart from every input.

    Returns
    -------
    values : array, shape of q with `num` for D, dtype of q
        Best first. What a query lacks has probability 0, or -inf.
    indices : array of int64, shape of values
        Of equal scores that of the lower index is first; NaN comes after numbers. What a query
        lacks has index -1.
    state : SoftmaxTopKState
        Instead, with ``output="state"``: m and l of each query, of its shape in `layout`, its
        scores and indices. m, l and values are float32, or float64 where q is float64.

    Raises
    ------
    TypeError, ValueError
        As `attention`; if `num` or `index_offset` is out of range, or `output` is another word.

    See Also
    --------
    merge : The state of all keys from those of two parts of them.
    softmax_topk : The same of scores that are there.
    attention : The sum of values under these probabilities.

    Notes
    -----
    Keys that a query does not see, and those with a score of -inf, are never selected. Scores must
    be finite in float32 (float64 for float64), or else probabilities are NaN as those of `softmax`.
    Results are bitwise the same on every run and, on a device, those of a query depend on nothing
    but itself, its keys and their number. Runs on the current stream of the device of q; does not
    synchronise.

    Examples
    --------
    >>> base = numpy.array([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
    >>> cuattn.attention_topk(numpy.array([[1.0, 0.0]]), base, 2, scale=1, output="logit")
    SoftmaxTopK(values=array([[2., 1.]]), indices=array([[2, 1]]))
    """
    arrays = {"mask": mask, "bias": bias, "alibi_slopes": alibi_slopes}
    arrays |= {"q_lens": q_lens, "kv_lens": kv_lens}
    numbers = is_causal, window, scale, softcap, precision
    call = request_topk.attention_topk(
        q, k, num, arrays, q_offset, layout, numbers, index_offset, output, out
    )
    return prepare_topk(call)
