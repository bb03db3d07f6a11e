"""Calls of common shapes, whose kernels ``python -m cuattn compile`` compiles.

Row-major arrays of fresh memory, as those of most programs; `cuattn` is the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

LENGTHS = (*(2**p for p in range(4, 18)), 32000, 50257, 50304, 128256, 151936)  # and vocabularies
ROWS = 1, 32, 4096
MOST = 2**26  # elements of an array
TOP = 1, 8, 50, 64, 256  # elements that are selected
DIMS = 64, 128
HEADS = (32, 32), (32, 8)  # of queries and of keys
SEQUENCES = 128, 2048
CACHES = (1, 1024), (16, 4096), (64, 8192)  # sequences, and cached keys of each
PAGE = 64


def _rows(dtype: Any) -> Iterator[np.ndarray]:
    for cols in LENGTHS:
        for rows in ROWS:
            yield np.zeros((min(rows, MOST // cols), cols), dtype)


def softmax(cuattn: Any, dtype: Any) -> None:
    """softmax, log_softmax, logsumexp, softmax_state."""
    for x in _rows(dtype):
        cuattn.softmax(x)
        cuattn.softmax(x, return_lse=True)
        cuattn.log_softmax(x)
        cuattn.logsumexp(x, axis=-1)
        cuattn.softmax_state(x)


def gradients(cuattn: Any, dtype: Any) -> None:
    """softmax_backward, log_softmax_backward, attention_backward."""
    for x in _rows(dtype):
        cuattn.softmax_backward(x, x)
        cuattn.log_softmax_backward(x, x)
    for q, k in _queries_and_keys(dtype):
        for is_causal in (False, True):
            y, lse = cuattn.attention(q, k, k, is_causal=is_causal, return_lse=True)
            cuattn.attention_backward(q, q, k, k, y, lse, is_causal=is_causal)


def topk(cuattn: Any, dtype: Any) -> None:
    """top_k, softmax_topk."""
    for x in _rows(dtype):
        for k in TOP:
            if k <= x.shape[-1]:
                cuattn.top_k(x, k)
                cuattn.softmax_topk(x, k)


def logits(cuattn: Any, dtype: Any) -> None:
    """cross_entropy, its gradient, entropy; and a draw, of all, by top_k and by top_p."""
    for x in _rows(dtype):
        labels, lse = np.zeros(len(x), np.int64), np.zeros(len(x), np.promote_types("f4", dtype))
        cuattn.cross_entropy(x, labels, return_lse=True)
        cuattn.cross_entropy_backward(1.0, x, labels, lse)
        cuattn.entropy(x)
        for filters in ({}, {"top_k": 50}, {"top_p": 0.9}):
            cuattn.sample(x, seed=0, **filters)


def _queries_and_keys(dtype: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for dim in DIMS:
        for heads, kv_heads in HEADS:
            for length in SEQUENCES:
                for batch in (1, 8):
                    yield tuple(  # type: ignore[misc]
                        np.zeros((batch, h, length, dim), dtype) for h in (heads, kv_heads)
                    )


def attention(cuattn: Any, dtype: Any) -> None:
    """attention and attention_varlen, also with causal masks, of 64 and 128 columns."""
    for q, k in _queries_and_keys(dtype):
        batch, _, length, _ = q.shape
        ends = np.arange(batch + 1) * length
        rows = [np.zeros((batch * length, a.shape[1], a.shape[3]), dtype) for a in (q, k, k)]
        for is_causal in (False, True):
            cuattn.attention(q, k, k, is_causal=is_causal)
            cuattn.attention_varlen(*rows, ends, ends, is_causal=is_causal)


def decoding(cuattn: Any, dtype: Any) -> None:
    """attention_kvcache and kv_append over dense caches and pages of 64 keys."""
    for batch, keys in CACHES:
        lens = np.full(batch, keys - 1)
        table = np.arange(batch * keys // PAGE).reshape(batch, -1)
        for dim in DIMS:
            for heads, kv_heads in HEADS:
                q, new = (np.zeros((batch, h, 1, dim), dtype) for h in (heads, kv_heads))
                dense = np.zeros((batch, kv_heads, keys, dim), dtype)
                paged = np.zeros((table.size, kv_heads, PAGE, dim), dtype)
                for cache, more in ((dense, {}), (paged, {"page_table": table})):
                    given: Any = {"kv_lens": lens, **more}
                    caches = cache, np.zeros(cache.shape, dtype)
                    cuattn.attention_kvcache(q, *caches, **given)
                    cuattn.attention_kvcache(q, *caches, k_new=new, v_new=new, **given)
                    cuattn.kv_append(*caches, new, new, **given)


PRESETS: dict[str, Callable[[Any, Any], None]] = {
    f.__name__: f for f in (softmax, topk, logits, attention, gradients, decoding)
}
