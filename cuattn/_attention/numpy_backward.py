"""Gradients of attention of NumPy arrays, tile by tile: five products of each tile of scores.

All tiles of some heads belong to one thread, which adds up dk and dv in place, or beside them where
they have 16 bits. What decides how that goes are the sizes and options of a sequence.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from cuattn._arrays import blocks
from cuattn._arrays.results import AttentionGradients
from cuattn._attention.numpy_attention import (
    Lengths,
    alike,
    blas_has_one_thread,
    heads_of,
    is_copied,
    lengths_of,
    slices,
    tile,
)
from cuattn._attention.numpy_dscore import add_elements, chained, looked_up
from cuattn._attention.numpy_scores import (
    ALL,
    Heads,
    distances,
    key_tiles,
    once,
    seen,
    to_scores,
    varies,
    wide,
)
from cuattn._attention.numpy_tile import flush, products, usable, weigh
from cuattn._attention.request_backward import Call
from cuattn._attention.request_dscore import gradients
from cuattn._attention.views import canonical_views, cast

Seen = Callable[[], np.ndarray] | None


@blocks.quiet
def run_numpy(call: Call) -> AttentionGradients:
    """The results of a call on NumPy arrays."""
    arrays, outs = call.arrays, call.outs or ()
    acc, sizes = call.expected.acc, call.expected.sizes
    found: dict[str, Any] = {}
    for (name, shape, dtype), out in itertools.zip_longest(call.results, outs):
        found[name] = np.zeros(shape, dtype) if out is None else out
        if out is not None:
            out[...] = 0
    dbias = found.get("dbias")
    if dbias is not None and dbias.dtype.itemsize < acc.itemsize:
        dbias = np.zeros(dbias.shape, acc)
    forward = cast(arrays.forward, acc, (), np)
    x = canonical_views(forward, (arrays.y, arrays.lse), sizes, call.layout, np)
    x = x._replace(score_args=tuple(call.score_args.values()))
    elements = {name: np.zeros(a.shape) for name, a in call.indexed.items()}
    large = dict(zip("qkv", found.values(), strict=False))
    given = forward._replace(**large, mask=None, bias=dbias, alibi_slopes=None, sinks=None)
    grads = (arrays.grad, arrays.grad_lse)[: 1 + (arrays.grad_lse is not None)]
    d = canonical_views(given, grads, sizes, call.layout, np)
    if dbias is not None:  # what `broadcast_to` has made of it is read-only
        d = d._replace(bias=as_strided(dbias, d.bias.shape, d.bias.strides))
    d = d._replace(score_args=tuple(map(elements.get, call.score_args)))
    sums = np.zeros((2, sizes.batch, sizes.heads))
    backward(x, d, call.options, sums)
    if dbias is not None and dbias is not found["dbias"]:
        blocks.narrow(dbias, found["dbias"])
    for name, total in zip(("dalibi_slopes", "dsinks"), sums, strict=True):
        if name in found:
            own = found[name]
            own[...] = (total if own.ndim == 2 else total.sum(0)).reshape(own.shape)
    for name, total in elements.items():
        blocks.narrow(total, found[f"d{name}"])
    return gradients(found)


def backward(x: Any, d: Any, options: Any, sums: np.ndarray) -> None:
    """Adds dq, dk, dv and dbias of canonical arrays to where `d` has them, and the gradients of
    slopes and sinks to `sums`, (2, B, H).

    `x` and `d` are views.Operands: those of the forward call, and their gradients.
    """
    if x.lse.size:
        work = x.lse.size * x.k.shape[2] * len(x.q) // sums.shape[1] + x.k.size
        shared = d.bias is not None or any(a is not None for a in d.score_args)  # by heads
        alone = shared or not blas_has_one_thread()
        blocks.each(_attend_backward, _blocks(x, d, options, sums), 0 if alone else work)


# ---- Blocks ----


def _blocks(x: Any, d: Any, o: Any, sums: np.ndarray) -> Iterator[tuple[Any, ...]]:
    """Heads of neighbouring sequences of equal lengths, with the sizes of their tiles."""
    for b, lengths in _runs(x, o):
        heads, gradients = heads_of(x, o, b, lengths), heads_of(d, o, b, lengths)
        own = sums[:, b].reshape(2, *heads.q.shape[:3])
        rows, keys, matrices = tile(heads, is_copied(heads))
        batch, heads_kv = heads.k.shape[:2]
        for i in slices(batch, max(1, matrices // heads_kv)):
            for h in slices(heads_kv, min(matrices, heads_kv)):
                some = (one.tile(i, h, ALL) for one in (heads, gradients))
                yield *some, own[:, i, h], rows, keys


def _runs(x: Any, o: Any) -> Iterator[tuple[slice, Lengths]]:
    if all(a is None for a in (x.cu_seqlens_q, x.q_offset, x.q_lens, x.kv_lens)):
        m, n = x.q.shape[2], x.k.shape[2]
        yield ALL, (m, n, m, n, n - m if o.q_offset is None else o.q_offset)
        return
    for lengths, which in alike(lengths_of(x, o)):
        for run in np.split(which, np.flatnonzero(np.diff(which) != 1) + 1):
            yield slice(run[0], run[-1] + 1), lengths


# ---- Tiles ----


def _attend_backward(x: Heads, d: Heads, sums: np.ndarray, rows: int, keys: int) -> None:
    """All queries of some heads, by `rows` of them and `keys`."""
    acc = blocks.accumulator(x.q.dtype, blocks.FLOAT32)
    dk, dv = (a if a.dtype == acc else np.zeros(a.shape, acc) for a in (d.k, d.v))
    for i in slices(x.q.shape[3], rows):
        _tile_backward(x.tile(ALL, ALL, i), d.tile(ALL, ALL, i), dk, dv, sums, keys)
    for total, own in ((dk, d.k), (dv, d.v)):
        if total is not own:
            blocks.narrow(total, own)


def _tile_backward(
    x: Heads, d: Heads, dk: np.ndarray, dv: np.ndarray, sums: np.ndarray, keys: int
) -> None:
    """Some queries over all of their keys."""
    acc, (batch, heads, group, rows, _) = dk.dtype, x.q.shape
    shape = batch, heads, group * rows
    q, grad, y = (
        np.ascontiguousarray(wide(a, acc).reshape(*shape, a.shape[4])) for a in (x.q, d.out, x.out)
    )
    q = q * acc.type(x.scale)
    lse, delta = x.lse.reshape(*shape, 1), np.sum(grad * y, axis=3, keepdims=True)
    if d.lse is not None:
        delta -= d.lse.reshape(delta.shape)
    nothing = lse == -np.inf
    lse, delta = np.where(nothing, acc.type(np.inf), lse), np.where(nothing, acc.type(0), delta)
    if x.sinks is not None:
        by_head = x.q.shape[:4]
        weight = np.exp(np.minimum(x.sinks - lse.reshape(by_head), 0))
        sums[1] -= (weight * delta.reshape(by_head)).sum(axis=3)
    of_elements = dict(looked_up(d.score))
    dq, by_rows = np.zeros(q.shape, acc), varies(x.mask) or varies(x.bias) or x.score is not None
    for j in key_tiles(x, keys):
        k, v = usable(x.k[:, :, j], acc), usable(x.v[:, :, j], acc)
        p = products(q, k, by_rows)
        chain = _chain(p, x.softcap) if x.softcap else None
        wanted = () if x.score is None else (None, *of_elements)
        changed = {by: np.empty_like(p) for by in wanted}  # derivatives by what it was
        sees = functools.partial(seen, x, p, j) if to_scores(p, x, j, changed) else None
        p -= lse
        if np.maximum.reduce(p, axis=None, initial=-np.inf) > 0:  # lse has been rounded
            np.copyto(p, 0, where=(p > 0) & (p < np.inf))  # infinite where a mask meets NaN
        np.exp(p, out=p)
        if x.slopes is not None or x.score is not None:  # far keys
            flush(p)
        _hide(p, sees)
        ds = products(grad, v, by_rows)
        ds -= delta
        ds *= p
        for by, step in of_elements.items():
            de = chained(ds, changed[by])
            _hide(de, sees)
            add_elements(x, d, step, j, de.reshape(*x.q.shape[:4], de.shape[3]))
        if changed:
            ds *= changed[None]
        _hide(ds, sees)
        _add_options(x, d, ds.reshape(*x.q.shape[:4], ds.shape[3]), j, sums)
        if chain is not None:
            ds *= chain
            _hide(ds, sees)
        seen_by = None if sees is None else functools.partial(_transposed, sees)
        dv[:, :, j] += weigh(p.swapaxes(2, 3), grad, seen_by)
        dk[:, :, j] += weigh(ds.swapaxes(2, 3), q, seen_by)
        dq += weigh(ds, k, sees)
    dq *= acc.type(x.scale)
    blocks.narrow(dq.reshape(d.q.shape), d.q)


def _chain(s: np.ndarray, softcap: float) -> np.ndarray:
    """The derivative of capped scores, ``1 - tanh(s / softcap) ** 2`` without cancellation."""
    e = np.abs(s)
    e /= s.dtype.type(softcap)
    e *= -2
    np.exp(e, out=e)
    return 4 * e / (1 + e) ** 2


def _hide(a: np.ndarray, sees: Seen) -> None:
    """0 where a query does not see a key, if there is anything but numbers."""
    if sees is not None and not np.isfinite(a).all():
        np.copyto(a, 0, where=~sees())


def _transposed(sees: Callable[[], np.ndarray]) -> np.ndarray:
    return sees().swapaxes(2, 3)


def _add_options(x: Heads, d: Heads, ds: np.ndarray, j: slice, sums: np.ndarray) -> None:
    """Gradients of bias and slopes of a tile, whose scores have gradients `ds`."""
    if x.slopes is not None:
        sums[0] -= np.sum(ds * distances(x, j, ds), axis=(3, 4), dtype=np.float64)
    if d.bias is not None:
        total = d.bias[..., j]
        repeated = tuple(axis for axis, stride in enumerate(total.strides) if not stride)
        part = ds[..., : total.shape[3], : total.shape[4]].sum(axis=repeated, keepdims=True)
        total = once(total)
        total += part
