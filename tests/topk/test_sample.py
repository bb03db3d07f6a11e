"""sample and sample_state: exactly the draws of the reference, wherever they run; and that these
are draws from a softmax."""

from __future__ import annotations

import functools

import cases
import numpy as np
import pytest
from cases import INF, LAYOUTS, NAN, draw, ranking_stack
from numpy.exceptions import AxisError
from sample_cases import clear_rows, is_clear, scores, verify
from tolerance import FLOATS, NAIVE, assert_close, exact, lse_dtype

import cuattn
from cuattn import SampleState, reference
from cuattn._topk import numpy_noise
from cuattn.reference import _sample as definition

LONGEST = 2**34  # elements of a row that have noise of their own


def any_seed(rng):
    """Of any number of bits."""
    return int(rng.integers(0, 2 ** int(rng.integers(1, 65)), dtype=np.uint64))


# ---- the noise ---------------------------------------------------------------------------------

# Known answers of Random123 (tests/kat_vectors): counter, key, words.
ALL, PI = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL,) * 4, (ALL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI[:4], PI[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_philox(counter, key, words):
    assert tuple(definition.philox(counter, key).tolist()) == words
    number = np.uint64
    quad, row, low, high = counter
    streams = numpy_noise.Streams(
        number(key[0] | key[1] << 32), number(low | high << 32), number(row)
    )
    found = [int(part[0, 0]) for part in streams.words(np.array([[quad]], number))]
    assert tuple(found) == words


def some_words(rng):
    """Random ones, and all at both ends and where the logarithm's pieces meet."""
    ends = np.concatenate([np.arange(-2000, 2000) + (1 << bit) for bit in range(11, 33)])
    ends = np.concatenate([np.arange(4000), ends, 2**32 - 1 - ends])
    ends = ends[(0 <= ends) & (ends < 2**32)].astype(np.uint32)
    return np.unique(np.concatenate([ends, rng.integers(0, 2**32, 10**5, np.uint32)]))


def test_noise_is_gumbel(rng):
    """The last word has the noise of the one before."""
    words = some_words(rng)[:-1]
    g = definition.gumbel(words)
    want = -np.log(-np.log1p(-(words.astype(np.float64) + 0.5) / 2**32))
    assert (abs(g - want) < 4e-7 + np.spacing(abs(g))).all()  # 2.1e-6 at most, where g is 18.2
    assert (np.diff(g) <= 0).all()
    assert definition.gumbel(np.array([ALL], np.uint32)) == g[-1]


def test_noise_of_numpy_has_the_same_bits(rng):
    words = some_words(rng)
    g = definition.gumbel(words)
    assert numpy_noise.gumbel(words).tobytes() == g.tobytes()
    assert (numpy_noise.bounds(words) >= g).all()
    near = words < 2**27
    assert (numpy_noise.bounds(words) - g)[near].max() < 0.02


def gumbel_of(backend, n, **options):
    """The noise of a row of zeros."""
    state = cuattn.sample_state(backend.asarray(np.zeros(n, np.float32)), n, **options)
    g = np.empty(n, np.float64)
    indices = backend.asnumpy(state.indices) - options.get("index_offset", 0)
    g[indices] = backend.asnumpy(state.values)
    return g


@pytest.mark.parametrize("first", [0, 1, 2, 3, 50257, 2**32 - 2, 2**33 + 1, LONGEST - 11])
def test_noise_is_what_is_defined(backend, rng, first):
    """Word i % 4 of counter (i // 4, row, offset), key seed, for any i."""
    seed, offset = any_seed(rng), int(rng.integers(2**63))
    g = gumbel_of(backend, 11, seed=seed, offset=offset, index_offset=first)
    for i in range(11):
        quad, place = divmod(first + i, 4)
        counter = quad, 0, offset & ALL, offset >> 32
        word = definition.philox(counter, (seed & ALL, seed >> 32))[place]
        assert g[i] == definition.gumbel(word[None])[0]


# ---- against the reference ---------------------------------------------------------------------


@pytest.mark.parametrize("n", cases.RANKED_LENGTHS)
def test_length(backend, rng, n):
    num = int(rng.choice([1, 2, min(n, 7), min(n, 100), n, n + 3]))
    x = ranking_stack(rng, n, min(n, 5), special=True)
    x[::2] = draw(rng, x[::2].shape)
    verify(backend, x, num, seed=any_seed(rng))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtype(backend, rng, dtype):
    for n, num in ((33, 1), (310, 64), (531, 300)):
        x = ranking_stack(rng, n, 5, dtype, special=True)
        x[::2] = draw(rng, x[::2].shape, dtype)
        verify(backend, x, num, seed=any_seed(rng), scale=0.7)


@pytest.mark.parametrize("num", [0, 1, 2, 31, 32, 33, 64, 65, 128, 255, 256, 257, 1000, 1025, 1100])
def test_num(backend, rng, num):
    """On both sides of what the lanes of a warp hold, and more than there is."""
    x = draw(rng, (3, 1025))
    x[1, rng.random(1025) < 0.7] = -INF
    verify(backend, x, num, seed=any_seed(rng))


@pytest.mark.parametrize("rows, n", cases.LONG)
def test_long_rows(backend, rng, rows, n):
    verify(backend, draw(rng, (rows, n)), int(rng.choice([1, 40])), seed=any_seed(rng))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, rng, layout):
    for n, num in ((33, 1), (129, 9), (1030, 300)):
        verify(backend, LAYOUTS[layout](draw(rng, (5, n))), num, seed=any_seed(rng))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, None])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_axis(backend, rng, dtype, axis):
    """Rows are numbered in C order, whichever axis they lie along."""
    x = draw(rng, (4, 5, 33), dtype)
    for num in (1, 4):
        verify(backend, x, num, seed=any_seed(rng), axis=axis)
        verify(backend, x.transpose(2, 0, 1), num, seed=any_seed(rng), axis=axis)


