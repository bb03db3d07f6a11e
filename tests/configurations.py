"""Every kernel configuration that the plans can ask for, found by planning problems of every kind
and size.

Dtypes and layouts multiply; the full product would repeat the same code paths. So: every regime for
every result with one dtype throughout, and for each further dimension of the product (masks,
weights, mixed dtypes, integers, ranks, ragged rows) the regimes it takes part in, with the dtypes
that stress it. float16 is bfloat16 with another conversion: it takes part in the plain softmax.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from cuattn._arrays import row_layout
from cuattn._arrays.expression import Indexed, parse
from cuattn._arrays.references import references
from cuattn._arrays.syntax import MASK
from cuattn._attention import plan as attention_plan
from cuattn._attention import plan_backward, plan_backward_ds, plan_backward_sm90
from cuattn._attention.plan_append import NewRows, plan_append
from cuattn._attention.plan_backward_score import Places, plan_reference
from cuattn._attention.plan_column_sums import plan_column_sums
from cuattn._attention.plan_decode import DecodeProblem, plan_decode
from cuattn._attention.plan_mask import plan_block_mask, plan_mask
from cuattn._attention.plan_score import plan_score
from cuattn._attention.plan_sm90 import plan_attention_sm90
from cuattn._attention.plan_topk import plan_topk
from cuattn._attention.problem import AttentionProblem, Score
from cuattn._device.kernel import CTYPES, Kernel
from cuattn._softmax import plan as softmax_plan
from cuattn._softmax.problem import SoftmaxProblem
from cuattn._topk import plan as topk_plan
from cuattn._topk import plan_radix
from cuattn._topk.plan_sample import plan_sample
from cuattn._topk.problem import SampleProblem, TopKProblem

FLOATS = ("float16", "bfloat16", "float32", "float64")
STRESS = FLOATS[1:]
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
RAGGED_GRADIENTS = (("float32", "int32"), ("bfloat16", "int64"), ("float64", "int64"))


def layout(
    rows: int, cols: int, axis: int = -1, row_rank: int = 1, col_rank: int = 1
) -> row_layout.Layout:
    """A dense matrix reduced over `axis`; ranks are filled up with dimensions of size 1."""
    strides = {
        "x": (cols, 1),
        "y": (cols, 1),
        "out": (cols, 1),
        "where": (cols, 1),
        "weight": (cols, 1),
    }
    per_operand = tuple(strides.get(name) for name in row_layout.OPERANDS)
    found = row_layout.join_dimensions((rows, cols), (axis % 2,), per_operand)
    assert found is not None

    def pad(sizes, rank):
        return (1,) * (rank - len(sizes)) + sizes

    def pad_all(strides, rank):
        return tuple((0,) * (rank - len(s)) + s for s in strides)

    return row_layout.Layout(
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
        results = ("prob", "log_prob", "grad", "log_grad", "lse", "state")
        for result in results if dtype in STRESS else results[:1]:
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
            for result in results[:4] if dtype in STRESS else ():
                for rows in (1, 2, 8, 30):
                    yield SoftmaxProblem(result, dtype, acc, dtype, layout(rows, cols))
        if dtype not in STRESS:
            continue
        for cols in LENGTHS:
            for result in ("prob", "log_prob"):
                yield SoftmaxProblem(result, dtype, acc, dtype, layout(64, cols), masked=True)
        for cols in FEW_LENGTHS:
            for result in ("grad", "log_grad") if dtype == "float32" else ("log_grad",):
                yield SoftmaxProblem(result, dtype, acc, dtype, layout(64, cols), masked=True)
            for masked in (False, True):
                lse = SoftmaxProblem("lse", dtype, acc, dtype, layout(64, cols), masked=masked)
                yield lse
                yield SoftmaxProblem(
                    "lse", dtype, acc, dtype, layout(64, cols), masked=masked, weighted=True
                )
            for row_rank in row_layout.RANKS[1:]:
                yield SoftmaxProblem("prob", dtype, acc, dtype, layout(64, cols, row_rank=row_rank))
        for offsets in ("int32", "int64"):
            for width in (1, 100):
                for mean in (10, 1000, 5000):
                    shape = (1000, mean * 1000, width)
                    strides = (0, width, 1)
                    per_operand = [
                        strides if name in ("x", "y", "out") else None
                        for name in row_layout.OPERANDS
                    ]
                    ragged = row_layout.join_dimensions(shape, (1,), tuple(per_operand), True)
                    assert ragged is not None
                    for result in ("prob", "grad"):
                        if result == "prob" or (dtype, offsets) in RAGGED_GRADIENTS:
                            yield SoftmaxProblem(
                                result, dtype, acc, dtype, ragged, offsets=offsets, segments=1000
                            )
    for cols in (2, 4, 8, 16, 32):  # every other column of short rows
        strides = {"x": (2 * cols, 2), "out": (cols, 1)}
        per_operand = tuple(strides.get(name) for name in row_layout.OPERANDS)
        sliced = row_layout.join_dimensions((4096, cols), (1,), per_operand)
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
    for rank in row_layout.RANKS[1:]:
        for result in ("prob", "log_grad", "lse"):
            yield SoftmaxProblem(
                result,
                "float32",
                "float32",
                "float32",
                layout(500, 64, axis=0, row_rank=rank, col_rank=rank),
            )
        for result in ("log_prob", "log_grad"):
            yield SoftmaxProblem(
                result,
                "float32",
                "float32",
                "float32",
                layout(500, 64, axis=0, row_rank=rank, col_rank=rank),
                masked=True,
            )


def problems_with_state() -> Iterator[SoftmaxProblem]:
    """Parts of rows whose states are known: every tile, and the options that stress it."""
    for dtype in STRESS:
        acc = accumulator(dtype)
        for result in ("prob", "log_prob", "prob_lse"):
            for masked in (False, True) if result != "prob_lse" else (True,):
                like = {"masked": masked, "state": acc}
                few = masked or result != "prob"
                for cols in (9, 500, 10**5) if few else (1, 2, 5, 9, 17, 33, 100, 200, 500, 10**5):
                    yield SoftmaxProblem(result, dtype, acc, dtype, layout(64, cols), **like)
                for cols in (2, 100):
                    columns = layout(cols, 100, axis=0)
                    yield SoftmaxProblem(result, dtype, acc, dtype, columns, **like)
    for x, out, state in (
        ("float16", "float16", "float32"),
        ("float16", "float32", "float32"),
        ("float32", "float64", "float32"),
        ("float64", "float16", "float64"),
        *((x, "float64", "float64") for x in CTYPES if x not in FLOATS),
    ):
        for found in (layout(64, 1000), layout(1000, 64, axis=0)):
            yield SoftmaxProblem("prob", x, accumulator(out), out, found, state=state)
    for rank in row_layout.RANKS[1:]:
        of_columns = layout(500, 64, axis=0, row_rank=rank, col_rank=rank)
        for found in (layout(64, 1000, row_rank=rank), of_columns):
            for result, masked in (("prob", False), ("log_prob", True)):
                yield SoftmaxProblem(
                    result, "float32", "float32", "float32", found, masked, state="float32"
                )


def logits_problems() -> Iterator[SoftmaxProblem]:
    """Losses, entropies and their states: every regime of reductions, with the dtypes and options
    that stress it; and gradients of losses, every tile."""
    for dtype in STRESS:
        acc = accumulator(dtype)
        for cols in (2**p for p in range(13)):  # what they share: an entropy has all of it
            yield SoftmaxProblem("entropy", dtype, acc, acc, layout(4096, cols))
        for cols in FEW_LENGTHS:
            for result in ("loss", "entropy", "logits"):
                yield SoftmaxProblem(result, dtype, acc, acc, layout(64, cols))
        for rows, cols in ((64, 2), (64, 60), (64, 5000), (5000, 10_000), (2, 10**6)):
            for result in ("loss", "entropy", "logits"):
                yield SoftmaxProblem(result, dtype, acc, acc, layout(cols, rows, axis=0))
        for masked in (layout(64, 5), layout(64, 3000), layout(3000, 64, axis=0)):
            yield SoftmaxProblem("entropy", dtype, acc, acc, masked, masked=True)
        for cols in (1, 2, 5, 9, 17, 33, 100, 200, 500, 10**5):
            yield SoftmaxProblem("loss_grad", dtype, acc, dtype, layout(64, cols), state=acc)
        for cols in (2, 100):
            columns = layout(cols, 100, axis=0)
            yield SoftmaxProblem("loss_grad", dtype, acc, dtype, columns, state=acc)
    for x in ("int8", "uint64"):
        for result in ("loss", "entropy", "logits"):
            yield SoftmaxProblem(result, x, "float64", "float64", layout(64, 3000))
    for x, state in (("float16", "float64"), ("float64", "float32")):
        yield SoftmaxProblem("loss_grad", x, accumulator(x), x, layout(64, 500), state=state)
    for rank in row_layout.RANKS[1:]:
        for found in (layout(64, 3000, row_rank=rank), layout(500, 64, axis=0, row_rank=rank)):
            for result in ("loss", "entropy", "logits"):
                yield SoftmaxProblem(result, "float32", "float32", "float32", found)
            yield SoftmaxProblem(
                "loss_grad", "float32", "float32", "float32", found, state="float32"
            )
        of_columns = layout(500, 64, axis=0, row_rank=rank, col_rank=rank)
        yield SoftmaxProblem("entropy", "float32", "float32", "float32", of_columns, masked=True)


def selection(rows: int, cols: int, axis: int = -1, rank: int = 1) -> row_layout.Layout:
    """As `layout`, with the results of a selection, which have their own length along the axis."""
    found = layout(rows, cols, axis, rank)
    out = row_layout.OPERANDS.index("out")
    columns = list(found.col_stride)
    columns[out] = (1,)
    return row_layout.Layout(found.row_size, found.col_size, found.row_stride, tuple(columns))


def topk_problems() -> Iterator[TopKProblem]:
    """Selections whose plans together hold every configuration that the dtypes stress."""
    lists = [most for most, _, _ in topk_plan.LISTS]
    for softmax in (False, True):
        for k in lists:  # a warp a row, a block, and a block of slices
            for rows, cols in ((10**5, 5000), (64, 5000)):
                yield TopKProblem("float32", selection(rows, cols), k, softmax)
        for rows, cols in ((60, 50_000), (30, 50_000), (1, 50_000), (1, 10**6)):
            # clusters, and rows that are split
            yield TopKProblem("float32", selection(rows, cols), lists[-1], softmax)
        for dtype in ("bfloat16", "float64"):
            yield TopKProblem(dtype, selection(1, 50_000), lists[-1], softmax)
        for k in (1, 2, 4, 8):  # routers
            for cols in (8, 64, 256):
                yield TopKProblem("float32", selection(10**5, cols), k, softmax)
        for dtype in FLOATS:
            yield TopKProblem(dtype, selection(64, 5000), lists[-1], softmax)
            yield TopKProblem(dtype, selection(10**5, 256), 8, softmax)
            yield TopKProblem(dtype, selection(100, 10**4, axis=0), 8, softmax)  # columns
            yield TopKProblem(dtype, selection(5000, 100, axis=0), 100, softmax)
            for k, cols in ((300, 500), (300, 1500), (10**4, 10**5)):
                yield TopKProblem(dtype, selection(2, cols), k, softmax)
        yield TopKProblem("float32", selection(5000, 100, axis=0), 300, softmax)
    for dtype in FLOATS:
        for k, cols in ((5, 64), (lists[-1], 5000), (300, 500), (300, 10**5)):
            yield TopKProblem(dtype, selection(64, cols), k, softmax=True, masked=True)
    for dtype in CTYPES:
        if dtype not in FLOATS:
            for k, cols in ((4, 64), (lists[0], 5000), (300, 10**5)):
                yield TopKProblem(dtype, selection(64, cols), k)
    for rank in row_layout.RANKS[1:]:
        for softmax in (False, True):
            for k, cols in ((5, 64), (5, 5000), (300, 500), (300, 10**5)):
                yield TopKProblem("float32", selection(64, cols, rank=rank), k, softmax)
    for k in (5, lists[-1], 300):  # rows too long for an index of 32 bits
        for dtype in ("float16", "int8"):
            yield TopKProblem(dtype, selection(1, 2**33), k, softmax=dtype == "float16")


def sampled(
    x: str, layout: row_layout.Layout, num: int, compute_capability: int, **options
) -> Iterator[Kernel]:
    """Kernels of `sample`."""
    masked = options.pop("masked", False)
    filters = {"top_k": None, "top_p": False, "min_p": False} | options
    problem = SampleProblem(x, layout, 0, masked=masked)
    plan = plan_sample(problem, num, *filters.values(), compute_capability, SMS)
    for one in plan.passes:
        for kernel, _ in one.plan.launches:
            yield kernel


def sample_kernels(compute_capability: int) -> Iterator[Kernel]:
    """Draws whose plans together hold every configuration that the dtypes stress."""
    find = functools.partial(sampled, compute_capability=compute_capability)
    lists = [most for most, _, _ in topk_plan.LISTS]
    for num in lists:  # a warp a row, a block, and a block of slices
        for rows, cols in ((10**5, 5000), (64, 5000)):
            yield from find("float32", selection(rows, cols), num)
        yield from find("float32", selection(64, 5000), 1, top_k=num)
    for rows, cols in ((60, 50_000), (30, 50_000), (1, 50_000), (1, 10**6)):
        for filters in ({}, {"top_p": True}):  # clusters, and rows that are split
            yield from find("float32", selection(rows, cols), 1, **filters)
    for dtype in STRESS:
        for found in (selection(64, 5000), selection(5000, 100, axis=0)):
            yield from find(dtype, found, lists[-1])
            yield from find(dtype, found, 1, top_p=True)
        for cols in (500, 1500, 10**5):
            yield from find(dtype, selection(2, cols), 300, min_p=True)
        yield from find(dtype, selection(64, 5000), 1, top_p=True, masked=True)
    yield from find("float32", selection(2, 10**5), 10**4, top_k=1000)
    for rank in row_layout.RANKS[1:]:
        for num in (1, 300):
            yield from find("float32", selection(64, 5000, rank=rank), num, top_p=True)
    yield from find("float16", selection(1, 2**33), 1, top_p=True)


def attention_problem(
    op: str, dim: int, value_dim: int | None = None, vector: bool = True, **flags
) -> AttentionProblem:
    dtype = "float32" if op == "tf32" else op
    sizes = 1, 4, 2, 1000, 1000, dim, value_dim or dim
    return AttentionProblem(op, dtype, *sizes, vector=vector, **{"tma": vector, **flags})


def attention_problems() -> Iterator[AttentionProblem]:
    """Attention calls whose plans together hold every tile, with and without a rule for scores."""
    problem = attention_problem
    for dim in range(32, 257, 32):
        yield problem("float16", dim)
    yield problem("float16", 192, 128)
    yield problem("float16", 64, 256)
    for dim in (64, 128, 256):
        for op in ("bfloat16", "tf32", "float32", "float64"):
            yield problem(op, dim)
        for op in ("float16", "tf32", "float32", "float64"):
            bias = "float64" if op == "float64" else "float32"
            yield problem(op, dim, vector=False)
            yield problem(op, dim, modified=True, bias=bias, masked=True)
        yield problem("bfloat16", dim, vector=False, modified=True, bias="bfloat16", masked=True)
    for op in ("float16", "bfloat16", "tf32", "float32", "float64"):
        bias = "float64" if op == "float64" else "float32"
        yield problem(op, 512)
        yield problem(op, 512, vector=False, modified=True, bias=bias, masked=True)
    yield problem("float16", 320)
    yield problem("float64", 288, vector=False)
    yield problem("float16", 128, modified=True)
    yield problem("float16", 128, masked=True)
    for dim in (64, 128, 256):
        for op in ("float16", "tf32", "float32", "float64"):
            yield problem(op, dim, masked=True, blocked=True)
    for op in ("bfloat16", "float32", "float64"):
        bias = op if op == "float64" else "float32"
        yield problem(op, 64, modified=True, bias=bias, masked=True, blocked=True)


def score_problems(chain: bool = False) -> Iterator[AttentionProblem]:
    """Calls with a score expression: a common one, and one with some of everything; `chain`: for
    gradients."""
    relative = parse("s + table[h, q - k]", (Indexed("table", "float", 2),))
    of_all = parse(
        "where((0 <= q - k < 99) & (tree[q, k] == tree[k, k]), tanh(s) * exp(w), log(s) / k)"
        " + min(far[q // 8 % 5], 9)",
        (Indexed("far", "float", 1), Indexed("tree", "int", 2), Indexed("w", "float", 0)),
    )
    common = plan_score(relative, ("float32",), chain)
    every = plan_score(of_all, ("float64", "int32", "bfloat16"), chain)
    rule = {"modified": True, "score": every}
    masked = {"vector": False, "bias": "float32", "masked": True}
    yield attention_problem("float16", 64, modified=True, score=common)
    yield attention_problem("float64", 128, modified=True, score=common)
    yield attention_problem("float16", 128, **rule, **masked)
    for op, dim in (("float16", 256), ("tf32", 128), ("float32", 64)):
        yield attention_problem(op, dim, tma=False, **rule)


def array_gradient_kernels(compute_capability: int) -> Iterator[Kernel]:
    """Gradients of the arrays of a score expression: the largest tile of every table, a common
    expression, and one with some of everything."""
    table = Indexed("table", "float", 2), Indexed("w", "float", 0)
    relative = parse("s * w + table[h, q - k]", table)
    of_all = parse(
        "where((0 <= q - k < 99) & (s > 0), tanh(s) * exp(w * table[b, bucket[q - k] // h]),"
        " s / k)",
        (Indexed("bucket", "int", 1), *table),
    )
    for op, dim, rest in (
        ("float16", 64, {}),
        ("float16", 128, {"vector": False, "bias": "float32", "masked": True}),
        ("bfloat16", 256, {}),
        ("tf32", 128, {}),
        ("float32", 64, {}),
        ("float64", 128, {}),
    ):
        text, dtypes, place = relative, ("float32", "float32"), 0
        if rest or op == "float64":
            text, dtypes, place = of_all, ("int32", "bfloat16", "float64"), 1
        reference = references(text, place, "table")[0]
        score = plan_score(text, dtypes, True, reference.step)
        problem = attention_problem(op, dim, modified=True, score=score, **rest)
        places = Places(False, True, True)
        one = problem, places, True, dtypes[place], 2000, compute_capability
        yield from plan_reference(*one)[:2]


def some_mask() -> Score:
    """A mask of documents, windows of their own width and a prefix, with some of everything."""
    arrays = ("doc", "int", 2), ("far", "float", 1), ("reach", "int", 1), ("tree", "bool", 2)
    indexed = tuple(Indexed(*array) for array in arrays)
    text = (
        "(doc[b, q] == doc[b, k]) & ((0 <= q - k < reach[h]) | (k % 5 < far[q // 8] / 2))"
        " | tree[q, k]"
    )
    return plan_mask(parse(text, indexed, MASK), ("int32", "float32", "int64", "bool"))


def mask_problems() -> Iterator[AttentionProblem]:
    """Calls with a block mask that is an expression."""
    how = {"masked": True, "blocked": True, "mask": some_mask()}
    yield attention_problem("float16", 64, **how)
    yield attention_problem("float32", 64, **how)
    yield attention_problem("bfloat16", 128, modified=True, score=few_arrays(), **how)
    yield attention_problem("float64", 64, **how)


def few_arrays() -> Score:
    """A score expression of arrays of one, two and no places."""
    arrays = ("bias", 2), ("far", 1), ("scale", 1)
    indexed = tuple(Indexed(name, "float", n) for name, n in arrays)
    text = "s * scale[h] + bias[q, k] - far[k]"
    return plan_score(parse(text, indexed), ("float32", "float64", "float16"))


def sm90_score_problems() -> Iterator[AttentionProblem]:
    """Those of Hopper's own kernel, whose scores have few registers."""
    for op, dim in (("bfloat16", 96), ("float16", 128), ("bfloat16", 192), ("float16", 256)):
        yield attention_problem(op, dim, modified=True, score=few_arrays())


