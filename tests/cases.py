"""The inputs that the tests share: row lengths by regime, memory layouts, data that can fail."""

from __future__ import annotations

import math
import mmap

import ml_dtypes
import numpy as np
from tolerance import dtype_of

NAN, INF = np.nan, np.inf
FAR = 2**31 + 64  # elements; more than 2^32 bytes of float16

# Each length with its reason; what lies between two of them runs the same code.
LENGTHS = [
    1,  # a row that is its own maximum
    2,
    3,
    7,  # less than one 16-byte vector of float16
    31,  # a lane idle
    32,  # one warp
    33,  # one more than a warp
    127,
    128,  # one float32 vector for each lane
    129,
    1000,  # a tail, but whole vectors
    1024,
    1025,  # a tail of one element: rows start at every alignment
    2047,
    4097,
    8191,
]
# The same for the other dtypes: a tail in a warp, a block, and whole vectors.
FEW_LENGTHS = [3, 33, 128, 1025, 4097]
# (rows, length) that one block no longer keeps in registers or in shared memory.
LONG = [
    (1, 32767),
    (2, 32769),
    (2, 50257),  # GPT-2's vocabulary: odd, so every second row is misaligned
    (1, 70001),  # more than one block's shared memory: a cluster, where there are clusters
    (2, 300001),  # more than a cluster's: split over blocks and merged
]

# Both sides of what the lanes of a warp hold together, one element each, two, four, eight.
KS = [1, 2, 5, 8, 9, 31, 32, 33, 64, 65, 128, 129, 255, 256, 257, 1000]
# Row lengths on both sides of a warp, of tiles, and of what a block holds.
RANKED_LENGTHS = [
    1,
    2,
    3,
    *(n + d for n in (32, 64, 256, 512, 1024, 2048, 4096) for d in (-1, 0, 1)),
]


def any_k(rng, n):
    """One of KS that a row of n has, or all of it, or all but one."""
    return int(rng.choice([*(k for k in KS if k < n), n - 1, n]))


def draw(rng, shape, dtype="float32", spread=3.0):
    """Normal numbers with about two outliers 20 times as large, so that most rows are not one of
    them alone; integers from -20 to 19."""
    dtype = dtype_of(dtype)
    if dtype.kind in "iu":
        return rng.integers(0 if dtype.kind == "u" else -20, 20, shape).astype(dtype)
    x = rng.standard_normal(shape) * spread
    x = np.where(rng.random(shape) < min(0.1, 2 / max(1, x.size)), 20 * x, x)
    return x.astype(dtype)


def _in_wider(x, before, after):
    """`x` inside an array with NaN on both sides of its last axis."""
    fill = NAN if x.dtype.kind not in "iu" else 111
    wide = np.full((*x.shape[:-1], before + x.shape[-1] + after), fill, x.dtype)
    wide[..., before : before + x.shape[-1]] = x
    return wide[..., before : before + x.shape[-1]]


def _flipped(x, axis):
    return np.flip(np.flip(x, axis).copy(), axis)


# The same values at other addresses. Around them lies NaN, so that a read too far shows.
LAYOUTS = {
    "contiguous": np.ascontiguousarray,
    "misaligned": lambda x: _in_wider(x, 1, 0),  # x[:, 1:]: no vector load fits
    "short": lambda x: _in_wider(x, 0, 3),  # x[:, :-3]: only the first row is aligned
    "padded": lambda x: _in_wider(x, 0, -x.shape[-1] % 64 + 64),  # rows aligned, with a gap
    "strided": lambda x: np.repeat(x, 2, -1)[..., ::2],
    "fortran": np.asfortranarray,
    "reversed columns": lambda x: _flipped(x, -1),
    "reversed rows": lambda x: _flipped(x, 0),
    "swapped": lambda x: np.ascontiguousarray(x.swapaxes(0, -1)).swapaxes(0, -1),
}