@pytest.mark.parametrize("scale", [0.5, -1.5, 0, 0.7, 30.0, np.float32(2), np.array(0.25), -INF])
def test_scale(backend, rng, scale):
    verify(backend, draw(rng, (4, 5, 33)), 3, seed=any_seed(rng), scale=scale)


@pytest.mark.parametrize("shape", [(), (5, 1), (4, 5, 1)])
def test_scale_array(backend, rng, shape):
    scale = np.asarray(rng.integers(-8, 9, shape) / 8).astype(np.float32)
    verify(backend, draw(rng, (4, 5, 33)), 3, seed=any_seed(rng), scale=scale)


@pytest.mark.parametrize("shape", [(), (33,), (5, 1), (4, 5, 33)])
def test_where(backend, rng, shape):
    """What takes no part changes nothing, whatever it holds."""
    x, where = draw(rng, (4, 5, 33)), np.asarray(rng.random(shape) < 0.6)
    if shape == (4, 5, 33):
        where[0, 0] = False
        where[0, 1] = np.arange(33) == 7
        x[~where] = rng.choice([NAN, INF, -INF], (~where).sum())
    for num in (1, 40):
        verify(backend, x, num, seed=any_seed(rng), where=where)


def test_one_bool_for_where(backend, rng):
    x = draw(rng, (3, 33))
    for where in (True, False, np.True_, np.False_):
        verify(backend, x, 2, seed=1, where=where if where is not True else None)
    every = cuattn.sample(backend.asarray(x), 2, seed=1, where=True)
    np.testing.assert_array_equal(backend.asnumpy(every), reference.sample(x, 2, seed=1))


@pytest.mark.parametrize("n, num", [(3, 3), (33, 2), (310, 2), (310, 300)])
def test_special_values(backend, rng, n, num):
    """Each special row beside ordinary ones, whose draws it must not touch."""
    rows = [row for _, row in cases.special_rows(rng, n)]
    x = draw(rng, (2 * len(rows), n))
    plain = verify(backend, x, num, seed=5)
    x[::2] = rows
    for one, other in zip(verify(backend, x, num, seed=5), plain, strict=True):
        one, other = map(backend.asnumpy, (one, other))
        np.testing.assert_array_equal(one[1::2], other[1::2])


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.1}])
def test_rows_without_probabilities(backend, rng, options):
    """-1 and NaN where the softmax is NaN, -1 and -inf where there is nothing more to draw."""
    x = np.full((6, 40), -INF, np.float32)
    x[1, 3], x[2, 39], x[3, 17], x[4] = 1.5, NAN, INF, draw(rng, 40)
    x[4, 0] = -INF
    x[5], x[5, 20] = draw(rng, 40), NAN
    for num in (1, 3):
        got = verify(backend, x, num, seed=any_seed(rng), **options)
        indices, log_prob = map(backend.asnumpy, got)
        assert (indices[[0, 2, 3, 5]] == -1).all() and np.isnan(log_prob[[0, 2, 3, 5]]).all()
        assert indices[1].tolist() == [3, -1, -1][:num]
        assert log_prob[1].tolist() == [0, -INF, -INF][:num]
    where = np.zeros((6, 40), bool)
    indices, log_prob = verify(backend, x, 2, seed=3, where=where, **options)
    assert (backend.asnumpy(indices) == -1).all() and (backend.asnumpy(log_prob) == -INF).all()


def test_overflow_is_infinite(backend, rng):
    """A score past the range of its type counts as infinite, of either sign."""
    x = np.array([[1, 2, 3], [-1, -2, 1e-10], [-1, -2, -3]], np.float32)
    got = verify(backend, x, 2, seed=2, scale=3e38)
    assert backend.asnumpy(got.indices)[0].tolist() == [-1, -1]


@pytest.mark.parametrize("dtype", FLOATS)
def test_huge_logits(backend, rng, dtype):
    """Keys are of float64: the noise of a logit of 1e6 is not rounded away."""
    most = {"float16": 6e4, "bfloat16": 1e6, "float32": 1e6, "float64": 1e13}[dtype]
    for offset in (most, -most):
        x = (
            (np.ones((20, 33)) * offset)
            .astype(lse_dtype(np.dtype("f8")))
            .astype(cases.dtype_of(dtype))
        )
        got = verify(backend, x, 1, seed=any_seed(rng))
        assert len(np.unique(backend.asnumpy(got.indices))) > 5
    x = np.array([[1e30, 1e30, -1e30], [3e38, -3e38, 0]], np.float32)
    verify(backend, x, 3, seed=any_seed(rng))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (2, 0, 3)])
def test_empty(backend, rng, shape):
    for axis in [None, *range(-len(shape), len(shape))]:
        for options in ({}, {"top_k": 2, "top_p": 0.5, "min_p": 0.5}):
            verify(backend, np.ones(shape, np.float32), 2, seed=3, axis=axis, **options)
            verify(backend, np.ones(shape, np.float32), 0, seed=3, axis=axis, **options)


def test_zero_dimensions(backend):
    for value in (3.5, INF, -INF, NAN):
        for num in (0, 1, 3):
            verify(backend, np.array(value, np.float32), num, seed=3)


