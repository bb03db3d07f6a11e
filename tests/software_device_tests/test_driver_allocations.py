"""What a call with `out` allocates on a device: nothing, but for what is listed here.

The graph of a call uses what that has allocated whenever it runs. So this is kept where the call
was captured, and elsewhere is free when it has returned.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from driver_kernels import cupy, device

import cuattn

COLUMNS = 70_001  # of a row that several blocks reduce


def ones(*shape, dtype=np.float32):
    return cupy.ones(shape, dtype)


def strided(array):
    """An array like this one with strides of its own."""
    return cupy.empty((*array.shape, 2), array.dtype)[..., 0]


def calls():
    """By name: what takes `out`, of every function; the first word is the function's."""
    x, row = ones(4, 64), ones(1, COLUMNS)
    q, flat = ones(1, 2, 16, 64, dtype=np.float16), ones(32, 2, 64, dtype=np.float16)
    keys = ones(1, 2, 2048, 64, dtype=np.float16)
    ends, lse = cupy.array([0, 16, 32]), ones(2, 32)
    state, selected = cuattn.softmax_state(x), cuattn.softmax_topk_state(x, 3)
    draws = cuattn.sample_state(x, 3, seed=1)
    seeds = cupy.arange(4, dtype=np.uint64)[:, None]
    labels = cupy.array([0, 63, -100, 64])
    logits = cuattn.logits_state(x, labels)
    part = cuattn.attention(q, q, q, return_lse=True)
    parts = [cupy.stack([one, one]) for one in part]
    cache, lens = ones(1, 2, 64, 64, dtype=np.float16), cupy.array([16])
    line, wide = flat[:, 0, 0], ones(4, 1, dtype=np.float64)
    few = {"kv_lens": lens.astype(np.int32), "split_size": 128}
    blocks = cuattn.block_mask(ones(16, 16) > 0)
    places = cuattn.block_mask("d[q] <= d[k]", 16, 16, args={"d": q[0, 0, :, 0]})
    return {
        "softmax": lambda **out: cuattn.softmax(x, where=x > 0 if not out else MASK, **out),
        "softmax, lse": lambda **out: cuattn.softmax(x, scale=0.5, return_lse=True, **out),
        "softmax of columns": lambda **out: cuattn.softmax(x, 0, **out),
        "softmax of a state": lambda **out: cuattn.softmax(x, state=state, **out),
        "softmax of a long part": lambda **out: cuattn.softmax(
            row, state=cuattn.SoftmaxState(row[:, 0], row[:, 1]), **out
        ),
        "softmax of a selection": lambda **out: cuattn.softmax(
            selected.values, state=selected, return_lse=True, **out
        ),
        "softmax, float64 scales": lambda **out: cuattn.softmax(x, scale=wide, **out),
        "softmax, a bool of the host": lambda **out: cuattn.softmax(x, where=np.True_, **out),
        "log_softmax": lambda **out: cuattn.log_softmax(x, **out),
        "log_softmax of a state": lambda **out: cuattn.log_softmax(x, state=selected, **out),
        "logsumexp": lambda **out: cuattn.logsumexp(x, -1, b=x, **out),
        "logsumexp of a long row": lambda **out: cuattn.logsumexp(row, -1, **out),
        "logsumexp, a number as b": lambda **out: cuattn.logsumexp(x, -1, b=2.0, **out),
        "softmax_backward": lambda **out: cuattn.softmax_backward(x, x, **out),
        "log_softmax_backward": lambda **out: cuattn.log_softmax_backward(x, x, **out),
        "segment_softmax": lambda **out: cuattn.segment_softmax(line, ends, **out),
        "segment_softmax_backward": lambda **out: cuattn.segment_softmax_backward(
            line, line, ends, **out
        ),
        "top_k": lambda **out: cuattn.top_k(x, 3, **out),
        "top_k of a long row": lambda **out: cuattn.top_k(row[:, :9000], 300, **out),
        "softmax_topk": lambda **out: cuattn.softmax_topk(x, 3, return_lse=True, **out),
        "softmax_topk of a long row": lambda **out: cuattn.softmax_topk(row[:, :9000], 300, **out),
        "softmax_state": lambda **out: cuattn.softmax_state(x, **out),
        "softmax_state of a long row": lambda **out: cuattn.softmax_state(row, **out),
        "softmax_topk_state": lambda **out: cuattn.softmax_topk_state(x, 3, **out),
        "sample": lambda **out: cuattn.sample(x, seed=1, **out),
        "sample, log_prob": lambda **out: cuattn.sample(
            x, 2, seed=seeds, offset=seeds[0], return_log_prob=True, **out
        ),
        "sample_state": lambda **out: cuattn.sample_state(x, 3, seed=1, **out),
        "cross_entropy": lambda **out: cuattn.cross_entropy(x, labels, **out),
        "cross_entropy, lse": lambda **out: cuattn.cross_entropy(x, labels, return_lse=True, **out),
        "cross_entropy of a long row": lambda **out: cuattn.cross_entropy(row, labels[:1], **out),
        "cross_entropy, int16": lambda **out: cuattn.cross_entropy(x, FEW_BITS, **out),
        "cross_entropy_backward": lambda **out: cuattn.cross_entropy_backward(
            0.25, x, labels, x[:, 0], **out
        ),
        "cross_entropy_backward, gradients": lambda **out: cuattn.cross_entropy_backward(
            x[:, 1], x, labels, x[:, 0], **out
        ),
        "cross_entropy_backward, float16": lambda **out: cuattn.cross_entropy_backward(
            q[0, 0, :4, 0], x, labels, x[:, 0], **out
        ),
        "entropy": lambda **out: cuattn.entropy(x, **out),
        "entropy of a long row": lambda **out: cuattn.entropy(row, **out),
        "logits_state": lambda **out: cuattn.logits_state(x, labels, **out),
        "logits_state of a long row": lambda **out: cuattn.logits_state(row, labels[:1], **out),
        "merge of logits": lambda **out: cuattn.merge(logits, logits, **out),
        "merge": lambda **out: cuattn.merge(state, state, **out),
        "merge of draws": lambda **out: cuattn.merge(draws, draws, **out),
        "merge of selections": lambda **out: cuattn.merge(selected, selected, **out),
        "attention": lambda **out: cuattn.attention(q, q, q, is_causal=True, **out),
        "attention, block mask": lambda **out: cuattn.attention(q, q, q, block_mask=blocks, **out),
        "attention, mask expression": lambda **out: cuattn.attention(
            q, q, q, block_mask=places, **out
        ),
        "attention, lse": lambda **out: cuattn.attention(q, q, q, return_lse=True, **out),
        "attention with a score": lambda **out: cuattn.attention(
            q, q, q, score="s + t[q]", score_args={"t": q[0, 0, :, 0]}, **out
        ),
        "attention of few queries": lambda **out: cuattn.attention(q[:, :, :1], keys, keys, **out),
        "attention_varlen": lambda **out: cuattn.attention_varlen(
            flat, flat, flat, ends, ends, **out
        ),
        "attention_varlen, int32": lambda **out: cuattn.attention_varlen(
            flat, flat, flat, ENDS, ENDS, **out
        ),
        "attention_backward": lambda **out: cuattn.attention_backward(q, q, q, q, *part, **out),
        "attention_backward_varlen": lambda **out: cuattn.attention_backward_varlen(
            *(flat,) * 5,
            lse,
            ends,
            ends,
            score="s * t[2] + t[q - k]",
            score_args={"t": q[0, 0, :, 0]},
            return_dscore=("t",),
            **out,
        )[:3],
        "attention_column_sums": lambda **out: cuattn.attention_column_sums(q, q, part[1], **out),
        "merge_attention": lambda **out: cuattn.merge_attention(*part, *part, **out),
        "merge_attention_states": lambda **out: cuattn.merge_attention_states(*parts, **out),
        "attention_kvcache": lambda **out: cuattn.attention_kvcache(
            q, cache, cache, score="s + t[q]", score_args={"t": q[0, 0, :, 0]}, **few, **out
        ),
        "attention_cascade": lambda **out: cuattn.attention_cascade(
            q, [(q[0], q[0])], cache, cache, kv_lens=lens, **out
        ),
        "attention_topk": lambda **out: cuattn.attention_topk(q, q, 3, is_causal=True, **out),
        "attention_topk, shared keys": lambda **out: cuattn.attention_topk(
            q[:, :, :1], keys, 3, output="state", **out
        ),
        "attention_topk, passes": lambda **out: cuattn.attention_topk(q, keys, 65, **out),
        "kv_append": lambda: cuattn.kv_append(cache, None, q, None, kv_lens=few["kv_lens"]),
    }


