"""The reference of attention: against three lines of NumPy, in blocks, and every rule."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from attention_cases import INF, LENGTHS, NAN, visible
from tolerance import TABLE

from cuattn import reference

# Two float64 computations of the same thing: a few roundings of sums of hundreds of terms apart.
CLOSE = {"rtol": 512 * TABLE["float64"].relative, "atol": 512 * TABLE["float64"].relative}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def three_lines(q, k, v, scale):
    """Attention where every query sees every key."""
    s = scale * np.einsum("bhid,bhjd->bhij", q, k)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bhij,bhjd->bhid", p / p.sum(-1, keepdims=True), v)


def check(got, want):
    np.testing.assert_allclose(got, want, **CLOSE)


def draw(rng, lengths=(7, 11), batch=2, heads=(4, 2), dims=(5, 3)):
    (rows, columns), (h, g), (d, e) = lengths, heads, dims
    shapes = (batch, h, rows, d), (batch, g, columns, d), (batch, g, columns, e)
    return tuple(rng.standard_normal(shape) for shape in shapes)


def row_by_row(q, k, v, seen, *, scale, sinks=None, score=lambda s, b, h, i, j: s):
    """out and lse of one query at a time, from nothing but the keys that it sees."""
    batch, heads, rows, _ = q.shape
    out, lse = np.zeros((batch, heads, rows, v.shape[-1])), np.full(q.shape[:3], -INF)
    for b, h, i in np.ndindex(batch, heads, rows):
        g = h // (heads // k.shape[1])
        (j,) = np.nonzero(seen[b, h, i])
        s = score(scale * (k[b, g, j] @ q[b, h, i]), b, h, i, j)
        s = s if sinks is None else np.append(s, sinks[h])
        if len(s):
            m = s.max()
            p = np.exp(s - m)
            lse[b, h, i] = m + np.log(p.sum())
            out[b, h, i] = p[: len(j)] @ v[b, g, j] / p.sum()
    return out, lse


# ---- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS)
def test_three_lines(rng, lengths):
    q, k, v = draw(rng, lengths, 1, (2, 2))
    check(reference.attention(q, k, v), three_lines(q, k, v, 5**-0.5))
    check(reference.attention(q, k, v, scale=-0.3), three_lines(q, k, v, -0.3))


@pytest.mark.parametrize("lengths", [(1, 1), (5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"is_causal": True, "q_offset": 2},
        {"is_causal": True, "q_offset": -2},
        {"q_offset": np.array([3, -1]), "window": (1, 2)},
        {"window": (0, 0)},
        {"window": (2, None)},
        {"window": (None, 1)},
        {"window": (3, 3), "is_causal": True},
        {"window": (None, None)},
        {"window": (1000, 1000)},
        {"q_lens": np.array([1, 0]), "kv_lens": np.array([0, 1])},
        {"q_lens": np.array([1, 1]), "is_causal": True},
        {"kv_lens": np.array([1, 0]), "is_causal": True},
    ],
    ids=str,
)
def test_positions(rng, lengths, options):
    q, k, v = draw(rng, lengths)
    seen = visible((2, 4, *lengths), **options)
    got = reference.attention(q, k, v, return_lse=True, **options)
    for one, want in zip(got, row_by_row(q, k, v, seen, scale=5**-0.5), strict=True):
        check(one, want)


def test_who_sees_whom():
    """The rules by hand: 2 queries, 4 keys, bottom-right."""
    shape = (1, 1, 2, 4)
    rows = {
        "1110/1111": {"is_causal": True},
        "1000/1100": {"is_causal": True, "q_offset": 0},
        "0110/0011": {"window": (1, 0)},
        "0011/0001": {"window": (0, 1)},
        "0010/0001": {"window": (0, None), "is_causal": True},
        "0000/1000": {"is_causal": True, "q_offset": -1},
        "1100/1110": {"kv_lens": [3], "is_causal": True},
        "1111/0000": {"q_lens": [1], "is_causal": True},
    }
    for text, options in rows.items():
        want = np.array([[[[c == "1" for c in row] for row in text.split("/")]]])
        np.testing.assert_array_equal(visible(shape, **options), want, text)


def test_order_of_score_operations(rng):
    """Scale, cap, bias, alibi; the sink is neither scaled nor capped."""
    q, k, v = draw(rng)
    bias, slopes, sinks = rng.standard_normal((4, 7, 11)), rng.random((2, 4)), rng.random(4) * 3
    options = {"scale": 1.7, "softcap": 2.5, "bias": bias, "alibi_slopes": slopes, "sinks": sinks}

    def score(s, b, h, i, j):
        s = 2.5 * np.tanh(s / 2.5) + bias[h, i, j]
        return s - slopes[b, h] * abs(i + 4 - j)

    want = row_by_row(q, k, v, np.ones((2, 4, 7, 11), bool), scale=1.7, sinks=sinks, score=score)
    for one, expected in zip(reference.attention(q, k, v, return_lse=True, **options), want,
                             strict=True):  # fmt: skip
        check(one, expected)
    shared = {**options, "alibi_slopes": slopes[0]}
    check(reference.attention(q, k, v, **shared)[0], want[0][0])


def test_mask_and_bias_broadcast(rng):
    q, k, v = draw(rng)
    for shape in [(11,), (7, 1), (4, 1, 11), (2, 1, 7, 11), (1, 4, 1, 1), ()]:
        mask, bias = rng.random(shape) < 0.6, rng.standard_normal(shape)
        seen = np.broadcast_to(mask, (2, 4, 7, 11))
        full = np.broadcast_to(bias, (2, 4, 7, 11))
        want = row_by_row(
            q, k, v, seen, scale=5**-0.5,
            score=lambda s, b, h, i, j, full=full: s + full[b, h, i, j],
        )  # fmt: skip
        got = reference.attention(q, k, v, mask=mask, bias=bias, return_lse=True)
        for one, expected in zip(got, want, strict=True):
            check(one, expected)


# ---- corners -------------------------------------------------------------------------------------


def test_no_visible_key(rng):
    q, k, v = draw(rng, (3, 4))
    for options in (
        {"mask": np.zeros((3, 4), bool)},
        {"kv_lens": np.array([0, 0])},
        {"is_causal": True, "q_offset": -3},
        {"q_offset": 9, "window": (1, 1)},
        {"bias": np.full((3, 4), -INF)},  # keys that are seen, and weigh nothing
    ):
        out, lse = reference.attention(q, k, v, return_lse=True, **options)
        assert not out.any() and np.isneginf(lse).all()
        sinks = np.array([0.5, -2.0, 3.0, -INF])
        out, lse = reference.attention(q, k, v, return_lse=True, sinks=sinks, **options)
        assert not out.any()
        np.testing.assert_array_equal(lse, np.broadcast_to(sinks[:, None], (2, 4, 3)))


def test_padding_queries_are_nothing_even_with_sinks(rng):
    q, k, v = draw(rng, (3, 4))
    q[0, :, 1:] = NAN
    lens = np.array([1, 3])
    out, lse = reference.attention(q, k, v, q_lens=lens, sinks=np.ones(4), return_lse=True)
    assert not out[0, :, 1:].any() and np.isneginf(lse[0, :, 1:]).all()
    assert out[1].all() and np.isfinite(lse[1]).all()


def test_lengths_are_clamped(rng):
    q, k, v = draw(rng, (3, 4))
    want = reference.attention(q, k, v, q_lens=np.array([0, 3]), kv_lens=np.array([4, 0]))
    got = reference.attention(q, k, v, q_lens=np.array([-5, 9]), kv_lens=np.array([7, -1]))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_seen_propagates(rng, value):
    q, k, v = draw(rng, (4, 6), 1, (1, 1))
    seen = visible((1, 1, 4, 6), is_causal=True, q_offset=1)[0, 0]
    for j in range(6):
        dirty = v.copy()
        dirty[0, 0, j, 1] = value
        out = reference.attention(q, k, dirty, is_causal=True, q_offset=1)[0, 0]
        clean = reference.attention(q, k, v, is_causal=True, q_offset=1)[0, 0]
        np.testing.assert_array_equal(out[seen[:, j], 1], value)
        np.testing.assert_array_equal(np.delete(out, 1, 1), np.delete(clean, 1, 1))
        check(out[~seen[:, j]], clean[~seen[:, j]])
        dirty = k.copy()
        dirty[0, 0, j] = NAN
        out, lse = reference.attention(q, dirty, v, is_causal=True, q_offset=1, return_lse=True)
        assert (np.isnan(out[0, 0]).all(axis=1) == seen[:, j]).all()
        assert (np.isnan(lse[0, 0]) == seen[:, j]).all()


def test_infinite_scores():
    q, v = np.ones((1, 1)), np.array([[1.0], [2.0]])
    out, lse = reference.attention(q, np.array([[INF], [1.0]]), v, return_lse=True)
    assert np.isnan(out).all() and np.isnan(lse).all()
    out, lse = reference.attention(q, np.array([[-INF], [1.0]]), v, return_lse=True)
    assert out == 2 and lse == 1
    assert np.isnan(reference.attention(q, v, v, sinks=np.array([NAN]))).all()


def test_empty():
    for batch, h, g, rows, columns, d, e in [
        (0, 2, 1, 3, 4, 5, 6),
        (2, 0, 0, 3, 4, 5, 6),
        (2, 2, 1, 0, 4, 5, 6),
        (2, 2, 1, 3, 0, 5, 6),
        (2, 2, 1, 3, 4, 0, 6),
        (2, 2, 1, 3, 4, 5, 0),
    ]:
        q, k = np.ones((batch, h, rows, d)), np.ones((batch, g, columns, d))
        v = np.ones((batch, g, columns, e))
        out, lse = reference.attention(q, k, v, return_lse=True, is_causal=True)
        assert out.shape == (batch, h, rows, e) and lse.shape == (batch, h, rows)
        check(out, 1 if columns else 0)
        assert columns or np.isneginf(lse).all()


# ---- layouts and outputs -------------------------------------------------------------------------


def test_layouts_and_dimensions(rng):
    q, k, v = draw(rng)
    options = {"is_causal": True, "alibi_slopes": rng.random(4)}
    out, lse = reference.attention(q, k, v, return_lse=True, **options)
    swapped = [a.swapaxes(1, 2) for a in (q, k, v)]
    got = reference.attention(*swapped, layout="BSHD", return_lse=True, **options)
    np.testing.assert_array_equal(got[0], out.swapaxes(1, 2))
    np.testing.assert_array_equal(got[1], lse)
    for b in range(2):
        got = reference.attention(q[b], k[b], v[b], return_lse=True, **options)
        np.testing.assert_array_equal(got[0], out[b])
        np.testing.assert_array_equal(got[1], lse[b])
        three = [a[b] for a in swapped]
        got = reference.attention(*three, layout="BSHD", return_lse=True, **options)
        np.testing.assert_array_equal(got[0], out[b].swapaxes(0, 1))
        np.testing.assert_array_equal(got[1], lse[b])
    one = {**options, "alibi_slopes": options["alibi_slopes"][3:]}
    for layout in ("BHSD", "BSHD"):
        got = reference.attention(q[1, 3], k[1, 1], v[1, 1], layout=layout, return_lse=True, **one)
        check(got[0], out[1, 3])
        check(got[1], lse[1, 3])


def test_out_and_dtype(rng):
    q, k, v = draw(rng)
    out, lse = reference.attention(q, k, v, return_lse=True)
    given = np.empty(out.shape, np.float32), np.empty(lse.shape, np.float32)
    got = reference.attention(q, k, v, return_lse=True, out=given)
    assert got[0] is given[0] and got[1] is given[1]
    np.testing.assert_array_equal(given[0], out.astype(np.float32))
    np.testing.assert_array_equal(given[1], lse.astype(np.float32))
    alone = np.empty(out.shape, np.float32)
    assert reference.attention(q, k, v, out=alone) is alone
    np.testing.assert_array_equal(alone, given[0])
    narrow = [a.astype(np.float16) for a in (q, k, v)]
    assert reference.attention(*narrow).dtype == np.float64
    wide = [a.astype(np.longdouble) for a in (q, k, v)]
    assert reference.attention(*wide).dtype == np.longdouble


# ---- sequences of many lengths, and merging ------------------------------------------------------


def test_varlen_is_each_sequence(rng):
    ends_q, ends_k = np.array([0, 4, 4, 5, 12]), np.array([0, 3, 9, 9, 20])
    q, k = rng.standard_normal((12, 4, 5)), rng.standard_normal((20, 2, 5))
    v = rng.standard_normal((20, 2, 3))
    mask, bias = rng.random((4, 1, 5, 6)) < 0.7, rng.standard_normal((4, 6, 4))
    options = {"is_causal": True, "window": (4, 1), "softcap": 3.0, "sinks": rng.random(4)}
    slopes, q_offset = rng.random((4, 4)), np.array([1, 0, -1, 2])
    q_lens, kv_lens = np.array([3, 0, 1, 7]), np.array([3, 5, 0, 10])
    out, lse = reference.attention_varlen(
        q, k, v, ends_q, ends_k, mask=mask, bias=bias, alibi_slopes=slopes, q_offset=q_offset,
        q_lens=q_lens, kv_lens=kv_lens, max_seqlen_q=1, max_seqlen_k=1, return_lse=True, **options,
    )  # fmt: skip
    for b in range(4):
        i, j = slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2])
        m, n = i.stop - i.start, j.stop - j.start
        wide_mask, wide_bias = np.zeros((1, 99, 99), bool), np.zeros((4, 99, 99))
        wide_mask[:, :5, :6], wide_bias[:, :6, :4] = mask[b], bias
        want = reference.attention(
            q[i], k[j], v[j], layout="BSHD", return_lse=True, mask=wide_mask[:, :m, :n],
            bias=wide_bias[:, :m, :n], alibi_slopes=slopes[b], q_offset=q_offset[b],
            q_lens=q_lens[b], kv_lens=kv_lens[b], **options,
        )  # fmt: skip
        check(out[i], want[0])
        check(lse[:, i], want[1])


@pytest.mark.parametrize("parts", [0, 1, 2, 5])
def test_merge_of_parts_is_the_whole(rng, parts):
    q, k, v = draw(rng, (7, 30))
    ends = np.sort(rng.integers(0, 31, max(0, parts - 1)))
    ends = [0, *ends, 30] if parts else [0]
    slices = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    made = [reference.attention(q, k[:, :, j], v[:, :, j], return_lse=True) for j in slices]
    outs = np.array([out for out, _ in made]).reshape(parts, 2, 4, 7, 3)
    lses = np.array([lse for _, lse in made]).reshape(parts, 2, 4, 7)
    n = 30 if parts else 0
    whole = reference.attention(q, k[:, :, :n], v[:, :, :n], return_lse=True)
    for axis in (0, 2, -4):
        moved = [np.moveaxis(a, 0, axis % 5) for a in (outs, lses)]
        for got, want in zip(reference.merge_attention_states(*moved, axis=axis), whole,
                             strict=True):  # fmt: skip
            check(got, want)
    swapped = reference.merge_attention_states(outs.swapaxes(2, 3), lses, layout="BSHD")
    check(swapped[0], whole[0].swapaxes(1, 2))
    check(swapped[1], whole[1])
    if parts == 2:
        given = np.empty((2, 4, 7, 3), np.float32), np.empty((2, 4, 7), np.float32)
        pair = (outs[0], lses[0], outs[1], lses[1])
        for got, want in zip(reference.merge_attention(*pair), whole, strict=True):
            check(got, want)
        got = reference.merge_attention(*pair, out=given)
        assert got[0] is given[0] and got[1] is given[1]
        np.testing.assert_array_equal(given[0], reference.merge_attention(*pair)[0].astype("f4"))


def test_merge_corners():
    out = np.array([[NAN], [1.0], [NAN], [1.0], [2.0]])
    lse = np.array([-INF, 0.0, -INF, NAN, 1000.0])
    other, other_lse = (
        np.array([[5.0], [NAN], [NAN], [1.0], [4.0]]),
        np.array([3.0, -INF, -INF, 0, 1000]),
    )
    got, got_lse = reference.merge_attention(out, lse, other, other_lse)
    np.testing.assert_array_equal(got, [[5], [1], [0], [NAN], [3]])
    np.testing.assert_array_equal(got_lse[:4], [3, 0, -INF, NAN])
    check(got_lse[4], 1000 + np.log(2))
