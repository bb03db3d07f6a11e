"""attention's Hopper kernel: its pipeline under many schedules, what it moves and computes, its
lazy rescale, and what it leaves to the general kernel; test_attention.py has it run, too.
"""

from __future__ import annotations

import os

import emulator
import ml_dtypes
import numpy as np
import pytest
from attention_cases import Problem, compare, compare_lse
from conftest import SEED
from sm90_trace import sizes
from test_attention_traffic import draw, ranges_of_blocks
from test_attention_varlen import Ragged

import cuattn
from cuattn._attention import problem as attention_problem
from cuattn._attention.plan_sm90 import plan_attention_sm90

SCHEDULES = 8


def bits(results):
    return [np.ascontiguousarray(one).tobytes() for one in results]


class Run:
    """One call on the emulator: results, counters, and the sizes of its kernel."""

    def __init__(
        self, call, *arrays, num_sms=2, seed=0, header="attention/forward_sm90.cuh", **options
    ):
        seed += int(os.environ[SEED])
        with emulator.activate("sm_90a", num_sms=num_sms, seed=seed) as runtime:
            self.results = call(*arrays, return_lse=True, **options)
        self.counters = runtime.total()
        (self.kernel,) = runtime.kernels
        assert self.kernel.header == header
        if header == "attention/forward_sm90.cuh":
            self.groups, self.keys, _, self.dim, self.value_dim = sizes(self.kernel)
            self.rows = 64 * self.groups


# More tiles than stages, more rows than blocks have turns, edges in the first, last and all tiles.
PIPELINES = {
    "three warpgroups": {"lengths": (390, 1100)},
    "a turn has one tile": {"lengths": (390, 100)},
    "two warpgroups": {"lengths": (300, 600), "dims": (128, 128), "is_causal": True},
    "panels of 32 columns": {"lengths": (140, 500), "dims": (96, 96)},
    "out in the place of Q": {"lengths": (280, 500), "dims": (192, 192), "window": (90, 120)},
    "out wider than Q": {"lengths": (200, 330), "dims": (64, 256)},
    "out narrower than Q": {"lengths": (200, 520), "dims": (192, 128), "is_causal": True},
    "widest": {"lengths": (260, 400), "dims": (256, 256)},
    "scores are more than scaled": {
        "lengths": (260, 700), "softcap": 30.0, "alibi_slopes": np.array([0.5, 0.01]),
    },
    "packed heads": {"heads": (8, 1), "lengths": (40, 700), "dims": (128, 128), "is_causal": True},
    "packed heads with sinks": {
        "heads": (48, 1), "batch": 2, "lengths": (3, 300), "sinks": np.linspace(-3, 3, 48),
        "alibi_slopes": np.linspace(0, 0.3, 96).reshape(2, 48),
    },
    "values that nobody sees": {
        "batch": 3, "lengths": (200, 450), "dims": (128, 128), "kv_lens": np.array([0, 129, 450]),
        "q_lens": np.array([200, 70, 0]),
    },
    "values beyond a window": {
        "batch": 3, "heads": (1, 1), "lengths": (150, 700), "dims": (256, 256), "window": (64, 13),
        "q_offset": np.array([200, 200, 200]),
    },
}  # fmt: skip


@pytest.mark.drawn
@pytest.mark.parametrize("case", PIPELINES)
def test_schedules(rng, case):
    """Correct, and bitwise the same, whatever runs first."""
    problem = Problem(rng, **{"heads": (2, 1), **PIPELINES[case]})
    first = None
    for seed in range(SCHEDULES):
        run = Run(cuattn.attention, *problem.arrays, seed=seed, **problem.options)
        assert run.kernel.grid == 2
        if first is None:
            problem.check(*run.results)
        first = first or bits(run.results)
        assert bits(run.results) == first


RAGGED = [(5, 9), (0, 0), (330, 170), (0, 12), (3, 0), (1, 300), (64, 64), (200, 17)]


@pytest.mark.drawn
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 192)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_ragged_schedules(rng, dims, is_causal):
    """Rows and keys of neighbours in every tile."""
    ragged = Ragged(rng, "bfloat16", RAGGED, (4, 2), dims, is_causal=is_causal)
    first = None
    for seed in range(SCHEDULES):
        run = Run(
            cuattn.attention_varlen, *ragged.arrays, *ragged.ends, seed=seed, **ragged.options
        )
        if first is None:
            ragged.check(*run.results)
        first = first or bits(run.results)
        assert bits(run.results) == first


