"""The cases of ``python -m cuattn``: each public operation on the sample, and what it has to give."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import cuattn
from cuattn import reference

BEST = 5  # words that are shown
NUM_CHUNKS = 4  # the vocabulary in as many parts, for the mergeable state


class Device(NamedTuple):
    """Where the arrays live; `xp` is numpy or cupy, `note` one line for people."""

    name: str
    note: str
    xp: Any
    synchronize: Callable[[], object]

    def to_host(self, array: Any) -> np.ndarray:
        return array if self.xp is np else self.xp.asnumpy(array)


class Case(NamedTuple):
    """One line of the table: a call through the public API and what it has to give in float64."""

    operation: str
    data: np.ndarray
    call: Callable[[], Any]
    expected: Any
    roundings: int = 8  # of the accumulator, that its bound grants


def case(device: Device, operation: str, *arrays: np.ndarray, **options: Any) -> Case:
    call = functools.partial(getattr(cuattn, operation), *map(device.xp.asarray, arrays), **options)
    return Case(operation, arrays[0], call, getattr(reference, operation)(*arrays, **options))


def row_cases(data: np.ndarray, device: Device) -> Iterator[Case]:
    """The operations on rows along the last axis, with a fresh gradient for the backward ones."""
    grad = np.random.default_rng(0).standard_normal(data.shape).astype(data.dtype)
    for name in ("softmax", "log_softmax"):
        yield case(device, name, data)
        y = getattr(reference, name)(data).astype(data.dtype)
        yield case(device, f"{name}_backward", grad, y)
    yield case(device, "logsumexp", data, axis=-1)


def segment_cases(scores: np.ndarray, tokens: np.ndarray, device: Device) -> Iterator[Case]:
    """Ragged rows: every token attends to the words of its own sentence, the heads side by side."""
    sentence = np.cumsum(tokens == ".") - (tokens == ".")
    same = sentence[:, None] == sentence
    x = np.ascontiguousarray(scores[:, same].T)
    cu_seqlens = np.concatenate([[0], np.cumsum(same.sum(axis=1))])
    yield case(device, "segment_softmax", x, cu_seqlens)
    y = reference.segment_softmax(x, cu_seqlens).astype(x.dtype)
    yield case(device, "segment_softmax_backward", x, y, cu_seqlens)  # x for a gradient


def topk_cases(logits: np.ndarray, device: Device) -> Iterator[Case]:
    """The best words of the vocabulary, at once and merged from those of its parts."""
    x, parts, start = device.xp.asarray(logits), [], 0
    for part in device.xp.array_split(x, NUM_CHUNKS, axis=-1):
        parts.append(cuattn.softmax_topk_state(part, BEST, index_offset=start))
        start += part.shape[-1]
    for name in ("top_k", "softmax_topk", "softmax_topk_state"):
        call = functools.partial(getattr(cuattn, name), x, BEST)
        yield Case(name, logits, call, getattr(reference, name)(logits, BEST))
    merged = functools.partial(functools.reduce, cuattn.merge, parts)
    yield Case("merge", logits, merged, reference.softmax_topk_state(logits, BEST))


def attention_cases(sample: dict[str, np.ndarray], dtype: Any, device: Device) -> Iterator[Case]:
    """The heads of the layer: whole and by sentence, with gradients, and from the keys in parts."""
    data = [sample[name].astype(dtype) for name in ("q", "k", "v")]
    ends = np.unique([0, *np.flatnonzero(sample["tokens"] == ".") + 1, len(sample["tokens"])])
    rows = [np.ascontiguousarray(x.swapaxes(0, 1)) for x in data]
    for kind, given, more in (("", data, []), ("_varlen", rows, [ends, ends])):
        y, lse = getattr(reference, f"attention{kind}")(*given, *more, return_lse=True)
        call: Any = getattr(cuattn, f"attention{kind}")
        call = functools.partial(call, *map(device.xp.asarray, given + more))
        yield Case(f"attention{kind}", given[0], call, y)
        y, lse = y.astype(dtype), lse.astype(np.promote_types(np.float32, dtype))
        grad = np.random.default_rng(0).standard_normal(y.shape).astype(dtype)
        name, given = f"attention_backward{kind}", [grad, *given, y, lse, *more]
        call = functools.partial(getattr(cuattn, name), *map(device.xp.asarray, given))
        expected = getattr(reference, name)(*given)[0]
        yield Case(name, y, call, expected, roundings=16)  # dS is a difference of two sums
    q, k, v = map(device.xp.asarray, data)
    split = functools.partial(device.xp.array_split, axis=-2)
    parts = [
        cuattn.attention(q, *pair, return_lse=True)
        for pair in zip(split(k, NUM_CHUNKS), split(v, NUM_CHUNKS), strict=True)
    ]
    outs, lses = (device.xp.stack(part) for part in zip(*parts, strict=True))
    merges = {"merge_attention": [*parts[0], *parts[1]], "merge_attention_states": [outs, lses]}
    for name, given in merges.items():  # of what has been rounded to the dtype
        merge: Any = functools.partial(getattr(cuattn, name), *given)
        merged = getattr(reference, name)(*map(device.to_host, given))[0]
        yield Case(name, data[0], merge, merged)


def cache_cases(sample: dict[str, np.ndarray], dtype: Any, device: Device) -> Iterator[Case]:
    """The last token over a cache of all keys or half of them, whose last are written into it."""
    q, k, v = (sample[name].astype(dtype) for name in ("q", "k", "v"))
    q, lens = q[:, -1:], device.xp.asarray([k.shape[1] - 1])
    arrays: list[Any] = [device.xp.array(a) for a in (q, k, v, k[:, -1:], v[:, -1:])]
    attend: Any = functools.partial(cuattn.attention_kvcache, *arrays[:3])
    yield Case("attention_kvcache", q, attend, reference.attention(q, k, v))
    start, own = ([a[:, part] for a in arrays[1:3]] for part in (slice(64), slice(64, None)))
    cascade: Any = functools.partial(cuattn.attention_cascade, arrays[0], [start], *own)
    yield Case("attention_cascade", q, cascade, reference.attention(q, k, v))
    append: Any = functools.partial(cuattn.kv_append, *arrays[1:], kv_lens=lens)
    yield Case("kv_append", k, lambda: append() or arrays[1], k.astype(np.float64))


def state_cases(logits: np.ndarray, device: Device) -> Iterator[Case]:
    """The state of the whole vocabulary, and those of its parts merged: the same log-sum-exp."""
    x, expected = device.xp.asarray(logits), reference.logsumexp(logits, axis=-1)
    states = [cuattn.softmax_state(part) for part in device.xp.array_split(x, NUM_CHUNKS, axis=-1)]
    yield Case("softmax_state", logits, functools.partial(cuattn.softmax_state, x), expected)
    yield Case("merge", logits, functools.partial(functools.reduce, cuattn.merge, states), expected)


def all_cases(sample: dict[str, np.ndarray], scores: np.ndarray, device: Device) -> Iterator[Case]:
    dtypes: list[Any] = [np.float16, np.float32, np.float64]
    if importlib.util.find_spec("ml_dtypes"):
        dtypes.insert(1, importlib.import_module("ml_dtypes").bfloat16)
    for dtype in dtypes:
        yield from row_cases(sample["logits"].astype(dtype), device)
    yield from row_cases(scores, device)
    yield from segment_cases(scores, sample["tokens"], device)
    for dtype in dtypes:
        yield from attention_cases(sample, dtype, device)
        yield from cache_cases(sample, dtype, device)
    yield from state_cases(sample["logits"], device)
    yield from topk_cases(sample["logits"], device)