@pytest.mark.parametrize("case", range(8))
def test_random_call(backend, rng, case):
    """Random shape, strides, axis, num, dtype and options."""
    x = cases.random_view(rng, rng.choice(["float32", "bfloat16"]))
    axis = None if rng.random() < 0.2 else int(rng.integers(-x.ndim, max(x.ndim, 1)))
    n = x.size if axis is None or x.ndim == 0 else x.shape[axis]
    options = {"seed": any_seed(rng), "offset": int(rng.integers(2**40))}
    rows = np.sum(x, axis, keepdims=True).shape
    if rng.random() < 0.4:
        options["where"] = np.asarray(rng.random(x.shape) < 0.7)
    if rng.random() < 0.4:
        options["scale"] = np.asarray(rng.integers(-8, 9, rows) / 8).astype(np.float32)
    if rng.random() < 0.4:
        options["seed"] = np.asarray(rng.integers(2**62, size=rows))
    verify(backend, x, int(rng.integers(n + 2)), axis=axis, **options)


# ---- seeds, offsets and rows -------------------------------------------------------------------

INTEGERS = ("int32", "int64", "uint32", "uint64", "int8")


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_seed(backend, rng, seed):
    x = draw(rng, (3, 33))
    for one in (seed, np.uint64(seed), np.array(seed, np.uint64)):
        verify(backend, x, 3, seed=one)
    assert (reference.sample(x, 9, seed=seed) != reference.sample(x, 9, seed=seed ^ 1)).any()


@pytest.mark.parametrize("offset", [1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1])
def test_offset(backend, rng, offset):
    x = draw(rng, (3, 33))
    for one in (offset, np.uint64(offset), np.array(offset)):
        verify(backend, x, 3, seed=7, offset=one)
    assert (reference.sample(x, 9, seed=7) != reference.sample(x, 9, seed=7, offset=offset)).any()


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("shape", [(5, 1), (4, 5, 1), (1,)])
def test_numbers_of_rows(backend, rng, shape, dtype):
    """Negative numbers count as their 64 bits."""
    info, x = np.iinfo(dtype), draw(rng, (4, 5, 33))
    seed, offset = (rng.integers(info.min, info.max, shape, dtype) for _ in range(2))
    verify(backend, x, 3, seed=seed, offset=offset)
    verify(backend, x, 3, seed=seed)
    verify(backend, x, 3, seed=11, offset=offset, top_k=9)
    verify(backend, x, 3, seed=LAYOUTS["strided"](seed), scale=0.5)


@pytest.mark.parametrize("axis", [0, 1])
def test_numbers_of_columns(backend, rng, axis):
    x = draw(rng, (33, 6, 5))
    seed = rng.integers(2**63, size=[1 if i == axis else n for i, n in enumerate(x.shape)])
    verify(backend, x, 2, seed=seed, axis=axis)
    verify(backend, x, 2, seed=3, offset=seed[..., :1], axis=axis)


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}])
def test_a_row_with_a_seed_may_have_any_place(backend, rng, options):
    """In whatever slot of whatever batch, the same draws and log-probabilities, to the bit, as all
    rows begin at a multiple of 16 bytes."""
    x, seeds = clear_rows(rng, (12, 312), **options), rng.integers(2**63, size=(12, 1))
    offsets, order = rng.integers(2**40, size=(12, 1)), rng.permutation(12)

    def draws(rows):
        given = (backend.asarray(np.ascontiguousarray(a[rows])) for a in (x, seeds, offsets))
        device_x, seed, offset = given
        how = {"seed": seed, "offset": offset, "return_log_prob": True}
        return [backend.asnumpy(part) for part in cuattn.sample(device_x, 5, **how, **options)]

    want = draws(slice(None))
    for rows in (order, order[:5], [3], np.repeat(order, 3)):
        for one, other in zip(draws(rows), want, strict=True):
            assert one.tobytes() == other[rows].tobytes()


def test_rows_draw_apart(backend):
    """Of one seed, and equal rows of equal seeds alike."""
    x = backend.asarray(np.zeros((50, 64), np.float32))
    apart = backend.asnumpy(cuattn.sample(x, seed=1))
    assert len(np.unique(apart)) > 20
    seed = backend.asarray(np.full((50, 1), 1))
    alike = backend.asnumpy(cuattn.sample(x, seed=seed))
    assert (alike == apart[0]).all()


def test_the_number_of_rows_does_not_matter(backend, rng):
    """The first rows of many, on whatever kernels these run, and along any axis."""
    x = draw(rng, (300, 130))
    want = reference.sample(x, 3, seed=9)
    for rows in (1, 7, 300):
        got = backend.asnumpy(cuattn.sample(backend.asarray(x[:rows]), 3, seed=9))
        np.testing.assert_array_equal(got, want[:rows])
    got = backend.asnumpy(cuattn.sample(backend.asarray(np.asfortranarray(x.T)), 3, seed=9, axis=0))
    np.testing.assert_array_equal(got, want.T)


