"""The most probable tokens of a vocabulary that lies in shards on several processes, tokens that
are drawn from it, and losses: each process sends a few numbers a row of its own, never its logits,
and all of them merge the same parts.

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


def merged(state, comm):
    """The state of the whole vocabulary, from that of the shard of each process."""
    # Pickled, which any MPI can send; with one that knows of GPUs, comm.Allgather of each array.
    # Merged in the order of ranks: the same bits on every rank.
    return functools.reduce(cuattn.merge, comm.allgather(state))


# The same logits everywhere, of which each rank uses its own columns. Shards are of any length.
comm = MPI.COMM_WORLD
ROWS, TOKENS, K, SEED = 8, 50257, 20, 3
rng = xp.random.default_rng(0)
logits = xp.round(32 * rng.standard_normal((ROWS, TOKENS), xp.float32)) / 32  # many are equal
labels = rng.integers(0, TOKENS, ROWS)
first, end = (TOKENS * rank // comm.size for rank in (comm.rank, comm.rank + 1))
shard = logits[:, first:end]

best = merged(cuattn.softmax_topk_state(shard, K, index_offset=first), comm)
values, indices = xp.exp(best.values - best.lse[:, None]), best.indices
drawn = merged(cuattn.sample_state(shard, seed=SEED, index_offset=first), comm).indices
loss = merged(cuattn.logits_state(shard, labels, index_offset=first), comm).cross_entropy

p = xp.exp(logits.astype(xp.float64))
p /= p.sum(axis=1, keepdims=True)
order = xp.argsort(-logits, axis=1, kind="stable")[:, :K]  # of equal logits the first token first
assert (indices == order).all()
assert xp.allclose(values, xp.take_along_axis(p, order, axis=1), rtol=1e-5, atol=0)
assert (drawn == cuattn.sample(logits, seed=SEED)).all()  # as of one process with all tokens
assert xp.allclose(loss, -xp.log(p[xp.arange(ROWS), labels]), rtol=1e-5, atol=0)
print(f"rank {comm.rank} of {comm.size}: tokens {indices[0, :3].tolist()} are the best of row 0")
