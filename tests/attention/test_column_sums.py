"""attention_column_sums on every backend: no worse than twice the plain expression.

Every problem has NaN, infinities and garbage wherever no query looks, and in the rows of padding of
q and lse.
"""

from __future__ import annotations

import numpy as np
import pytest
from attention_cases import (
    INF,
    NAN,
    OPS,
    TF32,
    Problem,
    any_options,
    naive_scores,
    poison,
    put,
    put_options,
)
from cases import LAYOUTS, Guarded
from conftest import rows_alone
from tolerance import assert_close, exact, lse_dtype

import cuattn
from cuattn import reference
from cuattn._device import recent

TYPES = tuple(op for op in OPS if op != "bfloat16")  # whose kernels are float16's
SMALL = {"lengths": (37, 83), "dims": (63, 64)}


@pytest.fixture(autouse=True)
def multiprocessors(backend):
    """So few that a block has all heads of a group."""
    if backend.runtime is not None:
        backend.runtime.num_sms = 1


class Sums(Problem):
    """A problem with the lse of its forward call, which alone has its sinks."""

    def __init__(self, rng, op="float16", **how):
        super().__init__(rng, op, **how)
        lse = self.expected()[1].astype(lse_dtype(self.q.dtype))
        self.lse = poison(rng, lse[..., None], self.hidden[0])[..., 0]
        self.more = {name: a for name, a in self.options.items() if name != "sinks"}

    @property
    def arrays_of_call(self):
        return self.q, self.k, self.lse

    def expected_sums(self):
        """By the formula, in float64, or wider for float64."""
        wide = exact if self.op == "float64" else lambda a: a
        more = {n: wide(a) if n == "bias" else a for n, a in self.more.items()}
        return reference.attention_column_sums(*map(wide, self.arrays_of_call), **more)

    @np.errstate(all="ignore")
    def check_sums(self, got):
        """Canonical results against the formula; zeros where nobody looks."""
        q, k = (np.where(h[..., None], 0, x).astype(x.dtype) for x, h in
                zip(self.clean[:2], self.hidden, strict=False))  # fmt: skip
        scores = naive_scores(q, k, self.op, **self.more)
        lse = np.where(self.hidden[0] | np.isneginf(self.lse), INF, self.lse)[..., None]
        p = np.where(self.seen, np.exp(scores.s - lse), 0).astype(lse.dtype)
        sizes = 1 + abs(scores.s) + abs(lse) + 2 * scores.strayed
        ref = self.expected_sums()
        terms = np.sum(np.where(p > 0, p * sizes, 0), axis=2)
        if self.op == "tf32":
            terms = TF32 * np.maximum(abs(ref), 1)
        assert got.dtype == self.lse.dtype
        assert_close(got, ref, p.sum(axis=2), terms=terms)
        assert not got[~self.seen.any(axis=2)].any()


def call(backend, arrays, options, **more):
    """`cuattn.attention_column_sums` on the backend, its result on the host."""
    given = [put(backend, a) for a in arrays]
    got = cuattn.attention_column_sums(*given, **put_options(backend, options), **more)
    assert isinstance(got, backend.xp.ndarray)
    return backend.asnumpy(got)


def verify(backend, rng, op="float16", **how):
    problem = Sums(rng, op, **how)
    before = [a.tobytes() for a in problem.arrays_of_call]
    got = call(backend, problem.arrays_of_call, problem.more)
    problem.check_sums(got)
    assert backend.ran() or not got.size
    assert [a.tobytes() for a in problem.arrays_of_call] == before
    return problem, got


# ---- sizes and dtypes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths", [(1, 1), (3, 1), (1, 3), (64, 128), (63, 129), (65, 257), (300, 9)], ids=str
)
def test_lengths(backend, rng, lengths):
    verify(backend, rng, lengths=lengths, is_causal=bool(rng.integers(2)))


@pytest.mark.parametrize("dim", [1, 64, 111, 256])
@pytest.mark.parametrize("op", OPS)
def test_dtypes(backend, rng, op, dim):
    """Longer than tiles of any type."""
    verify(backend, rng, op, heads=(1, 1), lengths=(70, 140), dims=(dim, 1), is_causal=True)


