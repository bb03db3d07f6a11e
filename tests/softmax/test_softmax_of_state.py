"""softmax and log_softmax of parts of rows whose states are known, and of selected elements."""

from __future__ import annotations

import cases
import ml_dtypes
import numpy as np
import pytest
from cases import INF, LAYOUTS, Guarded, draw
from tolerance import NAIVE, assert_close, exact, lse_dtype, result_dtype

import cuattn
from cuattn import SoftmaxState, reference

BOTH = pytest.mark.parametrize("name", ["softmax", "log_softmax"])


def put(backend, value):
    return backend.asarray(value) if isinstance(value, np.ndarray) else value


def cut_of(x, axis, begin, end):
    """Columns of the last reduced axis."""
    along = {None: x.ndim - 1, (): 0}.get(axis, axis if isinstance(axis, int) else 0)
    along = axis[-1] if isinstance(axis, tuple) and axis else along
    where = [slice(None)] * x.ndim
    if axis != ():
        where[along] = slice(begin, end)
    return tuple(where)


def state_of(backend, x, axis, parts, scale=None):
    """That of whole rows, from those of their parts."""
    found = None
    for part in parts:
        one = cuattn.softmax_state(backend.asarray(x[part]), axis, scale=put(backend, scale))
        found = one if found is None else cuattn.merge(found, one)
    return found


def verify(backend, x, axis=-1, *, name="softmax", layout=None, dtype=None, cuts=None, **options):
    """Each part of the rows against the same part of the reference."""
    length = x.shape[axis if isinstance(axis, int) else axis[-1] if axis else -1]
    cuts = [0, *(cuts or [length // 3]), length] if axis != () else [0, length]
    parts = [cut_of(x, axis, *ends) for ends in zip(cuts, cuts[1:], strict=False)]
    where, scale, shown = options.get("where"), options.get("scale"), x
    if where is not None:
        shown = np.where(where, x, np.array(-INF, x.dtype))
    if lse_dtype(result_dtype(x, dtype)) == np.float64 and x.dtype.kind not in "iu":
        shown = shown.astype(np.float64)  # else the state has the digits of float32
    state = state_of(backend, shown, axis, parts, scale)
    kept = [backend.asnumpy(part).tobytes() for part in state]
    ref = getattr(reference, name)(exact(x), axis, **options)
    naive = NAIVE[name](x, axis, dtype=result_dtype(x, dtype), **options)
    whole = np.empty(x.shape, result_dtype(x, dtype))
    for part in parts:
        given = {key: put(backend, value) for key, value in options.items()}
        if where is not None:
            given["where"] = backend.asarray(np.broadcast_to(where, x.shape)[part])
        host = x[part] if layout is None else LAYOUTS[layout](x[part])
        device_x, before = backend.asarray(host), host.tobytes()
        got = getattr(cuattn, name)(device_x, axis, dtype=dtype, state=state, **given)
        assert isinstance(got, backend.xp.ndarray) and got.dtype == result_dtype(x, dtype)
        whole[part] = backend.asnumpy(got)
        assert backend.asnumpy(device_x).tobytes() == before
    assert_close(whole, ref, naive, probabilities=name == "softmax")
    assert backend.ran() or x.size == 0
    assert kept == [backend.asnumpy(part).tobytes() for part in state]


# ---- Sizes and dtypes ----


@BOTH
@pytest.mark.parametrize("n", [2, 3, 33, 129, 1025, 4097, 32769])
def test_length(backend, rng, name, n):
    verify(backend, draw(rng, (3, n)), name=name)


@BOTH
@pytest.mark.parametrize("n", [3, 33, 129, 1025])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int32", "uint8"])
def test_dtype(backend, rng, name, dtype, n):
    verify(backend, draw(rng, (5, n), dtype), name=name)


@BOTH
def test_many_parts(backend, rng, name):
    verify(backend, draw(rng, (4, 200)), name=name, cuts=[1, 2, 5, 64, 65, 191])


@BOTH
def test_many_tiles(backend, rng, name):
    """Of rows that are more than one, in one part."""
    verify(backend, draw(rng, (5, 6000)), name=name, cuts=[5000])


@pytest.mark.parametrize("rows", [1, 2, 7, 33, 300])
def test_rows(backend, rng, rows):
    verify(backend, draw(rng, (rows, 40)))


@BOTH
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("given", ["float16", "bfloat16", "float32", "float64", "int16"])
def test_dtype_option(backend, rng, name, given, dtype):
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    verify(backend, draw(rng, (3, 70), given, 1.0), name=name, dtype=np.dtype(dtype))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (2, 0, 3), (0, 0)])
def test_without_elements(backend, shape):
    """The log-sum-exp is that of the whole rows, of which this part has nothing."""
    x = backend.asarray(np.ones(shape, np.float32))
    m = backend.asarray(np.full(shape[:-1], 2, np.float32))
    state = SoftmaxState(m, backend.asarray(np.full(shape[:-1], 4, np.float32)))
    y, lse = cuattn.softmax(x, state=state, return_lse=True)
    np.testing.assert_allclose(backend.asnumpy(y), np.full(shape, np.exp(-1) / 4), rtol=1e-6)
    np.testing.assert_allclose(backend.asnumpy(lse), np.full(shape[:-1], 3.3862944), rtol=1e-6)
    y = cuattn.log_softmax(x, state=state)
    np.testing.assert_allclose(backend.asnumpy(y), np.full(shape, -2.3862944), rtol=1e-6)


# ---- Layouts and axes ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [5, 50, 1550])
def test_layout(backend, rng, layout, n):
    verify(backend, draw(rng, (5, n)), layout=layout)


@pytest.mark.parametrize("layout", ["misaligned", "padded", "fortran"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "uint8"])
def test_layout_dtype(backend, rng, dtype, layout):
    verify(backend, draw(rng, (5, 150), dtype), layout=layout, name="log_softmax")


@BOTH
@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), (1, 2), (0, 1, 2), None, ()])
def test_axis(backend, rng, name, axis):
    verify(backend, draw(rng, (4, 5, 33)), axis, name=name)