def test_a_call_that_is_known_has_its_own_numbers(backend, rng):
    """Seed, offset and scale of a call of a known signature, and its errors."""
    x = draw(rng, (3, 33))
    device_x = backend.asarray(x)
    for seed, offset, scale in ((1, 2, 0.5), (3, 4, 1.5), (2**63 + 1, 5, 2), (7, 0, 1)):
        got = cuattn.sample(device_x, 4, seed=seed, offset=offset, scale=scale)
        want = reference.sample(x, 4, seed=seed, offset=offset, scale=scale)
        np.testing.assert_array_equal(backend.asnumpy(got), want)
    for wrong in ({"offset": 2**63}, {"offset": -1}, {"seed": -1}, {"seed": 2**64}):
        with pytest.raises(ValueError, match=r"(seed|offset) must be from 0 to "):
            cuattn.sample(device_x, 4, **{"seed": 3, "offset": 4, "scale": 1.5, **wrong})


# ---- filters -----------------------------------------------------------------------------------


def check_filters(backend, rng, shape, num, dtype="float32", spread=3.0, **filters):
    x = clear_rows(rng, shape, dtype, spread, **filters)
    return verify(backend, x, num, seed=any_seed(rng), **filters), x


@pytest.mark.parametrize("top_k", [1, 2, 31, 32, 33, 200, 256, 257, 530, 531, 10**30])
def test_top_k(backend, rng, top_k):
    for num in (1, 5, 300):
        check_filters(backend, rng, (3, 531), num, top_k=top_k)


@pytest.mark.parametrize("top_k", [3, 40, 300])
def test_top_k_of_ties(backend, rng, top_k):
    """The lower index stays."""
    x = rng.integers(-1, 2, (5, 600)).astype(np.float32)
    x[0], x[1, ::2] = 1, -INF
    for num in (2, top_k, top_k + 5):
        indices = backend.asnumpy(verify(backend, x, num, seed=any_seed(rng), top_k=top_k).indices)
        assert indices[0].max() < top_k and (num < top_k or indices[0].max() == top_k - 1)


@pytest.mark.parametrize("top_p", [1e-30, 1e-3, 0.3, 0.9, 0.999, 1.0, np.float32(0.5), 1])
def test_top_p(backend, rng, top_p):
    for n in (33, 531):
        for num in (1, 7, 300):
            check_filters(backend, rng, (3, n), num, top_p=float(top_p) if top_p != 1 else 1)


@pytest.mark.parametrize("top_p", [0.4, 0.95])
def test_top_p_of_flat_rows(backend, rng, top_p):
    """More than the 256 best are needed, beside rows that need a few."""
    x = clear_rows(rng, (6, 3000), spread=0.1, top_p=top_p)
    x[::2] = clear_rows(rng, (3, 3000), spread=3, top_p=top_p)
    for num in (1, 9, 300):
        verify(backend, x, num, seed=any_seed(rng), top_p=top_p)
    verify(backend, np.zeros((2, 1000), np.float32), 900, seed=3, top_p=0.7004)


@pytest.mark.parametrize("min_p", [0, 1e-30, 1e-3, 0.05, 0.5, 1.0, np.float32(0.25), 1])
def test_min_p(backend, rng, min_p):
    for num in (1, 7, 300):
        check_filters(backend, rng, (3, 531), num, min_p=float(min_p))


def test_min_p_1_is_the_largest(backend, rng):
    """And its equals."""
    x = draw(rng, (4, 100))
    x[2, 40:60] = x[2].max()
    got = verify(backend, x, 30, seed=any_seed(rng), min_p=1)
    assert (backend.asnumpy(got.indices) >= 0).sum(-1).min() == 1


def test_min_p_leaves_what_noise_would_hide(backend, rng):
    """So many small ones that the best with noise are among them, and few survive."""
    x = np.zeros((4, 20000), np.float32)
    x[:, rng.permutation(20000)[:3]] = 5
    for num in (1, 3, 5):
        got = verify(backend, x, num, seed=any_seed(rng), min_p=0.5)
        assert (backend.asnumpy(got.indices) >= 0).sum(-1).tolist() == [min(num, 3)] * 4


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("top_k", [None, 3, 40, 400])
@pytest.mark.parametrize("top_p", [None, 0.6, 0.97])
@pytest.mark.parametrize("min_p", [None, 0.02])
def test_filters_together(backend, rng, dtype, top_k, top_p, min_p):
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    check_filters(backend, rng, (3, 531), int(rng.choice([1, 5, 300])), dtype, **filters)


def test_order_of_filters(backend):
    """top_p is of what top_k leaves; min_p is of the row's largest."""
    p = np.array([0.4, 0.3, 0.2, 0.1])
    x = np.log(p).astype(np.float32)[None]
    for filters, kept in [
        ({"top_p": 0.65}, {0, 1}),
        ({"top_k": 3, "top_p": 0.65}, {0, 1}),
        ({"top_k": 2, "top_p": 0.55}, {0}),
        ({"top_p": 0.75}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.75}, {0, 1}),
        ({"min_p": 0.6}, {0, 1}),
        ({"top_p": 0.95, "min_p": 0.4}, {0, 1, 2}),
        ({"top_k": 1, "top_p": 1.0, "min_p": 0.0}, {0}),
    ]:
        got = verify(backend, x, 4, seed=1, **filters)
        assert {*backend.asnumpy(got.indices)[0].tolist()} - {-1} == kept
        assert got.log_prob.shape == (1, 4)


def test_filters_take_no_noise(backend, rng):
    """A draw that a filter leaves is the draw without it."""
    x = clear_rows(rng, (50, 60), top_p=0.9, min_p=0.1)
    plain = reference.sample(x, 60, seed=4)
    for filters in ({"top_k": 10}, {"top_p": 0.9}, {"min_p": 0.1}):
        got = backend.asnumpy(cuattn.sample(backend.asarray(x), 60, seed=4, **filters))
        for row, every in zip(got, plain, strict=True):
            kept = row[row >= 0]
            np.testing.assert_array_equal(kept, every[np.isin(every, kept)])


