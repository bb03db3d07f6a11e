"""Warm calls: no call may use what was planned for another one."""

from __future__ import annotations

import gc
import struct
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import on_a_gpu
from test_jit import compiled, gpus  # noqa: F401 - fixtures

import cuattn
from cuattn._device import runtime as device_runtime
from cuattn._device.host import HOST
from cuattn._device.params import SOFTMAX_HEAD
from cuattn._device.recent import Recent


@pytest.fixture
def arrays(backend):
    """A maker of arrays of the backend."""
    return lambda *given: [backend.asarray(np.array(one)) for one in given]


def check(backend, function, *operands, **options):
    """Results of a function are those of its reference."""

    def host(value):
        return backend.asnumpy(value) if isinstance(value, backend.xp.ndarray) else value

    given = {name: host(value) for name, value in options.items()}
    want = getattr(cuattn.reference, function)(*map(host, operands), **given)
    got = getattr(cuattn, function)(*operands, **options)
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, want)), strict=True):
        np.testing.assert_allclose(backend.asnumpy(a).astype(float), b, rtol=3e-3, atol=3e-3)


class Known:
    """In the place of what is remembered: no call may be new."""

    def __init__(self, recent):
        self.recent = recent

    def get(self, key):
        found = self.recent.get(key)
        assert found is not None
        return found


# ---- What is the same, and what is not ----


def test_one_address_many_layouts(backend, rng):
    """Views that begin at one address, and at its neighbours, twice each."""
    memory = backend.asarray(rng.standard_normal((24, 24)).astype(np.float32))
    views = [
        memory,
        memory.T,
        memory[:12],
        memory[:, :12],
        memory[:, ::2],
        memory[::2],
        memory.reshape(12, 48),
        memory.reshape(4, 6, 24),
        memory.view(np.int32) % 7,
        *(memory[:, i : i + 16] for i in range(5)),  # at other addresses modulo 16 bytes
        memory[1:],
    ]
    for view in views + views[::-1]:
        check(backend, "softmax", view)
        check(backend, "log_softmax", view)
        check(backend, "top_k", view, 3)


@pytest.mark.parametrize("heads", [1, 2])
def test_one_address_of_attention(backend, rng, heads):
    """k and v apart, the same, and swapped: their tensor maps follow the addresses."""
    q, k, v = (
        backend.asarray(rng.standard_normal((1, heads, 16, 64)).astype(np.float16))
        for _ in range(3)
    )
    for operands in ((q, k, v), (q, k, k), (q, v, k), (k, q, v), (q, q, q), (q, k, v)):
        check(backend, "attention", *operands)
        check(backend, "attention", *(a.swapaxes(1, 2) for a in operands), layout="BSHD")
    for scale in (0.5, -0.5, 0, 0.25, 0.5):
        check(backend, "attention", q, k, v, scale=scale)
    out = backend.asarray(np.zeros((1, heads, 16, 64), np.float16))
    for shape in ((1, heads, 16, 64), (1, 4 * heads, 4, 64), (1, heads, 16, 64)):
        operands = [array.reshape(shape) for array in (q, k, v)]
        cuattn.attention(*operands, out=out.reshape(shape))
        want = cuattn.reference.attention(*map(backend.asnumpy, operands))
        np.testing.assert_allclose(backend.asnumpy(out).reshape(shape), want, atol=3e-3)


def test_gradients_of_arrays_at_other_addresses(backend, rng):
    """Of a warm call, one array after the other."""

    def made():
        return backend.asarray(rng.standard_normal((1, 1, 40, 64)).astype(np.float16))

    given, replaced = [made() for _ in range(5)], []
    lse = backend.asarray(np.full((1, 1, 40), 6, np.float32))
    for turn in range(6):
        got = cuattn.attention_backward(*given, lse)
        want = cuattn.reference.attention_backward(*map(backend.asnumpy, (*given, lse)))
        for one, expected in zip(got[:3], want[:3], strict=True):
            close = {"rtol": 3e-3, "atol": 3e-3 * abs(expected).max()}
            np.testing.assert_allclose(backend.asnumpy(one).astype(float), expected, **close)
        assert got[3:] == (None,) * 4
        if turn < 5:
            replaced.append(given[turn])
            given[turn] = made()