def score_decode_problems() -> Iterator[DecodeProblem]:
    """Those over a KV cache."""
    for op, rows, dim in (
        ("float16", 64, 128),
        ("bfloat16", 16, 256),
        ("float64", 16, 64),
        ("float16", 64, 576),
    ):
        shape = (8, 2, rows, 4096, dim, min(dim, 512))
        how = {"values_in_keys": dim > 256, "plain": False, "score": few_arrays()}
        yield DecodeProblem(op, op, *shape, **how)


def sm90_attention_problems() -> Iterator[AttentionProblem]:
    """What they lack of the tiles of Hopper's own kernel; and with it, what that leaves to the
    general one there: arrays that TMA cannot move."""
    for dims in ((64, 64), (96, 96), (192, 128), (192, 192), (256, 256), (64, 256)):
        yield attention_problem("bfloat16", *dims, modified=True)
    for dims in ((64, 128), (128, 64)):
        yield attention_problem("float16", *dims)
    for dim in (64, 128, 256):
        yield attention_problem("float16", dim, tma=False)
    yield attention_problem("float16", 128, tma=False, modified=True)
    blocked = {"masked": True, "blocked": True}
    for dims in ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)):
        yield attention_problem("bfloat16", *dims, modified=True, **blocked)
        if dims[0] not in (64, 128, 256):
            yield attention_problem("float16", *dims, **blocked)
    yield attention_problem("float16", 192, modified=True, score=few_arrays(), **blocked)
    yield attention_problem("float16", 128, tma=False, **blocked)


