"""Host cost of a warm call: all Python from the public function to the launch, which is a stub.

No GPU and no CuPy: a stand-in module has the attributes of CuPy that cuattn touches, and everything
of cuattn's own runs, down to the arguments of the kernel. `extra_info["microseconds"]` is the
median, for which the contract allows 8.

    python -m pytest bench/bench_host_cost.py --benchmark-only
"""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

import cuattn
from cuattn._device import runtime as device_runtime
from cuattn._device import tensor_map
from cuattn._device.kernel import Limits

LIMIT = 8e-6  # seconds


class Array:
    """What cuattn reads of a cupy.ndarray, at the cost of an attribute."""

    __slots__ = ("shape", "strides", "dtype", "itemsize", "ndim", "size", "data", "flags")

    def __init__(self, shape, dtype=np.float32, strides=None):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.ndim, self.itemsize = len(shape), self.dtype.itemsize
        self.size = int(np.prod(shape))
        packed = np.cumprod((self.itemsize, *shape[:0:-1]))[::-1]
        self.strides = tuple(int(s) for s in packed[: self.ndim]) if strides is None else strides
        self.data = types.SimpleNamespace(ptr=1 << 40, device_id=0)
        self.flags = types.SimpleNamespace(c_contiguous=True)

    def transpose(self, order):
        return self

    def __getitem__(self, index):
        return self


class Empty:
    """cupy.empty without the allocation: one array a shape and dtype."""

    def __init__(self):
        self.made = {}

    def __call__(self, shape, dtype):
        return self.made.get((shape, dtype)) or self.made.setdefault(
            (shape, dtype), Array(shape, dtype)
        )


class Launches:
    """The loaded kernel, and the device it runs on."""

    count = 0
    limits = Limits(90, 132)

    def __call__(self, grid, block, args, shared_mem=0):
        self.count += 1


@pytest.fixture
def launches(monkeypatch):
    stream = types.SimpleNamespace(ptr=0, is_capturing=lambda: False)
    runtime = types.SimpleNamespace(getDevice=lambda: 0)
    cuda = types.SimpleNamespace(runtime=runtime, get_current_stream=lambda: stream)
    cupy = types.ModuleType("cupy")
    cupy.ndarray, cupy.empty, cupy.zeros, cupy.cuda = Array, Empty(), Empty(), cuda
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    launches = Launches()
    monkeypatch.setattr(device_runtime.Cuda, "limits", lambda self, device: launches.limits)
    monkeypatch.setattr(device_runtime.Cuda, "_load", lambda self, kernel, device: launches)
    monkeypatch.setattr(tensor_map, "_encoder", lambda: lambda *arguments: 0)
    device_runtime._runtimes.clear()
    yield launches
    device_runtime._runtimes.clear()
    tensor_map.encode.cache_clear()  # of maps that the driver has not seen


x = Array((64, 1000))
y = Array((64, 1000))
y.data.ptr += 1 << 30
lse = Array((64,))
lse.data.ptr += 1 << 31
transposed = Array((1000, 64), strides=(4, 4000))
rows = Array((64, 1))
mask = Array((64, 1000), bool)
offsets = Array((3,), np.int64)
labels = Array((64,), np.int64)
labels.data.ptr += 1 << 35
seeds = Array((64, 1), np.int64)
state = cuattn.SoftmaxState(lse, lse)
logits_state = cuattn.LogitsState(lse, lse, lse, lse)
q = Array((2, 8, 512, 64), np.float16)
k = Array((2, 4, 512, 64), np.float16)
out = Array((2, 8, 512, 64), np.float16)
out.data.ptr += 1 << 32
scores_lse = Array((2, 8, 512))
token = Array((32, 32, 1, 128), np.float16)
decoded = Array((32, 32, 1, 128), np.float16)
decoded.data.ptr += 1 << 33
pages = Array((8192, 8, 16, 128), np.float16)
pages.data.ptr += 1 << 34
new = Array((32, 8, 1, 128), np.float16)
table = Array((32, 256), np.int32)
lens = Array((32,), np.int32)

