"""Attention under a block mask by Hopper's kernel: what it computes whatever runs first, what it
loads, and what it leaves to the general kernel; test_block_mask.py has it run, too.
"""

from __future__ import annotations

import numpy as np
import pytest
from attention_cases import Problem
from test_attention_sm90 import Run, bits
from test_block_mask import tiled

import cuattn
from cuattn import reference
from cuattn._attention.plan_sm90 import BLOCKED_TILES

GENERAL = "attention/forward.cuh"
SCHEDULES = 3


def run(problem, mask, *, block=(128, 128), **how):
    """The call on the emulator of a device of two multiprocessors."""
    lists = reference.block_mask(mask, block=block)
    options = {name: value for name, value in problem.options.items() if name != "mask"}
    found = Run(cuattn.attention, *problem.arrays, block_mask=lists, **options, **how)
    assert "ListedTiles" in found.kernel.name
    return found


# Every tile; heads of their own, repeated ones, and heads that share keys; more and fewer rows of
# tiles than blocks have turns; whatever else hides keys, or changes scores.
CASES = {
    "four stages": {"dims": (64, 64), "lengths": (390, 900)},
    "four stages, modified": {
        "dims": (40, 64), "heads": (2, 2), "alibi_slopes": np.array([0.1, 0.01]), "softcap": 50.0,
    },
    "panels of 32 columns": {"dims": (96, 88), "heads": (4, 2), "is_causal": True},
    "two stages": {"dims": (128, 128), "window": (200, 90), "lengths": (300, 700)},
    "wide": {"dims": (192, 128), "kv_lens": np.array([0, 333]), "batch": 2, "heads": (1, 1)},
    "wider": {"dims": (160, 192), "q_lens": np.array([0, 60]), "batch": 2, "heads": (1, 1)},
    "values of odd width": {"dims": (64, 35), "softcap": 20.0, "scale": -0.1},
    "widest": {"dims": (256, 256), "heads": (1, 1), "sinks": np.array([0.5])},
    "widest, modified": {
        "dims": (64, 256), "heads": (2, 1), "softcap": 7.0, "is_causal": True, "q_offset": 30,
        "lengths": (140, 500),
    },
}  # fmt: skip


def padded(a):
    """The same with NaN behind each row."""
    memory = np.full((*a.shape[:-1], a.shape[-1] + -a.shape[-1] % 8 + 8), np.nan, a.dtype)
    memory[..., : a.shape[-1]] = a
    return memory[..., : a.shape[-1]]


@pytest.mark.drawn
@pytest.mark.parametrize("case", CASES)
def test_schedules(rng, case):
    """Correct, and bitwise the same, whatever runs first; with NaN in all that nobody sees, within
    tiles, in tiles that are not listed, and behind the rows."""
    how = {"heads": (2, 1), "lengths": (200, 400), "batch": 1, **CASES[case]}
    lengths = tuple(n - int(rng.integers(64)) for n in how.pop("lengths"))
    lead = (how["batch"], how["heads"][0]) if rng.random() < 0.5 else (1, 1)
    mask = tiled(rng, lead, lengths)
    mask[..., 60:128, :128], mask[..., :60, rng.integers(128, size=5)] = True, False
    mask[..., rng.integers(lengths[1], size=9)] = False
    op = str(rng.choice(["float16", "bfloat16"]))
    problem = Problem(rng, op, lengths=lengths, mask=mask, **how)
    problem.q, problem.k, problem.v = map(padded, problem.arrays)
    first = None
    for seed in range(SCHEDULES):
        out = padded(np.full((*problem.q.shape[:3], problem.v.shape[3]), np.nan, problem.q.dtype))
        lse = np.full(out.shape[:3], np.nan, np.float32)
        found = run(problem, mask, seed=seed, out=(out, lse))
        if first is None:
            problem.check(*found.results)
        first = first or bits(found.results)
        assert bits(found.results) == first
        assert np.isnan(out.base[..., out.shape[-1] :]).all()


@pytest.mark.parametrize("window", [(150, None), (None, 30)], ids=str)
def test_edges_of_full_tiles(rng, window):
    """A window ends within them, on either side."""
    lengths = 200, int(rng.integers(400, 500))
    mask = np.ones(lengths, bool)
    problem = Problem(rng, "float16", 1, (1, 1), lengths, (96, 64), mask=mask, window=window)
    problem.check(*run(problem, mask).results)


@pytest.mark.parametrize("block", [(256, 128), (128, 384)], ids=str)
def test_tiles_of_any_multiple(rng, block):
    lengths = int(rng.integers(300, 420)), int(rng.integers(500, 700))
    mask = tiled(rng, (1, 2), lengths, block)
    problem = Problem(rng, "float16", 1, (2, 1), lengths, (256, 64), mask=mask, window=(250, 300))
    problem.check(*run(problem, mask, block=block).results)


