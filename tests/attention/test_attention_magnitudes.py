"""attention with scores of any finite size, on every backend, against float64.

Padding by a large negative bias (Keras 1e9, GPT-2 and flax 1e10, transformers finfo.min), and what
q and k make themselves, which is how attention_sm90 meets it: hidden keys come before, after and
between those that count, over many tiles. Right is what a mask gives.
"""

from __future__ import annotations

import numpy as np
import pytest
from attention_cases import OPS, Problem, call, precision_of, put
from tolerance import dtype_of, lse_dtype

import cuattn

LENGTHS = (19, 260)  # three tiles of keys on Hopper
SMALL = {"lengths": LENGTHS, "heads": (1, 1)}
SIZES = (1e9, 1e30, float(np.finfo(np.float32).max))


def padding(kind):
    """Which keys count for each query."""
    rows, columns = LENGTHS
    i, j = np.ogrid[:rows, :columns]
    return {
        "left": np.broadcast_to(j >= columns - columns // 3, LENGTHS),
        "right": np.broadcast_to(j < columns // 3, LENGTHS),
        "documents": i * 4 // rows == j * 4 // columns,
    }[kind]


def largest(op):
    """Its square, and that of some multiples, is a score that float32 holds."""
    return {"float16": 3e4, "float64": 1e150}.get(op, 1e18)


@pytest.mark.parametrize("kind", ["left", "right", "documents"])
@pytest.mark.parametrize("op", OPS)
def test_padding_by_bias(backend, rng, op, kind):
    seen = padding(kind)
    for size in (*SIZES, 1e300) if op == "float64" else SIZES:
        problem = Problem(rng, op, **SMALL, mask=seen)
        bias = np.where(seen, 0, -size).astype(lse_dtype(problem.q.dtype))
        options = {"precision": precision_of(op)[1], "bias": bias}
        problem.check(*call(backend, problem.clean, options, return_lse=True))


@pytest.mark.parametrize("kind", ["left", "right", "documents"])
@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_padding_by_scores(backend, rng, op, modified, kind):
    """Column 0 of q k^T hides as a bias does; the others compare the keys that count."""
    size = largest(op)
    for factor in (1.0, 2.0**-8):
        options = {"alibi_slopes": np.array([0.5])} if modified else {}
        problem = Problem(rng, op, **SMALL, mask=padding(kind), **options)
        q, k, v = problem.clean
        if kind == "documents":  # as many columns as documents
            q[..., :4] = 0
            for document in range(4):
                rows = np.arange(LENGTHS[0]) * 4 // LENGTHS[0] == document
                q[..., rows, document] = size
                k[..., document] = np.where(np.arange(LENGTHS[1]) * 4 // LENGTHS[1] == document, 0,
                                            -size * factor)  # fmt: skip
        else:
            q[..., 0] = size
            k[..., 0] = np.where(problem.options["mask"][0], 0, -size * factor)
        problem.hide()
        options["precision"] = precision_of(op)[1]
        problem.check(*call(backend, problem.clean, options, return_lse=True))


@pytest.mark.parametrize("op", OPS)
def test_one_bias_for_a_whole_row(backend, rng, op):
    """Equal scores, however low: the mean of V."""
    for size in (1e12, *SIZES):
        problem = Problem(rng, op, **SMALL)
        q, k, v = problem.clean
        q[..., ::3, :] = 0
        bias = np.zeros(LENGTHS, np.float32)
        bias[::3] = -size
        options = {"precision": precision_of(op)[1], "bias": bias}
        out, lse = call(backend, (q, k, v), options, return_lse=True)
        problem = Problem(rng, op, **SMALL)
        problem.clean = q, k, v
        problem.hide()
        problem.check(out)  # without a bias
        np.testing.assert_allclose(lse[..., ::3], -size, rtol=1e-6)


def test_bias_beyond_the_accumulator(backend, rng):
    """A finite bias of float64 hides as much as float32 can say, and no row of them is empty."""
    for op in ("float16", "float32"):
        problem = Problem(rng, op, **SMALL)
        q, k, v = problem.clean
        bias = np.zeros(LENGTHS)
        bias[5], bias[6] = -1e300, -np.inf
        q[..., 5, :] = 0
        out = call(backend, (q, k, v), {"bias": bias})
        assert not out[..., 6, :].any()
        problem = Problem(rng, op, **SMALL)
        problem.clean = q, k, v
        problem.hide()
        keep = np.arange(LENGTHS[0]) != 6
        expected = problem.expected()[0][..., keep, :]
        np.testing.assert_allclose(out[..., keep, :].astype(float), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_the_best_keys_share_the_weight(backend, rng, op, modified):
    """Equal best scores in far tiles, other scores far below or near -best: the mean of theirs."""
    size = largest(op)
    best = rng.random(LENGTHS[1]) < 0.05
    best[rng.integers(LENGTHS[1])] = True
    for sign in (1, -1):
        options = {"softcap": 700.0} if modified else {}
        problem = Problem(rng, op, **SMALL, mask=best)
        q, k, v = problem.clean
        q[...], k[...] = 0, 0
        q[..., 0] = sign * size
        levels = rng.choice([0.5, -0.5, 0.0, -1.0], LENGTHS[1])
        k[..., 0] = np.where(best, 1, levels) * sign * size
        problem.options |= options
        problem.hide()
        options["precision"] = precision_of(op)[1]
        if modified:  # all that is positive is at the cap
            problem.options["mask"] = (best | (levels > 0))[None]
            problem.hide()
        problem.check(*call(backend, problem.clean, options, return_lse=True))


@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
@pytest.mark.parametrize("op", OPS)
def test_where_exponents_change_their_form(backend, rng, op, order):
    """Scores some units around 2^20 / log2 e and its negative, which are few roundings apart."""
    for sign in (1, -1):
        for sinks in (None, 1.0, 5.0, -3.0):
            options = {"scale": 1.0}
            problem = Problem(rng, op, **SMALL)
            q, k, v = problem.clean
            steps = rng.integers(-80, 81, LENGTHS[1])
            steps = {"rising": np.sort(steps), "falling": -np.sort(-steps), "mixed": steps}[order]
            q[...], k[...] = 0, 0
            q[..., :3] = 1024, 16, 1
            k[..., 0], k[..., 1], k[..., 2] = sign * 708, sign * 114, steps / 4
            if sinks is not None:
                options["sinks"] = np.full(1, sign * 726816 + 20 + sinks, np.float32)
            problem.options |= options
            problem.hide()
            problem.check(*call(backend, problem.clean, problem.options, return_lse=True))


@pytest.mark.parametrize("sink", [1e9, 1e30, -1e9, -1e30])
@pytest.mark.parametrize("op", OPS)
def test_sinks(backend, rng, op, sink):
    """Beside usual scores, and beside scores beyond them."""
    for size in (None, largest(op)):
        problem = Problem(rng, op, **SMALL, sinks=np.array([sink], np.float32))
        q, k, v = problem.clean
        if size is not None:
            q[..., 1:] = 0
            q[..., 0], k[..., 0] = size, np.where(np.arange(LENGTHS[1]) < 150, -size, -size / 2)
            problem.hide()
        problem.check(*call(backend, problem.arrays, problem.options, return_lse=True))


@pytest.mark.parametrize("op", OPS)
def test_sinks_alone(backend, rng, op):
    """Of queries that see nothing: the lse is the sink, however low."""
    for sink in (-300.0, -1e9, -1e30, 1e30):
        problem = Problem(rng, op, **SMALL, sinks=np.array([sink], np.float32), q_offset=-9999,
                          is_causal=True)  # fmt: skip
        out, lse = call(backend, problem.arrays, problem.options, return_lse=True)
        assert not out.any()
        np.testing.assert_allclose(lse, sink, rtol=1e-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("slope", [1e6, 1e9, 1e30])
def test_alibi(backend, rng, op, slope):
    """The nearest key alone, also where it is far away."""
    for q_offset in (None, 500, -90):
        slopes = np.array([slope], np.float32)
        problem = Problem(rng, op, **SMALL, alibi_slopes=slopes, q_offset=q_offset)
        problem.check(*call(backend, problem.arrays, problem.options, return_lse=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("softcap", [1e-300, 1e-30, 64.0, 65.0, 1e4, 1e12, 1e30, 1e300])
def test_softcap(backend, rng, op, softcap):
    """From a cap that makes all scores equal to one that changes none."""
    for size in (1.0, 100.0):
        options = {"softcap": softcap} if softcap < 1e12 else {}
        if softcap < 1:  # scale / softcap is then beyond float32
            options["scale"] = 20.0
        problem = Problem(rng, op, **SMALL, spread=size, **options)
        problem.clean[0][..., 0, :] = 0  # scores of 0
        problem.hide()
        options = problem.options | {"softcap": softcap}
        problem.check(*call(backend, problem.arrays, options, return_lse=True))


@pytest.mark.parametrize("scale", [1e38, 2.5e38, 1e300, -1e300, 1e-39, 1e-300])
@pytest.mark.parametrize("op", ["bfloat16", "float32", "tf32"])
def test_scale(backend, rng, op, scale):
    """Whatever makes of tiny products a score; beyond float32 the scale is its largest number."""
    most = np.finfo(np.float32).max
    problem = Problem(rng, op, **SMALL, scale=float(np.clip(scale, -most, most)))
    q, k, v = problem.clean
    q[...] = 1
    k[...] = 0
    k[..., 0] = rng.integers(-8, 9, LENGTHS[1]) * 2.0**-124
    problem.hide()
    options = problem.options | {"scale": scale}
    out, lse = call(backend, problem.clean, options, return_lse=True)
    problem.check(out, lse)


@pytest.mark.parametrize("op", OPS)
def test_varlen(backend, rng, op):
    """Bit by bit as attention of each sequence."""
    size = largest(op)
    dtype, precision = precision_of(op)
    q, k, v = (rng.standard_normal((n, 1, 64)).astype(dtype_of(dtype)) for n in (50, 400, 400))
    q[..., 0] = size
    k[..., 0] = np.where(np.arange(400) % 200 < 130, -size, 0)[:, None]
    ends = np.array([0, 30, 50]), np.array([0, 200, 400])
    options = {"precision": precision, "return_lse": True}
    arrays = [put(backend, a) for a in (q, k, v, *ends)]
    out, lse = map(backend.asnumpy, cuattn.attention_varlen(*arrays, **options))
    assert np.isfinite(out.astype(np.float32)).all() and np.isfinite(lse).all()
    for i, j in zip(*(map(slice, e, e[1:]) for e in ends), strict=True):
        one, one_lse = call(backend, (q[i], k[j], v[j]), options, layout="BSHD")
        assert one.tobytes() == out[i].tobytes() and (one_lse == lse[:, i]).all()
