"""The paper's algorithms in bench/baselines against float64, and the sources that they are."""

from __future__ import annotations

import os

import numpy as np
import pytest
import test_layout as layout
from conftest import GPU, SEED
from tolerance import EXPONENT_ROUNDINGS, TABLE, assert_close, naive_softmax

import cuattn
from bench import baselines, inside

INF, NAN = np.inf, np.nan
SOFTMAX = {
    name: getattr(baselines, name) for name in ("naive_softmax", "safe_softmax", "online_softmax")
}
TOPK = {name: getattr(baselines, name) for name in ("safe_softmax_topk", "online_softmax_topk")}
# One column; less than a warp; one column a thread; one more; a tail; many columns a thread.
COLUMNS = [1, 31, 256, 257, 1000, 4099]

on_kernels = pytest.mark.parametrize(
    "backend",
    ["emulator-sm_80", "emulator-sm_90a", GPU],
    indirect=True,
)
every_softmax = pytest.mark.parametrize("name", SOFTMAX)
every_topk = pytest.mark.parametrize("name", TOPK)


@pytest.fixture
def run(backend):
    """Calls a baseline with arrays on the backend; what it returns are NumPy arrays."""

    def call(function, x, *k):
        with baselines.emulated(backend.arch, int(os.environ[SEED])):
            result = function(backend.asarray(np.asarray(x, np.float32)), *k)
        if isinstance(result, tuple):
            return baselines.TopK(*map(backend.asnumpy, result))
        return backend.asnumpy(result)

    return call


def softmax_is_right(name, y, x):
    assert y.dtype == np.float32
    expected = cuattn.reference.softmax(x)
    if name != "naive_softmax":
        assert_close(y, expected, naive_softmax(x), probabilities=True)
        return
    exponent = np.max(abs(x), where=np.isfinite(x), initial=0)  # not the difference of two
    relative = 2 * EXPONENT_ROUNDINGS * TABLE["float32"].relative * (1 + exponent)
    np.testing.assert_allclose(y, expected, rtol=relative, atol=TABLE["float32"].absolute)


def largest(y, k):
    """Columns of the k largest elements of each row, equal ones in their order."""
    return np.argsort(-y, axis=-1, kind="stable")[:, :k]


# -- results ---------------------------------------------------------------------------------------


@on_kernels
@every_softmax
@pytest.mark.parametrize("cols", COLUMNS)
def test_softmax(run, rng, name, cols):
    x = rng.standard_normal((3, cols), np.float32) * 4
    softmax_is_right(name, run(SOFTMAX[name], x), x)


@on_kernels
@every_softmax
def test_many_short_rows(run, rng, name):
    x = rng.standard_normal((70, 3), np.float32)
    softmax_is_right(name, run(SOFTMAX[name], x), x)


@on_kernels
@every_topk
@pytest.mark.parametrize(
    ("cols", "k"), [(cols, k) for cols in COLUMNS for k in (1, 5) if k <= cols] + [(5, 5)]
)
def test_topk(run, rng, name, cols, k):
    x = rng.standard_normal((3, cols), np.float32) * 4
    values, indices = run(TOPK[name], x, k)
    # Unequal logits may have equal probabilities, which is what the unfused top-k goes by.
    ranked = run(baselines.safe_softmax, x) if name == "safe_softmax_topk" else x
    assert indices.dtype == np.int32
    np.testing.assert_array_equal(indices, largest(ranked, k))
    expected = cuattn.reference.softmax(x)
    chosen = [np.take_along_axis(p, indices, -1) for p in (expected, naive_softmax(x))]
    assert_close(values, *chosen, probabilities=True)


