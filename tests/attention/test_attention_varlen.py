"""attention_varlen on every backend: each sequence as attention alone would have it."""

from __future__ import annotations

import numpy as np
import pytest
from attention_cases import INF, NAN, OPS, Problem, put, put_options
from cases import LAYOUTS, Guarded
from tolerance import dtype_of, lse_dtype

import cuattn
from cuattn import reference

# (queries, keys) of each sequence: none of either, one, more than a tile, more than a block.
LENGTHS = [(5, 9), (0, 0), (130, 70), (0, 12), (3, 0), (1, 200), (64, 64), (17, 17)]


def cut(array, b, sizes, fill):
    """Mask or bias of one sequence, (1, 1 or H, m, n)."""
    array = array[(None,) * (4 - array.ndim)]
    array = array[b if len(array) > 1 else 0]
    own = [most if size == 1 else size for size, most in zip(array.shape[1:], sizes, strict=True)]
    array = np.broadcast_to(array, (len(array), *own))
    full = np.full((1, len(array), *(max(a, b) for a, b in zip(own, sizes, strict=True))), fill)
    full = full.astype(array.dtype)
    full[0, :, : own[0], : own[1]] = array
    return full[:, :, : sizes[0], : sizes[1]]


class Ragged:
    """A `Problem` for each sequence, their arrays end to end."""

    def __init__(self, rng, op="float16", lengths=LENGTHS, heads=(2, 1), dims=(64, 64), **options):
        self.options, self.problems = options, []
        for b, sizes in enumerate(lengths):
            own = dict(options)
            for name in ("q_lens", "kv_lens", "q_offset"):
                if np.ndim(own.get(name, 0)):
                    own[name] = own[name][b : b + 1]
            if np.ndim(own.get("alibi_slopes")) == 2:
                own["alibi_slopes"] = own["alibi_slopes"][b]
            for name, fill in (("mask", False), ("bias", 0)):
                if name in own:
                    own[name] = cut(own[name], b, sizes, fill)
            self.problems.append(Problem(rng, op, 1, heads, sizes, dims, **own))
        if op == "tf32":
            options["precision"] = "tf32"
        empty = Problem(rng, op, 1, heads, (0, 0), dims)
        self.arrays = tuple(
            np.concatenate([p.arrays[i][0].swapaxes(0, 1) for p in (*self.problems, empty)])
            for i in range(3)
        )
        ends = [np.cumsum([0, *(one[i] for one in lengths)]) for i in (0, 1)]
        self.ends = tuple(e.astype(rng.choice([np.int32, np.int64])) for e in ends)

    def check(self, out, lse=None):
        assert out.dtype == self.arrays[0].dtype
        assert out.shape == (*self.arrays[0].shape[:2], self.arrays[2].shape[2])
        for p, begin, end in zip(self.problems, self.ends[0], self.ends[0][1:], strict=False):
            part = np.ascontiguousarray(out[begin:end].swapaxes(0, 1))
            p.check(part[None], None if lse is None else lse[None, :, begin:end])


def call(backend, arrays, ends, options, **more):
    arrays = [put(backend, a) for a in (*arrays, *ends)]
    options = put_options(backend, options)
    got = cuattn.attention_varlen(*arrays, **options, **more)
    results = got if isinstance(got, tuple) else (got,)
    assert all(isinstance(one, backend.xp.ndarray) for one in results)
    results = tuple(backend.asnumpy(one) for one in results)
    return results if isinstance(got, tuple) else results[0]


def verify(backend, rng, op="float16", **how):
    ragged = Ragged(rng, op, **how)
    before = [a.tobytes() for a in (*ragged.arrays, *ragged.ends)]
    out, lse = call(backend, ragged.arrays, ragged.ends, ragged.options, return_lse=True)
    assert lse.dtype == lse_dtype(out.dtype)
    assert lse.shape == ragged.arrays[0].shape[1::-1]
    assert backend.ran() or out.size == 0
    ragged.check(out, lse)
    assert [a.tobytes() for a in (*ragged.arrays, *ragged.ends)] == before
    return ragged, out, lse


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_dtypes(backend, rng, op, is_causal):
    verify(backend, rng, op, is_causal=is_causal)


@pytest.mark.parametrize("dims", [(59, 59), (192, 128)], ids=str)
def test_head_dims(backend, rng, dims):
    verify(backend, rng, dims=dims, lengths=LENGTHS[:4])


