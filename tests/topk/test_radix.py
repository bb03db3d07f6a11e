"""Selection by radix, kernel by kernel, as `plan_radix` plans it: any k, against a sort; and the
merge of sorted lists.

Everything here runs on the emulator. What users see of it is tested where they see it.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import emulator
import numpy as np
import pytest
from cases import LAYOUTS, draw, nans, ranking_rows

from cuattn import reference
from cuattn._arrays.results import SoftmaxState
from cuattn._arrays.row_layout import OPERANDS, Layout
from cuattn._device.params import (
    RADIX_GEOMETRY,
    RADIX_WORKSPACE,
    SOFTMAX_HEAD,
    TOPK,
    TOPK_STATE_MERGE,
)
from cuattn._softmax import plan_parts
from cuattn._topk import plan_radix
from cuattn._topk.problem import TopKProblem

pytestmark = pytest.mark.drawn

INF, NAN = np.inf, np.nan
OUTPUTS = {"prob": 0, "log_prob": 1, "logit": 2, "state": 3}  # enum TopKOutput
DTYPES = [
    *("float16", "bfloat16", "float32", "float64"),
    *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
]


@pytest.fixture(params=["sm_80", "sm_90"])
def arch(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh_plans():
    """Some tests change a limit of the plans."""
    yield
    plan_radix.plan_radix.cache_clear()


class Selected(NamedTuple):
    values: np.ndarray
    indices: np.ndarray
    counters: list  # of each launch
    kernels: list


def of_rows(array):
    """Strides of a matrix by rows and columns, in elements."""
    return tuple(stride // array.itemsize for stride in array.strides)


def select(
    x,
    k,
    arch="sm_90",
    *,
    largest=True,
    softmax=False,
    where=None,
    scale=1.0,
    output="prob",
    renormalize=False,
    index_offset=0,
    num_sms=4,
    with_state=True,
):
    """The k best of each row of a matrix: every launch of the plan, in order."""
    rows, cols = x.shape
    acc = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    values = emulator.empty((rows, k), acc if output == "state" and softmax else x.dtype)
    indices = emulator.empty((rows, k), np.int64)
    strides = {"x": of_rows(x), "out": (k, 1), "stat": (1, 0)}
    if where is not None:
        strides["where"] = of_rows(where)
    per_operand = [strides.get(name, (0, 0)) for name in OPERANDS]
    row_strides, col_strides = (tuple((s[d],) for s in per_operand) for d in range(2))
    layout = Layout((rows,), (cols,), row_strides, col_strides)
    problem = TopKProblem(x.dtype.name, layout, k, softmax, where is not None)
    plan = plan_radix.plan_radix(problem, num_sms)

    m = l = workspace = None  # noqa: E741
    if softmax and with_state:
        state = reference.softmax_state(scores(x, scale, where), axis=-1)
        m, l = (part.astype(acc) for part in state)  # noqa: E741
    if plan.workspace_bytes:
        workspace = emulator.empty(plan.workspace_bytes, np.uint8)

    def address(array):
        return 0 if array is None else emulator.address(array)

    given = {
        "x": address(x),
        "where": address(where),
        "out": address(values),
        "stat": address(m),
        "stat_l": address(l),
        "scale_value": scale if softmax else (1.0 if largest else -1.0),
    }
    params = SOFTMAX_HEAD.pack(**(dict.fromkeys(SOFTMAX_HEAD.codes, 0) | given))
    params += plan_parts.geometry(layout)
    params += TOPK.pack(
        indices=address(indices),
        lists=0,
        k=k,
        index_offset=index_offset,
        output=OUTPUTS[output],
        renormalize=renormalize,
    )
    params += RADIX_WORKSPACE.pack(workspace=address(workspace))

    runtime = emulator.Runtime(arch, num_sms, int(os.environ["CUATTN_TEST_SEED"]))
    reads, writes = (x, where, m, l, workspace), (values, indices, workspace)
    for launch in plan.launches:
        runtime.launch(launch.kernel, params + launch.geometry, reads, writes)
    return Selected(values, indices, runtime.counters, runtime.kernels)


def scores(x, scale=1.0, where=None):
    """What a softmax kernel orders by, in float64."""
    acc = np.float64 if x.dtype == np.float64 else np.float32
    with np.errstate(invalid="ignore"):  # signalling NaN
        t = x.astype(acc) * acc(scale)
    return (t if where is None else np.where(where, t, -INF)).astype(np.float64)


def check(x, k, arch="sm_90", *, largest=True, **options):
    """A plain selection: the reference's indices, and every bit of the elements there."""
    got = select(x, k, arch, largest=largest, **options)
    mode = "largest" if largest else "smallest"
    expected = reference.top_k(x, k, mode=mode)
    np.testing.assert_array_equal(got.indices, expected.indices)
    word = f"u{x.dtype.itemsize}"
    wanted = np.take_along_axis(np.ascontiguousarray(x), expected.indices, -1)
    np.testing.assert_array_equal(got.values.view(word), wanted.view(word))
    return got


