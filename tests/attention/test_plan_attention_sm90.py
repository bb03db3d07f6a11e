"""Which attention calls Hopper's kernel computes, in what tiles, and what it is handed.

Plans are pure Python. Calls go through a runtime that only keeps a diary: no emulator, no GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re

import numpy as np
import pytest

import cuattn
from cuattn._attention import plan_sm90
from cuattn._attention.plan_sm90 import BLOCKED_TILES, TILES, box_of, is_tma
from cuattn._attention.problem import L2_BYTES, NO_SCORE, AttentionProblem, Score
from cuattn._device import runtime
from cuattn._device.kernel import Limits
from cuattn._device.params import (
    ATTENTION_POINTERS,
    ATTENTION_SM90,
    ATTENTION_TAIL,
    SCORE_ARRAYS,
)
from cuattn._device.recent import Recent

PROBLEM = AttentionProblem("float16", "float16", 3, 8, 2, 1000, 777, 64, 64, tma=True)
SCORE = Score("Score_0", "struct Score_0;", "s + 1")
SMS = 132
SMEM = 227 * 1024  # bytes a block may have on sm_90


def plan(problem, capability=90, num_sms=SMS):
    """Anew each time: tens of thousands of problems would push others out of the cache."""
    return plan_sm90.plan_attention_sm90.__wrapped__(problem, capability, num_sms)


def change(problem=PROBLEM, **fields):
    return dataclasses.replace(problem, **fields)


# ---- Which calls ----


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"op": "bfloat16", "dtype": "bfloat16"},
        {"modified": True},
        {"ragged": True},
        {"bounded": True},
        {"kv_heads": 8},
        {"vector": False},  # of rows that end within 16 bytes; TMA knows where they end
        {"q_rows": 1, "k_rows": 1, "head_dim": 1, "value_dim": 1},
        {"head_dim": 256, "value_dim": 256},
    ],
)
def test_calls_of_this_kernel(fields):
    assert plan(change(**fields)).kernel.header == "attention/forward_sm90.cuh"


@pytest.mark.parametrize("capability", [80, 86, 89, 100, 103, 120, 121])
def test_other_architectures(capability):
    assert plan(PROBLEM, capability) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"op": "tf32", "dtype": "float32"},
        {"op": "float32", "dtype": "float32"},
        {"op": "float64", "dtype": "float64"},
        {"masked": True},
        {"bias": "float32"},
        {"tma": False},
        {"q_rows": 0},
        {"k_rows": 0},
        {"head_dim": 0},
        {"value_dim": 0},
    ],
)
def test_calls_of_the_general_kernel(fields):
    assert plan(change(**fields)) is None
    assert plan(change(**fields, modified=True)) is None


# ---- Tiles ----


EDGES = (1, 64, 65, 96, 97, 128, 129, 192, 193, 256)


@pytest.fixture(scope="module")
def plans():
    """The plan of every head dimension and value dimension; with a rule, and with an expression,
    of those at an edge."""
    sizes = itertools.chain(
        itertools.product(range(1, 257), range(1, 257), (None,)),
        itertools.product(EDGES, EDGES, (NO_SCORE, SCORE)),
    )
    found = {}
    for head_dim, value_dim, rule in sizes:
        problem = change(head_dim=head_dim, value_dim=value_dim, modified=rule is not None)
        score = rule if rule is SCORE else None
        found[head_dim, value_dim, rule] = plan(change(problem, score=score))
    return found


def test_tiles_hold_every_dimension(plans):
    tiles, dims = [], (64, 96, 128, 192, 256)
    for (head_dim, value_dim, rule), found in plans.items():
        tiles.append(t := found.kernel.arguments)
        assert t["kDim"] == min(d for d in dims if head_dim <= d)
        assert t["kValueDim"] == min(d for d in dims if value_dim <= d)
        assert t["kModified"] == (rule is not None)
        score = rule or NO_SCORE
        assert t["Score"] == score.name and found.kernel.text == score.text
        assert found.kernel.expression == score.expression
    assert {(t["kDim"], t["kValueDim"]) for t in tiles} == set(itertools.product(dims, dims))


def test_limits_of_tiles(plans):
    for found in {found.kernel.name: found for found in plans.values()}.values():
        kernel, t = found.kernel, found.kernel.arguments
        groups, keys, stages = t["kWarpgroups"], t["kKeys"], t["kStages"]
        dim, value_dim = t["kDim"], t["kValueDim"]
        assert groups in (2, 3) and stages >= 2 and kernel.block == 128 * (groups + 1)
        # AttentionSmem: Q or what takes its place, K and V of each stage, `out`, barriers.
        q, out = (64 * columns * 2 for columns in (dim, value_dim))
        k, v = (keys * columns * 2 for columns in (dim, value_dim))
        pieces = [q if t["kOwnOut"] else max(q, out)] * groups + [k] * stages + [v] * stages
        pieces += [out] * groups * t["kOwnOut"]
        assert kernel.smem_bytes == sum(pieces) + 8 * (2 * groups + 4 * stages + 1) <= SMEM
        for offset in itertools.accumulate(pieces):
            assert offset % 1024 == 0  # 8 rows of a swizzled panel
        # Registers of a consumer: O, S, P and the rest; 65536 for all, with the producer's.
        budget, producer = {2: (240, 24), 3: (160, 32)}[groups]
        assert value_dim // 2 + keys // 2 + keys // 4 + 24 <= budget
        assert 128 * (budget * groups + producer) <= 65536
        assert keys % 16 == 0 and found.keys == keys
        for columns, panel in ((dim, found.q_panel), (value_dim, found.v_panel)):
            span = 128 if columns % 64 == 0 else 64  # Panels::kSpan
            assert panel * 2 == span and columns % panel == 0
        assert max(keys, 64) <= 256  # rows of a box
        assert kernel.suffix == "a" and kernel.cluster == 1


@pytest.mark.parametrize(("dtype", "name"), [("float16", "__half"), ("bfloat16", "__nv_bfloat16")])
def test_type_of_elements(dtype, name):
    assert plan(change(op=dtype, dtype=dtype)).kernel.arguments["T"] == name


def test_every_row_of_the_table_is_taken_and_has_a_reason(plans):
    taken = {}
    for kernel in {found.kernel for found in plans.values()}:
        t = kernel.arguments
        row = next(
            row
            for row in TILES
            if t["kDim"] <= row[0]
            and t["kValueDim"] <= row[1]
            and t["kModified"] <= row[2]
            and (kernel.text == "" or row.scored)
        )
        assert (t["kWarpgroups"], t["kKeys"], t["kStages"], t["kOwnOut"], t["kPingPong"]) == row[
            3:8
        ]
        taken[row] = max(taken.get(row, 0), kernel.smem_bytes)
    assert taken.keys() == set(TILES)
    for row, smem in taken.items():
        said = re.match(r"(\d+) KiB", row.why)
        assert said is None or int(said[1]) == smem // 1024, row
    assert TILES[-1][:3] == (256, 256, True)  # every problem finds a row


def test_tiles_of_block_masks():
    """Parts of 128 queries and 128 keys of one head, whatever the heads share."""
    taken = {}
    blocked = change(q_rows=70, heads=16, kv_heads=1, masked=True, blocked=True)
    for head_dim, value_dim, rule in itertools.product(EDGES, EDGES, (None, NO_SCORE, SCORE)):
        sizes = {"head_dim": head_dim, "value_dim": value_dim, "modified": rule is not None}
        found = plan(change(blocked, **sizes, score=rule if rule is SCORE else None))
        if rule is SCORE and max(head_dim, value_dim) > 192:
            assert found is None  # for the registers
            continue
        kernel, t = found.kernel, found.kernel.arguments
        assert t["Tiles"] == "ListedTiles<ArrayMask>" and found.pack == 1
        assert t["kWarpgroups"] == 2 and 128 % t["kKeys"] == 0 and found.keys == t["kKeys"]
        rows = 128 * (
            t["kDim"] + t["kValueDim"] if t["kOwnOut"] else max(t["kDim"], t["kValueDim"])
        )
        keys = t["kStages"] * t["kKeys"] * (t["kDim"] + t["kValueDim"])
        seen = 4 * 8 * 4  # bits of 32 columns of a lane, of 4 lanes of each warp
        assert kernel.smem_bytes == 2 * (rows + keys) + 8 * (5 + 4 * t["kStages"]) + seen <= SMEM
        assert t["kValueDim"] // 2 + t["kKeys"] * 3 // 4 + 24 <= 232
        row = next(r for r in BLOCKED_TILES if t["kDim"] <= r[0] and t["kValueDim"] <= r[1]
                   and t["kModified"] <= r[2])  # fmt: skip
        taken[row] = max(taken.get(row, 0), kernel.smem_bytes)
    assert taken.keys() == set(BLOCKED_TILES)
    for row, smem in taken.items():
        assert row.why.startswith(f"{smem // 1024} KiB"), row


# ---- Grid ----


def sharing():
    """Problems whose heads may be packed: (S_q, heads, kv_heads) and ragged or not."""
    for q_rows in (1, 2, 3, 7, 16, 31, 64, 100, 128, 192, 1000, 4096, 100_000):
        for heads, kv_heads in ((1, 1), (8, 8), (8, 2), (12, 4), (6, 2), (64, 1), (96, 1), (40, 5)):
            for ragged, modified in itertools.product((False, True), repeat=2):
                sizes = {"q_rows": q_rows, "heads": heads, "kv_heads": kv_heads}
                yield change(**sizes, ragged=ragged, modified=modified)


def test_packs_make_the_fewest_blocks():
    seen = set()
    for problem in sharing():
        found, group = plan(problem), problem.heads // problem.kv_heads
        rows = 64 * found.kernel.arguments["kWarpgroups"]
        mean = -(-problem.q_rows // problem.batch) if problem.ragged else problem.q_rows
        blocks = {
            pack: -(-mean // (rows // pack)) * (problem.heads // pack)
            for pack in range(1, 65)
            if group % pack == 0 and 64 % pack == 0
        }
        assert blocks[found.pack] == min(blocks.values())
        assert found.pack == min(p for p in blocks if blocks[p] == blocks[found.pack])
        seen.add(found.pack)
    assert seen == {1, 2, 4, 8, 16, 32, 64}


def test_packs_are_for_few_rows():
    for heads, kv_heads, pack in ((8, 2, 4), (64, 1, 64), (96, 1, 32), (12, 4, 1), (8, 8, 1)):
        few = change(q_rows=1, heads=heads, kv_heads=kv_heads)
        assert plan(few).pack == pack
        for q_rows in (384, 384 * 100):  # whole blocks of 128 and of 192
            for modified in (False, True):
                assert plan(change(few, q_rows=q_rows, modified=modified)).pack == 1
    packs = [plan(change(heads=64, kv_heads=1, q_rows=n)).pack for n in (3, 6, 12, 24, 48, 96, 192)]
    assert packs == [64, 32, 16, 8, 4, 2, 1]
    # What counts is the length of a sequence.
    sequences = change(q_rows=384, batch=384, heads=64, kv_heads=1)
    assert (plan(sequences).pack, plan(change(sequences, ragged=True)).pack) == (1, 64)


def test_every_row_of_every_head_is_in_one_block():
    for problem in sharing():
        found = plan(problem)
        units = problem.heads // found.pack * (1 if problem.ragged else problem.batch)
        queries = 64 * found.kernel.arguments["kWarpgroups"] // found.pack
        spare = problem.batch if problem.ragged else 0
        assert found.row_blocks == -(-problem.q_rows // queries) + spare
        assert found.schedule.blocks == units * found.row_blocks
        if found.schedule.blocks > 20_000:
            continue
        # find_block (attention/scores.cuh)
        blocks, places = found.heads_in_l2 * found.row_blocks, set()
        for index in range(found.schedule.blocks):
            base = index // blocks * found.heads_in_l2
            together = min(found.heads_in_l2, units - base)
            places.add((base + index % blocks % together, index % blocks // together))
        assert places == set(itertools.product(range(units), range(found.row_blocks)))


@pytest.mark.parametrize("k_rows", [1, 777, 20_000, 10**6])
def test_sections_are_whole_heads_of_k_and_v(k_rows):
    for problem in sharing():
        problem = change(problem, k_rows=k_rows)
        found = plan(problem)
        units = problem.heads // found.pack * (1 if problem.ragged else problem.batch)
        sharers = problem.heads // problem.kv_heads // found.pack
        assert 1 <= found.heads_in_l2 <= units and found.heads_in_l2 % sharers == 0
        kv_bytes = found.heads_in_l2 // sharers * k_rows * (64 + 64) * 2
        assert kv_bytes <= L2_BYTES or found.heads_in_l2 == sharers
        more = kv_bytes + k_rows * (64 + 64) * 2
        assert found.heads_in_l2 == units or more > L2_BYTES


@pytest.mark.parametrize("num_sms", [1, 78, 114, 132])
def test_grid(num_sms):
    for problem in sharing():
        found = plan(problem, num_sms=num_sms)
        assert found.kernel.grid == min(num_sms, found.schedule.blocks) >= 1


def work(kernel, schedule):
    """The indices of each block's rows, in its rounds: Schedule (attention/params.cuh)."""
    for block in range(kernel.grid):
        own = []
        for turn in range(schedule.rounds):
            section, turn = divmod(turn, schedule.turns)
            first = section * schedule.section
            from_first = (block - first) % kernel.grid
            place = turn * kernel.grid + (kernel.grid - 1 - from_first if turn % 2 else from_first)
            if place < min(schedule.section, schedule.blocks - first):
                own.append(first + place)
        yield own


