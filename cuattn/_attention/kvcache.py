"""Attention over a cache of keys and values, and what writes into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, SupportsIndex, overload

from numpy.typing import NDArray

from cuattn._arrays.attention_types import (
    CachedAlone,
    CachedOpen,
    CachedWithLse,
    CacheScale,
    Layout,
    Precision,
    SplitSize,
    Window,
)
from cuattn._arrays.types import Array, Host, Other, Pair, Unpack
from cuattn._attention import request_kvcache, run_kvcache_host
from cuattn._device.signatures import remembered


@overload
def attention_kvcache(
    q: Host, k_cache: Host, v_cache: Host | None, /, **options: Unpack[CachedAlone]
) -> NDArray[Any]: ...
@overload
def attention_kvcache(
    q: Host, k_cache: Host, v_cache: Host | None, /, **options: Unpack[CachedWithLse]
) -> Pair: ...
@overload
def attention_kvcache(
    q: Other, k_cache: Other, v_cache: Other | None, /, **options: Unpack[CachedOpen]
) -> Any: ...
@remembered()
def attention_kvcache(
    q: Any,
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
    score: str | None = None,
    score_args: Mapping[str, Any] | None = None,
    q_lens: Any = None,
    layout: Layout = "BHSD",
    precision: Precision | None = None,
    dtype: Any = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """`attention` of one or a few new queries of each sequence over its cached keys.

    The cache is dense, or in pages that sequences share out among them. Nothing beyond the length
    of a sequence is read, and no length is read on the host.

    Parameters
    ----------
    q : cupy.ndarray or numpy.ndarray, shape (B, H, S_q, D), or (H, S_q, D) with a dense cache
        float16, bfloat16, float32 or float64, any strides.
    k_cache : array, shape (B, H_kv, S_max, D) or (P, H_kv, page_size, D)
        A dense cache (without B as q) or, with `page_table`, P pages of any size. dtype of q,
        float8_e4m3fn or int8; any strides, as those of one half of a pool of shape (P, 2, ...). H
        must be a multiple of H_kv.
    v_cache : array or None, shape of k_cache with D_v for D, dtype of k_cache
        D and D_v are at most 256. None with `value_dim`.
    kv_lens : array of int32 or int64, shape (B,), optional
        Keys of each sequence in the cache before the call; with `k_new` it is needed. Default: all
        that there is room for. It is left as it is. (``nonpad_kv_seqlen`` of ONNX counts the new
        keys, too.)
    page_table : array of int32 or int64, shape (B, M), optional
        Key j of sequence b is row ``j % page_size`` of page ``page_table[b, j // page_size]``. Keys
        of a page below 0, or of P and more, do not exist. Entries past the last key are not looked
        at.
    k_new, v_new : array, shape (B, H_kv, S_new, ·), dtype of q, optional
        Written into the cache behind its first `kv_lens` keys, and seen: sequence b has
        ``kv_lens[b] + S_new`` keys then, or ``kv_lens[b] + min(q_lens[b], S_new)``. What does not
        fit, or has no page, is dropped.
    value_dim : int, optional
        The values are the first `value_dim` columns of k_cache, whose D is at most 576 then, as in
        multi-head latent attention; `v_cache`, `v_new` and `v_scale` are None.
    k_scale, v_scale : float or array of float32, optional
        What the numbers of a float8_e4m3fn or int8 cache are multiplied with: one number, or one
        per head, (H_kv,), or one per token and head, in the shape of the cache without its last
        axis. Of new tokens the latter are written: their largest number over 448, or over 127.
    split_size : "auto", None or int, optional
        Keys of a part that one block of a device computes, a multiple of 16 and at least 128.
        "auto": chosen by D and by the keys that a sequence has room for. With either the bits of a
        sequence depend on it alone; the workspace grows with the room, and 256 is good up to 32768
        keys, 2048 beyond. None: parts as long as occupies the device best; bits depend on the
        batch.
    is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, precision, dtype, return_lse
        As `attention`. The keys of a sequence are counted with the new ones, so that by default
        its last query stands at its last key. q_offset as an array is of int32 or int64.
    score, score_args
        As `attention`; `k` counts the keys of a sequence, wherever its pages lie.
    mask : array of bool, optional
        Must broadcast to (B, H, S_q, M) (leading axes as q has them): whether a query sees the
        last M keys of its sequence, as the branches of a tree of drafts. It sees all before.
    q_lens : array of int32 or int64, shape (B,), optional
        Queries of each sequence that are not padding.
    layout : {"BHSD", "BSHD"}, optional
        "BSHD": q, k_new, v_new and the result are (B, S, H, D), caches (B, S_max, H_kv, D) or
        (P, page_size, H_kv, D).
    out : array or tuple of arrays, optional
        As `attention`, apart from the cache, too.

    Returns
    -------
    out : array, shape of q with D_v for D, dtype of q or `dtype`
    lse : array, shape (B, H, S_q) in both layouts (leading axes as q has them)
        Natural logarithm; float32, or float64 where q is float64. Only with `return_lse`.

    Raises
    ------
    TypeError, ValueError
        As `attention`. Lengths are checked where they are NumPy arrays: none below 0, and no
        sequence longer than there is room for. On a device they are trusted, cut off there, and
        never lead outside.

    See Also
    --------
    kv_append : Write new keys and values, and nothing else.
    attention : Keys and values that are no cache.

    Notes
    -----
    A `bias` has only `attention`. Pages may belong to several sequences, as those of a common
    prefix do; which of them is right where two sequences write into one, is not defined.

    References
    ----------
    .. [1] T. Dao, D. Haziza, F. Massa, G. Sizov, "Flash-Decoding for long-context inference",
       https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
    .. [2] W. Kwon et al., "Efficient Memory Management for Large Language Model Serving with
       PagedAttention", arXiv:2309.06180.

    Examples
    --------
    >>> pages = numpy.zeros((3, 1, 2, 4))  # of 2 keys each
    >>> v = numpy.array([1.0, 2.0, 9.0, 9.0, 6.0, 9.0]).reshape(3, 1, 2, 1)
    >>> table, lens = numpy.array([[0, 2]]), numpy.array([3])
    >>> q = numpy.zeros((1, 1, 1, 4))
    >>> cuattn.attention_kvcache(q, pages, v, kv_lens=lens, page_table=table).round(6)
    array([[[[3.]]]])
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
        score,
        score_args,
    )
    if call.runtime is None:
        return run_kvcache_host.compute(call)
    from cuattn._attention.run_kvcache import prepare

    return prepare(call)


