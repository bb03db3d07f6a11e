"""attention_backward where Hopper's kernels store dS: all at once, or some heads after others.

The kernels are for many queries and keys; `attention_backward_cases.storing` has them compute few.
Memory that no kernel has written may not be read.
"""

from __future__ import annotations

import os

import emulator
import numpy as np
import pytest
from attention_backward_cases import Backward, backward, storing, verify, with_other_fills
from conftest import GPU

from cuattn._attention.plan_backward_ds import IMAGE_BYTES

pytestmark = pytest.mark.parametrize("backend", ["emulator-sm_90a", GPU], indirect=True)

ALONE = 4 * IMAGE_BYTES  # of up to 128 queries and as many keys of one head


@pytest.fixture(autouse=True)
def multiprocessors(backend, rng):
    """So few that persistent blocks have many rounds."""
    if backend.runtime is not None:
        backend.runtime.num_sms = int(rng.integers(1, 6))


def bits(gradients):
    return [None if a is None else np.ascontiguousarray(a).tobytes() for a in gradients]


def check(backend, rng, op="float16", most=None, **how):
    """`verify`; that dS is stored, and that dk and dv are what they are without that."""
    names, ran = [], [] if backend.runtime is None else backend.runtime.kernels
    before = len(ran)
    with storing(most):
        problem, got = verify(backend, rng, op, **how)
    if backend.runtime is not None:
        names = [kernel.template.split("_")[2] for kernel in ran[before:]]
        assert names[:3] == ["rows", "kv", "ds"]
    other = backward(backend, problem.forward, problem.more)
    assert bits(got[1:3]) == bits(other[1:3])
    return names


@pytest.mark.parametrize("op", ["float16", "bfloat16"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (128, 64), (40, 104)], ids=str)
def test_head_dims(backend, rng, op, dims):
    check(backend, rng, op, heads=(2, 1), lengths=(150, 203), dims=dims, is_causal=True)


@pytest.mark.parametrize(
    "lengths", [(1, 1), (37, 83), (64, 65), (129, 127), (300, 500), (513, 90)], ids=str
)
def test_lengths(backend, rng, lengths):
    """Of one image, of many, of more than stages of either kernel."""
    dims = [(64, 64), (128, 128)][rng.integers(2)]
    check(backend, rng, lengths=lengths, dims=dims, is_causal=bool(rng.integers(2)))


@pytest.mark.parametrize(
    "window",
    [(0, 0), (None, 5), (17, None), (9, 12), (64, 64), (63, -1), (200, -100), (10**9, 10**9)],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(150, 310), (310, 150)], ids=str)
def test_window(backend, rng, window, lengths):
    """What one kernel has not stored the other does not read, wherever the edges are."""
    window = tuple(w if w is None or w >= 0 else 0 for w in window)
    for offset in (None, -70, 65, 128):
        options = {} if offset is None else {"q_offset": offset}
        check(backend, rng, heads=(1, 1), lengths=lengths, window=window, **options)


def test_many_queries_and_keys(backend, rng):
    """By the plan's own choice."""
    verify(backend, rng, heads=(1, 1), lengths=(1030, 1100), dims=(64, 64), window=(90, 10))
    if backend.runtime is not None:
        names = [kernel.template.split("_")[2] for kernel in backend.runtime.kernels]
        assert names == ["rows", "kv", "ds"]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=str)
def test_rounds(backend, rng, heads):
    """Of one head of K, and of two, of which the last round may have fewer."""
    sharing = heads[0] // heads[1]
    how = {"batch": 3, "heads": heads, "lengths": (100, 120), "is_causal": True}
    for units in (1, 2):
        names = check(backend, rng, most=units * sharing * ALONE, **how)
        rounds = -(-3 * heads[1] // units)
        assert not names or names == ["rows", *["kv", "ds"] * rounds]


@pytest.mark.parametrize("dim", [64, 128])
def test_persistent_blocks(backend, rng, dim):
    """Rounds of many tiles, of few, and of none, after each other."""
    if backend.runtime is not None:
        backend.runtime.num_sms = 2
    how = {"batch": 2, "heads": (2, 1), "dims": (dim, dim)}
    check(backend, rng, lengths=(600, 300), is_causal=True, q_offset=-270, **how)
    check(backend, rng, lengths=(520, 90), window=(9, 0), q_offset=0, **how)


def test_options(backend, rng):
    lens = {"q_lens": np.array([0, 130]), "kv_lens": np.array([183, 70])}
    for options in (
        lens,
        {**lens, "is_causal": True},
        {"sinks": rng.standard_normal(2).astype(np.float32)},
        {"scale": 0.07},
        {"q_offset": np.array([-200, 77]), "is_causal": True},
        {"q_offset": np.array([2**39, -(2**39)]), "window": (5, 5)},
    ):
        check(backend, rng, batch=2, heads=(2, 2), lengths=(160, 183), dims=(64, 64), **options)


def test_twice_is_the_same(backend, rng):
    """Bit by bit, in any order of blocks and threads, in rounds or not."""
    problem = Backward(rng, batch=2, heads=(4, 2), lengths=(150, 190), is_causal=True)
    with storing():
        first = bits(backward(backend, problem.forward, problem.more))
    with storing(2 * 16 * IMAGE_BYTES):
        assert bits(backward(backend, problem.forward, problem.more)) == first
    if backend.runtime is not None:
        for seed in range(1, 4):
            with emulator.activate(backend.arch, int(os.environ["CUATTN_TEST_SEED"]) + seed):
                with storing():
                    assert bits(backward(backend, problem.forward, problem.more)) == first


def test_what_nobody_sees_changes_nothing(backend, rng):
    """Bit by bit: zeros, NaN, infinities, anything, in keys and in rows of padding."""
    for how in (
        {"is_causal": True, "q_offset": 10},
        {"window": (15, 3)},  # leaves keys before those that are seen
        {"window": (15, 3), "q_offset": 100},
        {"kv_lens": np.array([70]), "q_lens": np.array([21])},
        {"kv_lens": np.array([30]), "is_causal": True, "q_offset": 60},
    ):
        problem, results = Backward(rng, lengths=(70, 183), **how), []
        for arrays in with_other_fills(problem):
            with storing():
                results.append(tuple(bits(backward(backend, arrays, problem.more))))
        assert len(set(results)) == 1, how


def test_nan_that_takes_part(backend, rng):
    """In a query it is in its dq alone; in a key, in queries that see it."""
    problem = Backward(rng, heads=(2, 2), lengths=(90, 140), is_causal=True)
    arrays = [np.array(a) for a in problem.forward]
    seen = problem.seen[0, 0]
    row, key = 40, int(np.flatnonzero(seen[40])[-1])
    with storing():
        want = backward(backend, arrays, problem.more)
        for place, at in ((0, row), (1, row), (2, key)):
            spoilt = [np.array(a) for a in arrays]
            spoilt[place][0, 0, at, 0] = np.nan
            got = backward(backend, spoilt, problem.more)
            wanted = seen[:, key] if place == 2 else np.arange(90) == row
            bad = np.isnan(got.dq[0, 0].astype(np.float32)).any(axis=1)
            assert bad[wanted].all()
            if place < 2:
                assert not bad[~wanted].any()
            assert bits([got.dq[:, 1]]) == bits([want.dq[:, 1]])
