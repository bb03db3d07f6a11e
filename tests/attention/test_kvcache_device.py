"""attention_kvcache on a device: what is decided when it is called, and what when it runs."""

from __future__ import annotations

import contextlib

import emulator
import numpy as np
import pytest
from attention_cases import NAN, put, put_options
from conftest import NumpyBackend, on_a_gpu
from kvcache_cases import Cached, swapped
from test_kvcache import bits

import cuattn
from cuattn._device import runtime as device_runtime

EMULATOR = ["emulator-sm_80", "emulator-sm_90a"]
on_the_emulator = pytest.mark.parametrize("backend", EMULATOR, indirect=True)
INTEGERS = ("kv_lens", "page_table", "q_lens", "q_offset")


@pytest.fixture
def device(backend):
    """A backend with kernels, which leave every counter at 0."""
    if backend.name == "numpy":
        pytest.skip("on a device")
    yield backend
    for workspace in workspaces(backend):
        assert not backend.asnumpy(workspace.counters).any()


def workspaces(backend):
    runtime = device_runtime.current() if backend.on_device else backend.runtime
    return [] if runtime is None else runtime.workspaces.all


def captured(backend, call):
    """What repeats the launches of a call, which is not computed: a graph of it."""
    if backend.on_device:
        stream = backend.xp.cuda.Stream(non_blocking=True)
        backend.xp.cuda.Device().synchronize()
        with stream:
            call()  # makes the workspace
            stream.begin_capture()
            call()
            graph = stream.end_capture()
            stream.synchronize()

        def replay():
            backend.xp.cuda.Device().synchronize()
            graph.launch(stream)
            stream.synchronize()

        return replay
    launches, launch = [], backend.runtime.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.runtime, "launch", lambda *given: launches.append(given))
        call()
    assert len(launches) == 1
    return lambda: [launch(*given) for given in launches]


class OnDevice:
    """The arrays of a `Cached` on a backend, and `out` and lse."""

    def __init__(self, backend, cached):
        self.backend, self.given = backend, put_options(backend, cached.options)
        self.arrays = [put(backend, a) for a in (cached.q, *(c.copy() for c in cached.caches))]
        batch, heads, rows, _ = cached.problem.q.shape
        out = swapped(np.zeros((batch, heads, rows, cached.problem.v.shape[3])), cached.layout)
        self.out = put(backend, out.astype(cached.q.dtype))
        self.lse = put(backend, np.zeros((batch, heads, rows), np.float32))

    def call(self, **more):
        outs = self.out, self.lse
        got = cuattn.attention_kvcache(
            *self.arrays, **{**self.given, **more}, out=outs, return_lse=True
        )
        assert all(one is other for one, other in zip(got, outs, strict=True))

    def write(self, cached):
        """The values of another one of the same shapes, in place."""
        given = {n: a for n, a in cached.options.items() if isinstance(a, np.ndarray)}
        for name, a in given.items():
            self.given[name][...] = put(self.backend, np.ascontiguousarray(a))
        for to, a in zip(self.arrays, (cached.q, *cached.caches), strict=True):
            to[...] = put(self.backend, a)

    def check(self, cached):
        out, lse = (self.backend.asnumpy(one) for one in (self.out, self.lse))
        cached.problem.check(swapped(out, cached.layout), lse)
        for cache, after in zip(self.arrays[1:], cached.after, strict=True):
            assert self.backend.asnumpy(cache).tobytes() == after.tobytes()


