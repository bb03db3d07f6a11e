"""Score expressions in Hopper's attention kernel: every tile, packed heads, places of queries and
keys, and what they cost. test_score.py has it run, too.
"""

from __future__ import annotations

import numpy as np
import pytest
from attention_cases import Problem
from score_cases import uses
from test_attention_sm90 import Run, bits

import cuattn
from cuattn import reference

ALL = 4  # which of the uses has all there is


def used(rng, number, batch, heads, columns):
    """One of the uses, as options."""
    case = [*uses(rng, batch, heads, columns)][number]
    return {"score": case.text, "score_args": case.arrays}


def verify(rng, op="float16", batch=1, heads=(2, 1), lengths=(130, 300), number=ALL, **how):
    problem = Problem(rng, op, batch=batch, heads=heads, lengths=lengths, **how)
    problem.options |= used(rng, number, batch, heads[0], lengths[1])
    run = Run(cuattn.attention, *problem.arrays, **problem.options)
    problem.check(*run.results)
    return run


@pytest.mark.parametrize("dims", [(96, 96), (192, 128)], ids=str)
def test_tiles(rng, dims):
    """Those that test_score.py does not reach."""
    run = verify(rng, "bfloat16", dims=dims, lengths=(70, 150), is_causal=True, window=(90, 0))
    assert run.kernel.expression


@pytest.mark.parametrize("heads", [(8, 1), (48, 3)], ids=str)
def test_packed_heads(rng, heads):
    """Rows of several heads lie side by side: each has a head of its own."""
    how = {"softcap": 3.0, "alibi_slopes": np.linspace(0, 0.3, heads[0])}
    how |= {"batch": 2, "heads": heads, "lengths": (5, 200), "q_offset": np.array([150, 3])}
    verify(rng, number=0, **how)


def test_places(rng):
    """Far from the queries, in part beyond all keys, and of sequences that end early."""
    how = {"batch": 3, "lengths": (140, 260), "kv_lens": np.array([0, 129, 260])}
    how |= {"q_lens": np.array([140, 70, 9])}
    verify(rng, **how)
    verify(rng, **how, q_offset=np.array([-(2**33), 100, 2**33]))


def test_ragged(rng):
    """b, q and k count in each sequence, whose rows share tiles with those of its neighbours."""
    ends_q, ends_k = np.array([0, 5, 5, 155, 158]), np.array([0, 9, 21, 191, 491])
    q, k, v = (
        rng.standard_normal((n, h, 64)).astype(np.float16)
        for n, h in ((158, 4), (491, 2), (491, 2))
    )
    how = {"is_causal": True, "return_lse": True, **used(rng, ALL, 4, 4, 300)}
    ref, ref_lse = reference.attention_varlen(q, k, v, ends_q, ends_k, **how)
    del how["return_lse"]
    first = None
    for seed in range(3):
        run = Run(cuattn.attention_varlen, q, k, v, ends_q, ends_k, seed=seed, **how)
        out, lse = run.results
        np.testing.assert_allclose(out.astype(float), ref.astype(float), atol=4e-3)
        np.testing.assert_allclose(lse, ref_lse, atol=1e-4)
        first = first or bits(run.results)
        assert bits(run.results) == first


def test_what_it_costs(rng):
    """Elements are read where somebody may see the key, 8 keys at a time, and no exponential more
    than without."""
    q, k, v = (rng.standard_normal((1, 1, n, 64)).astype(np.float16) for n in (128, 520, 520))
    seen = 517  # keys; of the last 8, 5
    how = {"scale": -0.1, "kv_lens": np.array([seen])}
    table = {"t": rng.standard_normal(520).astype(np.float32)}
    plain = Run(cuattn.attention, q, k, v, **how).counters
    scored = Run(cuattn.attention, q, k, v, **how, score="s + t[k]", score_args=table).counters
    assert scored.exps == plain.exps
    read = scored.global_bytes_read - plain.global_bytes_read
    assert read == 4 * 128 * -(-seen // 8) * 8
