"""attention of few queries over many keys, which blocks share as those of a cache (`is_decode`)."""

from __future__ import annotations

import emulator
import numpy as np
import pytest
from attention_cases import INF, OPS, Problem, arranged, call, verify

import cuattn

KEYS = 1024  # of which the decode kernel takes 16 rows
OPTIONS = {
    "none": {},
    "causal": {"is_causal": True},
    "window": {"window": (200, 3)},
    "softcap": {"softcap": 3.0, "spread": 4.0},
    "alibi": {"alibi_slopes": np.array([[0.5, 0.1, 0.0, 0.02], [0.3, 0.0, 1.0, 2.0]])},
    "sinks": {"sinks": np.array([0.0, -3.0, 20.0, -INF], np.float32)},
    "scale": {"scale": -0.3},
    "offset": {"q_offset": 900, "is_causal": True},
    "lengths": {
        "q_lens": np.array([3, 1], np.uint8), "kv_lens": np.array([1030, 0]),
        "q_offset": np.array([700, 5], np.int16), "window": (300, 9),
    },
    "all": {
        "window": (537, 0), "softcap": 5.0, "is_causal": True, "scale": 0.2,
        "alibi_slopes": np.ones(4) / 900, "sinks": np.ones(4, np.float16),
        "q_lens": np.array([0, 2]), "kv_lens": np.array([7, 1029]),
    },
}  # fmt: skip


def decoded(backend):
    """Whether the last call was computed by the decode kernel, where that is known."""
    return backend.runtime is None or backend.runtime.kernels[-1].template == "attention_decode"


@pytest.mark.parametrize("how", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(backend, rng, how):
    for op in ("bfloat16", "float32"):
        verify(backend, rng, op, batch=2, heads=(4, 2), lengths=(3, 1031), **how)
        assert decoded(backend)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("heads", "rows"), [((1, 1), 1), ((1, 1), 16), ((16, 1), 1), ((6, 2), 5)], ids=str
)
def test_rows(backend, rng, op, heads, rows):
    verify(backend, rng, op, heads=heads, lengths=(rows, 1500), dims=(64, 40), is_causal=True)
    assert decoded(backend)


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_layouts(backend, rng, layout, ndim):
    """Of fewer axes, too, with the options that they have."""
    one = np.float32(0.5)
    options = {"sinks": np.array([one]), "alibi_slopes": np.array([one / 500])}
    problem = Problem(rng, heads=(1, 1), lengths=(2, 1100), dims=(59, 64), **options)
    arrays = [np.ascontiguousarray(arranged(a, layout, ndim)) for a in problem.arrays]
    if ndim == 2:
        options = {name: a.reshape(()) for name, a in options.items()}
    out, lse = call(backend, arrays, options, layout=layout, return_lse=True)
    out = out.swapaxes(-3, -2) if layout == "BSHD" and ndim > 2 else out
    problem.check(out, lse, ndim)
    assert decoded(backend)


@pytest.mark.parametrize("op", OPS)
def test_bits_of_a_sequence(backend, rng, op):
    """Those that it has alone, as has each of its heads."""
    if backend.name == "numpy":
        pytest.skip("BLAS adds up in an order that depends on the number of rows")
    q, k, v = Problem(rng, op, 3, (4, 2), (2, 2000)).clean
    options = {
        "return_lse": True,
        "precision": "tf32" if op == "tf32" else None,
        "window": (900, 0),
    }
    whole = call(backend, (q, k, v), {}, **options)
    for b, h in ((0, 0), (2, 1)):
        own = slice(2 * h, 2 * h + 2)
        alone = call(backend, (q[b, own], k[b, h : h + 1], v[b, h : h + 1]), {}, **options)
        for one, all_ in zip(alone, whole, strict=True):
            assert one.tobytes() == all_[b, own].tobytes()


def test_what_it_is_for(rng):
    """Few rows of a key head, many keys, and nothing that is added or masked by an array."""
    with emulator.activate("sm_90a") as runtime:

        def template(heads=(4, 2), rows=8, keys=KEYS, **options):
            q, k, v = Problem(rng, heads=heads, lengths=(rows, keys)).clean
            cuattn.attention(q, k, v, **options)
            return runtime.kernels[-1].template

        assert template() == template(rows=1, keys=5000) == "attention_decode"
        one = np.ones((1, 1), bool)
        others = [
            template(rows=9),
            template(heads=(4, 1)),
            template(keys=KEYS - 1),
            template(mask=one),
            template(bias=one.astype(np.float32)),
        ]
        assert "attention_decode" not in others
        flat = np.ones((1200, 1, 64), np.float16)
        ends = np.array([0, 1]), np.array([0, 1200])
        cuattn.attention_varlen(flat[:1], flat, flat, *ends)
        assert runtime.kernels[-1].template != "attention_decode"


def test_a_capture_without_a_workspace(rng):
    q, k, v = Problem(rng, lengths=(1, KEYS)).clean
    with emulator.activate("sm_80") as runtime:
        runtime.capturing = True
        with pytest.raises(RuntimeError, match="^attention must run once on this stream"):
            cuattn.attention(q, k, v)
        assert not runtime.kernels
        cuattn.attention(q, k[:, :, :-1], v[:, :, :-1])  # by another kernel


@pytest.mark.parametrize("dims", [(264, 40), (40, 264)], ids=str)
def test_wide_heads(backend, rng, dims):
    """More columns than the decode kernel has: blocks do not share keys."""
    verify(backend, rng, heads=(2, 1), lengths=(1, KEYS), dims=dims)