class Guarded:
    """An `out` of a given shape in a layout, every byte poisoned, inside a rim that must stay."""

    def __init__(self, backend, shape, dtype, layout="contiguous"):
        columns = shape[-1] if shape else 1
        before, after = {"contiguous": (0, 0), "padded": (0, 64)}.get(layout, (1, 3))
        step = 2 if layout == "strided" else 1
        wide = (*shape[:-1], before + step * columns + after)
        self.host = np.empty(wide, dtype, order="F" if layout == "fortran" else "C")
        self.host.reshape(-1, order="A").view(np.uint8)[...] = 0xA5
        self.backend, self.wide = backend, backend.asarray(self.host.copy(order="A"))
        self.inside = (..., slice(before, before + step * columns, step))
        self.out = self.wide[self.inside].reshape(shape) if not shape else self.wide[self.inside]

    def check_rim(self):
        """No byte around the result has changed."""
        now = self.backend.asnumpy(self.wide).copy(order="A")
        now[self.inside] = self.host[self.inside]
        assert now.tobytes() == self.host.tobytes()


OUTS = ["contiguous", "misaligned", "padded", "strided", "fortran", "mixed"]


def check_outs(backend, rng, function, layout="mixed", compare=None):
    """``function(out=...)`` has the bits of ``function()`` in the arrays that it is given, which it
    returns, and changes nothing else. Mixed: each of a layout of its own. `compare` instead of the
    bits: where the strides of the results may decide whether x is copied first."""
    want = function()
    host = [backend.asnumpy(part) for part in want]
    for _ in range(2):  # the second call may be remembered
        kinds = rng.choice(OUTS[:-1], len(want)) if layout == "mixed" else [layout] * len(want)
        guards = [
            Guarded(backend, part.shape, part.dtype, str(kind))
            for part, kind in zip(host, kinds, strict=True)
        ]
        got = function(out=tuple(guard.out for guard in guards))
        assert type(got) is type(want)
        for part, guard, one in zip(got, guards, host, strict=True):
            assert part is guard.out
            assert compare or backend.asnumpy(part).tobytes() == one.tobytes()
            guard.check_rim()
        if compare:
            compare(got)