@pytest.mark.parametrize("n", [96, 300, 3000])  # 96: whole tiles
def test_long_columns(backend, rng, n):
    verify(backend, draw(rng, (n, 37)), 0)


def test_many_axes(backend, rng):
    x = draw(rng, (2,) * 12).transpose(rng.permutation(12))
    for axis in (-1, (1, 5, 11), None):
        verify(backend, x, axis)


def test_many_axes_without_elements(backend, rng):
    """No copy has fewer dimensions."""
    for shape in ((2,) * 11 + (0,), (0,) + (2,) * 11):
        x = np.empty(shape, np.float32).transpose(rng.permutation(12))
        shown = backend.asarray(x)
        for axis in (*range(0, 12, 5), x.shape.index(0)):
            want = reference.softmax_state(x, axis)
            state = cuattn.softmax_state(shown, axis)
            for got, expected in zip(state, want, strict=True):
                np.testing.assert_array_equal(backend.asnumpy(got), expected)
            assert cuattn.softmax(shown, axis).shape == shape_of(x, axis, x.shape[axis])
            _, lse = cuattn.softmax(shown, axis, state=state, return_lse=True)
            np.testing.assert_array_equal(backend.asnumpy(lse), reference.logsumexp(x, axis))
            for function in (cuattn.top_k, cuattn.softmax_topk):
                assert function(shown, 0, axis=axis).values.shape == shape_of(x, axis, 0)


def shape_of(x, axis, size):
    return x.shape[:axis] + (size,) + x.shape[axis + 1 :]


@pytest.mark.parametrize("layout", cases.OUTS[:-1])
@pytest.mark.parametrize("n", [3, 129, 1025])
def test_strides_of_a_state(backend, rng, n, layout):
    """m and l of strides of their own, results as well."""
    x = backend.asarray(draw(rng, (6, 5, n)))
    state = cuattn.softmax_state(x)
    want, lse = map(backend.asnumpy, cuattn.softmax(x, state=state, return_lse=True))
    kinds = rng.choice(cases.OUTS[:-1], 2)
    m, l = (Guarded(backend, (6, 5), np.float32, str(kind)).out for kind in kinds)  # noqa: E741
    m[...], l[...] = state
    given = SoftmaxState(m, l)
    outs = [Guarded(backend, shape, np.float32, layout) for shape in ((6, 5, n), (6, 5))]
    for _ in range(2):  # the second call may be remembered
        got = cuattn.softmax(x, state=given, out=tuple(one.out for one in outs), return_lse=True)
        for one, out, host in zip(got, outs, (want, lse), strict=True):
            assert one is out.out
            np.testing.assert_allclose(backend.asnumpy(one), host, rtol=1e-6)
            out.check_rim()
    one = backend.xp.broadcast_to(m[:1, :1], (6, 5))
    state = SoftmaxState(one, backend.xp.broadcast_to(l[:1, :1], (6, 5)))
    got = backend.asnumpy(cuattn.log_softmax(x, state=state))
    ref = reference.log_softmax(backend.asnumpy(x), state=state._make(map(backend.asnumpy, state)))
    np.testing.assert_allclose(got, ref, rtol=1e-5, atol=1e-5)


