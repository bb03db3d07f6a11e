"""Relaxed accesses to shared memory, and fma, on the emulator."""

from __future__ import annotations

import emulator
import numpy as np
import pytest
from test_emulator import fails, run

# -- relaxed accesses to shared memory -------------------------------------------------------------

HINT = """
float* s = ptx::static_smem<float, 64>();
if (t == 0) ptx::st_shared(s, 0.0f);
__syncthreads();
"""
MIXED = {
    "plain write, relaxed read": (
        "race in shared memory",
        "if (t == 0) {\nif (fault) ptx::st_shared(s, 1.0f);\n"
        "else ptx::st_shared_relaxed(s, 1.0f);\n} else ptx::ld_shared_relaxed(s);",
    ),
    "plain read, relaxed write": (
        "race in shared memory",
        "if (t == 63) ptx::st_shared_relaxed(s, 1.0f);\n"
        "else if (fault) ptx::ld_shared(s);\nelse ptx::ld_shared_relaxed(s);",
    ),
    "plain write, relaxed write": (
        "race in shared memory",
        "if (t != 40) ptx::st_shared_relaxed(s, 1.0f);\n"
        "else if (fault) ptx::st_shared(s, 1.0f);\nelse ptx::st_shared_relaxed(s, 1.0f);",
    ),
    "plain write after relaxed accesses": (
        "race in shared memory",
        "ptx::ld_shared_relaxed(s);\nif (t % 32) ptx::st_shared_relaxed(s, float(t));\n"
        "if (!fault) __syncthreads();\nelse __syncwarp();\nif (t == 0) ptx::st_shared(s, 1.0f);",
    ),
    "plain read after relaxed writes of two warps": (
        "race in shared memory",
        "ptx::st_shared_relaxed(s, float(t));\nif (!fault) __syncthreads();\nelse __syncwarp();\n"
        "ptx::ld_shared(s);",
    ),
    "first write of all, plain": (
        "race in shared memory|never written",
        "if (t == 0) ptx::st_shared(s + 1, 1.0f);\nif (!fault) __syncthreads();\n"
        "if (t == 0) ptx::st_shared_relaxed(s + 1, 2.0f);\nelse ptx::ld_shared_relaxed(s + 1);",
    ),
    "two sizes": (
        "race in shared memory",
        "if (t < 2) ptx::st_shared(s + t, 0.0f);\n__syncthreads();\n"
        "if (t % 2 && fault) ptx::st_shared_relaxed((float2*)s, float2{1, 1});\n"
        "else ptx::st_shared_relaxed(s, 1.0f);",
    ),
    "never written": (
        "never written",
        "if (!fault) ptx::st_shared_relaxed(s + t, 1.0f);\n__syncthreads();\n"
        "ptx::ld_shared_relaxed(s + (t ^ 32));",
    ),
    "past the end": ("out of bounds", "ptx::st_shared_relaxed(s + t + 64 * fault, 1.0f);"),
    "misaligned": (
        "misaligned",
        "if (t == 0) ptx::st_shared_relaxed((double*)(s + 2 + fault), 1.0);",
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", MIXED)
def test_relaxed_rule(rule, seed):
    pattern, body = MIXED[rule]
    fails(pattern, HINT + body, seed=seed)


@pytest.mark.parametrize("size", [4, 8])
def test_relaxed_accesses_may_race(size):
    kind = {4: "float", 8: "double"}[size]
    body = f"""
    {kind}* s = ptx::static_smem<{kind}, 1>();
    ptx::st_shared_relaxed(s, static_cast<{kind}>(t / 32 + 1));
    const float seen = static_cast<float>(ptx::ld_shared_relaxed(s));
    __syncthreads();
    ptx::st_global(p.y + t, t % 2 ? seen : static_cast<float>(ptx::ld_shared(s)));
    """
    counters, y = run(body, block=64)
    assert set(y) <= {1, 2}
    assert len(set(y[::2])) == 1
    assert counters.shared_wavefronts == 2 * 3 * {4: 1, 8: 2}[size]


def test_relaxed_accesses_go_with_atomics():
    body = """
    int* s = ptx::static_smem<int, 1>();
    if (t == 0) ptx::st_shared(s, 0);
    __syncthreads();
    atomicAdd(s, 1);
    const int seen = fault ? ptx::ld_shared(s) : ptx::ld_shared_relaxed(s);
    ptx::st_global(p.y + t, static_cast<float>(seen));
    """
    fails("race in shared memory", body)
    y = run(body)[1]
    assert y.min() >= 1 and y.max() == 64


def test_relaxed_access_of_16_bytes_does_not_compile():
    with pytest.raises(RuntimeError, match="4 or 8 bytes"):
        run("ptx::ld_shared_relaxed(ptx::static_smem<float4, 1>());")


# -- fma ------------------------------------------------------------------------------------------


def fma(kind, a, b, c):
    """`fma_rn` and the plain expression, of three arrays of 64."""
    x = np.stack([a, b, c]).astype(kind)
    y = emulator.empty((2, 64), kind)
    name = {"f4": "float", "f8": "double"}[kind]
    body = f"""
    const {name}* x = reinterpret_cast<const {name}*>(p.x);
    {name}* y = reinterpret_cast<{name}*>(p.y);
    const {name} a = ptx::ld_global(x + t), b = ptx::ld_global(x + 64 + t);
    const {name} c = ptx::ld_global(x + 128 + t);
    ptx::st_global(y + t, ptx::fma_rn(a, b, c));
    ptx::st_global(y + 64 + t, a * b + c);
    """
    run(body, x=x, y=y)
    return y


@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_fma_rounds_once(kind):
    eps = np.finfo(kind).eps
    a = 1 + eps * np.arange(64)
    fused, plain = fma(kind, a, a, -1 - 2 * eps * np.arange(64))
    np.testing.assert_array_equal(fused, (eps * np.arange(64)) ** 2)
    assert (plain != fused).any()


def test_subnormals_are_kept():
    tiny = np.ldexp(np.arange(1.0, 65), -149)  # operands
    for product in fma("f4", tiny, np.ones(64), np.zeros(64)):
        np.testing.assert_array_equal(product, tiny)
    for total in fma("f4", np.zeros(64), np.ones(64), tiny):
        np.testing.assert_array_equal(total, tiny)
    half = np.ldexp(np.arange(1.0, 65), -64)  # results
    for product in fma("f4", half, np.full(64, 2.0**-70), np.zeros(64)):
        np.testing.assert_array_equal(product, np.ldexp(np.arange(1.0, 65), -134))
    tiny = np.ldexp(np.arange(1.0, 65), -1074)
    for total in fma("f8", tiny, np.ones(64), tiny):
        np.testing.assert_array_equal(total, 2 * tiny)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_fma_nan_is_the_canonical_one():
    payload = np.uint32([0x7FC01234, 0xFFC00000, 0x7F800001, 0xFFFFFFFF]).view(np.float32)
    for operands in ((np.tile(payload, 16), 1.0, 1.0), (1.0, 1.0, np.tile(payload, 16))):
        full = [np.broadcast_to(np.float32(v), (64,)) for v in operands]
        x = np.stack(full)
        assert (fma("f4", *x)[0].view(np.uint32) == 0x7FFFFFFF).all()
    infinite = np.full(64, np.inf)
    assert (fma("f4", infinite, np.zeros(64), np.ones(64))[0].view(np.uint32) == 0x7FFFFFFF).all()
    assert np.isnan(fma("f8", infinite, np.zeros(64), np.ones(64))[0]).all()
    assert (fma("f4", infinite, np.ones(64), np.ones(64))[0] == np.inf).all()