def test_gradients_have_the_names_of_their_arrays(backend):
    """Cold and warm; the others are None."""
    q, lse = (backend.asarray(np.ones((1, 1, 8, *end), np.float32)) for end in ((16,), ()))
    shapes = {"bias": (8, 8), "alibi_slopes": (1,), "sinks": (1,)}
    options = {name: backend.asarray(np.ones(n, np.float32)) for name, n in shapes.items()}
    for names in (("sinks",), ("bias", "sinks"), ("alibi_slopes",), ("bias",), ()):
        given = {name: options[name] for name in names}
        for _ in range(2):
            got = cuattn.attention_backward(*[q] * 5, lse, return_dbias="bias" in names, **given)
            found = {name: one.shape for name, one in got._asdict().items() if one is not None}
            expected = {f"d{name}": shapes[name] for name in names}
            assert found == dict.fromkeys(("dq", "dk", "dv"), q.shape) | expected


SAME = [  # what equal or similar keys might take for the same call
    [((), {}), ((0,), {}), ((), {"axis": 0}), ((), {"axis": (0,)}), ((), {"axis": None})],
    [((), {"axis": (0, 1)}), ((), {"axis": (1, 0)}), ((), {"axis": -1}), ((), {"axis": 1})],
    [((), {"scale": 0.5}), ((), {"scale": -0.5}), ((), {"scale": 1}), ((), {"scale": 2.0})],
    [((), {"scale": 1.0}), ((), {"scale": 2.0}), ((), {})],
    [((), {"dtype": np.float64}), ((), {"dtype": "float16"}), ((), {"dtype": np.dtype("f8")})],
    [((), {"return_lse": True}), ((), {"return_lse": False})],
]


@pytest.mark.parametrize("calls", SAME)
def test_options(backend, rng, calls):
    x = backend.asarray(rng.standard_normal((5, 6)).astype(np.float32))
    for args, options in calls + calls[::-1]:
        check(backend, "softmax", x, *args, **options)


def test_names(backend, rng):
    """An array of one spec as two options."""
    x, other = (backend.asarray(rng.standard_normal((5, 1)).astype(np.float32)) for _ in range(2))
    for _ in range(2):
        check(backend, "log_softmax", x, axis=1, scale=other)
        assert cuattn.log_softmax(x, axis=1, out=other) is other


def test_what_kernels_read_a_copy_of(backend, rng):
    """Nothing is known of the copies of later calls."""
    x = backend.asarray(rng.standard_normal((6, 8)).astype(np.float32))
    rows = backend.asarray(rng.standard_normal((6, 1)))
    q = backend.asarray(rng.standard_normal((2, 1, 4, 32)).astype(np.float32))
    lens = backend.asarray(np.int32([1, 4]))
    for _ in range(3):
        check(backend, "softmax", x, scale=rows)
        check(backend, "softmax_topk", x, 3, scale=rows)
        check(backend, "logsumexp", x, axis=-1, b=0.5)
        check(backend, "logsumexp", x, axis=-1, b=rows)
        check(backend, "top_k", x[:, ::2], 3, axis=None)
        check(backend, "attention", q, q, q, kv_lens=lens)


@pytest.mark.host
def test_numbers_that_are_arrays(backend, rng):
    x = backend.asarray(rng.standard_normal((5, 6)).astype(np.float32))
    for scale in (2.0, 3.0):
        check(backend, "softmax", x, scale=np.array(scale))
        check(backend, "softmax_topk", x, 2, scale=np.array(scale))
        check(backend, "logsumexp", x, b=np.array(scale), axis=1)


