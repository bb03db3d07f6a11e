"""What the tests of attention share: problems with poison in hidden places, and their answers.

A `Problem` is canonical, (B, H, S, D). Its `q`, `k` and `v` have NaN, inf or garbage wherever no
query sees them, so that every test that uses one also tests that this changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tolerance import TABLE, assert_close, dtype_of, exact, lse_dtype

import cuattn
from cuattn import reference
from cuattn.reference._dual import Dual, as_dual
from cuattn.reference._score import score_of

INF, NAN = np.inf, np.nan

# FlashAttention's pairs of lengths at small size: one key, one query, more queries than keys, tails
# on both sides of tiles of 16, 32, 64 and 128, and primes.
LENGTHS = [
    (1, 1),
    (1, 3),
    (3, 1),
    (2, 64),
    (17, 65),
    (64, 128),
    (63, 65),
    (108, 128),
    (113, 203),
    (128, 217),
    (239, 1),
    (799, 3),
    (256, 64),
    (129, 257),
    (300, 799),
]
OPS = ("float16", "bfloat16", "float32", "tf32", "float64")  # dtypes, and float32 with precision


def precision_of(op):
    """dtype name and `precision` of one of OPS."""
    return ("float32", "tf32") if op == "tf32" else (op, None)


def to_tf32(x):
    """float32 with 10 bits of mantissa, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    even = bits >> np.uint64(13) & np.uint64(1)
    rounded = (bits + np.uint64(0xFFF) + even) & np.uint64(0xFFFFE000)
    return np.where(np.isfinite(x), rounded.astype(np.uint32).view(np.float32), x)


class Plain(NamedTuple):
    """The plain expression, and how large what is rounded on the way is."""

    out: np.ndarray
    lse: np.ndarray
    out_size: np.ndarray  # terms of the sum, and scores whose error is one of their exponential
    lse_size: np.ndarray


# ---- which keys a query sees, and the plain expression ------------------------------------------


def offsets(shape, q_offset=None, q_lens=None, kv_lens=None):
    """Place of query 0 among the keys in each sequence."""
    batch, _, rows, columns = shape
    m = [rows] * batch if q_lens is None else q_lens
    n = [columns] * batch if kv_lens is None else kv_lens
    places = [int(n[b]) - int(m[b]) for b in range(batch)]
    return np.array(places) if q_offset is None else np.broadcast_to(q_offset, batch)


def visible(shape, is_causal=False, q_offset=None, window=None, mask=None, q_lens=None,
            kv_lens=None, **_):  # fmt: skip
    """Which keys each query sees, as a bool array of `shape`, (B, H, S_q, S_k)."""
    i, j = np.ogrid[: shape[2], : shape[3]]
    left, right = (None, None) if window is None else window
    seen = np.ones(shape, bool)
    for b, offset in enumerate(offsets(shape, q_offset, q_lens, kv_lens)):
        place = i + int(offset)
        if q_lens is not None:
            seen[b] &= i < q_lens[b]
        if kv_lens is not None:
            seen[b] &= j < kv_lens[b]
        if is_causal:
            seen[b] &= j <= place
        if left is not None:
            seen[b] &= j - place >= -left
        if right is not None:
            seen[b] &= j - place <= right
    return seen if mask is None else seen & mask


class Scores(NamedTuple):
    """Plain scores of heads that share no keys, and what the rest of an expression needs."""

    s: np.ndarray
    strayed: np.ndarray  # how far the sums of products stray on the way to a score
    chain: np.ndarray  # the derivative of what is capped
    own: np.ndarray  # that of a score expression, by what it changes
    distance: np.ndarray  # of queries' places and keys
    rounded: Callable[[np.ndarray], np.ndarray]