# ---- what is read when --------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("split_size", [None, "auto"])
@pytest.mark.parametrize("new", [0, 2])
def test_replay(device, rng, monkeypatch, page_size, split_size, new):
    """The launches of one call, made with garbage for lengths, offsets and pages, compute others:
    of longer, of shorter and of no keys, in other pages. So the host has read none of them.
    """
    monkeypatch.setattr("cuattn._attention.request_kvcache.check_values", lambda *_: None)

    def problem(lens, q_lens, offsets):
        how = {"rows": 3, "heads": (4, 2), "capacity": 700, "page_size": page_size, "new": new}
        numbers = {"q_lens": np.array(q_lens, np.int32), "q_offset": np.array(offsets)}
        return Cached(rng, lens=lens, **how, **numbers, window=(300, 0))

    some = [
        problem([6, 2, 40], [3, 1, 2], [3, 1, 37]),
        problem([6, 2, 40], [3, 1, 2], [3, 1, 37]),
        problem([700, 3, 299], [1, 3, 3], [699, 0, 200]),
        problem([new, new, new], [3, 3, 3], [0, 5, -1]),
        problem([17, 700, 33], [3, 2, 3], [14, 650, 30]),
    ]
    on = OnDevice(device, some[0])
    for name in INTEGERS:
        if name in on.given:
            on.given[name][...] = -12345
    replay = captured(device, lambda: on.call(split_size=split_size))
    for cached in (*some[1:], some[2]):
        on.write(cached)
        replay()
        on.check(cached)


OPTIONS = {
    "few": {},
    "new": {"new": 2, "rows": 2, "q_lens": np.array([2, 1], np.int32)},
    "many": {
        "rows": 3, "softcap": 3.0, "tree": np.tri(3, 5, 2, dtype=bool), "window": (50, 0),
        "alibi_slopes": np.ones((2, 4), np.float32) / 9, "sinks": np.ones(8, np.float32)[::2],
        "q_offset": np.array([30, 5]),
    },
}  # fmt: skip


@pytest.mark.parametrize("how", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("integers", [np.int32, np.int64])
def test_nothing_is_allocated(device, rng, monkeypatch, how, integers):
    """With `out`, neither a result nor a copy of an argument, of either width and any strides."""
    cached = Cached(rng, lens=[70, 20], page_size=16, table_dtype=integers, layout="BSHD", **how)
    for name in set(INTEGERS) & set(cached.options):
        spread = np.repeat(cached.options[name].astype(integers), 2, axis=-1)
        cached.options[name] = spread[..., ::2]
    on = OnDevice(device, cached)
    on.call(layout="BSHD")  # makes the workspace, loads the kernel

    def refuse(*_):
        raise AssertionError("memory is asked for")

    with contextlib.ExitStack() as stack:
        if device.on_device:
            stack.enter_context(device.xp.cuda.using_allocator(refuse))
        else:
            monkeypatch.setattr(device.runtime, "empty", refuse)
        on.call(layout="BSHD")
    on.check(cached)


@on_the_emulator
def test_one_launch_that_reads_what_it_is_given(device, rng):
    """No kernel before or after it, no copy among what it reads."""
    cached = Cached(rng, lens=[70, 20], page_size=16, new=2, rows=2)
    on, launch, reads = OnDevice(device, cached), device.runtime.launch, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device.runtime, "launch", lambda *g: (reads.extend(g[2]), launch(*g)))
        on.call()
    given = [*on.arrays, *on.given.values(), *(a for w in workspaces(device) for a in w)]
    assert len(device.runtime.kernels) == 1
    assert all(any(np.shares_memory(a, one) for one in given) for a in reads)
    on.check(cached)


@on_the_emulator
def test_new_keys_of_eight_bits_are_written_first(device, rng):
    """By a launch of its own, which a replay repeats."""
    q, new = (rng.standard_normal((2, n, 2, 64)).astype("f2") for n in (4, 2))
    caches = [np.zeros((2, 2, 40, 64), np.int8) for _ in range(2)]
    out, lens = np.empty_like(q), np.array([20, 3])
    scales = {name: np.full((2, 2, 40), NAN, "f4") for name in ("k_scale", "v_scale")}
    for array in (*caches, *scales.values()):
        array[:, :, :20] = 1
    codes, factors = ([a.copy() for a in some] for some in (caches, scales.values()))
    own = dict(zip(scales, factors, strict=True))
    cuattn.reference.kv_append(*codes, new, new, kv_lens=lens, **own)
    cuattn.attention_kvcache(q, *caches, kv_lens=lens, k_new=new, v_new=new, **scales, out=out)
    kernels = [kernel.template for kernel in device.runtime.kernels]
    assert kernels == ["attention_kv_append", "attention_decode"]
    np.testing.assert_allclose([*scales.values()], factors, rtol=1e-6)
    # A tie may round either way, and is seen as it was written.
    np.testing.assert_allclose(np.float32(caches), codes, rtol=0, atol=1)
    want = cuattn.reference.attention_kvcache(q, *caches, kv_lens=lens + 2, **scales)
    np.testing.assert_allclose(out, want, atol=3e-3)


