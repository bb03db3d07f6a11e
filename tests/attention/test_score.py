"""Score expressions in attention and attention_varlen, on every backend, against float64."""

from __future__ import annotations

import contextlib
import re
import warnings

import numpy as np
import pytest
from attention_cases import OPS, Problem, call, precision_of, put_options, verify
from score_cases import expressions, some, some_arrays, uses
from test_check import OtherDevice
from tolerance import dtype_of

import cuattn
from cuattn import reference
from cuattn._device import runtime

LENGTHS = (37, 83)


def used(rng, number, batch=2, heads=4, columns=83):
    """One of the uses, as options."""
    case = [*uses(rng, batch, heads, columns)][number]
    return {"score": case.text, "score_args": case.arrays}


@pytest.mark.parametrize("number", range(5))
def test_uses(backend, rng, number):
    how = {"batch": 2, "heads": (4, 2), "lengths": LENGTHS}
    verify(backend, rng, **how, **used(rng, number))
    verify(backend, rng, **how, **used(rng, number), is_causal=True, window=(30, 2))


@pytest.mark.parametrize("op", [op for op in OPS if op != "float16"])
def test_dtypes(backend, rng, op):
    verify(backend, rng, op, batch=2, heads=(4, 1), lengths=(70, 83), **used(rng, 4))


@pytest.mark.parametrize("dims", [(128, 128), (59, 200)], ids=str)
def test_head_dims(backend, rng, dims):
    verify(backend, rng, heads=(2, 2), lengths=(21, 70), dims=dims, **used(rng, 4, 1, 2, 70))


def test_with_every_other_option(backend, rng):
    """The score is what all others have made of it, but for masks."""
    how = {"softcap": 3.0, "scale": -0.2, "is_causal": True, "q_offset": np.array([20, 70])}
    how |= {"mask": rng.random((2, 1, 37, 83)) < 0.7, "q_lens": np.array([30, 37])}
    how |= {"bias": rng.standard_normal((4, 37, 83)).astype(np.float32)}
    how |= {
        "alibi_slopes": rng.uniform(0, 0.2, 4).astype(np.float32),
        "kv_lens": np.array([60, 83]),
    }
    how |= {"sinks": rng.standard_normal(4).astype(np.float32)}
    score = {"score": "s * abs(s) + 0.01 * (h - b)"}
    verify(backend, rng, batch=2, heads=(4, 2), lengths=LENGTHS, **how, **score)


def test_few_queries_over_many_keys(backend, rng):
    """What would be computed by the decode kernel."""
    verify(backend, rng, heads=(2, 1), lengths=(1, 1100), **used(rng, 0, 1, 2, 1100))


def test_queries_that_see_nothing(backend, rng):
    """A score of -inf hides a key; 0 and -inf where it hides all of them."""
    options = {"score": "where(q % 3 == 0, -inf, where(k < 40, s, -inf))"}
    _, out, lse = verify(backend, rng, lengths=LENGTHS, q_offset=0, **options)
    assert not out[..., ::3, :].any() and np.isneginf(lse[..., ::3]).all()
    for sink in (None, np.zeros(2, np.float32)):
        verify(backend, rng, lengths=LENGTHS, score="s - inf", sinks=sink)


def test_nan_and_infinity(backend, rng):
    """Of a score, in the rows that see it and no others."""
    problem = Problem(rng, "float32", heads=(1, 1), lengths=(20, 30))
    for value in (np.nan, np.inf):
        how = put_options(backend, {"score_args": {"t": np.array(value)}, "q_offset": 0})
        how["score"] = "where((q == 15) & (k == 3), t, s)"
        out, lse = call(backend, problem.arrays, {}, return_lse=True, **how)
        assert np.isnan(out[0, 0, 15]).all() and not np.isfinite(lse[0, 0, 15])
        assert np.isfinite(np.delete(out, 15, axis=2)).all()