MASK = ones(4, 64) > 0
ENDS = cupy.array([0, 16, 32], np.int32)
FEW_BITS = cupy.array([0, 63, -100, 64], np.int16)

# What the others allocate.
TEMPORARY = {
    "logsumexp of a long row": "states of the parts of a row that several blocks reduce",
    "softmax_state of a long row": "the same",
    "top_k of a long row": "candidates of a selection of more than 256",
    "softmax_topk of a long row": "the same",
    "cross_entropy of a long row": "the same",
    "entropy of a long row": "the same",
    "logits_state of a long row": "the same",
    "softmax, float64 scales": "scales, weights, offsets and lengths in the type of the kernels",
    "cross_entropy, int16": "the same, and labels",
    "cross_entropy_backward, float16": "the same, and gradients",
    "attention_varlen, int32": "the same",
    "softmax, a bool of the host": "numbers of the host that are arrays of a kernel",
    "logsumexp, a number as b": "the same",
    "attention_backward": "sums of the rows, and what one kernel hands the next",
    "attention_backward_varlen": "the same",
    "attention_cascade": "results over the parts",
    "attention_topk, shared keys": "candidates and states of the parts",
    "attention_topk, passes": "the last of the pass before",
}


def arrays_of(results):
    return [r for r in (results if isinstance(results, tuple) else (results,)) if r is not None]


