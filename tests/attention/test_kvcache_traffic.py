"""What attention over a KV cache moves and waits for, counted on the emulator: exact formulas."""

from __future__ import annotations

import os

import emulator
import numpy as np
import pytest
from conftest import SEED
from kvcache_cases import Cached

import cuattn
from cuattn._device.params import DECODE_POINTERS, DECODE_TAIL, SCORE_ARRAYS

pytestmark = pytest.mark.drawn

ARCHS = ["sm_80", "sm_90"]
OPS = ["bfloat16", "tf32", "float32", "float64"]


class Counted:
    """One call on so many multiprocessors: its counters, and the tile of its kernel."""

    def __init__(self, cached, arch="sm_90", sms=5, **more):
        how = {**cached.options, "layout": cached.layout, **more}
        with emulator.activate(arch, sms, int(os.environ[SEED])) as runtime:
            cuattn.attention_kvcache(cached.q, *cached.caches, **how)
        (self.kernel,) = runtime.kernels  # one launch
        self.counters, self.tile = runtime.total(), self.kernel.arguments


def by_keys(rng, lens, **how):
    """Counters of a call less those of the same one whose sequences have no keys."""
    cached = Cached(rng, "bfloat16", lens=lens, heads=(8, 2), dims=(128, 128), **how)
    whole = Counted(cached)
    none = Counted(cached, kv_lens=np.zeros(len(lens), np.int32))
    return cached, whole, none


@pytest.mark.parametrize("page_size", [None, 1, 16, 24])
def test_every_byte_of_the_cache_once(rng, page_size):
    """For all heads of a group, and nothing beyond the last key. Beside it what a call without keys
    reads and writes, and page numbers: of each tile, by every team that loads it."""
    lens = [int(n) for n in rng.integers(1, 100, 4)]
    cached, whole, none = by_keys(rng, lens, page_size=page_size)
    keys = 2 * sum(lens) * 2 * 128 * 2
    numbers = 0 if page_size is None else 2 * sum(lens) * 4
    read = whole.counters.global_bytes_read - none.counters.global_bytes_read
    assert read == keys + numbers
    assert whole.counters.global_bytes_written == none.counters.global_bytes_written
    out = cached.q
    assert none.counters.global_bytes_written == out.nbytes