def attention_topk_kernels() -> Iterator[Kernel]:
    """The best keys of queries: every tile of many rows and of few, with and without a rule; and
    what merges the lists of blocks that share rows."""
    problem = attention_problem
    for op, dims in (("float16", (64, 128, 256)), ("tf32", (64,)), ("float32", (64, 256)),
                     ("float64", (64, 128, 256))):  # fmt: skip
        for dim in dims:
            yield plan_topk(problem(op, dim), 64, SMS).kernel
        bias = "float64" if op == "float64" else "float32"
        for dim in {dims[0], dims[-1]}:
            rule = problem(op, dim, vector=False, bias=bias, masked=True)
            yield plan_topk(rule, 64, SMS).kernel
        few = dataclasses.replace(problem(op, 64), q_rows=1, k_rows=100_000)
        for num in (10, 64) if op != "tf32" else ():
            plan = plan_topk(few, num, SMS)
            assert plan.merge is not None
            yield from (plan.kernel, plan.merge)[: 2 if num == 64 or op == "float16" else 1]


def backward_problems() -> Iterator[AttentionProblem]:
    """Gradients whose plans together hold every tile; with a rule for scores those whose blocks
    have fewest or most columns."""
    for op in ("float16", "tf32", "float32", "float64"):
        bias = "float64" if op == "float64" else "float32"
        rule = {"vector": False, "modified": True, "bias": bias, "masked": True}
        for dim in (64, 128, 256):
            yield attention_problem(op, dim)
            if dim != 128 or op == "float16":
                yield attention_problem(op, dim, **rule)
    for dims in ((96, 96), (192, 192), (64, 256)):
        yield attention_problem("float16", *dims)
    yield attention_problem("float16", 128, vector=False)
    yield attention_problem("bfloat16", 64)