@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (8, 1)], ids=str)
def test_groups_of_heads(backend, rng, heads):
    """Each head of a group has sums of its own, of the same keys: bit by bit, whether a block has
    all of them, some, or one."""
    results = set()
    problem = Sums(rng, batch=2, heads=heads, lengths=(150, 40), is_causal=True)
    for num_sms in (1, 4, 1000):
        if backend.runtime is not None:
            backend.runtime.num_sms, backend.runtime.recent = num_sms, recent.Recent()
        got = call(backend, problem.arrays_of_call, problem.more)
        problem.check_sums(got)
        results.add(got.tobytes())
    assert len(results) == 1


@pytest.mark.parametrize(
    "batch, heads, lengths, dim",
    [
        (0, (2, 1), (3, 4), 8),
        (2, (0, 3), (3, 4), 8),
        (2, (2, 1), (0, 4), 8),
        (2, (2, 1), (3, 0), 8),
        (2, (2, 1), (3, 4), 0),
    ],
)
def test_empty(backend, rng, batch, heads, lengths, dim):
    """Sums over no query are 0; of no columns all scores are."""
    verify(backend, rng, batch=batch, heads=heads, lengths=lengths, dims=(dim, 1))


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", TYPES)
@pytest.mark.parametrize("dim", [63, 256])
def test_every_option_at_once(backend, rng, op, dim):
    options = any_options(rng, 2, 4, (45, 75), "float64" if op == "float64" else "float32")
    verify(backend, rng, op, batch=2, heads=(4, 2), lengths=(45, 75), dims=(dim, 1), **options)


@pytest.mark.parametrize(
    ("window", "q_offset"),
    [((0, 0), None), ((None, 5), -60), ((9, 12), 64), ((64, None), 30), (None, 2**39)],
    ids=str,
)
def test_window(backend, rng, window, q_offset):
    """Every place of an edge in tiles of queries and of keys; also where no query sees a key."""
    verify(backend, rng, heads=(2, 1), lengths=(150, 140), window=window, q_offset=q_offset)


def test_options_alone(backend, rng):
    """Rules of scores without the others."""
    alone = [
        {"q_lens": np.array([0, 20]), "kv_lens": np.array([83, 41])},
        {"scale": -0.7},
        {"softcap": 0.5},
        {"alibi_slopes": rng.uniform(0, 0.3, 2).astype(np.float32)},
        {"sinks": rng.standard_normal(2).astype(np.float32)},
        {"mask": rng.random((2, 1, 37, 83)) < 0.4},
        {"bias": rng.standard_normal((2, 1, 83)).astype(np.float16)},
    ]
    for options in alone:
        verify(backend, rng, batch=2, lengths=(37, 83), dims=(32, 1), **options)


def test_queries_that_see_nothing(backend, rng):
    """By a bias of -inf; by an lse of -inf, whatever the scores are."""
    bias = np.where(rng.random((2, 37, 1)) < 0.3, -INF, 0).astype("f4")
    verify(backend, rng, lengths=(37, 83), bias=bias)
    for more in ({}, {"softcap": 1.0}):
        arrays = [rng.standard_normal((n, 32)).astype("f4") for n in (37, 83)]
        assert not call(backend, (*arrays, np.full(37, -INF, "f4")), more).any()


# ---- layouts in memory --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "strided", "misaligned", "fortran"])
@pytest.mark.parametrize("op", ["float16", "float64"])
def test_layouts(backend, rng, op, layout):
    """Of all that comes in; what goes out is written whole, and nothing beside it."""
    problem = Sums(rng, op, batch=2, heads=(4, 2), lengths=(37, 83), dims=(64, 1), is_causal=True)
    given = [put(backend, LAYOUTS[layout](a)) for a in problem.arrays_of_call]
    out = Guarded(backend, (2, 4, 83), problem.lse.dtype, layout)
    for _ in range(2):  # the second call is remembered
        got = cuattn.attention_column_sums(*given, is_causal=True, out=out.out)
        assert got is out.out
    out.check_rim()
    problem.check_sums(np.ascontiguousarray(backend.asnumpy(got)))


