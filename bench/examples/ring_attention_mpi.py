"""Causal attention over a sequence that is split across processes: queries stay, keys and values go
round. Each process has an early and a late chunk (zig-zag), so that all have the same work.

    pip install cuattn mpi4py mpich
    mpiexec -n 4 python bench/examples/ring_attention_mpi.py
"""

from __future__ import annotations

from mpi4py import MPI

import cuattn

try:
    import cupy as xp

    xp.cuda.Device(MPI.COMM_WORLD.rank % xp.cuda.runtime.getDeviceCount()).use()
except Exception:  # no CuPy, or no GPU
    import numpy as xp

TO_MERGE = {"dtype": "float32", "return_lse": True}  # rounding parts to 16 bits would add up


def zigzag(rank, size):
    """The two chunks of a rank, of 2 * size."""
    return rank, 2 * size - 1 - rank


def ring_attention(q, k, v, comm):
    """Causal attention of this rank's chunks of q, (2, H, S, D), over the k and v of all ranks."""
    rank, size = comm.rank, comm.size
    parts, products = [None, None], 0  # of both chunks of queries, over the keys that came by
    for step in range(size):
        owner = (rank - step) % size  # of the keys that are here now
        for a, i in enumerate(zigzag(rank, size)):
            for b, j in enumerate(zigzag(owner, size)):
                if j <= i:  # else no query of chunk i sees a key of chunk j
                    causal = {"is_causal": True, "q_offset": (i - j) * q.shape[2]}
                    part = cuattn.attention(q[a], k[b], v[b], **causal, **TO_MERGE)
                    parts[a] = cuattn.merge_attention(*parts[a], *part) if parts[a] else part
                    products += 1
        # Pickled, which any MPI can send.
        k, v = comm.sendrecv((k, v), (rank + 1) % size, source=(rank - 1) % size)
    return xp.stack([out for out, _ in parts]), products


comm = MPI.COMM_WORLD
rng = xp.random.default_rng(0)  # the same arrays everywhere, of which each rank takes its chunks
q, k, v = (
    rng.standard_normal((2 * comm.size, heads, 64, 32)).astype(xp.float16) for heads in (4, 2, 2)
)
mine = list(zigzag(comm.rank, comm.size))
out, products = ring_attention(q[mine], k[mine], v[mine], comm)

whole = (xp.concatenate(list(a), axis=1).astype(xp.float64) for a in (q, k, v))
expected = xp.split(cuattn.attention(*whole, is_causal=True), 2 * comm.size, axis=1)
assert xp.allclose(out, xp.stack([expected[i] for i in mine]), rtol=0, atol=1e-6)
assert products == 2 * comm.size + 1  # on every rank: so many, of which two see half of the keys
print(f"rank {comm.rank} of {comm.size}: chunks {mine}, {products} products")
