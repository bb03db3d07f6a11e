"""What the tests of attention over a KV cache share: a `Problem` whose keys lie in a cache.

Its answer is that of `reference.attention` on the keys side by side. Everything else in the cache
is NaN, and every entry of a page table that no key needs is garbage.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from attention_cases import NAN, Problem, put, put_options
from tolerance import lse_dtype

import cuattn

GARBAGE = [-1, -(2**31), -123456, 2147480000, 2**31 - 1]
EIGHT_BITS = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "int8": np.dtype(np.int8)}
LARGEST = {"e4m3": 448, "int8": 127}


def swapped(a, layout):
    """A canonical array in a layout, C-contiguous."""
    return np.ascontiguousarray(a.swapaxes(1, 2)) if layout == "BSHD" else a


def with_gaps(a):
    """`a` with every second column of an array."""
    return np.repeat(a, 2, axis=-1)[..., ::2]


class Cached:
    """Random q and a cache, with options, which are those of `cuattn.attention_kvcache`.

    `lens`: keys of each sequence, the `new` last of which come with the call. `missing`: pages, as
    (sequence, number), that are not there. `tree`: the mask of the last keys. `value_dim`: values
    are columns of the keys.
    """

    def __init__(self, rng, op="float16", *, lens, rows=1, heads=(4, 2), dims=(64, 64),
                 page_size=None, capacity=None, new=0, tree=None, missing=(), layout="BHSD",
                 pool="apart", table_dtype=np.int32, spread=1.0, value_dim=None,
                 **options):  # fmt: skip
        self.rng, self.lens, self.layout = rng, np.asarray(lens), layout
        batch, size = len(lens), page_size
        capacity = max(1, *lens) if capacity is None else capacity
        if size is not None:
            capacity = -(-capacity // size) * size
        self.size, self.capacity, self.missing = size, capacity, missing
        self.counts = np.full(batch, new)
        if "q_lens" in options and new:
            self.counts = np.minimum(options["q_lens"], new)
        mask = self._mask(batch, heads[0], rows, tree)
        how = dict(options, kv_lens=self.lens) | ({} if mask is None else {"mask": mask})
        shape = {"batch": batch, "heads": heads, "lengths": (rows, capacity), "dims": dims}
        self.problem = Problem(rng, op, **shape, spread=spread, **how)
        self.options = dict(options, kv_lens=(self.lens - self.counts).astype(table_dtype))
        if "precision" in self.problem.options:
            self.options["precision"] = self.problem.options["precision"]
        if tree is not None:
            self.options["mask"] = tree
        self.place(pool, table_dtype, new)
        if value_dim is not None:
            problem = self.problem
            problem.v = problem.k[..., :value_dim]
            problem.clean = *problem.clean[:2], problem.clean[1][..., :value_dim]
            self.options = {n: v for n, v in self.options.items() if n != "v_new"}
            self.options["value_dim"] = value_dim
            self.caches, self.after = (self.caches[0], None), (self.after[0], None)

    def _mask(self, batch, heads, rows, tree):
        """The mask of all keys, (B, H, S_q, capacity); None: there is none."""
        if tree is None and not self.missing:
            return None
        mask = np.ones((batch, heads, rows, self.capacity), bool)
        if tree is not None:
            width = tree.shape[-1]
            tree = np.broadcast_to(tree, (batch, heads, rows, width))
            for b, n in enumerate(self.lens):
                last = min(int(n), width)
                mask[b, ..., n - last : n] = tree[b, ..., width - last :]
        for b, page in self.missing:
            mask[b, ..., page * self.size : (page + 1) * self.size] = False
        return mask

    def place(self, pool, table_dtype, new):
        """Lay the keys of the problem out in a cache."""
        self.q = swapped(self.problem.q, self.layout)
        given = self.problem.k, self.problem.v
        if new:
            self.new = tuple(self._new(a, new) for a in given)
            self.options |= dict(zip(("k_new", "v_new"), self.new, strict=True))
        kinds = [a.copy() for a in given]
        for a in kinds:
            for b, n in enumerate(self.lens):
                a[b, :, n:] = NAN  # beyond its keys
        full = self._pools(kinds, table_dtype)
        for a in kinds:
            for b, (n, count) in enumerate(zip(self.lens, self.counts, strict=True)):
                a[b, :, n - count : n] = NAN  # not yet there
        empty = self._pools(kinds, table_dtype)
        if pool == "interleaved":  # (P, 2, ...)
            both = np.stack(empty, axis=1)
            empty = both[:, 0], both[:, 1]
        elif pool == "flipped":
            empty = tuple(np.ascontiguousarray(a[::-1, :, ::-1])[::-1, :, ::-1] for a in empty)
        elif pool == "columns":  # with gaps between them, as those of q and of new keys
            empty, self.q = tuple(map(with_gaps, empty)), with_gaps(self.q)
            self.options |= {n: with_gaps(self.options[n]) for n in ("k_new", "v_new") if new}
        self.caches, self.after = empty, full

    def _new(self, a, new):
        """The last keys of each sequence as they come with the call."""
        found = np.full((len(a), a.shape[1], new, a.shape[3]), 7, a.dtype)  # which is no poison
        for b, (n, count) in enumerate(zip(self.lens, self.counts, strict=True)):
            found[b, :, :count] = a[b, :, n - count : n]
        return swapped(found, self.layout)

    def _pools(self, arrays, table_dtype):
        """A cache of each array; the page table is drawn once."""
        if self.size is None:
            return tuple(swapped(a, self.layout).copy() for a in arrays)
        batch, columns = len(self.lens), self.capacity // self.size
        if "page_table" not in self.options:
            self.pages = self.rng.permutation(batch * columns + 3)[: batch * columns]
            table = self.rng.choice(GARBAGE, (batch, columns + 1)).astype(table_dtype)
            for b, n in enumerate(self.lens):
                used = -(-int(n) // self.size)
                table[b, :used] = self.pages.reshape(batch, columns)[b, :used]
            for b, page in self.missing:
                outside = [-1, batch * columns + 3, -(2**31)]
                outside += [2**40, -(2**40)] if table.dtype == np.int64 else []
                table[b, page] = self.rng.choice(outside)
            self.options["page_table"] = table
        found = []
        for a in arrays:
            pool = np.full((batch * columns + 3, a.shape[1], self.size, a.shape[3]), NAN, a.dtype)
            split = a.reshape(batch, a.shape[1], columns, self.size, a.shape[3])
            pool[self.pages] = split.swapaxes(1, 2).reshape(-1, *pool.shape[1:])
            for b, page in self.missing:
                pool[self.pages.reshape(batch, columns)[b, page]] = NAN
            found.append(swapped(pool, self.layout))
        return tuple(found)

    def run(self, backend, **more):
        """out and lse on the host, canonical; the cache must be as it was, but for new keys."""
        caches = [put(backend, a) for a in self.caches]
        options = put_options(backend, {**self.options, **more})
        got = cuattn.attention_kvcache(
            put(backend, self.q), *caches, layout=self.layout, return_lse=True, **options
        )
        assert all(isinstance(one, backend.xp.ndarray) for one in got)
        for cache, after in zip(caches, self.after, strict=True):
            assert after is None or backend.asnumpy(cache).tobytes() == after.tobytes()
        out, lse = (backend.asnumpy(one) for one in got)
        assert out.dtype == self.q.dtype and lse.dtype == lse_dtype(out.dtype)
        return (out.swapaxes(1, 2) if self.layout == "BSHD" else out), lse


def verify(backend, rng, op="float16", **how):
    """Run one and compare."""
    cached = Cached(rng, op, **how)
    out, lse = cached.run(backend)
    cached.problem.check(out, lse)
    return cached, out, lse