def test_fewer_dimensions(backend, rng):
    problem = Sums(rng, "float32", batch=2, heads=(2, 2), **SMALL, is_causal=True)
    q, k, lse = problem.arrays_of_call
    whole = call(backend, (q, k, lse), problem.more)
    for lead in [(1,), (1, 1)]:
        got = call(backend, (q[lead], k[lead], lse[lead]), problem.more)
        assert got.tobytes() == whole[lead].tobytes()
    swapped = q.swapaxes(1, 2), k.swapaxes(1, 2), lse
    got = call(backend, swapped, problem.more, layout="BSHD")
    problem.check_sums(got)  # NumPy adds up other strides in another order
    got = call(backend, (swapped[0][0], swapped[1][0], lse[0]), problem.more, layout="BSHD")
    np.testing.assert_allclose(got, whole[0], rtol=1e-5, atol=1e-6)


# ---- properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["float32", "float64"])
def test_sums_of_sums(backend, rng, op):
    """Every query that sees a key adds 1 in all; with a sink, what that leaves."""
    sinks = np.array([0.5, 3.0], np.float32)
    mask = rng.random((150, 140)) < 0.05
    mask[::7] = False
    arrays = [rng.standard_normal((2, n, 32)).astype(op) for n in (150, 140)]
    q, k = (put(backend, a) for a in arrays)
    more = {"is_causal": True, "mask": put(backend, mask)}
    seeing = (np.tril(np.ones((150, 140), bool), -10) & mask).any(axis=1).sum()
    close = 2e-5 if op == "float32" else 1e-12

    def total(sinks=None):
        _, lse = cuattn.attention(q, k, k, return_lse=True, sinks=sinks, **more)
        got = cuattn.attention_column_sums(q, k, lse, **more)
        return backend.asnumpy(got).astype(float).sum(axis=1), backend.asnumpy(lse).astype(float)

    np.testing.assert_allclose(total()[0], seeing, rtol=close)
    got, lse = total(put(backend, sinks))
    np.testing.assert_allclose(got, 150 - np.exp(sinks[:, None] - lse).sum(axis=1), rtol=close)


def test_probabilities_of_one_hot_values(backend, rng):
    """What `attention` itself weighs each key with."""
    q, k = (rng.standard_normal((2, n, 64)).astype("f4") for n in (70, 90))
    eye = np.broadcast_to(np.eye(90, dtype="f4"), (2, 90, 90))
    q, k, eye = (put(backend, a) for a in (q, k, eye))
    more = {"window": (30, 4), "softcap": 2.0}
    p, lse = cuattn.attention(q, k, eye, return_lse=True, **more)
    got = cuattn.attention_column_sums(q, k, lse, **more)
    want = backend.asnumpy(p).astype(float).sum(axis=1)
    np.testing.assert_allclose(backend.asnumpy(got), want, rtol=1e-5, atol=1e-6)


def test_many_queries(backend, rng):
    """Equal terms, each of which rounds a plain sum down: the error does not grow with them."""
    lse = np.full((1, 1, 20011), np.log(3), np.float32)
    q, k = np.zeros((1, 1, 20011, 1), np.float16), np.zeros((1, 1, 3, 1), np.float16)
    got = call(backend, (q, k, lse), {})
    np.testing.assert_allclose(got, 20011 * np.exp(-exact(lse[..., :3])), rtol=2e-7)


@rows_alone
@pytest.mark.parametrize("op", TYPES)
def test_sequences_and_heads_do_not_meet(backend, rng, op):
    """Nor do runs: bit by bit."""
    problem = Sums(rng, op, batch=2, heads=(4, 2), **SMALL, is_causal=True)
    q, k, lse = problem.arrays_of_call
    whole = call(backend, (q, k, lse), problem.more)
    assert call(backend, (q, k, lse), problem.more).tobytes() == whole.tobytes()
    got = call(backend, (q[1:, 2:], k[1:, 1:], lse[1:, 2:]), problem.more)
    assert got.tobytes() == whole[1:, 2:].tobytes()