@pytest.mark.parametrize(
    "filters", [{"top_k": 40}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 300}]
)
def test_filters_of_columns(backend, rng, filters):
    """Along another axis, with scales, masks and strides of their own."""
    where, scale = rng.random((531, 4, 3)) < 0.7, np.float32(rng.integers(2, 9, (1, 4, 3)) / 4)
    cut = {name: value for name, value in filters.items() if name != "top_k"}
    while True:
        x = LAYOUTS[str(rng.choice([*LAYOUTS]))](draw(rng, (531, 4, 3)))
        rows = np.moveaxis(scores(x, scale, where), 0, -1).reshape(12, 531)
        if all(is_clear(row, **cut) for row in rows):
            break
    verify(backend, x, 3, seed=8, axis=0, scale=scale, where=where, **filters)


# ---- states ------------------------------------------------------------------------------------


def state_of(backend, x, num, part, **options):
    """The state of a part of the last axis, at its place."""
    x = backend.asarray(x[..., part])
    return cuattn.sample_state(x, num, index_offset=part.start, **options)


def split(rng, n, count):
    """`count` slices of a row, some of them perhaps empty or of one element."""
    cuts = [0, *sorted(rng.choice([0, 1, n, *rng.integers(0, n + 1, 6)], count - 1)), n]
    return [slice(int(begin), int(end)) for begin, end in zip(cuts[:-1], cuts[1:], strict=True)]


def merge_in_any_order(rng, states):
    """Two of them at a time, whichever, until one is left."""
    while len(states) > 1:
        a, b, *rest = (states[i] for i in rng.permutation(len(states)))
        states = [*rest, cuattn.merge(a, b)]
    return states[0]


@np.errstate(all="ignore")
def compare_state(backend, got, x, num, **options):
    """A state against that of the whole `x`: the draws exactly, `l` and lse closely."""
    assert type(got) is SampleState
    wide = lse_dtype(x.dtype)
    assert all(isinstance(part, backend.xp.ndarray) for part in got)
    assert [part.dtype for part in got] == [wide, wide, np.float64, wide, np.int64]
    want = reference.sample_state(x, num, **options)
    m, l, *draws = (backend.asnumpy(part) for part in got)  # noqa: E741
    for found, ref in zip(draws, want[2:], strict=True):
        np.testing.assert_array_equal(found, ref)
    np.testing.assert_array_equal(m, want.m)
    s = scores(np.atleast_1d(x), options.get("scale"))
    axis = options.get("axis", -1)
    with np.errstate(all="ignore"):
        top = np.max(s, axis, keepdims=True, initial=-INF)
        naive = np.sum(np.exp(s - np.where(np.isfinite(top), top, 0)), axis)
    assert_close(l, reference.softmax_state(exact(s), axis).l, naive)
    lse = NAIVE["logsumexp"](s, axis, dtype=wide)
    assert_close(backend.asnumpy(got.lse), reference.logsumexp(exact(s), axis), lse)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, None])
@pytest.mark.parametrize("dtype", FLOATS)
def test_state(backend, rng, dtype, axis):
    """num is the last axis of what was drawn, whichever the rows lay along."""
    x = draw(rng, (4, 5, 33), dtype)
    for num in (0, 3, 200):
        options = {"seed": any_seed(rng), "axis": axis, "scale": 0.7}
        state = cuattn.sample_state(backend.asarray(x), num, **options)
        assert state.indices.shape == (*state.m.shape, num)
        compare_state(backend, state, x, num, **options)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", FLOATS)
def test_any_split_has_the_draws_of_the_whole(backend, rng, dtype, count):
    for n, num in ((9, 3), (310, 1), (310, 20), (700, 300)):
        x = draw(rng, (3, n), dtype)
        x[0, rng.random(n) < 0.5] = -INF
        options = {"seed": any_seed(rng), "offset": 5, "scale": 0.7}
        states = [state_of(backend, x, num, part, **options) for part in split(rng, n, count)]
        merged = merge_in_any_order(rng, states)
        compare_state(backend, merged, x, num, **options)
        whole = cuattn.sample(backend.asarray(x), num, return_log_prob=True, **options)
        indices, log_prob = map(backend.asnumpy, (whole.indices, merged.log_prob))
        np.testing.assert_array_equal(backend.asnumpy(merged.indices), indices)
        np.testing.assert_allclose(log_prob, backend.asnumpy(whole.log_prob), 1e-5, 1e-5)


def test_merge_of_rows_without_probabilities(backend, rng):
    """NaN or +inf in one part: no draw is left of the other."""
    x = draw(rng, (5, 40))
    x[0, 30], x[1, 2], x[2], x[3, :20] = NAN, INF, -INF, -INF
    a, b = (state_of(backend, x, 3, part, seed=6) for part in (slice(0, 20), slice(20, 40)))
    for merged in (cuattn.merge(a, b), cuattn.merge(b, a)):
        compare_state(backend, merged, x, 3, seed=6)
        assert np.isnan(backend.asnumpy(merged.log_prob)[:3]).all()


def test_empty_state_is_the_identity(backend, rng):
    x = draw(rng, (3, 33))
    state, nothing = (
        state_of(backend, x, 5, part, seed=1) for part in (slice(0, 33), slice(33, 33))
    )
    for merged in (cuattn.merge(state, nothing), cuattn.merge(nothing, state)):
        for got, want in zip(merged, state, strict=True):
            np.testing.assert_array_equal(backend.asnumpy(got), backend.asnumpy(want))