@BOTH
def test_in_place(backend, rng, name):
    for layout in LAYOUTS:
        whole = draw(rng, (7, 60))
        state = cuattn.softmax_state(backend.asarray(whole))
        x = backend.asarray(LAYOUTS[layout](whole[:, 20:]))
        want = backend.asnumpy(getattr(cuattn, name)(x, state=state))
        got = getattr(cuattn, name)(x, state=state, out=x)
        assert got is x
        assert backend.asnumpy(x).tobytes() == want.tobytes()


def test_out_of_a_state(backend, rng):
    """m and l are read by all elements of a row: no result may stand there."""
    x = backend.asarray(draw(rng, (6, 40)))
    state = cuattn.softmax_state(x)
    before = [backend.asnumpy(part).tobytes() for part in state]
    for _ in range(2):  # first remember calls of this signature
        y, lse = cuattn.softmax(
            x, state=state, return_lse=True, out=(x.copy(), backend.xp.empty_like(state.m))
        )
        np.testing.assert_allclose(backend.asnumpy(lse), backend.asnumpy(state.lse), rtol=1e-6)
        for i in range(2):
            with pytest.raises(ValueError, match=rf"^out\[1\] must .*state\.{'ml'[i]}"):
                cuattn.softmax(x, state=state, return_lse=True, out=(y, state[i]))
    columns = x[:, :1]
    one = SoftmaxState(x[:, 0], backend.xp.ones_like(x[:, 0]))
    with pytest.raises(ValueError, match=r"^out must .*state\.m"):
        cuattn.softmax(columns, state=one, out=columns)
    assert before == [backend.asnumpy(part).tobytes() for part in state]


# ---- Options ----


@BOTH
def test_scale(backend, rng, name):
    x = draw(rng, (4, 5, 33))
    for scale in (0.5, -1.5, 3.25, 0):
        verify(backend, x, name=name, scale=scale)
    for shape in [(5, 1), (4, 5, 1)]:
        scale = np.asarray(rng.integers(-24, 25, shape) / 8).astype(np.float32)
        verify(backend, x, name=name, scale=scale)


@BOTH
@pytest.mark.parametrize("axis", [-1, 0, None])
def test_where(backend, rng, name, axis):
    x = draw(rng, (5, 9, 40))
    where = rng.random((5, 9, 40)) < 0.6
    where[:2, :3] = False  # rows without any
    x[~where] = rng.choice([np.nan, INF, -INF, 3e38, 0], np.count_nonzero(~where))
    verify(backend, x, axis, name=name, where=where)
    verify(backend, draw(rng, (5, 9, 40)), axis, name=name, where=where[:1, :, :1], scale=2.0)


def test_lse(backend, rng):
    x = np.stack([row for _, row in cases.special_rows(rng, 30)])
    state = cuattn.softmax_state(backend.asarray(x), scale=1.75)
    for axis, part, given in ((-1, x[:, 3:9], state), (0, x.T[3:9], state)):
        y, lse = cuattn.softmax(
            backend.asarray(part), axis, scale=1.75, state=given, return_lse=True
        )
        ref = reference.softmax(exact(x), scale=1.75, return_lse=True)
        assert_close(backend.asnumpy(lse), ref[1], NAIVE["logsumexp"](x, -1, scale=1.75))
        want = ref[0][:, 3:9] if axis else ref[0][:, 3:9].T
        np.testing.assert_allclose(backend.asnumpy(y), want.astype(float), rtol=1e-5, atol=1e-30)


# ---- Values ----


