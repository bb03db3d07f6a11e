"""From softmax to attention
=========================

Five algorithms, each in a few lines of NumPy, each of which removes what the one before it costs.
The kernels of cuattn are the last three. Everything on this page is computed when the page is made:
every function is checked against cuattn, and every picture is drawn from what was counted or
measured.
"""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import bench
import cuattn

plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white"}
OURS, OTHERS, FAINT = "#1a5fd0", "#d9822b", "#8c96a3"
rng = np.random.default_rng(0)
x = rng.standard_normal((8, 4096), np.float32)

# %%
# Naive softmax
# -------------
#
# The softmax of a row of numbers x is ::
#
#     exp(x) / Σ exp(x)
#
# and as it stands there it is a function of two lines.


def naive_softmax(x):
    e = np.exp(x)
    return e / e.sum(axis=-1, keepdims=True)


np.testing.assert_allclose(naive_softmax(x), cuattn.softmax(x), rtol=1e-5)

# %%
# In memory each x is read to be added up, then read again to be divided, and the result is
# written: 3 accesses per element. But exp(89) is beyond the range of float32. There the sum is
# infinite, and the result is inf / inf, not a number. In float16 that begins at 12.
#
# Safe softmax
# ------------
#
# The softmax does not change when the same number is subtracted from all x of a row. With their
# maximum m, no exponential is more than 1, and the sum l = Σ exp(x − m) is at least 1.


def safe_softmax(x):
    m = x.max(axis=-1, keepdims=True)
    e = np.exp(x - m)
    return e / e.sum(axis=-1, keepdims=True)


np.testing.assert_allclose(safe_softmax(x), cuattn.softmax(x), rtol=1e-5)

# %%
# How far both are from the same formula in float64, for rows whose largest element grows:

largest = np.geomspace(1, 10_000, 40)
rows = rng.uniform(-1, 1, (40, 30, 500))  # 30 rows for each of 40 sizes
rows *= largest[:, None, None] / rows.max(axis=-1, keepdims=True)
rows = rows.astype(np.float32)
exact = cuattn.reference.softmax(rows)  # float64


def error(p):
    """The largest difference for each size; NaN where a probability is not a number."""
    return abs(p - exact).max(axis=(1, 2))


with np.errstate(over="ignore", invalid="ignore"):
    errors = {
        "naive softmax": error(naive_softmax(rows)),
        "safe softmax": error(safe_softmax(rows)),
    }
overflows = np.isnan(errors["naive softmax"])
assert overflows.tolist() == (rows.max(axis=(1, 2)) > 88.7).tolist()
assert errors["safe softmax"].max() < 1e-6

fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
for (name, values), color, marker in zip(errors.items(), (OTHERS, OURS), "so", strict=True):
    ax.loglog(largest, values, marker, color=color, label=name, markersize=4)
ax.axvspan(largest[overflows][0], largest[-1], color=OTHERS, alpha=0.12, lw=0)
ax.text(120, 1e-9, "naive softmax is NaN", color=OTHERS)
ax.set(
    title="Error in float32 against float64",
    xlabel="largest element of a row",
    ylabel="largest error of a probability",
)
ax.legend(loc="upper left")
plt.show()

# %%
# It has a price: a pass over the row for the maximum, so 4 accesses per element.
#
# Online softmax
# --------------
#
# Milakov and Gimelshein (`arXiv:1805.02867 <https://arxiv.org/abs/1805.02867>`_) take maximum and
# sum in one pass. When a larger maximum comes, the sum so far is corrected by exp(m_old − m_new).
# Here a block of elements comes at a time.


def with_block(m, l, block):
    """Maximum and sum with one more block; what they were before counts `rescale` times."""
    m_new = np.maximum(m, block.max(axis=-1, keepdims=True))
    rescale = np.exp(m - m_new)
    return m_new, l * rescale + np.exp(block - m_new).sum(axis=-1, keepdims=True), rescale


def blocks(n, size):
    return (slice(start, start + size) for start in range(0, n, size))


def empty_state(x):
    return np.full((len(x), 1), -np.inf, x.dtype), np.zeros((len(x), 1), x.dtype)


def online_softmax(x, size=128):
    m, l = empty_state(x)
    for columns in blocks(x.shape[1], size):
        m, l, _ = with_block(m, l, x[:, columns])
    return np.exp(x - m) / l


np.testing.assert_allclose(online_softmax(x), cuattn.softmax(x), rtol=1e-5)

# %%
# 3 accesses per element again, and safe. A kernel that keeps the row in registers in between, as
# that of `cuattn.softmax` does, reads it once: 2 accesses, the fewest possible.
#
# The pair (m, l) is all that has to be known of a part of a row, and two pairs make one. So the
# parts may lie on different thread blocks, GPUs or machines:

left, right = x[:, :1000], x[:, 1000:]
merged = cuattn.merge(cuattn.softmax_state(left), cuattn.softmax_state(right))
np.testing.assert_allclose(cuattn.softmax(left, state=merged), safe_softmax(x)[:, :1000], rtol=1e-5)

# %%
# Fused with top-k
# ----------------
#
# Who samples a token from a language model needs the k most probable of some 100 000. These can be
# kept in the same pass: nothing is read twice, and nothing is written but k probabilities per row,
# and their places. That is the fourth algorithm of the same paper, and `cuattn.softmax_topk`.