@pytest.mark.parametrize("op", ["float16", "float32", "float64"])
def test_large_scores(backend, rng, op):
    """Masks of other libraries: what is added to all scores of a query changes nothing."""
    x = np.ones((5, 8), dtype_of(op))
    for most in (1e4, 1e9, 1e30, 3e38):
        args = {"score_args": {"m": np.array(most)}}
        options = {"score": "where(k // 32 == q // 32, s, -m)", "q_offset": 0, **args}
        verify(backend, rng, op, heads=(1, 1), lengths=(70, 83), **options)
        np.testing.assert_array_equal(call(backend, (x, x, x), {"score": "0 * s - m", **args}), x)


def test_finite_numbers_stay_finite(backend):
    """Also those of float64 that float32 does not hold."""
    x = np.ones((1, 1, 4, 8), np.float32)
    for options in (
        {"score": "s - 1e300"},
        {"score": "s - t[k]", "score_args": {"t": np.full(4, 1e300)}},
    ):
        np.testing.assert_array_equal(call(backend, (x, x, x), options), x)


def test_floats_are_those_of_the_accumulator(backend):
    """Also on NumPy, where queries that float32 does not hold are computed in float64."""
    x = np.ones((1, 1, 4, 8), np.float32)
    out = call(backend, (x, x / 32, x), {"score": "1e300 / s - inf"})
    assert np.isnan(out).all()


def test_varlen(backend, rng):
    """b, q and k count in each sequence; arrays need not be of a size with anything."""
    ends_q, ends_k = np.array([0, 17, 17, 90, 91]), np.array([0, 40, 47, 120, 135])
    q, k, v = (
        rng.standard_normal((n, h, 64)).astype(np.float16) for n, h in ((91, 4), (135, 2), (135, 2))
    )
    how = used(rng, 4, 4, 4, 60) | {"is_causal": True, "kv_lens": np.array([33, 7, 73, 9])}
    for more in ({}, {"q_offset": np.array([5, 0, 0, 3])}):
        options = put_options(backend, how | more)
        arrays = [backend.asarray(a) for a in (q, k, v, ends_q, ends_k)]
        out = backend.asnumpy(cuattn.attention_varlen(*arrays, **options))
        ref = reference.attention_varlen(q, k, v, ends_q, ends_k, **how, **more)
        np.testing.assert_allclose(out.astype(float), ref.astype(float), atol=4e-3)
    assert backend.ran()


def test_many_short_sequences(backend, rng):
    """Those of equal lengths, from all over the batch, are computed together."""
    lengths = rng.integers(1, 4, 40)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    x = rng.standard_normal((ends[-1], 2, 8)).astype(np.float32)
    how = {"score": "s + t[b, h] * k", "score_args": {"t": rng.standard_normal((40, 2))}}
    arrays = [backend.asarray(a) for a in (x, x, x, ends, ends)]
    out = backend.asnumpy(cuattn.attention_varlen(*arrays, **put_options(backend, how)))
    ref = reference.attention_varlen(x, x, x, ends, ends, **how)
    np.testing.assert_allclose(out, ref, atol=1e-5)


def test_random_expressions(backend, rng):
    """Against the formula in float64: of any size, and where they are equal, rounding decides."""
    x = [rng.standard_normal((2, 2, n, 16)) for n in (9, 20, 20)]
    count = 2 if backend.runtime or backend.on_device else 12
    for case in some(expressions(some_arrays(rng)), count, f"scores by {backend.name}"):
        options = {"score": f"tanh({case.text}) + s", "score_args": case.arrays}
        out, lse = call(backend, x, options, return_lse=True)
        ref, ref_lse = reference.attention(*x, return_lse=True, **options)
        np.testing.assert_allclose(out, ref, atol=1e-12)
        np.testing.assert_allclose(lse, ref_lse, atol=1e-12)


