"""Draws on every way through a row: exactly those of the reference, how often they read it, and
that no bit depends on the way."""

from __future__ import annotations

import numpy as np
import pytest
from sample_cases import clear_rows, is_clear, verify
from test_topk_traffic import count, patterns, regimes
from tolerance import dtype_of, exact

import cuattn
from cuattn import reference

pytestmark = pytest.mark.drawn

ARCHS = [("sm_80", 1), ("sm_80", 4), ("sm_80", 132), ("sm_90", 132)]
FILTERS = {
    "none": {},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 200, "top_p": 0.9, "min_p": 0.01},
}


def drawn(arch, x, num, num_sms=132, profile=False, **options):
    """What a call costs, its draws with log-probabilities, and the kernels it launched."""
    return count(arch, lambda: cuattn.sample(x, num, **options), num_sms, profile)


def states(total, rows, num):
    """Bytes of states and lists that blocks leave each other."""
    return max(0, total.global_bytes_written - rows * num * 8)


def reads(total, x, between):
    """How often x was read, in sectors: the lanes of a warp share what they know of their row, and
    every block of a second launch looks whether its row is finished."""
    return (32 * total.global_sectors_read - between) / x.nbytes - 0.03


@regimes
@pytest.mark.parametrize("filters", FILTERS)
def test_one_read(rng, filters, arch, num_sms, rows, cols, expected):
    num = int(rng.choice([1, 5, 40, 200]))
    options = {"seed": int(rng.integers(2**63)), **FILTERS[filters]}
    x = clear_rows(rng, (rows, cols), spread=8, **FILTERS[filters])  # few elements are nearly all
    total, found, kernels = drawn(arch, x, num, num_sms, **options)
    assert found.tobytes() == reference.sample(x, num, **options).tobytes()
    again = ["topk_cut", *expected] if filters in ("top_p", "min_p") else []  # to no purpose
    assert kernels == [*expected, *again]
    between = states(total, rows, num)
    assert between <= 0.25 * x.nbytes
    assert x.nbytes <= total.global_bytes_read
    assert reads(total, x, between) <= 1.005 + 1024 * rows / x.nbytes
    assert total.shared_wavefronts == total.shared_wavefronts_ideal
    # One exponential an element; one for each tile of a thread, and some to merge.
    assert x.size <= total.exps <= (1.2 if filters == "none" else 1.11) * x.size + 5000 * rows


def two_kinds(rng, cols, **filters):
    """Rows of which a few elements are nearly all, and two that are flat."""
    x = clear_rows(rng, (8, cols), spread=8, **filters)
    for row in (2, 5):
        x[row] = rng.random(cols)
        while not is_clear(x[row], **filters):
            x[row] = rng.random(cols)
    return x


@pytest.mark.parametrize(("filters", "walks"), [({"top_p": 0.7}, 5), ({"min_p": 0.2}, 0)])
@pytest.mark.parametrize("arch, num_sms", ARCHS[1:3])
def test_only_rows_that_need_it_are_read_again(rng, arch, num_sms, filters, walks):
    """Once to draw; before, up to three times for the bits of a score of top_p, and twice for those
    of an index. min_p needs no search."""
    x, options = two_kinds(rng, 8003, **filters), {"seed": 5, **filters}
    total, found, kernels = drawn(arch, x, 3, num_sms, **options)
    assert found.tobytes() == reference.sample(x, 3, **options).tobytes()
    assert kernels.count("topk_cut") == 1
    found = reads(total, x, states(total, 8, 3))
    assert 0.97 + (1 + walks / 2) * 2 / 8 <= found <= 1.15 + (1 + walks) * 2.1 / 8


@pytest.mark.parametrize(
    ("num", "options", "most"),
    [
        (1, {"top_k": 300}, 7),  # state, up to 5 for the cut, and draws
        (5, {"top_k": 3000, "top_p": 0.9, "min_p": 0.01}, 12),
        (300, {}, 7),  # state, histogram, filter, and candidates of four times the size
        (300, {"top_k": 200}, 1),
    ],
)
def test_reads_of_many(rng, num, options, most):
    x = clear_rows(rng, (3, 20_011), **options)
    total, found, _ = drawn("sm_90", x, num, seed=8, **options)
    assert found.tobytes() == reference.sample(x, num, seed=8, **options).tobytes()
    assert reads(total, x, 0) <= most