# ---- bits ---------------------------------------------------------------------------------------


def alone(cached, some, arch, num_sms, seed, **options):
    """Bits of out and lse of each of some sequences, computed together."""
    with emulator.activate(arch, num_sms, seed) as runtime:
        given = {n: a[some] if np.ndim(a) else a for n, a in cached.options.items()}
        got = cuattn.attention_kvcache(
            cached.q[some], *cached.caches, **given, **options, return_lse=True
        )
        assert not any(w.counters.any() for w in runtime.workspaces.all)
    return [tuple(bits(one[i] for one in got)) for i in range(len(some))]


@pytest.mark.drawn
@pytest.mark.parametrize(("op", "arch"), [("float16", "sm_90a"), ("float32", "sm_80")])
@pytest.mark.parametrize("split_size", ["auto", 144])
def test_bits_do_not_depend_on_the_batch(rng, op, arch, split_size):
    """Nor on the number of multiprocessors, nor on the order in which blocks run."""
    cached = Cached(rng, op, lens=[530, 3, 0, 700, 129], page_size=16, capacity=704, heads=(2, 1))
    want = alone(cached, [0, 1, 2, 3, 4], arch, 5, 0, split_size=split_size)
    for some, num_sms in (([0, 1, 2, 3, 4], 132), ([3], 3), ([3, 3], 7), ([4, 3, 0, 2], 11),
                          ([0], 1)):  # fmt: skip
        for seed in (1, 2, 3) if num_sms < 12 else (1,):
            got = alone(cached, some, arch, num_sms, seed, split_size=split_size)
            assert got == [want[i] for i in some]


LATENT = {"lens": [230, 3, 0, 300], "heads": (20, 1), "dims": (576, 576), "value_dim": 512}


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("arch", "num_sms", "how"),
    [
        *(("sm_80", n, {}) for n in (1, 3, 8, 40)),
        ("sm_80", 3, LATENT),
        ("sm_90", 3, {**LATENT, "heads": (40, 1)}),
    ],
    ids=["1", "3", "8", "40", "latent", "many rows"],
)
def test_bits_are_the_same_on_every_run(rng, arch, num_sms, how):
    """Also where shares are equal: in whatever order blocks run, and which of them merges."""
    how = {"lens": [530, 3, 0, 700], "heads": (4, 2), "page_size": 16, "rows": 2, **how}
    cached = Cached(rng, capacity=704, **how)
    runs = [alone(cached, [0, 1, 2, 3], arch, num_sms, seed, split_size=None) for seed in range(4)]
    assert runs[1:] == runs[:-1]
    with emulator.activate(arch, num_sms) as runtime:
        cached.problem.check(*cached.run(NumpyBackend("emulator", arch, runtime)))


@pytest.mark.drawn
@pytest.mark.parametrize("dims", [(64, None), (128, None), (200, None), (576, 512)], ids=str)
def test_blocks_with_little_shared_memory(rng, dims):
    """Tiles of sm_86, sm_89 and sm_120: fewer keys, warps and stages."""
    dim, value_dim = dims
    ops = [("float16", 1, 1), ("bfloat16", 6, 0), ("float32", 6, 1)]
    for op, rows, new in [*ops, ("float64", 3, 1)] if dim <= 256 else ops:
        with emulator.activate("sm_86", 5, int(rng.integers(100))) as runtime:
            how = {"lens": [130, 70, 3], "heads": (8, 1), "rows": rows, "new": new}
            how |= {"dims": (dim, dim), "value_dim": value_dim, "page_size": 16}
            cached = Cached(rng, op, **how)
            cached.problem.check(*cached.run(NumpyBackend("emulator", "sm_86", runtime)))
        assert runtime.kernels[-1].smem_bytes <= 99 * 1024


# ---- the workspace ------------------------------------------------------------------------------


