"""Attention over prefixes that all sequences have, and over the cache of each."""

from __future__ import annotations

from typing import Any, SupportsIndex, overload

from numpy.typing import NDArray

from cuattn._arrays.attention_types import (
    CascadeAlone,
    CascadeOpen,
    CascadeWithLse,
    HostPrefixes,
    Layout,
    OtherPrefixes,
    Precision,
    SplitSize,
    Window,
)
from cuattn._arrays.keywords import explained
from cuattn._arrays.types import Host, Other, Pair, Unpack
from cuattn._attention import request_cascade, request_kvcache
from cuattn._attention.cascade_parts import over_parts


@overload
def attention_cascade(
    q: Host,
    prefixes: HostPrefixes,
    k_cache: Host,
    v_cache: Host | None,
    /,
    **options: Unpack[CascadeAlone],
) -> NDArray[Any]: ...
@overload
def attention_cascade(
    q: Host,
    prefixes: HostPrefixes,
    k_cache: Host,
    v_cache: Host | None,
    /,
    **options: Unpack[CascadeWithLse],
) -> Pair: ...
@overload
def attention_cascade(
    q: Other,
    prefixes: OtherPrefixes,
    k_cache: Other,
    v_cache: Other | None,
    /,
    **options: Unpack[CascadeOpen],
) -> Any: ...
@explained
def attention_cascade(
    q: Any,
    prefixes: Any,
    k_cache: Any,
    v_cache: Any,
    /,
    *,
    kv_lens: Any = None,
    page_table: Any = None,
    k_new: Any = None,
    v_new: Any = None,
    value_dim: SupportsIndex | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    split_size: SplitSize = "auto",
    is_causal: bool = False,
    q_offset: Any = None,
    window: Window | None = None,
    scale: Any = None,
    softcap: Any = None,
    mask: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    q_lens: Any = None,
    layout: Layout = "BHSD",
    precision: Precision | None = None,
    dtype: Any = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """`attention_kvcache` behind prefixes that all sequences have, each of which is read once.

    The queries of all sequences go over a prefix as if they were one sequence; then those of each
    over its cache, and `merge_attention_states` puts the parts together.

    Parameters
    ----------
    q : cupy.ndarray or numpy.ndarray
        As `attention_kvcache`.
    prefixes : list or tuple of pairs (k, v) of arrays, shapes (H_kv, P, D) and (H_kv, P, D_v)
        The first keys of every sequence, in this order, of any numbers P; dtype of q, any strides.
        v is None with `value_dim`.
    k_cache, v_cache : array, or None for v_cache
        As `attention_kvcache`: what a sequence has behind the prefixes.
    kv_lens, page_table, k_new, v_new, value_dim, k_scale, v_scale, split_size
        As `attention_kvcache`, of the cache alone.
    is_causal, window, scale, softcap, alibi_slopes, sinks, q_lens, precision, dtype, return_lse
        As `attention_kvcache`, over the keys of the prefixes and of the cache as one sequence.
    q_offset : int or array of int32 or int64, shape (B,), optional
        Place of query 0 among all keys, those of the prefixes first. By default the last query
        stands at the last key.
    mask : array of bool, optional
        As `attention_kvcache`, of the last M keys in the cache. What it has in excess of these is
        not for prefixes.
    layout : {"BHSD", "BSHD"}, optional
        As `attention_kvcache`; "BSHD": prefixes are (P, H_kv, ·).
    out : array or tuple of arrays, optional
        As `attention_kvcache`, apart from prefixes, too.

    Returns
    -------
    out : array, shape of q with D_v for D, dtype of q or `dtype`
    lse : array, shape (B, H, S_q) in both layouts (leading axes as q has them)
        As `attention_kvcache`.

    Raises
    ------
    TypeError, ValueError
        As `attention_kvcache`.

    See Also
    --------
    attention_kvcache : Pages of a prefix may also stand in the table of every sequence, which then
        reads them by itself: faster where prefixes are short, or sequences few.
    merge_attention_states : What puts parts together.

    Notes
    -----
    A prefix is read once if neither `window` has a left bound nor `alibi_slopes` are given, and all
    queries see all of it, by shapes and numbers alone: without `is_causal`; with one query of each
    sequence; with as many new keys as queries; or from an int q_offset on. Else each sequence
    reads it by itself, with the same result. Each part is rounded to the dtype of q before it is
    merged. The bits of a sequence depend on the batch only as those of `attention_kvcache` do.

    References
    ----------
    .. [1] Z. Ye et al., "Cascade Inference: Memory Bandwidth Efficient Shared Prefix Batch
       Decoding", https://flashinfer.ai/2024/02/02/cascade-inference.html.
    .. [2] J. Juravsky et al., "Hydragen: High-Throughput LLM Inference with Shared Prefixes",
       arXiv:2402.05099.

    Examples
    --------
    >>> q, shared = numpy.zeros((2, 1, 1, 4)), numpy.zeros((1, 3, 4))
    >>> v = numpy.array([1.0, 2.0, 3.0]).reshape(1, 3, 1)
    >>> caches = numpy.zeros((2, 1, 5, 4)), numpy.full((2, 1, 5, 1), 6.0)
    >>> lens = numpy.array([1, 0])
    >>> cuattn.attention_cascade(q, [(shared, v)], *caches, kv_lens=lens).ravel().round(6)
    array([3., 2.])
    """
    arrays = {"mask": mask, "alibi_slopes": alibi_slopes, "sinks": sinks, "q_lens": q_lens}
    arrays |= {"kv_lens": kv_lens, "page_table": page_table, "k_new": k_new, "v_new": v_new}
    call = request_kvcache.attention_kvcache(
        {"q": q, "k_cache": k_cache, "v_cache": v_cache},
        arrays,
        {"k_scale": k_scale, "v_scale": v_scale},
        value_dim,
        q_offset,
        split_size,
        layout,
        (is_causal, window, scale, softcap, precision),
        dtype,
        return_lse,
        out,
    )
    return over_parts(call, request_cascade.prefixes(prefixes, call, out))