def test_ragged_into_padded_rows(rng):
    """Rows of `out` that are not whole vectors, and end within a block."""
    ragged = Ragged(rng, lengths=[(7, 30), (200, 41), (3, 3)], heads=(2, 2), dims=(64, 36))
    q, k, v = ragged.arrays
    memory = {
        name: np.full((*a.shape[:2], 40), np.nan, a.dtype)
        for name, a in zip("vo", (v, q), strict=True)
    }
    memory["v"][..., :36] = v
    out = memory["o"][..., :36]
    lse = np.empty(q.shape[1::-1], np.float32)
    run = Run(
        cuattn.attention_varlen, q, k, memory["v"][..., :36], *ragged.ends, out=(out, lse),
        **ragged.options,
    )  # fmt: skip
    ragged.check(*run.results)
    assert run.results[0] is out and np.isnan(memory["o"][..., 36:]).all()


# -- which calls it computes -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dim", [8, 40, 64, 80, 96, 120, 128, 160, 192, 256])
def test_every_head_dimension_is_padded(rng, dtype, dim):
    problem = Problem(rng, np.dtype(dtype).name, lengths=(70, 90), dims=(dim, dim))
    run = Run(cuattn.attention, *problem.arrays)
    problem.check(*run.results)


@pytest.mark.parametrize("value_dim", [1, 35, 63, 93, 126, 188, 255])
def test_odd_head_dimensions_in_padded_rows(rng, value_dim):
    problem = Problem(rng, batch=2, heads=(4, 2), lengths=(70, 90), dims=(59, value_dim))
    arrays = [padded(a, -a.shape[3] % 64) for a in problem.arrays]
    out = padded(np.full((*problem.q.shape[:3], value_dim), np.nan, np.float16), -value_dim % 8)
    lse = np.empty(out.shape[:3], np.float32)
    problem.check(*Run(cuattn.attention, *arrays, out=(out, lse)).results)


def test_packed_heads_in_padded_rows(rng):
    problem = Problem(rng, batch=2, heads=(16, 2), lengths=(11, 200), dims=(64, 45))
    arrays = [padded(a, -a.shape[3] % 8) for a in problem.arrays]
    out = padded(np.full((*problem.q.shape[:3], 45), np.nan, np.float16), 3)
    lse = np.empty(out.shape[:3], np.float32)
    problem.check(*Run(cuattn.attention, *arrays, out=(out, lse)).results)


def padded(a, columns):
    """The same with NaN behind each row."""
    memory = np.full((*a.shape[:-1], a.shape[-1] + columns), np.nan, a.dtype)
    memory[..., : a.shape[-1]] = a
    return memory[..., : a.shape[-1]]


@pytest.mark.parametrize("dim", [1, 7, 35, 130, 250])
def test_one_row_that_ends_anywhere(rng, dim):
    """Nothing is written behind a fresh result."""
    problem = Problem(rng, heads=(1, 1), lengths=(1, 1), dims=(dim, dim))
    problem.check(*Run(cuattn.attention, *problem.arrays).results)
    q, k, v = (a[0] for a in problem.arrays)
    run = Run(cuattn.attention_varlen, q, k, v, *np.array([[0, 1], [0, 1]]))
    problem.check(*(one[None] for one in run.results))


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_layouts_and_strides(rng, layout):
    """Positive multiples of 16 bytes are TMA's, all others the general kernel's."""
    problem = Problem(rng, batch=2, heads=(4, 2), lengths=(70, 90), dims=(64, 64), is_causal=True)
    swapped = layout == "BSHD"

    def place(a, pad, flip=False):
        memory = np.full((*a.shape[:3], a.shape[3] + pad), np.nan, a.dtype)
        view = memory[..., : a.shape[3]]
        view[...] = a[..., ::-1, :] if flip else a
        view = view[..., ::-1, :] if flip else view
        return view.swapaxes(1, 2) if swapped else view

    for pad, flip, header in [
        (0, False, "attention/forward_sm90.cuh"),
        (8, False, "attention/forward_sm90.cuh"),
        (4, False, "attention/forward.cuh"),
        (0, True, "attention/forward.cuh"),
    ]:
        arrays = [place(a, pad, flip) for a in problem.arrays]
        run = Run(cuattn.attention, *arrays, header=header, layout=layout, **problem.options)
        out, lse = run.results
        problem.check(out.swapaxes(1, 2) if swapped else out, lse)


@pytest.mark.parametrize("num_sms", [1, 2, 3])
def test_sections(rng, monkeypatch, num_sms):
    """Heads that do not fit L2 together come one after the other."""
    drawn = Problem(rng, heads=(2, 2), batch=2, lengths=(400, 430), is_causal=True)
    with monkeypatch.context() as patch:
        patch.setattr(attention_problem, "L2_BYTES", 1)
        plan_attention_sm90.cache_clear()
        run = Run(cuattn.attention, *drawn.arrays, num_sms=num_sms, **drawn.options)
    plan_attention_sm90.cache_clear()
    drawn.check(*run.results)