def test_no_array_is_kept(backend, rng):
    given = [backend.asarray(rng.standard_normal((1, 4, 8)).astype(np.float32)) for _ in range(3)]
    cuattn.softmax(given[0], scale=2.0)
    cuattn.softmax_backward(*given[:2])
    cuattn.softmax_topk(given[0], 3, where=given[1] > 0)
    cuattn.attention(*given, bias=given[0][..., :4])
    gone = [weakref.ref(array) for array in given]
    del given
    gc.collect()
    assert [one() for one in gone] == [None] * 3


def test_the_sign_of_zero(backend, arrays):
    """0.0 and -0.0 are equal, and not the same scale."""
    (x,) = arrays(np.float32([1, 2]))
    for scale in (0.0, -0.0, 0.0, -0.0):
        assert np.signbit(float(cuattn.softmax_state(x, scale=scale).m)) == np.signbit(scale)


@pytest.mark.parametrize(
    ("good", "bad", "error"),
    [
        (((1,), {}), ((True,), {}), TypeError),
        (((1,), {}), ((1.0,), {}), TypeError),
        (((1,), {}), ((1, 1), {}), TypeError),
        (((1,), {}), ((1,), {"axis": 1}), TypeError),
        (((), {"axis": (0, 1)}), ((), {"axis": (0, True)}), TypeError),
        (((), {"return_lse": True}), ((), {"return_lse": 1}), TypeError),
        (((), {"return_lse": False}), ((), {"return_lse": 0.0}), TypeError),
        (((), {"scale": 1}), ((), {"scale": True}), TypeError),
        (((), {"scale": 2.0}), ((), {"temperature": 2.0}), TypeError),
        (((), {"where": True}), ((), {"where": 1}), TypeError),
    ],
)
def test_what_equals_a_good_option(backend, rng, good, bad, error):
    x = backend.asarray(rng.standard_normal((5, 6)).astype(np.float32))
    for _ in range(2):
        cuattn.softmax(x, *good[0], **good[1])
    with pytest.raises(error):
        cuattn.softmax(x, *bad[0], **bad[1])


# ---- What is looked at in every call ----


def test_out_that_overlaps(backend, rng):
    memory = backend.asarray(rng.standard_normal(64).astype(np.float32))
    x, y = memory[16:32], memory[40:56]
    want = cuattn.reference.softmax(backend.asnumpy(x))
    for out in (y, memory[:16], memory[32:48]):
        assert cuattn.softmax(x, out=out) is out
        np.testing.assert_allclose(backend.asnumpy(out), want, rtol=1e-5)
    for out in (memory[1:17], memory[12:28], memory[31:47]):
        with pytest.raises(ValueError, match="out must be x itself or share no memory"):
            cuattn.softmax(x, out=out)
    for array, other in ((x, y), (y, x), (x, y)):  # in place, and not
        want = cuattn.reference.softmax(backend.asnumpy(array))
        cuattn.softmax(array, out=array)
        np.testing.assert_allclose(backend.asnumpy(array), want, rtol=1e-5)
        cuattn.softmax(array, out=other)


def test_out_of_attention_that_overlaps(backend, rng):
    q, k, out = (backend.asarray(rng.standard_normal((4, 64)).astype(np.float16)) for _ in range(3))
    for _ in range(2):
        cuattn.attention(q, k, k, out=out)
    for operands in ((out, k, k), (q, out, k), (q, k, out)):
        with pytest.raises(ValueError, match="out must share no memory"):
            cuattn.attention(*operands, out=out)


