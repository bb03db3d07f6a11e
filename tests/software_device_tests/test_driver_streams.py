"""Streams and events of the software device: a missing wait is a wrong result with some seed."""

# ruff: noqa: F401, F811  (fixtures)

from __future__ import annotations

import inspect
import threading

import numpy as np
import pytest
import software_device
from driver_kernels import (
    SEEDS,
    CUDARuntimeError,
    Event,
    Stream,
    add_one,
    cupy,
    device,
    kernels,
    pairs,
    runtime,
    zeros,
)

# -- streams --


@pytest.mark.parametrize("waits", [False, True])
def test_a_missing_wait_for_an_event(kernels, waits):
    found = set()
    for seed in SEEDS:
        a, b, (one, two) = zeros(), zeros(), pairs(2)
        device.seed(seed)
        with one:
            add_one(kernels, a, a)
            add_one(kernels, a, a)
            event = one.record()
        if waits:
            two.wait_event(event)
        with two:
            add_one(kernels, a, b)
        two.synchronize()
        found.add(b.get(stream=two)[0])
    assert found == ({3} if waits else {1, 2, 3})


@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize("legacy_first", [False, True])
def test_the_legacy_stream(kernels, non_blocking, legacy_first):
    found = set()
    for seed in SEEDS:
        a, b, stream = zeros(), zeros(), Stream(non_blocking=non_blocking)
        device.seed(seed)
        first, second = (Stream.null, stream) if legacy_first else (stream, Stream.null)
        with first:
            add_one(kernels, a, a)
        with second:
            add_one(kernels, a, b)
        second.synchronize()
        found.add(b.get(stream=second)[0])
        runtime.deviceSynchronize()
    assert found == ({1, 2} if non_blocking else {2})


def test_the_per_thread_stream_is_blocking(kernels):
    for seed in SEEDS:
        a = zeros()
        device.seed(seed)
        add_one(kernels, a, a)
        with Stream.ptds:
            add_one(kernels, a, a)
        add_one(kernels, a, a)
        assert a.get(stream=Stream.null)[0] == 3


@pytest.mark.parametrize("waits", [False, True])
def test_a_pinned_buffer_that_is_filled_again(waits):
    found = set()
    for seed in SEEDS:
        device.seed(seed)
        memory = cupy.cuda.alloc_pinned_memory(128)
        buffer = np.frombuffer(memory, np.float32, 32)
        (stream,), x = pairs(1), zeros()
        buffer[:] = 1
        x.data.copy_from_host_async(buffer.ctypes.data, 128, stream)
        if waits:
            stream.synchronize()
        buffer[:] = 2
        stream.synchronize()
        found.add(x.get(stream=stream)[0])
    assert found == ({1} if waits else {2})


def test_pageable_memory_is_read_at_once():
    buffer, (stream,), x = np.ones(32, np.float32), pairs(1), zeros()
    x.data.copy_from_host_async(buffer.ctypes.data, 128, stream)
    buffer[:] = 2
    assert (x.get(stream=stream) == 1).all()


def test_nothing_runs_before_the_host_waits(kernels):
    before = device.stats()
    x, event = cupy.empty(32, cupy.float32), Event()
    kernels.fill((1,), (32,), (x, 0, np.float32(1)))
    event.record()
    assert device.stats() == before
    event.synchronize()
    assert device.stats() > before


def test_a_query_comes_true(kernels):
    (stream,), x = pairs(1), zeros()
    for seed in SEEDS:
        device.seed(seed)
        with stream:
            kernels.fill((1,), (32,), (x, 0, np.float32(1)))
            event = stream.record()
        for query in range(1000):
            if event.done if query % 2 else stream.done:
                break
        else:
            pytest.fail("the event never came")


