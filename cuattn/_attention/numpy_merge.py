"""Attention of NumPy arrays from its results over parts of the keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn._arrays.blocks import BLOCK, FLOAT64, Slices, each, narrow, pieces, widen


def merge(outs: list[Any], lses: list[Any], out: Any, lse: Any) -> None:
    """Parts (B, H, S, D) and (B, H, S) into out and lse: each weighs as ``exp(lse)``."""
    elements = max(1, len(outs)) * out.size
    blocks = pieces(out.shape[:3], max(1, BLOCK // max(1, out.shape[3])))
    each(_merge, ((outs, lses, out, lse, rows) for rows in blocks), elements)


def _merge(outs: Any, lses: Any, out: Any, lse: Any, rows: Slices) -> None:
    outs, lses = ([part[rows] for part in parts] for parts in (outs, lses))
    out, lse = out[rows], lse[rows]
    merged, lse[...] = _merged(outs, lses, out.shape, lse.dtype)
    infinite = ~np.isfinite(merged)
    if infinite.any():  # what float32 does not hold by the way, float64 does
        wide = _merged(outs, lses, out.shape, FLOAT64)[0]
        np.copyto(merged, wide, where=infinite, casting="unsafe")
    narrow(merged, out)


def _merged(outs: Any, lses: Any, shape: Any, acc: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """out and lse in `acc`; of nothing 0 and -inf. A part of weight 0 may hold anything."""
    m = np.full(shape[:3], -np.inf, acc)
    for part in lses:
        np.maximum(m, part, out=m)
    shift = np.where(m == -np.inf, acc.type(0), m)
    sums, total, weighed = np.zeros_like(m), np.zeros(shape, acc), np.empty(shape, acc)
    for o, part in zip(outs, lses, strict=True):
        weight = np.exp(part - shift)
        sums += weight
        widen(o, weighed)
        weighed *= weight[..., None]
        np.copyto(weighed, 0, where=(part == -np.inf)[..., None])
        total += weighed
    total /= sums[..., None]
    np.copyto(total, 0, where=(sums == 0)[..., None])
    return total, m + np.log(sums)