def test_results_that_overlap(backend, rng):
    """An input or one another, as the same view or not, in calls whose likes were fine."""
    x, y = (backend.asarray(rng.standard_normal((4, 64)).astype(np.float32)) for _ in range(2))
    m, l, other = (backend.asarray(np.zeros(4, np.float32)) for _ in range(3))  # noqa: E741
    values, indices = (backend.asarray(np.zeros((4, 64), d)) for d in (np.float32, np.int64))
    a, b = cuattn.softmax_state(x), cuattn.softmax_state(y)
    for _ in range(2):
        cuattn.softmax_state(x, out=(m, l))
        cuattn.top_k(x, 64, out=(values, indices))
        cuattn.merge(a, b, out=(m, l))
    for call in (
        lambda: cuattn.softmax_state(x, out=(m, m)),
        lambda: cuattn.top_k(x, 64, out=(x, indices)),
        lambda: cuattn.merge(a, b, out=(other, other)),
        lambda: cuattn.merge(a, b, out=(a.m, a.m)),
    ):
        with pytest.raises(ValueError, match=r"out\[[01]\] must share no memory with"):
            call()
    want = [backend.asnumpy(part) for part in cuattn.merge(a, b)]
    for part, one in zip(cuattn.merge(a, b, out=(b.m, a.l)), want, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(part), one)


@pytest.mark.host
def test_out_that_cannot_be_written_to(backend):
    x, out = np.ones((2, 3), np.float32), np.empty((2, 3), np.float32)
    for _ in range(2):
        cuattn.softmax(x, out=out)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writeable"):
        cuattn.softmax(x, out=out)


@pytest.mark.host
def test_values_of_the_host(backend, rng):
    """Of lengths and ends that NumPy holds."""
    q = rng.standard_normal((2, 1, 4, 32)).astype(np.float32)
    lens, ends = np.array([1, 4]), np.array([0, 1, 4])
    for _ in range(2):
        cuattn.attention(q, q, q, kv_lens=lens)
        cuattn.segment_softmax(q[0, 0], ends)
    lens[0], ends[1] = 5, 5
    with pytest.raises(ValueError, match="kv_lens must be from 0 to 4"):
        cuattn.attention(q, q, q, kv_lens=lens)
    with pytest.raises(ValueError, match="cu_seqlens must never fall"):
        cuattn.segment_softmax(q[0, 0], ends)


# ---- Runtimes, devices, threads, streams ----


def test_runtimes_share_nothing():
    """As the emulator of another architecture; and a runtime that is gone is forgotten."""
    import emulator

    x = np.ones((4, 40_000), np.float32)
    found = []
    for arch in ("sm_80", "sm_90", "sm_80"):
        with emulator.activate(arch) as runtime:
            for _ in range(2):
                cuattn.softmax(x)
            found.append([kernel.cluster for kernel in runtime.kernels])
    assert found[0] == found[2] != found[1]
    gone = weakref.ref(runtime)
    del runtime
    gc.collect()
    assert gone() is None


def test_one_address_on_two_devices(gpus, compiled):  # noqa: F811
    """What is planned for a device and loaded there runs there."""
    one, other = (gpus.ndarray((64, 20_000), "float32", device) for device in (0, 1))
    other.data.ptr = one.data.ptr = 1 << 20
    for array in (one, other) * 3:
        assert cuattn.softmax(array).data.device_id == array.data.device_id
    assert [(device, grid) for device, _, grid, *_ in gpus.launches] == [
        (0, (64,)),
        (1, (128,)),
    ] * 3


