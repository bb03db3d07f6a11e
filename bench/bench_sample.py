"""Draws from the rows of logits against every peer that is installed; needs a GPU.

    python -m pytest bench/bench_sample.py --benchmark-only -k "sampling and bfloat16"

One benchmark a cell (bench/grids.py), contestant and cache state, in groups of one cell and state.
Each row has a seed of its own, as each request of a batch has one, and one element is drawn of it.
Ours have to be those of the reference. A peer draws others: from among those that the options
leave. Rows are as those of a language model, where a few elements hold most of the probability;
those of cells that are `flat` are normal deviates, whose best 256 elements hold little of it.
"""

from __future__ import annotations

import math

import numpy as np

import cuattn
from bench import inside
from bench.bench_softmax import normal, places, whole
from bench.timing.harness import Operation, Work
from bench.timing.verification import Sample
from cuattn import reference

# Half of the square of a normal deviate has the tail of an exponential one, so that this many
# times it has probabilities that fall by Zipf's law, as rank to the power of minus this.
EXPONENT = 1.5
NUMBER_BYTES = 16  # a row: its seed, and the index
SLACK = 1e-3  # of probabilities and their logarithms, by which a peer may be off where it cuts


def bench_sample(benchmark, measured):
    measured.replay(benchmark)


def peaked(z):
    return EXPONENT / 2 * z * z


def inputs(cell, xp, rng):
    transform = (lambda z: z) if cell.shape.get("flat") else peaked
    x = normal(xp, rng, whole(cell), cell.dtype, transform)
    return x, xp.asarray(rng.integers(0, 1 << 62, result(cell)))


def options(cell):
    """Filters: percentages are of 1."""
    found = {"top_k": cell.shape["top_k"]} if "top_k" in cell.shape else {}
    percents = {name: cell.shape.get(f"{name}_percent") for name in ("top_p", "min_p")}
    return found | {name: value / 100 for name, value in percents.items() if value is not None}


def result(cell):
    return cell.shape["rows"], 1


def call(x, seeds, out=None, **filters):
    return cuattn.sample(x, seed=seeds, out=out, **filters)


def samples(cell, inputs, asnumpy):
    """Some indices: ours themselves, and what may be drawn of these rows."""
    found, filters = [], options(cell)
    for part in places(*whole(cell)):
        x, seeds = (asnumpy(array[part]) for array in inputs)
        drawn = reference.sample(x, seed=seeds, **filters)
        found += [
            Sample(part, drawn, 0.0, holds_for_peers=False),
            Sample(part, drawn, 0.0, may_draw=may_draw(x, **filters)),
        ]
    return found


def may_draw(x, top_k=None, top_p=None, min_p=None):
    """Which elements of the rows a sampler may draw that rounds, and has ties in any order."""
    s = x.astype(np.float64)
    best = -np.sort(-s, axis=-1)
    least = np.full(len(s), -np.inf)
    if top_k is not None:
        best = best[:, :top_k]
        least = best[:, -1]
    if top_p is not None:
        p = reference.softmax(best)
        kept = np.sum(np.cumsum(p, axis=-1) - p < top_p + SLACK, axis=-1)
        least = best[np.arange(len(s)), kept - 1]
    if min_p is not None:
        least = np.maximum(least, best[:, 0] + math.log(min_p) - SLACK)
    return s >= least[:, None]


def work(cell):
    """Bytes of one read of x, of the seeds and of the result."""
    rows, cols = whole(cell)
    size = rows * (cols * inside.dtype_of(cell.dtype).itemsize + NUMBER_BYTES)
    return Work(size, 0, f"read x + write indices: rows * (cols * itemsize + {NUMBER_BYTES})")


OPERATIONS = {
    "sample": Operation(
        ceiling="read",
        inputs=inputs,
        ours=call,
        samples=samples,
        work=work,
        result=result,
        dtype=lambda cell: "int64",
        options=options,
    )
}
