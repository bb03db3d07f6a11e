"""Whether a contestant computed the operation: parts of its result against float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from bench import inside

PEER_FACTOR = 2  # on our error bound: a peer has to compute the same function


class Sample(NamedTuple):
    """Part of a problem that is small enough for float64 on the CPU."""

    index: Any  # of the result, on the device
    expected: np.ndarray
    allowed: float  # largest error of ours
    part: Any = ...  # of what `index` selects, on the host
    which: int | None = None  # of several results
    selects_from: np.ndarray | None = None  # rows: the result is indices, and these are compared
    may_draw: np.ndarray | None = None  # rows: the result is indices of elements that are true here
    holds_for_peers: bool = True  # False: they may choose other elements, or round more often


class WrongResult(AssertionError):
    """A contestant did not compute the operation."""


def verify_ours(entry, operation, cell, ours, native, samples, device, plan) -> None:
    """Our call, into a poisoned result where it takes one: what is not written, shows."""
    options, poison = {}, None
    if operation.result is not None:
        dtype = inside.dtype_of(operation.dtype(cell))
        out = options["out"] = device.xp.empty(operation.result(cell), dtype)
        poison = out.view(f"u{out.itemsize}")
        poison.fill(np.iinfo(poison.dtype).max)  # a NaN in every float format, and no index
    with plan() as kernels:
        result = ours.call(*native, **options)
    entry["plan"] = [kernel.name for kernel in kernels]
    if operation.predicted is not None:
        entry["predicted"] = operation.predicted(cell, kernels)
    _verify(entry, ours.library, result, samples, 1)
    if poison is not None and (left := int((poison == np.iinfo(poison.dtype).max).sum())):
        raise WrongResult(f"{left} of {poison.size} elements of the result were not written")


def verify_peer(entry, peer, native, samples) -> None:
    """A call of a peer."""
    samples = [sample for sample in samples if sample.holds_for_peers]
    _verify(entry, peer.library, peer.call(*native), samples, PEER_FACTOR)


def _verify(entry, library, result: Any, samples: list[Sample], factor: float) -> None:
    place, whole = None, None
    for sample in samples:
        if place != (place := (sample.which, sample.index)):  # samples of one place share a copy
            array = result if sample.which is None else result[sample.which]
            whole = library.asnumpy(array[sample.index])
        got = whole[sample.part]
        if sample.may_draw is not None:
            got = got.reshape(len(got), -1)  # one draw of a row may come as a number
        if got.shape != sample.expected.shape:
            raise WrongResult(f"shape {got.shape}, but {sample.expected.shape} is expected")
        if sample.may_draw is not None:
            if not _selected(sample.may_draw, got).all():
                raise WrongResult("an element is drawn that the options exclude")
            continue
        if sample.selects_from is not None:
            got = _selected(sample.selects_from, got)
        error = float(np.max(np.abs(got.astype(np.float64) - sample.expected), initial=0))
        allowed = factor * sample.allowed
        if math.isfinite(error):  # JSON has no other numbers
            entry["max_error"] = max(error, entry["max_error"] or 0.0)
        entry["allowed_error"] = max(allowed, entry["allowed_error"] or 0.0)
        if not error <= allowed:
            raise WrongResult(f"error {error:.3g}, but {allowed:.3g} is allowed")


def _selected(rows: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """What the indices of each row select, no element twice."""
    indices = indices.astype(np.int64)
    if np.any((indices < 0) | (indices >= rows.shape[-1])):
        raise WrongResult("an index is outside of the row")
    ordered = np.sort(indices, axis=-1)
    if np.any(ordered[..., 1:] == ordered[..., :-1]):
        raise WrongResult("an element is selected twice")
    return np.take_along_axis(rows, indices, -1)