def online_softmax_topk(x, k, size=128):
    m, l = empty_state(x)
    values, indices = x[:, :0], np.zeros((len(x), 0), np.int64)
    for columns in blocks(x.shape[1], size):
        block = x[:, columns]
        m, l, _ = with_block(m, l, block)
        here = np.broadcast_to(columns.start + np.arange(block.shape[1]), block.shape)
        values, indices = np.hstack([values, block]), np.hstack([indices, here])
        best = np.argsort(-values, axis=-1, kind="stable")[:, :k]  # of equal ones the first
        values, indices = (np.take_along_axis(a, best, axis=-1) for a in (values, indices))
    return np.exp(values - m) / l, indices


values, indices = online_softmax_topk(x, 5)
expected = cuattn.softmax_topk(x, 5)
np.testing.assert_array_equal(indices, expected.indices)
np.testing.assert_allclose(values, expected.values, rtol=1e-5)

# %%
# The same algorithms as CUDA kernels, with their memory accesses counted. The numbers are those
# of the table in `bench/README.md`, which the emulator counts; the last one of each group is
# cuattn's.

table = (Path(bench.__file__).parent / "README.md").read_text(encoding="utf-8")
number = r" ([\d.]+) \|"
counted = re.findall(rf"^\| ([^|]+) \|{number}{number}{number}{number}", table, re.MULTILINE)
counted = [(name.strip("`"), float(reads), float(writes)) for name, reads, writes, *_ in counted]
assert [round(reads + writes) for _, reads, writes in counted] == [3, 4, 3, 2, 5, 1, 1]

names, reads, writes = zip(*counted, strict=True)
fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
colors = [OURS if name.startswith("cuattn") else FAINT for name in names]
ax.barh(names, reads, color=colors)
ax.barh(names, writes, left=reads, color=colors, alpha=0.5)
for name, total in zip(names, np.add(reads, writes), strict=True):
    ax.text(total + 0.05, name, f"{total:.0f}", va="center")
ax.invert_yaxis()
ax.set(title="Memory accesses: reads, and writes (lighter)", xlabel="accesses per element of x")
plt.show()

# %%
# Attention, naive
# ----------------
#
# Attention is a softmax between two matrix products: softmax(Q Kᵀ / √D) V. With N queries and N
# keys the matrix of scores has N² elements, which the steps below write and read again and again.


def naive_attention(q, k, v):
    scores = q @ k.T / np.sqrt(q.shape[1], dtype=q.dtype)
    return safe_softmax(scores) @ v


# %%
# Attention, tiled
# ----------------
#
# FlashAttention (`arXiv:2205.14135 <https://arxiv.org/abs/2205.14135>`_) applies the online
# softmax to blocks of scores. A block of queries stays, keys and values pass by. What is added up
# is not only the sum of the exponentials but also their products with V, and both are corrected
# when the maximum grows. The scores of a block never leave fast memory. As in FlashAttention-2
# (`arXiv:2307.08691 <https://arxiv.org/abs/2307.08691>`_) the division by l comes once, at the
# end, and the outer loop is over blocks of queries, which do not depend on each other: on a GPU
# each has a thread block of its own.


def tiled_attention(q, k, v, size=128):
    out = np.empty((len(q), v.shape[1]), q.dtype)
    for rows in blocks(len(q), size):
        q_rows = q[rows] / np.sqrt(q.shape[1], dtype=q.dtype)
        m, l = empty_state(q_rows)
        acc = np.zeros_like(out[rows])
        for columns in blocks(len(k), size):
            scores = q_rows @ k[columns].T
            m, l, rescale = with_block(m, l, scores)
            acc = acc * rescale + np.exp(scores - m) @ v[columns]
        out[rows] = acc / l
    return out


q, k, v = rng.standard_normal((3, 500, 64), np.float32)
for function in (naive_attention, tiled_attention, cuattn.attention):
    expected = cuattn.reference.attention(q, k, v)  # float64
    np.testing.assert_allclose(function(q, k, v), expected, rtol=0, atol=1e-6)

# %%
# The memory that the two functions above take besides q, k and v, measured by ``tracemalloc``,
# which sees every array of NumPy:

lengths = [128, 256, 512, 1024, 2048, 4096]


def peak(function, n):
    """Bytes that a call has allocated at most, its result included."""
    arrays = rng.standard_normal((3, n, 64), np.float32)
    tracemalloc.start()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    function(*arrays)
    return tracemalloc.get_traced_memory()[1] - before


fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
for function, color, marker in ((naive_attention, OTHERS, "s"), (tiled_attention, OURS, "o")):
    mib = np.array([peak(function, n) for n in lengths]) / 2**20
    label = function.__name__.replace("_", " ")
    ax.loglog(lengths, mib, marker + "-", color=color, label=label, base=2)
    growth = mib[-1] / mib[-2]
    assert growth > 3.5 if function is naive_attention else growth < 2.2, growth
tracemalloc.stop()
ax.set(
    title="Measured memory of one head, D = 64, in float32",
    xlabel="length of the sequence",
    ylabel="peak, MiB",
    xticks=lengths,
    xticklabels=lengths,
)
ax.yaxis.set_major_formatter("{x:g}")
ax.legend()
plt.show()

# %%
# One grows with N², the other with N: of it the result is the only part that grows at all. What
# the kernels of attention read and write is counted by ``python -m bench.counted.io_complexity``.
#
# Where to go on: `cuattn.softmax`, `cuattn.softmax_topk` and `cuattn.attention` say what the
# functions take; `cuda_src/README.md` has the kernels, which do the above in tiles of registers
# and shared memory; and `cuattn.merge_attention` puts results over parts of the keys together, as
# `cuattn.merge` does for the states of rows.
