"""attention_topk on every backend: keys and their order by the reference, values to rounding."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from attention_cases import (
    INF,
    NAN,
    OPS,
    Problem,
    any_options,
    arranged,
    naive_scores,
    put,
    put_options,
)
from cases import LAYOUTS, check_outs
from tolerance import assert_close, dtype_of, exact, lse_dtype

import cuattn
from cuattn import SoftmaxTopK, SoftmaxTopKState, reference

OUTPUTS = ("prob", "log_prob", "logit", "state")


class Ranked(Problem):
    """A problem whose values do not count. `ties`: scores are exact, and many of them equal."""

    def __init__(self, rng, op="float16", ties=False, spread=1.0, **how):
        super().__init__(rng, op, spread=spread, **how)
        self.options.pop("sinks", None)
        self.ties = ties
        if ties:
            self.options.setdefault("scale", 0.5)
            self.clean = tuple(rng.integers(-1, 2, a.shape).astype(a.dtype) for a in self.clean)
            self.hide()

    @functools.cached_property
    def scores(self):
        """In the widest float, hidden ones -inf, NaN where there is one."""
        arrays = [exact(a) if self.op == "float64" else a for a in self.arrays[:2]]
        columns = self.shape[3]
        best = reference.attention_topk(*arrays, columns, output="logit", **self.options)
        found = np.full((*best.indices.shape[:3], columns + 1), -INF, best.values.dtype)
        np.put_along_axis(found, best.indices, best.values, -1)  # -1: the place behind the last
        return found[..., :columns]

    @np.errstate(all="ignore")
    def check(self, got, num, output="prob", index_offset=0):
        """Results in the layout BHSD, with all axes."""
        assert type(got) is (SoftmaxTopKState if output == "state" else SoftmaxTopK)
        *stats, values, indices = got
        acc = lse_dtype(self.q.dtype)
        assert values.dtype == (acc if stats else self.q.dtype) and indices.dtype == np.int64
        assert values.shape == indices.shape == (*self.shape[:3], num)
        want = reference.attention_topk(
            *self.arrays[:2], num, output="state", index_offset=index_offset, **self.options
        )
        np.testing.assert_array_equal(indices == -1, want.indices == -1)
        columns = np.where(indices == -1, -1, indices - index_offset)
        s = np.concatenate([self.scores, np.full_like(self.scores[..., :1], -INF)], -1)
        chosen = np.take_along_axis(s, columns, -1)
        clean = [np.where(h[..., None], 0, x).astype(x.dtype)
                 for h, x in zip(self.hidden[:2], self.clean, strict=False)]  # fmt: skip
        plain = naive_scores(*clean, self.op, **self.options)
        plain_s = np.where(np.isneginf(self.scores), -INF, plain.s)
        finite = np.isfinite(self.scores)
        size = np.where(finite, abs(self.scores) + 2 * plain.strayed, 0)
        error = np.max(abs(plain_s - self.scores), initial=0, where=finite)
        error += np.finfo(acc).eps * size.max(initial=0)
        if self.ties:
            np.testing.assert_array_equal(indices, want.indices)
        else:  # others may have been chosen, with scores as large to rounding, and none twice
            best = np.sort(np.where(np.isnan(self.scores), -INF, self.scores))[..., ::-1][..., :num]
            real = np.isfinite(chosen[..., : best.shape[-1]])
            off = abs(chosen[..., : best.shape[-1]] - best)
            assert np.max(off, initial=0, where=real) <= 4 * error
            ordered = np.sort(columns)
            assert ((np.diff(ordered) > 0) | (ordered[..., 1:] == -1)).all()
        m = np.max(plain_s, -1, keepdims=True, initial=-INF)
        shift = np.where(np.isfinite(m), m, acc.type(0))
        lse = shift + np.log(np.sum(np.exp(plain_s - shift), -1, keepdims=True))
        plain_s, size = (
            np.take_along_axis(np.concatenate([a, np.full_like(a[..., :1], fill)], -1), columns, -1)
            for a, fill in ((plain_s, -INF), (size, 0))
        )
        exact_lse = reference.logsumexp(self.scores, -1, keepdims=True)
        if output in ("logit", "state"):
            ref, naive = chosen, plain_s
        else:
            nothing = indices == -1
            ref, naive = (np.where(nothing, -INF, a - b)
                          for a, b in ((chosen, exact_lse), (plain_s, lse)))  # fmt: skip
            size = 1 + size + abs(np.where(nothing, 0, ref))
            if output == "prob":
                ref, naive = np.exp(ref), np.exp(naive)
                size = size * ref
        wide = values.dtype.itemsize > 2
        assert_close(values, ref, naive.astype(values.dtype), terms=size if wide else None)
        if stats:
            m, l = stats  # noqa: E741
            assert m.dtype == l.dtype == acc and m.shape == l.shape == self.shape[:3]
            roundings = np.full(m.shape, error / np.finfo(acc).eps)
            assert_close(m, want.m, want.m.astype(acc), terms=4 * roundings)
            terms = 1 + 8 * (roundings + np.log(1 + self.shape[3]))
            assert_close(m + np.log(l), exact_lse[..., 0], lse[..., 0], terms=terms)
            np.testing.assert_array_equal(l == 0, want.l == 0)


def run(backend, problem, num, layout="BHSD", ndim=4, place=None, **more):
    """Results on the host, in the layout BHSD with all axes."""
    arrays = [arranged(a, layout, ndim) for a in problem.arrays[:2]]
    if place is not None:
        arrays = [place(a) for a in arrays]
    before = [a.tobytes() for a in arrays]
    options = put_options(backend, problem.options)
    given = [put(backend, a) for a in arrays]
    got = cuattn.attention_topk(*given, num, layout=layout, **options, **more)
    assert all(isinstance(one, backend.xp.ndarray) for one in got)
    assert backend.ran() or not got.indices.size
    assert [a.tobytes() for a in arrays] == before

    def canonical(one, is_stat):
        one = backend.asnumpy(one)[..., None] if is_stat else backend.asnumpy(one)
        one = one.swapaxes(-3, -2) if layout == "BSHD" and ndim > 2 else one
        one = one[(None,) * (4 - ndim)]
        return one[..., 0] if is_stat else one

    return type(got)(*(canonical(one, i < len(got) - 2) for i, one in enumerate(got)))


def verify(backend, rng, op, num, output="prob", index_offset=0, layout="BHSD", place=None, **how):
    problem = Ranked(rng, op, **how)
    more = {"output": output, "index_offset": index_offset, "layout": layout, "place": place}
    problem.check(run(backend, problem, num, **more), num, output, index_offset)


def some_options(rng, batch, heads, lengths):
    """Options that leave integer scores integers, each with a chance of one in three."""
    rows, columns = lengths
    bias = rng.integers(-2, 3, (heads, rows, columns)).astype(np.float32)
    bias[rng.random(bias.shape) < 0.05] = -INF
    every = {
        "is_causal": True,
        "window": (int(rng.integers(columns)), int(rng.integers(columns))),
        "q_offset": rng.integers(-3, columns, batch),
        "mask": rng.random((batch, 1, rows, columns)) < 0.5,
        "bias": bias,
        "alibi_slopes": rng.integers(-1, 2, heads).astype(np.float32),
        "q_lens": rng.integers(0, rows + 1, batch),
        "kv_lens": rng.integers(0, columns + 1, batch),
    }
    return {name: value for name, value in every.items() if rng.random() < 1 / 3}


# ---- What is selected ----


@pytest.mark.parametrize("op", OPS)
def test_ties(backend, rng, op):
    """Exact scores, most of them equal: exactly the reference's keys. Sizes on both sides of tiles,
    `num` on both sides of what a lane has."""
    batch, heads = int(rng.integers(1, 3)), ((2, 1), (3, 3), (4, 2))[int(rng.integers(3))]
    lengths = int(rng.choice([1, 15, 17, 40, 66])), int(rng.choice([1, 7, 8, 33, 95, 130]))
    num = min(int(rng.choice([1, 2, 10, 31, 32, 33, 63])), lengths[1])
    dim = int(rng.choice([1, 3, 16, 33, 64]))
    how = {"batch": batch, "heads": heads, "lengths": lengths, "dims": (dim, 1)}
    options = some_options(rng, batch, heads[0], lengths)
    output, layout = str(rng.choice(OUTPUTS)), str(rng.choice(["BHSD", "BSHD"]))
    verify(backend, rng, op, num, output, int(rng.integers(9)), layout, ties=True, **how, **options)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("op", OPS)
def test_random_scores(backend, rng, op, output):
    lengths = int(rng.integers(2, 40)), int(rng.integers(40, 120))
    verify(backend, rng, op, 9, output, lengths=lengths, dims=(48, 1), spread=2.0)


@pytest.mark.parametrize("op", OPS)
def test_every_option(backend, rng, op):
    lengths = int(rng.integers(17, 40)), int(rng.integers(40, 90))
    bias = str(rng.choice(["float16", "bfloat16", "float32"])) if op != "float64" else "float64"
    options = any_options(rng, 2, 4, lengths, bias)
    how = {"batch": 2, "heads": (4, 2), "lengths": lengths, "dims": (40, 1)}
    verify(backend, rng, op, 12, str(rng.choice(OUTPUTS)), **how, **options)


@pytest.mark.parametrize("place", LAYOUTS)
def test_strides(backend, rng, place):
    op = str(rng.choice(["float16", "float32"]))
    verify(backend, rng, op, 5, ties=True, lengths=(5, 40), dims=(16, 1), place=LAYOUTS[place])


@pytest.mark.parametrize("ndim", [2, 3])
def test_fewer_axes(backend, rng, ndim):
    heads = (4, 2) if ndim == 3 else (1, 1)
    problem = Ranked(rng, "float32", ties=True, heads=heads, lengths=(5, 40), dims=(7, 1))
    for layout in ("BHSD", "BSHD"):
        got = run(backend, problem, 4, layout, ndim, output="state")
        problem.check(got, 4, "state")


@pytest.mark.parametrize("dim", [72, 128, 200, 256])
@pytest.mark.parametrize("op", ["float16", "float32", "float64"])
def test_wide_heads(backend, rng, op, dim):
    verify(backend, rng, op, 33, "logit", ties=True, lengths=(70, 50), dims=(dim, 1))


@pytest.mark.parametrize("order", ["ascending", "descending", "constant", "teeth"])
def test_orders(backend, rng, order):
    """Every key beats the list, or none; and keys that come late in one row and early in others."""
    problem = Ranked(rng, "float32", ties=True, lengths=(20, 400), heads=(1, 1), dims=(1, 1))
    by_place = {"ascending": np.arange(400), "descending": -np.arange(400),
                "constant": np.zeros(400), "teeth": np.arange(400) % 37}[order]  # fmt: skip
    q, k, v = problem.arrays
    q[..., 0], k[..., 0] = np.where(np.arange(20) % 3, 1, -1), by_place
    problem.clean = q, k, v
    num = int(rng.choice([7, 40]))
    problem.check(run(backend, problem, num, output="logit"), num, "logit")


@pytest.mark.parametrize("op", ["float32", "float64"])
def test_passes(backend, rng, op):
    """More than one pass over k: neither a key twice nor one left out, in rows of few values, with
    NaN, and with fewer keys than `num`."""
    columns = 200
    num = int(rng.choice([65, 128, 129, columns]))
    mask = rng.random((1, 1, 18, columns)) < np.linspace(0, 1, 18)[:, None]
    problem = Ranked(rng, op, ties=True, lengths=(18, columns), dims=(3, 1), mask=mask)
    problem.check(run(backend, problem, num, output="state"), num, "state")
    problem.clean[1][0, :, rng.integers(0, columns, 40)] = NAN
    problem.hide()
    options = {"output": "logit", **problem.options}
    want = reference.attention_topk(*problem.arrays[:2], num, **options)
    got = run(backend, problem, num, output="logit")
    np.testing.assert_array_equal(got.indices, want.indices)
    np.testing.assert_array_equal(got.values, want.values)


# ---- Special values ----


@pytest.mark.parametrize("output", OUTPUTS)
def test_special_scores(backend, rng, output):
    """A bias of NaN, inf and -inf, at some keys and at all; a query that sees no key."""
    rows, columns, num = 12, 60, int(rng.choice([3, 30, 60]))
    bias = rng.integers(-3, 4, (rows, columns)).astype(np.float32)
    bias[0, 5::7], bias[1, 50:], bias[2, 2] = NAN, INF, -INF
    bias[3], bias[4], bias[5, :-2], bias[6, 1:] = -INF, NAN, -INF, NAN
    bias[7, 3], bias[7, 30], bias[8, 59] = INF, NAN, NAN
    mask = np.ones((rows, columns), bool)
    mask[9], mask[0, 5], mask[10, 4:] = False, False, False
    q = np.zeros((rows, 3), np.float32)
    k = rng.integers(-2, 3, (columns, 3)).astype(np.float32)
    options = {"output": output, "scale": 1.0}
    want = reference.attention_topk(q, k, num, mask=mask, bias=bias, **options)
    arrays = (put(backend, a) for a in (q, k))
    got = cuattn.attention_topk(
        *arrays, num, mask=put(backend, mask), bias=put(backend, bias), **options
    )
    near_0 = 1e-6 if output == "log_prob" else 0  # it has the digits of the sum
    for one, ref in zip(got, want, strict=True):
        np.testing.assert_allclose(backend.asnumpy(one), ref, 1e-6, near_0)


def test_nothing_but_nan_in_later_tiles(backend):
    """One query: no other row has a look at them."""
    q, k = np.zeros((1, 2), np.float32), np.zeros((100, 2), np.float32)
    for numbers, num in ((0, 5), (2, 90)):
        bias = np.full((1, 100), NAN, np.float32)
        bias[0, 7 : 7 + numbers] = 1
        arrays = (put(backend, a) for a in (q, k))
        got = cuattn.attention_topk(*arrays, num, bias=put(backend, bias), output="logit")
        want = reference.attention_topk(q, k, num, bias=bias, output="logit")
        np.testing.assert_array_equal(backend.asnumpy(got.indices), want.indices)


def test_magnitudes(backend, rng):
    """A bias that hides keys beside others orders them where there are no others; one of float64
    stays finite in float32."""
    q, k = (rng.integers(-1, 2, (n, 4)).astype(np.float32) for n in (3, 40))
    for name, value, dtype in (
        ("-1e30", -1e30, np.float32),
        ("min", np.finfo(np.float32).min, np.float32),
        ("-1e300", -1e300, np.float64),
    ):
        bias = np.full((3, 40), value, dtype)
        bias[0, 7:9] = 0
        found = cuattn.attention_topk(put(backend, q), put(backend, k), 4, bias=put(backend, bias))
        probs, indices = (backend.asnumpy(one) for one in found)
        assert indices[0, :2].tolist() in ([7, 8], [8, 7]), name
        assert indices[0, 2:].tolist() == [0, 1] and not probs[0, 2:].any()
        assert indices[1:].tolist() == [[0, 1, 2, 3]] * 2  # all scores are equal, to rounding
        np.testing.assert_allclose(probs[1:], 1 / 40, 1e-6)


@pytest.mark.parametrize("output", OUTPUTS)
def test_nothing(backend, output):
    """No keys, no columns, nothing selected, no query, no head."""
    sizes = (2, 3, 0, 4, 0), (2, 3, 5, 0, 2), (2, 3, 5, 4, 0), (2, 0, 5, 4, 2), (0, 3, 5, 4, 2)
    for heads, rows, columns, dim, num in sizes:
        q, k = (np.ones((heads, n, dim), np.float32) for n in (rows, columns))
        want = reference.attention_topk(q, k, num, output=output)
        got = cuattn.attention_topk(put(backend, q), put(backend, k), num, output=output)
        for one, ref in zip(got, want, strict=True):
            assert one.shape == ref.shape
            np.testing.assert_allclose(backend.asnumpy(one), ref, 1e-6)
    if output == "state":  # more than there are
        q, k = (np.ones((n, 2), np.float32) for n in (1, 3))
        got = cuattn.attention_topk(put(backend, q), put(backend, k), 70, output=output)
        indices = backend.asnumpy(got.indices)
        assert indices[0].tolist() == [0, 1, 2] + [-1] * 67
        assert np.isneginf(backend.asnumpy(got.values)[0, 3:]).all()


# ---- Keys in parts ----


@pytest.mark.parametrize("op", ["float16", "float64"])
def test_few_queries_many_keys(backend, rng, op):
    """Blocks share the keys, some of which see none of them."""
    columns = int(rng.integers(3000, 5000))
    for output, ties, options in (
        ("prob", True, {}),
        ("state", False, {"window": (1500, None), "q_offset": 2100}),
        ("log_prob", False, {"kv_lens": np.array([900])}),
    ):
        how = {"heads": (1, 1), "lengths": (2, columns), "dims": (4, 1), **options}
        verify(backend, rng, op, 40, output, ties=ties, **how)


def test_shards(backend, rng):
    """Merged states of parts of the keys have the keys of the whole, and its sums to rounding."""
    problem = Ranked(rng, "float32", ties=True, lengths=(9, 150), dims=(3, 1))
    q, k = (put(backend, a) for a in problem.arrays[:2])
    ends = [0, *sorted(rng.integers(0, 151, 3).tolist()), 150]
    states = [
        cuattn.attention_topk(q, k[:, :, a:b], 20, scale=0.5, index_offset=a, output="state")
        for a, b in zip(ends, ends[1:], strict=False)
    ]
    merged = functools.reduce(cuattn.merge, states)
    merged = SoftmaxTopKState(*map(backend.asnumpy, merged))
    problem.check(merged, 20, "state")


# ---- Results that are given ----


@pytest.mark.parametrize("output", ["prob", "state"])
def test_out(backend, rng, output):
    problem = Ranked(rng, "float16", lengths=(6, 50), dims=(8, 1), kv_lens=np.array([41]))
    options = put_options(backend, problem.options)
    q, k = (put(backend, a) for a in problem.arrays[:2])
    num = int(rng.choice([6, 50]))
    check_outs(backend, rng, functools.partial(cuattn.attention_topk, q, k, num, output=output,
                                               layout="BHSD", **options))  # fmt: skip


def test_dtypes_of_results(backend):
    for name in ("float16", "bfloat16", "float32", "float64"):
        q = put(backend, np.ones((2, 3), dtype_of(name)))
        for output in OUTPUTS:
            *stats, values, _ = cuattn.attention_topk(q, q, 1, output=output)
            acc = lse_dtype(values.dtype if output != "state" else dtype_of(name))
            assert values.dtype == (acc if stats else dtype_of(name))