def test_a_warm_call_plans_nothing(gpus, compiled, monkeypatch):  # noqa: F811
    """Of every function."""
    x, y = gpus.ndarray((8, 64), "float32", 1), gpus.ndarray((8, 64), "float32", 1)
    lse, ends = gpus.ndarray((8,), "float32", 1), gpus.ndarray((3,), "int64", 1)
    where, other = gpus.ndarray((8, 64), "bool", 1), gpus.ndarray((8,), "float32", 1)
    best = gpus.ndarray((8, 3), "float32", 1), gpus.ndarray((8, 3), "int64", 1)
    labels = gpus.ndarray((8,), "int32", 1)
    q = gpus.ndarray((1, 1, 8, 64), "float32", 1)
    q_lse = gpus.ndarray((1, 1, 8), "float32", 1)
    lens, cache = gpus.ndarray((1,), "int64", 1), gpus.ndarray((1, 1, 9, 64), "float32", 1)
    out, halves = gpus.ndarray(q.shape, "float32", 1), []
    for half in range(2):  # of a pool, which interleave
        halves.append(gpus.ndarray(cache.shape, "float32", 1))
        halves[half].shape, halves[half].strides = (1, 1, 40, 64), (20480, 20480, 512, 4)
        halves[half].data.ptr = (1 << 41) + 256 * half
    lists = gpus.ndarray((1, 1), "int32", 1), gpus.ndarray((1, 1), "bool", 1)
    seen = gpus.ndarray((8, 8), "bool", 1)
    blocks = cuattn.BlockMask(gpus.ndarray((1,), "int32", 1), *lists, seen, (128, 128))
    places = blocks._replace(mask=cuattn.MaskExpression("q < t[k]", {"t": lens}, (8, 8)))
    gpus.ndarray.flags = types.SimpleNamespace(c_contiguous=True)
    gpus.ascontiguousarray = lambda array, dtype=None: array  # as CuPy's, of one that is
    calls = [
        lambda: cuattn.softmax(x, scale=2.0),
        lambda: cuattn.softmax(x, out=(y, lse), return_lse=True),
        lambda: cuattn.softmax(x, out=x),
        lambda: cuattn.log_softmax(x, axis=(0, 1)),
        lambda: cuattn.logsumexp(x, axis=-1),
        lambda: cuattn.softmax_backward(x, y),
        lambda: cuattn.log_softmax_backward(x, y, where=where),
        lambda: cuattn.segment_softmax(x, ends),
        lambda: cuattn.segment_softmax_backward(x, y, ends),
        lambda: cuattn.top_k(x, 3),
        lambda: cuattn.top_k(x, 3, out=best),
        lambda: cuattn.softmax_topk(x, 3, return_lse=True),
        lambda: cuattn.softmax_topk(x, 3, out=(*best, lse), return_lse=True),
        lambda: cuattn.softmax_state(x),
        lambda: cuattn.softmax_state(x, out=(lse, other)),
        lambda: cuattn.softmax_topk_state(x, 3),
        lambda: cuattn.softmax_topk_state(x, 3, out=(lse, other, *best)),
        lambda: cuattn.sample(x, 3, seed=1),
        lambda: cuattn.sample_state(x, 3, seed=1, scale=0.5),
        lambda: cuattn.cross_entropy(x, labels, scale=2.0),
        lambda: cuattn.cross_entropy(x, labels, return_lse=True, out=(lse, other)),
        lambda: cuattn.cross_entropy_backward(0.5, x, labels, lse, out=x),
        lambda: cuattn.cross_entropy_backward(other, x, labels, lse),
        lambda: cuattn.entropy(x, where=where),
        lambda: cuattn.logits_state(x, labels),
        lambda: cuattn.merge(*[cuattn.LogitsState(lse, lse, lse, other)] * 2),
        lambda: cuattn.merge(*[cuattn.SoftmaxState(lse, other)] * 2, out=(lse, other)),
        lambda: cuattn.merge(cuattn.SoftmaxState(lse, lse), cuattn.SoftmaxState(lse, lse)),
        lambda: cuattn.attention(q, q, q, window=(3, 0), kv_lens=lens),
        lambda: cuattn.attention(q, q, q, block_mask=blocks),
        lambda: cuattn.attention(q, q, q, block_mask=places),
        lambda: cuattn.attention(q, q, q, score="s + t[b]", score_args={"t": lens}),
        lambda: cuattn.merge_attention(q, q_lse, q, q_lse),
        lambda: cuattn.attention_kvcache(q, cache, cache, kv_lens=lens),
        lambda: cuattn.attention_kvcache(q, *halves, kv_lens=lens, k_new=q, v_new=q, out=out),
        lambda: cuattn.kv_append(cache, None, q, None, kv_lens=lens),
    ]
    cuattn.softmax(y)  # the first call of all makes the runtime
    for call in calls:
        call()
    launches = len(gpus.launches)

    runtime = device_runtime.current()
    monkeypatch.setattr(runtime, "recent", Known(runtime.recent))
    for call in calls:
        call()
    assert len(gpus.launches) == 2 * launches - 1


