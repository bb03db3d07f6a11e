"""Where Hopper's attention kernel has TMA put each element, and where wgmma and stmatrix go: for
every shipped tile, from the kernel's own descriptors, boxes and addresses (sm90_trace.py), by the
layouts of the PTX ISA written down here a second time.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from conftest import SEED
from sm90_trace import rule, sizes, tiles, trace

import cuattn

SMEM_LIMIT = 227 << 10
ELEMENTS = 1 << 17  # of 2 bytes, that a descriptor can address
OUTSIDE = 0  # "address" of what TMA fills with zeros
NEVER = -1  # of what nobody has loaded
SCORES, VALUES = "wgmma ss", "wgmma rs"


# ---- The PTX ISA ----


def swizzled(address, span):
    """Tensors, 5.5.7, swizzling modes: the number of a chunk of 16 bytes, within its `span` bytes,
    is xored with the number of the 128-byte line it is in."""
    return address ^ (address >> 7 & span // 16 - 1) << 4


def box(trace, event):
    """Each element of a box, first the outermost: where it is in shared memory and in its tensor.
    Tensors, 5.5.3: innermost dimension first, one row after another, zeros outside of the tensor.
    """
    smem, _, tensor, *first = event.args[:8]
    tensor_map = trace.maps[tensor]
    index = [at + i for at, i in zip(first[::-1], np.indices(tensor_map.box[::-1]), strict=True)]
    inside = np.all(
        [(0 <= i) & (i < n) for i, n in zip(index, tensor_map.dims[::-1], strict=True)], axis=0
    )
    strides = (*tensor_map.strides[::-1], 2)
    address = tensor + sum(i * stride for i, stride in zip(index, strides, strict=True))
    place = smem + 2 * np.arange(inside.size).reshape(inside.shape)
    return swizzled(place, tensor_map.swizzle), np.where(inside, address, OUTSIDE)


def descriptor(lower, upper):
    """Matrix descriptor of wgmma, 9.7.15.5.1: start, leading and stride offset and span, in bytes;
    None: bits that have to be 0 are not."""
    value = lower | upper << 32

    def field(low, high):
        return value >> low & (1 << high - low + 1) - 1

    unused = [field(*bits) for bits in ((14, 15), (30, 31), (46, 48), (49, 51), (52, 61))]
    span = {1: 128, 2: 64, 3: 32}.get(field(62, 63))  # 0: not swizzled
    if any(unused) or span is None:
        return None
    return 16 * field(0, 13), 16 * field(16, 29), 16 * field(32, 45), span


def operand(matrix, rows, k_major):
    """Where wgmma reads element (row, k) of `rows` x 16: canonical layouts, 9.7.15.5.1, with T = 8
    elements of 16 bits. Swizzling is of addresses, so that a pattern begins where it does in TMA's.
    """
    start, leading, stride, span = matrix
    row, k = np.arange(rows)[:, None], np.arange(16)
    if k_major:
        offset = row % 8 * span + row // 8 * stride + 2 * k
    else:
        inside = span // 2  # columns of a panel
        offset = 2 * (row % inside) + row // inside * leading + k % 8 * span + k // 8 * stride
    return swizzled(start + offset, span)


def accumulator(row, column):
    """Thread of a warpgroup, and its register, that hold an element of D: wgmma, figure of D of
    .m64nNk16."""
    thread = row // 16 * 32 + row % 8 * 4 + column % 8 // 2
    return thread, column // 8 * 4 + row // 8 % 2 * 2 + column % 2


def fragment(thread, word, half):
    """Row and k of one half of a word of A in registers: wgmma, figure of A of .m64nNk16."""
    lane = thread % 32
    return thread // 32 * 16 + lane // 4 + word % 2 * 8, lane % 4 * 2 + word // 2 * 8 + half


def stored(lane, matrix, half):
    """Lane that passes the address of the row, and the column, of what a lane stores by stmatrix:
    9.7.14.5.16."""
    return 8 * matrix + lane // 4, lane % 4 * 2 + half


# ---- What the kernel should do ----


def elements(trace, name, rows, columns, pack=1):
    """Address of each element of a tile: row i is query i // pack of head i % pack."""
    array = trace.arrays[name]
    row, column = np.asarray(rows)[:, None] // pack, np.arange(columns)
    _, head_stride, row_stride, column_stride = array.strides
    address = trace.address(name) + row * row_stride + column * column_stride
    address += np.asarray(rows)[:, None] % pack * head_stride
    return np.where((row < array.shape[2]) & (column < array.shape[3]), address, OUTSIDE)


