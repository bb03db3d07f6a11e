"""Every kernel configuration that the plans can ask for, found by planning problems of every kind
and size.

Dtypes and layouts multiply; the full product would repeat the same code paths. So: every regime for
every result with one dtype throughout, and for each further dimension of the product (masks,
weights, mixed dtypes, integers, ranks, ragged rows) the regimes it takes part in, with the dtypes
that stress it.
"""

from __future__ import annotations

from collections.abc import Iterator

from cuattn import _layout, _plan
from cuattn._problem import CTYPES, SoftmaxProblem

FLOATS = ("float16", "bfloat16", "float32", "float64")
TARGETS = {
    "sm_75": 75,
    "sm_80": 80,
    "sm_86": 86,
    "sm_89": 89,
    "sm_90": 90,
    "sm_100": 100,
    "sm_120": 120,
}
SMS = 132

# Row lengths on both sides of every border of the plan tables.
LENGTHS = sorted({n for p in range(20) for n in (2**p, 2**p + 1)} | {2**20})
FEW_LENGTHS = (5, 200, 1000, 3000, 30_000, 300_000)


def layout(
    rows: int, cols: int, axis: int = -1, row_rank: int = 1, col_rank: int = 1
) -> _layout.Layout:
    """A dense matrix reduced over `axis`; ranks are filled up with dimensions of size 1."""
    strides = {
        "x": (cols, 1),
        "y": (cols, 1),
        "out": (cols, 1),
        "where": (cols, 1),
        "weight": (cols, 1),
    }
    per_operand = tuple(strides.get(name) for name in _layout.OPERANDS)
    found = _layout.join_dimensions((rows, cols), (axis % 2,), per_operand)
    assert found is not None

    def pad(sizes, rank):
        return (1,) * (rank - len(sizes)) + sizes

    def pad_all(strides, rank):
        return tuple((0,) * (rank - len(s)) + s for s in strides)

    return _layout.Layout(
        pad(found.row_size, row_rank),
        pad(found.col_size, col_rank),
        pad_all(found.row_stride, row_rank),
        pad_all(found.col_stride, col_rank),
    )


def accumulator(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def problems() -> Iterator[SoftmaxProblem]:
    """Problems whose plans together hold every configuration."""
    for dtype in FLOATS:
        acc = accumulator(dtype)
        for result in ("prob", "log_prob", "grad", "log_grad", "lse", "state"):
            for cols in LENGTHS:
                for aligned in (False, True):
                    yield SoftmaxProblem(
                        result, dtype, acc, dtype, layout(4096, cols), aligned=aligned
                    )
            for cols in (2, 60, 5000):  # the reduced axis is not the last
                for rows in (2, 10_000):
                    yield SoftmaxProblem(result, dtype, acc, dtype, layout(cols, rows, axis=0))
            yield SoftmaxProblem(
                result, dtype, acc, dtype, layout(10**6, 2, axis=0)
            )  # few long columns
        for cols in (8000, 16_000, 30_000, 60_000, 120_000):  # few rows
            for result in ("prob", "log_prob", "grad", "log_grad"):
                for rows in (1, 2, 8, 30):
                    yield SoftmaxProblem(result, dtype, acc, dtype, layout(rows, cols))
        for cols in LENGTHS:
            for result in ("prob", "log_prob"):
                yield SoftmaxProblem(result, dtype, acc, dtype, layout(64, cols), masked=True)
        for cols in FEW_LENGTHS:
            for masked in (False, True):
                lse = SoftmaxProblem("lse", dtype, acc, dtype, layout(64, cols), masked=masked)
                yield lse
                yield SoftmaxProblem(
                    "lse", dtype, acc, dtype, layout(64, cols), masked=masked, weighted=True
                )
            for row_rank in _layout.RANKS[1:]:
                yield SoftmaxProblem("prob", dtype, acc, dtype, layout(64, cols, row_rank=row_rank))
        for offsets in ("int32", "int64"):
            for width in (1, 100):
                for mean in (10, 1000, 5000):
                    shape = (1000, mean * 1000, width)
                    strides = (0, width, 1)
                    per_operand = [
                        strides if name in ("x", "out") else None for name in _layout.OPERANDS
                    ]
                    ragged = _layout.join_dimensions(shape, (1,), tuple(per_operand), True)
                    assert ragged is not None
                    yield SoftmaxProblem(
                        "prob", dtype, acc, dtype, ragged, offsets=offsets, segments=1000
                    )
    for cols in (2, 4, 8, 16, 32):  # every other column of short rows
        strides = {"x": (2 * cols, 2), "out": (cols, 1)}
        per_operand = tuple(strides.get(name) for name in _layout.OPERANDS)
        sliced = _layout.join_dimensions((4096, cols), (1,), per_operand)
        assert sliced is not None
        for dtype in FLOATS:
            yield SoftmaxProblem("prob", dtype, accumulator(dtype), dtype, sliced)
    for x, out in (
        ("float16", "float32"),
        ("float32", "float64"),
        ("float64", "float16"),
        ("int8", "float64"),
    ):
        for cols in FEW_LENGTHS:
            for result in ("prob", "lse"):
                yield SoftmaxProblem(result, x, accumulator(out), out, layout(64, cols))
    for x in CTYPES:
        if x not in FLOATS:
            yield SoftmaxProblem("prob", x, "float64", "float64", layout(64, 1000))
            yield SoftmaxProblem("prob", x, "float64", "float64", layout(1000, 64, axis=0))
    for rank in _layout.RANKS[1:]:
        for result in ("prob", "log_grad", "lse"):
            yield SoftmaxProblem(
                result,
                "float32",
                "float32",
                "float32",
                layout(500, 64, axis=0, row_rank=rank, col_rank=rank),
            )
        yield SoftmaxProblem(
            "log_prob",
            "float32",
            "float32",
            "float32",
            layout(500, 64, axis=0, row_rank=rank, col_rank=rank),
            masked=True,
        )


def kernels(compute_capability: int) -> dict[str, _plan.Kernel]:
    """Name expression to kernel, for one architecture."""
    found: dict[str, _plan.Kernel] = {}
    for problem in problems():
        for kernel in _plan.plan_softmax(problem, compute_capability, SMS).kernels:
            found.setdefault(kernel.name, kernel)
    for acc in ("float32", "float64"):
        kernel = _plan.plan_state_merge(acc, 1000)
        found[kernel.name] = kernel
    return found
