"""The kernels of attention_backward: against float64, no worse than twice the plain expression.

Every problem has NaN, infinities and garbage wherever no query looks, and in the rows of padding of
grad, y and lse (`attention_backward_cases.Backward`). Sizes and options are those of few kernels:
`configurations` has most of them.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from attention_backward_cases import Backward, backward, verify, with_other_fills
from attention_cases import LENGTHS, NAN, OPS, any_options, put, put_options
from cases import LAYOUTS, Guarded
from conftest import GPU, NumpyBackend
from tolerance import dtype_of

import cuattn
from cuattn._attention import request_backward

pytestmark = pytest.mark.parametrize(
    "backend", ["emulator-sm_80", "emulator-sm_90a", GPU], indirect=True
)

SMALL = {"lengths": (37, 83), "dims": (64, 64)}
TYPES = tuple(op for op in OPS if op != "bfloat16")  # whose kernels are float16's
RULE = {"lengths": (37, 83), "dims": (63, 64)}  # with a bias and a mask


@pytest.fixture(autouse=True)
def multiprocessors(backend, rng):
    """So few that persistent blocks have many rounds."""
    if backend.runtime is not None:
        backend.runtime.num_sms = int(rng.integers(1, 6))


def bits(gradients):
    return [None if a is None else np.ascontiguousarray(a).tobytes() for a in gradients]


# ---- sizes and dtypes ---------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(backend, rng, lengths):
    verify(backend, rng, lengths=lengths, is_causal=bool(rng.integers(2)))


# Both sides of whole vectors of 16 bytes and of columns padded to 32; keys and values unlike.
@pytest.mark.parametrize(
    "dims",
    [*((d, d) for d in (1, 40, 96, 160, 192, 256)), (111, 125), (64, 249), (249, 64)],
    ids=str,
)
def test_head_dims(backend, rng, dims):
    verify(backend, rng, heads=(2, 2), lengths=(41, 70), dims=dims, is_causal=True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_dtypes(backend, rng, op, dim):
    """Longer than tiles and blocks of any type."""
    dim = 64 if op == "bfloat16" else dim
    verify(backend, rng, op, heads=(1, 1), lengths=(79, 143), dims=(dim, dim), is_causal=True)


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_many_tiles(backend, rng, dim):
    """More than slots of any ring, of queries and of keys, behind a window and without one; keys
    that nobody sees in the first and in the last of them."""
    seen = {"window": (200, 0), "q_offset": 300}
    verify(backend, rng, heads=(1, 1), lengths=(40, 400), dims=(dim, dim), **seen)
    verify(backend, rng, heads=(1, 1), lengths=(530, 540), dims=(dim, dim), window=(200, 100))
    verify(backend, rng, heads=(2, 1), lengths=(410, 530), dims=(dim, dim))


@pytest.mark.parametrize("dim", [64, 128, 192])
def test_persistent_blocks(backend, rng, dim):
    """Rounds of many tiles, of few, and of none, after each other."""
    if backend.runtime is not None:
        backend.runtime.num_sms = 2
    how = {"batch": 3, "heads": (2, 1), "dims": (dim, dim)}  # an odd number of rounds of each kind
    for lengths, options in (
        ((270, 150), {"is_causal": True, "q_offset": -140}),
        ((140, 290), {"is_causal": True}),
        ((200, 90), {"window": (9, 0), "q_offset": 0}),  # the last queries see nothing
        ((90, 200), {"window": (9, 0), "q_offset": 150}),  # nor are the first keys seen
    ):
        verify(backend, rng, lengths=lengths, **how, **options)


@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_groups_of_heads(backend, rng, heads, batch):
    """Each head of a group from the first query on that sees a key."""
    verify(backend, rng, batch=batch, heads=heads, lengths=(90, 40), is_causal=True)


@pytest.mark.parametrize("op", TYPES)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_devices_of_less_shared_memory(rng, op, dim):
    """Tiles of sm_86, sm_89 and sm_120."""
    import emulator

    for options in ({}, any_options(rng, 1, 2, (37, 50))):
        with emulator.activate("sm_86", int(rng.integers(100))) as runtime:
            other = NumpyBackend("emulator", "sm_86", runtime)
            verify(other, rng, op, lengths=(37, 50), dims=(dim, dim), **options)


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", TYPES)
@pytest.mark.parametrize("dim", [64, 256])
def test_every_option_at_once(backend, rng, op, dim):
    options = any_options(rng, 2, 4, (45, 75), "float64" if op == "float64" else "float32")
    how = {"heads": (4, 2), "lengths": (45, 75), "dims": (dim - 1, dim)}
    verify(backend, rng, op, batch=2, **how, **options)


@pytest.mark.parametrize("q_offset", [-200, -36, 0, 64, 200, 2**39, -(2**39)])
def test_q_offset(backend, rng, q_offset):
    """Also where no query sees a key, and where every query sees all."""
    verify(backend, rng, **SMALL, is_causal=True, q_offset=q_offset)
    verify(backend, rng, **SMALL, window=(20, 7), q_offset=q_offset)


@pytest.mark.parametrize(
    "window", [(0, 0), (None, 5), (17, None), (9, 12), (64, 64), (10**9, 10**9)], ids=str
)
@pytest.mark.parametrize("lengths", [(37, 83), (150, 150), (83, 37)], ids=str)
def test_window(backend, rng, window, lengths):
    """Every place of an edge in tiles of queries and of keys."""
    verify(backend, rng, heads=(1, 1), lengths=lengths, window=window)


def test_options_alone(backend, rng):
    """Rules of scores without the others."""
    alone = [
        {"q_lens": np.array([0, 20]), "kv_lens": np.array([83, 41])},
        {"scale": -0.7},
        {"scale": 0.0},
        {"softcap": 0.5},
        {"alibi_slopes": rng.uniform(0, 0.3, 2).astype(np.float32)},
        {"sinks": rng.standard_normal(2).astype(np.float32)},
        {"mask": rng.random((2, 1, 37, 83)) < 0.4},
    ]
    for options in alone:
        verify(backend, rng, batch=2, lengths=(37, 83), dims=(128, 128), **options)


@pytest.mark.parametrize("op", ["float16", "float32", "float64"])
def test_shapes_of_bias(backend, rng, op):
    """Whatever a bias is repeated for is added up; hidden scores are not."""
    dtype = "f8" if op == "float64" else "f4"
    for shape in [(2, 4, 21, 40), (1, 4, 21, 1), (4, 1, 40), (2, 1, 1, 1), (21, 40), (1,)]:
        options = {"bias": rng.standard_normal(shape).astype(dtype), "sinks": np.ones(4, "f4")}
        if shape == (2, 4, 21, 40):
            options["bias"][1, :, 13:] = NAN  # padding
        options |= {"window": (25, 0), "q_lens": np.array([21, 13]), "mask": rng.random(40) < 0.8}
        verify(backend, rng, op, batch=2, heads=(4, 2), lengths=(21, 40), dims=(63, 64), **options)


# ---- layouts in memory --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "strided", "misaligned", "fortran"])
@pytest.mark.parametrize("op", ["float16", "float64"])
def test_layouts(backend, rng, op, layout):
    """Of all that comes in; what goes out is written whole, and nothing beside it."""
    bias = rng.standard_normal((4, 37, 83)).astype("f8" if op == "float64" else "f4")
    options = {"bias": bias, "is_causal": True, "mask": rng.random(83) < 0.8}
    how = SMALL if layout == "padded" else RULE
    problem = Backward(rng, op, batch=2, heads=(4, 2), **how, **options)
    arrays = [LAYOUTS[layout](a) for a in problem.forward]
    q, k, v = problem.arrays
    outs = [Guarded(backend, a.shape, a.dtype, layout) for a in (q, k, v, options["bias"])]
    given = [put(backend, a) for a in arrays]
    more = put_options(backend, problem.more)
    got = cuattn.attention_backward(*given, **more, out=tuple(one.out for one in outs))
    assert all(one is out.out for one, out in zip(got, outs, strict=False))
    for out in outs:
        out.check_rim()
    problem.check_gradients(
        type(got)(*(None if one is None else backend.asnumpy(one) for one in got))
    )


def test_a_gradient_that_is_broadcast(backend, rng):
    """What the gradient of a sum is: strides of 0."""
    problem = Backward(rng, batch=2, heads=(4, 2), **SMALL, is_causal=True)
    whole = np.full(problem.q.shape, 0.5, np.float16)
    broadcast = np.broadcast_to(np.float16(0.5), whole.shape)
    got, want = (
        backward(backend, (grad, *problem.forward[1:]), problem.more) for grad in (broadcast, whole)
    )
    for one, other in zip(got[:3], want[:3], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-3 * abs(other).max())
    problem.given["grad"] = whole
    problem.check_gradients(got)


def test_fewer_dimensions(backend, rng):
    problem = Backward(rng, "float32", batch=2, heads=(2, 2), **SMALL, is_causal=True)
    whole = backward(backend, problem.forward, problem.more)
    grad_lse = problem.more["grad_lse"]
    for lead in [(1,), (1, 1)]:
        arrays = [a[lead] for a in problem.forward]
        got = backward(backend, arrays, {"is_causal": True, "grad_lse": grad_lse[lead]})
        assert bits(got[:3]) == bits(one[lead] for one in whole[:3])
    swapped = [a.swapaxes(1, 2) for a in problem.forward[:5]]
    got = backward(backend, (*swapped, problem.forward[5]), problem.more | {"layout": "BSHD"})
    assert bits(one.swapaxes(1, 2) for one in got[:3]) == bits(whole[:3])


@pytest.mark.parametrize(
    "batch, heads, lengths, dims",
    [
        (0, (2, 1), (3, 4), (8, 8)),
        (2, (0, 3), (3, 4), (8, 8)),
        (2, (2, 1), (0, 4), (8, 8)),
        (2, (2, 1), (3, 0), (8, 8)),
        (2, (2, 1), (3, 4), (0, 8)),
        (2, (2, 1), (3, 4), (8, 0)),
        (2, (2, 1), (0, 0), (0, 0)),
    ],
)
def test_empty(backend, rng, batch, heads, lengths, dims):
    """All results are whole: zeros, where nothing is added up."""
    options = {"sinks": np.ones(heads[0], "f4"), "bias": np.zeros((heads[0], 1, 1), "f4")}
    options |= {"alibi_slopes": np.zeros(heads[0], "f4")}
    for op in ("float16", "float32"):
        verify(backend, rng, op, batch=batch, heads=heads, lengths=lengths, dims=dims, **options)


# ---- sequences of many lengths ------------------------------------------------------------------


@pytest.mark.parametrize("op", TYPES)
def test_sequences(backend, rng, op):
    """Each as it would be alone, bit by bit: of no queries, of no keys, of many."""
    lengths = [(5, 9), (0, 0), (130, 70), (0, 12), (3, 0), (1, 200), (64, 64), (17, 17)]
    lengths = [lengths[i] for i in rng.permutation(len(lengths))]
    ends = [np.cumsum([0, *(one[i] for one in lengths)]) for i in (0, 1)]
    options = {"sinks": np.array([0.5, -1.0], "f4"), "window": (40, 3), "softcap": 4.0}
    options |= {"bias": rng.standard_normal((2, 90, 60)).astype("f8" if op == "float64" else "f4")}
    options |= {"mask": np.ones((1, 1), bool)}
    slopes = rng.random((8, 2)).astype("f4")
    lens = {n: np.array([max(0, one[i] - 1) for one in lengths]) for i, n in
            enumerate(("q_lens", "kv_lens"))}  # fmt: skip
    problems, alone = [], []
    for b, (m, n) in enumerate(lengths):
        full = np.zeros((2, max(m, 90), max(n, 60)), options["bias"].dtype)
        full[:, :90, :60] = options["bias"]
        own = {**options, "bias": full[:, :m, :n], "alibi_slopes": slopes[b]}
        own |= {name: values[b : b + 1] for name, values in lens.items()}
        problems.append(Backward(rng, op, lengths=(m, n), dims=(63, 64), **own))
        alone.append(backward(backend, problems[b].forward, problems[b].more))
    *arrays, lse = (
        np.concatenate([p.forward[i][0] for p in problems], axis=1).copy() for i in range(6)
    )
    grad_lse = np.concatenate([p.more["grad_lse"][0] for p in problems], axis=1)
    given = [a.swapaxes(0, 1) for a in arrays]
    more = {**options, **lens, "alibi_slopes": slopes, "grad_lse": grad_lse, "return_dbias": True}
    more |= {"precision": "tf32"} if op == "tf32" else {}
    got = backward(backend, (*given, lse, *ends), more, cuattn.attention_backward_varlen)
    for name, end in zip(("dq", "dk", "dv"), (ends[0], ends[1], ends[1]), strict=True):
        for b, one in enumerate(alone):
            part = getattr(got, name)[end[b] : end[b + 1]].swapaxes(0, 1)
            assert bits([part]) == bits([getattr(one, name)[0]]), name
    for b, one in enumerate(alone):
        assert bits([got.dalibi_slopes[b]]) == bits([one.dalibi_slopes])
    close = {"float64": 1e-12, "float32": 1e-5}.get(op, 1e-3)
    np.testing.assert_allclose(
        got.dsinks, sum(one.dsinks for one in alone), rtol=0, atol=100 * close
    )
    dbias = np.zeros((2, 200, 200))
    for (m, n), one in zip(lengths, alone, strict=True):
        dbias[:, :m, :n] += one.dbias
    np.testing.assert_allclose(got.dbias, dbias[:, :90, :60], rtol=0, atol=10 * close)


def test_ends_that_are_wrong_stay_inside(backend, rng, monkeypatch):
    """Of device arrays nobody has read the values: results may be anything, accesses not."""
    monkeypatch.setattr(request_backward, "check_values", lambda *_: None)  # of the emulator's
    shapes = (40, 2, 64), (60, 1, 64), (60, 1, 64)
    q, k, v = (rng.standard_normal(shape).astype("f2") for shape in shapes)
    arrays, lse = [put(backend, a) for a in (q, q, k, v, q)], put(backend, np.zeros((2, 40), "f4"))
    sinks, bias = (put(backend, np.zeros(shape, "f4")) for shape in (2, (2, 40, 60)))
    for bad in ([-5, 70, 10], [10, 5, 2**40], [40, 0, 1]):
        ends = [put(backend, np.array(bad))] * 2
        for more in ({"sinks": sinks}, {"bias": bias, "return_dbias": True}):
            got = cuattn.attention_backward_varlen(*arrays, lse, *ends, **more)
            backend.asnumpy(got.dq)  # whatever has gone wrong by then


# ---- properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("op", TYPES)
def test_twice_is_the_same(backend, rng, op):
    """Bit by bit, in any order of blocks and threads."""
    options = any_options(rng, 2, 4, (70, 90), "float64" if op == "float64" else "float32")
    how = {"heads": (4, 2), "lengths": (70, 90), "dims": (63, 64)}
    problem = Backward(rng, op, batch=2, **how, **options)
    first = bits(backward(backend, problem.forward, problem.more))
    assert bits(backward(backend, problem.forward, problem.more)) == first
    if backend.runtime is not None:
        import emulator

        for seed in range(1, 5):
            with emulator.activate(backend.arch, int(os.environ["CUATTN_TEST_SEED"]) + seed):
                assert bits(backward(backend, problem.forward, problem.more)) == first


def test_sequences_do_not_meet(backend, rng):
    """Nor do key heads: the result of one does not depend on what it is computed beside."""
    problem = Backward(rng, batch=3, heads=(4, 2), **SMALL, is_causal=True)
    whole = backward(backend, problem.forward, problem.more)
    grad_lse = problem.more["grad_lse"]
    for b in range(3):
        cut = (slice(b, b + 1), slice(2, 4)), (slice(b, b + 1), slice(1, 2))
        arrays = [a[cut[a.shape[1] == 2]] for a in problem.forward]
        more = {"is_causal": True, "grad_lse": grad_lse[cut[0]]}
        got = backward(backend, arrays, more)
        assert bits(got[:3]) == bits(one[cut[one.shape[1] == 2]] for one in whole[:3])


@pytest.mark.parametrize("op", TYPES)
def test_what_nobody_sees_changes_nothing(backend, rng, op):
    """Bit by bit: zeros, NaN, infinities, anything, in keys and in rows of padding."""
    mask = rng.random((37, 83)) < 0.5
    mask[:, ::3] = False
    cases = [
        {"is_causal": True, "q_offset": 10},
        {"window": (15, 3)},  # leaves keys before those that are seen
        {"kv_lens": np.array([30]), "q_lens": np.array([21])},
        {"mask": mask, "bias": np.zeros((37, 83), "f8" if op == "float64" else "f4")},
    ]
    for how in cases:
        problem, results = Backward(rng, op, **(RULE if "mask" in how else SMALL), **how), []
        for arrays in with_other_fills(problem):
            results.append(tuple(bits(backward(backend, arrays, problem.more))))
        assert len(set(results)) == 1, how


@pytest.mark.parametrize("op", TYPES)
def test_nan_that_takes_part(backend, rng, op):
    """In a query it is in its dq and in keys that it sees; in a key, in queries that see it."""
    problem = Backward(rng, op, heads=(2, 2), **SMALL, is_causal=True)
    grad, q, k, v, y, lse = (np.where(np.isfinite(a), a, 0) for a in problem.forward)
    seen = problem.seen[0, 0]
    for index, name in ((0, "grad"), (1, "q")):
        arrays = [a.copy() for a in (grad, q, k, v, y, lse)]
        arrays[index][0, 0, 20, 3] = NAN
        got = backward(backend, arrays, problem.more)
        assert np.isnan(got.dq[0, 0, 20]).all(), name
        assert np.isnan(got.dk[0, 0, seen[20]]).any(axis=1).all(), name
        assert np.isfinite(got.dk[0, 1]).all() and np.isfinite(got.dq[0, 1]).all()
        assert np.isfinite(np.delete(got.dq[0, 0], 20, axis=0)).all()
    for index in (2, 3):
        arrays = [a.copy() for a in (grad, q, k, v, y, lse)]
        arrays[index][0, 0, 60, 3] = NAN
        got = backward(backend, arrays, problem.more)
        assert np.isnan(got.dq[0, 0, seen[:, 60]]).any(axis=1).all()
        assert np.isnan(got.dk[0, 0, 60]).all()
        assert np.isfinite(got.dq[0, 1]).all() and np.isfinite(got.dk[0, 1]).all()


@pytest.mark.parametrize("op", TYPES)
def test_scores_of_any_size(backend, rng, op):
    """Probabilities stay below 1 where lse holds no more than the size of huge scores."""
    verify(backend, rng, op, heads=(1, 1), **SMALL, spread=30.0)
    for low in (-1e9, -1e30, float(np.finfo(np.float32).min)):
        bias = np.zeros((37, 83), "f8" if op == "float64" else "f4")
        bias[:36:2, 5:] = low  # hides keys beside others
        bias[36] = low  # all keys of a query, which has no gradient: as if it were padding
        options = {"bias": bias, "mask": np.ones((1, 1), bool), "q_lens": np.array([36])}
        problem = Backward(rng, op, heads=(1, 1), **RULE, **options)
        grad, q, k, v, y, lse = (a.copy() for a in problem.forward)
        more = {**problem.more, "q_lens": None, "grad_lse": problem.more["grad_lse"].copy()}
        last = np.s_[..., 36, :]
        q[last], grad[last], y[last], lse[..., 36], more["grad_lse"][..., 36] = 1, 0, 0, low, 0
        problem.check_gradients(backward(backend, (grad, q, k, v, y, lse), more))
        grad[last] = y[last] = 1
        got = backward(backend, (grad, q, k, v, y, lse), more)
        assert all(np.isfinite(one).all() for one in got[:4])
    sinks = np.array([3000.0], np.float32)
    _, got = verify(backend, rng, op, heads=(1, 1), **SMALL, sinks=sinks)
    assert not any(one.any() for one in got[:3])


def test_central_differences(backend, rng):
    """Of the forward kernel's result and lse, through the backward kernels, in float64."""
    options = {"is_causal": True, "softcap": 3.0, "bias": rng.standard_normal((2, 9, 13))}
    options |= {"alibi_slopes": rng.random(2), "sinks": rng.standard_normal(2)}
    options |= {"mask": np.ones(1, bool)}
    shapes = (2, 9, 63), (1, 13, 63), (1, 13, 64)
    inputs = dict(zip("qkv", (rng.standard_normal(shape) for shape in shapes), strict=True))
    inputs |= {name: options.pop(name) for name in ("bias", "alibi_slopes", "sinks")}
    weights = rng.standard_normal((2, 9, 64)), rng.standard_normal((2, 9))

    def forward(inputs):
        arrays = {name: put(backend, a) for name, a in inputs.items()}
        q, k, v = (arrays.pop(name) for name in "qkv")
        return cuattn.attention(q, k, v, return_lse=True, **put_options(backend, options), **arrays)

    y, lse = forward(inputs)
    arrays = [put(backend, inputs[name]) for name in "qkv"]
    more = {n: put(backend, a) for n, a in inputs.items() if n not in "qkv"}
    got = cuattn.attention_backward(
        put(backend, weights[0]), *arrays, y, lse, grad_lse=put(backend, weights[1]),
        return_dbias=True, **put_options(backend, options), **more,
    )  # fmt: skip
    for (name, a), gradient in zip(inputs.items(), got[:6], strict=True):
        direction, h = rng.standard_normal(a.shape), 1e-5
        ends = []
        for sign in (1, -1):
            results = forward({**inputs, name: a + sign * h * direction})
            ends.append(sum(np.sum(w * backend.asnumpy(one))
                            for w, one in zip(weights, results, strict=True)))  # fmt: skip
        slope = (ends[0] - ends[1]) / (2 * h)
        np.testing.assert_allclose(np.sum(backend.asnumpy(gradient) * direction), slope, rtol=1e-7,
                                   atol=1e-8)  # fmt: skip