def test_what_the_general_kernel_computes(rng):
    q, k, v = draw(rng, 1, 2, 1, 40, 70, 64, 64, np.float16)
    run = Run(cuattn.attention, q, k, v)
    assert run.kernel.block == 512
    others = [
        {"mask": np.ones((40, 70), bool)},
        {"bias": np.zeros(70, np.float16)},
        {"arrays": [a.astype(np.float32) for a in (q, k, v)]},
        {"arrays": [a.astype(np.float64) for a in (q, k, v)]},
        {"arrays": [q, k[:, :, :0], v[:, :, :0]]},
        {"arrays": [q, k, v[..., :0]]},
        {"arrays": [q, np.broadcast_to(k[:, :, :1], k.shape), v]},
    ]
    for options in others:
        arrays = options.pop("arrays", (q, k, v))
        Run(cuattn.attention, *arrays, header="attention/forward.cuh", **options)


# -- what it moves and computes --------------------------------------------------------------------


@pytest.mark.drawn
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (100, 0), (70, 90)], ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_every_byte(rng, dim, value_dim, left, right):
    """Q and the result once; K and V once for each block of rows that sees any, in tiles."""
    q_rows, k_rows = int(rng.integers(300, 420)), int(rng.integers(430, 600))
    q, k, v = draw(rng, 1, 2, 2, q_rows, k_rows, dim, value_dim, np.float16)
    run = Run(cuattn.attention, q, k, v, window=(left, right))
    tiles = tile_bytes = 0
    for begin, end in ranges_of_blocks(q_rows, k_rows, run.rows, left, right):
        first = begin // run.keys * run.keys
        count = -(-(end - first) // run.keys) if end > begin else 0
        tiles += count
        tile_bytes += min(count * run.keys, k_rows - first) * (dim + value_dim) * 2
    assert run.counters.global_bytes_read == q.nbytes + 2 * tile_bytes
    assert run.counters.global_bytes_written == sum(one.nbytes for one in run.results)
    steps = (run.dim + run.keys) // 16  # of 16: of Q K^T along dim, of P V along keys
    assert run.counters.wgmma == 2 * tiles * 4 * run.groups * steps


def test_packed_heads_share_keys(rng):
    """K and V are read once for all query heads of a key head."""
    q, k, v = draw(rng, 1, 16, 2, 8, 500, 128, 128, np.float16)
    run = Run(cuattn.attention, q, k, v)
    assert run.counters.global_bytes_read == q.nbytes + k.nbytes + v.nbytes


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_no_bank_conflicts(rng, dim):
    """Where threads touch shared memory themselves: the result's way out."""
    q, k, v = draw(rng, 1, 1, 1, 200, 300, dim, dim, np.float16)
    counters = Run(cuattn.attention, q, k, v).counters
    assert counters.shared_wavefronts == counters.shared_wavefronts_ideal > 0


def test_one_exponential_a_score(rng):
    """A maximum that the first tile holds, or that grows by little, costs no rescale."""
    q, k, v = draw(rng, 1, 1, 1, 128, 700, 128, 128, np.float16)
    for growth, rescales in ((0.0, 0), (5.0, 0), (9.0, 1)):  # powers of two in all, and a tile
        q[..., 1:] = 0
        q[..., 0] = 1
        tile = np.arange(700) // 128
        steps = np.minimum(tile, 1) if rescales == 0 else tile
        k[..., 0] = (steps * growth * np.log(2) * 128**0.5).astype(np.float16)
        run = Run(cuattn.attention, q, k, v)
        tiles = -(-700 // run.keys)
        scores = tiles * run.rows * run.keys
        # Lanes of a row: 4, each of which computes the factor by itself.
        assert run.counters.exps == scores + rescales * (tiles - 1) * run.rows * 4


# -- the lazy rescale ------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["float16", "bfloat16"])
@pytest.mark.parametrize("growth", [-40.0, -3.0, 0.7, 3.9, 7.9, 8.1, 60.0])
def test_scores_that_grow_from_tile_to_tile(rng, op, growth):
    """By less than a rescale is worth, by more, or shrinking: as accurate as any other."""
    problem = Problem(rng, op, lengths=(130, 900), dims=(64, 64))
    q, k, v = problem.clean
    q, k = q.copy(), k.copy()
    q[..., 0], k[..., 0] = 1, growth * (np.arange(900) // 128) * np.log(2) * 8
    problem.clean = q, k, v
    problem.hide()
    run = Run(cuattn.attention, *problem.arrays)
    expected, plain = problem.expected(), problem.plain()
    compare(op, run.results[0], expected[0], plain)
    compare_lse(op, run.results[1], expected[1], plain)


def test_weights_far_above_one_stay_finite(rng):
    """256 times the first maximum, in float16, for every key of a long row."""
    q, k, v = draw(rng, 1, 1, 1, 64, 2000, 64, 64, np.float16)
    q[...], k[...], v[...] = 0, 0, 1
    q[..., 0], k[..., 0] = 1, 7.99 * np.log(2) * 8
    k[:, :, :128, 0] = 0
    out, lse = Run(cuattn.attention, q, k, v).results
    assert (out == 1).all() and np.isfinite(lse).all()
