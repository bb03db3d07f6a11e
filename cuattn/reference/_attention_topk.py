"""The best keys of each query in float64.

A part of `cuattn.reference`, whose rules hold here. Inside, arrays are as in `_attention`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cuattn._arrays.results import SoftmaxTopK, SoftmaxTopKState
from cuattn.reference._attention import Window, canonical, numbers_of, uncanonical
from cuattn.reference._heads import each_head, seen_scores
from cuattn.reference._numerics import Option, quiet, results, wide
from cuattn.reference._softmax import log_softmax, softmax, softmax_state


@quiet
def attention_topk(
    q: ArrayLike,
    k: ArrayLike,
    num: int,
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
    index_offset: int = 0,
    output: str = "prob",
    out: Any = None,
) -> Any:
    """`softmax_topk` of the scores of each query; keys with a score of -inf are left out.

    Every score is kept at once, `precision` changes nothing.
    """
    ndim = np.ndim(q)
    queries, keys = (canonical(np.asarray(a), layout) for a in (q, k))
    shape, dtype = queries.shape[:-1], wide(queries[:0]).dtype
    numbers = numbers_of(queries, scale, softcap, window, is_causal)
    values = np.full((*shape, num), 0 if output == "prob" else -np.inf, dtype)
    indices = np.full((*shape, num), -1, np.int64)
    m, l = np.full((*shape, 1), -np.inf, dtype), np.zeros((*shape, 1), dtype)  # noqa: E741
    arrays = queries, keys, keys, mask, bias, alibi_slopes, None, q_offset, q_lens, kv_lens
    for b, h, head in each_head(*arrays, *numbers):
        s, rows = seen_scores(head), slice(len(head.q))
        lacks = s == -np.inf
        columns = np.broadcast_to(np.arange(s.shape[1]), s.shape)
        best = np.lexsort((columns, -s, lacks))[:, :num]  # the last key counts most, NaN is last
        function = {"prob": softmax, "log_prob": log_softmax}.get(output)
        found = s if function is None else function(s, where=~lacks)
        lacks, found = (np.take_along_axis(a, best, 1) for a in (lacks, found))
        values[b, h, rows, : best.shape[1]] = found
        indices[b, h, rows, : best.shape[1]] = np.where(lacks, -1, best + index_offset)
        m[b, h, rows, 0], l[b, h, rows, 0] = softmax_state(s)
    m, l, values, indices = (uncanonical(a, layout, ndim) for a in (m, l, values, indices))  # noqa: E741
    if output == "state":
        return SoftmaxTopKState(*results((m[..., 0], l[..., 0], values, indices), out))
    return SoftmaxTopK(*results((values, indices), out))