@pytest.mark.parametrize(
    "filters", [*FILTERS.values(), {"top_k": 400}, {"top_k": 400, "top_p": 0.5}], ids=str
)
def test_no_bit_depends_on_the_device(rng, filters):
    num = int(rng.choice([3, 300]))
    x = two_kinds(rng, 20_001, **filters)
    options = {"seed": 11, "return_log_prob": True, **filters}
    results = [drawn(arch, x, num, num_sms, **options)[1] for arch, num_sms in ARCHS]
    np.testing.assert_array_equal(results[0].indices, reference.sample(x, num, **options).indices)
    for part in range(2):
        assert len({found[part].tobytes() for found in results}) == 1


@pytest.mark.parametrize("arch, num_sms", [ARCHS[0], ARCHS[3]])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("most", [0, 2.0**25, 2.0**40])
def test_noise_that_is_not_drawn_would_not_be_selected(rng, dtype, most, arch, num_sms):
    """Constant rows, and others that noise decides, of huge scores: where a word that was passed
    over for the noise of the k-th would be seen."""
    x = np.full((3, 20_011), most)
    x[1] *= -1
    x[2] += rng.integers(-8, 8, x.shape[1])
    x = x.astype(dtype_of(dtype))
    for num in (*[1] * 6, 40):
        options = {"seed": int(rng.integers(2**63)), "offset": 3}
        _, found, _ = drawn(arch, x, num, num_sms, **options)
        assert found.tobytes() == reference.sample(x, num, **options).tobytes()


@pytest.mark.parametrize("past", range(4))
@pytest.mark.parametrize("first", range(4))
def test_counters_that_fragments_do_not_begin_with(rng, backend, past, first):
    """Rows that begin within a fragment, and parts that begin within a counter's words."""
    x = rng.standard_normal((5, 1030), np.float32)[:, past:]
    state = cuattn.sample_state(backend.asarray(x), 5, seed=7, index_offset=first)
    want = reference.sample_state(x, 5, seed=7, index_offset=first)
    np.testing.assert_array_equal(backend.asnumpy(state.indices), want.indices)
    np.testing.assert_array_equal(backend.asnumpy(state.values), want.values)


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (0, 2, 1), (2, 1, 0)])
def test_rows_have_the_numbers_of_their_shape(rng, backend, order):
    """However they lie in memory, and kernels walk over them; with scores in units of 4."""
    axis = order.index(2)
    for options in ({}, {"top_p": 0.9}, {"min_p": 0.001}, {"top_k": 300}):
        x = clear_rows(rng, (20, 600), spread=0.4, **options) / 2
        x = x.reshape(4, 5, 600).transpose(order)
        x = np.ascontiguousarray(x).transpose(np.argsort(order)).transpose(order)
        verify(backend, x, 3, seed=9, axis=axis, scale=2.0, **options)


def test_more_draws_than_elements(rng, backend):
    """Of more than the blocks that store them take: the rest is filled up in every row."""
    verify(backend, rng.standard_normal((5, 4095), np.float32), 4098, seed=2)


def test_min_p_between_two_numbers(backend):
    """The least score that min_p = 1/2 keeps is above log(1/2) in float32."""
    x = np.full((2, 900), np.log(0.5), np.float32)
    assert exact(x)[0, 0] < np.log(0.5)
    x[0, ::3], x[1, 1::3], x[:, 450] = -0.5, np.nextafter(x[0, 1], 0), 0
    verify(backend, x, 200, seed=4, min_p=0.5)
    verify(backend, x, 400, seed=4, min_p=0.5)


@regimes
@pytest.mark.parametrize("num", [1, 40])
def test_no_order_costs_much_more_than_a_random_one(rng, num, arch, num_sms, rows, cols, expected):
    cost = {
        name: drawn(arch, x, num, num_sms, profile=True, seed=3)[0].cost
        for name, x in patterns(rng, rows, cols).items()
    }
    assert max(cost.values()) <= 1.5 * cost["random"], cost


def test_numbers_of_rows_have_64_bits(rng, backend):
    x = rng.standard_normal((6, 40), np.float32)
    numbers = rng.integers(-(2**63), 2**63, (6, 1))
    how = {"seed": 3, "offset": 2**35}
    state = cuattn.sample_state(backend.asarray(x), 5, rows=backend.asarray(numbers), **how)
    want = reference.sample_state(x, 5, rows=numbers, **how)
    np.testing.assert_array_equal(backend.asnumpy(state.indices), want.indices)
