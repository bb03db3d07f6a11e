"""Score expressions over a KV cache, and of few queries over many keys, on every backend, against
float64: in the decode kernels, whose keys lie in pages.
"""

from __future__ import annotations

import emulator
import numpy as np
import pytest
from attention_cases import Problem
from kvcache_cases import verify
from score_cases import uses

import cuattn
from cuattn import reference

LENS = [70, 3, 2, 130]
ALL = 4  # which of the uses has all there is


def used(rng, number, lens=LENS, heads=4):
    """One of the uses, as options."""
    case = [*uses(rng, len(lens), heads, max(lens))][number]
    return {"score": case.text, "score_args": case.arrays}


@pytest.mark.parametrize("page_size", [None, 5])
@pytest.mark.parametrize("number", [0, ALL])
def test_uses(backend, rng, number, page_size):
    """Places of keys count in the sequence, wherever its pages lie."""
    how = {"page_size": page_size, **used(rng, number)}
    verify(backend, rng, lens=[70, 0, 3, 130], **how)
    verify(backend, rng, lens=LENS, **how, rows=3, new=2, is_causal=True, window=(60, 0))


def test_dtypes(backend, rng):
    verify(backend, rng, "float64", lens=LENS, page_size=16, rows=2, is_causal=True,
           **used(rng, ALL))  # fmt: skip


def test_many_rows(backend, rng):
    """Of several queries and heads, a warp each."""
    how = {"heads": (8, 1), "rows": 9, "window": (50, 0)}
    verify(backend, rng, lens=LENS, page_size=16, **how, **used(rng, ALL, heads=8))


def test_values_in_keys(backend, rng):
    """Multi-head latent attention of as many heads as Hopper has a kernel of its own for."""
    how = {"heads": (64, 1), "dims": (576, 512), "value_dim": 512, "lens": [40, 9]}
    verify(backend, rng, page_size=16, **how, **used(rng, 0, how["lens"], 64))


def test_with_every_other_option(backend, rng):
    how = {"softcap": 3.0, "scale": -0.2, "alibi_slopes": rng.uniform(0, 0.2, 4)}
    how |= {"q_offset": np.array([67, 0, 4, 127], np.int32), "window": (90, 4)}
    how |= {"sinks": rng.standard_normal(4), "q_lens": np.array([3, 1, 2, 0], np.int32)}
    how |= {"tree": rng.random((3, 5)) < 0.6, "missing": [(3, 2)], "page_size": 16}
    verify(backend, rng, "float32", lens=LENS, rows=3, **how, **used(rng, ALL))


def test_eight_bits(backend, rng):
    """Scores are those of the numbers that the cache stands for."""
    q = rng.standard_normal((2, 4, 1, 64)).astype(np.float16)
    k, v = rng.integers(-127, 128, (2, 2, 2, 40, 64)).astype(np.int8)
    how = {"k_scale": 0.02, "v_scale": 0.01, "kv_lens": np.array([40, 17])}
    how |= used(rng, 0, [40, 17])
    ref = reference.attention_kvcache(q, k, v, **how)
    args = {name: backend.asarray(array) for name, array in how["score_args"].items()}
    how |= {"kv_lens": backend.asarray(how["kv_lens"]), "score_args": args}
    out = cuattn.attention_kvcache(*map(backend.asarray, (q, k, v)), **how)
    np.testing.assert_allclose(backend.asnumpy(out), ref, atol=3e-3)


def test_few_queries_over_many_keys(rng):
    """`attention` has blocks share the keys, and scores know their places."""
    for lengths in ((1, 1100), (3, 1030)):
        problem = Problem(rng, batch=2, heads=(4, 2), lengths=lengths, is_causal=True)
        problem.options |= used(rng, ALL, (lengths[1],) * 2)
        with emulator.activate("sm_80") as runtime:
            out, lse = cuattn.attention(*problem.arrays, return_lse=True, **problem.options)
        assert [kernel.header for kernel in runtime.kernels] == ["attention/decode.cuh"]
        problem.check(out, lse)


def test_warm_calls_read_their_own_arrays(backend):
    """Under any name; of a query for which all keys are hidden the result is 0."""
    q, k = (backend.asarray(np.zeros((1, 1, n, 8), np.float32)) for n in (1, 3))
    v = backend.asarray(np.full((1, 1, 3, 8), [[1.0], [2.0], [3.0]], np.float32))
    for place in (0, 2, 7, 1):
        for name in ("t", "u"):
            args = {name: backend.asarray(np.arange(3) == place)}
            score = f"where({name}[k], s, -inf)"
            out = cuattn.attention_kvcache(q, k, v, score=score, score_args=args)
            np.testing.assert_array_equal(backend.asnumpy(out), 0 if place == 7 else place + 1)


def test_arrays_may_not_lie_in_what_is_written(backend):
    x = backend.asarray(np.ones((1, 1, 4, 8), np.float32))
    q, t = x[:, :, :1] + 1, x[0, 0, :1] + 1
    lens, score = backend.asarray(np.array([2])), {"score": "s + t[k, 0]"}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^score_args\['t'\] must .*k_cache"):
            cuattn.attention_kvcache(
                q, x, x + 1, kv_lens=lens, k_new=q, v_new=q, **score, score_args={"t": x[0, 0]}
            )
        with pytest.raises(ValueError, match=r"^out must .*score_args\['t'\]"):
            cuattn.attention_kvcache(q, x, x, out=t[None, None], **score, score_args={"t": t})


def test_errors_are_those_of_attention():
    x = np.ones((1, 1, 1, 8), np.float32)
    with pytest.raises(ValueError, match=r"^score must .* column 5"):
        cuattn.attention_kvcache(x, x, x, score="s + t[k]")
    with pytest.raises(ValueError, match=r"^score_args must come with score"):
        cuattn.attention_kvcache(x, x, x, score_args={"t": x})
