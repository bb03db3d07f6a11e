"""topk_lanes, planned by `plan_lanes` and launched by itself: every shape of a group of lanes."""

from __future__ import annotations

import os
from typing import NamedTuple

import emulator
import numpy as np
import pytest
from cases import INF, NAN, border_row, draw, nans, special_rows
from tolerance import FLOATS, NAIVE, assert_close, dtype_of, exact

from cuattn import reference
from cuattn._arrays import row_layout
from cuattn._device.kernel import Kernel
from cuattn._device.params import SOFTMAX_HEAD, TOPK
from cuattn._softmax import plan_parts
from cuattn._topk.plan_lanes import plan_lanes
from cuattn._topk.problem import TopKProblem

pytestmark = pytest.mark.drawn

OUTPUTS = {"prob": 0, "log_prob": 1, "logit": 2, "state": 3}
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


@pytest.fixture
def arch(rng):
    """The kernel is the same for both."""
    return str(rng.choice(["sm_80", "sm_90"]))


class Result(NamedTuple):
    """What a launch made, rows first, and what it cost."""

    values: np.ndarray
    indices: np.ndarray
    stat: np.ndarray  # m of a state, else lse
    stat_l: np.ndarray
    counters: emulator.Counters
    kernel: Kernel


def topk(
    arch,
    x,
    k,
    *,
    axis=-1,
    softmax=False,
    sign=1,
    scale=None,
    where=None,
    output="prob",
    renormalize=False,
    strided=None,
    index_offset=0,
    rows_planned=None,
    kernel=None,
):
    """The `k` best along `axis` of a matrix or a stack of them, by topk_lanes."""
    axis %= x.ndim
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    acc = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    values = emulator.empty((*shape, k), acc if output == "state" else x.dtype)
    indices = emulator.empty((*shape, k), np.int64)
    stat, stat_l = (emulator.empty(shape, acc) for _ in range(2))
    scales = None
    if scale is not None and np.ndim(scale):
        scales = np.ascontiguousarray(scale, acc)

    def moved(array):
        """Strides in elements, with that along the axis last."""
        steps = [s // array.itemsize for s in array.strides]
        return (*steps[:axis], *steps[axis + 1 :], steps[axis])

    def rowwise(array):
        return (*(s // array.itemsize for s in array.strides), 0)

    strides = {"x": moved(x), "out": tuple(s // values.itemsize for s in values.strides)}
    strides["stat"] = rowwise(stat)
    if where is not None:
        strides["where"] = moved(where)
    if scales is not None:
        strides["scale"] = rowwise(scales)
    ordered = [strides.get(name, (0,) * x.ndim) for name in row_layout.OPERANDS]
    rank = next(rank for rank in row_layout.RANKS if rank >= len(shape))
    pad = rank - len(shape)
    layout = row_layout.Layout(
        (1,) * pad + shape,
        (x.shape[axis],),
        tuple((0,) * pad + steps[:-1] for steps in ordered),
        tuple(steps[-1:] for steps in ordered),
    )
    aligned = emulator.address(x) % 16 == 0
    aligned = aligned and all(s * x.itemsize % 16 == 0 for s in layout.row_stride[0])
    problem = TopKProblem(
        x.dtype.name, layout, k, softmax=softmax, masked=where is not None, aligned=aligned
    )
    if strided is None:
        strided = layout.col_stride[0] != (1,)
    kernel = kernel(problem) if kernel else plan_lanes(problem, strided)
    wants_stat = softmax and output != "logit"
    given = {
        "x": emulator.address(x),
        "where": 0 if where is None else emulator.address(where),
        "scale": 0 if scales is None else emulator.address(scales),
        "out": emulator.address(values),
        "stat": emulator.address(stat) if wants_stat else 0,
        "stat_l": emulator.address(stat_l) if output == "state" else 0,
        "scale_value": sign if scale is None or scales is not None else scale,
    }
    params = SOFTMAX_HEAD.pack(**(dict.fromkeys(SOFTMAX_HEAD.codes, 0) | given))
    params += plan_parts.geometry(layout, plan_parts.Parts(1, layout.cols))
    params += TOPK.pack(
        indices=emulator.address(indices),
        lists=0,
        k=k,
        index_offset=index_offset,
        output=OUTPUTS[output],
        renormalize=renormalize,
    )
    runtime = emulator.Runtime(arch, seed=int(os.environ["CUATTN_TEST_SEED"]))
    runtime.launch(kernel, params, (x, where, scales), (values, indices, stat, stat_l))
    return Result(values, indices, stat, stat_l, runtime.total(), kernel)


@np.errstate(invalid="ignore")
def best(x, k, sign=1):
    """Indices of the k best along the last axis: ties by index, NaN last."""
    if x.dtype.kind in "iu":
        numbers, nan = x if sign < 0 else ~x, np.zeros(x.shape, bool)
    else:
        numbers = x.astype(np.longdouble)
        nan = np.isnan(numbers)
        numbers = np.where(nan, 0, -sign * numbers)
    index = np.broadcast_to(np.arange(x.shape[-1]), x.shape)
    return np.lexsort((index, numbers, nan))[..., :k]


def bits(a):
    a = np.ascontiguousarray(a)
    return a.view(f"u{a.itemsize}")


def verify(arch, x, k, *, axis=-1, sign=1, **options):
    """A plain selection, bit for bit."""
    got = topk(arch, x, k, axis=axis, sign=sign, **options)
    rows = np.moveaxis(x, axis, -1)
    expected = best(rows, k, sign)
    np.testing.assert_array_equal(got.indices, expected + options.get("index_offset", 0))
    np.testing.assert_array_equal(bits(got.values), bits(np.take_along_axis(rows, expected, -1)))
    return got


@np.errstate(all="ignore")
def verify_softmax(arch, x, k, *, axis=-1, scale=None, where=None, output="prob", **options):
    """Order exactly, values and lse as close as those of `softmax`."""
    options |= {"scale": scale, "where": where, "output": output}
    got = topk(arch, x, k, axis=axis, softmax=True, **options)
    rows = np.moveaxis(x, axis, -1)
    mask = None if where is None else np.moveaxis(where, axis, -1)
    factor = None if scale is None else np.asarray(scale, got.stat.dtype)
    factor = factor[..., None] if factor is not None and factor.ndim else factor
    t = rows.astype(got.stat.dtype)
    t = t if factor is None else t * factor
    t = t if mask is None else np.where(mask, t, -INF).astype(t.dtype)
    expected = best(t, k)
    np.testing.assert_array_equal(got.indices, expected)
    if output == "logit":
        ref = np.take_along_axis(t, expected, -1).astype(x.dtype)
        np.testing.assert_array_equal(got.values, ref)
        return got
    plain = {"scale": factor, "where": mask}
    lse = reference.softmax(exact(rows), -1, return_lse=True, **plain)[1]
    assert_close(got.stat, lse, NAIVE["logsumexp"](rows, -1, dtype=got.stat.dtype, **plain))
    name = "softmax" if output == "prob" else "log_softmax"
    if options.get("renormalize"):
        rows = np.take_along_axis(rows, expected, -1)
        if mask is not None:
            plain["where"] = np.take_along_axis(mask, expected, -1)
    ref = getattr(reference, name)(exact(rows), -1, **plain)
    naive = NAIVE[name](rows, -1, **plain)
    values = got.values
    if not options.get("renormalize"):
        values = np.array(ref, got.values.dtype, order="C")  # the whole row, for its error bound
        np.put_along_axis(values, expected, got.values, -1)
    assert_close(values, ref, naive, probabilities=output == "prob")
    return got


@np.errstate(invalid="ignore")
def router_rows(rng, n, k, dtype="float32"):
    """Rows that are easy to order wrongly, as one matrix."""
    row = draw(rng, n, "float64")
    rows = [row, np.sort(row), np.sort(row)[::-1], np.full(n, 2.5), np.zeros(n)]
    rows += [border_row(rng, n, k), -border_row(rng, n, k), rng.integers(-2, 3, n)]
    stacked = np.stack([np.round(r) if dtype_of(dtype).kind in "iu" else r for r in rows])
    x = (abs(stacked) if dtype_of(dtype).kind == "u" else stacked).astype(dtype_of(dtype))
    if x.dtype.kind in "iu":
        limits = np.iinfo(x.dtype)
        return np.vstack([x, rng.choice([limits.min, limits.max, 0, 1], (2, n)).astype(x.dtype)])
    zeros = rng.choice([0.0, -0.0, 1.0, -1.0], n, p=[0.48, 0.48, 0.02, 0.02])
    some = nans(rng, n, dtype)
    places = rng.permutation(n)[: int(rng.integers(0, min(n, k) + 1))]
    some[places] = rng.choice([INF, -INF, 0.0, -0.0, 1.5], len(places))
    infinite = np.where(rng.random(n) < 0.4, rng.choice([INF, -INF], n), row)
    more = [zeros.astype(x.dtype), some, infinite.astype(x.dtype), nans(rng, n, dtype)]
    return np.vstack([x, *more])


def copies(rng, x, rows):
    """As many rows, each one of x."""
    return x[np.append(rng.permutation(len(x)), rng.integers(0, len(x), rows))[:rows]]


# ---- contiguous rows ----------------------------------------------------------------------------

# Around every border of the plan: a fragment, a list, a lane, a group of each size, a warp.
LENGTHS = (1, 2, 3, 5, 8, 9, 16, 17, 33, 60, 64, 65, 128, 129, 160, 256, 257, 384, 385, 512)
LENGTHS += (513, 1000, 1021, 1024)


@pytest.mark.parametrize("n", LENGTHS)
def test_length(rng, arch, n):
    """Few rows, spread over as many lanes as they can be, and many."""
    k = int(rng.integers(1, (min(n, 8) if n <= 384 else 4 if n <= 500 else 2) + 1))
    x = router_rows(rng, n, k)
    verify(arch, x, k, sign=int(rng.choice([-1, 1])))
    if n <= 384:
        verify(arch, copies(rng, x, 2051), k)


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("n", [8, 257])
def test_every_k(rng, arch, n, k):
    for sign in (1, -1):
        verify(arch, router_rows(rng, n, k), k, sign=sign)
    verify_softmax(arch, rng.standard_normal((2100 if n == 8 else 100, n), np.float32), k)


def with_shape(listed, group, beside, vec, fragments, threads=64):
    """Plans topk_lanes as it is given."""

    def kernel(problem):
        arguments = {
            "Op": problem.op,
            "kList": listed,
            "kGroup": group,
            "kStride": beside,
            "kVec": vec,
            "kFragments": fragments,
            "kThreads": threads,
        }
        grid = -(-problem.layout.rows // (threads // group))
        return Kernel("topk_lanes", arguments, grid, threads)

    return kernel


@pytest.mark.parametrize("listed", [1, 2, 4, 8])
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 32])
def test_every_group(rng, arch, group, listed):
    """More lanes than results, and fewer; rows of less than a tile, of one, and of several."""
    for n in (9, 16 * group - 1, 8 * group, 8 * group + 1, 41 * group + 3):
        x = router_rows(rng, n, listed)
        verify(arch, x, listed, kernel=with_shape(listed, group, 1, 4, 2))
        if n >= 8 * group:
            kernel = with_shape(listed, group, 1, 4, 2)
            verify_softmax(arch, draw(rng, (33, n)), max(1, listed - 1), kernel=kernel)


# What a lane's tile does to its list: nothing that beats it, ties, and all of it.
@pytest.mark.parametrize("kind", ["random", "ascending", "descending", "constant", "nan", "-inf"])
@pytest.mark.parametrize("softmax", [False, True])
def test_many_tiles(rng, arch, kind, softmax):
    n = 64 * 9 + 5
    x = draw(rng, (5, n))
    if kind in ("ascending", "descending"):
        x = np.sort(x)[:, :: 1 if kind == "ascending" else -1].copy()
    if kind in ("constant", "nan", "-inf"):
        x[...] = {"constant": 1.0, "nan": NAN, "-inf": -INF}[kind]
        x[1, 100], x[2, -3], x[3, [0, -1]] = 0.0, 3.0, -INF
    run = verify_softmax if softmax else verify
    run(arch, x, 7, kernel=with_shape(8, 8, 1, 4, 2))
    run(arch, np.asfortranarray(x), 7, kernel=with_shape(8, 4, 8, 1, 8))


# One more than a block has, one less, and a block whose last warps have none.
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 2047, 2048, 2049])
@pytest.mark.parametrize("n", [5, 64])
def test_rows(rng, arch, rows, n):
    verify(arch, draw(rng, (rows, n)), 3)
    verify_softmax(arch, rng.standard_normal((rows, n), np.float32), 2)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
@pytest.mark.parametrize("n", [9, 300])
def test_dtype(rng, arch, dtype, n):
    k = int(rng.integers(1, 9))
    x = router_rows(rng, n, k, dtype)
    verify(arch, x, k, sign=int(rng.choice([-1, 1])))
    verify(arch, np.asfortranarray(x), k)


@pytest.mark.parametrize("dtype", FLOATS)
def test_softmax_dtype(rng, arch, dtype):
    for n in (33, 256):
        for output in ("prob", "log_prob", "logit"):
            verify_softmax(arch, draw(rng, (40, n), dtype), 6, output=output)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int64"])
def test_misaligned(rng, arch, dtype):
    """Every place of a row within a fragment; around the rows lies what beats them all."""
    x = router_rows(rng, 59, 5, dtype)
    top = np.iinfo(x.dtype).max if x.dtype.kind in "iu" else INF
    vec = 16 // x.itemsize
    for before in range(vec):
        wide = np.full((len(x), before + 59 + 3), top, x.dtype)
        wide[:, before : before + 59] = x
        verify(arch, wide[:, before : before + 59], 5)
        if dtype == "float32":  # what is not in the row does not beat a NaN that is
            verify_softmax(arch, wide[:, before : before + 59], 5, output="logit")


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("output", ["prob", "log_prob", "logit"])
def test_output(rng, arch, output, renormalize):
    for n, k in ((8, 2), (64, 6), (257, 7)):
        verify_softmax(arch, draw(rng, (35, n)), k, output=output, renormalize=renormalize)
        x = np.asfortranarray(draw(rng, (35, n)))
        verify_softmax(arch, x, k, output=output, renormalize=renormalize)


@pytest.mark.parametrize("n", [33, 256])
def test_special_rows(rng, arch, n):
    x = np.stack([row for _, row in special_rows(rng, n)])
    for output in ("prob", "log_prob"):
        verify_softmax(arch, x, 6, output=output)
        verify_softmax(arch, np.asfortranarray(x), 6, output=output)


@pytest.mark.parametrize("scale", [0.125, -3.0, "rows"])
def test_scale(rng, arch, scale):
    x = draw(rng, (37, 100))
    scale = rng.normal(size=37).astype(np.float32) if scale == "rows" else scale
    verify_softmax(arch, x, 5, scale=scale)
    verify_softmax(arch, np.asfortranarray(x), 5, scale=scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("axis", [0, 1])
def test_where(rng, arch, dtype, axis):
    """Fewer than k take part in some rows; what the mask takes out may hold anything."""
    x = draw(rng, (70, 90), dtype)
    where = rng.random(x.shape) < 0.6
    rows, mask = (x, where) if axis else (x.T, where.T)
    mask[3], mask[4, 2:], mask[5, 1:-2] = False, False, False
    rows[~mask] = rng.choice([NAN, INF, 7], np.count_nonzero(~mask))
    for output, renormalize in (("prob", False), ("prob", True), ("log_prob", False)):
        options = {"output": output, "renormalize": renormalize}
        verify_softmax(arch, x, 6, axis=axis, where=where, **options)


# ---- the state, whose rows may be shorter than k ------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 7, 8, 9])
@pytest.mark.parametrize("axis", [0, 1])
def test_state(rng, arch, n, axis):
    x = router_rows(rng, n, min(n, 8))
    given = x if axis else np.ascontiguousarray(x.T)
    for k in (3, 8):
        got = topk(arch, given, k, axis=axis, softmax=True, output="state", index_offset=1000)
        inside = min(k, n)
        indices = best(x, inside)
        np.testing.assert_array_equal(got.indices[:, :inside], indices + 1000)
        values = np.take_along_axis(x, indices, -1)
        np.testing.assert_array_equal(got.values[:, :inside], values)  # but for the sign of zeros
        assert (got.indices[:, inside:] == -1).all()
        assert (got.values[:, inside:] == -INF).all()
        with np.errstate(all="ignore"):
            m, l = reference.softmax_state(x)  # noqa: E741
        np.testing.assert_array_equal(got.stat, np.where(np.isnan(l), NAN, m))
        np.testing.assert_allclose(got.stat_l, l, rtol=1e-5)


# ---- columns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 8, 17, 100, 1100])
@pytest.mark.parametrize("columns", [1, 3, 8, 31, 33, 70])
def test_first_axis(rng, arch, n, columns):
    k = int(rng.integers(1, min(n, 8) + 1))
    x = copies(rng, router_rows(rng, n, k), columns)
    verify(arch, np.ascontiguousarray(x.T), k, axis=0, strided=True)
    verify_softmax(arch, draw(rng, (n, columns)), k, axis=0, strided=True)


def test_many_columns(rng, arch):
    """As many rows beside each other as a warp has lanes."""
    x = draw(rng, (24, 32 * 1024 + 5))
    got = verify(arch, x, 4, axis=0)
    _, *sizes = got.kernel.arguments.values()
    assert sizes == [4, 1, 32, 1, 16, 128]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis(rng, arch, axis):
    x = draw(rng, (6, 37, 40))
    verify(arch, x, 5, axis=axis)
    verify_softmax(arch, x, 5, axis=axis)
    verify(arch, x[::-2, ::3, ::-1], 2, axis=axis)


def test_strides_of_a_row(rng, arch):
    """Every other column; a row that is broadcast; both directions."""
    x = draw(rng, (20, 130))
    for view in (x[:, ::2], x[:, ::-1], np.broadcast_to(x[3, ::2], (20, 65)), x[::-1, ::3]):
        verify(arch, view, 6)
        verify_softmax(arch, view, 6)


# ---- what it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k", [(8, 2), (64, 6), (128, 8), (256, 8), (160, 6), (1024, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_once(rng, arch, n, k, dtype):
    """Every byte once, in whole vectors and whole sectors; one exponential an element, and a few a
    lane."""
    x = (rng.permuted(np.tile(np.arange(n), (2112, 1)), axis=1) + 1).astype(dtype_of(dtype))
    for softmax in (False, True):
        got = topk(arch, x, k, softmax=softmax)
        counters = got.counters
        assert counters.global_bytes_read == x.nbytes
        assert counters.loads_by_size[16] * 512 >= x.nbytes
        assert counters.loads_by_size[x.itemsize] == 0
        assert counters.global_sectors_read * 32 == x.nbytes
        assert counters.shared_wavefronts == 0 and counters.barriers == 0
        assert got.kernel.arguments["kStride"] == 1
        lanes = got.kernel.arguments["kGroup"]
        results = 2112 * (k + 2 * lanes)
        assert counters.exps == 0 if not softmax else x.size <= counters.exps <= x.size + results


@pytest.mark.parametrize("n", [65, 257])
def test_misaligned_rows_move_as_vectors(rng, arch, n):
    x = rng.permuted(np.tile(np.arange(n, dtype=np.float32), (2112, 1)), axis=1) + 1
    counters = topk(arch, x, 2).counters
    assert counters.global_bytes_read == x.nbytes
    assert counters.loads_by_size[4] < 2 * counters.loads_by_size[16]  # the ends of each row


@pytest.mark.parametrize("columns", [32 * 1024, 256])
@pytest.mark.parametrize("softmax", [False, True])
def test_columns_are_coalesced(rng, arch, columns, softmax):
    x = draw(rng, (40, columns)) + np.float32(100)
    got = topk(arch, x, 4, axis=0, softmax=softmax)
    assert got.counters.global_bytes_read == x.nbytes
    assert got.counters.global_sectors_read * 32 == x.nbytes
    lanes = got.kernel.arguments["kGroup"]
    most = columns * (4 + lanes * (2 + 40 // (lanes * 8)))
    assert not softmax or x.size <= got.counters.exps <= x.size + most


# ---- the plan -----------------------------------------------------------------------------------


def problem_of(x, rows, cols, k, axis=-1, **options):
    strides = (cols, 1) if axis == -1 else (1, rows)
    row_stride = [(0,)] * len(row_layout.OPERANDS)
    col_stride = list(row_stride)
    row_stride[0], col_stride[0] = strides[:1], strides[1:]
    layout = row_layout.Layout((rows,), (cols,), tuple(row_stride), tuple(col_stride))
    return TopKProblem(x, layout, k, **options)


@pytest.mark.parametrize("x", [*FLOATS, *INTEGERS])
@pytest.mark.parametrize("softmax, masked", [(False, False), (True, False), (True, True)])
def test_plan(x, softmax, masked):
    """Groups hold their row, tiles are whole lists, no element has more registers than it may."""
    for rows in (1, 100, 10**6):
        for cols in LENGTHS:
            for k in {1, min(3, cols), min(8, cols)}:
                for aligned, strided in ((True, False), (False, False), (False, True)):
                    problem = problem_of(
                        x,
                        rows,
                        cols,
                        k,
                        axis=0 if strided else -1,
                        softmax=softmax,
                        masked=masked,
                        aligned=aligned and cols % 16 == 0,
                    )
                    kernel = plan_lanes(problem, strided)
                    if kernel is None:
                        most = 32 * (32 if problem.narrow else 16) // (2 if masked else 1)
                        longest = 1024 if k <= 2 else 512 if k <= 4 else 384
                        assert not strided and cols > min(most - problem.vec, longest)
                        continue
                    _, listed, group, beside, vec, fragments, threads = kernel.arguments.values()
                    assert listed in (1, 2, 4, 8) and k <= listed <= 2 * k
                    assert vec * fragments % listed == 0
                    assert vec * fragments <= (32 if problem.narrow else 16)
                    assert kernel.grid * (threads // group) >= rows
                    assert (kernel.grid - 1) * (threads // group) < rows
                    if strided:
                        assert (group * beside, vec) == (32, 1)
                    else:
                        assert beside == 1 and group * fragments >= problem.fragments


def test_no_plan():
    assert plan_lanes(problem_of("float32", 1000, 64, 9), False) is None
    for cols, k in ((1025, 2), (513, 3), (385, 5)):
        assert plan_lanes(problem_of("float32", 1000, cols, k, aligned=True), False) is None
    assert plan_lanes(problem_of("float32", 1000, 10**6, 8, axis=0), True) is not None
