"""What cuattn.jax does with XLA's buffers on a GPU. JAX itself need not be there: stand-ins
show what its buffers show."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import on_a_gpu

pytest.importorskip("jax")

import cuattn
from cuattn.jax import _calls


class Buffer:
    """As jaxlib's: without DLPack's strides or a stream, bfloat16 as two bytes."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.ndim = array.ndim

    def __dlpack_device__(self):
        return 2, self.array.data.device_id

    @property
    def __cuda_array_interface__(self):
        if 0 in self.shape:
            raise AssertionError("an empty buffer may have no address")
        names = {"bfloat16": "<V2"}
        typestr = names.get(self.dtype.name, self.dtype.str)
        return {
            "shape": self.shape,
            "typestr": typestr,
            "data": (self.array.data.ptr, True),
            "version": 2,
        }


class Context:
    def __init__(self, stream):
        self.stream = stream.ptr


def launch(backend, stream, function, options, arrays, results):
    """The callback, as XLA would call it, into memory that holds NaN or -1."""
    xp = backend.xp
    made = [
        xp.full(shape, -1 if np.dtype(dtype).kind == "i" else np.nan, dtype)
        for shape, dtype in results
    ]
    given = {name: backend.asarray(a) for name, a in arrays.items()}
    xp.cuda.Device().synchronize()
    call = _calls.Call(
        function, tuple(options.items()), tuple((s, np.dtype(d)) for s, d in results)
    )
    buffers = {name: Buffer(a) for name, a in given.items()}
    return lambda: _calls._run(call, Context(stream), [Buffer(m) for m in made], **buffers), made


CALLS = {
    "softmax": (
        {"axis": (-1,), "scale": 0.5, "return_lse": True},
        ("x",),
        [((3, 33), "x"), ((3,), "f4")],
    ),
    "softmax_backward": ({"axis": (-1,)}, ("grad", "y"), [((3, 33), "x")]),
    "logsumexp": ({"axis": (-1,), "keepdims": True}, ("x",), [((3, 1), "x")]),
    "top_k": ({"axis": -1, "k": 4}, ("x",), [((3, 4), "x"), ((3, 4), "i8")]),
    "softmax_topk": ({"axis": -1, "k": 4}, ("x",), [((3, 4), "x"), ((3, 4), "i8")]),
}


@on_a_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CALLS)
def test_into_buffers_on_the_stream(backend, rng, monkeypatch, name, dtype):
    """Results are where XLA wants them; a warm call allocates nothing and waits for nothing, and
    its kernels are on the stream of the execution alone."""
    import ml_dtypes

    cupy = backend.xp
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    options, names, results = CALLS[name]
    results = [(shape, dtype if kind == "x" else kind) for shape, kind in results]
    arrays = {n: rng.standard_normal((3, 33)).astype(dtype) for n in names}
    stream = cupy.cuda.Stream(non_blocking=True)
    run, made = launch(backend, stream, name, options, arrays, results)
    run()  # compiles and loads
    stream.synchronize()
    for array in made:
        array.fill(0)
    cupy.cuda.Device().synchronize()
    stream.begin_capture()  # in which nothing may wait, and everything is of this stream
    with monkeypatch.context() as refuse:
        refuse.setattr(cupy, "empty", None)
        previous = cupy.cuda.get_allocator()
        cupy.cuda.set_allocator(lambda size: pytest.fail(f"{size} bytes are allocated"))
        try:
            run()
        finally:
            cupy.cuda.set_allocator(previous)
            graph = stream.end_capture()
    assert all(not cupy.asnumpy(array.astype(np.float64)).any() for array in made)  # not yet
    graph.launch(stream)
    stream.synchronize()
    how = dict(options)
    given = [
        how.pop(n) if n in how else backend.asarray(arrays[n]) for n in _calls.FUNCTIONS[name][1]
    ]
    want = getattr(cuattn, name)(*given, **how)
    for ours, theirs in zip(made, want if isinstance(want, tuple) else (want,), strict=True):
        np.testing.assert_array_equal(backend.asnumpy(ours), backend.asnumpy(theirs))
    assert cupy.cuda.get_current_stream().ptr != stream.ptr  # as it was


@on_a_gpu
def test_two_words_are_an_index(backend, rng):
    cupy, x = backend.xp, rng.standard_normal((3, 33)).astype(np.float32)
    values, words = cupy.zeros((3, 4), np.float32), cupy.full((3, 4, 2), -1, np.int32)
    call = _calls.Call("top_k", (("k", 4),), (((3, 4), values.dtype), ((3, 4), np.dtype(np.int64))))
    stream = cupy.cuda.Stream()
    given = Buffer(backend.asarray(x))
    cupy.cuda.Device().synchronize()
    _calls._run(call, Context(stream), [Buffer(values), Buffer(words)], x=given)
    stream.synchronize()
    np.testing.assert_array_equal(backend.asnumpy(words)[..., 0], cuattn.top_k(x, 4).indices)
    assert not backend.asnumpy(words)[..., 1].any()


@on_a_gpu
def test_attention_and_its_gradients(backend, rng):
    """Gradients of slopes, which have no `out`, and empty arrays."""
    stream = backend.xp.cuda.Stream()
    q = rng.standard_normal((1, 2, 5, 8)).astype(np.float32)
    slopes = np.array([0.1, 0.2], np.float32)
    like = (q.shape, "f4")
    arrays = {"q": q, "k": q, "v": q, "alibi_slopes": slopes}
    results = [like, ((1, 2, 5), "f4")]
    run, (y, lse) = launch(backend, stream, "attention", {"return_lse": True}, arrays, results)
    run()
    stream.synchronize()
    want_y, want_lse = cuattn.attention(q, q, q, alibi_slopes=slopes, return_lse=True)
    np.testing.assert_allclose(backend.asnumpy(y), want_y, atol=1e-5)
    np.testing.assert_allclose(backend.asnumpy(lse), want_lse, atol=1e-5)
    arrays |= {"grad": q, "y": want_y, "lse": want_lse}
    results = [like, like, like, ((2,), "f4")]
    run, made = launch(
        backend, stream, "attention_backward", {"return_dbias": False}, arrays, results
    )
    run()
    stream.synchronize()
    want = cuattn.attention_backward(q, q, q, q, want_y, want_lse, alibi_slopes=slopes)
    for ours, theirs in zip(made, (*want[:3], want.dalibi_slopes), strict=True):
        np.testing.assert_allclose(backend.asnumpy(ours), theirs, atol=1e-4)
    empty = {"x": np.zeros((3, 0), np.float32)}
    run, (found,) = launch(
        backend, stream, "logsumexp", {"axis": (-1,), "keepdims": True}, empty, [((3, 1), "f4")]
    )
    run()
    stream.synchronize()
    assert (backend.asnumpy(found) == -np.inf).all()
