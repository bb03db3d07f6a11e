"""float32 results of 16-bit inputs, on every backend: what is rounded to the results by default."""

from __future__ import annotations

import emulator
import numpy as np
import pytest
from attention_cases import Problem, any_options, arranged, put, put_options
from cases import Guarded
from kvcache_cases import Cached
from test_attention_varlen import Ragged
from tolerance import dtype_of

import cuattn

HALVES = ("float16", "bfloat16")
FLOAT32 = np.dtype(np.float32)


def same_but_for_rounding(backend, function, *args, **options):
    """The results in float32 and by default, on the host. One is the other rounded, the lse the
    same; and most numbers had been rounded."""
    wide, lse = map(backend.asnumpy, function(*args, dtype="float32", return_lse=True, **options))
    plain, same = map(backend.asnumpy, function(*args, return_lse=True, **options))
    assert wide.dtype == FLOAT32 and plain.dtype.itemsize == 2
    rounded = wide.astype(plain.dtype)
    np.testing.assert_array_equal(rounded.view(np.uint16), plain.view(np.uint16))
    np.testing.assert_array_equal(lse, same)
    assert np.mean(rounded[wide != 0] != wide[wide != 0]) > 0.9
    return wide, lse


# Tiles of every kernel: rows of whole chunks, and of one element more; the general kernel with and
# without rules; Hopper's with its result in shared memory of its own and in the place of Q.
CASES = {
    "whole chunks": {"dims": (64, 64), "lengths": (70, 130)},
    "no chunks": {"dims": (59, 35), "lengths": (33, 70)},
    "one column": {"dims": (8, 1), "lengths": (150, 40)},
    "wide": {"dims": (128, 128), "lengths": (140, 90), "is_causal": True},
    "in the place of Q": {"dims": (192, 136), "lengths": (150, 90), "window": (70, 3)},
    "two blocks of columns": {"dims": (40, 200), "lengths": (20, 50), "bias": np.ones((20, 50))},
    "widest": {"dims": (256, 256), "lengths": (30, 100), "softcap": 3.0},
    "packed heads": {"heads": (16, 1), "lengths": (9, 60), "sinks": np.linspace(-3, 3, 16)},
    "few queries": {"heads": (4, 2), "lengths": (3, 1100), "sinks": np.linspace(-3, 3, 4)},
    "few queries, no chunks": {"dims": (20, 27), "lengths": (1, 1030)},
    "padding": {
        "batch": 2, "lengths": (80, 70), "q_lens": np.array([80, 13]), "kv_lens": np.array([0, 70]),
    },
}  # fmt: skip


@pytest.mark.parametrize("how", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_kernels(backend, rng, how, layout):
    problem = Problem(rng, rng.choice(HALVES), **how)
    arrays = [put(backend, np.ascontiguousarray(arranged(a, layout))) for a in problem.arrays]
    options = put_options(backend, problem.options)
    out, lse = same_but_for_rounding(backend, cuattn.attention, *arrays, layout=layout, **options)
    problem.check(arranged(out, layout).astype(problem.q.dtype), lse)


def test_all_options(backend, rng):
    for op in HALVES:
        seen = np.zeros(1, bool)
        while not seen.any():  # a draw of lengths, window and offset may leave nothing
            options = any_options(rng, 2, 4, (37, 83))
            problem = Problem(rng, op, 2, (4, 2), (37, 83), **options)
            seen = problem.seen
        arrays = [put(backend, a) for a in problem.arrays]
        same_but_for_rounding(backend, cuattn.attention, *arrays, **put_options(backend, options))


def test_blocks_after_one_another(rng):
    """On Hopper a block goes on with the next rows, whose Q takes the place of the last one."""
    for dims in ((64, 64), (192, 128), (256, 256)):
        problem = Problem(rng, "bfloat16", heads=(2, 2), lengths=(200, 70), dims=dims)
        with emulator.activate("sm_90a", num_sms=2) as runtime:
            out = cuattn.attention(*problem.clean, dtype=np.float32)
            plain = cuattn.attention(*problem.clean)
        assert [k.header for k in runtime.kernels] == 2 * ["attention/forward_sm90.cuh"]
        np.testing.assert_array_equal(out.astype(plain.dtype), plain)


def test_sequences(backend, rng):
    ragged = Ragged(rng, "bfloat16", heads=(4, 2))
    arrays = [put(backend, a) for a in (*ragged.arrays, *ragged.ends)]
    out, lse = same_but_for_rounding(backend, cuattn.attention_varlen, *arrays)
    ragged.check(out.astype(ragged.arrays[0].dtype), lse)


@pytest.mark.parametrize(
    "how",
    [
        {"dims": (64, 64), "page_size": 16, "new": 2, "rows": 2},
        {"dims": (40, 30), "heads": (6, 3)},
        {"dims": (256, 200), "page_size": 5, "heads": (4, 4)},
        {"dims": (576, 576), "value_dim": 512, "page_size": 16, "heads": (64, 1)},
        {"dims": (128, 128), "heads": (64, 2), "lens": [700, 300]},
    ],
    ids=str,
)
def test_caches(backend, rng, how):
    """Keys of one block, and of several, whose parts the last one merges."""
    cached = Cached(rng, rng.choice(HALVES), **{"lens": [400, 3, 150], **how})

    def call(**options):
        caches = [put(backend, a) for a in cached.caches]
        given = put_options(backend, cached.options)
        q = put(backend, cached.q)
        return cuattn.attention_kvcache(q, *caches, layout=cached.layout, **given, **options)

    for split_size in (128, None):
        same_but_for_rounding(backend, call, split_size=split_size)


def test_prefixes(backend, rng):
    """The parts are in float32, too."""
    q, k, v = (put(backend, a) for a in Problem(rng, "bfloat16", 3, (4, 2), (2, 40)).clean)
    shared = put(backend, rng.standard_normal((2, 2, 50, 64)).astype(dtype_of("bfloat16")))
    prefixes = [tuple(shared)]
    out = backend.asnumpy(cuattn.attention_cascade(q, prefixes, k, v, dtype=np.float32))
    assert out.dtype == FLOAT32
    first, *own = (backend.asnumpy(a) for a in (shared, k, v))
    whole = [np.concatenate([np.broadcast_to(a, b.shape[:2] + a.shape[1:]), b], axis=2)
             for a, b in zip(first, own, strict=True)]  # fmt: skip
    ref = cuattn.reference.attention(backend.asnumpy(q), *whole)
    assert abs(out - ref).max() < 2.0**-9 * abs(ref).max()
    assert np.mean(out.astype(q.dtype) != out) > 0.9


def test_merged_parts(backend, rng):
    """What it is for: 256 results over parts, in bfloat16 each with an error of its own."""
    q, k, v = Problem(rng, "bfloat16", 1, (2, 2), (9, 256 * 4)).clean
    errors = []
    ref = cuattn.reference.attention(q, k, v)
    parts = [
        np.broadcast_to(q, (256, *q.shape[1:])),
        *(a.reshape(2, 256, 4, 64).swapaxes(0, 1) for a in (k, v)),
    ]
    arrays = [put(backend, np.ascontiguousarray(a)) for a in parts]
    for dtype in (None, np.float32):
        outs, lses = cuattn.attention(*arrays, dtype=dtype, return_lse=True)
        out, _ = cuattn.merge_attention_states(outs[:, None], lses[:, None])
        errors.append(np.sqrt(np.mean(np.square(backend.asnumpy(out).astype(np.float64) - ref))))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("layout", ["contiguous", "padded", "strided", "misaligned", "fortran"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 35), (192, 192)], ids=str)