@pytest.mark.parametrize("num", [0, 1, 32, 33, 256, 257, 700])
def test_merge_num(backend, rng, num):
    x = draw(rng, (4, 600))
    a, b = (state_of(backend, x, num, part, seed=2) for part in (slice(0, 250), slice(250, 600)))
    compare_state(backend, cuattn.merge(a, b), x, num, seed=2)
    for one, other in zip(cuattn.merge(a, b), cuattn.merge(b, a), strict=True):
        assert backend.asnumpy(one).tobytes() == backend.asnumpy(other).tobytes()


def test_keys_that_are_equal(backend):
    """Of huge scores the noise is rounded away: the lower index is first in any split."""
    x = np.full((2, 50), 2.0**80)
    x[1] *= -1
    options = {"seed": 3}
    for cut in (0, 7, 50):
        a, b = (
            state_of(backend, x, 9, part, **options) for part in (slice(0, cut), slice(cut, 50))
        )
        for merged in (cuattn.merge(a, b), cuattn.merge(b, a)):
            assert backend.asnumpy(merged.indices).tolist() == [[*range(9)]] * 2
            compare_state(backend, merged, x, 9, **options)


@pytest.mark.parametrize("filters", [{}, {"top_k": 50}, {"top_k": 300}])
def test_keys_that_are_equal_and_scores_that_are_not(backend, rng, filters):
    """So large that the noise is rounded to units in which scores differ."""
    x = 2.0**54 + 4 * rng.integers(0, 4, (5, 400))
    for num in (1, 20, 400):
        verify(backend, x, num, seed=any_seed(rng), **filters)


def test_states_of_special_rows(backend, rng):
    for dtype in ("float32", "float64"):
        x = np.stack([row for _, row in cases.special_rows(rng, 33, dtype)])
        compare_state(backend, state_of(backend, x, 3, slice(0, 33), seed=2), x, 3, seed=2)
    x = np.array([[1, 2, 3], [-1, -2, 1e-10], [-1, -2, -3]], np.float32)
    options = {"seed": 2, "scale": 3e38}
    state = state_of(backend, x, 3, slice(0, 3), **options)
    for name in ("m", "values", "indices"):  # scores past their range are infinite
        want = getattr(reference.sample_state(x, 3, **options), name)
        np.testing.assert_array_equal(backend.asnumpy(getattr(state, name)), want)


def test_rows_of_a_part(backend, rng):
    """A block of rows with their numbers draws as among all."""
    x = draw(rng, (4, 6, 50))
    numbers, want = np.arange(24).reshape(4, 6, 1), reference.sample(x, 2, seed=3)
    for rows in ((slice(1, 3), slice(2, 6)), (slice(3, 4), slice(None, None, -2))):
        part, own = (backend.asarray(np.ascontiguousarray(a[rows])) for a in (x, numbers))
        for one in (own, own.astype(np.int32)):
            state = cuattn.sample_state(part, 2, seed=3, rows=one)
            np.testing.assert_array_equal(backend.asnumpy(state.indices), want[rows])
    large = np.array([[5], [2**32 + 5], [2**63 - 1]])
    state = cuattn.sample_state(backend.asarray(x[0, :3]), 2, seed=3, rows=backend.asarray(large))
    compare_state(backend, state, x[0, :3], 2, seed=3, rows=large)
    seeds = rng.integers(2**60, size=(3, 1))
    given = {"seed": backend.asarray(seeds), "rows": backend.asarray(large)}
    state = cuattn.sample_state(backend.asarray(x[0, :3]), 2, **given)
    compare_state(backend, state, x[0, :3], 2, seed=seeds, rows=large)


def test_top_k_of_shards(backend, rng):
    """The recipe: draw among the k best of the parts of a row."""
    x, parts = draw(rng, (5, 400)), (slice(0, 100), slice(100, 333), slice(333, 400))
    states = [
        cuattn.softmax_topk_state(backend.asarray(x[:, part]), 20, index_offset=part.start)
        for part in parts
    ]
    state = functools.reduce(cuattn.merge, states)
    places = cuattn.sample(state.values, 3, seed=9)
    values, indices = map(backend.asnumpy, (state.values, state.indices))
    want = np.take_along_axis(indices, reference.sample(values, 3, seed=9), -1)
    got = backend.xp.take_along_axis(state.indices, places, -1)
    np.testing.assert_array_equal(backend.asnumpy(got), want)


# ---- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", cases.OUTS)
@pytest.mark.parametrize("n, num", [(33, 5), (33, 40), (310, 40), (1025, 300)])
def test_out(backend, rng, n, num, layout):
    x = backend.asarray(ranking_stack(rng, n, 5, special=True))
    for options in ({}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}):
        how = {"seed": 5, "return_log_prob": True, **options}
        cases.check_outs(backend, rng, functools.partial(cuattn.sample, x, num, **how), layout)
    call = functools.partial(cuattn.sample_state, x, num, seed=5, scale=0.7)
    cases.check_outs(backend, rng, call, layout)


