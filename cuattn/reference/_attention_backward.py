"""Gradients of attention in float64.

A part of `cuattn.reference`, whose rules hold here. Inside, arrays are canonical, as in
`cuattn.reference._attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cuattn._arrays.results import AttentionGradients
from cuattn.reference._attention import Window, canonical, numbers_of, of_batch, uncanonical
from cuattn.reference._heads import cut, dense_backward, each_head, of_sequence, segments
from cuattn.reference._numerics import Option, quiet, result, wide
from cuattn.reference._score import score_of
from cuattn.reference._score_arrays import ArraySums


@quiet
def attention_backward(
    grad: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    y: ArrayLike,
    lse: ArrayLike,
    /,
    *,
    grad_lse: Option = None,
    is_causal: bool = False,
    q_offset: Option = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mask: Option = None,
    bias: Option = None,
    alibi_slopes: Option = None,
    sinks: Option = None,
    score: Any = None,
    score_args: Mapping[str, Any] | None = None,
    q_lens: Option = None,
    kv_lens: Option = None,
    layout: str = "BHSD",
    precision: str | None = None,
    return_dbias: bool = False,
    return_dscore: Any = False,
    out: Any = None,
) -> AttentionGradients:
    """Gradients of `attention`, whose results are `y` and `lse`; `score` may be a function, of
    NumPy's functions, and `return_dscore` what `ArraySums.add` is."""
    ndim = np.ndim(q)
    arrays = (canonical(np.asarray(a), layout) for a in (grad, y, q, k, v))
    grads, results, queries, keys, values = arrays
    lead = (None,) * (4 - ndim)
    sums = np.asarray(lse)[lead]
    grad_sums = np.zeros(sums.shape) if grad_lse is None else np.asarray(grad_lse)[lead]
    (batch, heads, m, _), (heads_kv, n) = queries.shape, keys.shape[1:3]
    d = [np.zeros(a.shape, wide(a[:0]).dtype) for a in (queries, keys, values)]
    dbias, dslopes, dsinks = (
        np.zeros(shape, d[0].dtype) for shape in ((batch, heads, m, n), (batch, heads), heads)
    )
    options = mask, bias, alibi_slopes, sinks, q_offset, q_lens, kv_lens
    numbers = numbers_of(queries, scale, softcap, window, is_causal)
    arrays_of, add = _sums(score, score_args, return_dscore)
    score = score_of(score, score_args) if isinstance(score, str) else score
    for b, h, head in each_head(queries, keys, values, *options, *numbers, score=score):
        i, j, g = slice(len(head.q)), slice(len(head.k)), h * heads_kv // heads
        rows = (a[b, h, i] for a in (grads, results, sums, grad_sums))
        one = dense_backward(head, *rows)
        d[0][b, h, i] = one.dq
        d[1][b, g, j] += one.dk
        d[2][b, g, j] += one.dv
        dbias[b, h, i, j], dslopes[b, h] = one.dbias, one.dslope
        dsinks[h] += one.dsink
        if add:
            places = np.arange(len(head.q))[:, None] + head.offset, np.arange(len(head.k))
            add(one.dscore, one.scores, b, h, *places)
    d = [uncanonical(one, layout, ndim) for one in d]
    return _results(
        d,
        (bias if return_dbias else None, dbias),
        (alibi_slopes, dslopes),
        (sinks, dsinks),
        out,
    )._replace(dscore=arrays_of.sums if arrays_of else None)