@pytest.mark.parametrize("op", TYPES)
def test_what_nobody_sees_changes_nothing(backend, rng, op):
    """Bit by bit: zeros, NaN, infinities, in keys and in rows of padding."""
    mask = rng.random((37, 83)) < 0.5
    mask[:, ::3] = False
    for how in (
        {"is_causal": True, "q_offset": 10},
        {"window": (15, 3), "q_lens": np.array([21]), "kv_lens": np.array([30])},
        {"mask": mask},
    ):
        problem, results = Sums(rng, op, **SMALL, **how), set()
        for fill in (0, NAN, INF):
            q, k = (np.where(h[..., None], fill, x).astype(x.dtype) for x, h in
                    zip((problem.q, problem.k), problem.hidden, strict=False))  # fmt: skip
            lse = np.where(problem.hidden[0], fill, problem.lse).astype(problem.lse.dtype)
            results.add(call(backend, (q, k, lse), problem.more).tobytes())
        assert len(results) == 1, how


@pytest.mark.parametrize("how", ["is_causal", "mask"])
@pytest.mark.parametrize("op", TYPES)
def test_nan_that_takes_part(backend, rng, op, how):
    """In a query or its lse it reaches the keys that this query sees, in a key that key."""
    options = {"is_causal": True} if how == "is_causal" else {"mask": rng.random((37, 83)) < 0.5}
    problem = Sums(rng, op, heads=(2, 2), **SMALL, **options)
    seen = problem.seen[0, 0]
    for index in range(3):
        arrays = [np.where(np.isfinite(a), a, 0) for a in problem.arrays_of_call]
        arrays[index][0, 0, 20] = NAN
        if index < 2:  # as the forward call has it
            q, k = (put(backend, a) for a in arrays[:2])
            more = put_options(backend, problem.more)
            arrays[2] = backend.asnumpy(cuattn.attention(q, k, k, return_lse=True, **more)[1])
        got = call(backend, arrays, problem.more)
        reached = (seen & seen[:, 20:21]).any(axis=0) if index == 1 else seen[20]
        assert np.array_equal(np.isnan(got[0, 0]), reached) and np.isfinite(got[0, 1]).all()


@pytest.mark.parametrize("op", TYPES)
def test_scores_of_any_size(backend, rng, op):
    """Probabilities stay below 1 where lse holds no more than the size of huge scores."""
    verify(backend, rng, op, heads=(1, 1), **SMALL, spread=30.0)
    bias = np.zeros((37, 83), "f8" if op == "float64" else "f4")
    for low in (-1e9, -1e30, float(np.finfo(np.float32).min)):
        bias[:36:2, 5:] = low  # hides keys beside others
        verify(backend, rng, op, heads=(1, 1), **SMALL, bias=bias)
    for size in (-1e30, 1e30):  # on all keys of a query: as equal scores as there are
        q, k = (np.zeros((n, 32), "f8" if op == "float64" else "f4") for n in (5, 40))
        more = {"bias": np.full((5, 40), size, q.dtype)}
        got = call(backend, (q, k, np.full(5, size, q.dtype)), more)
        np.testing.assert_array_equal(got, 5)
    arrays = [a.astype("f4") for a in (q, k)]
    sinks = put(backend, np.array(3000.0, np.float32))
    q, k = (put(backend, a) for a in arrays)
    _, lse = cuattn.attention(q, k, k, return_lse=True, sinks=sinks)
    assert not backend.asnumpy(cuattn.attention_column_sums(q, k, lse)).any()


@pytest.mark.parametrize("backend", ["emulator-sm_80"], indirect=True)
def test_any_order_of_blocks_and_threads(backend, rng):
    """Bit by bit."""
    import emulator

    options = any_options(rng, 2, 4, (70, 90))
    problem = Sums(rng, batch=2, heads=(4, 2), lengths=(70, 90), dims=(63, 64), **options)
    first = call(backend, problem.arrays_of_call, problem.more).tobytes()
    for seed in rng.integers(1 << 30, size=3):
        with emulator.activate(backend.arch, int(seed)):
            assert call(backend, problem.arrays_of_call, problem.more).tobytes() == first
