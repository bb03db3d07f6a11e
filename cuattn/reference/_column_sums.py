"""Sums of the probabilities of attention in float64.

A part of `cuattn.reference`, whose rules hold here. Inside, arrays are canonical, as in
`cuattn.reference._attention`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cuattn.reference._attention import Window, canonical, numbers_of
from cuattn.reference._heads import dense_column_sums, each_head
from cuattn.reference._numerics import Option, quiet, result, wide


@quiet
def attention_column_sums(
    q: ArrayLike,
    k: ArrayLike,
    lse: ArrayLike,
    /,
    *,
    is_causal: bool = False,
    q_offset: Option = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mask: Option = None,
    bias: Option = None,
    alibi_slopes: Option = None,
    q_lens: Option = None,
    kv_lens: Option = None,
    layout: str = "BHSD",
    precision: str | None = None,
    out: Any = None,
) -> np.ndarray:
    """``exp(scale * q @ k.T - lse)`` of each head, added up over the queries."""
    lead = (None,) * (4 - np.ndim(q))
    queries, keys = (canonical(np.asarray(a), layout) for a in (q, k))
    of_rows, numbers = np.asarray(lse)[lead], numbers_of(queries, scale, softcap, window, is_causal)
    sums = np.zeros((*queries.shape[:2], keys.shape[2]), wide(queries[:0]).dtype)
    arrays = queries, keys, keys, mask, bias, alibi_slopes, None, q_offset, q_lens, kv_lens
    for b, h, head in each_head(*arrays, *numbers):
        sums[b, h, : len(head.k)] = dense_column_sums(head, of_rows[b, h, : len(head.q)])
    return result(sums[(0,) * len(lead)], out=out)