@remembered()
def kv_append(
    k_cache: Array,
    v_cache: Array | None,
    k_new: Array,
    v_new: Array | None,
    /,
    *,
    kv_lens: Array,
    page_table: Array | None = None,
    new_lens: Array | None = None,
    k_scale: CacheScale = None,
    v_scale: CacheScale = None,
    layout: Layout = "BHSD",
) -> None:
    """Write new keys and values into a cache, behind those that are there.

    Parameters
    ----------
    k_cache, v_cache : cupy.ndarray or numpy.ndarray
        As in `attention_kvcache`; written in place. Without `v_cache` and `v_new`, both None, there
        is but one cache.
    k_new, v_new : array, shape (B, H_kv, S_new, ·)
        dtype of the cache; for one of 8 bits float16, bfloat16, float32 or float64.
    kv_lens : array of int32 or int64, shape (B,)
        Keys of each sequence in the cache. It is left as it is.
    page_table : array of int32 or int64, shape (B, M), optional
        As in `attention_kvcache`. What has no page is dropped.
    new_lens : array of int32 or int64, shape (B,), optional
        How many of the new keys each sequence has. Default: S_new.
    k_scale, v_scale : float or array of float32, optional
        As in `attention_kvcache`: new numbers are divided by their scale and rounded to nearest,
        those past the largest to that one. A scale per token and head is computed and written.
    layout : {"BHSD", "BSHD"}, optional
        As in `attention_kvcache`.

    Returns
    -------
    None
        The cache is written in place.

    Raises
    ------
    TypeError, ValueError
        As `attention_kvcache`.

    See Also
    --------
    attention_kvcache : Attention over the cache, which can write as well.

    Examples
    --------
    >>> k_cache = v_cache = numpy.zeros((1, 1, 4, 2))
    >>> cuattn.kv_append(k_cache, v_cache, *numpy.ones((2, 1, 1, 2, 2)), kv_lens=numpy.array([1]))
    >>> k_cache[0, 0, :, 0]
    array([0., 1., 1., 0.])
    """
    required = {"k_cache": k_cache, "v_cache": v_cache, "k_new": k_new, "v_new": v_new}
    call = request_kvcache.kv_append(
        {**required, "kv_lens": kv_lens},
        {"page_table": page_table, "new_lens": new_lens},
        {"k_scale": k_scale, "v_scale": v_scale},
        layout,
    )
    if call.runtime is not None:
        from cuattn._attention.run_append import prepare

        return prepare(call)
    run_kvcache_host.append(call)
    return None