@pytest.mark.parametrize(
    "lengths",
    [
        [(7, 30)],
        [(0, 0), (0, 0), (4, 5), (0, 0)],
        [(1, 1)] * 70,  # more sequences than a warp looks at together
        [(0, 3)] * 40 + [(9, 9)] + [(2, 0)] * 5,
        [(1, 40 + i) for i in range(20)],  # decoding
        [(300, 300), (1, 1)],
    ],
    ids=["one", "gaps", "many", "empty", "decode", "long"],
)
def test_lengths(backend, rng, lengths):
    verify(backend, rng, lengths=lengths, heads=(2, 2))
    verify(backend, rng, lengths=lengths, heads=(2, 1), is_causal=True, window=(20, 3))


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)], ids=str)
def test_groups_of_heads(backend, rng, heads):
    verify(backend, rng, heads=heads, is_causal=True)


def test_positions(backend, rng):
    n = len(LENGTHS)
    verify(backend, rng, is_causal=True, q_offset=5)
    verify(backend, rng, window=(7, 2), q_offset=rng.integers(-9, 60, n))
    verify(backend, rng, is_causal=True, q_offset=-4, sinks=np.array([0.5, -1.0], np.float32))


def test_lens(backend, rng):
    q_lens, kv_lens = (np.array([rng.integers(0, one[i] + 1) for one in LENGTHS]) for i in (0, 1))
    for options in ({}, {"is_causal": True}, {"window": (30, 5), "q_offset": 3}):
        verify(backend, rng, q_lens=q_lens, kv_lens=kv_lens.astype(np.int32), **options)
        verify(backend, rng, kv_lens=kv_lens, sinks=np.ones(2), **options)


@pytest.mark.parametrize(
    "shape",
    [(8, 2, 130, 200), (1, 1, 40, 50), (8, 1, 1, 200), (2, 130, 1), (99,), (200, 300), ()],
    ids=str,
)
def test_mask_and_bias(backend, rng, shape):
    """Smaller than the longest sequence, larger, and one for all places."""
    mask = np.asarray(rng.random(shape) < 0.7)
    bias = np.asarray(rng.standard_normal(shape)).astype(np.float16)
    verify(backend, rng, mask=mask)
    verify(backend, rng, bias=bias, alibi_slopes=np.array([0.25, 0.1], np.float32))
    verify(backend, rng, mask=mask, bias=bias, is_causal=True)


@pytest.mark.parametrize("op", OPS)
def test_all_options(backend, rng, op):
    n = len(LENGTHS)
    bias = {"float16": "float16", "bfloat16": "bfloat16", "float64": "float64"}.get(op, "float32")
    verify(
        backend,
        rng,
        op,
        heads=(4, 2),
        is_causal=bool(rng.random() < 0.5),
        window=(int(rng.integers(90)), int(rng.integers(90))),
        q_offset=rng.integers(-3, 90, n),
        scale=float(rng.uniform(-0.3, 0.3)),
        softcap=float(rng.uniform(1, 20)),
        mask=rng.random((n, 1, 100, 150)) < 0.7,
        bias=rng.standard_normal((4, 90, 170)).astype(dtype_of(bias)),
        alibi_slopes=rng.uniform(0, 0.2, (n, 4)).astype(np.float32),
        sinks=rng.standard_normal(4).astype(np.float32),
        q_lens=np.array([rng.integers(0, one[0] + 1) for one in LENGTHS]),
        kv_lens=np.array([rng.integers(0, one[1] + 1) for one in LENGTHS]),
    )


def test_hints_change_nothing(backend, rng):
    ragged = Ragged(rng, mask=rng.random((8, 1, 1, 200)) < 0.7, is_causal=True)
    results = {
        call(backend, ragged.arrays, ragged.ends, ragged.options, **hints).tobytes()
        for hints in (
            {},
            {"max_seqlen_q": 130, "max_seqlen_k": 200},
            {"max_seqlen_q": np.int64(1000), "max_seqlen_k": 0},
            {"max_seqlen_k": 1},
        )
    }
    assert len(results) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, rng, layout):
    ragged = Ragged(rng, lengths=LENGTHS[:5], is_causal=True)
    arrays = [LAYOUTS[layout](a) for a in ragged.arrays]
    ends = [np.repeat(e, 2)[::2] for e in ragged.ends]
    ragged.check(*call(backend, arrays, ends, ragged.options, return_lse=True))


def test_packed(backend, rng):
    """q, k and v as slices of one array (total, 3, H, D)."""
    ragged = Ragged(rng, lengths=[(20, 20), (33, 33)], heads=(2, 2), is_causal=True)
    packed = np.stack(ragged.arrays, axis=1)
    ragged.check(*call(backend, [packed[:, i] for i in range(3)], ragged.ends, ragged.options,
                       return_lse=True))  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "padded", "strided", "misaligned", "fortran"])
