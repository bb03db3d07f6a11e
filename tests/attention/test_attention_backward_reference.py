"""The reference of attention_backward: against differences of the forward's, and every rule."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from attention_cases import INF, NAN, any_options
from test_attention_reference import draw

from cuattn import reference

GRADIENTS = {"q": "dq", "k": "dk", "v": "dv", "bias": "dbias"}
GRADIENTS |= {"alibi_slopes": "dalibi_slopes", "sinks": "dsinks"}
H = 1e-5  # of differences, whose error is some H ** 2 and 1e-16 / H


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Loss:
    """A sum of out and lse with random weights, which are their gradients."""

    def __init__(self, rng, q, k, v, *ends, **options):
        self.ends, self.options = ends, options
        named = {"q": q, "k": k, "v": v, **options}
        self.arrays = {n: named[n] for n in GRADIENTS if named.get(n) is not None}
        kind = "_varlen" if ends else ""
        self.forward = getattr(reference, f"attention{kind}")
        y, lse = self.call()
        self.grad, self.grad_lse = rng.standard_normal(y.shape), rng.standard_normal(lse.shape)
        more = {"grad_lse": self.grad_lse, "return_dbias": "bias" in self.arrays}
        self.gradients = getattr(reference, f"attention_backward{kind}")(
            self.grad, q, k, v, y, lse, *ends, **more, **options
        )

    def call(self, **changed):
        arrays = {**self.arrays, **changed}
        q, k, v = (arrays.pop(name) for name in "qkv")
        return self.forward(q, k, v, *self.ends, return_lse=True, **{**self.options, **arrays})

    def difference(self, steps):
        """The central difference in the direction of `steps`."""
        values = []
        for sign in (1, -1):
            y, lse = self.call(**{n: self.arrays[n] + sign * H * d for n, d in steps.items()})
            y, lse = y * self.grad, np.where(np.isfinite(lse), lse, 0) * self.grad_lse
            values.append(y.sum() + lse.sum())
        return (values[0] - values[1]) / (2 * H)

    def check(self, rng):
        """In a random direction of each array, and of all at once."""
        steps = {n: rng.standard_normal(a.shape) for n, a in self.arrays.items()}
        for some in (steps, *({n: d} for n, d in steps.items())):
            wanted, size = 0.0, 1.0
            for n, d in some.items():
                terms = getattr(self.gradients, GRADIENTS[n]) * d
                wanted, size = wanted + terms.sum(), size + abs(terms).sum()
            assert abs(self.difference(some) - wanted) < 1e-7 * size, [*some]


def of_shape(*shape):
    return lambda rng: rng.standard_normal(shape)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (2, 1)},
    "window to the left": {"window": (3, None)},
    "offsets": {"is_causal": True, "q_offset": np.array([-3, 4])},
    "scale": {"scale": -0.7},
    "no scale": {"scale": 0.0},
    "softcap": {"softcap": 1.5},
    "slopes": {"alibi_slopes": of_shape(4)},
    "slopes of sequences": {"alibi_slopes": of_shape(2, 4), "q_offset": 3},
    "sinks": {"sinks": of_shape(4)},
    "lengths": {"q_lens": np.array([5, 7]), "kv_lens": np.array([9, 4]), "sinks": of_shape(4)},
    "mask": {"mask": lambda rng: rng.random((2, 4, 7, 9)) < 0.3, "sinks": of_shape(4)},
    **{f"bias {shape}": {"bias": of_shape(*shape), "sinks": of_shape(4)} for shape in
       [(2, 4, 7, 9), (1, 4, 7, 9), (4, 1, 9), (7, 9), (7, 1), (2, 1, 1, 1), ()]},
}  # fmt: skip


def drawn(rng, options):
    return {n: make(rng) if callable(make) else make for n, make in options.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_differences(rng, name):
    Loss(rng, *draw(rng, (7, 9)), **drawn(rng, OPTIONS[name])).check(rng)


@pytest.mark.parametrize("how", [{"lengths": (11, 6)}, {"heads": (4, 1)}, {"heads": (3, 3)},
                                 {"dims": (1, 8)}, {"batch": 1}], ids=str)  # fmt: skip
def test_differences_of_all_options(rng, how):
    how = {"lengths": (7, 9), "heads": (4, 2), "batch": 2} | how
    options = any_options(rng, how["batch"], how["heads"][0], how["lengths"], bias="float64")
    Loss(rng, *draw(rng, **how), **options).check(rng)


@pytest.mark.parametrize("lengths", [(1, 1), (2, 3), (3, 2)])
def test_differences_of_each_element(rng, lengths):
    options = {"softcap": 2.0, "is_causal": True, "bias": rng.standard_normal((2, *lengths))}
    options |= {"alibi_slopes": rng.random(2), "sinks": rng.standard_normal(2)}
    loss = Loss(rng, *draw(rng, lengths, 1, (2, 1), (2, 2)), **options)
    for name, array in loss.arrays.items():
        for i in np.ndindex(array.shape):
            step = np.zeros(array.shape)
            step[i] = 1
            wanted = getattr(loss.gradients, GRADIENTS[name])[i]
            assert abs(loss.difference({name: step}) - wanted) < 1e-8, (name, i)


@pytest.mark.parametrize("shape", [(4, 1, 5, 6), (2, 6, 4), (20, 20), (1, 1, 1, 5), (4, 2, 1, 1)])
def test_differences_of_sequences(rng, shape):
    """Also where a bias has less or more than a sequence, or one value for all."""
    ends_q, ends_k = np.array([0, 4, 4, 5, 12]), np.array([0, 3, 9, 9, 20])
    q, k = rng.standard_normal((12, 2, 5)), rng.standard_normal((20, 1, 5))
    options = {"is_causal": True, "window": (4, 1), "softcap": 3.0, "sinks": rng.random(2)}
    options |= {"mask": rng.random((4, 1, 5, 9)) < 0.7, "bias": rng.standard_normal(shape)}
    options |= {"alibi_slopes": rng.random((4, 2)), "q_offset": np.array([1, 0, -1, 2])}
    options |= {"q_lens": np.array([3, 0, 1, 7]), "kv_lens": np.array([3, 5, 0, 10])}
    v = rng.standard_normal((20, 1, 3))
    Loss(rng, q, k, v, ends_q, ends_k, **options).check(rng)


def test_identities(rng):
    """Of a row of dbias, of the scale, and of what each key is given."""
    q, k, v = draw(rng)
    options = {"softcap": 3.0, "bias": rng.standard_normal((2, 4, 7, 11)), "sinks": rng.random(4)}
    loss = Loss(rng, q, k, v, scale=0.4, **options)
    dq, dk, _, dbias, *_ = loss.gradients
    y, lse = loss.call()
    p_sink, d = np.exp(options["sinks"][:, None] - lse), (loss.grad * y).sum(axis=3)
    np.testing.assert_allclose(
        dbias.sum(axis=3), p_sink * d + (1 - p_sink) * loss.grad_lse, atol=1e-13
    )
    loss.options["scale"] = 0.4 + H
    more = sum((a * b).sum() for a, b in zip(loss.call(), (loss.grad, loss.grad_lse), strict=True))
    loss.options["scale"] = 0.4 - H
    less = sum((a * b).sum() for a, b in zip(loss.call(), (loss.grad, loss.grad_lse), strict=True))
    for a, da in ((q, dq), (k, dk)):
        np.testing.assert_allclose(
            (a * da).sum() / 0.4, (more - less) / (2 * H), rtol=1e-6, atol=1e-6
        )
    y, lse = reference.attention(q, k, v, window=(0, 0), return_lse=True)  # one key a query
    dv = reference.attention_backward(np.ones(y.shape), q, k, v, y, lse, window=(0, 0)).dv
    np.testing.assert_array_equal(dv[0, 0, :, 0], 2.0 * (np.arange(11) >= 4))


def test_capped_scores_keep_the_digits_of_their_derivative():
    """``1 - tanh(x) ** 2`` is 0 from x = 19 on."""
    q, k, v = np.ones((1, 1)), np.array([[25.0], [-25.0]]), np.array([[1.0], [3.0]])
    options = {"scale": 1.0, "softcap": 1.0, "bias": np.zeros((1, 2))}
    y, lse = reference.attention(q, k, v, return_lse=True, **options)
    got = reference.attention_backward(q, q, k, v, y, lse, return_dbias=True, **options)
    np.testing.assert_allclose(got.dk[:, 0], got.dbias[0] / np.cosh(25) ** 2, rtol=1e-14)


def test_what_nobody_sees_changes_nothing(rng):
    """Keys that no query sees, padding, and all that comes in for it: bit by bit, and zeros."""
    q, k, v = draw(rng, (6, 8), 2)
    lens = {"q_lens": np.array([4, 6]), "kv_lens": np.array([5, 8])}
    options = lens | {"mask": np.arange(8) != 2, "sinks": np.ones(4)}
    y, lse = reference.attention(q, k, v, return_lse=True, **options)
    grad, grad_lse = rng.standard_normal(y.shape), rng.standard_normal(lse.shape)
    want = reference.attention_backward(grad, q, k, v, y, lse, grad_lse=grad_lse, **options)
    for a in (k, v):
        a[0, :, 5:] = a[:, :, 2] = NAN
    for a in (q, grad, y, lse, grad_lse):
        a[0, :, 4:] = NAN
    got = reference.attention_backward(grad, q, k, v, y, lse, grad_lse=grad_lse, **options)
    for one, other in zip(got, want, strict=True):
        assert one is other is None or one.tobytes() == other.tobytes()
    for one in (got.dk, got.dv):
        assert not one[0, :, 5:].any() and not one[:, :, 2].any()
    assert not got.dq[0, :, 4:].any()


@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_seen_propagates(rng, value):
    """NaN in a row of grad or v: to what depends on it, and to nothing else."""
    q, k, v = draw(rng, (4, 6), 1, (1, 1))
    seen = np.arange(6) <= np.arange(4)[:, None] + 1
    options = {"is_causal": True, "q_offset": 1}
    y, lse = reference.attention(q, k, v, return_lse=True, **options)
    grad = rng.standard_normal(y.shape)
    grad[0, 0, 2] = value
    dq, dk, dv, *_ = reference.attention_backward(grad, q, k, v, y, lse, **options)
    assert (np.isfinite(dq[0, 0]).all(axis=1) == (np.arange(4) != 2)).all()
    for d in (dk, dv):
        assert (np.isfinite(d[0, 0]).all(axis=1) == ~seen[2]).all()
    grad[0, 0, 2] = 1
    for dirty in (q, k):
        dirty[0, 0, 3] = NAN
        dq, dk, dv, *_ = reference.attention_backward(grad, q, k, v, y, lse, **options)
        rows = seen[:, 3] if dirty is k else np.arange(4) == 3
        assert (np.isfinite(dq[0, 0]).all(axis=1) == ~rows).all()
        dirty[0, 0, 3] = 1


def test_no_visible_key(rng):
    q, k, v = draw(rng, (3, 4))
    for options in ({"mask": np.zeros((3, 4), bool)}, {"bias": np.full((3, 4), -INF)}):
        y, lse = reference.attention(q, k, v, return_lse=True, **options)
        more = {"grad_lse": np.full(lse.shape, NAN), "return_dbias": "bias" in options}
        got = reference.attention_backward(np.ones(y.shape), q, k, v, y, lse, **more, **options)
        assert not any(one is not None and one.any() for one in got)


# ---- layouts and outputs -------------------------------------------------------------------------


def test_layouts_and_dimensions(rng):
    q, k, v = draw(rng)
    options = {"is_causal": True, "bias": rng.standard_normal((4, 7, 11)), "return_dbias": True}
    y, lse = reference.attention(q, k, v, is_causal=True, bias=options["bias"], return_lse=True)
    arrays = rng.standard_normal(y.shape), q, k, v, y
    want = reference.attention_backward(*arrays, lse, **options)
    swapped = [a.swapaxes(1, 2) for a in arrays]
    got = reference.attention_backward(*swapped, lse, layout="BSHD", **options)
    for one, other in zip(got[:3], want[:3], strict=True):
        np.testing.assert_array_equal(one, other.swapaxes(1, 2))
    np.testing.assert_array_equal(got.dbias, want.dbias)
    total = np.zeros_like(want.dbias)
    for b in range(2):
        got = reference.attention_backward(*(a[b] for a in arrays), lse[b], **options)
        for one, other in zip(got[:3], want[:3], strict=True):
            np.testing.assert_array_equal(one, other[b])
        total += got.dbias
    np.testing.assert_allclose(total, want.dbias, atol=1e-13)
    h = [3, 3, 1, 1, 3]
    two = [a[1, i] for a, i in zip(arrays, h, strict=True)]
    one = {**options, "bias": options["bias"][3]}
    got = reference.attention_backward(*two, lse[1, 3], layout="BSHD", **one)
    np.testing.assert_allclose(got.dq, want.dq[1, 3], atol=1e-13)


def test_out_and_dtypes(rng):
    """float64 of all but wider; what is given is written; integers have no gradient."""
    arrays = draw(rng)
    options = {"alibi_slopes": np.ones(4, int), "sinks": np.ones(4, np.float32)}
    options |= {"bias": np.zeros((7, 11), np.float32)}
    y, lse = reference.attention(*arrays, return_lse=True, **options)
    want = reference.attention_backward(y, *arrays, y, lse, return_dbias=True, **options)
    assert want.dalibi_slopes is None and want.dsinks.dtype == want.dbias.dtype == np.float64
    assert reference.attention_backward(y, *arrays, y, lse, **options).dbias is None
    outs = tuple(np.empty(one.shape, np.float32) for one in want[:4])
    got = reference.attention_backward(y, *arrays, y, lse, return_dbias=True, out=outs, **options)
    for one, out, other in zip(got, outs, want, strict=False):
        assert one is out
        np.testing.assert_array_equal(out, other.astype(np.float32))
    wide = [a.astype(np.longdouble) for a in arrays]
    got = reference.attention_backward(y, *wide, y, lse, return_dbias=True, **options)
    assert {one.dtype for one in got if one is not None} == {np.dtype(np.longdouble)}
