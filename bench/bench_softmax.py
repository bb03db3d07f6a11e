"""The softmax family against every peer that is installed; needs a GPU.

    python -m pytest bench/bench_softmax.py --benchmark-only -k "quack and bfloat16"

One benchmark a cell (bench/grids.py), contestant and cache state, in groups of one cell and state.
How it is verified and timed: bench/timing/harness.py.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

import cuattn
from bench import inside
from bench.timing.harness import Operation, Work
from bench.timing.verification import Sample

CHECKED = 1 << 18  # elements, or one row, of each of the three places that are verified
CHUNK = 1 << 26  # elements that are drawn at a time


def bench_softmax(benchmark, measured):
    measured.replay(benchmark)


def normal(xp, rng, shape, dtype, transform=lambda z: z):
    """Normal deviates, transformed in float32, in any dtype."""
    values = xp.empty(math.prod(shape), inside.dtype_of(dtype))
    generator = xp.random.default_rng(int(rng.integers(1 << 62)))
    for start in range(0, values.size, CHUNK):
        size = min(CHUNK, values.size - start)
        draw = transform(generator.standard_normal(size, dtype=np.float32))
        values[start : start + size] = rounded(draw) if dtype == "bfloat16" else draw
    return values.reshape(shape)


def rounded(draw):
    """Finite float32 values as bfloat16, to nearest even; CuPy cannot cast to it everywhere."""
    bits = draw.view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return nearest.astype(np.uint16).view(inside.dtype_of("bfloat16"))


def rows_of(cell, xp, rng, transform=lambda z: z):
    """The operand of a cell: rows, or the transpose of columns."""
    shape = cell.shape
    if shape.get("transposed"):
        return normal(xp, rng, (shape["cols"], shape["rows"]), cell.dtype, transform).T
    return normal(xp, rng, (shape["rows"], shape["cols"]), cell.dtype, transform)


def forward_inputs(cell, xp, rng):
    return (rows_of(cell, xp, rng),)


def backward_inputs(cell, xp, rng, log=False):
    """A gradient, and what is near the (log-)softmax of normal deviates."""
    lse = np.float32(math.log(cell.shape["cols"]) + 0.5)

    def result(z):
        return z - lse if log else xp.exp(z - lse)

    return rows_of(cell, xp, rng), rows_of(cell, xp, rng, result)


def ragged_inputs(cell, xp, rng):
    """Rows between random cuts, so that lengths are distributed exponentially."""
    total = cell.shape["segments"] * cell.shape["cols"]
    cuts = np.sort(rng.integers(0, total + 1, cell.shape["segments"] - 1))
    offsets = np.concatenate([[0], cuts, [total]])
    return normal(xp, rng, (total,), cell.dtype), xp.asarray(offsets)


def places(rows, cols):
    """Slices of rows: the first, the last, and some between."""
    some = max(1, min(rows, CHECKED // cols))
    middle = int(np.random.default_rng().integers(rows - some + 1))
    starts = sorted({0, middle, rows - some})
    return [slice(start, start + some) for start in starts]


def row_samples(name, cell, inputs, asnumpy):
    """Whole rows, with their float64 results."""
    rows = places(cell.shape["rows"], cell.shape["cols"])
    return [sample(name, cell, part, [asnumpy(x[part]) for x in inputs]) for part in rows]


def segment_samples(cell, inputs, asnumpy):
    """Whole segments, with their float64 results."""
    x, offsets = inputs[0], asnumpy(inputs[1])
    found = []
    for part in places(cell.shape["segments"], max(cell.shape["cols"], 512)):  # Python's loop
        bounds = offsets[part.start : part.stop + 1]
        index = slice(int(bounds[0]), int(bounds[-1]))
        rows = [asnumpy(x[index]), bounds - bounds[0]]
        found.append(sample("segment_softmax", cell, index, rows))
    return found


def sample(name, cell, index, operands):
    expected, allowed = inside.truth(name, operands, cell.dtype)
    return Sample(index, expected, allowed)


def work(arrays, formula, cell):
    """Bytes of so many arrays of the operand's size."""
    rows = cell.shape.get("rows") or cell.shape["segments"]
    size = rows * cell.shape["cols"] * inside.dtype_of(cell.dtype).itemsize
    return Work(arrays * size, 0, f"{formula}: {arrays} * rows * cols * itemsize")


def whole(cell):
    return cell.shape["rows"], cell.shape["cols"]


def each_row(cell):
    return (cell.shape["rows"],)


def ragged(cell):
    return (cell.shape["segments"] * cell.shape["cols"],)


FORWARD, GRADIENT, REDUCED = "read x + write y", "read grad and y + write dx", "read x"

OPERATIONS = {
    name: Operation(
        ceiling="read" if formula is REDUCED else "copy",
        inputs=inputs,
        ours=call,
        samples=partial(row_samples, name),
        work=partial(work, arrays, formula),
        result=result,
    )
    for name, call, inputs, arrays, formula, result in (
        ("softmax", cuattn.softmax, forward_inputs, 2, FORWARD, whole),
        ("log_softmax", cuattn.log_softmax, forward_inputs, 2, FORWARD, whole),
        ("logsumexp", partial(cuattn.logsumexp, axis=-1), forward_inputs, 1, REDUCED, each_row),
        ("softmax_backward", cuattn.softmax_backward, backward_inputs, 3, GRADIENT, whole),
        (
            "log_softmax_backward",
            cuattn.log_softmax_backward,
            partial(backward_inputs, log=True),
            3,
            GRADIENT,
            whole,
        ),
    )
}
OPERATIONS["segment_softmax"] = Operation(
    ceiling="copy",
    inputs=ragged_inputs,
    ours=cuattn.segment_softmax,
    samples=segment_samples,
    work=partial(work, 2, FORWARD),
    result=ragged,
)
