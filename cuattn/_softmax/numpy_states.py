"""What a selection has to know of whole rows: sums that no softmax is written for."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn._arrays.blocks import BLOCK, scratch
from cuattn._arrays.row_layout import spec_of
from cuattn._softmax.numpy_softmax import Forward
from cuattn._softmax.numpy_task import Task
from cuattn._softmax.request import Operands, Request


def row_states(
    x: np.ndarray, axis: int, factor: Any, where: Any, acc: np.dtype, logs: bool = True
) -> list[Any]:
    """m, l, log(l) and lse of each row, with the reduced axis; `factor` is a number or broadcasts
    to it. log(l) has the digits of a sum near 1. Without `logs` perhaps m and l alone, and any l
    where m is not finite."""
    plain = x.flags.c_contiguous and axis == x.ndim - 1 and where is None and x.dtype == acc
    if plain and 0 < x.size <= BLOCK and not np.ndim(factor) and factor == 1:  # as `few`
        with np.errstate(all="ignore"):
            m = np.maximum.reduce(x, axis=-1, keepdims=True)
            e = np.subtract(x, m, out=scratch("e", x.shape, acc))
            np.exp(e, out=e)
            l = np.add.reduce(e, axis=-1, keepdims=True)  # noqa: E741
            if not logs:
                return [m, l, None, None]
            if (l >= 1.5).all():  # neither NaN, nor what log1p is for
                log_l = np.log(l)
                return [m, l, log_l, m + log_l]
    shape = tuple(1 if d == axis else size for d, size in enumerate(x.shape))
    kept = [np.full(shape, of_nothing, acc) for of_nothing in (-np.inf, 0, -np.inf, -np.inf)]
    if x.size:
        request = Request("states", (axis,), spec_of(x))
        Task(Forward, request, Operands(x, where=where), factor, None, kept, acc).run()
    return kept