def test_time_between_events(kernels):
    start, end, x = Event(), Event(), zeros()
    start.record()
    kernels.fill((1,), (32,), (x, 0, np.float32(1)))
    end.record()
    with pytest.raises(CUDARuntimeError, match="cudaErrorNotReady"):
        cupy.cuda.get_elapsed_time(start, end)
    end.synchronize()
    assert cupy.cuda.get_elapsed_time(start, end) > 0
    with pytest.raises(CUDARuntimeError, match="not recorded"):
        cupy.cuda.get_elapsed_time(start, Event())


def test_host_functions_come_in_order(kernels):
    (stream,), x, seen = pairs(1), zeros(), []
    for value in range(3):
        with stream:
            kernels.fill((1,), (32,), (x, 0, np.float32(value)))
        stream.launch_host_func(seen.append, value)
    assert seen == []
    stream.synchronize()
    assert seen == [0, 1, 2]


def test_a_host_function_may_not_call_cuda():
    (stream,), errors = pairs(1), []

    def call(_):
        try:
            runtime.deviceSynchronize()
        except CUDARuntimeError as error:
            errors.append(str(error))

    stream.launch_host_func(call, None)
    stream.synchronize()
    assert "may not call CUDA" in errors[0]


def test_handles_that_are_destroyed():
    event, stream = runtime.eventCreate(), runtime.streamCreate()
    runtime.eventDestroy(event)
    runtime.streamDestroy(stream)
    with pytest.raises(CUDARuntimeError, match="no such event"):
        runtime.eventRecord(event, 0)
    with pytest.raises(CUDARuntimeError, match="no such stream"):
        runtime.streamSynchronize(stream)


def test_a_destroyed_stream_still_does_its_work(kernels):
    x, stream = zeros(), Stream()
    with stream:
        kernels.fill((1,), (32,), (x, 0, np.float32(5)))
    del stream
    assert (x.get() == 5).all()


# -- threads --


def test_threads_with_streams_and_host_functions(kernels):
    """Python's lock and the driver's, taken in any order, must not wait for each other."""
    failures = []

    def work(number):
        try:
            (stream,), seen = pairs(1), []
            x = cupy.zeros(32, cupy.float32)
            runtime.deviceSynchronize()
            for value in range(20):
                with stream:
                    add_one(kernels, x, x)
                stream.launch_host_func(seen.append, value)
                event = stream.record()
                while value % 3 == 0 and not event.done:
                    pass
                if value % 3 == 1:
                    stream.synchronize()
            assert x.get(stream=stream).tolist() == [20] * 32
            assert seen == list(range(20))
        except Exception as error:
            failures.append((number, error))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


# -- cuattn --


