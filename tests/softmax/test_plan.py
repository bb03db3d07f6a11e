"""Plans cover what they are made for, and stay inside the limits of every device.

Pure Python: sizes in, launches out. What the kernels make of them, test_softmax.py says.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from configurations import accumulator, layout, logits_problems, problems

from cuattn._arrays import row_layout
from cuattn._device.kernel import CTYPES, ITEMSIZE
from cuattn._device.params import softmax_geometry
from cuattn._softmax import plan as softmax_plan
from cuattn._softmax import plan_parts
from cuattn._softmax.problem import RESULTS, SoftmaxProblem

CAPABILITIES = (75, 80, 90, 120)
SMS = 132
OPERANDS = len(row_layout.OPERANDS)
SIZE_OF = {ctype: ITEMSIZE[name] for name, ctype in CTYPES.items()}


def fragment(op):
    """Columns of one access: 16 bytes of the wider of what is read and written."""
    types = op.arguments
    if op.template in ("SoftmaxBackward", "LossBackward"):
        return 16 // SIZE_OF[types["T"]]
    if types["kResult"] not in ("kProb", "kProbLse", "kLogProb"):
        return 16 // SIZE_OF[types["In"]]
    return 16 // max(SIZE_OF[types["In"]], SIZE_OF[types["Out"]])


def geometry(problem, plan):
    """SoftmaxParams from `rows` on, by name; strides by operand."""
    row_rank, col_rank = len(problem.layout.row_size), len(problem.layout.col_size)
    params = softmax_geometry(row_rank, col_rank)
    assert len(plan.geometry) == params.struct.size
    found = params.unpack(plan.geometry)
    for name, rank in (("row_stride", row_rank), ("col_stride", col_rank)):
        strides = found[name]
        found[name] = tuple(strides[i : i + rank] for i in range(0, OPERANDS * rank, rank))
    return found


def check_grid(kernel, capability):
    assert 1 <= kernel.grid < 2**31
    assert 0 < kernel.block <= 1024 and kernel.block % 32 == 0
    assert 1 <= kernel.cluster <= 8 and kernel.grid % kernel.cluster == 0
    assert kernel.cluster == 1 or capability >= 90


def check_covers(rows, rows_per_block, blocks):
    assert (blocks - 1) * rows_per_block < rows <= blocks * rows_per_block


def check_parts(cols, values, tile, vec, pasts):
    """The parts of a row hold each column once, wherever its first fragment begins, and every part
    is some block's."""
    parts, slice_, splits, share = (values[name] for name in ("parts", "slice", "splits", "share"))
    assert 1 <= splits <= parts <= plan_parts.MAX_PARTS + 1  # where no row is aligned
    assert parts == 1 or slice_ % tile == 0 and slice_ >= 2 * tile
    for past in pasts:
        ends = [min(max(i * slice_ - past, 0), cols) for i in range(parts + 1)]
        assert ends[0] == 0 and ends[-1] == cols
    assert (parts - 1) * slice_ < cols + vec - 1 or parts == 1
    assert (splits - 1) * share < parts <= splits * share