def test_dtypes_of_bias(backend, rng):
    """Whatever the dtype of the call; the gradient is rounded once, into that of the bias."""
    for op, dtype in (("float16", "float64"), ("float64", "bfloat16")):
        bias = rng.standard_normal((37, 1)).astype(dtype_of(dtype))
        _, got = verify(backend, rng, op, **SMALL, bias=bias)
        assert got.dbias.dtype == bias.dtype


@pytest.mark.parametrize("op", ["bfloat16", "float32"])
def test_weights_are_at_most_one(backend, rng, op):
    """Where an lse has no digits behind the point, too: no gradient exceeds a sum of its terms."""
    problem = Backward(rng, op, lengths=(37, 83), dims=(64, 64), grad_lse=False)
    grad, q, k, v, *_ = (a.astype(np.float64) for a in problem.forward)
    arrays = [a.astype(problem.q.dtype) for a in (q * 1e4, k * 1e5, v)]
    y, lse = cuattn.attention(*(put(backend, a) for a in arrays), return_lse=True)
    y, lse = map(backend.asnumpy, (y, lse))
    assert (abs(lse) > 1e8).all()
    got = backward(backend, (problem.given["grad"], *arrays, y, lse), {})
    assert all(np.isfinite(one).all() for one in got[:3])
    assert (
        abs(got.dv.astype(np.float64)) <= 1.01 * abs(grad).sum(axis=(1, 2))[:, None, None]
    ).all()
    k, v = (np.repeat(abs(a), q.shape[1] // a.shape[1], axis=1) for a in (arrays[1], v))
    sizes = abs(grad) @ np.swapaxes(v, 2, 3) + (abs(grad * y).sum(axis=3))[..., None]
    assert (abs(got.dq.astype(np.float64)) <= 1.01 * (sizes @ k) / math.sqrt(64)).all()
