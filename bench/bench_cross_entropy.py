"""The cross-entropy, its gradient and the entropy against every peer that is installed; needs a
GPU.

    python -m pytest bench/bench_cross_entropy.py --benchmark-only -k "quack and bfloat16"

One benchmark a cell (bench/grids.py), contestant and cache state, in groups of one cell and state.
A loss and an entropy are one number a row, in float32 where x has 16 bits; a peer may round it to
the dtype of x. The gradient is that of losses which are not added up: each row has its own number.
"""

from __future__ import annotations

from functools import partial

import cuattn
from bench import inside
from bench.bench_softmax import each_row, normal, places, rows_of, whole
from bench.timing.harness import Operation, Work
from bench.timing.verification import Sample

NUMBER_BYTES = {"labels": 8, "grad": 4, "lse": 4, "result": 4}  # a row


def bench_cross_entropy(benchmark, measured):
    measured.replay(benchmark)


def entropy_inputs(cell, xp, rng):
    return (rows_of(cell, xp, rng),)


def inputs(cell, xp, rng):
    labels = rng.integers(0, cell.shape["cols"], cell.shape["rows"])
    return rows_of(cell, xp, rng), xp.asarray(labels)


def backward_inputs(cell, xp, rng):
    """A gradient for each row, x, labels, and the log-sum-exp of the forward call."""
    x, labels = inputs(cell, xp, rng)
    _, lse = cuattn.cross_entropy(x, labels, return_lse=True)
    return normal(xp, rng, each_row(cell), "float32"), x, labels, lse


def samples(name, cell, inputs, asnumpy):
    """Some numbers, with their float64 results: ours are as exact as sums are."""
    found = []
    for part in places(*whole(cell)):
        rows = [asnumpy(array[part]) for array in inputs]
        found += [
            Sample(part, *inside.truth_loss(name, rows, "float32"), holds_for_peers=False),
            Sample(part, *inside.truth_loss(name, rows, cell.dtype)),
        ]
    return found


def backward_samples(cell, inputs, asnumpy):
    """Whole rows, with their float64 results."""
    rows = ((part, [asnumpy(array[part]) for array in inputs]) for part in places(*whole(cell)))
    return [Sample(part, *inside.truth_loss_backward(own, cell.dtype)) for part, own in rows]


def work(arrays, numbers, cell):
    """Bytes of so many arrays of the size of x, and of the numbers of each row."""
    rows, cols = whole(cell)
    beside = sum(NUMBER_BYTES[name] for name in numbers)
    size = rows * (arrays * cols * inside.dtype_of(cell.dtype).itemsize + beside)
    read = "read x + write dx" if arrays == 2 else "read x"
    formula = f"{read}: rows * ({arrays} * cols * itemsize + {beside}), with {', '.join(numbers)}"
    return Work(size, 0, formula)


def loss(name, inputs, numbers):
    """An operation that has one number a row."""
    return Operation(
        ceiling="read",
        inputs=inputs,
        ours=getattr(cuattn, name),
        samples=partial(samples, name),
        work=partial(work, 1, numbers),
        result=each_row,
        dtype=lambda cell: "float32",
    )


OPERATIONS = {
    "cross_entropy": loss("cross_entropy", inputs, ("labels", "result")),
    "entropy": loss("entropy", entropy_inputs, ("result",)),
    "cross_entropy_backward": Operation(
        ceiling="copy",
        inputs=backward_inputs,
        ours=cuattn.cross_entropy_backward,
        samples=backward_samples,
        work=partial(work, 2, ("labels", "grad", "lse")),
        result=whole,
    ),
}
