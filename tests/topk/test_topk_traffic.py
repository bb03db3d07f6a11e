"""Global traffic, exponentials, bank conflicts and instruction cost of selections, as the emulator
counts them."""

from __future__ import annotations

import os

import emulator
import numpy as np
import pytest

import cuattn

pytestmark = pytest.mark.drawn

KS = [1, 5, 32, 50, 64, 256]

# Regime, architecture, multiprocessors, rows, columns, kernels; every k <= 256 has the same.
REGIMES = [
    ("a warp a row", "sm_80", 1, 17, 5001, ["topk_rows"]),
    ("a block a row", "sm_80", 4, 5, 50_257, ["topk_rows"]),
    ("a cluster a row", "sm_90", 132, 2, 151_936, ["topk_rows"]),
    ("a row over the chip", "sm_80", 132, 1, 201_088, ["topk_rows", "topk_merge"]),
    ("a row over the chip, beyond clusters", "sm_90", 132, 1, 600_001, ["topk_rows", "topk_merge"]),
]
regimes = pytest.mark.parametrize(
    ("arch", "num_sms", "rows", "cols", "expected"),
    [regime[1:] for regime in REGIMES],
    ids=[regime[0].replace(" ", "-") for regime in REGIMES],
)


def count(arch, call, num_sms=132, profile=False):
    """What `call` costs, what it returns, and the kernels that it launched."""
    seed = int(os.environ["CUATTN_TEST_SEED"])
    with emulator.activate(arch, num_sms, seed=seed, profile=profile) as runtime:
        result = call()
        return runtime.total(), result, [k.template for k in runtime.kernels]


def check_reads(total, x, results, lists=0):
    """One read of x, and of what passes between two launches; k results a row are written."""
    assert total.global_bytes_read == pytest.approx(x.nbytes + lists, rel=0.002, abs=4096)
    assert total.global_bytes_written == pytest.approx(results + lists, rel=0.01)
    assert total.shared_wavefronts == total.shared_wavefronts_ideal


@regimes
@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("name", ["top_k", "softmax_topk"])
def test_one_read(rng, name, k, arch, num_sms, rows, cols, expected):
    x = rng.standard_normal((rows, cols), np.float32)
    total, found, kernels = count(arch, lambda: getattr(cuattn, name)(x, k), num_sms)
    truth = cuattn.reference.top_k(x, k)
    assert found.indices.tobytes() == truth.indices.tobytes()
    assert kernels == expected
    lists = 0
    if len(kernels) > 1:  # lists and states of the slices, once written and once read
        lists = total.global_bytes_written - rows * k * 12
        assert 0 < lists <= 0.1 * x.nbytes
    check_reads(total, x, rows * k * 12, lists)
    if name == "softmax_topk":
        values = cuattn.reference.softmax_topk(x.astype(np.float64), k).values
        np.testing.assert_allclose(found.values, values, rtol=1e-5)
        # One exponential an element; one a tile of 16 and thread to rescale, and some to merge.
        assert x.size <= total.exps <= 1.11 * x.size + 5000 * rows
    else:
        assert total.exps == 0


@regimes
@pytest.mark.parametrize("k", [12, 50])
def test_ties(rng, k, arch, num_sms, rows, cols, expected):
    """Tiles are not visited in order: of equal elements a later one may have the lower index."""
    x = (rng.random((rows, cols)) < 0.0015 * k).astype(np.float32)  # some of k in each tile
    x[-1] = 1
    _, found, kernels = count(arch, lambda: cuattn.top_k(x, k), num_sms)
    assert kernels == expected
    assert found.indices.tobytes() == cuattn.reference.top_k(x, k).indices.tobytes()


@pytest.mark.parametrize("name", ["top_k", "softmax_topk"])
@pytest.mark.parametrize(("cols", "k"), [(8, 2), (64, 6), (128, 8), (256, 8)])
def test_routers_read_once(rng, name, cols, k):
    x = rng.standard_normal((3000, cols), np.float32)
    total, _, kernels = count("sm_90", lambda: getattr(cuattn, name)(x, k))
    assert kernels == ["topk_lanes"]
    check_reads(total, x, 3000 * k * 12)
    if name == "softmax_topk":  # and k to divide, and one for each lane that is merged
        assert x.size <= total.exps <= 1.1 * x.size + 3000 * (k + 32)


@pytest.mark.parametrize(("shape", "k"), [((300, 512), 5), ((40, 3000), 8)])
def test_columns_read_once_and_whole_sectors(rng, shape, k):
    x = rng.standard_normal(shape, np.float32)
    total, _, _ = count("sm_90", lambda: cuattn.softmax_topk(x, k, axis=0))
    assert total.global_bytes_read == pytest.approx(x.nbytes, rel=0.001)
    assert total.global_sectors_read * 32 <= 1.2 * x.nbytes


@pytest.mark.parametrize(("rows", "cols", "k"), [(1, 131_072, 1000), (4, 50_257, 1000)])
def test_radix_reads_twice(rng, rows, cols, k):
    x = rng.standard_normal((rows, cols), np.float32)
    total, found, kernels = count("sm_90", lambda: cuattn.top_k(x, k))
    assert found.indices.tobytes() == cuattn.reference.top_k(x, k).indices.tobytes()
    assert kernels.count("topk_histogram") == kernels.count("topk_filter") == 1
    assert 2 * x.nbytes <= total.global_bytes_read <= 2.25 * x.nbytes
    total, _, _ = count("sm_90", lambda: cuattn.softmax_topk(x, k))
    assert 3 * x.nbytes <= total.global_bytes_read <= 3.25 * x.nbytes


def patterns(rng, rows, cols):
    """Rows in the orders that selections fear."""
    x = rng.standard_normal((rows, cols), np.float32)
    ascending = np.sort(x)
    return {
        "random": x,
        "ascending": ascending,
        "descending": ascending[:, ::-1].copy(),
        "constant": np.ones_like(x),
        "quantised": np.round(2 * x),
    }


@regimes
@pytest.mark.parametrize("k", [1, 5, 50, 256])
def test_no_order_costs_much_more_than_a_random_one(rng, k, arch, num_sms, rows, cols, expected):
    cost = {
        name: count(arch, lambda x=x: cuattn.softmax_topk(x, k), num_sms, profile=True)[0].cost
        for name, x in patterns(rng, rows, cols).items()
    }
    constant = cost.pop("constant")  # every tie goes to the queue once
    assert 0 < constant <= 3 * cost["random"]
    assert max(cost.values()) <= 1.5 * cost["random"]


def test_constant_short_rows_are_the_worst_case(rng):
    """One tile a warp, all of it queued, and every batch better than the one before."""
    cost = {
        name: count("sm_80", lambda x=x: cuattn.softmax_topk(x, 5), 4, profile=True)[0].cost
        for name, x in patterns(rng, 8, 4096).items()
    }
    assert max(cost, key=cost.get) == "constant"
    assert max(cost.values()) <= 4 * cost["random"]
    assert cost["ascending"] <= 1.5 * cost["random"]