def test_out(backend, rng, layout, dims):
    """Every element is written, nothing beside it: at the end of sequences and of rows, too."""
    ragged = Ragged(rng, "float16", lengths=[(70, 40), (0, 3), (131, 60)], dims=dims)
    arrays = [put(backend, a) for a in (*ragged.arrays, *ragged.ends)]
    out = Guarded(backend, (201, 2, dims[1]), FLOAT32, layout)
    assert cuattn.attention_varlen(*arrays, dtype=np.float32, out=out.out) is out.out
    out.check_rim()
    ragged.check(backend.asnumpy(out.out).astype(np.float16))
    few = Guarded(backend, (1, 2, 1, dims[1]), FLOAT32, layout)
    problem = Problem(rng, "float16", dims=dims, lengths=(1, 1050))
    cuattn.attention(*(put(backend, a) for a in problem.arrays), dtype=np.float32, out=few.out)
    few.check_rim()
    problem.check(backend.asnumpy(few.out).astype(np.float16))


def test_other_dtypes(backend, rng):
    """That of q is always allowed, no other than float32."""
    wrong = {
        "float16": "bfloat16",
        "bfloat16": "float64",
        "float32": "float16",
        "float64": "float32",
    }
    for name, other in wrong.items():
        q = put(backend, rng.standard_normal((3, 4)).astype(dtype_of(name)))
        assert cuattn.attention(q, q, q, dtype=dtype_of(name)).dtype == dtype_of(name)
        for dtype in (dtype_of(other), np.int32):
            with pytest.raises(TypeError, match="^dtype must be "):
                cuattn.attention(q, q, q, dtype=dtype)
        with pytest.raises((TypeError, ValueError), match="^out must have dtype"):
            cuattn.attention(q, q, q, out=put(backend, np.empty((3, 4), dtype_of(other))))
    q = put(backend, np.zeros((3, 4), np.float16))
    with pytest.raises((TypeError, ValueError), match="^out must have dtype float32"):
        cuattn.attention(q, q, q, dtype=np.float32, out=put(backend, np.empty((3, 4), np.float16)))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_bytes(rng, arch):
    """Q, K and V are read as before; the result is written once, in whole sectors."""
    problem = Problem(rng, "float16", heads=(2, 2), lengths=(150, 100))
    written, read = [], []
    for dtype in (None, np.float32):
        with emulator.activate(arch) as runtime:
            out = cuattn.attention(*problem.clean, dtype=dtype)
        counters = runtime.total()
        written.append(counters.global_bytes_written - out.nbytes)
        read.append(counters.global_bytes_read + counters.bulk_bytes)
        if dtype is not None:
            assert 32 * counters.global_sectors_written == out.nbytes
    assert written == [0, 0] and read[0] == read[1]
