"""attention_kvcache on every backend: against float64, no worse than twice the plain
expression. Whatever no query sees is NaN or garbage (`kvcache_cases.Cached`).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from attention_cases import INF, NAN, OPS, put, put_options
from cases import FAR, Guarded, untouched
from kvcache_cases import EIGHT_BITS, Cached, swapped, verify
from tolerance import TABLE, lse_dtype

import cuattn

PAGES = [None, 1, 5, 16, 24, 64]
LENS = {
    "none": [0, 0, 0],
    "some without": [0, 37, 0, 1],
    "last without": [40, 0],
    "one": [1],
    "tiles": [15, 16, 17, 31, 32, 33, 47, 49],
    "pages": [23, 24, 25, 63, 64, 65],
    "alike": [20, 33, 20, 20, 33, 7, 20],
}


def bits(results):
    return [np.ascontiguousarray(one).tobytes() for one in results]


# ---- lengths, pages and dtypes ------------------------------------------------------------------


@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("lens", LENS.values(), ids=LENS.keys())
def test_lengths(backend, rng, lens, page_size):
    verify(backend, rng, lens=lens, page_size=page_size)
    verify(backend, rng, lens=lens, page_size=page_size, rows=3, is_causal=True)


@pytest.mark.parametrize("batch", [1, 31, 32, 33, 100, 1000])
def test_many_sequences(backend, rng, batch):
    lens = rng.integers(0, 9, batch)
    lens[rng.integers(batch)] = 600 if batch < 1000 else 60
    verify(backend, rng, lens=lens, page_size=16, heads=(2, 1))


@pytest.mark.parametrize("page_size", [None, 16, 1000])
@pytest.mark.parametrize("op", OPS)
def test_dtypes(backend, rng, op, page_size):
    verify(backend, rng, op, lens=[70, 3, 0, 300], page_size=page_size, rows=2, is_causal=True)


@pytest.mark.parametrize(
    "dims",
    [(1, 1), (40, 40), (59, 59), (96, 96), (128, 128), (192, 128), (256, 256), (64, 200)],
    ids=str,
)
def test_head_dims(backend, rng, dims):
    verify(backend, rng, "float64", lens=[33, 90], dims=dims)
    verify(backend, rng, lens=[33, 90], page_size=16, dims=dims, new=2, rows=2)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (8, 1), (6, 2), (32, 2)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_groups_of_heads(backend, rng, heads, rows):
    verify(backend, rng, lens=[20, 50], page_size=8, heads=heads, rows=rows, is_causal=True)


@pytest.mark.parametrize("rows", [17, 64, 300])
def test_many_queries(backend, rng, rows):
    """A chunk of a prompt; also more queries than keys."""
    how = {"lens": [400, 299, 10], "page_size": 16, "rows": rows, "heads": (3, 1)}
    verify(backend, rng, **how, window=(240, 0))
    if rows < 300:
        verify(backend, rng, **how, tree=rng.random((rows, 20)) < 0.1, is_causal=True)


def test_no_lengths(backend, rng):
    """Every key that there is room for."""
    for page_size in (None, 16):
        cached = Cached(rng, lens=[48, 48], page_size=page_size)
        del cached.options["kv_lens"]
        if page_size:
            cached.options["page_table"] = cached.options["page_table"][:, :3]
        cached.problem.check(*cached.run(backend))


# ---- where keys lie ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("pool", ["apart", "interleaved", "flipped", "columns"])
@pytest.mark.parametrize("page_size", [None, 5, 16])
def test_layouts(backend, rng, layout, pool, page_size):
    how = {"lens": [19, 40, 3], "page_size": page_size, "layout": layout, "pool": pool}
    verify(backend, rng, **how, rows=2, is_causal=True)
    verify(backend, rng, **how, rows=3, new=2)


def test_tables(backend, rng):
    """int64, strides of any sign, and more columns than are needed."""
    cached = Cached(rng, lens=[30, 77, 0], page_size=8, table_dtype=np.int64)
    want = cached.run(backend)
    cached.problem.check(*want)
    table = cached.options["page_table"]
    spread = np.full((7, 3 * table.shape[1]), 2**62)
    spread[1:6:2, ::3] = table
    for other in (
        np.asfortranarray(table),
        np.ascontiguousarray(table[::-1, ::-1])[::-1, ::-1],
        spread[1:6:2, ::3],
    ):
        assert bits(cached.run(backend, page_table=other)) == bits(want)
    lens = np.repeat(cached.options["kv_lens"], 2)[::2]
    assert bits(cached.run(backend, kv_lens=lens)) == bits(want)


def moved(a):
    """One element off the boundaries that new memory has."""
    memory = np.zeros(a.size + 1, a.dtype)
    memory[1:] = a.reshape(-1)
    return memory[1:].reshape(a.shape)


def spread(a):
    """Rows that are no whole chunks apart."""
    memory = np.zeros((*a.shape[:-1], a.shape[-1] + 1), a.dtype)
    memory[..., :-1] = a
    return memory[..., :-1]


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k_new", "v_new", "out"])
@pytest.mark.parametrize("place", [moved, spread])
def test_alignment(backend, rng, name, place):
    """Of each array, beside others that are aligned."""
    for op in ("float16", "float32"):
        cached = Cached(rng, op, lens=[20, 33], page_size=16, rows=2, new=2)
        k, v = cached.caches
        more = {}
        if name == "q":
            cached.q = place(cached.q)
        elif name == "out":
            lse = np.empty(cached.q.shape[:3], "f4")
            more["out"] = put(backend, place(np.empty_like(cached.q))), put(backend, lse)
        elif name[2:] == "new":
            cached.options[name] = place(cached.options[name])
        else:
            cached.caches = (place(k), v) if name == "k_cache" else (k, place(v))
        cached.problem.check(*cached.run(backend, **more))


def test_shared_pages(backend, rng):
    """The pages of a prefix belong to every sequence."""
    cached = Cached(rng, lens=[50, 41, 32], page_size=8)
    for a in (*cached.problem.clean[1:], cached.problem.k, cached.problem.v):
        a[1:, :, :32] = a[:1, :, :32]
    cached.options.pop("page_table")
    cached.place("apart", np.int32, 0)
    cached.options["page_table"][1:, :4] = cached.options["page_table"][0, :4]
    cached.problem.check(*cached.run(backend))


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_missing_pages(backend, rng, page_size):
    """Their keys do not exist; a sequence may have none at all."""
    missing = [(0, 1), (2, 0), (2, 1)] + [(1, i) for i in range(-(-30 // page_size))]
    how = {"lens": [40, 30, 33], "page_size": page_size, "missing": missing}
    verify(backend, rng, **how, table_dtype=np.int64)
    _, out, lse = verify(backend, rng, **how, rows=2, is_causal=True)
    assert not out[1].any() and (lse[1] == -INF).all()
    verify(backend, rng, **how, alibi_slopes=np.linspace(0.1, 1, 4).astype("f4"), window=(20, 3))
    verify(backend, rng, **how, tree=rng.random((1, 9)) < 0.6)


def test_no_pages(backend, rng):
    q = backend.asarray(rng.standard_normal((2, 2, 1, 8)).astype("f4"))
    sinks = backend.asarray(np.ones(2, "f4"))
    for pages, columns, size in ((0, 3, 4), (3, 0, 4), (3, 2, 0)):
        cache = backend.asarray(np.full((pages, 1, size, 8), NAN, "f4"))
        table = backend.asarray(np.full((2, columns), 7))
        for more, want in (({}, -INF), ({"sinks": sinks}, 1)):
            how = {"page_table": table, "return_lse": True, **more}
            out, lse = cuattn.attention_kvcache(q, cache, cache, **how)
            assert not backend.asnumpy(out).any() and (backend.asnumpy(lse) == want).all()


def test_offsets_of_more_than_32_bits(backend, rng):
    """Between two pages."""
    x = backend.asarray(rng.standard_normal((2, 1, 2, 8)).astype("f2"))
    q = backend.asarray(rng.standard_normal((2, 1, 1, 8)).astype("f2"))
    far = backend.xp.lib.stride_tricks.as_strided(
        untouched(backend, FAR + 64, np.float16), x.shape, (2 * FAR, 32, 16, 2)
    )
    far[...] = x
    table, lens = (backend.asarray(np.array(a)) for a in ([[1], [0]], [2, 1]))
    got, want = (
        cuattn.attention_kvcache(q, cache, cache, kv_lens=lens, page_table=table)
        for cache in (far, x)
    )
    assert bits([backend.asnumpy(got)]) == bits([backend.asnumpy(want)])


def test_three_dimensions(backend, rng):
    for layout in ("BHSD", "BSHD"):
        cached = Cached(rng, lens=[30], rows=3, capacity=40, new=2, layout=layout)
        cached.options["kv_lens"] = cached.options["kv_lens"].reshape(())
        want_q, want = cached.problem.q, cached.after
        q, k, v, k_new, v_new = (
            put(backend, a[0]) for a in (cached.q, *cached.caches, *cached.new)
        )
        lens = put(backend, cached.options["kv_lens"])
        out, lse = cuattn.attention_kvcache(
            q, k, v, kv_lens=lens, k_new=k_new, v_new=v_new, layout=layout, return_lse=True
        )
        out, lse = backend.asnumpy(out), backend.asnumpy(lse)
        assert backend.asnumpy(k).tobytes() == want[0].tobytes() and want_q.ndim == 4
        cached.problem.check(swapped(out[None], layout)[0], lse, 3)


# ---- options -------------------------------------------------------------------------------------

OPTIONS = {
    "window": {"window": (9, 0)},
    "window ahead": {"window": (40, 2), "is_causal": False},
    "softcap": {"softcap": 3.0, "spread": 4.0},
    "alibi": {"alibi_slopes": np.array([0.5, 0.1, 0.0, 0.02], np.float32)},
    "sinks": {"sinks": np.array([0.0, -3.0, 20.0, -INF], np.float32)},
    "scale": {"scale": -0.3},
    "large scale": {"scale": 3e38, "spread": 1e-37},
    "offset": {"q_offset": 12, "is_causal": True},
    "offsets": {"q_offset": np.array([50, -1, 3, 7]), "window": (10, 0)},
    "q_lens": {"q_lens": np.array([3, 0, 1, 2]), "is_causal": True},
    "all": {
        "window": (37, 0), "softcap": 5.0, "is_causal": True, "scale": 0.2,
        "alibi_slopes": np.arange(16).reshape(4, 4) / 80, "sinks": np.ones(4, np.float32),
        "q_lens": np.array([3, 2, 1, 0], np.int32), "tree": np.tri(3, 5, 2, dtype=bool),
    },
}  # fmt: skip


@pytest.mark.parametrize("how", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("page_size", [None, 5, 16])
def test_options(backend, rng, how, page_size):
    """Windows that end inside a page; also where a sequence has fewer keys than queries."""
    how = {"lens": [77, 2, 50, 33], "rows": 3, "page_size": page_size, **how}
    verify(backend, rng, **how)
    verify(backend, rng, "float32", **how)
    verify(backend, rng, **how, new=2)


@pytest.mark.parametrize(
    "shape", [(4, 4), (4, 9), (1, 6), (2, 1, 4, 4), (1, 4, 4, 7), (2, 4, 4, 100), (5,)], ids=str
)
@pytest.mark.parametrize("page_size", [None, 8])
def test_tree_masks(backend, rng, shape, page_size):
    """Of less than all keys, of all, and of more; seen through `new` as well."""
    tree = rng.random(shape) < 0.6
    how = {"lens": [40, 7], "rows": 4, "page_size": page_size, "tree": tree}
    verify(backend, rng, **how)
    verify(backend, rng, **how, q_lens=np.array([1, 3]))
    how["tree"] = np.asfortranarray(tree)
    verify(backend, rng, **how, new=4, window=(30, 0))


def test_a_tree_of_one_branch_is_causal(backend, rng):
    cached = Cached(rng, lens=[40, 7], rows=4, page_size=8, tree=np.tri(4, dtype=bool))
    tree = cached.run(backend)
    del cached.options["mask"]
    for got, want in zip(tree, cached.run(backend, is_causal=True), strict=True):
        rtol = 4 * TABLE[got.dtype.name].relative
        np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=rtol, atol=rtol)


def test_split_size(backend, rng):
    for split_size in (None, "auto", 128, 144, np.int64(4096), 10**30):
        cached = Cached(rng, lens=[700, 3, 128, 129], page_size=16, heads=(2, 1))
        cached.problem.check(*cached.run(backend, split_size=split_size))


PARTS = {
    "window": {"lens": [700, 129], "window": (199, 0)},  # from one of the last keys of a part on
    "rows": {"lens": [200, 129], "rows": 33},
    "columns": {"lens": [200, 129], "dims": (576, 576), "value_dim": 576},
    "no keys": {  # in a part, where all scores are far below 0
        "lens": [300], "missing": [(0, page) for page in range(8, 16)],
        "alibi_slopes": np.ones(4, np.float32), "q_offset": 1000,
    },
}  # fmt: skip


@pytest.mark.parametrize("how", PARTS.values(), ids=PARTS.keys())
def test_parts(backend, rng, how):
    """Of several tiles of rows or of columns, of a window, and one without keys."""
    cached = Cached(rng, page_size=16, heads=(4, 2), **how)
    for split_size in (None, 128):
        cached.problem.check(*cached.run(backend, split_size=split_size))


# ---- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("page_size", [None, 1, 16])
def test_new_keys(backend, rng, op, page_size):
    """`Cached.run` checks the cache; each length counts the new keys."""
    how = {"lens": [20, 3, 16, 49], "page_size": page_size}
    verify(backend, rng, op, **how, new=1)
    verify(backend, rng, op, **how, new=3, rows=3, is_causal=True)
    verify(backend, rng, op, **how, new=3, rows=2, is_causal=True)
    verify(backend, rng, op, **how, new=2, rows=3, q_lens=np.array([3, 0, 1, 2]))


@pytest.mark.parametrize("page_size", [4, 16])
def test_new_keys_without_a_page(backend, rng, page_size):
    """They are dropped."""
    missing = [(0, 32 // page_size), (1, 16 // page_size)]
    how = {"lens": [35, 18], "page_size": page_size, "new": 5, "rows": 5, "missing": missing}
    verify(backend, rng, **how, is_causal=True)


@pytest.mark.parametrize("page_size", [None, 4])
def test_lengths_that_a_device_is_trusted_with(backend, rng, page_size, monkeypatch):
    """What does not fit is dropped: nothing is read or written outside."""
    monkeypatch.setattr("cuattn._attention.request_kvcache.check_values", lambda *_: None)
    cached = Cached(rng, lens=[16, 16, 14], capacity=16, page_size=page_size, new=3, rows=3)
    if page_size:
        cached.options["page_table"] = cached.options["page_table"][:, :-1].copy()
    far = 2**63 - 1
    for bad, q_bad, offsets in (
        ([14, 2**31 - 1, -5], [3 - 2**32, 2, 4], [far, -far, 3]),
        ([16, 15, -(2**30)], [3, 2**40, 3], [-far - 1, 9, far]),
    ):
        lens, results = np.clip(bad, 0, 16), []
        q_lens, places = np.clip(q_bad, 0, 3), np.clip(offsets, -(2**40), 2**40)
        for given in (
            {"kv_lens": np.array(bad, np.int32)},
            {"kv_lens": lens},
            {"kv_lens": lens, "q_lens": np.array(q_bad), "q_offset": np.array(offsets)},
            {"kv_lens": lens, "q_lens": q_lens, "q_offset": places},
        ):
            caches = [put(backend, a.copy()) for a in cached.caches]
            options = put_options(backend, {**cached.options, **given})
            got = cuattn.attention_kvcache(
                put(backend, cached.q), *caches, **options, return_lse=True
            )
            results.append(bits(map(backend.asnumpy, (*got, *caches))))
        assert results[0] == results[1] and results[2] == results[3]
        after = [a.copy() for a in cached.caches]
        for a, new in zip(after, cached.new, strict=True):
            for b, i in np.ndindex(3, 3):
                page, row = b, lens[b] + i
                if page_size and row < 16:
                    page = cached.options["page_table"][b, row // page_size]
                if row < 16 and 0 <= page < len(a):
                    a[page, :, row % page_size if page_size else row] = new[b, :, i]
        assert results[0][2:] == bits(after)


# ---- 8 bits --------------------------------------------------------------------------------------


class EightBits(Cached):
    """Caches of 8 bits: what they stand for are the keys of the problem."""

    def __init__(self, rng, kind, scales, op="float16", heads=(4, 2), **how):
        super().__init__(rng, op, heads=heads, **how)
        self.kind, wide = EIGHT_BITS[kind], np.float64 if op == "float64" else np.float32
        shape = self.caches[0].shape[:-1]
        found = []
        for name, cache in zip(("k_scale", "v_scale"), self.caches, strict=True):
            scale = {
                "none": None,
                "number": float(rng.uniform(0.004, 0.02)),
                "0-d": np.array(rng.uniform(0.004, 0.02), np.float32),
                "head": rng.uniform(0.004, 0.02, heads[1]).astype("f4"),
                "token": rng.uniform(0.004, 0.02, shape).astype("f4"),
            }[scales]
            per_head = np.ndim(scale) == 1 and self.layout == "BHSD"
            self.options[name] = scale
            factor = np.asarray(1 if scale is None else scale)
            factor = factor[:, None] if per_head else factor
            numbers = cache.astype("f4") / (1 if scale is None else 0.02)
            codes = np.nan_to_num(np.clip(numbers, -100, 100)).astype(self.kind)
            if scales == "token":  # of what nobody sees
                scale[np.isnan(cache.astype("f4")).all(axis=-1)] = NAN
            found.append((codes, (codes.astype(wide) * factor[..., None]).astype(wide)))
        self.caches = self.after = tuple(codes for codes, _ in found)
        self.problem.clean = (self.problem.clean[0], *map(self.canonical, (w for _, w in found)))
        _, self.problem.k, self.problem.v = self.problem.clean

    def canonical(self, numbers):
        """A cache as the keys of each sequence, side by side."""
        numbers = swapped(numbers, self.layout)
        if self.size is None:
            return numbers
        batch, columns = len(self.lens), self.capacity // self.size
        split = numbers[self.pages].reshape(batch, columns, *numbers.shape[1:])
        return split.swapaxes(1, 2).reshape(batch, numbers.shape[1], -1, numbers.shape[3])


@pytest.mark.parametrize("kind", EIGHT_BITS)
@pytest.mark.parametrize("scales", ["none", "number", "0-d", "head", "token"])
@pytest.mark.parametrize("page_size", [None, 16])
def test_eight_bits(backend, rng, kind, scales, page_size):
    for op, layout in (("float16", "BHSD"), ("bfloat16", "BSHD"), ("float32", "BSHD"),
                       ("float64", "BHSD")):  # fmt: skip
        how = {"lens": [33, 0, 200], "page_size": page_size, "layout": layout, "rows": 2}
        how |= {"dims": (48, 80)} if op == "float16" else {}  # the last row ends with the cache
        cached = EightBits(rng, kind, scales, op, **how)
        cached.problem.check(*cached.run(backend))
    if kind == "e4m3" and page_size is None:
        for code in (0x7F, 0xFF):
            cached.caches[1].view(np.uint8)[0, 1, 5, 3] = code
            assert np.isnan(cached.run(backend)[0][0, 2:, :, 3]).all()


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_new_keys_are_seen_as_they_are_kept(backend, rng, kind):
    """Attention that writes is kv_append, then attention; of as many as there are queries."""
    counts = np.array([1, 2])
    for page_size, scales in ((None, "number"), (16, "token"), (5, "head")):
        cached = EightBits(rng, kind, scales, lens=[30, 20], page_size=page_size, rows=2)
        new = [rng.standard_normal((2, 2, 2, 64)).astype("f2") for _ in range(2)]
        options = dict(cached.options, kv_lens=cached.options["kv_lens"] - 2)
        results = []
        for fused in (True, False):
            caches = [put(backend, a.copy()) for a in cached.caches]
            given = {n: put(backend, np.copy(a) if np.ndim(a) else a) for n, a in options.items()}
            args, lens = [put(backend, a) for a in new], put(backend, counts)
            if fused:
                given |= {"k_new": args[0], "v_new": args[1]}
            else:
                cuattn.kv_append(*caches, *args, **given, new_lens=lens)
                given["kv_lens"] = given["kv_lens"] + lens
            given["q_lens"] = lens
            got = cuattn.attention_kvcache(
                put(backend, cached.q), *caches, **given, is_causal=True, return_lse=True
            )
            scale = [given[n] for n in ("k_scale", "v_scale") if np.ndim(given[n])]
            results.append(bits(map(backend.asnumpy, (*got, *caches, *scale))))
        assert results[0] == results[1]


@pytest.mark.parametrize("offset", [1, 8, 16])
def test_alignment_of_eight_bits(backend, rng, offset):
    """Of 16 bytes, of 8 and of none; keys alone, or values."""
    for name, kind, scales in (("k", "int8", "head"), ("v", "e4m3", "token")):
        cached = EightBits(rng, kind, scales, lens=[20, 33], page_size=16, rows=2)
        caches = {"k": cached.caches[0], "v": cached.caches[1]}
        memory = np.zeros(caches[name].size + offset, caches[name].dtype)
        memory[offset:] = caches[name].reshape(-1)
        caches[name] = memory[offset:].reshape(caches[name].shape)
        cached.caches = tuple(caches.values())
        cached.problem.check(*cached.run(backend))


# ---- values that are columns of the keys ---------------------------------------------------------


@pytest.mark.parametrize(
    "dims", [(576, 512), (24, 16), (40, 40), (576, 0), (576, 576), (300, 200)], ids=str
)
@pytest.mark.parametrize("op", OPS)
def test_values_of_keys(backend, rng, op, dims):
    """Multi-head latent attention: one head of keys, read once."""
    dim, value_dim = dims
    how = {"lens": [40, 2, 21], "heads": (16, 1), "rows": 2, "dims": (dim, dim), "new": 2}
    for page_size in (None, 16):
        cached, _, _ = verify(backend, rng, op, page_size=page_size, value_dim=value_dim, **how)
        cache = put(backend, cached.caches[0].copy())
        options = {
            n: put(backend, v) for n, v in cached.options.items() if n in ("kv_lens", "page_table")
        }
        cuattn.kv_append(cache, None, put(backend, cached.new[0]), None, **options)
        assert backend.asnumpy(cache).tobytes() == cached.after[0].tobytes()


LATENT = {
    **OPTIONS,
    "tree": {"tree": np.tri(3, 7, 4, dtype=bool) ^ np.eye(3, 7, dtype=bool)},
    "rows": {"lens": [300, 140, 5, 0], "rows": 13, "is_causal": True},
    "no page": {"lens": [77, 30, 50, 33], "missing": [(0, 1), (1, 0), (1, 1)]},
    "large scores": {"lens": [300, 60, 1, 129], "spread": 30.0},
    "strides": {"pool": "columns"},
}


@pytest.mark.parametrize("how", LATENT.values(), ids=LATENT.keys())
def test_options_of_latent_attention(backend, rng, how):
    """Warps share the columns of a row: of keys for its scores, of values for its sums."""
    latent = {"heads": (4, 1), "dims": (576, 576), "value_dim": 512, "page_size": 16}
    how = {"lens": [77, 2, 50, 33], "rows": 3, **latent, **how}
    cached = Cached(rng, **how)
    for split_size in ("auto", None, 128):
        cached.problem.check(*cached.run(backend, split_size=split_size))


MANY_ROWS = {
    "ends of tiles": {"lens": [63, 64, 65, 1, 0, 129], "heads": (40, 1)},
    "tiles of rows": {
        "lens": [70, 130], "heads": (72, 1), "op": "bfloat16", "page_size": None,
        "sinks": np.linspace(-9, 9, 72, dtype=np.float32),
    },
    "new keys": {
        "lens": [200, 66, 3], "heads": (20, 1), "rows": 3, "new": 3, "is_causal": True,
        "q_lens": np.array([3, 1, 3]),
    },
    "window": {  # of 17 queries, some see all keys of a tile
        "lens": [277, 256, 5], "heads": (4, 1), "rows": 17, "window": (70, 0), "op": "bfloat16",
        "page_size": 5,
    },
    "large scores": {"lens": [300, 1, 129], "spread": 30.0},
    "all columns": {"lens": [99, 200], "heads": (34, 1), "value_dim": 576, "layout": "BSHD"},
    "few columns": {"lens": [99, 200], "dims": (300, 300), "value_dim": 200, "pool": "columns"},
    "no page": {"lens": [77, 30, 50], "missing": [(0, 1), (1, 0), (1, 1)], "op": "bfloat16"},
}  # fmt: skip


@pytest.mark.parametrize("how", MANY_ROWS.values(), ids=MANY_ROWS.keys())
def test_latent_attention_of_many_rows(backend, rng, how):
    """Where Hopper has a kernel of its own."""
    latent = {"heads": (64, 1), "dims": (576, 576), "value_dim": 512, "page_size": 16}
    cached = Cached(rng, **{**latent, **how})
    for split_size in ("auto", None, 128):
        cached.problem.check(*cached.run(backend, split_size=split_size))


@pytest.mark.parametrize("dims", [(48, 32), (576, 512)], ids=str)
@pytest.mark.parametrize("scales", ["number", "head", "token"])
def test_values_of_keys_of_eight_bits(backend, rng, scales, dims):
    """They have the scale of the keys."""
    dim, value_dim = dims
    for kind, page_size, op in (
        ("int8", None, "bfloat16"), ("e4m3", 16, "float16"), ("e4m3", None, "float64"),
    ):  # fmt: skip
        how = {"lens": [40, 2, 21], "heads": (8, 2), "rows": 2, "dims": (dim, dim)}
        cached = EightBits(rng, kind, scales, op, page_size=page_size, **how)
        problem, options = cached.problem, dict(cached.options, value_dim=value_dim, v_scale=None)
        problem.clean = *problem.clean[:2], problem.clean[1][..., :value_dim]
        problem.v = problem.k[..., :value_dim]
        q, cache = put(backend, cached.q), put(backend, cached.caches[0])
        options = put_options(backend, options)
        got = cuattn.attention_kvcache(q, cache, None, **options, return_lse=True)
        problem.check(*map(backend.asnumpy, got))


# ---- what nobody sees, and results ---------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_what_nobody_sees_changes_nothing(backend, rng, op):
    """Bit by bit: in pages that are free, and behind the last key."""
    for page_size in (None, 16):
        cached = Cached(rng, op, lens=[20, 0, 33], page_size=page_size, rows=2, window=(17, 0))
        results, nan = [], [np.isnan(a.astype("f4")) for a in cached.caches]
        for fill in (NAN, 0, INF, -1e4):
            cached.caches = cached.after = tuple(
                np.where(n, fill, a).astype(a.dtype)
                for n, a in zip(nan, cached.caches, strict=True)
            )
            results.append(tuple(bits(cached.run(backend))))
        assert len(set(results)) == 1


@pytest.mark.parametrize("page_size", [None, 16])
def test_nan_in_a_key(backend, rng, page_size):
    """It shows in its own sequence and head, and in no other."""
    cached = Cached(rng, "float32", lens=[20, 20, 33], page_size=page_size)
    clean = cached.run(backend)
    page = 1 if page_size is None else cached.options["page_table"][1, 0]
    for cache in cached.caches:
        cache[page, 1, 3, 5] = NAN
        cached.after = cached.caches
        out, lse = cached.run(backend)
        assert np.isnan(out[1, 2:]).any(axis=-1).all()
        out[1, 2:], lse[1, 2:] = clean[0][1, 2:], clean[1][1, 2:]
        assert bits((out, lse)) == bits(clean)
        cache[page, 1, 3, 5] = 0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("page_size", [None, 16])
def test_a_sequence_alone(backend, rng, op, page_size):
    """Bit by bit as among others, of its own length too."""
    cached = Cached(rng, op, lens=[50, 20, 50, 0, 3, 50], page_size=page_size, rows=2)
    whole, whole_lse = cached.run(backend)
    caches = [put(backend, a) for a in cached.caches]
    for some in ([0], [2, 5], [4, 0, 3]):
        options = {n: a[some] if np.ndim(a) else a for n, a in cached.options.items()}
        own = caches if page_size else [put(backend, a[some]) for a in cached.caches]
        q = put(backend, cached.q[some])
        options = put_options(backend, options)
        got = cuattn.attention_kvcache(q, *own, **options, return_lse=True)
        assert bits(map(backend.asnumpy, got)) == bits((whole[some], whole_lse[some]))


@pytest.mark.parametrize("op", OPS)
def test_extremes(backend, rng, op):
    """The largest scores late, scores far apart, and values of 1, of which the mean is 1."""
    cached = Cached(rng, op, lens=[300, 300], page_size=16, heads=(2, 1), rows=8)
    for q, k, _ in (cached.problem.clean, cached.problem.arrays):
        k[:, :, 250] = k[:, :, 299] * 64  # in the second tile of a team
        k[:, :, 299] = -k[:, :, 250]
        q[0, :, :4] = q[1, :, 4:] = 0  # half of the 16 rows have such scores
    del cached.options["page_table"]
    cached.place("apart", np.int32, 0)
    cached.problem.check(*cached.run(backend))
    verify(backend, rng, op, lens=[200, 3, 1, 1, 1], page_size=16, spread=1000.0)
    verify(backend, rng, op, lens=[300, 60], page_size=16, spread=100.0, scale=1e4)
    cached = Cached(rng, op, lens=[300, 1], page_size=16)
    nan = np.isnan(cached.caches[1].astype("f4"))
    ones = np.where(nan, NAN, 1).astype(cached.q.dtype)
    cached.caches = cached.after = cached.caches[0], ones
    out, _ = cached.run(backend)
    rounding = min(TABLE[out.dtype.name].relative, TABLE["float32"].relative)
    np.testing.assert_allclose(out.astype(float), 1, rtol=64 * rounding)  # of 16 bits exactly


@pytest.mark.parametrize("layout", ["contiguous", "padded", "strided", "misaligned", "fortran"])
def test_out(backend, rng, layout):
    """Every element is written, nothing beside it, and what is given is what comes back."""
    cached = Cached(rng, lens=[20, 0, 33], page_size=16, rows=2, q_lens=np.array([1, 2, 0]))
    dtype = cached.q.dtype
    out = Guarded(backend, (3, 4, 2, 64), dtype, layout)
    lse = Guarded(backend, (3, 4, 2), lse_dtype(dtype), layout)
    got = cached.run(backend, out=(out.out, lse.out))
    out.check_rim()
    lse.check_rim()
    cached.problem.check(*got)
    options = put_options(backend, cached.options)
    caches = [put(backend, a) for a in cached.caches]
    alone = Guarded(backend, (3, 4, 2, 64), dtype, layout)
    found = cuattn.attention_kvcache(put(backend, cached.q), *caches, **options, out=alone.out)
    assert found is alone.out
    assert bits([backend.asnumpy(found)]) == bits(got[:1])


def test_nothing_to_compute(backend):
    for batch, heads, rows, dim in ((0, 2, 1, 8), (2, 0, 1, 8), (2, 2, 0, 8), (2, 2, 1, 0)):
        q = backend.asarray(np.zeros((batch, heads, rows, dim), ml_dtypes.bfloat16))
        cache = backend.asarray(np.zeros((batch, heads, 5, dim), ml_dtypes.bfloat16))
        lens = backend.asarray(np.full(batch, 3))
        got = cuattn.attention_kvcache(q, cache, cache, kv_lens=lens, return_lse=True)
        assert [a.shape for a in got] == [(batch, heads, rows, dim), (batch, heads, rows)]
        cuattn.kv_append(cache, cache, q, q, kv_lens=lens)


@pytest.mark.parametrize("kind", ["float32", *EIGHT_BITS])
def test_new_keys_and_nothing_to_compute(backend, rng, kind):
    """They are written all the same; and count where they have no columns."""
    dtype = EIGHT_BITS.get(kind, np.float32)
    for heads, rows, dim, value_dim in ((2, 0, 8, 4), (0, 2, 8, 4), (2, 2, 8, 0), (2, 2, 0, 4)):
        q = rng.standard_normal((2, heads, rows, dim)).astype("f4")
        caches = [rng.integers(-9, 9, (2, 2, 7, d)).astype(dtype) for d in (dim, value_dim)]
        new = [rng.integers(-9, 9, (2, 2, 3, d)).astype("f4") for d in (dim, value_dim)]
        given = {"kv_lens": np.array([2, 4]), "k_new": new[0], "v_new": new[1]}
        after = [a.copy() for a in caches]
        want = cuattn.reference.attention_kvcache(q, *after, **given)
        on = [backend.asarray(a) for a in caches]
        got = cuattn.attention_kvcache(backend.asarray(q), *on, **put_options(backend, given))
        np.testing.assert_allclose(backend.asnumpy(got), want, rtol=1e-6, atol=1e-6)
        assert bits(map(backend.asnumpy, on)) == bits(after)