def allocated(call, **out):
    """Bytes that a call allocates, one number for each time, when it comes again."""
    sizes = []

    def malloc(size):
        sizes.append(size)
        return cupy.get_default_memory_pool().malloc(size)

    call(**out)
    with cupy.cuda.using_allocator(malloc):
        call(**out)
    device.flush()
    return sizes


@pytest.mark.parametrize("name", TEMPORARY)
def test_a_graph_keeps_what_it_uses(name):
    """Arrays that are made when a call has been captured are not where its graph writes."""
    call = calls()[name]
    outs = tuple(cupy.empty_like(r) for r in arrays_of(call()))
    out = {"out": outs if len(outs) > 1 else outs[0]}
    sizes = allocated(call, **out)
    expected = [r.get() for r in outs]
    with cupy.cuda.Stream(non_blocking=True) as stream:
        call(**out)
        stream.begin_capture()
        call(**out)
        graph = stream.end_capture()
        others = [cupy.full(size, 77, np.uint8) for size in sizes for _ in range(3)]
        for r in outs:
            r.fill(1)
        graph.launch(stream)
        stream.synchronize()
    for got, want in zip(outs, expected, strict=True):
        np.testing.assert_array_equal(got.get(), want)
    assert all((other == 77).all() for other in others)


def test_every_function_is_called():
    functions = {name for name in cuattn.__all__ if inspect.isfunction(getattr(cuattn, name))}
    names = {name.partition(",")[0].partition(" ")[0] for name in calls()}
    assert names == functions - {"block_mask", "compile", "show_config"}
    for name in names - {"kv_append"}:
        assert "out" in inspect.signature(getattr(cuattn, name)).parameters


def test_out_allocates_nothing():
    found = {}
    for name, call in calls().items():
        outs = tuple(cupy.empty_like(r) for r in arrays_of(call()))
        out = {"out": outs if len(outs) > 1 else outs[0]} if outs else {}
        if sizes := allocated(call, **out):
            found[name] = sizes
    assert found.keys() == TEMPORARY.keys(), found


@pytest.mark.parametrize("same", [True, False])
def test_strides_of_several_results(same):
    """m and l of a state, values and indices of a selection, are written where they shall be if
    they have strides in common, else beside it and copied."""
    every, selected = calls(), ("top_k", "softmax_topk", "softmax_topk_state")
    for name in (*selected, "softmax_state", "softmax of a selection", "attention, lse"):
        results = arrays_of(every[name]())
        outs = [strided(r) for r in results]
        if not same:
            outs[1] = cupy.empty_like(results[1])
        pair = name in (*selected, "softmax_state")
        assert bool(allocated(every[name], out=tuple(outs))) == (pair and not same), name