@pytest.mark.parametrize("axis", [0, 1, 2, None])
def test_out_axis(backend, rng, axis):
    x = backend.asarray(LAYOUTS[str(rng.choice([*LAYOUTS]))](draw(rng, (9, 10, 11), "bfloat16")))
    for num in (0, 4, 12):
        how = {"seed": 5, "axis": axis}
        call = functools.partial(cuattn.sample, x, num, return_log_prob=True, **how)
        cases.check_outs(backend, rng, call)
        cases.check_outs(backend, rng, functools.partial(cuattn.sample_state, x, num, **how))
        want = cuattn.sample(x, num, **how)
        guard = cases.Guarded(backend, want.shape, np.int64, str(rng.choice(cases.OUTS[:-1])))
        assert cuattn.sample(x, num, out=guard.out, **how) is guard.out
        np.testing.assert_array_equal(backend.asnumpy(guard.out), backend.asnumpy(want))
        guard.check_rim()


@pytest.mark.parametrize("layout", cases.OUTS)
@pytest.mark.parametrize("shape, num", [((), 2), ((0,), 2), ((7,), 0), ((3, 40), 5)])
def test_merge_out(backend, rng, shape, num, layout):
    x = [backend.asarray(draw(rng, (*shape, 9))) for _ in range(2)]
    a, b = (cuattn.sample_state(one, num, seed=4, index_offset=9 * i) for i, one in enumerate(x))
    cases.check_outs(backend, rng, functools.partial(cuattn.merge, a, b), layout)


def test_merge_in_place_is_refused(backend, rng):
    """A place of the result may be any one of the lists."""
    a, b = (cuattn.sample_state(backend.asarray(draw(rng, (3, 9))), 4, seed=1) for _ in range(2))
    apart = cuattn.merge(a, b)
    for i, name in enumerate(a._fields):
        for state, owner in ((a, "a"), (b, "b")):
            out = (*apart[:i], state[i], *apart[i + 1 :])
            with pytest.raises(ValueError, match=rf"out\[{i}\] must .* with {owner}.{name}, but "):
                cuattn.merge(a, b, out=out)


@pytest.mark.parametrize("n, num", [(33, 5), (50257, 1), (70001, 300)])
def test_two_runs_are_bitwise_equal(backend, rng, n, num):
    x = backend.asarray(draw(rng, (2, n)))
    for options in ({}, {"top_p": 0.9}, {"min_p": 0.1}):
        how = {"seed": 7, "return_log_prob": True, **options}
        one, other = (cuattn.sample(x, num, **how) for _ in range(2))
        for a, b in zip(one, other, strict=True):
            assert backend.asnumpy(a).tobytes() == backend.asnumpy(b).tobytes()


# ---- statistics, at fixed seeds: the draws are the reference's everywhere ----------------------

DRAWS = 200_000
DISTRIBUTIONS = {
    "few": [0.5, 0.25, 0.15, 0.1],
    "even": [1 / 7] * 7,
    "steep": [*(2.0 ** -np.arange(1, 11)), 2.0**-10],
    "many": (lambda p: p / p.sum())(1 + np.arange(50) % 7 * np.arange(50)),
}
# What draws differ by: number of the row, offset, seed, or place in the row.
STREAMS = {
    "rows": {"seed": 12345},
    "offsets": {"seed": np.full((DRAWS, 1), 7), "offset": np.arange(DRAWS)[:, None]},
    "seeds": {"seed": np.arange(DRAWS)[:, None]},
    "large seeds": {"seed": 2**63 - 1 - np.arange(DRAWS)[:, None], "offset": 2**62},
}


