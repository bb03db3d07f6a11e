"""Gradients of attention, for sequences of one or of many lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex, overload

from cuattn._arrays.attention_types import (
    Backward,
    Layout,
    Precision,
    VarlenBackward,
    Window,
)
from cuattn._arrays.results import AttentionGradients
from cuattn._arrays.types import Host, Other, Unpack
from cuattn._attention import checks, request_backward
from cuattn._attention.run_backward import prepare
from cuattn._device.signatures import remembered


@overload
def attention_backward(
    grad: Host, q: Host, k: Host, v: Host, y: Host, lse: Host, /, **options: Unpack[Backward]
) -> AttentionGradients: ...
@overload
def attention_backward(
    grad: Other, q: Other, k: Other, v: Other, y: Other, lse: Other, /, **options: Unpack[Backward]
) -> Any: ...
@remembered()
def attention_backward(
    grad: Any,
    q: Any,
    k: Any,
    v: Any,
    y: Any,
    lse: Any,
    /,
    *,
    grad_lse: Any = None,
    is_causal: bool = False,
    q_offset: Any = None,
    window: Window | None = None,
    scale: Any = None,
    softcap: Any = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score: str | None = None,
    score_args: Mapping[str, Any] | None = None,
    q_lens: Any = None,
    kv_lens: Any = None,
    layout: Layout = "BHSD",
    precision: Precision | None = None,
    return_dbias: bool = False,
    return_dscore: bool | Sequence[str] = False,
    out: Any = None,
) -> Any:
    """Gradients of `attention` with respect to its arrays.

    The scores are computed again from q, k and lse, block by block, and never written.

    Parameters
    ----------
    grad : cupy.ndarray or numpy.ndarray, shape and dtype of y
        Gradient with respect to the result; any strides, 0 too.
    q, k, v : array
        As in the forward call, but D and D_v are at most 256.
    y, lse : array
        What it returned: ``y, lse = attention(q, k, v, return_lse=True)``.
    grad_lse : array, shape and dtype of lse, optional
        Gradient with respect to lse. Default: 0.
    is_causal, q_offset, window, scale, softcap, mask, bias, alibi_slopes, sinks
        As in the forward call: with others the results are wrong, which cannot be checked.
    score, score_args, q_lens, kv_lens, layout, precision
        Likewise.
    return_dbias : bool, optional
        Also return the gradient of `bias`, which takes two more products.
    return_dscore : bool or sequence of str, optional
        Also return the gradients of these arrays of `score_args`; True: of all that are floating.
        Their indices may be made of numbers, b, h and q - k only, as in ``table[h, q - k]`` or
        ``t[bucket[abs(q - k)]]``. Each reference to one takes two more products.
    out : tuple of arrays, optional
        Where to write dq, dk and dv, and dbias with `return_dbias`: exactly their shapes and
        dtypes, any strides, apart from every input and from each other.

    Returns
    -------
    gradients : AttentionGradients
        A named tuple of seven. dq, dk, dv: shape and dtype of q, k, v. dbias: of bias; None without
        `return_dbias`. dalibi_slopes, dsinks: shape of the argument, dtype of lse; None where there
        is no such argument, or it is of integers. dscore: a dict of arrays, by the names in
        `score_args` and of their shapes and dtypes; None without `return_dscore`.

    Raises
    ------
    TypeError, ValueError
        As `attention`.

    See Also
    --------
    attention : The forward pass.
    attention_backward_varlen : Sequences of many lengths, without padding.

    Notes
    -----
    Keys that no query sees have a gradient of 0, and so have queries that see none and padding;
    what those arrays hold there may be anything, but grad of a query that sees no key must be
    finite. NaN in a row that takes part reaches what depends on it, and may reach other rows of
    the same tile.

    On Hopper, gradients of the scores of long sequences (1024 queries and keys or more, but not of
    `attention_backward_varlen`) are stored for a while, 16 bits each and at most 1 GiB at a time:
    dq takes one product then, not three. That depends on the sequence, not on the batch.

    There is no gradient of numbers. That of `scale` is ``sum(q * dq) / scale``, without `score`. At
    a kink of `score` (``abs``, ``min``, ``max``) its derivative is that of one side, and where the
    score is -inf it is 0. There is no dropout.

    References
    ----------
    .. [1] T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
       Partitioning", arXiv:2307.08691, algorithm 2.

    Examples
    --------
    >>> q = k = numpy.zeros((2, 4))
    >>> v = numpy.array([[1.0], [3.0]])
    >>> y, lse = cuattn.attention(q, k, v, is_causal=True, return_lse=True)
    >>> grad = numpy.ones((2, 1))
    >>> dq, dk, dv, *_ = cuattn.attention_backward(grad, q, k, v, y, lse, is_causal=True)
    >>> dv
    array([[1.5],
           [0.5]])
    >>> how = {"score": "s + t[k - q + 1]", "score_args": {"t": numpy.zeros(3)}}
    >>> y, lse = cuattn.attention(q, k, v, **how, return_lse=True)
    >>> cuattn.attention_backward(grad, q, k, v, y, lse, **how, return_dscore=True).dscore["t"]
    array([-0.5,  0. ,  0.5])
    """
    arrays = {"grad_lse": grad_lse, "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes}
    arrays |= {"sinks": sinks, "q_lens": q_lens, "kv_lens": kv_lens}
    numbers = is_causal, window, scale, softcap, precision
    required = {"grad": grad, "q": q, "k": k, "v": v, "y": y, "lse": lse}
    rest = return_dbias, out, score, score_args, return_dscore
    return prepare(request_backward.backward(required, arrays, q_offset, layout, numbers, *rest))


@overload
def attention_backward_varlen(
    grad: Host,
    q: Host,
    k: Host,
    v: Host,
    y: Host,
    lse: Host,
    cu_seqlens_q: Host,
    cu_seqlens_k: Host,
    /,
    **options: Unpack[VarlenBackward],
) -> AttentionGradients: ...
@overload
def attention_backward_varlen(
    grad: Other,
    q: Other,
    k: Other,
    v: Other,
    y: Other,
    lse: Other,
    cu_seqlens_q: Other,
    cu_seqlens_k: Other,
    /,
    **options: Unpack[VarlenBackward],
) -> Any: ...
@remembered()
def attention_backward_varlen(
    grad: Any,
    q: Any,
    k: Any,
    v: Any,
    y: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    /,
    *,
    max_seqlen_q: SupportsIndex | None = None,
    max_seqlen_k: SupportsIndex | None = None,
    grad_lse: Any = None,
    is_causal: bool = False,
    q_offset: Any = None,
    window: Window | None = None,
    scale: Any = None,
    softcap: Any = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score: str | None = None,
    score_args: Mapping[str, Any] | None = None,
    q_lens: Any = None,
    kv_lens: Any = None,
    precision: Precision | None = None,
    return_dbias: bool = False,
    return_dscore: bool | Sequence[str] = False,
    out: Any = None,
) -> Any:
    """Gradients of `attention_varlen` with respect to its arrays.

    Parameters
    ----------
    grad : cupy.ndarray or numpy.ndarray, shape and dtype of y
        Gradient with respect to the result.
    q, k, v, cu_seqlens_q, cu_seqlens_k
        As in the forward call.
    y, lse : array
        What it returned.
    max_seqlen_q, max_seqlen_k : int, optional
        What a caller knows of the longest sequences; no result depends on it.
    grad_lse : array, shape and dtype of lse, optional
        Gradient with respect to lse. Default: 0.
    is_causal, q_offset, window, scale, softcap, mask, bias, alibi_slopes, sinks
        As in the forward call.
    score, score_args, q_lens, kv_lens, precision
        Likewise.
    return_dbias, return_dscore, out
        As `attention_backward`.

    Returns
    -------
    gradients : AttentionGradients
        As `attention_backward`.

    Raises
    ------
    TypeError, ValueError
        As `attention`.

    See Also
    --------
    attention_varlen : The forward pass.
    attention_backward : Sequences of one length.

    Examples
    --------
    >>> q = k = v = numpy.ones((3, 1, 1))  # two sequences, of 1 and of 2 tokens
    >>> ends = numpy.array([0, 1, 3])
    >>> y, lse = cuattn.attention_varlen(q, k, v, ends, ends, return_lse=True)
    >>> gradients = cuattn.attention_backward_varlen(y, q, k, v, y, lse, ends, ends)
    >>> gradients.dv[:, 0, 0]
    array([1., 1., 1.])
    """
    checks.hint("max_seqlen_q", max_seqlen_q)
    checks.hint("max_seqlen_k", max_seqlen_k)
    arrays = {"grad_lse": grad_lse, "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes}
    arrays |= {"sinks": sinks, "q_lens": q_lens, "kv_lens": kv_lens}
    numbers = is_causal, window, scale, softcap, precision
    required = {"grad": grad, "q": q, "k": k, "v": v, "y": y, "lse": lse}
    required |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    rest = return_dbias, out, score, score_args, return_dscore
    return prepare(request_backward.backward(required, arrays, q_offset, "BSHD", numbers, *rest))