def calls_of_cuattn():
    """A call of every public function."""
    import cuattn

    x = cupy.ones((4, 64), cupy.float32)
    q = cupy.ones((1, 2, 16, 64), cupy.float16)
    flat = cupy.ones((32, 2, 64), cupy.float16)
    offsets = cupy.array([0, 16, 32], np.int32)
    state, topk_state = cuattn.softmax_state(x), cuattn.softmax_topk_state(x, 3)
    draws, seeds = cuattn.sample_state(x, 3, seed=1), cupy.arange(4)[:, None]
    labels = cupy.array([0, 63, -100, 64], np.int32)
    logits = cuattn.logits_state(x, labels)
    part = cuattn.attention(q, q, q, return_lse=True)
    flat_lse = cupy.zeros((2, 32), cupy.float32)
    cache, cache_lens = cupy.zeros((1, 2, 64, 64), cupy.float16), offsets[1:2]
    return {
        "softmax": lambda: cuattn.softmax(x, where=x > 0, scale=0.5),
        "log_softmax": lambda: cuattn.log_softmax(x, axis=0),
        "softmax with a state": lambda: (
            cuattn.softmax(x, state=state),
            cuattn.log_softmax(topk_state.values, state=topk_state),
        ),
        "logsumexp": lambda: cuattn.logsumexp(x, axis=-1, b=2.0),
        "softmax_backward": lambda: cuattn.softmax_backward(x, x),
        "log_softmax_backward": lambda: cuattn.log_softmax_backward(x, x, where=x > 0),
        "segment_softmax": lambda: cuattn.segment_softmax(flat[:, 0, 0], offsets),
        "segment_softmax_backward": lambda: cuattn.segment_softmax_backward(
            flat[:, 0, 0], flat[:, 0, 1], offsets
        ),
        "top_k": lambda: cuattn.top_k(x, 3),
        "softmax_topk": lambda: cuattn.softmax_topk(x, 3),
        "softmax_state": lambda: cuattn.softmax_state(x),
        "softmax_topk_state": lambda: cuattn.softmax_topk_state(x, 3),
        "sample": lambda: (
            cuattn.sample(x, 2, seed=seeds, offset=seeds[0], return_log_prob=True),
            cuattn.sample(x, seed=1, top_k=5, top_p=0.5, min_p=0.1),
        ),
        "sample_state": lambda: cuattn.sample_state(x, 3, seed=1),
        "cross_entropy": lambda: cuattn.cross_entropy(x, labels.astype(np.uint64), axis=1),
        "cross_entropy_backward": lambda: cuattn.cross_entropy_backward(
            cupy.float16(0.25), x, labels, logits.lse
        ),
        "entropy": lambda: cuattn.entropy(x, where=x > 0),
        "logits_state": lambda: cuattn.logits_state(x.T, labels, axis=0),
        "merge": lambda: (
            cuattn.merge(state, state),
            cuattn.merge(topk_state, topk_state),
            cuattn.merge(logits, logits),
            cuattn.merge(draws, draws),
        ),
        "attention": lambda: cuattn.attention(q, q, q, is_causal=True),
        "attention_varlen": lambda: cuattn.attention_varlen(
            flat, flat, flat, offsets, offsets, score="s + t[q]", score_args={"t": flat[:, 0, 0]}
        ),
        "attention_backward": lambda: cuattn.attention_backward(q, q, q, q, *part),
        "attention_backward_varlen": lambda: cuattn.attention_backward_varlen(
            *(flat,) * 5,
            flat_lse,
            offsets,
            offsets,
            score="s * t[2] + t[q - k]",
            score_args={"t": flat[:, 0, 0]},
            return_dscore=True,
        ),
        "attention_column_sums": lambda: cuattn.attention_column_sums(q, q, part[1]),
        "block_mask": lambda: [
            cuattn.attention(q, q, q, block_mask=blocks)
            for blocks in (
                cuattn.block_mask(x[:1, :16] > 0, 16),
                cuattn.block_mask("d[q] <= d[k]", 16, 16, args={"d": x[0]}),
            )
        ],
        "merge_attention": lambda: cuattn.merge_attention(*part, *part),
        "merge_attention_states": lambda: cuattn.merge_attention_states(
            cupy.stack([part[0]] * 2), cupy.stack([part[1]] * 2)
        ),
        "attention_kvcache": lambda: cuattn.attention_kvcache(
            q,
            cache,
            cache,
            kv_lens=cache_lens,
            split_size=128,
            score="s + t[q]",
            score_args={"t": flat[:, 0, 0]},
        ),
        "attention_cascade": lambda: cuattn.attention_cascade(
            q, [(q[0], q[0])], cache, cache, kv_lens=cache_lens
        ),
        "attention_topk": lambda: cuattn.attention_topk(q, q, 3, kv_lens=cache_lens),
        "kv_append": lambda: cuattn.kv_append(cache, None, q, None, kv_lens=cache_lens),
    }


def test_no_function_of_cuattn_waits():
    import cuattn

    calls = calls_of_cuattn()
    functions = {name for name in cuattn.__all__ if inspect.isfunction(getattr(cuattn, name))}
    assert functions - {"compile", "show_config"} == set(calls) - {"softmax with a state"}
    for call in calls.values():
        call()  # kernels are loaded
        with software_device.no_synchronisation():
            call()
        device.flush()