def test_a_capture_without_a_workspace(device, rng, monkeypatch):
    """An error before anything is launched; a call on that stream is what it asks for."""
    cached = Cached(rng, lens=[70, 20], page_size=16)
    words = r"attention_kvcache must run once on this stream before it is captured"
    if device.on_device:
        on, stream = OnDevice(device, cached), device.xp.cuda.Stream(non_blocking=True)
        on.call()  # on another stream
        device.xp.cuda.Device().synchronize()
        # The handle may be that of a stream which is gone and had one.
        monkeypatch.setattr(device_runtime.current().workspaces, "_latest", {})
        with stream:
            stream.begin_capture()
            with pytest.raises(RuntimeError, match=words):
                on.call()
            stream.end_capture()
    else:
        on, runtime = OnDevice(device, cached), device.runtime
        runtime.capturing = True
        with pytest.raises(RuntimeError, match=words):
            on.call()
        assert not runtime.kernels
        runtime.capturing = False
        on.call()
        runtime.capturing = True
    replay = captured(device, on.call)
    replay()
    on.check(cached)


def test_a_workspace_that_grows(device, rng):
    """A graph goes on with the one that it was captured with."""
    small = Cached(rng, lens=[300, 20], page_size=16, heads=(2, 1))
    on = OnDevice(device, small)
    replay = captured(device, lambda: on.call(split_size=128))
    before = len(workspaces(device))
    rows = 40 if not device.on_device else 400  # 8 MiB of parts are there from the beginning
    large = Cached(rng, lens=[900, 1000, 1000], page_size=16, rows=rows, heads=(8, 2))
    if device.on_device:
        stream = device.xp.cuda.Stream(non_blocking=True)
        device.xp.cuda.Device().synchronize()
        with stream:
            large.problem.check(*large.run(device, split_size=128))
            on.call(split_size=128)
    else:
        large.problem.check(*large.run(device, split_size=128))
        assert len(workspaces(device)) > before
    on.out[...], on.lse[...] = NAN, NAN
    replay()
    on.check(small)


@on_a_gpu
def test_streams_have_workspaces_of_their_own(device, rng):
    """Calls on several streams, in any order."""
    some = [Cached(rng, lens=[400 + i, 7], page_size=16, heads=(2, 1)) for i in range(3)]
    on = [OnDevice(device, cached) for cached in some]
    streams = [device.xp.cuda.Stream(non_blocking=True) for _ in some]
    device.xp.cuda.Device().synchronize()
    for _ in range(2):
        for one, stream in zip(on, streams, strict=True):
            with stream:
                one.call(split_size=128)
    device.xp.cuda.Device().synchronize()
    for one, cached in zip(on, some, strict=True):
        one.check(cached)


# ---- warm calls ---------------------------------------------------------------------------------


def test_warm_calls_look_for_overlaps(device, rng):
    """Of what is written with what is read: out and a cache, new keys and a cache; the halves of a
    pool interleave, which is fine.
    """

    def zeros(*shape):
        return device.asarray(np.zeros(shape, np.float32))

    q, k_new, out, pool = (
        zeros(2, 2, 1, 64),
        zeros(2, 1, 1, 64),
        zeros(2, 2, 1, 64),
        zeros(3, 2, 1, 8, 64),
    )
    table = device.asarray(np.array([[0], [2]], np.int32))
    lens = device.asarray(np.array([3, 4], np.int32))
    caches = pool[:, 0], pool[:, 1]
    given = {"page_table": table, "kv_lens": lens}
    for _ in range(3):
        cuattn.attention_kvcache(q, *caches, **given, out=out)
        cuattn.attention_kvcache(q, *caches, **given, out=out, k_new=k_new, v_new=k_new)
    inside = pool.reshape(-1)[:256].reshape(q.shape)
    with pytest.raises(ValueError, match="out must .* share no memory with it"):
        cuattn.attention_kvcache(q, *caches, **given, out=inside)
    with pytest.raises(ValueError, match="v_new must share no memory with k_cache"):
        cuattn.attention_kvcache(
            q,
            *caches,
            **given,
            out=out,
            k_new=k_new,
            v_new=inside.reshape(-1)[:128].reshape(k_new.shape),
        )
    with pytest.raises(ValueError, match="q must share no memory with k_cache"):
        cuattn.attention_kvcache(inside, *caches, **given, out=out, k_new=k_new, v_new=k_new)
