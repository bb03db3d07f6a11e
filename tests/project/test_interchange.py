"""Arrays of other libraries: taken without a copy, or refused in the contract's words.

array_api_strict is a library of the CPU; the exporters below stand for what it has not: bfloat16,
pinned memory, capsules from before versions, tensors that their library keeps to itself.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from cases import draw
from conftest import on_a_gpu
from test_check import DeviceArray

import cuattn
from cuattn._arrays import interchange
from cuattn._arrays.inputs import as_array

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Capsules of NumPy 2.0 have no version, and so do not say that they may be written to.
VERSIONED = np.lib.NumpyVersion(np.__version__) >= "2.1.0"
writes = pytest.mark.skipif(not VERSIONED, reason="NumPy 2.0 takes arrays in as read-only")


class Exporter:
    """A tensor of some library on a DLPack device: the memory of a NumPy array, by its capsule."""

    kind = 1  # kDLCPU

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return self.kind, 0

    def capsule(self, **options):
        options = options if VERSIONED else {}
        words = self.array.view(np.uint16) if self.array.dtype == BFLOAT16 else self.array
        capsule = words.__dlpack__(**options)
        name = b"dltensor_versioned" if options.get("max_version") else b"dltensor"
        tensor = ctypes.c_void_p.from_buffer(
            ctypes.c_uint64(interchange._address_of(capsule, name))
        )
        at = tensor.value + (32 if options.get("max_version") else 0)
        ctypes.c_int32.from_address(at + 8).value = self.kind
        if self.array.dtype == BFLOAT16:
            ctypes.c_uint8.from_address(at + 20).value = 4  # kDLBfloat
        return capsule

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        return self.capsule(max_version=max_version)


class Old(Exporter):
    """From before versions: it knows no keyword but the stream."""

    def __dlpack__(self, stream=None):
        return self.capsule()


class Pinned(Exporter):
    kind = 3  # kDLCUDAHost


class Both(Exporter):
    """As torch.Tensor: the class has the interface of CUDA, its arrays on the host have not."""

    @property
    def __cuda_array_interface__(self):
        raise AttributeError("a tensor on the host")


class Refusing(Exporter):
    """As a tensor whose gradient is recorded."""

    error: type[Exception] = BufferError

    def __dlpack__(self, **options):
        raise self.error("use tensor.detach()")


class Refusing2(Refusing):
    error = RuntimeError


class Refusing3(Refusing):
    error = ValueError


class RefusingDevice(Refusing):
    kind = 2  # kDLCUDA


class Nowhere(Exporter):
    """On two devices at once, or none any more."""

    def __dlpack_device__(self):
        raise ValueError("sharded")


@pytest.mark.parametrize("exporter", [array_api_strict.asarray, Exporter, Old, Pinned, Both])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "bool", "bfloat16"])
def test_without_a_copy(exporter, dtype, rng):
    array = rng.integers(0, 2, (3, 5)).astype(BFLOAT16 if dtype == "bfloat16" else dtype)
    if exporter is array_api_strict.asarray and dtype in ("float16", "bfloat16"):
        pytest.skip("the standard has no 16-bit floats")
    for view in (array, array.T, array[::2, ::-1], array[1:1], array[0, 0, ...]):
        found = as_array("x", exporter(view))
        assert type(found) is np.ndarray and found.dtype == array.dtype
        assert found.shape == view.shape
        np.testing.assert_array_equal(found, view)
        if view.size:
            assert found.strides == view.strides and np.shares_memory(found, view)


@pytest.mark.parametrize("exporter", [Exporter, Old])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_lives_as_long_as_what_looks_at_it(exporter, dtype):
    array = np.ones(1000, dtype if dtype == "float32" else BFLOAT16)
    owner = weakref.ref(array)
    found = as_array("x", exporter(array))[::2]
    del array
    gc.collect()
    assert owner() is not None and (found == 1).all()
    del found
    gc.collect()
    assert owner() is None


def ones(shape):
    return np.ones(shape, np.float32)


STATE = cuattn.SoftmaxState(ones(3), ones(3))
LOGITS = cuattn.LogitsState(*STATE, ones(3), ones(3))
SELECTED = cuattn.SoftmaxTopKState(*STATE, ones((3, 2)), np.zeros((3, 2), np.int64))
CALLS = {
    "softmax": (
        (ones((3, 4)),),
        {"scale": ones((3, 1)), "where": np.ones((3, 4), bool), "state": STATE},
    ),
    "log_softmax": ((ones((3, 4)),), {"where": np.ones(4, bool), "state": SELECTED}),
    "logsumexp": ((ones((3, 4)),), {"b": ones(4), "where": np.ones((), bool)}),
    "softmax_backward": (
        (ones((3, 4)), ones((3, 4))),
        {"scale": ones(()), "where": np.ones((3, 1), bool)},
    ),
    "log_softmax_backward": (
        (ones((3, 4)), ones((3, 4))),
        {"scale": ones((3, 1)), "where": np.ones((), bool)},
    ),
    "segment_softmax": ((ones((3, 4)), np.array([0, 1, 3])), {"scale": ones((2, 1))}),
    "segment_softmax_backward": (
        (ones((3, 4)), ones((3, 4)), np.array([0, 1, 3])),
        {"scale": ones((2, 1))},
    ),
    "top_k": ((ones((3, 4)), 2), {}),
    "softmax_topk": ((ones((3, 4)), 2), {"scale": ones((3, 1)), "where": np.ones(4, bool)}),
    "softmax_state": ((ones((3, 4)),), {"scale": ones(())}),
    "softmax_topk_state": ((ones((3, 4)), 2), {"scale": ones((3, 1))}),
    "sample": (
        (ones((3, 4)), 2),
        {
            "seed": np.array([[1], [2], [3]]),
            "offset": np.array([[4]]),
            "scale": ones((3, 1)),
            "where": np.ones(4, bool),
        },
    ),
    "sample_state": (
        (ones((3, 4)), 2),
        {"seed": 1, "scale": ones((3, 1)), "rows": np.array([[7], [8], [9]])},
    ),
    "merge": ((STATE, STATE), {}),
    "cross_entropy": ((ones((3, 4)), np.array([0, 3, -100])), {"scale": ones((3, 1))}),
    "cross_entropy_backward": (
        (ones(3), ones((3, 4)), np.array([0, 3, -100]), ones(3)),
        {"scale": ones(())},
    ),
    "entropy": ((ones((3, 4)),), {"scale": ones((3, 1)), "where": np.ones((3, 1), bool)}),
    "logits_state": ((ones((3, 4)), np.array([0, 3, 7])), {"scale": ones((3, 1))}),
    "attention": (
        (ones((2, 2, 3, 4)),) * 3,
        {
            "mask": np.ones((3, 3), bool),
            "bias": ones((3, 1)),
            "alibi_slopes": ones(2),
            "sinks": ones(2),
            "q_offset": np.array(1),
            "q_lens": np.array([1, 3]),
            "kv_lens": np.array([2, 3]),
        },
    ),
    "attention_varlen": (
        (ones((5, 2, 4)),) * 3 + (np.array([0, 2, 5]),) * 2,
        {
            "sinks": ones(2),
            "q_offset": np.array([0, 1]),
            "score": "s + table[h, q - k]",
            "score_args": {"table": ones((2, 3))},
        },
    ),
    "attention_backward": (
        (ones((2, 2, 3, 4)),) * 5 + (ones((2, 2, 3)),),
        {
            "grad_lse": ones((2, 2, 3)),
            "mask": np.ones((3, 3), bool),
            "bias": ones((3, 1)),
            "alibi_slopes": ones(2),
            "sinks": ones(2),
            "q_offset": np.array(1),
            "q_lens": np.array([1, 3]),
            "kv_lens": np.array([2, 3]),
            "return_dbias": True,
            "score": "s + table[h, q - k]",
            "score_args": {"table": ones((2, 3))},
            "return_dscore": True,
        },
    ),
    "attention_backward_varlen": (
        (ones((5, 2, 4)),) * 5 + (ones((2, 5)),) + (np.array([0, 2, 5]),) * 2,
        {
            "alibi_slopes": ones(2),
            "sinks": ones(2),
            "bias": ones(3),
            "return_dbias": True,
            "score": "s + table[h, q - k]",
            "score_args": {"table": ones((2, 3))},
            "return_dscore": ["table"],
        },
    ),
    "attention_column_sums": (
        (ones((2, 2, 3, 4)),) * 2 + (ones((2, 2, 3)),),
        {
            "mask": np.ones((3, 3), bool),
            "bias": ones((3, 1)),
            "alibi_slopes": ones(2),
            "q_offset": np.array([0, 1]),
            "q_lens": np.array([1, 3]),
            "kv_lens": np.array([2, 3]),
        },
    ),
    "attention_kvcache": (
        (ones((2, 2, 3, 4)), ones((2, 2, 9, 4)), ones((2, 2, 9, 4))),
        {
            "kv_lens": np.array([1, 5]),
            "k_new": ones((2, 2, 2, 4)),
            "v_new": ones((2, 2, 2, 4)),
            "mask": np.ones((3, 2), bool),
            "alibi_slopes": ones(2),
            "sinks": ones(2),
            "q_offset": np.array([2, 0]),
            "q_lens": np.array([1, 3]),
            "score": "s + table[h, q - k]",
            "score_args": {"table": ones((2, 3))},
        },
    ),
    "attention_cascade": (
        (
            ones((2, 2, 3, 4)),
            ((ones((2, 5, 4)), ones((2, 5, 4))), (ones((2, 1, 4)), ones((2, 1, 4)))),
            *(ones((2, 2, 9, 4)),) * 2,
        ),
        {"kv_lens": np.array([1, 5]), "q_offset": np.array([2, 9]), "q_lens": np.array([1, 3])},
    ),
    "attention_topk": (
        (ones((2, 2, 3, 4)), ones((2, 2, 3, 4)), 2),
        {
            "mask": np.ones((3, 3), bool),
            "bias": ones((3, 1)),
            "alibi_slopes": ones(2),
            "q_offset": np.array(1),
            "q_lens": np.array([1, 3]),
            "kv_lens": np.array([2, 3]),
        },
    ),
    "kv_append": (
        (ones((2, 2, 5, 4)),) * 2 + (ones((2, 2, 3, 4)),) * 2,
        {
            "kv_lens": np.array([1, 2]),
            "page_table": np.array([[1, -1], [0, 9]]),
            "new_lens": np.array([2, 3]),
        },
    ),
    "merge_attention": ((ones((2, 3, 4)), ones((2, 3))) * 2, {}),
    "block_mask": ((np.ones((2, 3, 1), bool), 3, 5), {}),
    "merge_attention_states": ((ones((5, 2, 3, 4)), ones((5, 2, 3))), {"axis": 0}),
}


def each(function, value):
    """A function of every array in nested arguments."""
    if isinstance(value, np.ndarray):
        return function(value)
    if isinstance(value, dict):
        return {name: each(function, item) for name, item in value.items()}
    if isinstance(value, tuple):
        items = [each(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def leaves(result):
    """Arrays of a result, which may have sizes beside them."""
    results = result if isinstance(result, tuple) else (result,)
    named = [one for some in results if isinstance(some, dict) for one in some.values()]
    return [one for one in results if not isinstance(one, (tuple, dict))] + named


def answer(name, args, options):
    """What a function returns; what it has written where that is nothing."""
    results = getattr(cuattn, name)(*args, **options)
    return leaves(results) if results is not None else [as_array("x", a) for a in args[:2]]


def test_every_function_is_called():
    functions = {name for name in cuattn.__all__ if name.islower()}
    assert set(CALLS) == functions - {"compile", "reference", "show_config"}


@pytest.mark.host("arrays of the host")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=writes) if n in ("kv_append", "attention_kvcache") else n
        for n in CALLS
    ],
)
def test_answered_by_numpy(backend, rng, name):
    """Every array of every function, by whatever library: the bits of the same call of NumPy."""
    args, options = each(
        lambda a: draw(rng, a.shape, "float32") if a.dtype == np.float32 else a, CALLS[name]
    )
    want = answer(name, each(np.copy, args), options)
    for exporter in (array_api_strict.asarray, Exporter):
        given, named = each(exporter, each(np.copy, args)), each(exporter, options)
        got = answer(name, given, named)
        for ours, theirs in zip(got, want, strict=True):
            assert type(ours) is np.ndarray and ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


@writes
@pytest.mark.host("arrays of the host")
def test_out(backend, rng):
    """Written where it is; what the library hands out to be read only is refused."""
    for exporter, dtype in ((array_api_strict.asarray, np.float32), (Exporter, BFLOAT16)):
        x = draw(rng, (3, 5), "float32").astype(dtype)
        memory = np.full((3, 5), 7).astype(dtype)
        out = exporter(memory)
        got = cuattn.softmax(x, out=out)
        memory = np.from_dlpack(out) if dtype == np.float32 else memory
        assert np.shares_memory(got, memory)
        np.testing.assert_array_equal(memory, cuattn.softmax(x))
        old = Old(np.zeros((3, 5), dtype))  # which cannot say whether it may be written to
        with pytest.raises(ValueError, match=r"^out must be writeable, but"):
            cuattn.softmax(x, out=old)
        assert not old.array.any()


@pytest.mark.parametrize("exporter", [Refusing, Refusing2, Refusing3])
def test_what_a_library_keeps_to_itself(exporter):
    x = ones((3, 4))
    hidden = exporter(x)
    for name, args, options in (
        ("x", (hidden,), {}),
        ("scale", (x,), {"scale": hidden}),
        ("where", (x,), {"where": hidden}),
        ("out", (x,), {"out": hidden}),
    ):
        with pytest.raises(TypeError, match=rf"^{name} must .+, but .*use tensor\.detach\(\)"):
            cuattn.softmax(*args, **options)
    q = ones((2, 2, 3, 4))
    with pytest.raises(TypeError, match=r"^k must .+, but .*detach"):
        cuattn.attention(q, exporter(q), q)


def test_what_a_library_keeps_to_itself_on_a_device(monkeypatch):
    class Cupy:
        class ndarray:
            pass

        @staticmethod
        def from_dlpack(value):
            return value.__dlpack__()

    monkeypatch.setitem(sys.modules, "cupy", Cupy)
    with pytest.raises(TypeError, match=r"^x must .+, but .*use tensor\.detach\(\)"):
        cuattn.softmax(RefusingDevice(ones(3)))


def test_on_no_device():
    with pytest.raises(TypeError, match=r"^x must .+, but .*Nowhere; .*copy it there"):
        cuattn.softmax(Nowhere(ones(3)))


def test_bfloat16_without_ml_dtypes(monkeypatch):
    x = Exporter(np.ones(3, BFLOAT16))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match=r"^x must .+, but .*pip install 'cuattn\[bf16\]'"):
        cuattn.softmax(x)


def test_two_homes():
    """One array on the host and one on a device: the message names both, and nothing is taken."""
    host, q = Refusing(ones((3, 4))), Refusing(ones((2, 2, 3, 4)))
    for call in (
        lambda: cuattn.softmax(ones((3, 4)), scale=DeviceArray((3, 1))),
        lambda: cuattn.softmax_backward(host, DeviceArray()),
        lambda: cuattn.softmax_backward(DeviceArray(), host),
        lambda: cuattn.attention(q, q, DeviceArray((2, 2, 3, 4))),
        lambda: cuattn.attention(DeviceArray((2, 2, 3, 4)), q, q),
    ):
        with pytest.raises(TypeError, match=r"must be an array of the same library as \w+ \(.+\)"):
            call()


# ---- CUDA arrays of an interface that names a stream ----


class Streamed:
    """A CuPy array without DLPack, as one that is being written on a stream."""

    def __init__(self, array, stream):
        self.array, self.stream = array, stream

    @property
    def __cuda_array_interface__(self):
        return {**self.array.__cuda_array_interface__, "stream": self.stream.ptr, "version": 3}


@on_a_gpu
def test_the_stream_of_an_interface(backend, rng):
    """What another stream still writes is waited for; one's own takes part in a captured graph."""
    numbers = rng.standard_normal((4, 1000)).astype(np.float32)
    want = cuattn.reference.softmax(numbers)
    source, target = backend.asarray(numbers), backend.xp.zeros((4, 1000), np.float32)
    theirs, ours = (backend.xp.cuda.Stream(non_blocking=True) for _ in range(2))
    backend.xp.cuda.Device().synchronize()
    with theirs:
        for _ in range(100):
            target += 1
        target[...] = source
    with ours:
        y = cuattn.softmax(Streamed(target, theirs))
        ours.synchronize()
        np.testing.assert_allclose(backend.asnumpy(y), want, rtol=1e-5)
        del y  # its memory is what the next result is allocated from
        ours.begin_capture()
        y = cuattn.softmax(Streamed(target, ours))
        graph = ours.end_capture()
        target[...] = source[::-1]
        graph.launch(ours)
        ours.synchronize()
        np.testing.assert_allclose(backend.asnumpy(y), want[::-1], rtol=1e-5)