def sm90_backward_problems() -> Iterator[AttentionProblem]:
    """What they lack of the tiles of Hopper's own kernels."""
    for dims in ((64, 64), (96, 96), (128, 128), (192, 192), (256, 256)):
        yield attention_problem("bfloat16", *dims)
    for dims in ((128, 64), (256, 64)):
        yield attention_problem("float16", *dims)


def backward_kernels(compute_capability: int) -> Iterator[Kernel]:
    """The kernels of these."""
    if compute_capability == 90:
        for problem in [*backward_problems(), *sm90_backward_problems()]:
            for plan in (plan_backward_sm90.plan_q_sm90, plan_backward_sm90.plan_kv_sm90):
                if found := plan(problem, compute_capability, SMS):
                    yield found.launch.kernel
            many = dataclasses.replace(problem, q_rows=2000, k_rows=2000)
            if storing := plan_backward_ds.plan_ds(many, compute_capability, SMS):
                yield from (launch.kernel for launch in storing.rounds[0][2:])
    for problem in [*backward_problems(), *itertools.islice(score_problems(chain=True), 3)]:
        yield plan_backward.plan_rows(problem, problem.vector).kernel
        yield plan_backward.plan_q(problem, compute_capability).kernel
        for launch in plan_backward.plan_kv(problem, compute_capability):
            yield launch.kernel
        if problem.bias is not None:
            sizes = plan_backward.BiasSizes(1, 4, 1000, 1000)
            yield plan_backward.plan_bias(problem, sizes, compute_capability).kernel
    yield from array_gradient_kernels(compute_capability)
    for acc in ("float32", "float64"):
        yield plan_backward.plan_sums(acc, 4)


