"""Gradients of attention with a score expression: its derivative, and what is made of it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from attention_backward_cases import backward, verify
from hypothesis import given
from score_cases import Case, Smooth, examples, expressions, some_arrays, uses
from tolerance import dtype_of

import cuattn
from cuattn import reference
from cuattn._attention.numpy_score import Score
from cuattn.reference._dual import Dual, as_dual
from cuattn.reference._score import score_of

QUERIES, KEYS = 7, 40


def derived(case, s, acc=np.float64):
    """What an expression makes of scores (QUERIES, KEYS), and its derivative, by NumPy."""
    arrays = tuple(array for _, array in sorted(case.arrays.items()))
    zero = np.zeros((1, 1, 1, 1, 1), np.int64)
    score = Score(case.expression, arrays, zero, zero, np.dtype(acc))
    y = s.astype(acc).reshape(1, 1, 1, *s.shape)
    chain = np.empty_like(y)
    with np.errstate(all="ignore"):
        score.change(y, 0, slice(0, s.shape[1]), {None: chain})
    return y.reshape(s.shape), chain.reshape(s.shape)


# ---- The derivative ----


def test_derivatives_are_slopes(rng):
    """Central differences, where two of them agree and there is no kink; and the reference's, which
    are found another way."""
    arrays, s, checked = some_arrays(rng), rng.standard_normal((QUERIES, KEYS)), 0

    @examples(300, "slopes")
    @given(expressions(arrays, Smooth))
    def compare(case):
        nonlocal checked
        (rounded, found), wide = derived(case, s), s.astype(np.longdouble)  # digits that cancel
        y = derived(case, wide, np.longdouble)[0]
        with np.errstate(all="ignore"):
            (far, near) = (
                [(derived(case, wide + h, np.longdouble)[0] - y) / h for h in (step, -step)]
                for step in (2e-5, 1e-5)
            )
            slope = (4 * (near[0] + near[1]) - (far[0] + far[1])) / 6
            off = sum(abs(one - slope) for one in (*far, *near))
        smooth = (off < 1e-3 * (1 + abs(slope))) & (abs(rounded) < 1e3)
        grid = 0, 0, np.arange(QUERIES)[:, None], np.arange(KEYS)
        with np.errstate(all="ignore"):
            own = as_dual(score_of(case.text, case.arrays)(Dual(s, 1.0), *grid)).d
        own = np.broadcast_to(0 if own is None else own, s.shape)
        np.testing.assert_allclose(found[smooth], own[smooth], rtol=1e-9, atol=1e-9)
        smooth &= np.isfinite(own)  # it may be made of what overflows
        smooth &= not re.search(r"1e300|\d{19}", case.text)  # beside these s has no digits
        np.testing.assert_allclose(found[smooth], slope[smooth], rtol=1e-5, atol=1e-5)
        checked += np.count_nonzero(smooth & (slope != 0))

    compare()
    assert checked > 10 * QUERIES * KEYS


@pytest.mark.parametrize(
    ("text", "s", "slope"),
    [
        ("abs(s)", [-2.0, 0.0, 3.0], [-1, 1, 1]),
        ("min(s, 1.0)", [0.0, 1.0, 2.0], [1, 1, 0]),
        ("max(1.0, s)", [0.0, 1.0, 2.0], [0, 0, 1]),
        ("where(s > 1, log(s), 0.0)", [-1.0, 0.0, 2.0], [0, 0, 0.5]),
        ("where(k == 1, -inf, s)", [1.0, 1.0, 1.0], [1, 0, 1]),
        ("log(s)", [0.0, 0.5, 1.0], [0, 2, 1]),  # of -inf it is 0
        ("s + where(k == 1, inf, 2.0)", [1.0, 1.0, 1.0], [1, 1, 1]),
        ("2.0 * k", [1.0, 1.0, 1.0], [0, 0, 0]),
        ("tanh(s)", [0.0, 20.0, 400.0], [1, 4 * np.exp(-40), 0]),  # 1 - tanh^2 would be 0
        ("s * s / (1 - s)", [0.0, 0.5, 2.0], [0, 3, 0]),
        ("s / (1 + exp(-s))", [-800.0, 0.0, 800.0], [0, 0.5, 1]),
        ("exp(-exp(s))", [-800.0, 0.0, 800.0], [0, -np.exp(-1), 0]),
    ],
)
def test_derivatives(text, s, slope):
    """At kinks and beside infinities."""
    np.testing.assert_allclose(derived(Case(text, {}), np.array([s]))[1][0], slope, rtol=1e-14)


# ---- attention_backward ----


def used(rng, number, batch=2, heads=4, columns=83):
    """One of the uses, as options."""
    case = [*uses(rng, batch, heads, columns)][number]
    return {"score": case.text, "score_args": case.arrays}


def others(rng, bias="float32"):
    """Every other option of scores."""
    return {
        "softcap": 3.0,
        "is_causal": True,
        "bias": rng.standard_normal((4, 37, 83)).astype(dtype_of(bias)),
        "alibi_slopes": rng.uniform(0, 0.2, (2, 4)).astype(np.float32),
        "sinks": rng.standard_normal(4).astype(np.float32),
    }


SIZES = {"batch": 2, "heads": (4, 2), "lengths": (37, 83)}


@pytest.mark.parametrize("number", [1, 3])
def test_uses(backend, rng, number):
    """The mask too, in whose tiles keys that nobody sees are poison."""
    mask = rng.random((2, 1, 37, 83)) < 0.6
    mask[..., 5::9] = False
    verify(backend, rng, **SIZES, **used(rng, number), mask=mask)


@pytest.mark.parametrize("op", ["float16", "float64"])
def test_with_every_other_option(backend, rng, op):
    """dbias and dalibi_slopes have the derivative of the expression, not that of the softcap."""
    score = {"score": "0.5 * s * s + t[h, q - k] * s", "score_args": {"t": np.eye(4, 9)}}
    verify(backend, rng, op, **SIZES, **others(rng), **score)


def test_varlen(backend, rng):
    """b, q and k count in each sequence."""
    ends_q, ends_k = np.array([0, 17, 17, 90, 91]), np.array([0, 40, 47, 120, 135])
    x = [rng.standard_normal((n, h, 64)) for n, h in ((91, 4), (91, 4), (135, 2), (135, 2))]
    grad, *arrays = (a.astype(np.float32) for a in x)
    how = used(rng, 4, 4, 4, 60) | {"is_causal": True, "kv_lens": np.array([33, 7, 73, 9])}
    y, lse = reference.attention_varlen(*arrays, ends_q, ends_k, **how, return_lse=True)
    given = grad, *arrays, y.astype(np.float32), lse.astype(np.float32), ends_q, ends_k
    got = backward(backend, given, how, cuattn.attention_backward_varlen)
    ref = reference.attention_backward_varlen(*given, **how)
    for one, want in zip(got[:3], ref[:3], strict=True):
        np.testing.assert_allclose(one, want, rtol=1e-4, atol=1e-5)


def test_the_reference_by_central_differences(rng):
    """All six gradients, of the forward's own formula."""
    how = {"score": "s * tanh(s) - t[b, k] * s", "score_args": {"t": rng.standard_normal((2, 7))}}
    how |= {"softcap": 4.0, "is_causal": True}
    shapes = (2, 2, 5, 3), (2, 1, 7, 3), (2, 1, 7, 2), (2, 5, 7), (2,), (2,)
    names = "q", "k", "v", "bias", "alibi_slopes", "sinks"
    x = {name: rng.standard_normal(shape) for name, shape in zip(names, shapes, strict=True)}
    grad, grad_lse = rng.standard_normal((2, 2, 5, 2)), rng.standard_normal((2, 2, 5))

    def forward(q, k, v, **more):
        return reference.attention(q, k, v, **how, **more, return_lse=True)

    y, lse = forward(**x)
    more = {name: x[name] for name in names[3:]} | how
    found = reference.attention_backward(
        grad, x["q"], x["k"], x["v"], y, lse, **more, grad_lse=grad_lse, return_dbias=True
    )
    for name, d in zip(names, found[:6], strict=True):
        direction = rng.standard_normal(d.shape)
        sums = []
        for step in (1e-5, -1e-5):
            out, own = forward(**x | {name: x[name] + step * direction})
            sums.append(np.sum(out * grad) + np.sum(own * grad_lse))
        slope = (sums[0] - sums[1]) / 2e-5
        assert abs(slope - np.sum(d * direction)) < 1e-6 * (1 + abs(slope)), name


