"""Operands whose elements lie more than 2^31 elements apart: a few bytes of a sparse mapping."""

from __future__ import annotations

import numpy as np
import pytest
from cases import FAR, draw, untouched
from tolerance import NAIVE, assert_close, exact

import cuattn
from cuattn import reference


def spread_out(backend, a, axis, more=0):
    """`a` (2-D) with FAR elements from one index of `axis` to the next, and `more` behind it."""
    strides = [FAR * a.itemsize if d == axis else a.itemsize for d in range(2)]
    end = (a.shape[axis] - 1) * FAR + a.shape[1 - axis]
    memory = untouched(backend, end + more, a.dtype)
    view = backend.xp.lib.stride_tricks.as_strided(memory[:end], a.shape, strides)
    view[...] = backend.asarray(a)
    return view, memory[end:]


def verify(backend, x, x_view, axis, **options):
    got = cuattn.softmax(x_view, axis, **options)
    options = {key: backend.asnumpy(value) for key, value in options.items()}
    ref = reference.softmax(exact(x), axis, **options)
    assert_close(backend.asnumpy(got), ref, NAIVE["softmax"](x, axis, **options))


@pytest.mark.parametrize("far_axis", [0, 1])
def test_input(backend, rng, far_axis):
    """Contiguous rows that are far apart; rows whose elements are."""
    x = draw(rng, (2, 33) if far_axis == 0 else (33, 2), "float16")
    verify(backend, x, spread_out(backend, x, far_axis)[0], 1)


def test_mask(backend, rng):
    """A mask that is far apart along a dimension of rows that is not the slowest."""
    x, where = draw(rng, (2, 3, 33)), rng.random((2, 3, 33)) < 0.6
    memory = untouched(backend, FAR + 128, np.bool_)
    view = backend.xp.lib.stride_tricks.as_strided(memory, where.shape, (64, FAR // 2, 1))
    view[...] = backend.asarray(where)
    verify(backend, x, backend.asarray(x), -1, where=view)


def test_row_start(backend, rng):
    """Input and output rows that begin beyond 2^32 bytes of their allocation."""
    x = draw(rng, (133,), "float16")
    memory = untouched(backend, FAR + 400, np.float16)
    x_view, out = memory[FAR + 1 : FAR + 134], memory[FAR + 202 : FAR + 335]
    x_view[...] = backend.asarray(x)
    assert cuattn.softmax(x_view, out=out) is out
    assert_close(backend.asnumpy(out), reference.softmax(exact(x)), NAIVE["softmax"](x))


@pytest.mark.parametrize("far_axis", [0, 1])
def test_attention(backend, rng, far_axis):
    """Keys and values that are far apart, by rows and by columns; an output far from its start."""
    if backend.name == "numpy":
        pytest.skip("cuattn.reference leaves offsets to NumPy")
    shape = (2, 64) if far_axis == 0 else (40, 2)
    q, k = (draw(rng, shape, "float16", spread=1) for _ in range(2))
    view, rest = spread_out(backend, k, far_axis, q.size)
    if backend.xp is np:  # a GPU with 8 GB has no room for a second one
        rest = untouched(backend, FAR + q.size, np.float16)[FAR:]
    out = rest.reshape(shape)
    assert cuattn.attention(backend.asarray(q), view, view, out=out) is out
    ref = reference.attention(exact(q), exact(k), exact(k))
    assert abs(backend.asnumpy(out) - ref).max() <= 2.0**-9 * abs(k).max()