def column_sums_problems() -> Iterator[AttentionProblem]:
    """Sums of probabilities, whose plans together hold every tile."""
    for op in ("float16", "tf32", "float32", "float64"):
        bias = "float64" if op == "float64" else "float32"
        for dim in (64, 128, 256):
            rule = {"vector": dim != 128, "modified": True, "bias": bias, "masked": True}
            yield attention_problem(op, dim, vector=dim != 64)
            yield attention_problem(op, dim, **rule)
    yield attention_problem("bfloat16", 128)


def decode_problems(compute_capability: int) -> Iterator[DecodeProblem]:
    """Attention over a KV cache, whose plans together hold every tile of every type."""
    for op in ("float16", "bfloat16", "tf32", "float32", "float64"):
        for dim in (64, 128, 256, 576):
            for rows in (16, 32, 64):
                small = compute_capability in (86, 89, 120, 121)  # 99 KiB a block
                if not (small and op == "float64" and dim > 256):
                    dtype = "float32" if op == "tf32" else op
                    shape = (8, 2, rows, 4096, dim, min(dim, 512))
                    yield DecodeProblem(op, dtype, *shape, values_in_keys=dim > 256)


@functools.cache  # a hundred tests ask
def kernels(compute_capability: int) -> dict[str, Kernel]:
    """Name expression to kernel, for one architecture."""
    found: dict[str, Kernel] = {}
    for problem in [*problems(), *problems_with_state(), *logits_problems()]:
        for kernel in softmax_plan.plan_softmax(problem, compute_capability, SMS).kernels:
            found.setdefault(kernel.name, kernel)
    for selected in topk_problems():
        for kernel, _ in topk_plan.plan_topk(selected, compute_capability, SMS).launches:
            found.setdefault(kernel.name, kernel)
    for kernel in sample_kernels(compute_capability):
        found.setdefault(kernel.name, kernel)
    attended = [*attention_problems(), *score_problems()] if compute_capability >= 80 else []
    attended += mask_problems() if compute_capability >= 80 else ()
    if compute_capability == 90:
        attended += [*sm90_attention_problems(), *sm90_score_problems()]
    for problem in attended:
        plan = plan_attention_sm90(problem, compute_capability, SMS)
        planned = (plan or attention_plan.plan_attention(problem, compute_capability)).kernel
        found.setdefault(planned.name, planned)
    decodes = [*decode_problems(compute_capability), *score_decode_problems()]
    for decoded in decodes if compute_capability >= 80 else ():
        planned = plan_decode(decoded, compute_capability, SMS).kernel
        found.setdefault(planned.name, planned)
    for kernel in attention_topk_kernels() if compute_capability >= 80 else ():
        found.setdefault(kernel.name, kernel)
    for kernel in backward_kernels(compute_capability) if compute_capability >= 80 else ():
        found.setdefault(kernel.name, kernel)
    for problem in column_sums_problems() if compute_capability >= 80 else ():
        planned = plan_column_sums(problem, SMS).launch.kernel
        found.setdefault(planned.name, planned)
    if compute_capability >= 80:
        tiles = plan_block_mask(some_mask(), 1000)
        found[tiles.name] = tiles
    for dtype in FLOATS:
        for vector in (False, True):
            acc = accumulator(dtype)
            merge = attention_plan.plan_attention_merge(dtype, acc, 1000, 64, vector)
            found[merge.name] = merge
    for quotients in (None, "float32", "float64"):
        append = plan_append("float32", quotients, 1000, (NewRows(64, True),))
        assert append is not None
        found[append.kernel.name] = append.kernel
    for acc in ("float32", "float64"):
        for kernel in (
            softmax_plan.plan_state_merge(acc, 1000),
            softmax_plan.plan_state_merge(acc, 1000, logits=True),
            plan_radix.plan_topk_state_merge(acc, acc, 1000, 5),
            plan_radix.plan_topk_state_merge(acc, "float64", 1000, 5),
        ):
            found[kernel.name] = kernel
    return found