# ---- Calls ----


def test_calls(backend, rng):
    """Warm calls read their own arrays, and no result may overlap them."""
    x = rng.standard_normal((1, 1, 3, 64)).astype(np.float32)
    for _ in range(3):
        t = rng.standard_normal((3, 3)).astype(np.float32)
        score = "s * t[q, k] + 1 / (1 + exp(s + 200.0 * (k - 1)))"  # 0, or at rest, but for k = 1
        how = {"score": score, "score_args": {"t": t}}
        y, lse = reference.attention(x, x, x, **how, return_lse=True)
        given = x, x, x, x, y.astype(np.float32), lse.astype(np.float32)
        got, ref = backward(backend, given, how), reference.attention_backward(*given, **how)
        np.testing.assert_allclose(got.dq, ref.dq, atol=1e-4)
        np.testing.assert_allclose(got.dk, ref.dk, atol=1e-4)
    place = backend.asarray(np.zeros((3, 3, 64), np.float32))
    arrays = [backend.asarray(a) for a in given]
    with pytest.raises(ValueError, match=r"^out.* must .*score_args\['t'\]"):
        cuattn.attention_backward(
            *arrays,
            score="s * t[q, k, 0]",
            score_args={"t": place},
            out=(place[None, :1], *arrays[:2]),
        )
    with pytest.raises(ValueError, match=r"^score must .* at column 5"):
        cuattn.attention_backward(*arrays, score="s + u")