@pytest.mark.host
def test_a_warm_call_checks_nothing(monkeypatch, rng):
    """On NumPy arrays, of every function whose arrays are not looked into."""
    x = rng.standard_normal((1, 4, 4)).astype(np.float32)
    blocks = cuattn.block_mask(x > 0)
    places = cuattn.block_mask("d[h, q, k] > 0", 4, 4, args={"d": x}, heads=1)
    calls = [
        lambda: cuattn.softmax(x, scale=2.0),
        lambda: cuattn.log_softmax(x, where=x > 0),
        lambda: cuattn.logsumexp(x, axis=-1),
        lambda: cuattn.softmax_backward(x, x, where=x > 0),
        lambda: cuattn.top_k(x, 3),
        lambda: cuattn.softmax_topk(x, 3, return_lse=True),
        lambda: cuattn.softmax_state(x),
        lambda: cuattn.softmax_topk_state(x, 3),
        lambda: cuattn.sample(x, 3, seed=1, top_p=0.5, return_log_prob=True),
        lambda: cuattn.sample_state(x, 3, seed=x.astype(int)[..., :1], scale=0.5),
        lambda: cuattn.entropy(x, where=x > 0),
        lambda: cuattn.attention(x, x, x, window=(3, 0), bias=x),
        lambda: cuattn.attention(x, x, x, block_mask=blocks),
        lambda: cuattn.attention(x, x, x, block_mask=places),
        lambda: cuattn.attention(x, x, x, score="s + t[h, q, k]", score_args={"t": x}),
    ]
    want = [call() for call in calls]
    monkeypatch.setattr(HOST, "recent", Known(HOST.recent))
    for call, results in zip(calls, want, strict=True):
        for again, first in zip(call(), results, strict=True):
            np.testing.assert_array_equal(again, first)


def test_threads(gpus, compiled, monkeypatch):  # noqa: F811
    """Each calls with arrays of its own, of few layouts, where only the last two are remembered."""
    cuattn.softmax(gpus.ndarray((2,), "float32"))
    runtime = device_runtime.current()
    monkeypatch.setattr(runtime, "recent", Recent(2))
    barrier = threading.Barrier(6)

    def work(rows):
        x = gpus.ndarray((rows, 40_000), "float32")
        barrier.wait()
        return [(x.data.ptr, cuattn.softmax(x).data.ptr, rows) for _ in range(200)]

    gpus.launches.clear()
    with ThreadPoolExecutor(6) as pool:
        calls = {one for some in pool.map(work, (1, 2, 3) * 2) for one in some}
    packed = [args[0].tobytes() for *_, args in gpus.launches]
    rows = [struct.unpack_from("q", params, SOFTMAX_HEAD.struct.size)[0] for params in packed]
    heads = [SOFTMAX_HEAD.unpack(params) for params in packed]
    assert {(h["x"], h["out"], n) for h, n in zip(heads, rows, strict=True)} == calls
    assert len(calls) == 1200 and len(runtime.recent) <= 2


def test_recent():
    recent = Recent(3)
    for i in range(5):
        recent.put(i, str(i))
        recent.put(i, str(-i))
    assert [recent.get(i) for i in range(5)] == [None, None, "-2", "-3", "-4"]
    assert len(recent) == 3


@on_a_gpu
def test_a_warm_call_on_another_stream(backend, rng):
    """Planned on one stream, captured on another: the launches are in the graph of that."""
    numbers = rng.standard_normal((4, 300)).astype(np.float32)
    x, xp = backend.asarray(numbers), backend.xp
    y = cuattn.softmax(x, out=xp.empty_like(x))
    stream = xp.cuda.Stream(non_blocking=True)
    xp.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        cuattn.softmax(x, out=y)
        graph = stream.end_capture()
        x[...] = backend.asarray(numbers[::-1].copy())
        graph.launch()
        stream.synchronize()
    want = cuattn.reference.softmax(numbers[::-1])
    np.testing.assert_allclose(backend.asnumpy(y), want, rtol=1e-5)