def chi_square(counts, p):
    """Its distance from what is expected in standard deviations of the square, about normal."""
    expected = p * counts.sum()
    square, freedom = ((counts - expected) ** 2 / expected).sum(), p.size - 1
    return (square - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_frequencies(name, stream):
    p = np.asarray(DISTRIBUTIONS[name])
    x = np.broadcast_to(np.log(p), (DRAWS, p.size))
    counts = np.bincount(cuattn.sample(x, **STREAMS[stream])[:, 0], minlength=p.size)
    assert abs(chi_square(counts, p)) < 4


def test_frequencies_within_a_row():
    """Two halves of one row are as independent as two rows are."""
    x = np.zeros((DRAWS, 8))
    z = cuattn.sample_state(x, 8, seed=3)
    g = np.take_along_axis(z.values, np.argsort(z.indices), -1)
    pairs = 4 * np.argmax(g[:, :4], -1) + np.argmax(g[:, 4:], -1)
    assert abs(chi_square(np.bincount(pairs, minlength=16), np.full(16, 1 / 16))) < 4


@pytest.mark.parametrize(
    "filters, kept",
    [
        ({"top_p": 0.85}, 3),
        ({"top_k": 2}, 2),
        ({"min_p": 0.25}, 3),
        ({"top_k": 3, "top_p": 0.7}, 2),
    ],
)
def test_frequencies_of_what_is_left(filters, kept):
    p = np.array([0.5, 0.25, 0.15, 0.1])
    x = np.broadcast_to(np.log(p), (DRAWS, 4))
    counts = np.bincount(cuattn.sample(x, seed=1, **filters)[:, 0], minlength=4)
    assert not counts[kept:].any()
    assert abs(chi_square(counts[:kept], p[:kept] / p[:kept].sum())) < 4


def test_frequencies_of_pairs():
    """Without replacement: the second is drawn from what the first has left."""
    p = np.array([0.5, 0.25, 0.15, 0.1])
    indices = cuattn.sample(np.broadcast_to(np.log(p), (DRAWS, 4)), 2, seed=8)
    pairs = p[:, None] * p / (1 - p[:, None]) * (1 - np.eye(4))
    counts = np.bincount(4 * indices[:, 0] + indices[:, 1], minlength=16)
    possible = pairs.reshape(-1) > 0
    assert not counts[~possible].any()
    assert abs(chi_square(counts[possible], pairs.reshape(-1)[possible])) < 4


# ---- errors ------------------------------------------------------------------------------------

X = np.zeros((4, 5), np.float32)


@pytest.mark.parametrize(
    "error, argument, call",
    [
        (TypeError, "seed", lambda f: f(X)),
        (TypeError, "seed", lambda f: f(X, seed=None)),
        (TypeError, "seed", lambda f: f(X, seed=1.0)),
        (TypeError, "seed", lambda f: f(X, seed=[1])),
        (TypeError, "seed", lambda f: f(X, seed=np.ones((4, 1)))),
        (ValueError, "seed", lambda f: f(X, seed=-1)),
        (ValueError, "seed", lambda f: f(X, seed=2**64)),
        (ValueError, "seed", lambda f: f(X, seed=np.array(-1))),
        (ValueError, "seed", lambda f: f(X, seed=np.ones(5, int))),
        (ValueError, "seed", lambda f: f(X, axis=0, seed=np.ones((4, 1), int))),
        (ValueError, "offset", lambda f: f(X, seed=1, offset=-1)),
        (ValueError, "offset", lambda f: f(X, seed=1, offset=2**63)),
        (TypeError, "offset", lambda f: f(X, seed=1, offset=np.ones((4, 1), bool))),
        (ValueError, "num", lambda f: f(X, -1, seed=1)),
        (ValueError, "num", lambda f: f(X, 2**63, seed=1)),
        (TypeError, "num", lambda f: f(X, 2.0, seed=1)),
        (TypeError, "axis", lambda f: f(X, seed=1, axis=(0, 1))),
        (AxisError, "axis", lambda f: f(X, seed=1, axis=2)),
        (TypeError, "x", lambda f: f([1.0, 2.0], seed=1)),
        (TypeError, "x", lambda f: f(X.astype(np.int32), seed=1)),
        (TypeError, "x", lambda f: f(X > 0, seed=1)),
        (TypeError, "x", lambda f: f(X * 1j, seed=1)),
        (TypeError, "x", lambda f: f(X.astype(">f4"), seed=1)),
        (TypeError, "scale", lambda f: f(X, seed=1, scale="2")),
        (ValueError, "scale", lambda f: f(X, seed=1, scale=np.ones((4, 5)))),
        (ValueError, "x", lambda f: f(np.broadcast_to(X[0, 0], 2**34 + 1), seed=1)),
    ],
)
def test_errors(error, argument, call):
    for function in (cuattn.sample, cuattn.sample_state):
        with pytest.raises(error, match=rf"\A{argument} must .*, but ") as caught:
            call(function)
        assert caught.type is error


@pytest.mark.parametrize(
    "error, argument, options",
    [
        (TypeError, "where", {"where": X}),
        (ValueError, "where", {"where": np.ones((3, 5), bool)}),
        (ValueError, "top_k", {"top_k": 0}),
        (TypeError, "top_k", {"top_k": 2.0}),
        (ValueError, "top_p", {"top_p": 0}),
        (ValueError, "top_p", {"top_p": 1.1}),
        (ValueError, "top_p", {"top_p": NAN}),
        (TypeError, "top_p", {"top_p": np.ones(4)}),
        (ValueError, "min_p", {"min_p": -0.1}),
        (ValueError, "min_p", {"min_p": 2}),
        (ValueError, "min_p", {"min_p": NAN}),
        (TypeError, "min_p", {"min_p": "0.5"}),
        (TypeError, "return_log_prob", {"return_log_prob": 1}),
        (TypeError, "out", {"out": (np.empty((4, 1), int),)}),
        (TypeError, "out", {"out": np.empty((4, 1), int), "return_log_prob": True}),
        (TypeError, "out", {"out": np.empty((4, 1))}),
        (ValueError, "out", {"out": np.empty((4, 2), int)}),
        (ValueError, "out", {"out": X[:, :2].view(np.int64)}),
    ],
)
def test_errors_of_options(error, argument, options):
    with pytest.raises(error, match=rf"\A{argument} must .*, but ") as caught:
        cuattn.sample(X, seed=1, **options)
    assert caught.type is error


@pytest.mark.parametrize(
    "error, argument, options",
    [
        (ValueError, "index_offset", {"index_offset": -1}),
        (ValueError, "index_offset", {"index_offset": 2**34 - 4}),
        (TypeError, "index_offset", {"index_offset": 1.0}),
        (TypeError, "rows", {"rows": 3}),
        (TypeError, "rows", {"rows": np.ones((4, 1))}),
        (ValueError, "rows", {"rows": np.ones(5, int)}),
    ],
)
def test_errors_of_a_state(error, argument, options):
    with pytest.raises(error, match=rf"\A{argument} must .*, but ") as caught:
        cuattn.sample_state(X, seed=1, **options)
    assert caught.type is error


def test_errors_of_merge():
    a = cuattn.sample_state(X, 2, seed=1)
    other = cuattn.softmax_topk_state(X, 2)
    for one, two, error, argument in [
        (a, other, TypeError, "b"),
        (other, a, TypeError, "b"),
        (a, cuattn.sample_state(X, 3, seed=1), ValueError, "b.values"),
        (a, a._replace(values=a.logits), TypeError, "b.values"),
        (a, a._replace(logits=a.values), TypeError, "b.logits"),
        (a, a._replace(indices=a.values), TypeError, "b.indices"),
    ]:
        with pytest.raises(error, match=rf"\A{argument} must .*, but "):
            cuattn.merge(one, two)
