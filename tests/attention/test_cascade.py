"""attention_cascade on every backend: against float64 attention over all keys side by side.

What no query sees is NaN or garbage, in the cache (`kvcache_cases.Cached`) and in the prefixes.
"""

from __future__ import annotations

import numpy as np
import pytest
from attention_cases import INF, NAN, OPS, Problem, arranged, put, put_options
from cases import Guarded
from kvcache_cases import EIGHT_BITS, Cached, swapped
from tolerance import lse_dtype

import cuattn
from cuattn import reference
from cuattn._attention import cascade_parts


class Cascade:
    """Prefixes, and a cache with options as in `Cached`, whose lengths count the cache alone."""

    def __init__(self, rng, op="float16", prefixes=(40,), **how):
        self.cached, before = Cached(rng, op, **how), sum(prefixes)
        inner = self.cached.problem
        (batch, heads, rows, columns), (_, kv_heads, _, dim) = inner.shape, inner.k.shape
        options = dict(inner.options)
        options["kv_lens"] = options["kv_lens"] + before
        if "q_offset" in options:
            options["q_offset"] = self.cached.options["q_offset"] = options["q_offset"] + before
        if "mask" in options:
            options["mask"] = np.concatenate(
                [np.ones((batch, heads, rows, before), bool), options["mask"]], axis=-1
            )
        options.pop("precision", None)
        self.problem = Problem(
            rng, op, batch, (heads, kv_heads), (rows, before + columns), (dim, inner.v.shape[-1]),
            **options,
        )  # fmt: skip
        q, *keys = inner.clean
        first = [a[:1, :, :before] for a in self.problem.clean[1:]]
        shared = [np.broadcast_to(a, (batch, *a.shape[1:])) for a in first]
        self.problem.clean = (
            q, *(np.concatenate(pair, axis=2) for pair in zip(shared, keys, strict=True)),
        )  # fmt: skip
        self.problem.hide()
        hidden = self.problem.hidden[1][:, :, :before].all(axis=0)
        for a in first:
            a[0, hidden] = NAN
        ends = np.cumsum((0, *prefixes))
        self.prefixes = [
            tuple(
                np.ascontiguousarray(arranged(a[:, :, i:j], self.cached.layout, 3)) for a in first
            )
            for i, j in zip(ends, ends[1:], strict=False)
        ]

    def call(self, backend, caches=None, **more):
        cached = self.cached
        caches = [put(backend, a) for a in cached.caches] if caches is None else caches
        prefixes = [tuple(put(backend, a) for a in pair) for pair in self.prefixes]
        options = put_options(backend, {**cached.options, "layout": cached.layout, **more})
        return cuattn.attention_cascade(put(backend, cached.q), prefixes, *caches, **options)

    def run(self, backend, **more):
        """out and lse on the host, canonical; the cache must be as it was, but for new keys."""
        caches = [put(backend, a) for a in self.cached.caches]
        got = self.call(backend, caches, return_lse=True, **more)
        assert all(isinstance(one, backend.xp.ndarray) for one in got)
        for cache, after in zip(caches, self.cached.after, strict=True):
            assert backend.asnumpy(cache).tobytes() == after.tobytes()
        out, lse = (backend.asnumpy(one) for one in got)
        assert out.dtype == self.cached.q.dtype and lse.dtype == lse_dtype(out.dtype)
        return (out.swapaxes(1, 2) if self.cached.layout == "BSHD" else out), lse


def verify(backend, rng, op="float16", **how):
    cascade = Cascade(rng, op, **how)
    cascade.problem.check(*cascade.run(backend))
    return cascade


def host(backend, results):
    return [backend.asnumpy(one) for one in (results if isinstance(results, tuple) else (results,))]


# ---- sizes, dtypes and places in memory ----------------------------------------------------------