def halves(words):
    return np.asarray(words, np.uint32)[..., None].view(np.float16).astype(np.float64)


def weight(register):
    """P of a score's register where trace.hpp makes the scores and scale is ln 2."""
    half = register // 2 % 2  # of the rows; the maximum of each is its first register's
    return 2.0 ** -((register - 2 * half) / (8 + 8 * half))


def faults(trace, pack=1):
    """What is wrong in a call of one turn, with one tile of keys for each stage."""
    groups, *_ = sizes(trace.kernel)
    memory, found = loaded(trace)
    for group in range(groups):
        warps = [trace.warps[4 * group + 4 + i] for i in range(4)]
        found += faults_of_products(trace, memory, group, warps, pack)
        found += faults_of_out(trace, group, warps, pack)
    return found


def loaded(trace):
    """The address that each element of shared memory has come from, and what is wrong with it."""
    loads = [e for e in trace.warps[0] if e.op == "load"]
    barriers = [e.args[0] for e in trace.warps[0] if e.op == "init"]
    first, end = min(e.args[0] for e in loads), max(barriers) + 8
    memory, found = np.full(ELEMENTS, NEVER), []
    if end - first > SMEM_LIMIT:
        found.append(f"{end - first} bytes of shared memory")
    for event in loads:
        place, address = box(trace, event)
        if event.args[0] % (8 * trace.maps[event.args[2]].swizzle):
            found.append(f"{event.site}: a box that begins within a pattern")
        if place.max() >= min(barriers) or np.any(memory[place // 2] != NEVER):
            found.append(f"{event.site}: a box over something else")
        else:
            memory[place // 2] = address
    return memory, found


def faults_of_products(trace, memory, group, warps, pack):
    """Of the operands of a warpgroup."""
    _, keys, stages, dim, value_dim = sizes(trace.kernel)
    found = []

    def check(event, matrix, rows, k_major, expected, what):
        place = operand(matrix, rows, k_major) // 2 if matrix else np.array([ELEMENTS])
        if place.max() >= ELEMENTS or not np.array_equal(memory[place], expected):
            found.append(f"{event.site}: wgmma does not read {what}")

    issued = [[(e.op, *e.args[:5]) for e in w if e.op in (SCORES, VALUES, "commit")] for w in warps]
    if any(one != issued[0] for one in issued):
        found.append("the warps of a group do not multiply the same")
    batches = [[]]  # products that are committed together
    for event in warps[0]:
        if event.op in (SCORES, VALUES):
            batches[-1].append(event)
        elif event.op == "commit":
            batches.append([])
    by_kind = {kind: [b for b in batches if b and b[0].op == kind] for kind in (SCORES, VALUES)}
    if [len(by_kind[kind]) for kind in by_kind] != [stages, stages] or batches[-1]:
        found.append("other products than a tile has, or some that are not committed")

    q = elements(trace, "q", 64 * group + np.arange(64), dim, pack)
    for tile, batch in enumerate(by_kind[SCORES]):
        k = elements(trace, "k", tile * keys + np.arange(keys), dim)
        for step, event in enumerate(batch):
            columns, a, b, upper, add = event.args[:5]
            at = slice(16 * step, 16 * step + 16)
            check(event, descriptor(a, upper), 64, True, q[:, at], "Q")
            check(event, descriptor(b, upper), columns, True, k[:, at], "K")
            if add != (step > 0):
                found.append(f"{event.site}: scores added to what is not theirs")
    for tile, batch in enumerate(by_kind[VALUES]):
        v = elements(trace, "v", tile * keys + np.arange(keys), value_dim)
        for step, event in enumerate(batch):
            columns, _, b, upper, add = event.args[:5]
            at = slice(16 * step, 16 * step + 16)
            check(event, descriptor(b, upper), columns, False, v[at].T, "V")
            word, half = np.divmod(np.arange(8), 2)
            row, k = fragment(0, word, half)
            _, register = accumulator(row, 16 * step + k)
            if not np.allclose(halves(event.args[5:9]).reshape(8), weight(register), 0.02):
                found.append(f"{event.site}: P from the wrong registers")
            if not add:
                found.append(f"{event.site}: values not added up")
    return found


def faults_of_out(trace, group, warps, pack):
    """Of the way from a warpgroup's accumulators to `out`."""
    _, keys, stages, _, value_dim = sizes(trace.kernel)
    thread_of, value_of = np.full(ELEMENTS, -1), np.full(ELEMENTS, np.nan)  # that wrote each
    for number, warp in enumerate(warps):
        lanes = [[e for e in warp if e.op == "stmatrix" and e.lane == i] for i in range(32)]
        for step in zip(*lanes, strict=True):
            lane, word, half = np.indices((32, 4, 2))
            source, column = stored(lane, word, half)
            place = np.array([e.args[0] for e in step])[source] // 2 + column
            thread_of[place] = 32 * number + lane
            value_of[place] = halves([e.args[1:5] for e in step])

    found, columns = [], []
    register = np.arange(keys // 2)
    sums = [4 * stages * weight(register[register // 2 % 2 == half]).sum() for half in (0, 1)]
    for event in (e for warp in warps for e in warp if e.op == "store"):
        place, address = (a.reshape(64, -1) for a in box(trace, event))
        row, column = np.arange(64)[:, None], event.args[3] + np.arange(place.shape[1])
        out = elements(trace, "out", 64 * group + row[:, 0], value_dim, pack)[:, column]
        if not np.array_equal(address, out):
            found.append(f"{event.site}: the box is not of these rows and columns of out")
        thread, register = accumulator(row, column)
        number = value_of[place // 2] * np.array(sums)[row // 8 % 2]
        right = (thread_of[place // 2] == thread) & (abs(number - register) < 0.4)
        if not np.all(right | (address == OUTSIDE)):
            found.append(f"{event.site}: not the accumulators of these rows and columns")
        columns += [*column]
    if sorted(columns) != [*range(value_dim)]:
        found.append("columns of out that are not stored, or twice")
    return found


def faults_of_clearing(trace, seen):
    """Whether just the rows from `seen` on of the last tile of V become zero."""
    _, keys, *_ = sizes(trace.kernel)
    loads = [e for e in trace.warps[0] if e.op == "load" and e.args[2] == trace.address("v")]
    last = [e for e in loads if e.args[5] == loads[-1].args[5]]
    wanted = [box(trace, e)[0].reshape(keys, -1)[seen:] for e in last]
    writes = [e for warp in trace.warps.values() for e in warp if e.op == "write"]
    cleared = [e.args[0] + i for e in writes for i in range(0, e.args[1], 2)]
    right = sorted(cleared) == sorted(np.concatenate(wanted, axis=1).flat)
    return [] if right else ["rows of V become zero that a query sees, or others do not"]


# ---- Every tile ----


def call(rng, tile, heads=1, rows=None, unseen=0):
    """A call of one turn with as many tiles of keys as stages, the last `unseen` keys hidden."""
    length, layout = tile.keys * tile.stages, rng.choice(["BHSD", "BSHD"])
    dim, value_dim = (d - 8 * int(rng.integers(4)) for d in (tile.dim, tile.value_dim))

    def array(heads, length, columns):
        shape = (1, heads, length, columns) if layout == "BHSD" else (1, length, heads, columns)
        return np.zeros(shape, np.float16)

    arrays = array(heads, rows or 64 * tile.groups, dim), array(1, length, dim)
    found = trace(
        cuattn.attention,
        *arrays,
        array(1, length, value_dim),
        base=1024 * int(rng.integers(1, 16)),  # wherever dynamic shared memory begins
        scale=np.log(2),  # P is 2 to the power of the scores
        layout=layout,
        kv_lens=np.array([length - unseen]),
        **rule(tile, heads),
    )
    views = {
        name: array if layout == "BHSD" else array.swapaxes(1, 2)
        for name, array in found.arrays.items()
    }
    return found._replace(arrays=views)


@pytest.mark.drawn
@pytest.mark.parametrize("tile", tiles(), ids=str)
def test_every_element_is_where_it_is_read(rng, tile):
    assert faults(call(rng, tile)) == []
    pack = 2 ** int(rng.integers(1, 7))
    assert faults(call(rng, tile, heads=pack, rows=64 // pack), pack) == []
    seen = int(rng.integers(1, tile.keys))
    assert faults_of_clearing(call(rng, tile, unseen=tile.keys - seen), seen) == []


# ---- What the gate sees ----

# Of each kind of swizzle and of panel one: 64 bytes and one panel; 128 bytes and several.
WITNESSES = [t for t in tiles() if t[:3] in ((96, 64, False), (192, 128, True))]


@pytest.fixture(scope="module", params=WITNESSES, ids=str)
def good(request):
    """A call that has no fault."""
    found = call(np.random.default_rng(int(os.environ[SEED])), request.param)
    assert faults(found) == []
    return found


def changed(trace, op, change, warps=range(16)):
    """The trace with the arguments of these instructions changed; None takes one out."""

    def one(event):
        args = change(*event.args) if event.op == op else event.args
        return args and event._replace(args=args)

    events = {
        warp: [*filter(None, map(one, found))] if warp in warps else found
        for warp, found in trace.warps.items()
    }
    return trace._replace(warps=events)


@pytest.mark.parametrize(
    ("op", "change", "fault"),
    [
        (SCORES, lambda n, a, *rest: (n, a + 1, *rest), "Q"),
        (SCORES, lambda n, a, *rest: (n, a + 64, *rest), "Q"),  # the next eight rows
        (SCORES, lambda n, a, b, *rest: (n, a, b + 2, *rest), "K"),  # the next k
        (SCORES, lambda n, a, b, *rest: (n, a, b | 1 << 15, *rest), "K"),  # a bit that must be 0
        (SCORES, lambda n, a, b, upper, *rest: (n, a, b, upper - 1, *rest), "K"),
        (SCORES, lambda n, a, b, upper, *rest: (n, a, b, upper ^ 3 << 30, *rest), "K"),
        (SCORES, lambda n, a, b, upper, *rest: (n, a, b, upper | 1 << 17, *rest), "K"),
        (SCORES, lambda n, *rest: (n // 2, *rest), "K"),
        (SCORES, lambda n, a, b, upper, add, *rest: (n, a, b, upper, 1, *rest), "added"),
        (VALUES, lambda n, a, b, *rest: (n, a, b + 64, *rest), "V"),
        (VALUES, lambda n, a, b, upper, *rest: (n, a, b, upper ^ 3 << 30, *rest), "V"),
        (VALUES, lambda n, a, b, upper, *rest: (n, a, b, upper + 32, *rest), "V"),
        (VALUES, lambda n, a, b, upper, add, *rest: (n, a, b, upper, 0, *rest), "added up"),
        (VALUES, lambda *a: (*a[:5], a[6], a[5], *a[7:]), "P"),
        (VALUES, lambda *a: (*a[:5], a[5] << 16 & 0xFFFF0000 | a[5] >> 16, *a[6:]), "P"),
        ("commit", lambda *_: None, "committed"),
        ("load", lambda smem, *rest: (smem + 1024, *rest), "Q"),
        ("load", lambda smem, *rest: (smem & ~0x3FFF, *rest), "a box over"),
        ("load", lambda smem, *rest: (smem ^ 128, *rest), "within a pattern"),
        ("load", lambda *a: (*a[:3], a[3] + 8, *a[4:]), "Q"),
        ("load", lambda *a: (*a[:5], a[5] + 1, *a[6:]), "Q"),
        ("stmatrix", lambda smem, *rest: (smem ^ 16, *rest), "not the accumulators"),
        ("stmatrix", lambda a, b, c, *rest: (a, c, b, *rest), "not the accumulators"),
        ("stmatrix", lambda *_: None, "not the accumulators"),
        ("store", lambda smem, *rest: (smem ^ 1024, *rest), "not the accumulators"),
        ("store", lambda *a: (*a[:5], a[5] + 8, *a[6:]), "the box is not of"),
        ("store", lambda *_: None, "not stored"),
    ],
)
def test_the_gate_sees_an_instruction(good, op, change, fault):
    assert any(fault in each for each in faults(changed(good, op, change)))


def test_the_gate_sees_one_warp(good):
    other = changed(good, SCORES, lambda n, a, *rest: (n, a + 64, *rest), warps=[5])
    assert faults(other) == ["the warps of a group do not multiply the same"]


def test_the_gate_sees_another_pitch_of_panels(rng):
    trace = call(rng, next(t for t in tiles() if t.value_dim == 128))
    other = changed(trace, VALUES, lambda n, a, b, *rest: (n, a, b + (1 << 16), *rest))
    assert any("V" in each for each in faults(other))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("swizzle", 32),
        ("box", (16, 1, 64, 1, 1)),
        ("strides", (16, 16, 16, 16)),
        ("dims", 5 * (1,)),
    ],
)
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_the_gate_sees_another_map(good, name, field, value):
    maps = good.maps.copy()
    maps[good.address(name)] = maps[good.address(name)]._replace(**{field: value})
    assert faults(good._replace(maps=maps))


@pytest.mark.parametrize("tile", WITNESSES, ids=str)
def test_the_gate_sees_rows_that_become_zero(rng, tile):
    good = call(rng, tile, unseen=tile.keys - 24)
    fewer = changed(good, "write", lambda *_: None, warps=[7])
    moved = changed(good, "write", lambda smem, *rest: (smem + 1024, *rest), warps=[7])
    assert [bool(faults_of_clearing(t, 24)) for t in (good, fewer, moved)] == [False, True, True]
    assert faults_of_clearing(good, 23) and faults_of_clearing(good, 25)
