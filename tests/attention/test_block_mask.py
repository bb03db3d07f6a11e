"""Attention under a block mask: what its lists hold, what is made of them, and what it costs."""

from __future__ import annotations

import os

import emulator
import numpy as np
import pytest
from attention_cases import OPS, Problem, call, precision_of, put
from conftest import SEED
from tolerance import dtype_of

import cuattn
from cuattn import reference

NAN = np.nan


def tiled(rng, lead, lengths, block=(128, 128), empty=0.5, full=0.3):
    """A random mask: so many of its tiles are empty, or full, and the others anything between."""
    draws = rng.random((*lead, *(-(-n // size) for n, size in zip(lengths, block, strict=True))))
    draws = draws.repeat(block[0], -2).repeat(block[1], -1)[..., : lengths[0], : lengths[1]]
    some = rng.random(draws.shape) < rng.choice([0.02, 0.5, 0.98], draws.shape[:-2] + (1, 1))
    return np.where(draws < empty, False, np.where(draws < empty + full, True, some))


def blocked(backend, mask, *lengths, **how):
    """A block mask on the backend."""
    return cuattn.block_mask(put(backend, mask), *lengths, **how)


def compare(backend, problem, **how):
    """`attention` with the block mask of a problem's mask against the formula; out and lse."""
    options = dict(problem.options)
    lists = blocked(backend, options.pop("mask"), **how)
    out, lse = call(backend, problem.arrays, options, return_lse=True, block_mask=lists)
    assert backend.ran()
    problem.check(out, lse)
    return out, lse


# ---- the lists ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block", [(128, 128), (256, 128), (128, 384)], ids=lambda b: f"{b[0]}x{b[1]}"
)
def test_lists(backend, rng, block):
    """Of masks with 2, 3 and 4 axes, in any memory, of lengths that are no multiples of a tile."""
    for lead in ((), (3,), (2, 1)):
        lengths = tuple(int(n) for n in rng.integers(1, 600, 2))
        mask = tiled(rng, lead, lengths, block)
        for given in (mask, np.asarray(mask, order="F"), mask[..., ::-1, :]):
            want = reference.block_mask(given, block=block)
            got = blocked(backend, given, block=block)
            assert got.block == block
            for ours, theirs in zip(got[:4], want[:4], strict=True):
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(backend.asnumpy(ours), theirs)


def test_lists_of_repeated_rows_and_columns(backend, rng):
    """An axis of 1 is as long as it is said to be, and not copied."""
    keys = rng.random((2, 1, 1, 300)) < 0.5
    for mask, lengths in (
        (keys, (200, None)),
        (keys.swapaxes(2, 3), (None, 200)),
        (keys, (0, 300)),
    ):
        mask = put(backend, mask)
        got = cuattn.block_mask(mask, *lengths)
        want = reference.block_mask(backend.asnumpy(mask), *lengths)
        for ours, theirs in zip(got[:4], want[:4], strict=True):
            np.testing.assert_array_equal(backend.asnumpy(ours), theirs)
        assert 0 in got.mask.strides


# ---- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_random_tiles(backend, rng, op):
    """Rows of tiles without any, with all, and with a mixture, in heads that share keys; NaN where
    nobody looks."""
    lengths = int(rng.integers(257, 400)), int(rng.integers(385, 520))
    mask = tiled(rng, (2, 2), lengths)
    mask[0, 0, :128], mask[0, 1, :128] = False, True
    mask[1, 0, :128, :128], mask[1, 0, :128, 128:256] = True, rng.random((128, 128)) < 0.5
    compare(backend, Problem(rng, op, 2, (2, 1), lengths, (64, 64), mask=mask))


@pytest.mark.parametrize("what", [False, True, "one"])
def test_uniform(backend, rng, what):
    """Nothing is seen, everything, or one key by one query."""
    mask = np.full((300, 300), what is True)
    if what == "one":
        mask[200, 140] = True
    problem = Problem(rng, "float16", 1, (2, 1), (300, 300), (32, 40), mask=mask)
    out, lse = compare(backend, problem)
    assert np.isneginf(lse).all() == (not what) and out.any() == bool(what)


@pytest.mark.parametrize(
    "block", [(128, 256), (256, 128), (384, 384)], ids=lambda b: f"{b[0]}x{b[1]}"
)
def test_positions(backend, rng, block):
    """Windows and padding end within tiles, ahead of the first that is listed and behind the last;
    tiles of any multiple of 128."""
    for _ in range(2):
        lengths = int(rng.integers(130, 300)), int(rng.integers(500, 800))
        options = {
            "mask": tiled(rng, (2, 1), lengths, block),
            "window": (int(rng.integers(400)), int(rng.integers(200))),
            "q_offset": rng.integers(0, lengths[1], 2),
            "kv_lens": rng.integers(0, lengths[1] + 1, 2),
            "q_lens": rng.integers(0, lengths[0] + 1, 2),
            "is_causal": bool(rng.random() < 0.5),
        }
        compare(backend, Problem(rng, "float16", 2, (2, 2), lengths, (64, 32), **options),
                block=block)  # fmt: skip


def test_every_option(backend, rng):
    """A bias, slopes, a cap and sinks beside it; two dimensions; the layout BSHD; any strides."""
    lengths = 150, 300
    options = {
        "mask": tiled(rng, (2,), lengths),
        "bias": rng.standard_normal((2, *lengths)).astype(np.float32),
        "alibi_slopes": rng.uniform(0, 0.1, 2).astype(np.float32),
        "sinks": rng.standard_normal(2).astype(np.float32),
        "softcap": 5.0,
        "scale": -0.2,
    }
    problem = Problem(rng, "float32", 1, (2, 1), lengths, (33, 20), **options)
    out, _ = compare(backend, problem)
    lists = blocked(backend, options.pop("mask"))
    arrays = [a[0].swapaxes(0, 1) for a in problem.arrays]
    got = call(backend, arrays, options, layout="BSHD", block_mask=lists)
    np.testing.assert_allclose(got.swapaxes(0, 1), out[0], rtol=1e-5, atol=1e-6)


def test_one_head(backend, rng):
    mask = tiled(rng, (), (200, 300))
    q, k, v = (rng.standard_normal((n, 64)).astype(np.float32) for n in (200, 300, 300))
    got = call(backend, (q, k, v), {}, block_mask=blocked(backend, mask))
    np.testing.assert_allclose(got, reference.attention(q, k, v, mask=mask), rtol=1e-4, atol=1e-5)


def test_few_queries_over_many_keys(backend, rng):
    """These would be of the decode kernel."""
    mask = tiled(rng, (), (3, 1100))
    compare(backend, Problem(rng, "float16", 1, (2, 1), (3, 1100), (64, 64), mask=mask))


@pytest.mark.parametrize("op", OPS)
def test_same_bits_as_the_mask(backend, rng, op):
    """Tiles that are passed over change nothing, NaN in their V neither."""
    if backend.name == "numpy":
        pytest.skip("other products")
    dtype, precision = precision_of(op)
    mask = tiled(rng, (1, 2), (150, 300))
    # In tiles of one size, and of 16 bits not Hopper's.
    dim = {"float32": 72, "tf32": 64, "float64": 64}.get(op, 65)
    q, k, v = (rng.standard_normal((1, 2, n, dim)).astype(dtype_of(dtype)) for n in (150, 300, 300))
    v[:, :, ~mask.any(axis=(0, 1, 2))] = NAN
    options = {"precision": precision, "return_lse": True}
    got = call(backend, (q, k, v), {}, block_mask=blocked(backend, mask), **options)
    want = call(backend, (q, k, v), {"mask": mask}, **options)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_mask_is_no_part_of_full_and_of_empty_tiles(backend, rng, dtype):
    """Only the lists say what these are."""
    mask = tiled(rng, (), (250, 380))  # these end in a tile
    mask[:128, :128], mask[:128, 128:256], mask[128:, 256:] = True, False, True
    lists = blocked(backend, mask)
    q, k, v = (rng.standard_normal((n, 64)).astype(dtype) for n in (250, 380, 380))
    want = call(backend, (q, k, v), {}, block_mask=lists)
    if backend.name == "numpy":
        pytest.skip("the mask is read in every listed tile")
    mask[:128, :128], mask[:128, 128:256], mask[128:, 256:] = False, True, False
    got = call(backend, (q, k, v), {}, block_mask=lists._replace(mask=put(backend, mask)))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_lists_lead_nowhere_else(backend, rng, dtype):
    """What a device array holds is trusted, but never leads outside of any array."""
    q, k, v = (rng.standard_normal((200, 64)).astype(dtype) for _ in range(3))
    lists = reference.block_mask(np.ones((200, 200), bool))
    for counts, indices in (([9, -9], [[0, 1], [0, 1]]), ([2, 2], [[-7, 99], [2**31 - 1, 1]])):
        bad = lists._replace(
            counts=put(backend, np.array(counts, np.int32)),
            indices=put(backend, np.array(indices, np.int32)),
            full=put(backend, lists.full),
            mask=put(backend, lists.mask.copy()),
        )
        assert call(backend, (q, k, v), {}, block_mask=bad).shape == (200, 64)


def test_strides_of_lists(backend, rng):
    """Of any strides, and of one head for all."""
    mask = tiled(rng, (2, 1), (300, 300))
    problem = Problem(rng, "float16", 2, (2, 1), (300, 300), (64, 64), mask=mask)
    lists = reference.block_mask(mask)
    turned = [np.asfortranarray(array) for array in lists[:4]]
    lists = cuattn.BlockMask(*(put(backend, array) for array in turned), lists.block)
    problem.check(*call(backend, problem.arrays, {}, return_lse=True, block_mask=lists))


# ---- what it costs ------------------------------------------------------------------------------


def counted(arrays, **options):
    """Counters of a call, the arguments of its kernel, and its result."""
    with emulator.activate(arch="sm_80", seed=int(os.environ[SEED])) as runtime:
        result = cuattn.attention(*arrays, **options)
    (kernel,) = runtime.kernels
    return runtime.total(), kernel.arguments, result


def test_empty_tiles_cost_nothing(rng):
    """As many as there may be; and the mask is read in no tile that hides nothing."""
    queries, dim = 256, 64
    places = [rng.choice(8, n, replace=False) for n in (3, 5)]
    found = {}
    for tiles, step in ((8, 1), (16, 2)):
        listed = np.zeros((2, tiles), bool)
        for row, columns in enumerate(places):
            listed[row, columns * step] = True
        for full in (True, False):
            mask = listed.repeat(128, 0).repeat(128, 1)
            mask[::128, ::128] &= full
            lengths = queries, 128 * tiles, 128 * tiles
            arrays = [rng.standard_normal((1, 1, n, dim)).astype(np.float16) * 0.1 for n in lengths]
            lists = cuattn.block_mask(mask)
            found[tiles, full], tile, _ = counted(arrays, block_mask=lists)
    few, partial = found[8, True], found[8, False]
    assert found[16, True] == few and found[16, False] == partial
    scores = 8 * 128 * 128
    assert few.mma == partial.mma == scores * 2 * dim // (16 * 8 * 16)
    assert few.exps == partial.exps == scores
    blocks = 128 // (16 * tile["kWarps"] * tile["kMTiles"])  # of queries, in a row of tiles
    tiles = 32 * tile["kWarps"] * 8 * blocks * (128 // tile["kKeys"])  # of each thread
    assert partial.global_bytes_read - few.global_bytes_read == scores + tiles  # and what it is
    read = (queries + 2 * 8 * 128 * blocks) * dim * 2
    assert read < few.global_bytes_read < read + 20 * tiles


def test_lists_are_searched(rng):
    """Tiles that no query sees for its place cost nothing, either, nor do keys around them."""
    lengths, dim = (128, 1024, 1024), 64
    mask = np.isin(np.arange(1024) // 128, [1, 3, 4, 7])[None]
    arrays = [rng.standard_normal((1, 1, n, dim)).astype(np.float16) for n in lengths]
    options = {"window": (32, 31), "q_offset": 512}  # keys from 480 to 670
    counters, tile, got = counted(arrays, block_mask=cuattn.block_mask(mask, 128), **options)
    assert tile["kKeys"] == 32
    assert counters.mma == 128 * (32 + 128) * 2 * dim // (16 * 8 * 16)
    want = reference.attention(*arrays, mask=mask, **options)
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2)


def test_numpy_passes_over_empty_tiles(rng, monkeypatch):
    """By the lists, in tiles of their size."""
    from cuattn._attention import numpy_tile

    seen, products = [], numpy_tile.products
    monkeypatch.setattr(
        numpy_tile, "products", lambda q, k, *more: seen.append(k.shape[2]) or products(q, k, *more)
    )
    mask = np.zeros((1, 1024), bool)
    mask[0, [5, 300, 1000]] = True
    q, k, v = (rng.standard_normal((n, 16)) for n in (128, 1024, 1024))
    got = cuattn.attention(q, k, v, block_mask=cuattn.block_mask(mask, 128))
    assert seen == [128, 128, 128]
    np.testing.assert_allclose(got, reference.attention(q, k, v, mask=mask), rtol=1e-10)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "args", "options"),
    [
        (TypeError, "mask must be a cupy.ndarray, a numpy.ndarray or", (True,), {}),
        (TypeError, "mask must be a bool array", (np.ones((2, 2)),), {}),
        (ValueError, "mask must have shape", (np.ones(2, bool),), {}),
        (ValueError, "q_len must be 2", (np.ones((2, 2), bool), 3), {}),
        (ValueError, "k_len must be from 0", (np.ones((2, 1), bool), None, -1), {}),
        (TypeError, "block must be a pair", (np.ones((2, 2), bool),), {"block": 128}),
        (ValueError, r"block\[1\] must be a multiple of 128", (np.ones((2, 2), bool),),
         {"block": (128, 64)}),
        (ValueError, r"block\[0\] must be a multiple", (np.ones((2, 2), bool),),
         {"block": (0, 128)}),
    ],
)  # fmt: skip
def test_what_no_block_mask_is_made_of(backend, error, words, args, options):
    args = [put(backend, value) for value in args]
    with pytest.raises(error, match=f"^{words}"):
        cuattn.block_mask(*args, **options)


def test_what_attention_refuses(backend):
    x = put(backend, np.ones((2, 3, 200, 32), np.float32))
    mask = put(backend, np.ones((3, 200, 200), bool))
    good = cuattn.block_mask(mask)
    integers = good.indices.astype(np.int64)
    for error, words, bad in (
        (TypeError, "block_mask must be a result of cuattn.block_mask", tuple(good)),
        (ValueError, "block_mask.mask must have 200 queries", cuattn.block_mask(mask[:, :1])),
        (ValueError, "block_mask.mask must broadcast", cuattn.block_mask(mask[:2])),
        (ValueError, "block_mask.counts must have shape", good._replace(counts=good.counts[:1])),
        (ValueError, "block_mask.full must have shape", good._replace(full=good.full[..., :1])),
        (TypeError, "block_mask.indices must be of dtype int32", good._replace(indices=integers)),
        (TypeError, "block_mask.full must be of dtype bool", good._replace(full=good.indices)),
        (TypeError, "block_mask.counts must be an array", good._replace(counts=None)),
        (TypeError, "block_mask.mask must be a bool array", good._replace(mask=integers)),
        (ValueError, r"block_mask.block\[0\] must be a multiple", good._replace(block=(1, 128))),
    ):
        with pytest.raises(error, match=f"^{words}"):
            cuattn.attention(x, x, x, block_mask=bad)
    with pytest.raises(ValueError, match="^mask must be None beside block_mask"):
        cuattn.attention(x, x, x, block_mask=good, mask=mask)
    with pytest.raises(ValueError, match="^out must be block_mask.mask itself or share no memory"):
        memory = backend.xp.zeros(4 * x.size, bool)
        overlapping = memory[: mask.size].reshape(mask.shape)
        out = memory.view(np.float32).reshape(x.shape)
        cuattn.attention(x, x, x, block_mask=good._replace(mask=overlapping), out=out)
