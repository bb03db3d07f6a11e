"""The most probable tokens of a vocabulary that lies in shards on several processes: each sends the
k best of its own and a sum, never its logits, and all of them merge the same parts.

    pip install cuattn mpi4py mpich
    mpiexec -n 4 python bench/examples/sharded_vocabulary_mpi.py
"""

from __future__ import annotations

import functools

from mpi4py import MPI

import cuattn

try:
    import cupy as xp

    xp.cuda.Device(MPI.COMM_WORLD.rank % xp.cuda.runtime.getDeviceCount()).use()
except Exception:  # no CuPy, or no GPU
    import numpy as xp


def softmax_topk(shard, k, first, comm):
    """Probabilities and tokens of the k best of all shards; this one begins at token `first`."""
    state = cuattn.softmax_topk_state(shard, k, index_offset=first)
    # Pickled, which any MPI can send; with one that knows of GPUs, comm.Allgather of each array.
    # Merged in the order of ranks: the same bits on every rank.
    state = functools.reduce(cuattn.merge, comm.allgather(state))
    return xp.exp(state.values - state.lse[:, None]), state.indices


def cross_entropy(shard, labels, first, comm):
    """-log softmax of the whole vocabulary at the labels."""
    lse = functools.reduce(cuattn.merge, comm.allgather(cuattn.softmax_state(shard))).lse
    mine = (labels >= first) & (labels < first + shard.shape[1])  # labels that lie in this shard
    logits = shard[xp.arange(len(labels)), xp.where(mine, labels - first, 0)]
    return lse - sum(comm.allgather(xp.where(mine, logits, 0)))


# The same logits everywhere, of which each rank uses its own columns. Shards are of any length.
comm = MPI.COMM_WORLD
ROWS, TOKENS, K = 8, 50257, 20
rng = xp.random.default_rng(0)
logits = xp.round(32 * rng.standard_normal((ROWS, TOKENS), xp.float32)) / 32  # many are equal
labels = rng.integers(0, TOKENS, ROWS)
first, end = (TOKENS * rank // comm.size for rank in (comm.rank, comm.rank + 1))
values, indices = softmax_topk(logits[:, first:end], K, first, comm)
loss = cross_entropy(logits[:, first:end], labels, first, comm)

p = xp.exp(logits.astype(xp.float64))
p /= p.sum(axis=1, keepdims=True)
order = xp.argsort(-logits, axis=1, kind="stable")[:, :K]  # of equal logits the first token first
assert (indices == order).all()
assert xp.allclose(values, xp.take_along_axis(p, order, axis=1), rtol=1e-5, atol=0)
assert xp.allclose(loss, -xp.log(p[xp.arange(ROWS), labels]), rtol=1e-5, atol=0)
print(f"rank {comm.rank} of {comm.size}: tokens {indices[0, :3].tolist()} are the best of row 0")