def check(problem, capability, num_sms=SMS):
    """Everything that a plan promises; returns it."""
    plan = softmax_plan.plan_softmax(problem, capability, num_sms)
    given = problem.layout
    rows, cols = math.prod(given.row_size), math.prod(given.col_size)
    for kernel in plan.kernels:
        check_grid(kernel, capability)

    ranks = len(given.row_size) + len(given.col_size)
    assert len(plan.geometry) == 8 * (7 + ranks + OPERANDS * ranks)
    values = geometry(problem, plan)
    assert (values["rows"], values["cols"]) == (rows, cols)
    assert values["segment_width"] == (rows // problem.segments if problem.segments else rows)
    for name in ("row_size", "col_size", "row_stride", "col_stride"):
        assert values[name] == getattr(given, name)

    reads = [kernel for kernel in plan.kernels if kernel.template != "softmax_merge"]
    (template,) = {kernel.template for kernel in reads}
    first = plan.kernels[0].arguments
    op, vec = first["Op"], fragment(first["Op"])
    assert all(kernel.arguments["Op"] == op for kernel in plan.kernels)
    pasts = [0] if problem.aligned else list(range(vec))

    if template == "softmax_rows":
        (kernel,) = plan.kernels
        threads, rows_per_block = first["kThreadsPerRow"], first["kRowsPerBlock"]
        cluster = first["kClusterSize"]
        assert (kernel.block, kernel.cluster) == (threads * rows_per_block, cluster)
        check_covers(rows, rows_per_block, kernel.grid // cluster)
        assert threads * first["kFragments"] * vec * cluster >= cols + max(pasts)
        assert plan.workspace_bytes == 0
        return plan

    if template == "softmax_segments":
        (kernel,) = plan.kernels
        warps = first["kWarps"]
        assert kernel.block == 32 * warps and 8 % warps == 0 and first["kItems"] >= 1
        check_covers(rows, first["kLanes"], kernel.grid)
        assert plan.workspace_bytes == 0
        return plan

    # softmax_split, softmax_strided
    splits, parts = values["splits"], values["parts"]
    for kernel in reads:
        sizes = kernel.arguments
        if template == "softmax_split":
            threads, rows_per_block = sizes["kThreadsPerRow"], sizes["kRowsPerBlock"]
            assert kernel.block == threads * rows_per_block and sizes["kFragments"] >= 1
            assert rows_per_block == 1 or parts == 1
            tile = threads * sizes["kFragments"] * vec
        else:
            rows_per_block, threads, items = sizes["kLanes"], sizes["kThreads"], sizes["kItems"]
            assert kernel.block == threads and items >= 1
            assert rows_per_block in (1, 2, 4, 8, 16, 32)
            pasts, vec, tile = [0], 1, threads // rows_per_block * items
        check_covers(rows, rows_per_block, kernel.grid // splits)
        assert kernel.grid % splits == 0 and kernel.cluster == 1
        check_parts(cols, values, tile, vec, pasts)

    phases = [kernel.arguments.get("kPass") for kernel in plan.kernels]
    if problem.reduces:
        alone = splits == 1 and (template == "softmax_split" or parts == 1)
        assert phases == (["kFused"] if alone else ["kReduce", None])  # None: softmax_merge
    elif len(reads) == 1:
        assert phases == ["kFused"] and splits == 1
    else:
        assert phases == ["kReduce", "kNormalize"]
    if len(plan.kernels) > len(reads):
        merge = plan.kernels[-1]
        assert merge.block == 32 * merge.arguments["kRowsPerBlock"]
        check_covers(rows, merge.arguments["kRowsPerBlock"], merge.grid)
    wide = problem.weighted or problem.result in ("entropy", "logits")
    words = 1 if op.template == "SoftmaxBackward" else 4 if wide else 2
    state = SIZE_OF[op.arguments["Acc"]] * words
    assert plan.workspace_bytes == (rows * parts * state if len(plan.kernels) > 1 else 0)
    return plan


def random_problem(rng):
    """A dense or ragged problem of any kind, as cuattn._softmax.run could ask for."""
    result = str(rng.choice([*RESULTS, "grad", "log_grad"]))
    floats = ("float16", "bfloat16", "float32", "float64")
    backward = result in ("grad", "log_grad")
    x = str(rng.choice(floats if backward else list(CTYPES)))
    out = x if backward else str(rng.choice(floats))
    rows, cols = (int(2 ** rng.uniform(0, 21)) for _ in range(2))
    acc, masked = accumulator(out), not backward and bool(rng.integers(2))
    if result == "prob" and rng.integers(4) == 0:
        segments, width = rows, int(rng.integers(1, 70))
        strides = tuple(
            (0, width, 1) if name in ("x", "out") else None for name in row_layout.OPERANDS
        )
        ragged = row_layout.join_dimensions((segments, cols, width), (1,), strides, True)
        return SoftmaxProblem(
            "prob", x, acc, out, ragged, offsets=str(rng.choice(["int32", "int64"])), segments=rows
        )
    ranks = [int(rank) for rank in rng.choice(row_layout.RANKS, 2)]
    return SoftmaxProblem(
        result,
        x,
        acc,
        out,
        layout(rows, cols, int(rng.integers(2)), *(ranks if rng.integers(2) else (1, 1))),
        masked=masked,
        weighted=result == "lse" and bool(rng.integers(2)),
        aligned=bool(rng.integers(2)),
    )


# ---- Every plan ----


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_known_problems(capability):
    for problem in [*problems(), *logits_problems()]:
        if problem.state is None:
            check(problem, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_random_problems(capability, rng):
    for _ in range(1500):
        check(random_problem(rng), capability, int(rng.choice([1, 16, 132, 200])))


def test_lengths_around_every_border():
    """The worst distance from a 16-byte boundary fits too."""
    for dtype in ("float16", "float32", "float64"):
        for result in ("prob", "grad", "lse"):
            for power in range(1, 20):
                for length in range(2**power - 17, 2**power + 18):
                    for aligned in (False, True):
                        if length < 2:
                            continue
                        shape = layout(400, length)
                        acc = accumulator(dtype)
                        check(SoftmaxProblem(result, dtype, acc, dtype, shape, aligned=aligned), 90)


def test_few_rows_of_any_length(rng):
    """Splits and clusters depend on the number of rows."""
    for capability in CAPABILITIES:
        for rows in (1, 2, 3, 7, 33, 66, 67, 131, 133, 527, 529):
            for cols in (2**24 + 1, 2**20, *rng.integers(2, 2**19, 20).tolist()):
                for result in ("prob", "grad", "lse"):
                    for axis in (0, 1):
                        shape = layout(*((rows, cols) if axis else (cols, rows)), axis)
                        check(SoftmaxProblem(result, *["float32"] * 3, shape), capability)


def test_long_rows_fill_the_device():
    """One row still gives every multiprocessor something to do."""
    for result in ("prob", "lse"):
        shape = layout(1, 2**24)
        (kernel, *_) = check(SoftmaxProblem(result, *["float32"] * 3, shape), 90).kernels
        assert SMS <= kernel.grid <= plan_parts.MAX_PARTS + 1
        check(SoftmaxProblem(result, *["float32"] * 3, shape), 90, num_sms=1000)


def test_aligned_rows_split_into_even_slices():
    shape = layout(1, 2**20)
    problem = SoftmaxProblem("lse", *["float32"] * 3, shape, aligned=True)
    values = geometry(problem, check(problem, 90))
    assert (values["parts"], values["splits"], values["slice"]) == (64, 64, 16384)


def test_names_are_configurations():
    """Equal names mean the same kernel, launched with the same block and cluster."""
    by_name, by_configuration = {}, {}
    for capability in CAPABILITIES:
        for problem in problems():
            types = (problem.x, problem.acc, problem.out, problem.result, problem.offsets)
            ranks = len(problem.layout.row_size), len(problem.layout.col_size)
            for kernel in softmax_plan.plan_softmax(problem, capability, SMS).kernels:
                asked = (*types, problem.masked, problem.weighted, *ranks)
                made = (kernel.template, kernel.block, kernel.cluster, asked)
                assert by_name.setdefault(kernel.name, made) == made
                outer = tuple(kernel.arguments.values())[1:]
                assert by_configuration.setdefault((made, outer), kernel.name) == kernel.name
    assert len(by_name) == len(by_configuration) > 800


def test_plans_are_deterministic(rng):
    for _ in range(200):
        problem, capability = random_problem(rng), int(rng.choice(CAPABILITIES))
        plan = softmax_plan.plan_softmax(problem, capability, SMS)
        assert softmax_plan.plan_softmax.__wrapped__(problem, capability, SMS) == plan
        assert hash(plan) == hash(softmax_plan.plan_softmax(problem, capability, SMS))


@pytest.mark.parametrize("n", [1, 127, 128, 129, 10**9])
@pytest.mark.parametrize("acc", ["float32", "float64"])
def test_state_merge(acc, n):
    for logits in (False, True):
        kernel = softmax_plan.plan_state_merge(acc, n, logits)
        check_grid(kernel, 75)
        check_covers(n, kernel.block, kernel.grid)
        flag = str(logits).lower()
        assert kernel.name == f"softmax_state_merge<{CTYPES[acc]}, {flag}, {kernel.block}>"


def test_more_rows_than_a_grid_has_blocks():
    """x[:, ::2] of 2^31 short rows: 32 GB of float16."""
    strides = tuple({"x": (8, 2), "out": (4, 1)}.get(name) for name in row_layout.OPERANDS)
    shape = row_layout.join_dimensions((2**31, 4), (1,), strides)
    check(SoftmaxProblem("prob", "float16", "float32", "float16", shape), 90)


# ---- The regimes ----

# Columns up to which 4096 aligned rows of each dtype are in a regime, without and with clusters:
# (last length, threads a row, blocks a row, reads). A row that is one element longer is in the
# next one.
REGIMES = {
    ("prob", "float32", 80): [
        (4, 1, 1, 1),
        (8, 2, 1, 1),
        (16, 4, 1, 1),
        (128, 8, 1, 1),
        (256, 16, 1, 1),
        (1024, 32, 1, 1),
        (4096, 128, 1, 1),
        (8192, 256, 1, 1),
        (32768, 512, 1, 1),
        (None, 256, None, 2),
    ],
    ("prob", "float32", 90): [
        (1024, 32, 1, 1),
        (4096, 128, 1, 1),
        (8192, 256, 1, 1),
        (16384, 512, 1, 1),
        (32768, 512, 2, 1),
        (65536, 512, 4, 1),
        (262144, 512, 8, 1),
        (None, 256, None, 2),
    ],
    ("prob", "float16", 80): [
        (2048, 32, 1, 1),
        (4096, 128, 1, 1),
        (8192, 256, 1, 1),
        (32768, 512, 1, 1),
        (None, 256, None, 2),
    ],
    ("prob", "float16", 90): [
        (2048, 32, 1, 1),
        (4096, 128, 1, 1),
        (8192, 256, 1, 1),
        (16384, 512, 1, 1),
        (32768, 512, 2, 1),
        (65536, 512, 4, 1),
        (262144, 512, 8, 1),
        (None, 256, None, 2),
    ],
    ("prob", "float64", 80): [
        (512, 32, 1, 1),
        (2048, 128, 1, 1),
        (4096, 256, 1, 1),
        (8192, 512, 1, 1),
        (None, 256, None, 2),
    ],
    ("prob", "float64", 90): [
        (512, 32, 1, 1),
        (2048, 128, 1, 1),
        (4096, 256, 1, 1),
        (8192, 512, 1, 1),
        (16384, 512, 2, 1),
        (32768, 512, 4, 1),
        (65536, 512, 8, 1),
        (None, 256, None, 2),
    ],
    ("grad", "float32", 80): [
        (512, 32, 1, 1),
        (2048, 128, 1, 1),
        (4096, 256, 1, 1),
        (16384, 512, 1, 1),
        (None, 256, None, 2),
    ],
    ("grad", "float32", 90): [
        (512, 32, 1, 1),
        (2048, 128, 1, 1),
        (4096, 256, 1, 1),
        (8192, 512, 1, 1),
        (16384, 512, 2, 1),
        (32768, 512, 4, 1),
        (131072, 512, 8, 1),
        (None, 256, None, 2),
    ],
}


def regime(result, dtype, cols, capability, rows=4096, masked=False):
    """Threads and blocks that share a row, and how often it is read."""
    shape = layout(rows, cols)
    acc = accumulator(dtype)
    problem = SoftmaxProblem(result, dtype, acc, dtype, shape, masked=masked, aligned=True)
    plan = check(problem, capability)
    kernel = plan.kernels[0]
    threads = kernel.arguments["kThreadsPerRow"]
    if kernel.template == "softmax_rows":
        return threads, kernel.arguments["kClusterSize"], 1
    assert kernel.template == "softmax_split"
    return threads, None, len(plan.kernels)


@pytest.mark.parametrize("asked", REGIMES, ids=lambda asked: "-".join(map(str, asked)))
def test_regimes(asked):
    result, dtype, capability = asked
    table = REGIMES[asked]
    for (last, *expected), (_, *then) in zip(table, table[1:], strict=False):
        assert regime(result, dtype, last, capability) == tuple(expected)
        assert regime(result, dtype, last + 1, capability) == tuple(then)
    assert regime(result, dtype, 10**7, capability) == tuple(table[-1][1:])


@pytest.mark.parametrize(
    ("dtype", "capability", "longest"),
    [
        ("float32", 80, 16384),
        ("float32", 90, 131072),
        ("float16", 80, 16384),
        ("float16", 90, 131072),
        ("float64", 90, 65536),
    ],
)
def test_masks_take_registers(dtype, capability, longest):
    assert regime("prob", dtype, longest, capability, masked=True)[2] == 1
    assert regime("prob", dtype, longest + 1, capability, masked=True)[2] == 2


def test_few_rows_get_larger_clusters():
    spread = {rows: regime("prob", "float32", 16384, 90, rows)[:2] for rows in (67, 66, 33, 16, 1)}
    assert spread == {67: (512, 1), 66: (256, 2), 33: (128, 4), 16: (128, 4), 1: (128, 4)}
    assert regime("prob", "float32", 16384, 80, 1)[:2] == (512, 1)


def test_reductions_read_once():
    for cols in (2, 1000, 5000, 10**6):
        for rows in (1, 4096):
            shape = layout(rows, cols)
            plan = check(SoftmaxProblem("lse", *["float32"] * 3, shape), 90)
            assert [kernel.template for kernel in plan.kernels] in (
                ["softmax_split"],
                ["softmax_split", "softmax_merge"],
            )


# Each layout that softmax_rows and softmax_split cannot walk over in vectors.
@pytest.mark.parametrize(
    ("shape", "axes", "x", "out"),
    [
        ((60, 1000), (0,), (1000, 1), (1000, 1)),
        ((60, 1000), (1,), (1, 60), (1000, 1)),
        ((60, 1000), (1,), (1000, 1), (1, 60)),
        ((60, 1000), (1,), (2000, 2), (1000, 1)),
        ((60, 1000), (1,), (1000, -1), (1000, 1)),
        ((60, 1000), (1,), (0, 0), (1000, 1)),
        ((60, 7, 1000), (0, 2), (7000, 1000, 1), (7000, 1000, 1)),
    ],
)
def test_other_layouts_are_strided(shape, axes, x, out):
    strides = tuple({"x": x, "out": out}.get(name) for name in row_layout.OPERANDS)
    plan = check(
        SoftmaxProblem("prob", *["float32"] * 3, row_layout.join_dimensions(shape, axes, strides)),
        90,
    )
    assert {kernel.template for kernel in plan.kernels} == {"softmax_strided"}


def test_no_row_of_the_tables_is_idle():
    """Each is reached by some problem, and says why it is there."""
    resident, strided, segments = set(), set(), set()
    for capability in (80, 90):
        for problem in problems():
            few = problem.layout.rows < 4096 and problem.layout.cols > 1000
            for kernel in softmax_plan.plan_softmax(problem, capability, SMS).kernels:
                name, sizes = kernel.template, kernel.arguments
                if name == "softmax_rows" and few:
                    continue  # clusters that the table does not hold
                if name == "softmax_rows" and sizes["kRowsPerBlock"] == 1:
                    # With a fragment more where a row may start at any element.
                    words = sizes["kFragments"] * problem.vec * problem.words
                    words = 2 ** math.floor(math.log2(words))
                    resident.add((sizes["kThreadsPerRow"], words, sizes["kClusterSize"]))
                elif name == "softmax_strided" and problem.acc == "float64":
                    assert kernel.block <= 256  # they take more than 128 registers
                elif name == "softmax_strided":
                    strided.add((kernel.block, sizes["kItems"] * problem.words))
                elif name == "softmax_segments":
                    segments.add(sizes["kWarps"])
    assert resident == {row[:3] for row in softmax_plan.RESIDENT}
    assert strided == {row[:2] for row in softmax_plan.STRIDED}
    assert segments == {row[0] for row in softmax_plan.SEGMENTS}
    for *_, reason in (*softmax_plan.RESIDENT, *softmax_plan.STRIDED, *softmax_plan.SEGMENTS):
        assert isinstance(reason, str) and reason


# ---- Layouts ----


def walk(sizes, strides):
    """Offsets of a space in the order in which SoftmaxParams::offset walks over it."""
    places = np.unravel_index(np.arange(math.prod(sizes)), sizes)
    return sum(place * stride for place, stride in zip(places, strides, strict=True))


def rows_of(found):
    """Offsets of all operands, (row, column, operand)."""
    rows = [walk(found.row_size, strides) for strides in found.row_stride]
    cols = [walk(found.col_size, strides) for strides in found.col_stride]
    pairs = zip(rows, cols, strict=True)
    return np.stack([row[:, None] + col[None, :] for row, col in pairs], -1)


def rows_as_numpy_has_them(shape, axes, strides):
    """The same by NumPy's own indexing: a view of an array that holds its offsets."""
    views = []
    for stride in strides:
        stride = (0,) * len(shape) if stride is None else stride
        reach = sum((size - 1) * abs(step) for size, step in zip(shape, stride, strict=True))
        base = np.arange(-reach, reach + 1)
        bytes_ = [step * base.itemsize for step in stride]
        view = np.lib.stride_tricks.as_strided(base[reach:], shape, bytes_)
        kept = [d for d in range(len(shape)) if d not in axes]
        rows = math.prod(shape[d] for d in kept)
        views.append(view.transpose(*kept, *axes).reshape(rows, -1))
    return np.stack(views, -1)


def sorted_rows(offsets):
    """Rows and columns in an order of their own: multisets become comparable."""
    return sorted(sorted(map(tuple, row)) for row in offsets.tolist())


def random_strides(rng, shape):
    """Strides as of a transposed, sliced, reversed or broadcast array; None: no such operand."""
    if rng.integers(5) == 0:
        return None
    strides, step = [0] * len(shape), 1
    shuffled = rng.permutation(len(shape)) if rng.integers(2) else range(len(shape))[::-1]
    for d in shuffled:
        step *= int(rng.choice([1, 1, 1, 2]))
        strides[d] = step * int(rng.choice([1, 1, 1, 1, -1, 0]))
        step *= shape[d]
    if rng.integers(4) == 0:
        strides = [abs(step) for step in strides]
    return tuple(strides)


def test_join_dimensions_keeps_every_row(rng):
    ranks = set()
    for _ in range(1500):
        shape = tuple(rng.integers(1, 5, rng.integers(0, 6)).tolist())
        axes = tuple(d for d in range(len(shape)) if rng.integers(2))
        same = random_strides(rng, shape)
        strides = tuple(
            same if rng.integers(2) else random_strides(rng, shape) for _ in range(OPERANDS)
        )
        found = row_layout.join_dimensions(shape, axes, strides)
        expected = rows_as_numpy_has_them(shape, axes, strides)
        assert (found.rows, found.cols) == expected.shape[:2]
        assert sorted_rows(rows_of(found)) == sorted_rows(expected)
        for sizes, by_operand in (
            (found.row_size, found.row_stride),
            (found.col_size, found.col_stride),
        ):
            assert len(sizes) in row_layout.RANKS
            assert len(by_operand) == OPERANDS and {len(s) for s in by_operand} == {len(sizes)}
            ranks.add(len(sizes))
    assert {1, 3} <= ranks


def joined(shape, axes, *strides, segments=False):
    """Sizes and the strides of the first operand, without the padding."""
    found = row_layout.join_dimensions(shape, axes, strides, segments)

    def strip(sizes, by_operand):
        return [pair for pair in zip(sizes, by_operand[0], strict=True) if pair != (1, 0)]

    return strip(found.row_size, found.row_stride), strip(found.col_size, found.col_stride)


@pytest.mark.parametrize(
    ("shape", "axes", "strides", "rows", "cols"),
    [
        pytest.param((2, 3, 4), (2,), [(12, 4, 1)], [(6, 4)], [(4, 1)], id="contiguous"),
        pytest.param((2, 3, 4), (1, 2), [(12, 4, 1)], [(2, 12)], [(12, 1)], id="two-axes"),
        pytest.param((2, 3, 4), (0, 1, 2), [(12, 4, 1)], [], [(24, 1)], id="all-axes"),
        pytest.param((2, 3, 4), (), [(12, 4, 1)], [(24, 1)], [], id="no-axes"),
        pytest.param((), (), [()], [], [], id="0-d"),
        pytest.param((2, 3, 4), (1,), [(12, 4, 1)], [(2, 12), (4, 1)], [(3, 4)], id="middle"),
        pytest.param((4, 3, 2), (0,), [(1, 4, 12)], [(6, 4)], [(4, 1)], id="transposed"),
        pytest.param((2, 3, 4), (2,), [(0, 0, 1)], [(6, 0)], [(4, 1)], id="broadcast"),
        pytest.param((2, 3, 4), (2,), [(0, 4, 1)], [(3, 4), (2, 0)], [(4, 1)], id="half-broadcast"),
        pytest.param((2, 3, 4), (2,), [(-12, -4, -1)], [(6, -4)], [(4, -1)], id="negative"),
        pytest.param((2, 3, 4), (2,), [(-12, 4, 1)], [(2, -12), (3, 4)], [(4, 1)], id="half"),
        pytest.param((2, 1, 4), (2,), [(4, 77, 1)], [(2, 4)], [(4, 1)], id="size-1"),
        pytest.param((2, 3, 4), (2,), [(24, 8, 2)], [(6, 8)], [(4, 2)], id="every-other"),
        pytest.param((2, 3, 4), (2,), [(16, 5, 1)], [(2, 16), (3, 5)], [(4, 1)], id="gaps"),
        # A second operand is joined only where the first one is.
        pytest.param(
            (2, 3, 4), (2,), [(12, 4, 1), (0, 4, 1)], [(2, 12), (3, 4)], [(4, 1)], id="mask"
        ),
        pytest.param((2, 3, 4), (2,), [(12, 4, 1), None], [(6, 4)], [(4, 1)], id="absent"),
    ],
)
def test_joined(shape, axes, strides, rows, cols):
    assert joined(shape, axes, *strides) == (rows, cols)


def test_rank_is_that_of_the_tables():
    gaps = tuple(10**d for d in reversed(range(10)))
    for kept in range(10):
        strides = (*gaps[10 - kept :], 1)
        found = row_layout.join_dimensions((2,) * kept + (3,), (kept,), (strides,))
        if kept > row_layout.RANKS[-1]:
            assert found is None
        else:
            assert len(found.row_size) == min(r for r in row_layout.RANKS if r >= kept)
            assert found.rows == 2**kept
        found = row_layout.join_dimensions(
            (3,) + (2,) * kept, tuple(range(1, kept + 1)), (strides,)
        )
        assert (found is None) == (kept > row_layout.RANKS[-1])


def test_segments_stay_the_slowest():
    """Row r is column r % width of segment r // width, though x does not move with the segment."""
    shape, axes, x = (5, 100, 7), (1,), (0, 7, 1)
    assert joined(shape, axes, x, segments=True)[0] == [(5, 0), (7, 1)]
    assert joined(shape, axes, x)[0] == [(7, 1), (5, 0)]
    # A scale of each segment, and rows of x with gaps between them.
    found = row_layout.join_dimensions((5, 100, 2, 3), axes, ((0, 20, 9, 1), (6, 0, 3, 1)), True)
    assert found.row_size == (5, 2, 3)
    rows = rows_of(found)[:, 0]
    segment, i, j = np.unravel_index(np.arange(30), (5, 2, 3))
    assert rows[:, 0].tolist() == (9 * i + j).tolist()
    assert rows[:, 1].tolist() == (6 * segment + 3 * i + j).tolist()


def test_one_segment():
    assert joined((1, 100, 7), (1,), (0, 7, 1), segments=True)[0] == [(7, 1)]


# ---- Metas ----


def random_view(rng):
    """An array that is transposed, sliced and reversed at random."""
    ndim = int(rng.integers(0, 5))
    shape = rng.integers(1, 5, ndim)
    array = np.zeros(2 * shape, np.int32)[(slice(None, None, 2),) * ndim]
    array = array[tuple(slice(None, None, int(rng.choice([1, 1, -1]))) for _ in range(ndim))]
    return array.transpose(rng.permutation(ndim))


def test_new_results_have_the_memory_order_of_x(rng):
    for _ in range(300):
        x = random_view(rng)
        order = row_layout.memory_order(row_layout.spec_of(x))
        like = np.empty_like(x, order="K", subok=False)
        strides = row_layout.packed(x.shape, order, x.itemsize)
        moved = [d for d in range(x.ndim) if x.shape[d] != 1]
        assert [strides[d] for d in moved] == [like.strides[d] for d in moved]


def test_element_strides(rng):
    for _ in range(300):
        x = random_view(rng)
        shape = tuple(
            int(size if size != 1 else rng.integers(1, 4)) for size in (*[1] * 2, *x.shape)
        )
        wide = np.broadcast_to(x, shape)
        found = row_layout.element_strides(row_layout.spec_of(x), shape)
        moved = [d for d in range(len(shape)) if shape[d] != 1]
        assert [found[d] for d in moved] == [wide.strides[d] // 4 for d in moved]
    assert row_layout.element_strides(None, (2, 3)) is None
    odd = np.zeros(4, np.dtype([("a", "i4"), ("b", "i2")]))["a"]
    assert row_layout.element_strides(row_layout.spec_of(odd), (4,)) is False


def test_expanded_and_padded(rng):
    x = np.zeros((2, 3), np.int8)
    for axes in ((0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 4)):
        assert (
            row_layout.expanded(row_layout.spec_of(x), axes).shape == np.expand_dims(x, axes).shape
        )
    assert row_layout.padded(row_layout.spec_of(x), 4) == ((1, 1, 2, 3), (0, 0, 3, 1), x.dtype)