@quiet
def attention_backward_varlen(
    grad: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    y: ArrayLike,
    lse: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    /,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    grad_lse: Option = None,
    is_causal: bool = False,
    q_offset: Option = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mask: Option = None,
    bias: Option = None,
    alibi_slopes: Option = None,
    sinks: Option = None,
    score: Any = None,
    score_args: Mapping[str, Any] | None = None,
    q_lens: Option = None,
    kv_lens: Option = None,
    precision: str | None = None,
    return_dbias: bool = False,
    return_dscore: Any = False,
    out: Any = None,
) -> AttentionGradients:
    """`attention_backward` of each sequence."""
    grad, queries, keys, values, y, lse = map(np.asarray, (grad, q, k, v, y, lse))
    d = [np.zeros(a.shape, wide(a[:0]).dtype) for a in (queries, keys, values)]
    ends, heads = (np.asarray(cu_seqlens_q), np.asarray(cu_seqlens_k)), queries.shape[1]
    slopes = None if alibi_slopes is None else np.asarray(alibi_slopes)
    added = None if bias is None else np.asarray(bias)[(None,) * (4 - np.ndim(bias))]
    dbias = None if added is None else np.zeros(added.shape, d[0].dtype)
    dslopes = np.zeros((len(ends[0]) - 1, heads), d[0].dtype)
    dsinks = np.zeros(heads, d[0].dtype)
    arrays_of, add = _sums(score, score_args, return_dscore)
    score = score_of(score, score_args) if isinstance(score, str) else score
    for b, (i, j) in enumerate(segments(*ends)):
        sizes = i.stop - i.start, j.stop - j.start
        one = attention_backward(
            grad[i],
            queries[i],
            keys[j],
            values[j],
            y[i],
            lse[:, i],
            grad_lse=None if grad_lse is None else np.asarray(grad_lse)[:, i],
            is_causal=is_causal,
            q_offset=of_sequence(q_offset, b),
            window=window,
            scale=scale,
            softcap=softcap,
            mask=cut(mask, b, *sizes, False),
            bias=cut(bias, b, *sizes, 0),
            alibi_slopes=slopes if slopes is None or slopes.ndim == 1 else of_sequence(slopes, b),
            sinks=sinks,
            score=score and partial(of_batch, score, b),
            q_lens=of_sequence(q_lens, b),
            kv_lens=of_sequence(kv_lens, b),
            layout="BSHD",
            return_dbias=True,
            return_dscore=arrays_of and arrays_of.of_sequence(b),
        )
        d[0][i], d[1][j], d[2][j] = one[:3]
        if dbias is not None and one.dbias is not None:
            _add(one.dbias, dbias[b : b + 1] if len(dbias) > 1 else dbias)
        dslopes[b] = 0 if one.dalibi_slopes is None else one.dalibi_slopes
        dsinks += 0 if one.dsinks is None else one.dsinks
    return _results(
        d,
        (bias if return_dbias else None, dbias),
        (alibi_slopes, dslopes),
        (sinks, dsinks),
        out,
    )._replace(dscore=arrays_of.sums if arrays_of else None)


def _sums(score: Any, score_args: Any, return_dscore: Any) -> tuple[ArraySums | None, Any]:
    """What takes the gradients of arrays, and what adds to them; None: nothing."""
    if callable(return_dscore) or not return_dscore:
        return None, return_dscore
    sums = ArraySums(score, score_args, return_dscore)
    return sums, sums.add


def _add(d: np.ndarray, total: np.ndarray) -> None:
    """Add the gradient of what `cut` made of a bias to that of the bias, (1, H or 1, M, N)."""
    for axis in (2, 3):
        d = d.sum(axis, keepdims=True) if total.shape[axis] == 1 else d
    m, n = np.minimum(d.shape[2:], total.shape[2:])
    total[:, :, :m, :n] += d[:, :, :m, :n]


def _unbroadcast(d: np.ndarray, option: ArrayLike) -> np.ndarray | None:
    """The sum over all that `option` is repeated for; integers have no gradient."""
    array = np.asarray(option)
    if array.dtype.kind in "iu":
        return None
    d = d.sum(tuple(range(d.ndim - array.ndim)))
    return d.sum(tuple(i for i, n in enumerate(array.shape) if n == 1), keepdims=True)


def _results(
    d: list[np.ndarray],
    bias: tuple[Option, Any],
    alibi_slopes: tuple[Option, Any],
    sinks: tuple[Option, Any],
    out: Any,
) -> AttentionGradients:
    """All but those of `score_args`; of an option itself and its gradient before what is repeated
    has been added up."""
    dbias, dslopes, dsinks = (
        None if option is None else _unbroadcast(one, option)
        for option, one in (bias, alibi_slopes, sinks)
    )
    outs = [None] * 4 if out is None else [*out, None]
    dq, dk, dv = (result(one, out=to) for one, to in zip(d, outs[:3], strict=True))
    dbias = None if dbias is None else result(dbias, out=outs[3])
    return AttentionGradients(dq, dk, dv, dbias, dslopes, dsinks)