ROWS = {
    "constant": lambda rng, cols: np.full(cols, 2.5),
    "ties": lambda rng, cols: rng.integers(0, 3, cols),
    "both zeros": lambda rng, cols: rng.choice([-0.0, 0.0], cols),
    "rising": lambda rng, cols: np.arange(cols) * 0.01,
    "falling": lambda rng, cols: np.arange(cols) * -0.01,
    "one thread": lambda rng, cols: np.where(np.arange(cols) % 256 == 77, np.arange(cols) % 11, -9),
    "one warp": lambda rng, cols: np.where(np.arange(cols) // 32 % 8 == 5, 1, 0),
}


@on_kernels
@every_topk
@pytest.mark.parametrize("row", ROWS)
def test_order_of_equal_elements(run, rng, name, row):
    x = ROWS[row](rng, 3001).astype(np.float32)[None]
    _, indices = run(TOPK[name], x, 5)
    np.testing.assert_array_equal(indices, largest(x, 5))


@on_kernels
@every_softmax
def test_minus_infinity(run, rng, name):
    x = rng.standard_normal((4, 1000), np.float32)
    x[0, :600] = -INF  # the first columns of every thread, and all columns of some
    x[1, 300:] = -INF
    x[2, rng.random(1000) < 0.9] = -INF
    x[3] = -INF  # 0 / 0
    softmax_is_right(name, run(SOFTMAX[name], x), x)


@on_kernels
@every_topk
def test_fewer_numbers_than_k(run, name):
    x = np.full((2, 1000), -INF, np.float32)
    x[0, [500, 900, 100]] = 1, 2, 3
    values, indices = run(TOPK[name], x, 5)
    np.testing.assert_array_equal(indices[0], [100, 900, 500, 0, 1])
    np.testing.assert_allclose(values[0], cuattn.reference.softmax(x)[0, indices[0]], rtol=1e-6)
    assert np.isnan(values[1]).all()


@on_kernels
@every_softmax
@pytest.mark.parametrize("bad", [INF, NAN])
def test_bad_elements_show(run, rng, name, bad):
    x = rng.standard_normal((1, 700), np.float32)
    x[0, 300] = bad
    y = run(SOFTMAX[name], x)
    assert np.isnan(y[0, 300])
    if np.isnan(bad) or name == "safe_softmax":
        assert np.isnan(y).all()


@on_kernels
@every_topk
def test_nan_is_never_chosen(run, rng, name):
    x = rng.standard_normal((2, 700), np.float32)
    x[0, 300] = NAN
    x[1] = NAN
    values, indices = run(TOPK[name], x, 5)
    expected = [-1] * 5 if name == "safe_softmax_topk" else largest(x[:1], 5)[0]
    np.testing.assert_array_equal(indices, [expected, [-1] * 5])
    assert not np.isfinite(values).any()


@on_kernels
@pytest.mark.parametrize("largest_logit", [89, 100, 1000])
def test_only_the_naive_one_overflows(run, rng, largest_logit):
    x = rng.standard_normal((1, 600), np.float32)
    x[0, 300] = largest_logit
    assert not np.isfinite(run(baselines.naive_softmax, x)).all()
    for name in ("safe_softmax", "online_softmax"):
        softmax_is_right(name, run(SOFTMAX[name], x), x)
    for function in TOPK.values():
        values, indices = run(function, x, 1)
        assert (values[0, 0], indices[0, 0]) == (1, 300)


@on_kernels
def test_the_naive_one_works_up_to_there(run):
    x = np.array([[0, 88], [-87, -86]], np.float32)
    softmax_is_right("naive_softmax", run(baselines.naive_softmax, x), x)


@on_kernels
def test_only_the_naive_one_loses_small_rows(run, rng):
    x = rng.standard_normal((2, 600), np.float32) - 150
    assert not np.isfinite(run(baselines.naive_softmax, x)).any()
    for name in ("safe_softmax", "online_softmax"):
        softmax_is_right(name, run(SOFTMAX[name], x), x)
    for function in TOPK.values():
        values, indices = run(function, x, 1)
        expected = np.take_along_axis(cuattn.reference.softmax(x), indices, -1)
        np.testing.assert_allclose(values, expected, rtol=1e-5)


@on_kernels
@every_softmax
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(run, name, shape):
    assert run(SOFTMAX[name], np.zeros(shape)).shape == shape


@on_kernels
@every_topk
def test_no_rows(run, name):
    values, indices = run(TOPK[name], np.zeros((0, 7)), 5)
    assert values.shape == indices.shape == (0, 5)


# -- errors ----------------------------------------------------------------------------------------


@every_topk
@pytest.mark.parametrize(
    ("cols", "k", "error"),
    [
        (4, 5, ValueError),
        (0, 1, ValueError),
        (9, 0, ValueError),
        (9, -1, ValueError),
        (99, baselines.MAX_K + 1, ValueError),
        (9, 2.0, TypeError),
    ],
)
def test_bad_k(name, cols, k, error):
    with pytest.raises(error):
        TOPK[name](np.zeros((2, cols), np.float32), k)


@pytest.mark.parametrize("function", [*SOFTMAX.values(), *TOPK.values()])
@pytest.mark.parametrize(
    ("x", "error"),
    [
        ([[1.0, 2.0]], TypeError),
        (np.zeros((2, 3)), TypeError),
        (np.zeros((2, 3), np.float16), TypeError),
        (np.zeros(3, np.float32), ValueError),
        (np.zeros((1, 2, 3), np.float32), ValueError),
        (np.zeros((3, 2), np.float32).T, ValueError),
        (np.zeros((2, 6), np.float32)[:, ::2], ValueError),
    ],
)
def test_bad_x(function, x, error):
    with pytest.raises(error, match="x must be"):
        function(x, *[1] * (function in TOPK.values()))


# -- the sources -----------------------------------------------------------------------------------

KERNELS = [
    ("naive_softmax", "naive_softmax"),
    ("safe_softmax", "safe_softmax"),
    ("online_softmax", "online_softmax"),
    *(
        (file, f"{file}<{k}>")
        for file in ("topk", "online_softmax_topk")
        for k in (1, baselines.MAX_K)
    ),
]


@pytest.mark.drawn
@pytest.mark.parametrize("arch", inside.TARGETS)
def test_compiles_without_a_spill(arch):
    pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")
    from cupy.cuda import nvrtc
    from test_compile import complaints

    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"no NVRTC: {error}")
    options = (f"-I{baselines.INCLUDE}", "--ptxas-options=-v")
    for file, name in KERNELS:
        cubin, log = inside.compile_kernel(f"baselines/{file}.cuh", name, arch, options=options)
        assert file in inside.kernel_symbol(cubin)
        assert log.count("Used ") == 1
        assert complaints(log) == []


@pytest.mark.parametrize(
    "rule",
    [
        layout.asm_outside_ptx,
        layout.shared_outside_smem,
        layout.quoted_include,
        layout.include_cycle,
        layout.conditional_code,
        layout.kernel_per_file,
        layout.pragma_once,
        layout.cuda_budget,
    ],
)
def test_sources_keep_the_rules_of_cuda_src(rule):
    files = layout.read("bench/baselines", "*.cuh")
    assert {layout.layer(path) for path in files} == {"kernel", "primitives"}
    assert rule(files) == []