CALLS = {
    "softmax": lambda: cuattn.softmax(x),
    "softmax, axis 0": lambda: cuattn.softmax(x, axis=0),
    "softmax, transposed": lambda: cuattn.softmax(transposed),
    "softmax, scale": lambda: cuattn.softmax(x, scale=0.5),
    "softmax, scale per row": lambda: cuattn.softmax(x, scale=rows),
    "softmax, where": lambda: cuattn.softmax(x, where=mask),
    "softmax, return_lse": lambda: cuattn.softmax(x, return_lse=True),
    "softmax, out": lambda: cuattn.softmax(x, out=y),
    "softmax, out and lse": lambda: cuattn.softmax(x, out=(y, lse), return_lse=True),
    "log_softmax": lambda: cuattn.log_softmax(x),
    "logsumexp": lambda: cuattn.logsumexp(x, axis=-1),
    "softmax_backward": lambda: cuattn.softmax_backward(x, y),
    "softmax_backward, where": lambda: cuattn.softmax_backward(x, y, where=mask),
    "log_softmax_backward": lambda: cuattn.log_softmax_backward(x, y),
    "segment_softmax": lambda: cuattn.segment_softmax(x, offsets),
    "segment_softmax_backward": lambda: cuattn.segment_softmax_backward(x, y, offsets),
    "cross_entropy": lambda: cuattn.cross_entropy(x, labels),
    "cross_entropy, return_lse": lambda: cuattn.cross_entropy(x, labels, return_lse=True),
    "cross_entropy_backward": lambda: cuattn.cross_entropy_backward(0.5, x, labels, lse),
    "cross_entropy_backward, in place": lambda: cuattn.cross_entropy_backward(
        lse, x, labels, lse, out=x
    ),
    "entropy": lambda: cuattn.entropy(x),
    "top_k": lambda: cuattn.top_k(x, 5),
    "softmax_topk": lambda: cuattn.softmax_topk(x, 5),
    "softmax_topk, renormalize": lambda: cuattn.softmax_topk(x, 5, renormalize=True),
    "softmax_topk, return_lse": lambda: cuattn.softmax_topk(x, 5, return_lse=True),
    "sample": lambda: cuattn.sample(x, seed=3, offset=5),
    "sample, seed per row": lambda: cuattn.sample(x, seed=seeds),
    "sample, filters": lambda: cuattn.sample(x, seed=3, top_k=50, top_p=0.9, min_p=0.1),
    "softmax_state": lambda: cuattn.softmax_state(x),
    "logits_state": lambda: cuattn.logits_state(x, labels),
    "sample_state": lambda: cuattn.sample_state(x, seed=3),
    "softmax_topk_state": lambda: cuattn.softmax_topk_state(x, 5),
    "merge": lambda: cuattn.merge(state, state),
    "merge, logits": lambda: cuattn.merge(logits_state, logits_state),
    "attention": lambda: cuattn.attention(q, k, k),
    "attention, causal": lambda: cuattn.attention(q, k, k, is_causal=True),
    "attention, return_lse": lambda: cuattn.attention(q, k, k, return_lse=True),
    "attention, out": lambda: cuattn.attention(q, k, k, out=out),
    "attention, sm_80": lambda: cuattn.attention(q, k, k),
    "attention_backward": lambda: cuattn.attention_backward(q, q, k, k, q, scores_lse),
    "attention_kvcache": lambda: cuattn.attention_kvcache(
        token, pages, pages, kv_lens=lens, page_table=table, out=decoded
    ),
    "kv_append": lambda: cuattn.kv_append(pages, pages, new, new, kv_lens=lens, page_table=table),
    "merge_attention": lambda: cuattn.merge_attention(q, scores_lse, q, scores_lse),
}


@pytest.mark.benchmark(group="host cost of a warm call, launch stubbed")
@pytest.mark.parametrize("name", CALLS)
def bench_host_cost(benchmark, launches, name):
    call = CALLS[name]
    mapped = name.split(",")[0] in ("attention", "attention_backward")  # by Hopper's kernels
    if name.endswith("sm_80"):
        launches.limits, mapped = Limits(80, 108), False
    call()
    assert launches.count > 0 and (tensor_map.encode.cache_info().misses > 0) == mapped
    benchmark(call)
    median = benchmark.stats.stats.median
    benchmark.extra_info["microseconds"] = 1e6 * median
    benchmark.extra_info["limit_microseconds"] = 1e6 * LIMIT
