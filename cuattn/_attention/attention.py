"""Attention without the matrix of its scores, for sequences of one or of many lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, SupportsIndex, overload

from numpy.typing import NDArray

from cuattn._arrays.attention_types import (
    AttentionAlone,
    AttentionOpen,
    AttentionWithLse,
    Layout,
    Precision,
    VarlenAlone,
    VarlenOpen,
    VarlenWithLse,
    Window,
)
from cuattn._arrays.results import BlockMask
from cuattn._arrays.types import Host, Other, Pair, Unpack
from cuattn._attention import checks, request
from cuattn._attention.run import prepare
from cuattn._device.signatures import remembered


@overload
def attention(q: Host, k: Host, v: Host, /, **options: Unpack[AttentionAlone]) -> NDArray[Any]: ...
@overload
def attention(q: Host, k: Host, v: Host, /, **options: Unpack[AttentionWithLse]) -> Pair: ...
@overload
def attention(q: Other, k: Other, v: Other, /, **options: Unpack[AttentionOpen]) -> Any: ...
@remembered()
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
    score: str | None = None,
    score_args: Mapping[str, Any] | None = None,
    q_lens: Any = None,
    kv_lens: Any = None,
    layout: Layout = "BHSD",
    precision: Precision | None = None,
    dtype: Any = None,
    return_lse: bool = False,
    out: Any = None,
    block_mask: BlockMask | None = None,
) -> Any:
    """Scaled dot-product attention: ``softmax(scale * q @ k.T) @ v`` for each head.

    One pass over k and v; the scores are never written. Head h of q uses head
    ``h // (H // H_kv)`` of k and v, which are not copied. Scores are, in this order, scaled,
    capped, added to, masked.

    Parameters
    ----------
    q : cupy.ndarray or numpy.ndarray, shape (B, H, S_q, D), (H, S_q, D) or (S_q, D)
        float16, bfloat16, float32 or float64, any strides. An array of another library is
        taken without a copy. One on the CPU is computed by NumPy, block by block.
    k : array, shape (B, H_kv, S_k, D), dtype of q
        As many dimensions as q; H must be a multiple of H_kv.
    v : array, shape (B, H_kv, S_k, D_v), dtype of q
        D and D_v are at most 512.
    is_causal : bool, optional
        Query i sees keys up to ``i + q_offset``.
    q_offset : int or array of int, shape (B,), optional
        Place of query 0 among the keys. Default: ``S_k - S_q`` (with lengths those), so that the
        last query sees all keys.
    window : (left, right), optional
        Query i sees keys from ``i + q_offset - left`` to ``i + q_offset + right``; None has no
        bound. Together with `is_causal` both apply.
    scale : float, optional
        Multiplies the scores. Default: ``1 / sqrt(D)``.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``.
    mask : array of bool, optional
        True: attend. Must broadcast to (B, H, S_q, S_k) (leading axes as q has them); never copied.
        One of padding, (B, S_k), is ``mask[:, None, None, :]``, or better `kv_lens`.
    bias : array, optional
        Added to the scores: any of the four dtypes, broadcast as `mask`.
    alibi_slopes : array, shape (H,) or (B, H), optional
        Adds ``-slope * abs(i + q_offset - j)`` to the score of query i and key j.
    sinks : array, shape (H,), optional
        Scores of one more key of each head, with a value of 0; neither scaled nor masked.
    score : str, optional
        A Python expression that scores become, after all above and before what hides keys: of `s`,
        the score, `b`, the sequence, `h`, the head of q, `q` and `k`, the places of query
        (``i + q_offset``) and key (j), `inf`, and elements of arrays. See Notes.
    score_args : dict of str to array, optional
        The arrays by the names that `score` has for them: up to 6, of up to 4 dimensions, any
        strides, of float dtypes, bool or integers (but uint64).
    q_lens, kv_lens : array of int, shape (B,), optional
        Queries and keys of each sequence that are not padding. Values from 0 to S: checked where
        it is a NumPy array; a device array is trusted, and never leads outside the sequence.
    layout : {"BHSD", "BSHD"}, optional
        "BSHD": q, k, v and the result are (B, S, H, D) or (S, H, D).
    precision : {None, "ieee", "tf32"}, optional
        How float32 is multiplied: as such (None and "ieee"), or rounded to 10 bits of mantissa.
    dtype : dtype, optional
        That of the result: float32 where q has 16 bits, for what is added up or merged further.
        Default: dtype of q.
    return_lse : bool, optional
        Also return the log-sum-exp of the scores.
    out : array or tuple of arrays, optional
        Where to write: exactly the shape and dtype of the result, any strides, apart from every
        input. With `return_lse` a pair.
    block_mask : BlockMask, optional
        A mask of `cuattn.block_mask` in the place of `mask`: its empty tiles cost nothing.

    Returns
    -------
    out : array, shape of q with D_v for D, dtype of q or `dtype`
    lse : array, shape (B, H, S_q) in both layouts (leading axes as q has them)
        Natural logarithm; float32, or float64 where q is float64. Only with `return_lse`.

    Raises
    ------
    TypeError
        If an argument is not an array, its dtype is not supported, or arrays of two libraries meet.
    ValueError
        If shapes do not fit, arrays are on different devices, `out` overlaps an input, or an option
        has no such value.

    See Also
    --------
    attention_varlen : Sequences of many lengths, without padding.
    block_mask : Masks with large parts in which nothing is seen.
    merge_attention : Attention from its results over two parts of the keys.

    Notes
    -----
    16-bit and float32 results accumulate in float32, float64 ones in float64. A query that sees no
    key gives 0 with an lse of -inf (with `sinks`: of the sink); one that is padding always 0 and
    -inf. What no query sees may hold anything, NaN too. Scores may have any size that is finite
    there: a `bias` of -1e30 or ``finfo.min`` hides a key beside others, and on all keys of a query
    it changes nothing but the lse. Results are bitwise the same on every run and, on a device,
    those of a query depend on nothing but itself and its keys, not on how many queries there are.
    Only few of them over many keys (H / H_kv * S_q up to 16, S_k from 1024 on, without mask and
    bias) are computed another way, as those of a cache, which shows in the last bits.
    Runs on the current stream of the device of q; does not synchronise.

    `score` has ``+ - * / // %``, comparisons, ``& | ~`` (no ``and``, ``or``, ``not``, ``if``),
    ``abs, min, max, exp, log, tanh, sqrt, where(condition, a, b)``, all as NumPy has them, on
    integers of 64 bits, bools, and floats of the precision in which results accumulate. Indices
    are clamped: ``table[i]`` is the first element for every i below 0, and the last one beyond. A
    score of -inf hides the key. A kernel is compiled for each expression, not for each shape.

    References
    ----------
    .. [1] T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
       Partitioning", arXiv:2307.08691, algorithm 1.
    .. [2] O. Press, N. Smith, M. Lewis, "Train Short, Test Long: Attention with Linear Biases
       Enables Input Length Extrapolation", arXiv:2108.12409.

    Examples
    --------
    >>> q = k = numpy.zeros((2, 4))
    >>> cuattn.attention(q, k, numpy.array([[1.0], [3.0]]), is_causal=True)
    array([[1.],
           [2.]])
    >>> bias = {"t": numpy.array([numpy.log(3), 0.0])}  # by distance
    >>> cuattn.attention(q, k, numpy.array([[1.0], [3.0]]), score="s + t[q - k]", score_args=bias)
    array([[2. ],
           [2.5]])
    """
    arrays = {"mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    arrays |= {"q_lens": q_lens, "kv_lens": kv_lens}
    numbers = is_causal, window, scale, softcap, precision
    required = {"q": q, "k": k, "v": v}
    rest = dtype, return_lse, out, score, score_args, block_mask
    return prepare(request.attention(required, arrays, q_offset, layout, numbers, *rest))


@overload
def attention_varlen(
    q: Host,
    k: Host,
    v: Host,
    cu_seqlens_q: Host,
    cu_seqlens_k: Host,
    /,
    **options: Unpack[VarlenAlone],
) -> NDArray[Any]: ...
@overload
def attention_varlen(
    q: Host,
    k: Host,
    v: Host,
    cu_seqlens_q: Host,
    cu_seqlens_k: Host,
    /,
    **options: Unpack[VarlenWithLse],
) -> Pair: ...
@overload
def attention_varlen(
    q: Other,
    k: Other,
    v: Other,
    cu_seqlens_q: Other,
    cu_seqlens_k: Other,
    /,
    **options: Unpack[VarlenOpen],
) -> Any: ...
@remembered()
def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    /,
    *,
    max_seqlen_q: SupportsIndex | None = None,
    max_seqlen_k: SupportsIndex | None = None,
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
    dtype: Any = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """`attention` of sequences of any lengths, laid end to end.

    Parameters
    ----------
    q : cupy.ndarray or numpy.ndarray, shape (total_q, H, D)
    k : array, shape (total_k, H_kv, D), dtype of q
    v : array, shape (total_k, H_kv, D_v), dtype of q
    cu_seqlens_q, cu_seqlens_k : array, shape (B + 1,), int32 or int64
        Sequence b has queries ``q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]]``, and likewise keys. From
        0, never falling, ending at the total: checked where it is a NumPy array; a device array is
        trusted, and never leads outside q, k and v.
    max_seqlen_q, max_seqlen_k : int, optional
        What a caller knows of the longest sequences; no result depends on it.
    mask, bias : array, optional
        Must broadcast to (B, H, M, N), M and N their own last two sizes: query i and key j of
        sequence b use ``[b, h, i, j]``. Beyond M and N a mask is False and a bias 0; an axis of
        length 1 is the same for all.
    is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, score, score_args
        As `attention`, where B counts sequences and S_q and S_k are their lengths.
    precision, dtype, return_lse, out
        As `attention`.
    q_lens, kv_lens : array of int, shape (B,), optional
        As `attention`: padding at the end of each sequence.

    Returns
    -------
    out : array, shape (total_q, H, D_v), dtype of q or `dtype`
    lse : array, shape (H, total_q)
        As `attention`.

    Raises
    ------
    TypeError, ValueError
        As `attention`.

    See Also
    --------
    attention : Sequences of one length.

    Examples
    --------
    >>> q = k = numpy.zeros((3, 1, 4))  # two sequences, of 1 and of 2 tokens
    >>> v = numpy.array([1.0, 2.0, 4.0]).reshape(3, 1, 1)
    >>> ends = numpy.array([0, 1, 3])
    >>> cuattn.attention_varlen(q, k, v, ends, ends)[:, 0, 0]
    array([1., 3., 3.])
    """
    checks.hint("max_seqlen_q", max_seqlen_q)
    checks.hint("max_seqlen_k", max_seqlen_k)
    arrays = {"mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    arrays |= {"q_lens": q_lens, "kv_lens": kv_lens}
    numbers = is_causal, window, scale, softcap, precision
    ends = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    required = {"q": q, "k": k, "v": v, **ends}
    rest = dtype, return_lse, out, score, score_args
    return prepare(request.attention(required, arrays, q_offset, "BSHD", numbers, *rest))
