"""CuPy: attention with expressions and masks, and nearest neighbours, as its users write them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from bench import patterns
from bench.peers._base import Call, require_products, require_scores


def variants(library: Any, operation: str, **options: Any) -> tuple[str, Call]:
    """The name and the call of `library`, a `bench.peers._cupy.Cupy`."""
    if operation == "attention_topk":
        name, function = "CuPy matmul, argpartition", _top_k_of_products
    else:
        name, function = "CuPy expression", _attention
    return name, functools.partial(function, library, **options)


def _top_k_of_products(library: Any, q: Any, k: Any, num: int) -> Any:
    require_products(q, k)
    return library.top_k(q @ k.T, num)


def _attention(library: Any, q: Any, k: Any, v: Any, *more: Any, pattern: str) -> Any:
    """All scores in memory: what comes with q, k and v is the array of an expression or a mask and
    more."""
    xp, (batch, heads, seqlen_q, head_dim), seqlen_k = library.xp, q.shape, k.shape[2]
    require_scores(batch, heads, seqlen_q, seqlen_k, q.dtype.itemsize)
    s = xp.matmul(q, k.swapaxes(-1, -2))
    s *= head_dim**-0.5
    i, j = xp.arange(seqlen_q)[:, None], xp.arange(seqlen_k)
    if len(more) > 1:
        seen = more[0]
    else:
        b, h = xp.arange(batch)[:, None, None, None], xp.arange(heads)[:, None, None]
        s = patterns.score(pattern, xp, *(more or [None]), s, b, h, i, j)
        seen = j <= i
    s = (s + xp.where(seen, 0.0, -np.inf).astype(s.dtype)).astype(q.dtype, copy=False)
    return xp.matmul(library.softmax(s), v)