@pytest.mark.parametrize("op", [op for op in OPS if op != "float64"])
def test_random_expressions_by_numpy_and_kernels(backend, rng, op):
    """Of exact scores they are the same in the accumulator, whatever hangs on their last bits."""
    if backend.name == "numpy":
        pytest.skip("it is what kernels are compared with")
    dtype, precision = precision_of(op)
    x = [rng.integers(-2, 3, (2, 2, n, 16)).astype(dtype_of(dtype)) for n in (9, 20, 20)]
    (case,) = some(expressions(some_arrays(rng)), 1, f"{op} by {backend.name}")
    score = f"tanh({case.text}) + s"
    options = {"score": score, "score_args": case.arrays, "dtype": np.float32}
    out, lse = call(backend, x, options, return_lse=True, precision=precision)
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, runtime, "emulator", runtime.emulator)
        runtime.emulator = None
        ref, ref_lse = cuattn.attention(*x, return_lse=True, precision=precision, **options)
    weights = {"float32": 2e-6, "bfloat16": 2.0**-9}.get(op, 2.0**-11)  # how they are rounded
    sums = weights if op == "tf32" else 2e-6
    np.testing.assert_allclose(out, ref, atol=2.1 * weights, err_msg=score)
    np.testing.assert_allclose(lse, ref_lse, rtol=1e-6, atol=sums, err_msg=score)


# ---- Calls ----


def test_out_may_not_overlap_the_arrays(backend):
    x = backend.asarray(np.ones((1, 1, 3, 8), np.float32))
    t = backend.asarray(np.ones((3, 8), np.float32))
    for _ in range(2):  # the second call may be remembered
        out = cuattn.attention(x, x, x, score="s + t[q, k]", score_args={"t": t}, out=x + 1)
        assert (backend.asnumpy(out) == 1).all()
        with pytest.raises(ValueError, match=r"^out must .*score_args\['t'\]"):
            cuattn.attention(x, x, x, score="s + t[q, k]", score_args={"t": t}, out=t[None, None])


def test_warm_calls_read_their_own_arrays(backend, rng):
    """Other contents, other arrays, other names and texts."""
    x = backend.asarray(rng.standard_normal((1, 1, 3, 8)).astype(np.float32))
    v = backend.asarray(np.broadcast_to(np.arange(3, dtype=np.float32)[:, None], (1, 1, 3, 8)))
    for _ in range(3):
        for which in (1, 2):
            for name in ("t", "u"):
                t, place = np.full(3, 9), rng.integers(3)
                t[place] = which
                args = {name: backend.asarray(t)}
                score = f"where({name}[k] == {which}, s, -inf)"
                got = cuattn.attention(x, x, v, score=score, score_args=args)
                np.testing.assert_allclose(backend.asnumpy(got), place, rtol=1e-6)


def test_arrays_of_other_libraries_and_devices(backend):
    x = backend.asarray(np.ones((2, 8), np.float32))
    other = np.ones(2) if backend.on_device else OtherDevice()
    with pytest.raises(TypeError, match=r"^score_args\['t'\] must be .*array"):
        cuattn.attention(x, x, x, score="s + t[k]", score_args={"t": other})


def test_one_kernel_for_all_shapes(rng):
    """Sizes and strides are numbers of a launch; a text of the same steps is the same, too."""
    import emulator

    with emulator.activate(arch="sm_80") as runtime:
        for size, score in ((3, "s + t[q, k]"), (9, "s+t[ q,k ]")):
            q = rng.standard_normal((1, 2, size + 1, 64)).astype(np.float16)
            t = rng.standard_normal((size, 2 * size)).astype(np.float32)[:, ::2]
            cuattn.attention(q, q, q, score=score, score_args={"t": t})
        cuattn.attention(q, q, q, score="s - t[q, k]", score_args={"t": t})
    names = [kernel.name for kernel in runtime.kernels]
    assert names[0] == names[1] != names[2]


def test_kernels_can_be_compiled_ahead(monkeypatch):
    from cuattn._device import cache

    asked = []
    monkeypatch.setattr(cache, "load_or_compile", lambda *kernel, always: asked.append(kernel))
    q = np.zeros((1, 2, 64, 64), np.float16)
    with cuattn.compile(arch=80) as names:
        cuattn.attention(q, q, q, score="s + 1")
    ((header, name, arch, text),) = asked
    assert header == "attention/forward.cuh" and names == [name] and arch == "sm_80"
    assert f"struct {re.search('Score_[0-9a-f]{16}', name)[0]} {{" in text


@pytest.mark.host("warnings of NumPy")
def test_nothing_warns():
    x = np.ones((2, 8), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for score in ("s + 1e300", "s / 0", "s + 1 // 0", f"s + {2**62} * 4", "log(-s)"):
            cuattn.attention(x, x, x, score=score)