def naive_scores(q, k, op, *, scale=None, softcap=None, bias=None, alibi_slopes=None,
                 q_offset=None, q_lens=None, kv_lens=None, score=None, score_args=None,
                 **_):  # fmt: skip
    """`Scores` of products in float32 (float64 for float64); for "tf32" what is multiplied is
    rounded to that."""
    dtype, acc = q.dtype, lse_dtype(q.dtype)
    rounded = to_tf32 if op == "tf32" else lambda x: x.astype(dtype).astype(acc)
    k = np.repeat(k, q.shape[1] // max(1, k.shape[1]), axis=1)
    q, k = (rounded(a.astype(acc)) for a in (q, k))
    scale = max(1, q.shape[-1]) ** -0.5 if scale is None else scale
    s, chain = np.matmul(q, k.swapaxes(-1, -2)) * acc.type(scale), np.ones((), acc)
    own = chain
    squares = (np.square(a, dtype=np.float64) for a in (q, k.swapaxes(-1, -2)))
    strayed = abs(scale) * np.sqrt(np.matmul(*squares))
    if softcap:
        t = np.tanh(s / acc.type(softcap))
        s, chain = acc.type(softcap) * t, 1 - t * t
    if bias is not None:
        s = s + bias.astype(acc)
    i, j = np.ogrid[: s.shape[2], : s.shape[3]]
    places = offsets(s.shape, q_offset, q_lens, kv_lens)[:, None, None, None] + i
    distance = abs(places - j)
    if alibi_slopes is not None:
        slopes = np.broadcast_to(alibi_slopes, s.shape[:2])[..., None, None]
        s = s - slopes.astype(acc) * distance.astype(acc)
    if score is not None:
        b, h = np.ogrid[: s.shape[0], : s.shape[1]]
        numbers = b[..., None, None], h[..., None, None], places, j
        found = as_dual(score_of(score, score_args)(Dual(s, acc.type(1)), *numbers))
        s = np.broadcast_to(found.value, s.shape).astype(acc)
        own = np.where(s == -INF, 0, 0 if found.d is None else found.d).astype(acc)
    return Scores(s, strayed, chain, own, distance, rounded)


@np.errstate(all="ignore")
def naive(q, k, v, seen, op, *, sinks=None, **options):
    """`Plain` results, where nothing hidden holds NaN.

    Probabilities and out are rounded to the dtype, as FlashAttention's tests have it.
    """
    dtype, acc = q.dtype, lse_dtype(q.dtype)
    s, strayed, _, _, _, rounded = naive_scores(q, k, op, **options)
    v = np.repeat(rounded(v.astype(acc)), q.shape[1] // max(1, k.shape[1]), axis=1)
    s = np.where(seen, s, acc.type(-INF))
    sink = acc.type(-INF) if sinks is None else sinks.astype(acc)[:, None, None]
    m = np.maximum(np.max(s, axis=-1, keepdims=True, initial=-INF), sink)
    shift = np.where(np.isfinite(m), m, acc.type(0))
    p = np.where(seen, np.exp(s - shift), acc.type(0))
    total = np.sum(p, axis=-1, keepdims=True, dtype=acc) + np.exp(sink - shift)
    p = rounded(np.where(total == 0, acc.type(0), p / total))
    lse = (shift + np.log(total))[..., 0]
    real = np.ones(lse.shape, bool)
    if options.get("q_lens") is not None:
        real = np.arange(lse.shape[2]) < np.asarray(options["q_lens"])[:, None, None]
    out = np.where(real[..., None], np.matmul(p, v), acc.type(0)).astype(dtype)
    weighed = np.where(p > 0, p * (1 + abs(s)), 0)
    # n products added up one by one: each partial sum is rounded, of all of them that makes
    # sqrt(n / 12) units in the last place of the whole one.
    strayed = abs(s) + max(2, (q.shape[-1] / 12) ** 0.5) * strayed
    sizes = np.matmul(weighed, abs(v)), 1 + np.max(strayed, axis=-1, initial=0, where=p > 0)
    return Plain(out, np.where(real, lse, acc.type(-INF)), *sizes)


# ---- problems ------------------------------------------------------------------------------------


def poison(rng, x, hidden):
    """`x` with NaN, infinities and huge numbers in the rows that are `hidden`."""
    huge = 6e4 if x.dtype == np.float16 else 3e38
    garbage = rng.choice([NAN, NAN, INF, -INF, huge, -huge], x.shape).astype(x.dtype)
    return np.where(hidden[..., None], garbage, x)


class Problem:
    """Random q, k and v, and options, which are those of `cuattn.attention` for four dimensions."""

    def __init__(self, rng, op="float16", batch=1, heads=(2, 1), lengths=(33, 70), dims=(64, 64),
                 spread=1.0, **options):  # fmt: skip
        dtype, precision = precision_of(op)
        self.op, self.options = op, options
        if precision is not None:
            options["precision"] = precision
        (heads, heads_kv), (rows, columns), (dim, value_dim) = heads, lengths, dims
        shapes = (
            (batch, heads, rows, dim),
            (batch, heads_kv, columns, dim),
            (batch, heads_kv, columns, value_dim),
        )
        self.shape = (batch, heads, rows, columns)
        self.clean = tuple(
            (rng.standard_normal(shape) * factor).astype(dtype_of(dtype))
            for shape, factor in zip(shapes, (spread, 1, 1), strict=True)
        )
        self.rng = rng
        self.hide()

    def hide(self):
        """Poison what nobody sees."""
        batch, heads, rows, columns = self.shape
        self.seen = visible(self.shape, **self.options)
        q, k, v = self.clean
        group = heads // max(1, k.shape[1])
        by_group = self.seen.any(axis=2).reshape(batch, k.shape[1], group, columns).any(axis=2)
        lens = self.options.get("q_lens")
        ends = [rows] * batch if lens is None else lens
        padding = np.arange(rows) >= np.reshape(ends, (batch, 1, 1))
        self.hidden = np.broadcast_to(padding, (batch, heads, rows)), ~by_group, ~by_group
        self.q, self.k, self.v = (
            poison(self.rng, x, hidden) for x, hidden in zip(self.clean, self.hidden, strict=True)
        )

    @property
    def arrays(self):
        return self.q, self.k, self.v

    def expected(self):
        """out and lse by the formula, in float64, or wider for float64."""
        arrays = [exact(a) if self.op == "float64" else a for a in self.arrays]
        options = {name: exact(a) if name == "bias" else a for name, a in self.options.items()}
        return reference.attention(*arrays, return_lse=True, **options)

    def plain(self):
        """`Plain` results."""
        clean = [np.where(h[..., None], 0, x).astype(x.dtype) for x, h in
                 zip(self.clean, self.hidden, strict=True)]  # fmt: skip
        return naive(*clean, self.seen, self.op, **self.options)

    def check(self, out, lse=None, ndim=4):
        """Results in the layout BHSD against the formula."""
        lead = (0,) * (4 - ndim)
        ref, ref_lse = (one[lead] for one in self.expected())
        plain = Plain(*(one[lead] for one in self.plain()))
        compare(self.op, out, ref, plain)
        if lse is not None:
            compare_lse(self.op, lse, ref_lse, plain)
            assert not np.any(out[np.isneginf(ref_lse)])


# What the plain expression rounds at least, even where a lucky sample hides it, see `tolerance`: of
# 16-bit results the result, of tf32 each weight (that is what its lse adds up, too), in other
# formats scores and terms.
TF32 = 2.0**-11 / TABLE["float32"].relative / TABLE["float32"].plain


def out_terms(op, ref, plain):
    """What the rule of `tolerance` takes as added up for out; None: what it is."""
    return {"float16": None, "bfloat16": None, "tf32": TF32 * abs(ref)}.get(op, plain.out_size)


def compare(op, out, ref, plain):
    """out by the rule of `tolerance`."""
    assert_close(out, ref, plain.out, terms=out_terms(op, ref, plain))


def compare_lse(op, lse, ref, plain):
    """lse by the rule of `tolerance`."""
    terms = np.full(lse.shape, TF32) if op == "tf32" else plain.lse_size
    assert_close(lse, ref, plain.lse, terms=np.maximum(terms, plain.lse_size))


# ---- calls ---------------------------------------------------------------------------------------


NUMBERS = {"scale", "softcap", "q_offset"}


def put(backend, value):
    if isinstance(value, dict):
        return {name: put(backend, one) for name, one in value.items()}
    return backend.asarray(value) if isinstance(value, np.ndarray) else value


def put_options(backend, options):
    """Arrays on the backend, but for numbers: reading one on a device would wait for it."""
    return {
        name: value if name in NUMBERS and np.ndim(value) == 0 else put(backend, value)
        for name, value in options.items()
    }


def arranged(x, layout, ndim=4):
    """Canonical x, or lse, in a layout and without its leading axes."""
    x = x[(0,) * (4 - ndim)]
    return x.swapaxes(-3, -2) if layout == "BSHD" and ndim > 2 else x


def call(backend, arrays, options, **more):
    """`cuattn.attention` on the backend; all results on the host."""
    arrays = [put(backend, a) for a in arrays]
    options = put_options(backend, options)
    got = cuattn.attention(*arrays, **options, **more)
    results = got if isinstance(got, tuple) else (got,)
    assert all(isinstance(one, backend.xp.ndarray) for one in results)
    results = tuple(backend.asnumpy(one) for one in results)
    return results if isinstance(got, tuple) else results[0]


def verify(backend, rng, op="float16", place=None, **how):
    """Run one problem with its lse and compare; `place` lays arrays out in memory."""
    problem = Problem(rng, op, **how)
    arrays = [place(a) if place is not None else a for a in problem.arrays]
    before = [a.tobytes() for a in arrays]
    out, lse = call(backend, arrays, problem.options, return_lse=True)
    assert out.dtype == problem.q.dtype and lse.dtype == lse_dtype(out.dtype)
    assert backend.ran() or out.size == lse.size == 0
    problem.check(out, lse)
    assert [a.tobytes() for a in arrays] == before
    return problem, out, lse


def any_options(rng, batch, heads, lengths, bias="float32"):
    """Every option at once, with random values; every fifth query sees nothing."""
    rows, columns = lengths
    mask = rng.random((batch, 1, rows, columns)) < 0.7
    mask[:, :, rng.integers(5) :: 5] = False
    values = rng.standard_normal((heads, rows, columns))
    values[rng.random(values.shape) < 0.05] = -INF
    return {
        "is_causal": bool(rng.random() < 0.5),
        "window": (int(rng.integers(columns)), int(rng.integers(columns))),
        "q_offset": rng.integers(-3, max(1, columns - rows // 2) + 3, batch),
        "scale": float(rng.uniform(-0.3, 0.3)),
        "softcap": float(rng.uniform(1, 20)),
        "mask": mask,
        "bias": values.astype(dtype_of(bias)),
        "alibi_slopes": rng.uniform(0, 0.2, (batch, heads)).astype(np.float32),
        "sinks": rng.standard_normal(heads).astype(np.float32),
        "q_lens": rng.integers(0, rows + 1, batch),
        "kv_lens": rng.integers(0, columns + 1, batch),
    }