@pytest.mark.parametrize(("op", "dim"), [("float32", 128), ("float32", 200), ("float64", 256)])
def test_every_byte_of_wider_types_once(rng, op, dim):
    cached = Cached(rng, op, lens=[70, 3, 40], heads=(8, 2), dims=(dim, dim))
    whole, none = Counted(cached), Counted(cached, kv_lens=np.zeros(3, np.int32))
    read = whole.counters.global_bytes_read - none.counters.global_bytes_read
    assert read == 2 * 113 * 2 * dim * cached.q.itemsize


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize(("dim", "value_dim"), [(576, 512), (576, 576), (128, 96)])
def test_keys_that_hold_values_once(rng, dim, value_dim, page_size):
    """Every byte once, and page numbers by every warp that loads."""
    lens = [int(n) for n in rng.integers(1, 100, 4)]
    how = {"lens": lens, "heads": (8, 1), "dims": (dim, dim), "value_dim": value_dim}
    cached = Cached(rng, "bfloat16", page_size=page_size, **how)
    whole, none = Counted(cached), Counted(cached, kv_lens=np.zeros(4, np.int32))
    pairs = -(-value_dim // whole.tile["kValueDim"])  # of the same keys
    loaders = 4 if "kColumnWarps" in whole.tile else 1
    numbers = 0 if page_size is None else loaders * sum(lens) * 4
    read = whole.counters.global_bytes_read - none.counters.global_bytes_read
    assert read == pairs * (sum(lens) * dim * 2 + numbers)
    written = whole.counters.global_bytes_written
    assert written == none.counters.global_bytes_written == 4 * 8 * value_dim * 2


def test_a_window_is_all_that_is_read(rng):
    lens, q_lens = [2000, 900], np.array([1, 0])  # and no key without a query
    _, whole, none = by_keys(rng, lens, page_size=16, window=(100, 0), q_lens=q_lens)
    read = whole.counters.global_bytes_read - none.counters.global_bytes_read
    keys = whole.tile["kKeys"]
    first_tile = (2000 - 101) // keys * keys  # of it all page numbers
    assert read == 2 * (101 * 2 * 128 * 2 + (2000 - first_tile) * 4)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rows", [1, 6])  # of 8 heads a group: tiles of 16 rows, and of 64
@pytest.mark.parametrize("op", OPS)
def test_no_bank_conflicts(rng, op, rows, arch):
    for dims, page_size, more in (
        ((64, 64), None, {}),
        ((128, 128), 16, {"is_causal": True, "split_size": 128}),
        ((256, 256), 5, {"alibi_slopes": np.full(8, 0.1, np.float32)}),
        ((40, 24), 16, {"window": (60, 0)}),
        ((576, 576), 16, {"value_dim": 512, "window": (100, 0)}),
    ):
        cached = Cached(
            rng, op, lens=[130, 300, 0], heads=(8, 1), dims=dims, page_size=page_size, rows=rows,
            **more,
        )  # fmt: skip
        counters = Counted(cached, arch).counters
        assert counters.shared_wavefronts == counters.shared_wavefronts_ideal > 0


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("split_size", [None, 128, "auto"])
def test_barriers(rng, split_size, arch):
    """Five for each segment at most; teams of one warp have none in the loop over its tiles."""
    lens, heads, sms = [700, 40, 300], 2, 5
    cached = Cached(rng, "bfloat16", lens=lens, heads=(8, heads), page_size=16)
    call = Counted(cached, arch, sms, split_size=split_size)
    assert call.tile["kTeam"] == 1
    size = {"auto": 256, None: 10**6}.get(split_size, split_size)
    segments = heads * sum(-(-n // size) for n in lens) + (sms if split_size is None else 0)
    assert call.counters.barriers <= 5 * segments


def test_products_are_those_of_the_keys(rng):
    """Rows of a tile times keys of a tile, by halves of 8 columns or 8 keys; masked tiles too."""
    lens = [100, 64, 3]
    for left, more in ((200, {}), (50, {}), (50, {"split_size": 128})):
        how = {"lens": lens, "heads": (8, 2), "dims": (128, 128), "page_size": 16}
        call = Counted(Cached(rng, "bfloat16", **how, window=(left, 0)), **more)
        keys = call.tile["kKeys"]
        tiles = 2 * sum(-(-n // keys) - max(0, n - 1 - left) // keys for n in lens)
        assert call.counters.mma == tiles * (keys // 8 * 128 // 16 + 128 // 8 * keys // 16)


@pytest.mark.parametrize("heads", [40, 130])  # a tile of rows, and three
def test_traffic_of_many_rows(rng, heads):
    """For each tile of rows: every byte once, every product once, no barrier of the block behind
    the first, and no bank conflicts, those of wgmma included."""
    lens = [200, 64, 3]
    how = {"heads": (heads, 1), "dims": (576, 576), "value_dim": 512}
    cached = Cached(rng, "bfloat16", lens=lens, **how)
    call = Counted(cached, split_size=10**6)
    none = Counted(cached, split_size=10**6, kv_lens=np.zeros(3, np.int32))
    assert call.kernel.template == "attention_latent_sm90"
    keys, row_tiles = call.tile["kKeys"], -(-heads // 64)
    read = call.counters.global_bytes_read - none.counters.global_bytes_read
    assert read == row_tiles * sum(lens) * 576 * 2
    tiles = row_tiles * (sum(-(-n // keys) for n in lens) - len(lens))  # none: one tile of each
    products = call.counters.wgmma - none.counters.wgmma  # of a warp each
    assert products == 4 * tiles * (576 // 16 + 2 * keys // 16)
    assert call.counters.barriers == none.counters.barriers == call.kernel.grid
    assert call.counters.shared_wavefronts == call.counters.shared_wavefronts_ideal > 0
    of_scores = call.counters.exps - none.counters.exps - len(lens) * heads * 512 // 4  # of results
    assert 0 <= of_scores - tiles * 64 * keys < 64 * keys  # and where O is rescaled


@pytest.mark.parametrize(
    "more", [{"softcap": 3.0}, {"scale": -1.0}, {"tree": np.eye(1, dtype=bool)}]
)
def test_many_rows_of_the_general_kernel(rng, more):
    """Hopper's own scales scores and cuts them off, but does no more."""
    how = {"heads": (40, 1), "dims": (576, 576), "value_dim": 512, **more}
    assert Counted(Cached(rng, "bfloat16", lens=[70], **how)).kernel.template == "attention_wide"


@pytest.mark.parametrize("heads", [16, 20])  # one row warp, and two
def test_products_and_barriers_of_latent_attention(rng, heads):
    """Columns are shared: every product once. A barrier of the block for each tile of keys."""
    lens = [200, 64, 3]
    how = {"heads": (heads, 1), "dims": (576, 576), "value_dim": 512, "page_size": 16}
    call = Counted(Cached(rng, "bfloat16", lens=lens, **how), split_size=10**6)
    none = Counted(Cached(rng, "bfloat16", lens=[1, 1, 1], **how), split_size=10**6)
    keys, row_warps = call.tile["kKeys"], call.tile["kWarps"] // call.tile["kColumnWarps"]
    assert row_warps == -(-heads // 16)
    tiles = sum(-(-n // keys) for n in lens)
    of_rows = keys // 8 * 576 // 16 + 512 // 8 * keys // 16
    assert call.counters.mma == tiles * row_warps * of_rows
    assert call.counters.barriers - none.counters.barriers == tiles - 3


SHARES = """
#include <attention/key_cursor.cuh>
struct Params { DecodeParams p; long long* found; };
__global__ void walk(const Params params) {
  Shares shares;
  auto cursor = find_share<16>(params.p, blockIdx.x, gridDim.x, shares);
  long long* row = params.found + 1024 * 6 * blockIdx.x;
  for (int i = 0; cursor.left > 0 && i < 1024; ++i, row += 6) {
    if (threadIdx.x == 0) {
      const long long values[] = {1, cursor.unit, cursor.pair(params.p), cursor.tile, cursor.stop,
                                  shares.of_unit(cursor.unit)};
      for (int j = 0; j < 6; ++j) ptx::st_global(row + j, values[j]);
    }
    cursor.next_segment(params.p);
  }
}
"""


def walked(lens, blocks, **sizes):
    """Segments of each block: unit, pair, tile, end, share of the unit."""
    zeros = {
        name: (0,) * int(code[:-1]) if len(code) > 1 else 0
        for name, code in DECODE_TAIL.codes.items()
    }
    fields = {"left": 2**40, "right": 2**40, "bottom_right": 1, "wide": 1, "kv_lens_stride": 1}
    fields |= {"batch": len(lens), "q_rows": 1, "page_size": 2000, **sizes}
    pointers = dict.fromkeys(DECODE_POINTERS.codes, 0) | {"kv_lens": emulator.address(lens)}
    found = np.zeros((blocks, 1024, 6), np.int64)
    params = DECODE_POINTERS.pack(**pointers) + DECODE_TAIL.pack(**{**zeros, **fields})
    params += bytes(SCORE_ARRAYS.struct.size) + np.int64(emulator.address(found)).tobytes()
    emulator.launch_source(SHARES, "walk", blocks, 32, params, reads=[lens], writes=[found])
    return [[tuple(map(int, row[1:])) for row in of_block if row[0]] for of_block in found]


@pytest.mark.parametrize("split", [0, 8])
@pytest.mark.parametrize("batch", [1, 3, 31, 32, 33, 70])
def test_shares(rng, batch, split):
    """Blocks have all tiles of all pairs in order, each once, and equal shares of them."""
    lens = rng.integers(0, 40, batch) * (rng.random(batch) < 0.8)
    lens[rng.integers(batch)] = rng.integers(300, 1500)
    units = []
    for pair in range(batch * 12):
        tiles = max(1, -(-int(lens[pair // 12]) // 16))  # somebody writes the zeros of no keys
        units += [(pair, t, min(t + (split or 1), tiles)) for t in range(0, tiles, split or 1)]
    for blocks, least in ((1, 1), (5, 1), (7, 4), (16, 64), (3, 10**5)):
        tiles = {"row_tiles": 2, "column_tiles": 3, "least_tiles": least}
        shares = walked(lens, blocks, kv_heads=2, **tiles, split=split)
        seen = []
        for block, segments in enumerate(shares):
            for unit, pair, tile, stop, share in segments:
                assert (unit, share) == (len(seen), block)
                step = split or 1
                seen += [(pair, t, min(t + step, stop)) for t in range(tile, stop, step)]
        assert seen == units
        used = [segments[0][0] for segments in shares if segments]
        most = len(units) if split else len(units) // least
        assert len(used) == max(1, min(blocks, most))
        each = np.diff([*used, len(units)])
        assert each.max() - each.min() <= 1