def names(got):
    return [kernel.template for kernel in got.kernels]


# -- regimes of k and of the row -----------------------------------------------------------------

RADIX = ["topk_clear", "topk_histogram", "topk_filter", "topk_select"]


@pytest.mark.parametrize("k", [1, 2, 255, 256, 257, 1000, 2047, 2048, 2049, 5000, 5002, 5003])
def test_k(rng, arch, k):
    """On both sides of what a block sorts at once, and all of the row."""
    got = check(draw(rng, (3, 5003)), k, arch)
    sorting = ["topk_sort"]
    if k > 2048:
        sorting += ["topk_merge_runs"] * (1 if k <= 4096 else 2) + ["topk_store"]
    assert names(got) == RADIX + sorting


@pytest.mark.parametrize("n", [1, 2, 31, 33, 257, 511, 512, 513, 1000, 1024, 1025, 2047, 2048])
def test_short_rows(rng, arch, n):
    """Rows that one block sorts as they are."""
    for k in sorted({1, (n + 1) // 2, n - 1, n} - {0}):
        got = check(draw(rng, (5, n)), k, arch)
        assert names(got) == ["topk_sort"]


@pytest.mark.parametrize("n", [2049, 8192, 20001])
def test_lengths(rng, arch, n):
    check(draw(rng, (2, n)), 300, arch)


@pytest.mark.parametrize("k", [300, 3000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype(rng, arch, dtype, k):
    x = draw(rng, (2, 4099), dtype)
    if x.dtype.kind in "iu":  # one row of small numbers, one of any
        x[1] = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, 4099, dtype, endpoint=True)
    check(x, k, arch)
    check(x, k, arch, largest=False)


@pytest.mark.parametrize("k", [257, 1500, 4098])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int8"])
def test_ranking(rng, dtype, k):
    """Ascending, descending, constant, quantised, infinite and NaN rows, one below the other."""
    rows = dict(ranking_rows(rng, 4099, k, dtype))
    x = np.stack(list(rows.values()))
    check(x, k)
    check(x, k, largest=False)


@pytest.mark.parametrize("k", [2000, 20_000])
def test_constant(arch, k):
    """All are equal: the first k."""
    got = check(np.full((2, 30_011), 2.5, np.float32), k, arch)
    assert (got.indices == np.arange(k)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64"])
@pytest.mark.parametrize("k", [700, 3000])
def test_narrow_range(rng, arch, dtype, k):
    """All elements agree in their first 11 bits, and many in the first 22."""
    if dtype.startswith("float"):
        x = 1 + rng.random((3, 6007)) * [[0.2], [2.0**-12], [2.0**-22]]
    else:
        x = rng.integers(0, [[100_000], [2000], [2]], (3, 6007))
    check(x.astype(dtype), k, arch)
    check(-x.astype(dtype), k, arch)


def test_the_bin_is_taken_whole(rng, arch):
    """k ends where a bin of the first 11 bits does: nothing is left for topk_select."""
    x = np.r_[np.full(1000, 8.0), np.full(3000, 1.0)].astype(np.float32)
    got = check(rng.permutation(x)[None], 1000, arch)
    assert got.counters[3].global_bytes_written == 0
    check(rng.permutation(x)[None], 999, arch)
    check(rng.permutation(x)[None], 1001, arch)


# -- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "swapped"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8", "float64"])
def test_layout(rng, name, dtype):
    for n in (700, 3001):
        check(LAYOUTS[name](draw(rng, (4, n), dtype)), 300)


@pytest.mark.parametrize("shift", range(8))
def test_every_alignment(rng, shift):
    """One row cut into slices, begun at each element of a fragment."""
    x = draw(rng, (1, 16_384 + 8), "float16")[:, shift : shift + 16_379]
    got = check(x, 400, num_sms=2)
    assert got.kernels[1].grid > 1


@pytest.mark.parametrize(
    ("rows", "cols", "splits"), [(1, 100_003, 9), (2, 50_257, 5), (12, 9001, 1)]
)
def test_slices(rng, arch, rows, cols, splits):
    got = check(draw(rng, (rows, cols)), 1000, arch, num_sms=3)
    assert [kernel.grid for kernel in got.kernels[1:3]] == [rows * splits] * 2


@pytest.mark.parametrize("k", [300, 2500])
def test_groups_of_rows(rng, arch, monkeypatch, k):
    """The workspace holds a few rows at a time."""
    monkeypatch.setattr(plan_radix, "MAX_WORKSPACE", 300_000)
    got = check(draw(rng, (11, 3001)), k, arch)
    assert names(got).count("topk_clear") >= 2


def test_index_offset(rng):
    x = draw(rng, (2, 3001))
    offset = 10**12
    got = select(x, 300, index_offset=offset)
    np.testing.assert_array_equal(got.indices - offset, reference.top_k(x, 300).indices)


# -- softmax -------------------------------------------------------------------------------------


def check_softmax(x, k, arch="sm_90", **options):
    """Indices as in the reference, values as close as float arithmetic comes."""
    got = select(x, k, arch, softmax=True, **options)
    output = options.pop("output", "prob")
    t = scores(x, options.get("scale", 1.0), options.get("where"))
    expected = reference.softmax_topk(
        t,
        k,
        output=output,
        renormalize=options.get("renormalize", False),
        where=options.get("where"),
    )
    np.testing.assert_array_equal(got.indices, expected.indices)
    eps = 4 * float(np.finfo(np.float32).eps) if x.dtype != np.float64 else 1e-13
    if x.dtype.itemsize == 2:
        eps = 2.0**-8
    rtol, atol = (0 if output == "logit" else 40 * eps), (0 if output == "logit" else 1e-7)
    if output == "log_prob":
        atol = 1e-4 if x.dtype == np.float32 else eps * 100
    wanted = expected.values.astype(x.dtype).astype(np.float64)
    np.testing.assert_allclose(got.values.astype(np.float64), wanted, rtol=rtol, atol=atol)
    return got


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("output", ["prob", "log_prob", "logit"])
@pytest.mark.parametrize(("n", "k"), [(2047, 300), (5003, 300), (5003, 2500), (5003, 5000)])
def test_softmax(rng, arch, n, k, output, renormalize):
    x = draw(rng, (3, n))
    check_softmax(x, k, arch, output=output, renormalize=renormalize, scale=0.25)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("k", [300, 2500])
def test_softmax_dtype(rng, dtype, k):
    check_softmax(draw(rng, (2, 4001), dtype), k)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("k", [300, 2500])
def test_masked(rng, arch, dtype, k):
    """Elements that the mask takes out come last, by index, whatever they are."""
    x = draw(rng, (4, 4001), dtype)
    where = rng.random(x.shape) < [[0.9], [0.5], [0.05], [0.0]]
    x[~where] = NAN
    got = check_softmax(x, k, arch, where=where, output="logit")
    assert np.isneginf(got.values[3]).all()


@pytest.mark.parametrize("n", [500, 2047, 3001])
@pytest.mark.parametrize("extra", [0, 1, 700, 3000])
def test_state_beyond_the_row(rng, arch, n, extra):
    """A state may ask for more than there is: -inf and index -1."""
    x, k = draw(rng, (2, n)), n + extra
    got = select(x, k, arch, softmax=True, output="state")
    order = reference.top_k(x, n)
    np.testing.assert_array_equal(got.indices[:, :n], order.indices)
    np.testing.assert_array_equal(got.values[:, :n], order.values)
    assert (got.indices[:, n:] == -1).all() and np.isneginf(got.values[:, n:]).all()


def test_renormalized_without_a_state(rng):
    """The selected elements are enough for probabilities among themselves."""
    x = draw(rng, (2, 3001))
    got = select(x, 2500, softmax=True, renormalize=True, with_state=False)
    np.testing.assert_allclose(got.values.sum(-1, dtype=np.float64), 1, rtol=1e-5)


@pytest.mark.parametrize("k", [300, 2500])
def test_bitwise_the_same_in_any_schedule(rng, monkeypatch, k):
    """The order in which candidates arrive in a list changes nothing."""
    x = draw(rng, (1, 30_001))
    results = []
    for seed in range(4):
        monkeypatch.setenv("CUATTN_TEST_SEED", str(seed))
        got = select(x, k, softmax=True, renormalize=True)
        results.append((got.values.tobytes(), got.indices.tobytes()))
    assert len(set(results)) == 1


@pytest.mark.parametrize("dtype", ["float32", "int8", "int16", "uint16"])
def test_wide_candidates_of_narrow_values(rng, monkeypatch, dtype):
    """As in rows of 2^32 columns: 32-bit keys, 64-bit indices."""
    monkeypatch.setattr(TopKProblem, "narrow", False)
    x = draw(rng, (2, 4099), dtype)
    for k in (300, 2100):
        got = check(x, k)
        assert got.kernels[1].arguments["Op"].arguments["Candidate_"] == "WideCandidate"
        check(x, k, largest=False)


@pytest.mark.parametrize("k", [257, 2100])
def test_special_values(rng, k):
    x = draw(rng, (4, 4099))
    x[0, rng.permutation(4099)[:3]] = INF
    x[1, rng.permutation(4099)[:2000]] = -INF
    x[2, rng.permutation(4099)[:3000]] = nans(rng, 3000)
    x[3] = -INF
    check_softmax(x, k, output="logit")


# -- costs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "rows", "cols", "most"),
    [
        ("float32", 1, 131_072, 2.2),
        ("float32", 4, 50_257, 2.25),
        ("float16", 1, 131_072, 2.45),
        ("float16", 4, 50_257, 2.5),
        ("float64", 1, 131_072, 2.3),
    ],
)
def test_reads(rng, dtype, rows, cols, most):
    """x twice, in whole vectors; beyond that the histogram in every slice and what is left of the
    rows: about twice the 1000 candidates, read three times."""
    x = draw(rng, (rows, cols), dtype, spread=1)
    got = check(x, 1000, num_sms=8)
    histogram, filter_ = got.counters[1:3]
    assert histogram.global_bytes_read == x.nbytes
    count = 8 if dtype == "float64" else 4
    assert filter_.global_bytes_read == x.nbytes + got.kernels[2].grid * (64 + 32) * count
    assert sum(counters.global_bytes_read for counters in got.counters) <= most * x.nbytes
    for counters in (histogram, filter_):
        assert counters.loads_by_size[16] * 512 >= 0.9 * x.nbytes
        assert counters.shared_wavefronts <= 1.01 * counters.shared_wavefronts_ideal


def test_sorted_rows_are_read_once(rng):
    x = draw(rng, (7, 2048))
    got = check(x, 500)
    assert sum(counters.global_bytes_read for counters in got.counters) == x.nbytes
    assert got.counters[0].global_bytes_written == 7 * 500 * 12


# -- plans ---------------------------------------------------------------------------------------


def layout_of(rows, cols):
    per_operand = {"x": (cols, 1), "out": (1, 1)}
    row_strides, col_strides = (
        tuple((per_operand.get(name, (0, 0))[d],) for name in OPERANDS) for d in range(2)
    )
    return Layout((rows,), (cols,), row_strides, col_strides)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 100, 5000])
@pytest.mark.parametrize("cols", [2049, 50_257, 10**6, 10**8, 2**33])
def test_slices_cover_the_row(dtype, rows, cols):
    problem = TopKProblem(dtype, layout_of(rows, cols), 1000)
    plan = plan_radix.plan_radix(problem, 132)
    geometries = [RADIX_GEOMETRY.unpack(launch.geometry) for launch in plan.launches]
    first_rows = sorted({geometry["first_row"] for geometry in geometries})
    assert first_rows == list(range(0, rows, plan.group_rows))
    for launch, geometry in zip(plan.launches, geometries, strict=True):
        first_row, splits, slice_ = (geometry[name] for name in ("first_row", "splits", "slice"))
        assert 1 <= launch.kernel.grid < 2**31 and geometry["wanted"] == 1000
        if launch.kernel.header in ("topk/histogram.cuh", "topk/filter.cuh"):
            assert launch.kernel.grid == splits * min(plan.group_rows, rows - first_row)
            # Wherever the row begins in its first fragment, and no slice beyond it.
            assert (splits - 1) * slice_ < problem.fragments * problem.vec <= splits * slice_
            assert slice_ < 2**32 and splits <= 1024
    per_row = cols * problem.candidate_bytes
    assert plan.workspace_bytes <= max(512 << 20, 1.1 * per_row + 100_000)


def test_one_long_row_fills_the_chip():
    problem = TopKProblem("float32", layout_of(1, 10**8), 1000)
    kernels = [launch.kernel for launch in plan_radix.plan_radix(problem, 132).launches]
    assert all(400 <= kernel.grid <= 528 for kernel in kernels[1:3])


# -- merging lists -------------------------------------------------------------------------------


def merge(a, b, arch="sm_90"):
    """(values, indices, m, l) of two of the same, merged by the planned kernel."""
    results = tuple(emulator.empty(array.shape, array.dtype) for array in a)
    rows, k = a[0].shape
    dtype = a[0].dtype.name
    kernel = plan_radix.plan_topk_state_merge(dtype, dtype, rows, k)
    names = [name + of for of in ("_a", "_b", "") for name in ("values", "indices", "m", "l")]
    addresses = map(emulator.address, (*a, *b, *results))
    pointers = dict(zip(names, addresses, strict=True))
    pointers |= dict.fromkeys(("logits_a", "logits_b", "logits"), 0)
    params = TOPK_STATE_MERGE.pack(**pointers, rows=rows, k=k)
    emulator.Runtime(arch).launch(kernel, params, (*a, *b), results)
    return results


def sorted_list(values, indices, m, l):  # noqa: E741
    """Rows in the order that merge expects: numbers, NaN, missing entries; then by index."""
    numbers = np.where(np.isnan(values), 0, values)
    order = np.lexsort((indices, -numbers, np.isnan(values), indices < 0))
    return (
        np.take_along_axis(values, order, -1),
        np.take_along_axis(indices, order, -1),
        np.asarray(m),
        np.asarray(l),
    )


def merged(a, b, k):
    """What `merge` has to make of two lists."""
    both = [np.concatenate(pair, -1) for pair in zip(a[:2], b[:2], strict=True)]
    values, indices, *_ = sorted_list(*both, 0, 0)
    state = reference.merge(
        SoftmaxState(*(s.astype(np.float64) for s in a[2:])),
        SoftmaxState(*(s.astype(np.float64) for s in b[2:])),
    )
    return values[:, :k], indices[:, :k], state.m, state.l


def drawn_list(rng, rows, k, dtype, kind, first):
    values = draw(rng, (rows, k), dtype)
    if kind == "quantised":
        values = rng.integers(-2, 3, (rows, k)).astype(dtype)
    elif kind == "special":
        pick = rng.random((rows, k))
        values = np.where(pick < 0.3, nans(rng, (rows, k), dtype), values)
        values = np.where(pick > 0.8, rng.choice([INF, -INF], (rows, k)).astype(dtype), values)
    indices = first + np.stack([rng.permutation(3 * k)[:k] for _ in range(rows)]).astype(np.int64)
    if kind != "random":
        missing = rng.random((rows, k)) < (0.6 if kind == "special" else 0.3)
        values[missing], indices[missing] = -INF, -1
    m, l = rng.normal(size=rows).astype(dtype), (1 + rng.random(rows)).astype(dtype)  # noqa: E741
    return sorted_list(values, indices, m, l)


@pytest.mark.parametrize("kind", ["random", "quantised", "special"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (3, 5), (7, 100), (2, 257), (1, 3000)])
def test_merge(rng, arch, rows, k, dtype, kind):
    first = int(rng.choice([0, 2**40]))
    a = drawn_list(rng, rows, k, dtype, kind, first)
    b = drawn_list(rng, rows, k, dtype, kind, 0)
    got, expected = merge(a, b, arch), merged(a, b, k)
    np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[2], expected[2].astype(dtype))
    np.testing.assert_allclose(got[3], expected[3], rtol=8 * np.finfo(dtype).eps)