def test_rows_without_any_tile(rng):
    """Between others, of which blocks have some in turn; nothing is read for them but Q."""
    mask = np.zeros((5 * 128, 300), bool)
    mask[128:256, 140], mask[400, :] = True, True
    problem = Problem(rng, "bfloat16", 1, (3, 3), mask.shape, (64, 128), mask=mask)
    found = run(problem, mask)
    problem.check(*found.results)
    bytes_of_q, bytes_of_tile = 3 * 640 * 64 * 2, 3 * 128 * (64 + 128) * 2
    assert found.counters.bulk_bytes == bytes_of_q + (1 + 3) * bytes_of_tile


@pytest.mark.parametrize("score", ["s + far[abs(q - k)]", "where(k % 3 == 1, s, log(s - s))"])
def test_hidden_scores_of_an_expression(rng, score):
    """NaN where nobody looks stays there."""
    lengths = 150, 300
    mask = tiled(rng, (1, 1), lengths)
    mask[..., np.arange(300) % 3 != 1] = False
    args = {"far": rng.standard_normal(400)} if "far" in score else {}
    q, k, v = (rng.standard_normal((1, 2, n, 128)).astype(np.float16) for n in (150, 300, 300))
    v[:, :, ~mask.any(axis=(0, 1, 2))] = np.nan
    options = {"score": score, "score_args": args}
    found = Run(cuattn.attention, q, k, v, block_mask=reference.block_mask(mask), **options)
    out, lse = reference.attention(q, k, v, mask=mask, return_lse=True, **options)
    np.testing.assert_allclose(found.results[0], out, rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(found.results[1], lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row", BLOCKED_TILES, ids=str)
def test_passing_over_tiles_changes_no_bit(rng, row):
    """A list of all tiles, all of them partial, has the same result."""
    lengths, (dim, value_dim, modified) = (150, 380), row[:3]
    mask = tiled(rng, (1, 1), lengths)
    mask[..., :128, 128:256] = False
    options = {"softcap": 9.0} if modified else {}
    problem = Problem(rng, "float16", 1, (1, 1), lengths, (dim, value_dim), mask=mask, **options)
    found = run(problem, mask)
    counts, indices, full, *more = reference.block_mask(mask)
    counts[...], indices[...], full[...] = 3, np.arange(3), False
    every = cuattn.BlockMask(counts, indices, full, *more)
    again = Run(cuattn.attention, *problem.arrays, block_mask=every, **options)
    assert bits(found.results) == bits(again.results)
    assert found.counters.wgmma < again.counters.wgmma


def test_a_tile_is_read_once_for_a_head(rng):
    """Heads that share keys have lists of their own, and are not packed; K and V, in listed tiles,
    are read for each of them, one product and one exponential for each of their scores."""
    mask = np.zeros((1, 4, 2, 7), bool)
    mask[rng.random(mask.shape) < 0.4] = True
    tiles, mask = int(mask.sum()), mask.repeat(128, 2).repeat(128, 3)
    q, k, v = (rng.standard_normal((1, h, n, 64)).astype(np.float16) * 0.1
               for h, n in ((4, 256), (1, 896), (1, 896)))  # fmt: skip
    found = Run(cuattn.attention, q, k, v, block_mask=reference.block_mask(mask))
    assert found.keys == 128
    assert found.counters.bulk_bytes == q.nbytes + tiles * 128 * (64 + 64) * 2
    assert found.counters.wgmma == tiles * 4 * found.groups * (64 + 128) // 16
    assert found.counters.exps == tiles * 128 * 128
    counters = found.counters
    assert counters.shared_wavefronts == counters.shared_wavefronts_ideal > 0


def test_what_the_general_kernel_computes(rng):
    """A bias beside it, expressions of the widest heads, and arrays that TMA cannot move."""
    mask = tiled(rng, (1, 1), (140, 260))
    lists = reference.block_mask(mask)
    for dim, header, options in (
        (256, "attention/forward_sm90.cuh", {}),
        (192, "attention/forward_sm90.cuh", {"score": "s * 2"}),
        (256, GENERAL, {"score": "s * 2"}),
        (64, GENERAL, {"bias": np.zeros(260, np.float16)}),
        (60, GENERAL, {}),
    ):
        arrays = [rng.standard_normal((1, 1, n, dim)).astype(np.float16) for n in (140, 260, 260)]
        found = Run(cuattn.attention, *arrays, header=header, block_mask=lists, **options)
        want = reference.attention(*arrays, mask=mask, **options)
        np.testing.assert_allclose(found.results[0], want, rtol=1e-2, atol=1e-2)
