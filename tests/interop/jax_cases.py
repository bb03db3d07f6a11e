"""What the tests of cuattn.jax share. Without JAX they are skipped.

They run where JAX does: on the CPU, unless JAX_PLATFORMS says something else.
"""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import cuattn  # noqa: E402, F401
import cuattn.jax as cj  # noqa: E402, F401
from cuattn.jax import _calls  # noqa: E402

ON_CPU = jax.default_backend() == "cpu"


@pytest.fixture
def x64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def ran(monkeypatch):
    """Names and options of the calls that have run, in their order."""
    calls = []
    for name, (function, places) in _calls.FUNCTIONS.items():

        def recorded(*args, _name=name, _function=function, **options):
            calls.append((_name, options))
            return _function(*args, **options)

        monkeypatch.setitem(_calls.FUNCTIONS, name, (recorded, places))
    return calls


def leaves(results):
    return jax.tree.leaves(results)


def assert_same(got, want):
    """The same dtypes and, on the CPU, the same values as of NumPy.

    But for subnormal numbers: XLA has the CPU flush them, also where they are added up.
    """
    assert len(leaves(got)) == len(leaves(want))
    for ours, theirs in zip(leaves(got), leaves(want), strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if ours.dtype.kind in "iub":
            np.testing.assert_array_equal(ours, theirs)
        elif ON_CPU:
            wide = np.float64 if ours.dtype == np.float64 else np.float32
            lost = 0 if ours.dtype == np.float16 else 64 * float(np.finfo(wide).tiny)
            np.testing.assert_allclose(ours.astype(wide), theirs.astype(wide), rtol=0, atol=lost)
        else:
            assert_near(ours, theirs)


def assert_near(got, want, roundings=40):
    """Within some roundings of the largest."""
    for ours, theirs in zip(leaves(got), leaves(want), strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape
        coarse = min(ours.dtype, theirs.dtype, key=lambda d: ml_dtypes.finfo(d).nmant)
        theirs = theirs.astype(np.float64)
        finite = theirs[np.isfinite(theirs)]
        allowed = (
            roundings * float(ml_dtypes.finfo(coarse).eps) * max(1, np.abs(finite).max(initial=0))
        )
        np.testing.assert_allclose(ours.astype(np.float64), theirs, rtol=0, atol=allowed)


def plain_attention(
    q, k, v, *, is_causal=False, q_offset=None, window=None, scale=None, softcap=None, mask=None,
    bias=None, alibi_slopes=None, sinks=None, q_lens=None, kv_lens=None, layout="BHSD",
):  # fmt: skip
    """(y, lse) of arrays of four dimensions, as one writes it in JAX."""
    if layout == "BSHD":
        q, k, v = (array.swapaxes(1, 2) for array in (q, k, v))
    batch, heads, rows, dim = q.shape
    columns = k.shape[2]
    k, v = (jnp.repeat(array, heads // array.shape[1], 1) for array in (k, v))
    m = jnp.full(batch, rows) if q_lens is None else q_lens
    n = jnp.full(batch, columns) if kv_lens is None else kv_lens
    offset = n - m if q_offset is None else jnp.broadcast_to(q_offset, batch)
    i, j = jnp.arange(rows)[:, None], jnp.arange(columns)
    place = i + offset[:, None, None, None]
    s = (dim**-0.5 if scale is None else scale) * jnp.einsum("bhid,bhjd->bhij", q, k)
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    s = s if bias is None else s + bias
    if alibi_slopes is not None:
        slopes = jnp.broadcast_to(alibi_slopes, (batch, heads))[..., None, None]
        s = s - slopes * jnp.abs(place - j)
    seen = jnp.broadcast_to(j < n[:, None, None, None], s.shape)
    seen &= (i < m[:, None, None, None]) & (True if mask is None else mask)
    seen &= (j <= place) if is_causal else True
    if window is not None:
        seen &= (place - window[0] <= j) & (j <= place + window[1])
    s = jnp.where(seen, s, -jnp.inf)
    if sinks is not None:
        sink = jnp.where(i < m[:, None, None, None], sinks[:, None, None], -jnp.inf)
        s = jnp.concatenate([s, sink], -1)
    top = s.max(-1, keepdims=True)
    none = top == -jnp.inf
    e = jnp.where(s == -jnp.inf, 0, jnp.exp(s - jnp.where(none, 0, top)))
    total = e.sum(-1, keepdims=True)
    p = e / jnp.where(none, 1, total)
    lse = jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1, total)) + jnp.where(none, 0, top))
    y = jnp.einsum("bhij,bhjd->bhid", p[..., :columns], v)
    return y.swapaxes(1, 2) if layout == "BSHD" else y, lse[..., 0]


def random_attention(rng, dtype="float32", batch=2, heads=4, shared=2, rows=5, columns=7, dim=3):
    """(q, k, v) and every option at once."""

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    mask = rng.random((batch, 1, rows, columns)) < 0.8
    mask[:, :, rng.integers(rows)] = False
    arrays = (
        draw(batch, heads, rows, dim),
        draw(batch, shared, columns, dim),
        draw(batch, shared, columns, 4),
    )
    return arrays, {
        "is_causal": bool(rng.integers(2)),
        "window": (3, 4),
        "q_offset": rng.integers(0, 4, batch),
        "scale": 0.3,
        "softcap": 5.0,
        "mask": mask,
        "bias": draw(heads, rows, columns),
        "alibi_slopes": abs(draw(heads)),
        "sinks": draw(heads),
        "q_lens": rng.integers(1, rows + 1, batch),
        "kv_lens": rng.integers(1, columns + 1, batch),
    }  # fmt: skip