def test_out(backend, rng, layout):
    ragged = Ragged(rng, "float32", is_causal=True)
    arrays = [backend.asarray(a) for a in (*ragged.arrays, *ragged.ends)]
    total = len(ragged.arrays[0])
    out = Guarded(backend, (total, 2, 64), np.dtype(np.float32), layout)
    lse = Guarded(backend, (2, total), np.dtype(np.float32), layout)
    got = cuattn.attention_varlen(*arrays, is_causal=True, return_lse=True, out=(out.out, lse.out))
    assert got[0] is out.out and got[1] is lse.out
    out.check_rim()
    lse.check_rim()
    ragged.check(backend.asnumpy(got[0]), backend.asnumpy(got[1]))
    alone = Guarded(backend, (total, 2, 64), np.dtype(np.float32), layout)
    assert cuattn.attention_varlen(*arrays, is_causal=True, out=alone.out) is alone.out
    alone.check_rim()
    ragged.check(backend.asnumpy(alone.out))


@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(0, 5), (0, 0)], [(4, 0), (0, 0)]], ids=str)
def test_empty(backend, rng, lengths):
    for op in ("float16", "float64"):
        ragged = Ragged(rng, op, lengths=lengths, sinks=np.ones(2), is_causal=True)
        out, lse = call(backend, ragged.arrays, ragged.ends, ragged.options, return_lse=True)
        assert lse.shape == ragged.arrays[0].shape[1::-1]
        assert not out.any() and (lse == 1).all()
        ragged.check(out, lse)


def test_neighbours_do_not_leak(backend, rng):
    """NaN in every other sequence, which tiles of this one may touch."""
    ragged = Ragged(rng, lengths=[(20, 33), (9, 15), (40, 70)], is_causal=True)
    q, k, v = (a.copy() for a in ragged.arrays)
    for ends, arrays in zip(ragged.ends, ((q,), (k, v)), strict=True):
        for a in arrays:
            a[: ends[1]] = NAN
            a[ends[2] :] = -INF
    out, lse = call(backend, (q, k, v), ragged.ends, ragged.options, return_lse=True)
    begin, end = ragged.ends[0][1:3]
    part = np.ascontiguousarray(out[begin:end].swapaxes(0, 1))
    ragged.problems[1].check(part[None], lse[None, :, begin:end])


def test_as_attention_of_each(backend, rng):
    """Bit by bit what attention gives, and twice the same."""
    ragged = Ragged(rng, heads=(4, 2), is_causal=True)
    out = call(backend, ragged.arrays, ragged.ends, ragged.options)
    assert call(backend, ragged.arrays, ragged.ends, ragged.options).tobytes() == out.tobytes()
    q, k, v = ragged.arrays
    for b in range(len(LENGTHS)):
        i, j = (slice(*e[b : b + 2]) for e in ragged.ends)
        parts = [backend.asarray(np.ascontiguousarray(a)) for a in (q[i], k[j], v[j])]
        alone = cuattn.attention(*parts, is_causal=True, layout="BSHD")
        assert backend.asnumpy(alone).tobytes() == np.ascontiguousarray(out[i]).tobytes()


def test_reference(rng):
    """The reference of ragged sequences is that of each."""
    ragged = Ragged(rng, "float64", mask=rng.random((8, 2, 100, 1)) < 0.7, window=(30, 2))
    got = reference.attention_varlen(
        *ragged.arrays, *ragged.ends, return_lse=True, **ragged.options
    )
    ragged.check(*got)


def test_bad_values_on_a_device_stay_inside(backend, rng, monkeypatch):
    """Device arrays are trusted, but nothing is read or written beyond q, k and v."""
    if backend.name == "numpy":
        pytest.skip("NumPy arrays are checked")
    monkeypatch.setattr("cuattn._attention.request.check_values", lambda *_: None)
    q = backend.asarray(rng.standard_normal((50, 2, 64)).astype(np.float16))
    bads = [[0, 60], [-5, 20, 70], [0, 40, 10, 10], [50, 0], [2**40, 2**40], [-(2**62), 2**62]]
    if backend.on_device:  # rows that two sequences have are written twice, in either order
        bads.append([0, 40, 10, 50])
    for bad in bads:
        ends = backend.asarray(np.array(bad))
        for value in (None, 2**62, -(2**62)):
            lens = {}
            if value is not None:
                values = backend.asarray(np.full(len(bad) - 1, value))
                lens = dict.fromkeys(("q_lens", "kv_lens", "q_offset"), values)
            out = Guarded(backend, (50, 2, 64), np.dtype(np.float16), "padded")
            good = backend.asarray(np.linspace(0, 50, len(bad)).astype(int))
            for cu_seqlens in ((ends, ends), (good, ends), (ends, good)):
                cuattn.attention_varlen(q, q, q, *cu_seqlens, is_causal=True, out=out.out, **lens)
                out.check_rim()