@pytest.mark.drawn
@pytest.mark.parametrize("num_sms", [1, 78, 132])
@pytest.mark.parametrize("bounded", [False, True])
def test_every_block_of_rows_has_one_turn(bounded, num_sms):
    for problem in sharing():
        problem = change(problem, bounded=bounded, k_rows=50_000)
        found = plan(problem, num_sms=num_sms)
        assert sorted(itertools.chain(*work(found.kernel, found.schedule))) == list(
            range(found.schedule.blocks)
        )


@pytest.mark.parametrize("length", [2**n for n in range(9, 15)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_causal_work_is_shared_out_evenly(dim, length):
    """Of FlashAttention-3's benchmark, 16 Ki queries of 2048 columns: arXiv:2407.08608, 4.1."""
    sizes = {"batch": 2**14 // length, "heads": 2048 // dim, "kv_heads": 2048 // dim}
    sizes |= {"q_rows": length, "k_rows": length, "head_dim": dim, "value_dim": dim}
    problem = change(**sizes, bounded=True)
    found = plan(problem)
    rows, of_section = 64 * found.kernel.arguments["kWarpgroups"], found.heads_in_l2
    keys = []  # of each block of rows
    for index in range(found.schedule.blocks):
        base, number = divmod(index, of_section * found.row_blocks)
        together = min(of_section, problem.batch * problem.heads - base * of_section)
        keys.append(min(length, (found.row_blocks - number // together) * rows))
    busiest = max(sum(keys[index] for index in own) for own in work(found.kernel, found.schedule))
    assert busiest <= 1.04 * sum(keys) / SMS


# ---- What TMA can move ----


@pytest.mark.parametrize(
    ("shape", "strides", "can"),
    [
        ((2, 3, 100, 64), (38400, 12800, 128, 2), True),
        ((2, 3, 100, 64), (38400, 128, 384, 2), True),  # heads between the rows
        ((2, 3, 100, 59), (38400, 12800, 128, 2), True),  # rows of any length
        ((2, 3, 100, 64), (16, 32, 48, 2), True),  # overlapping
        ((2, 3, 100, 64), (38400, 12800, 128, 4), False),  # columns are not side by side
        ((2, 3, 100, 64), (38400, 12800, 128, -2), False),
        ((2, 3, 100, 64), (38400, 12800, 128, 0), False),
        ((2, 3, 100, 59), (35400, 11800, 118, 2), False),  # no multiples of 16
        ((2, 3, 100, 64), (38408, 12800, 128, 2), False),
        ((2, 3, 100, 64), (38400, 12808, 128, 2), False),
        ((2, 3, 100, 64), (-38400, 12800, 128, 2), False),
        ((2, 3, 100, 64), (38400, -12800, 128, 2), False),
        ((2, 3, 100, 64), (38400, 12800, -128, 2), False),
        ((2, 3, 100, 64), (0, 12800, 128, 2), False),  # broadcast
        ((2, 3, 100, 64), (38400, 0, 128, 2), False),
        ((2, 3, 100, 64), (38400, 12800, 0, 2), False),
        ((1, 3, 100, 64), (7, 12800, 128, 2), True),  # a stride that leads nowhere
        ((1, 1, 1, 64), (0, -6, 2**50, 2), True),
        ((2, 1, 100, 64), (38400, 1, 128, 2), True),
        ((2, 3, 1, 64), (38400, 12800, 0, 2), True),
        ((2, 3, 100, 64), (2**34 - 16, 12800, 128, 2), True),
        ((2, 3, 100, 64), (2**34, 12800, 128, 2), False),
        ((2, 3, 100, 64), (38400, 2**34 - 16, 128, 2), True),  # times 64 packed heads: below 2^40
        ((2, 3, 100, 64), (38400, 2**34, 128, 2), False),
        ((2, 3, 100, 64), (38400, 12800, 2**40, 2), False),
    ],
)
def test_strides(shape, strides, can):
    assert is_tma(shape, strides) is can


def memory_of(shape, order, gap, rng):
    """A random array of this shape whose axes lie in this order, the outermost first; rows of
    memory are `gap` elements longer than they need be, and a multiple of 16 bytes."""
    sizes = [shape[axis] for axis in order]
    sizes[-1] += -sizes[-1] % 8 + gap
    memory = rng.integers(0, 2**16, np.prod(sizes) + 8, np.uint16)
    memory = memory[-memory.ctypes.data % 16 // 2 :][: np.prod(sizes)].reshape(sizes)
    index = [slice(shape[axis]) for axis in order]
    return memory[tuple(index)].transpose(np.argsort(order)).view(np.float16)


def mapped(boxes, first):
    """What lies at every coordinate of a map, the innermost dimension last; `first` starts it."""
    strides = (*boxes.strides[::-1], first.itemsize)
    return np.lib.stride_tricks.as_strided(first, boxes.dims[::-1], strides)


def check_boxes(boxes, array, pack):
    """Element (c, h, r, p, b) of the map is array[b, p * pack + h, r, c]."""
    batch, heads, rows, columns = array.shape
    assert boxes.dims == (columns, pack, rows, heads // pack, batch)
    packs = array.reshape(batch, heads // pack, pack, rows, columns)
    assert np.array_equal(
        mapped(boxes, array).view(np.uint16), packs.swapaxes(2, 3).view(np.uint16)
    )
    assert all(1 <= size <= 2**32 for size in boxes.dims)
    assert all(0 < stride < 2**40 and stride % 16 == 0 for stride in boxes.strides)
    assert boxes.box[0] * 2 == boxes.swizzle in (64, 128)
    assert all(1 <= size <= 256 for size in boxes.box)


ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(2, 8, 5, 64), (1, 4, 33, 59), (3, 1, 1, 8), (2, 64, 1, 20)])
def test_boxes(shape, order, rng):
    array = memory_of(shape, order, 8, rng)
    for pack in (1, 2, 4, 8, 16, 32, 64):
        if shape[1] % pack:
            continue
        for columns in (32, 64):
            boxes = box_of("bfloat16", array.shape, array.strides, 64, pack, columns)
            check_boxes(boxes, array, pack)
            # Row by row of a box: the heads of a pack.
            assert boxes.dtype == "bfloat16" and boxes.box == (columns, pack, 64 // pack, 1, 1)
    keys = box_of("float16", array.shape, array.strides, 112, 1, 64)
    assert keys.dtype == "float16" and keys.box == (64, 1, 112, 1, 1)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("stride", [0, -6, 7, 2**50])
def test_boxes_where_a_stride_leads_nowhere(axis, stride, rng):
    shape = [2, 3, 5, 64]
    shape[axis] = 1
    array = memory_of(shape, (0, 1, 2, 3), 0, rng)
    strides = list(array.strides)
    strides[axis] = stride
    assert is_tma(array.shape, tuple(strides))
    check_boxes(box_of("float16", array.shape, tuple(strides), 64, 1, 64), array, 1)


def test_boxes_of_the_largest_strides():
    shape, most = (1, 64, 2, 64), 2**34 - 16
    for strides in ((most, most, 128, 2), (most, 128, most, 2)):
        assert is_tma(shape, strides)
        for pack in (1, 64):
            boxes = box_of("float16", shape, strides, 64, pack, 64)
            assert all(0 < stride < 2**40 and stride % 16 == 0 for stride in boxes.strides)


# ---- Parameters ----


def unpack(params):
    """The fields of AttentionParams by name."""
    return ATTENTION_POINTERS.unpack(params) | ATTENTION_TAIL.unpack(
        params, ATTENTION_POINTERS.struct.size
    )


def unpack_sm90(params):
    """Four maps, the fields of AttentionParams, pack_log2 and blocks."""
    parts = ATTENTION_POINTERS, ATTENTION_TAIL, SCORE_ARRAYS
    before, size = 4 * 128, sum(part.struct.size for part in parts)
    assert len(params) == before + size + ATTENTION_SM90.struct.size
    maps = [params[i : i + 128] for i in range(0, before, 128)]
    last = ATTENTION_SM90.unpack(params, before + size)
    return maps, unpack(params[before:]), (last["pack_log2"], last["blocks"])


ZEROS = unpack(bytes(1024))


# ---- Calls ----


class Diary:
    """A runtime of a device that runs nothing: `maps` (arguments) and `launches` of each call."""

    xp = np

    def __init__(self, capability=90):
        self.capability, self.maps, self.launches, self.made = capability, [], [], []
        self.recent = Recent()

    address = staticmethod(lambda array: array.__array_interface__["data"][0])
    device = staticmethod(lambda array: 0)
    signature = staticmethod(lambda array: (id(array),))
    on = staticmethod(lambda device: contextlib.nullcontext())

    def limits(self, device):
        return Limits(self.capability, SMS)

    def empty(self, shape, dtype):
        memory = np.zeros(np.prod(shape, dtype=int) * np.dtype(dtype).itemsize + 16, np.uint8)
        start = -memory.ctypes.data % 16
        self.made.append(memory[start : len(memory) - 16 + start].view(dtype).reshape(shape))
        return self.made[-1]

    def tensor_map(self, *arguments):
        self.maps.append(arguments)
        return bytes([len(self.maps)]) * 128

    def launch(self, kernel, params, reads, writes):
        self.launches.append((kernel, params, reads, writes))


@pytest.fixture
def device(monkeypatch):
    """Makes NumPy arrays those of a device of this compute capability."""

    def start(capability=90):
        diary = Diary(capability)
        monkeypatch.setattr(runtime, "emulator", diary)
        return diary

    return start


def drawn(rng, *shape, order=(0, 1, 2, 3), gap=0):
    return memory_of(shape, order, gap, rng)


def elements(array):
    return tuple(stride // array.itemsize for stride in array.strides)


def test_call(device, rng):
    """Everything that the kernel is handed, with sizes and strides that all differ."""
    q = drawn(rng, 2, 8, 70, 60, gap=8)
    k = drawn(rng, 2, 2, 300, 60, order=(0, 2, 1, 3))
    v = drawn(rng, 2, 2, 300, 90, order=(1, 0, 2, 3))
    out = drawn(rng, 2, 8, 70, 90, order=(2, 0, 1, 3), gap=16)
    diary = device()
    lse = diary.empty((2, 8, 70), np.float32)
    cuattn.attention(q, k, v, is_causal=True, scale=0.5, out=(out, lse), return_lse=True)
    ((kernel, params, reads, writes),) = diary.launches
    assert (kernel.arguments["kWarpgroups"], kernel.arguments["kKeys"]) == (2, 128)
    assert all(a is b for a, b in zip(reads[:3] + writes, (q, k, v, out, lse), strict=True))
    maps, found, (pack_log2, blocks) = unpack_sm90(params)
    assert maps == [bytes([i]) * 128 for i in (1, 2, 3, 4)]
    # 70 rows of 8 heads: blocks of 128 rows hold a head each, or 32 queries of 4 heads.
    assert (pack_log2, blocks) == (2, 2 * 2 * 3)
    assert kernel.grid == 12
    for arguments, array, pack, box in zip(
        diary.maps,
        (q, k, v, out),
        (4, 1, 1, 4),
        ((64, 4, 16, 1, 1), (64, 1, 128, 1, 1), (32, 1, 128, 1, 1), (32, 4, 16, 1, 1)),
        strict=True,
    ):
        address, *boxes = arguments
        assert address == diary.address(array)
        found_boxes = plan_sm90.Boxes(*boxes)
        check_boxes(found_boxes, array, pack)
        assert (found_boxes.dtype, found_boxes.box) == ("float16", box)
    expected = dict(ZEROS)
    for name, array in (("q", q), ("k", k), ("v", v), ("out", out), ("lse", lse)):
        expected[name] = diary.address(array)
        expected[f"{name}_stride"] = elements(array)
    assert found == {
        **expected,
        "scale": 0.5,
        "left": 2**40,
        "bottom_right": 1,
        "batch": 2,
        "heads": 2,
        "sharing": 1,
        "q_rows": 70,
        "k_rows": 300,
        "head_dim": 60,
        "value_dim": 90,
        "row_blocks": 3,
        "heads_in_l2": 4,
        "descending": 1,
    }


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (5, 3), "q_offset": -7},
    "rule": {"softcap": 2.0, "scale": -1.0},
    "lse": {"return_lse": True},
    "arrays": {
        "alibi_slopes": np.arange(8, dtype=np.float32),
        "sinks": np.ones(8, np.float32),
        "q_lens": np.array([3, 32]),
        "kv_lens": np.array([0, 300]),
        "q_offset": np.array([5, -5]),
    },
}
OF_THE_GRID = {"heads", "sharing", "row_blocks", "heads_in_l2"}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize(("heads", "kv_heads", "pack"), [(8, 8, 1), (8, 2, 4)])
def test_what_does_not_concern_the_grid_is_as_for_the_general_kernel(
    device, rng, options, layout, heads, kv_heads, pack
):
    shapes = ((2, heads, 32, 64), (2, kv_heads, 300, 64), (2, kv_heads, 300, 64))
    arrays = [drawn(rng, *shape) for shape in shapes]
    if layout == "BSHD":
        arrays = [drawn(rng, b, s, h, d) for b, h, s, d in shapes]
    found = {}
    for capability in (80, 90):
        diary = device(capability)
        cuattn.attention(*arrays, layout=layout, **OPTIONS[options])
        ((kernel, params, *_),) = diary.launches
        assert kernel.header == (
            "attention/forward.cuh" if capability == 80 else "attention/forward_sm90.cuh"
        )
        assert len(diary.maps) == (0 if capability == 80 else 4)
        _, values, last = unpack_sm90(params) if diary.maps else (None, unpack(params), None)
        found[capability] = values
        for name, array in zip(("out", "lse"), diary.made, strict=False):
            assert values.pop(name) == diary.address(array)
    assert last[0] == pack.bit_length() - 1
    assert found[90]["heads"] == heads // pack
    assert found[90]["sharing"] == heads // pack // kv_heads
    assert {n for n in found[80] if found[80][n] != found[90][n]} <= OF_THE_GRID
    assert found[80]["heads"] == heads and found[80]["sharing"] == heads // kv_heads


def test_ragged_call(device, rng):
    q, k = (memory_of((n, h, 64), (0, 1, 2), 8, rng) for n, h in ((300, 6), (500, 2)))
    ends = np.array([0, 100, 100, 300]), np.array([0, 1, 400, 500])
    diary = device()
    cuattn.attention_varlen(q, k, k, *ends, return_lse=True)
    ((kernel, params, *_),) = diary.launches
    _, found, (pack_log2, blocks) = unpack_sm90(params)
    rows = 64 * kernel.arguments["kWarpgroups"]
    assert (found["batch"], found["heads"], found["sharing"], pack_log2) == (3, 6, 3, 0)
    assert found["row_blocks"] == -(-300 // rows) + 3 and blocks == 6 * found["row_blocks"]
    for (address, *boxes), array in zip(diary.maps, (q, k, k, diary.made[0]), strict=True):
        assert address == diary.address(array)
        view = array.swapaxes(0, 1)[None]
        check_boxes(plan_sm90.Boxes(*boxes), view, 1)


def spoiled(rng, what):
    """q, k, v and out of a call that TMA cannot do, by one of them."""
    shapes = ((2, 4, 70, 64), (2, 2, 90, 64), (2, 2, 90, 64), (2, 4, 70, 64))
    arrays = dict(zip(("q", "k", "v", "out"), (drawn(rng, *s) for s in shapes), strict=True))
    name, fault = what.split()
    batch, heads, rows, columns = arrays[name].shape
    if fault == "backwards":
        arrays[name] = arrays[name][:, :, ::-1]
    elif fault == "shifted":
        wide = drawn(rng, batch, heads, rows, columns + 8)
        arrays[name] = wide[..., 1 : columns + 1]
    elif fault == "narrow":
        memory = rng.random((batch, heads, rows, columns + 4)).astype(np.float16)
        arrays[name] = memory[..., :columns]
    elif fault == "transposed":
        arrays[name] = drawn(rng, batch, heads, columns, rows).swapaxes(2, 3)
    else:
        arrays[name] = np.broadcast_to(arrays[name][:, :1], arrays[name].shape)
    return arrays


@pytest.mark.parametrize(
    "what",
    [
        f"{name} {fault}"
        for name in ("q", "k", "v", "out")
        for fault in ("backwards", "shifted", "narrow", "transposed", "broadcast")
        if (name, fault) != ("out", "broadcast")
    ],
)
def test_calls_that_tma_cannot_do_are_as_before(device, rng, what):
    arrays, found = spoiled(rng, what), []
    inputs, out = [arrays[name] for name in ("q", "k", "v")], arrays["out"]
    for capability in (80, 90):
        diary = device(capability)
        cuattn.attention(*inputs, out=out, window=(30, 2))
        ((kernel, params, *_),) = diary.launches
        assert diary.maps == [] and kernel.header == "attention/forward.cuh" and kernel.suffix == ""
        found.append((kernel, params))
    assert found[0] == found[1]
    params = unpack(found[1][1])
    expected = dict(ZEROS)
    for name, array in arrays.items():
        expected[name] = diary.address(array)
        expected[f"{name}_stride"] = elements(array)
    assert params == {
        **expected,
        "scale": 0.125,
        "left": 30,
        "right": 2,
        "bottom_right": 1,
        "batch": 2,
        "heads": 4,
        "sharing": 2,
        "q_rows": 70,
        "k_rows": 90,
        "head_dim": 64,
        "value_dim": 64,
        "row_blocks": 1,
        "heads_in_l2": 2 * 4,
        "descending": 1,
        "out_is_vector": int(what not in ("out shifted", "out narrow", "out transposed")),
    }


@pytest.mark.parametrize("option", ["mask", "bias", "float32", "no keys"])
def test_calls_that_the_kernel_does_not_know(device, rng, option):
    dtype = np.float32 if option == "float32" else np.float16
    rows = 0 if option == "no keys" else 90
    q, k = (np.ones((2, 4, n, 64), dtype) for n in (70, rows))
    options = {"mask": np.ones((70, 90), bool), "bias": np.ones((70, 90), np.float16)}
    diary = device()
    cuattn.attention(q, k, k, **{n: a for n, a in options.items() if n == option})
    ((kernel, *_),) = diary.launches
    assert kernel.header == "attention/forward.cuh" and diary.maps == []


def test_bfloat16(device, rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    q = drawn(rng, 1, 2, 64, 64).view(ml_dtypes.bfloat16)
    diary = device()
    cuattn.attention(q, q, q)
    assert [arguments[1] for arguments in diary.maps] == ["bfloat16"] * 4
    assert diary.launches[0][0].arguments["T"] == "__nv_bfloat16"
