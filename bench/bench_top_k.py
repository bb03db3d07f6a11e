"""The k largest elements of each row against every peer that is installed; needs a GPU.

    python -m pytest bench/bench_top_k.py --benchmark-only -k "vocabulary and bfloat16"

One benchmark a cell (bench/grids.py), contestant and cache state, in groups of one cell and state.
Our values and indices have to be those of the reference, ties in order of index. A peer may choose
others among equal elements, but what it selects has to have the values that it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

import cuattn
from bench import inside
from bench.bench_softmax import normal, places
from bench.grids import PATTERNS
from bench.timing.harness import Operation, Work
from bench.timing.verification import Sample

INDEX_BYTES = 8
LEVELS = 32  # between two integers, of quantised rows
TIED = 64  # different values of tied rows


def bench_top_k(benchmark, measured):
    measured.replay(benchmark)


# Pattern to a row of n elements, from which k are chosen.
ROWS: dict[str, Callable[[int, int, np.random.Generator], np.ndarray]] = {
    "ascending": lambda n, k, rng: np.arange(n) / n,  # every element is the best so far
    "tied": lambda n, k, rng: np.arange(n) % TIED / TIED,
    "border": lambda n, k, rng: 1.0 + (rng.permutation(n) < k // 2),  # the k-th has many equals
}


def inputs(cell, xp, rng):
    """Normal deviates, or rows of a pattern that makes a selection hard."""
    shape = cell.shape
    whole = (shape["rows"], shape["cols"])
    pattern = next((name for name in PATTERNS if shape.get(name)), None)
    if pattern in ROWS:
        row = ROWS[pattern](shape["cols"], shape["k"], rng).astype(inside.dtype_of(cell.dtype))
        bits = row.view(f"u{row.itemsize}")  # CuPy does not have bfloat16 everywhere
        values = xp.empty(whole, bits.dtype)
        values[:] = xp.asarray(bits)
        return (values.view(row.dtype),)
    if pattern == "quantised":
        return (normal(xp, rng, whole, cell.dtype, lambda z: xp.rint(z * LEVELS) / LEVELS),)
    return (normal(xp, rng, whole, cell.dtype),)


def samples(name, cell, inputs, asnumpy):
    """Whole rows: values, what the indices select, and, of ours, the indices themselves."""
    found = []
    for part in places(cell.shape["rows"], cell.shape["cols"]):
        x = asnumpy(inputs[0][part])
        rows, indices, allowed = inside.truth_topk(name, x, cell.shape["k"], cell.dtype)
        values = np.take_along_axis(rows, indices, -1)
        found += [
            Sample(part, values, allowed, which=0),
            Sample(part, values, allowed, which=1, selects_from=rows),
            Sample(part, indices, 0.0, which=1, holds_for_peers=False),
        ]
    return found


def work(cell):
    """Bytes of one read of x, and of the results."""
    rows, cols, k = (cell.shape[name] for name in ("rows", "cols", "k"))
    itemsize = inside.dtype_of(cell.dtype).itemsize
    size = rows * (cols * itemsize + k * (itemsize + INDEX_BYTES))
    formula = f"read x + write k best: rows * (cols * itemsize + k * (itemsize + {INDEX_BYTES}))"
    return Work(size, 0, formula)


def operation(name):
    """A function of (x, k) that returns values and indices."""
    function = getattr(cuattn, name)
    return Operation(
        ceiling="read",
        inputs=inputs,
        ours=lambda x, k: function(x, k),
        samples=partial(samples, name),
        work=work,
        result=None,
        options=lambda cell: {"k": cell.shape["k"]},
    )


OPERATIONS = {"top_k": operation("top_k")}
