"""Merges commute in all bits where the compiler fuses products into additions, as NVRTC does, and
products of score expressions are rounded as NumPy's are.

The emulator compiles kernels with contraction off; here they are compiled with it.
"""

from __future__ import annotations

import platform

import emulator
import numpy as np
import pytest
from emulator import build
from test_emulator import run

import cuattn


@pytest.fixture(autouse=True)
def _contraction(monkeypatch):
    for compiler in ((), (None,), (build.find_compiler(),)):
        build.runtime_library(*compiler)  # stays as it is
    flags = [flag.replace("contract=off", "contract=fast") for flag in build.FLAGS]
    flags += ["-fexpensive-optimizations"]  # when g++ contracts
    flags += ["-mfma"] if platform.machine() in ("x86_64", "AMD64") else []
    monkeypatch.setattr(build, "FLAGS", flags)
    build.kernel_library.cache_clear()
    yield
    build.kernel_library.cache_clear()


def equal(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.tobytes() == b.tobytes()


def test_the_compiler_contracts(rng):
    body = """
    const float a = ptx::ld_global(p.x + t), b = ptx::ld_global(p.x + (t ^ 1));
    ptx::st_global(p.y + t, a * a + b * b);
    """
    y = run(body, x=rng.random(64).astype(np.float32))[1]
    assert (y[::2] != y[1::2]).any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_states(rng, dtype):
    with emulator.activate():
        a, b = (cuattn.softmax_state(rng.standard_normal((200, 33)).astype(dtype)) for _ in "ab")
        equal(cuattn.merge(a, b), cuattn.merge(b, a))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_states_of_logits(rng, dtype):
    with emulator.activate():
        a, b = (
            cuattn.logits_state(
                rng.standard_normal((200, 33)).astype(dtype),
                rng.integers(0, 66, 200),
                index_offset=33 * i,
            )
            for i in range(2)
        )
        equal(cuattn.merge(a, b), cuattn.merge(b, a))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_selections(rng, dtype):
    with emulator.activate():
        a, b = (
            cuattn.softmax_topk_state(
                rng.standard_normal((200, 33)).astype(dtype), 3, index_offset=33 * i
            )
            for i in range(2)
        )
        equal(cuattn.merge(a, b), cuattn.merge(b, a))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_attention(rng, dtype):
    with emulator.activate():
        a, b = (
            (rng.standard_normal((40, 20)).astype(dtype), rng.standard_normal(40).astype(dtype))
            for _ in "ab"
        )
        equal(cuattn.merge_attention(*a, *b), cuattn.merge_attention(*b, *a))


@pytest.mark.parametrize("function", [cuattn.softmax, cuattn.log_softmax])
def test_a_row_alone(rng, function):
    """Nor does a fused product tell a row alone from one among others."""
    x = rng.standard_normal((3, 8000)).astype(np.float32)
    made = []
    for rows, num_sms in ((x, 1), (x[:1], 132)):
        with emulator.activate(arch="sm_90", num_sms=num_sms):
            made.append(function(rows)[0])
    assert made[0].tobytes() == made[1].tobytes()


def test_products_of_scores(rng):
    """No compiler knows that these two are the same."""
    x = np.abs(rng.standard_normal((1, 1, 9, 16))).astype(np.float32)
    args = {name: np.array(1.1, np.float32) for name in ("t", "u")}
    with emulator.activate(arch="sm_80"):
        score = "(s * t - abs(s) * u) * 1e9"
        out = cuattn.attention(x, x, x, score=score, score_args=args)
    np.testing.assert_allclose(out, np.broadcast_to(x.mean(axis=2, keepdims=True), x.shape), 1e-5)
