"""Softmax and the best elements of rows that are larger than memory: in chunks from one file, into
another. Here a row has 32 chunks, of which only a few are in memory at a time.

    pip install "cuattn[dask]"
    python bench/examples/dask_out_of_core.py
"""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import dask.array as da
import numpy as np

import cuattn.dask

try:
    import cupy as xp

    xp.cuda.Device().use()
except Exception:  # no CuPy, or no GPU
    xp = np

ROWS, COLUMNS, CHUNK, K = 4, 2**22, 2**17, 5
to_host = np.asarray if xp is np else xp.asnumpy
folder = tempfile.TemporaryDirectory()


def file(name, mode):
    return np.memmap(Path(folder.name) / name, np.float32, mode, shape=(ROWS, COLUMNS))


def load(block_info):
    """Reads a chunk of x."""
    start, end = block_info[None]["array-location"][1]
    return xp.array(file("logits", "r")[:, start:end])


logits = file("logits", "w+")
logits[:] = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), np.float32).round(4)

tracemalloc.start()
x = da.map_blocks(load, chunks=(ROWS, (CHUNK,) * (COLUMNS // CHUNK)), dtype=np.float32)
# keep=False: chunks are read again once all is known of their rows, instead of being kept.
y = cuattn.dask.softmax(x, keep=False).map_blocks(to_host, dtype=np.float32)
da.store(y, file("probabilities", "w+"), num_workers=2)
best = da.compute(*cuattn.dask.softmax_topk(x, K), num_workers=2)
peak = tracemalloc.get_traced_memory()[1]  # of arrays that are not files
assert peak < logits.nbytes / 2, peak
p = np.exp(logits.astype(np.float64))
p /= p.sum(axis=1, keepdims=True)
assert np.allclose(file("probabilities", "r"), p, rtol=1e-5, atol=0)
order = np.argsort(-logits, axis=1, kind="stable")[:, :K]  # of equal logits the first
values, indices = map(to_host, best)
assert (indices == order).all()
assert np.allclose(values, np.take_along_axis(p, order, axis=1), rtol=1e-5, atol=0)
print(f"{logits.nbytes / 2**20:.0f} MiB of logits, at most {peak / 2**20:.0f} MiB in memory")