def special_rows(rng, columns, dtype="float32"):
    """(what, row): rows with NaN, infinities and constants, at the first, middle and last place."""
    places = {"first": 0, "middle": columns // 2, "last": columns - 1}
    for name, value in (("nan", NAN), ("+inf", INF), ("-inf", -INF)):
        for place, index in places.items():
            row = draw(rng, columns, dtype)
            row[index] = value
            yield f"{name} {place}", row
    for name, (a, b) in {
        "all -inf": (-INF, -INF),
        "all +inf": (INF, INF),
        "all nan": (NAN, NAN),
        "both infinities": (INF, -INF),
        "nan and +inf": (NAN, INF),
        "nan and -inf": (NAN, -INF),
        "one finite": (-INF, 1.5),
        "constant": (2.5, 2.5),
        "zeros": (0.0, -0.0),
        "large": (1000.0, 999.0),
        "very low": (-30000.0, -30001.0),
    }.items():
        row = np.full(columns, a).astype(dtype_of(dtype))
        row[columns // 3] = b
        yield name, row


def nans(rng, shape, dtype="float32"):
    """NaN of both signs, quiet and signalling, with any payload."""
    dtype = dtype_of(dtype)
    word, mantissa = np.dtype(f"u{dtype.itemsize}"), ml_dtypes.finfo(dtype).nmant
    sign = rng.integers(0, 2, shape).astype(word) << (8 * dtype.itemsize - 1)
    exponent = (1 << (8 * dtype.itemsize - 1)) - (1 << mantissa)
    payload = rng.integers(1, 1 << mantissa, shape).astype(word)
    return (sign | exponent | payload).view(dtype)


def border_row(rng, n, k):
    """From 0 to 3, with ones on both sides of the k-th largest and of the k-th smallest."""
    row, places = np.ones(n), rng.permutation(n)
    few = min(k // 2, n // 3)
    row[places[:few]] = 1 + rng.integers(1, 3, few)
    row[places[n - few :]] = 0
    return row


def ranking_rows(rng, n, k, dtype="float32"):
    """(what, row): rows in which the order of the k best can go wrong."""
    dtype = dtype_of(dtype)
    if dtype.kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        row = rng.integers(low, high, n, dtype, endpoint=True)
        yield "random", row
        yield "ascending", np.sort(row)
        yield "descending", np.sort(row)[::-1]
        yield "extremes", rng.choice(np.array([low, low + 1, 0, 1, high - 1, high], dtype), n)
        yield "lowest", np.full(n, low, dtype)
        yield "highest", np.full(n, high, dtype)
        yield "at the border", border_row(rng, n, k).astype(dtype)
        return
    sorted_row = np.sort(draw(rng, n, "float64"))
    infinite = np.where(rng.random(n) < 0.3, rng.choice([INF, -INF], n), draw(rng, n, "float64"))
    for name, row in {
        "random": draw(rng, n, "float64"),
        "ascending": sorted_row,
        "descending": sorted_row[::-1],
        "constant": np.full(n, 2.5),
        "quantised": rng.integers(-3, 4, n) / 2,
        "at the border": border_row(rng, n, k),
        "at the border of negatives": -border_row(rng, n, k),
        "infinities": infinite,
        "zeros": rng.choice([0.0, -0.0, 1.0, -1.0], n, p=[0.48, 0.48, 0.02, 0.02]),
    }.items():
        yield name, row.astype(dtype)
    for name, numbers in {
        "nan": n - int(rng.integers(n // 2 + 1)),
        "fewer numbers than k": int(rng.integers(min(k, n + 1))) if k else 0,
        "no number": 0,
    }.items():
        row = nans(rng, n, dtype)
        places = rng.permutation(n)[:numbers]
        row[places] = rng.choice([INF, -INF, 0.0, -0.0, 1.5, 2.0], numbers).astype(dtype)
        yield name, row


def ranking_stack(rng, n, k, dtype="float32", special=False):
    """Rows of `ranking_rows` in random order, so that they meet other neighbours; of long ones 10.

    With `special` also those of `special_rows`, and ordinary ones.
    """
    rows = [row for _, row in ranking_rows(rng, n, k, dtype)]
    if special:
        rows += [*(row for _, row in special_rows(rng, n, dtype)), *draw(rng, (5, n), dtype)]
    return np.stack([rows[i] for i in rng.permutation(len(rows))[: max(10, 10000 // n)]])


def random_view(rng, dtype):
    """An array of random rank, shape and strides, negative and zero ones among them."""
    ndim = int(rng.integers(0, 6))
    sizes = rng.choice([0, 1, 2, 3, 5, 17, 40], ndim, p=[0.04, 0.16, 0.2, 0.2, 0.2, 0.15, 0.05])
    shape = [int(n) for n in sizes]
    while math.prod(shape) > 4000:
        shape[int(rng.integers(ndim))] = 1
    kinds = rng.choice(["whole", "step", "flip", "offset", "broadcast"], ndim)
    base, index = [], []
    for n, kind in zip(shape, kinds, strict=True):
        base.append({"step": 2 * n, "offset": n + 3, "broadcast": 1}.get(kind, n))
        index.append(
            {
                "step": slice(None, None, 2),
                "flip": slice(None, None, -1),
                "offset": slice(2, n + 2),
            }.get(kind, slice(None))
        )
    order = rng.permutation(ndim)
    x = draw(rng, [base[i] for i in order], dtype).transpose(np.argsort(order))
    return np.broadcast_to(x[tuple(index)], shape)


def random_axis(rng, ndim):
    """An int of either sign, a tuple or None."""
    if ndim == 0:
        return [-1, 0, None][int(rng.integers(3))]
    kind = rng.choice(["int", "tuple", "none"], p=[0.6, 0.3, 0.1])
    if kind == "none":
        return None
    if kind == "int":
        return int(rng.integers(-ndim, ndim))
    count = int(rng.integers(1, ndim + 1))
    axes = rng.choice(ndim, count, replace=False) - ndim * rng.integers(0, 2, count)
    return tuple(int(a) for a in axes)


def untouched(backend, count, dtype):
    """A 1-D array that takes address space, but on the host no memory until it is touched."""
    if backend.xp is not np:
        # Not of the pool: what stays, as a workspace does, might be cut out of it when it is freed.
        memory = backend.xp.cuda.Memory(count * np.dtype(dtype).itemsize)
        memory = backend.xp.cuda.MemoryPointer(memory, 0)
        memory.memset_async(0, memory.mem.size)
        return backend.xp.ndarray(count, dtype, memory)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return np.frombuffer(mmap.mmap(-1, count * np.dtype(dtype).itemsize, flags=flags), dtype)