def test_merge_keeps_bits(rng, arch):
    """Of equal entries a's comes first, as it is: -0 and a NaN with a payload, too."""
    zeros = np.array([[0.0, -0.0, -0.0, 0.0]], np.float32)
    payload = nans(rng, (2, 4))
    indices = np.arange(4)[None]
    one = np.ones(1, np.float32)
    for of_a, of_b in ((zeros, zeros[:, ::-1].copy()), (payload[:1], payload[1:])):
        got = merge((of_a, indices, one, one), (of_b, indices, one, one), arch)
        interleaved = np.stack([of_a[0], of_b[0]], 1).ravel()[:4]
        np.testing.assert_array_equal(got[0][0].view(np.uint32), interleaved.view(np.uint32))
        np.testing.assert_array_equal(got[1], [[0, 0, 1, 1]])


def test_merge_of_states(arch):
    """NaN in one state shows in m and l; empty states change nothing."""
    m = np.array([0, -INF, -INF, INF, 1, 2], np.float32)
    l = np.array([NAN, 0, 0, INF, 1, 3], np.float32)  # noqa: E741
    m_b = np.array([1, 2, -INF, 5, NAN, -INF], np.float32)
    l_b = np.array([1, 4, 0, 1, NAN, 0], np.float32)
    lists = [
        (np.zeros((6, 1), np.float32), np.full((6, 1), i), *s)
        for i, s in enumerate(((m, l), (m_b, l_b)))
    ]
    got = merge(*lists, arch)
    np.testing.assert_array_equal(got[2], [NAN, 2, -INF, INF, NAN, 2])
    np.testing.assert_array_equal(got[3], [NAN, 4, 0, INF, NAN, 3])


def test_merge_of_lists_without_order(rng):
    """Results without meaning, but all are written and nothing outside is read."""
    a, b = (
        (
            np.where(rng.random((5, 300)) < 0.2, NAN, rng.normal(size=(5, 300))),
            rng.integers(-(2**63), 2**63 - 1, (5, 300)),
            np.zeros(5),
            np.ones(5),
        )
        for _ in range(2)
    )
    values, indices, *_ = merge(a, b)
    for row in range(5):
        assert set(indices[row]) <= {*a[1][row], *b[1][row]}
        assert set(values[row].view(np.uint64)) <= {
            *a[0][row].view(np.uint64),
            *b[0][row].view(np.uint64),
        }