@BOTH
@pytest.mark.parametrize("n", [3, 40, 1200])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_special_values(backend, rng, name, dtype, n):
    """In each part of a row with NaN or infinity what the row has there."""
    x = np.stack([row for _, row in cases.special_rows(rng, n, dtype)])
    for axis, rows in ((-1, x), (0, np.ascontiguousarray(x.T))):
        verify(backend, rows, axis, name=name, scale=None if n > 3 else -1.0)


def test_scores_beyond_the_range(backend):
    """Of elements far below the maximum, which is in it."""
    x = np.array([[1e30, -2e38, -3e38], [5, 4, -3e38], [1.5e38, 1.5e38, -3e38]], np.float32)
    for name, scale in (("softmax", 2.25), ("log_softmax", 2.25)):
        for rows, axis in ((x, -1), (x.T, 0)):
            device_x = backend.asarray(np.ascontiguousarray(rows))
            state = cuattn.softmax_state(device_x, axis, scale=scale)
            got = getattr(cuattn, name)(device_x, axis, scale=scale, state=state)
            ref = getattr(reference, name)(exact(rows), axis, scale=scale)
            with np.errstate(over="ignore"):
                want = ref.astype(np.float32).astype(float)
            np.testing.assert_allclose(backend.asnumpy(got), want, rtol=1e-6)


def test_a_state_of_ones_own(backend, rng):
    """What has been computed otherwise, such as a log-sum-exp, with l = 1."""
    x = draw(rng, (5, 60), spread=0.5)
    lse = cuattn.logsumexp(backend.asarray(x), -1)
    state = SoftmaxState(lse, backend.xp.ones_like(lse))
    got = cuattn.softmax(backend.asarray(x[:, :20]), state=state)
    ref = reference.softmax(exact(x))[:, :20]
    np.testing.assert_allclose(backend.asnumpy(got), ref.astype(float), rtol=2e-5)


def test_bits(backend, rng):
    """Of an element they follow from itself and the state, wherever it is."""
    if backend.name == "numpy":
        pytest.skip("NumPy's exponential takes other instructions for other strides")
    x = draw(rng, (6, 700), "bfloat16")
    state = cuattn.softmax_state(backend.asarray(x))
    want = backend.asnumpy(cuattn.softmax(backend.asarray(x), state=state))
    for begin, end in ((0, 700), (1, 2), (3, 90), (650, 700)):
        for layout in LAYOUTS:
            part = backend.asarray(LAYOUTS[layout](x[:, begin:end]))
            got = backend.asnumpy(cuattn.softmax(part, state=state))
            assert np.ascontiguousarray(got).tobytes() == want[:, begin:end].tobytes()


# ---- Selections ----


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("k", [0, 1, 4, 45])
def test_selected(backend, rng, name, k, dtype):
    """Probabilities of values, and of a part, with the state of a selection; what a row lacks has
    the probability of -inf."""
    x = np.stack([row for _, row in cases.special_rows(rng, 30, dtype)])
    for axis, rows in ((-1, x), (0, x.T)):
        parts = [cut_of(rows, axis, *ends) for ends in ((0, 11), (11, 30))]
        states = [
            cuattn.softmax_topk_state(
                backend.asarray(np.ascontiguousarray(rows[part])),
                k,
                axis=axis,
                scale=0.75,
                index_offset=11 * i,
            )
            for i, part in enumerate(parts)
        ]
        state = cuattn.merge(*states)
        lacking = np.pad(x.astype(lse_dtype(x.dtype)), [(0, 0), (0, 1)], constant_values=-INF)
        ref = getattr(reference, name)(exact(lacking), scale=0.75)
        naive = NAIVE[name](lacking, scale=0.75)
        indices = backend.asnumpy(state.indices)
        want, plain = (np.take_along_axis(a, indices, -1) for a in (ref, naive))
        for _ in range(2):  # the second call may be remembered
            got = backend.asnumpy(getattr(cuattn, name)(state.values, state=state))
            assert_close(got, want, plain)
        part = backend.asarray(np.ascontiguousarray(rows[parts[1]]))
        got = getattr(cuattn, name)(part, axis, scale=0.75, state=state)
        plain = SoftmaxState(state.m, state.l)
        same = getattr(cuattn, name)(part, axis, scale=0.75, state=plain)
        assert backend.asnumpy(got).tobytes() == backend.asnumpy(same).tobytes()