@pytest.mark.parametrize("prefixes", [(), (1,), (0,), (70,), (3, 0, 50)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_prefixes(backend, rng, prefixes, rows):
    """Also before sequences without keys of their own."""
    how = {"prefixes": prefixes, "lens": [33, 0, 1], "rows": rows, "page_size": 16}
    verify(backend, rng, **how)
    verify(backend, rng, **how, is_causal=True)


@pytest.mark.parametrize("op", OPS)
def test_dtypes(backend, rng, op):
    verify(backend, rng, op, lens=[70, 3, 0], page_size=16, rows=2)
    verify(backend, rng, op, lens=[70, 3, 0], page_size=16, rows=2, is_causal=True)


@pytest.mark.parametrize("heads", [(3, 3), (8, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("dims", [(1, 1), (40, 72), (192, 128)], ids=str)
def test_heads(backend, rng, heads, dims):
    verify(backend, rng, lens=[20, 50], heads=heads, dims=dims, rows=2, alibi_slopes=None)


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("page_size", [None, 5])
def test_layouts(backend, rng, layout, page_size):
    how = {"lens": [19, 40, 3], "page_size": page_size, "layout": layout, "prefixes": (9, 20)}
    verify(backend, rng, **how, rows=3)
    verify(backend, rng, **how, rows=3, is_causal=True, q_lens=np.array([3, 0, 2]))
    cascade = Cascade(rng, **how)
    cascade.prefixes = [
        tuple(a[::-1, ::-1].copy()[::-1, ::-1] for a in p) for p in cascade.prefixes
    ]
    cascade.problem.check(*cascade.run(backend))


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_three_dimensions(backend, rng, layout):
    for more in ({}, {"is_causal": True}, {"q_lens": np.array([2])}):
        cascade = Cascade(rng, lens=[30], rows=3, layout=layout, **more)
        cached = cascade.cached
        cached.q, cached.caches = cached.q[0], [a[0] for a in cached.caches]
        for name in {"kv_lens", "q_lens"} & {*cached.options}:
            cached.options[name] = cached.options[name].reshape(())
        out, lse = host(backend, cascade.call(backend, return_lse=True))
        cascade.problem.check(swapped(out[None], layout)[0], lse, 3)


# ---- options -------------------------------------------------------------------------------------

OPTIONS = {
    "window": {"window": (9, 0)},
    "window into the prefix": {"window": (60, 0), "is_causal": True},
    "window ahead": {"window": (None, 2)},
    "softcap": {"softcap": 3.0, "spread": 4.0},
    "alibi": {"alibi_slopes": np.array([0.5, 0.1, 0.0, 0.02], np.float32)},
    "sinks": {"sinks": np.array([0.0, -3.0, 20.0, -INF], np.float32)},
    "scale": {"scale": -0.3},
    "offset in the prefix": {"q_offset": -20, "is_causal": True},
    "offset behind it": {"q_offset": 12, "is_causal": True},
    "offsets": {"q_offset": np.array([50, -30, 3, -100]), "window": (10, 0)},
    "q_lens": {"q_lens": np.array([3, 0, 1, 2]), "sinks": np.ones(4, np.float32)},
    "causal q_lens": {"q_lens": np.array([3, 0, 1, 2]), "is_causal": True},
    "tree": {"tree": np.tri(3, 5, 2, dtype=bool)},
    "all": {
        "window": (57, 0), "softcap": 5.0, "is_causal": True, "scale": 0.2,
        "alibi_slopes": np.ones((4, 4)) / 9, "sinks": np.ones(4, np.float32),
        "q_lens": np.array([3, 2, 1, 0], np.int32), "tree": np.tri(3, 5, 2, dtype=bool),
    },
}  # fmt: skip


@pytest.mark.parametrize("how", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("prefixes", [(40,), (17, 23)], ids=str)
def test_options(backend, rng, how, prefixes):
    """Also where queries stand in a prefix, as their sequence has fewer keys of its own."""
    how = {"lens": [77, 2, 50, 33], "rows": 3, "page_size": 16, "prefixes": prefixes, **how}
    verify(backend, rng, **how)
    verify(backend, rng, "float32", **how)
    if "q_offset" not in how:
        verify(backend, rng, **how, new=2)


def test_tree_masks_are_of_the_cache(backend, rng):
    """Wider than a sequence is long: what is too much is not for the prefix."""
    verify(backend, rng, lens=[3, 7], rows=4, page_size=8, tree=rng.random((4, 9)) < 0.5)


@pytest.mark.parametrize("rows", [1, 3])
def test_no_lengths(backend, rng, rows):
    cascade = Cascade(rng, lens=[48, 48], rows=rows, is_causal=True)
    del cascade.cached.options["kv_lens"]
    cascade.problem.check(*cascade.run(backend))


@pytest.mark.parametrize("dims", [(64, 40), (320, 256)], ids=str)
def test_values_that_are_columns_of_keys(backend, rng, dims):
    for more in ({}, {"is_causal": True}):
        cascade = Cascade(rng, lens=[20, 3], rows=3, heads=(4, 1), dims=dims, page_size=8, **more)
        columns, cached = dims[1], cascade.cached
        for name in ("clean", "arrays"):
            q, k, _ = getattr(cascade.problem, name)
            if name == "clean":
                cascade.problem.clean = q, k, k[..., :columns]
            else:
                cascade.problem.v = k[..., :columns]
        cached.caches, cached.after = cached.caches[:1], cached.after[:1]
        cascade.prefixes = [(k, None) for k, _ in cascade.prefixes]
        caches = [put(backend, cached.caches[0]), None]
        got = cascade.call(backend, caches, return_lse=True, value_dim=columns)
        cascade.problem.check(*host(backend, got))


@pytest.mark.parametrize("dtype", EIGHT_BITS.values(), ids=EIGHT_BITS)
def test_caches_of_8_bits(backend, rng, dtype):
    """Prefixes have the dtype of q; what new keys are rounded to is in the cache."""
    cascade = Cascade(rng, "float32", lens=[20, 6], rows=2, page_size=8, is_causal=True, new=2)
    cached = cascade.cached
    cached.caches = [np.nan_to_num(a * 30).astype(dtype) for a in cached.caches]
    scales = {"k_scale": 1 / 30, "v_scale": np.full(2, 1 / 25, np.float32)}
    caches, given = ([a.copy() for a in cached.caches] for _ in range(2))
    got = host(backend, cascade.call(backend, list(map(backend.asarray, caches)), return_lse=True,
                                     **scales))  # fmt: skip
    want = reference.attention_cascade(cached.q, cascade.prefixes, *given, return_lse=True,
                                       **cached.options, **scales)  # fmt: skip
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)


# ---- what is called, and results -----------------------------------------------------------------

READS = {  # how many sequences at a time read each of two prefixes, which have 38 keys together
    "no positions": ([3], {"rows": 4}),
    "bound ahead": ([3], {"rows": 1, "window": (None, 3)}),
    "one query": ([3], {"rows": 1, "is_causal": True}),
    "several": ([3, 1], {"rows": 2, "is_causal": True}),
    "many": ([1], {"rows": 10, "is_causal": True}),
    "all new": ([3], {"rows": 3, "new": 3, "is_causal": True}),
    "some new": ([3, 1], {"rows": 4, "new": 2, "is_causal": True}),
    "lengths of queries": ([3], {"rows": 3, "q_lens": np.array([3, 0, 1])}),
    "behind": ([3], {"rows": 3, "q_offset": -1, "is_causal": True}),
    "amid": ([3, 1], {"rows": 3, "q_offset": -2, "is_causal": True}),
    "places": ([1], {"rows": 3, "q_offset": np.array([9, 9, 9]), "is_causal": True}),
    "window": ([1], {"rows": 1, "window": (9, 0)}),
    "alibi": ([1], {"rows": 1, "alibi_slopes": np.ones(4, np.float32)}),
}


@pytest.mark.parametrize(("together", "how"), READS.values(), ids=READS.keys())
def test_who_reads_a_prefix_together(backend, rng, together, how, monkeypatch):
    """By shapes and numbers alone, as lengths are not read on the host."""
    batches = []

    def spy(function):
        def call(q, *arrays, **options):
            batches.append(len(q))
            return function(q, *arrays, **options)

        return call

    for name in ("attention", "attention_kvcache"):
        monkeypatch.setattr(cascade_parts, name, spy(getattr(cascade_parts, name)))
    verify(backend, rng, lens=[20, 5, 9], prefixes=(30, 8), **how)
    assert [3 // batch for batch in batches] == together * (3 - len(together))


def test_no_prefix_is_attention_kvcache(backend, rng):
    cascade = Cascade(rng, lens=[20, 5], prefixes=(), rows=2, is_causal=True)
    for got, want in zip(cascade.run(backend), cascade.cached.run(backend), strict=True):
        assert got.tobytes() == want.tobytes()


def test_bits_do_not_depend_on_the_batch(backend, rng):
    if backend.name == "numpy":
        pytest.skip("BLAS may add up in another order")
    for more in ({}, {"is_causal": True}):
        cascade = Cascade(rng, lens=[20, 5, 9], rows=2, page_size=8, **more)
        whole, cached = host(backend, cascade.call(backend, return_lse=True)), cascade.cached
        q, options = cached.q, cached.options
        for b in range(3):
            one = slice(b, b + 1)
            cached.q = q[one]
            cached.options = options | {n: options[n][one] for n in ("kv_lens", "page_table")}
            for got, want in zip(host(backend, cascade.call(backend, return_lse=True)), whole,
                                 strict=True):  # fmt: skip
                assert got.tobytes() == np.ascontiguousarray(want[one]).tobytes()


@pytest.mark.parametrize("place", ["contiguous", "strided"])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_out(backend, rng, layout, place):
    cascade = Cascade(rng, lens=[20, 5], rows=3, layout=layout)
    want = host(backend, cascade.call(backend, return_lse=True))
    outs = [Guarded(backend, a.shape, a.dtype, place) for a in want]
    got = cascade.call(backend, return_lse=True, out=tuple(one.out for one in outs))
    assert got[0] is outs[0].out and got[1] is outs[1].out
    alone = Guarded(backend, want[0].shape, want[0].dtype, place)
    assert cascade.call(backend, out=alone.out) is alone.out
    for one, a in zip([*outs, alone], [*want, want[0]], strict=True):
        one.check_rim()
        assert backend.asnumpy(one.out).tobytes() == a.tobytes()


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.host("arrays of the host")
def test_errors(backend, rng):
    cascade = Cascade(rng, "float32", lens=[20, 5], heads=(4, 2), dims=(8, 6), prefixes=(7, 3))
    (k, v), good = cascade.prefixes[0], cascade.prefixes
    wide = k.astype(np.float64)
    for error, words, prefixes in (
        (TypeError, "prefixes must be a list or tuple of pairs (k, v), but it is", k),
        (TypeError, "prefixes must be a list or tuple of pairs (k, v), but it is None", None),
        (TypeError, "prefixes[1] must be a pair (k, v) of arrays, but", [(k, v), k]),
        (TypeError, "prefixes[0] must be a pair (k, v) of arrays, but", [(k, v, v)]),
        (TypeError, "prefixes[0][1] must be a ", [(k, None)]),
        (TypeError, "prefixes[0][0] must be a ", [(k.tolist(), v)]),
        (TypeError, "prefixes[1][0] must have the dtype of q (float32), but", [(k, v), (wide, v)]),
        (ValueError, "prefixes[0][0] must have shape (2, P, 8), but", [(k[None], v)]),
        (ValueError, "prefixes[0][0] must have shape (2, P, 8), but", [(k[:1], v)]),
        (ValueError, "prefixes[0][0] must have shape (2, P, 8), but", [(k[..., :7], v)]),
        (ValueError, "prefixes[0][1] must have shape (2, 7, 6), but", [(k, v[:, :6])]),
        (ValueError, "prefixes[0][1] must have shape (2, 7, 6), but", [(k, k)]),
    ):
        cascade.prefixes = prefixes
        with pytest.raises(error) as caught:
            refused(cascade, prefixes)
        assert str(caught.value).startswith(words), str(caught.value)
    cascade.prefixes = good
    with pytest.raises(ValueError, match=r"^out must .*prefixes\[1\]\[1\]"):
        memory = np.zeros(2 * 4 * 8, np.float32)
        overlapping = memory[: 2 * 3 * 6].reshape(2, 3, 6)
        out = memory[: 2 * 4 * 1 * 6].reshape(2, 4, 1, 6)
        refused(cascade, [(k, v), (good[1][0], overlapping)], out=out)
    for offset in (-(2**39) + 9, np.array([0, -(2**39) + 9])):
        with pytest.raises(ValueError, match=r"^q_offset must be between"):
            refused(cascade, good, q_offset=offset)
    with pytest.raises(ValueError, match=r"^prefixes\[0\]\[1\] must be None where values are"):
        refused(cascade, good, v_cache=None, value_dim=6)
    assert backend.runtime is None or not backend.runtime.counters


def refused(cascade, prefixes, v_cache=0, **more):
    """The call with other prefixes; arrays stay on the host."""
    k, v = cascade.cached.caches
    options = {**cascade.cached.options, **more}
    v = v if v_cache is not None else None
    return cuattn.attention_cascade(cascade.cached.q, prefixes, k, v, **options)


# ---- the reference -------------------------------------------------------------------------------


def test_reference(rng):
    """Against attention over what each sequence sees, one by one."""
    for how in ({}, {"is_causal": True, "window": (50, 0), "q_lens": np.array([1, 2, 0])}):
        cascade = Cascade(rng, "float64", lens=[20, 0, 9], rows=3, prefixes=(5, 30), page_size=4,
                          new=0, sinks=np.ones(4), **how)  # fmt: skip
        cached = cascade.cached
        got = reference.attention_cascade(cached.q, cascade.prefixes, *cached.caches,
                                          return_lse=True, **cached.options)  # fmt: skip
        for ours, theirs in zip(got, cascade.problem.expected(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
