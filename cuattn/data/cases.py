"""The calls of ``python -m cuattn`` on the sample, what they have to give, and how closely."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import cuattn
from cuattn import reference

BEST = 5  # words that are selected, and drawn
SEED = 0  # of draws
NUM_CHUNKS = 4  # the vocabulary in as many parts, for the mergeable states
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


class Device(NamedTuple):
    """Where the arrays live; `xp` is numpy or cupy, `note` one line for people."""

    name: str
    note: str
    xp: Any
    synchronize: Callable[[], object]

    def to_device(self, value: Any) -> Any:
        return self.xp.asarray(value) if isinstance(value, np.ndarray) else value

    def to_host(self, value: Any) -> Any:
        on_device = self.xp is not np and isinstance(value, self.xp.ndarray)
        return self.xp.asnumpy(value) if on_device else value


class Case(NamedTuple):
    """One line of the table: a call through the public API and what it has to give in float64."""

    operation: str
    data: np.ndarray
    call: Callable[[], Any]
    expected: Any
    roundings: int = 8  # of the accumulator, that its bound grants


def case(device: Device, operation: str, data: np.ndarray, *more: Any, **options: Any) -> Case:
    given = map(device.to_device, (data, *more))
    call = functools.partial(getattr(cuattn, operation), *given, **options)
    return Case(operation, data, call, getattr(reference, operation)(data, *more, **options))


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


def loss_cases(data: np.ndarray, labels: np.ndarray, device: Device) -> Iterator[Case]:
    """The kept tokens with their own words as labels, and how sure the model is."""
    acc = np.promote_types(np.float32, data.dtype)
    grad = np.random.default_rng(0).standard_normal(len(data)).astype(acc)
    lse = reference.logsumexp(data, axis=-1).astype(acc)
    yield case(device, "cross_entropy", data, labels)
    yield case(device, "cross_entropy_backward", grad, data, labels, lse)._replace(data=data)
    yield case(device, "entropy", data)


def attention_cases(sample: dict[str, np.ndarray], dtype: Any, device: Device) -> Iterator[Case]:
    """The heads of the layer: whole and by sentence, with gradients, from the keys in parts, and
    the best of these."""
    data = [sample[name].astype(dtype) for name in ("q", "k", "v")]
    ends = np.unique([0, *np.flatnonzero(sample["tokens"] == ".") + 1, len(sample["tokens"])])
    rows = [np.ascontiguousarray(x.swapaxes(0, 1)) for x in data]
    for kind, given, more in (("", data, []), ("_varlen", rows, [ends, ends])):
        yield case(device, f"attention{kind}", *given, *more)
        y, lse = getattr(reference, f"attention{kind}")(*given, *more, return_lse=True)
        lse = lse.astype(np.promote_types(np.float32, dtype))
        grad = np.random.default_rng(0).standard_normal(y.shape).astype(dtype)
        arrays = grad, *given, y.astype(dtype), lse, *more
        yield case(device, f"attention_backward{kind}", *arrays)._replace(roundings=16)
    yield case(device, "attention_topk", *data[:2], BEST)._replace(roundings=16)
    lse = reference.attention(*data, return_lse=True)[1]
    lse = lse.astype(np.promote_types(np.float32, dtype))
    yield case(device, "attention_column_sums", *data[:2], lse)._replace(roundings=16)
    q, k, v = map(device.xp.asarray, data)
    sentence = np.searchsorted(ends, np.arange(q.shape[1]), side="right")
    mask = sentence[:, None] == sentence
    tiles = cuattn.block_mask(device.to_device(mask))
    attend: Any = functools.partial(cuattn.attention, q, k, v, block_mask=tiles)
    yield Case("block_mask", data[0], attend, reference.attention(*data, mask=mask))
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


def selection_cases(logits: np.ndarray, device: Device) -> Iterator[Case]:
    """The best words of the vocabulary, and words that are drawn from it."""
    for name in ("top_k", "softmax_topk"):
        yield case(device, name, logits, BEST)
    drawn = {"seed": SEED, "return_log_prob": True}
    filters: list[dict[str, Any]] = [{}, {"top_k": 2 * BEST}, {"top_p": 0.3}, {"min_p": 0.02}]
    for options in filters:
        yield case(device, "sample", logits, BEST, **drawn, **options)


def state_cases(logits: np.ndarray, labels: np.ndarray, device: Device) -> Iterator[Case]:
    """States of the whole vocabulary, and those of its parts merged."""
    parts = np.array_split(logits, NUM_CHUNKS, axis=-1)
    starts = np.cumsum([0, *(part.shape[-1] for part in parts[:-1])]).tolist()
    for name, given, options in (
        ("softmax_state", [], {}),
        ("logits_state", [labels], {}),
        ("softmax_topk_state", [BEST], {}),
        ("sample_state", [BEST], {"seed": SEED}),
    ):
        whole = case(device, name, logits, *given, **options)
        yield whole
        states = []
        for start, part in zip(starts, parts, strict=True):
            first = {"index_offset": start} if given else {}
            on_device = map(device.to_device, (part, *given))
            states.append(getattr(cuattn, name)(*on_device, **options, **first))
        merge = functools.partial(functools.reduce, cuattn.merge, states)
        yield whole._replace(operation="merge", call=merge)


def all_cases(sample: dict[str, np.ndarray], scores: np.ndarray, device: Device) -> Iterator[Case]:
    dtypes: list[Any] = [np.float16, np.float32, np.float64]
    if importlib.util.find_spec("ml_dtypes"):
        dtypes.insert(1, importlib.import_module("ml_dtypes").bfloat16)
    labels = own_words(sample)
    for dtype in dtypes:
        yield from row_cases(sample["logits"].astype(dtype), device)
        yield from loss_cases(sample["logits"].astype(dtype), labels, device)
    yield from row_cases(scores, device)
    yield from segment_cases(scores, sample["tokens"], device)
    for dtype in dtypes:
        yield from attention_cases(sample, dtype, device)
        yield from cache_cases(sample, dtype, device)
    yield from selection_cases(sample["logits"], device)
    yield from state_cases(sample["logits"], labels, device)


def own_words(sample: dict[str, np.ndarray]) -> np.ndarray:
    """Of each kept token its index in the vocabulary: it is among its five most probable words."""
    own = sample["tokens"][sample["logit_rows"]]
    return sample["top5_indices"][sample["top5_words"] == own[:, None]]


def comparable(result: Any, xp: Any) -> tuple[Any, Any]:
    """What of a result has to be near the reference, and the indices, which have to be equal."""
    if isinstance(result, cuattn.SoftmaxState):
        return result.lse, None
    if isinstance(result, cuattn.LogitsState):
        return xp.stack([result.cross_entropy, result.entropy]), None
    if isinstance(result, cuattn.SoftmaxTopKState):  # the logarithms of its probabilities
        return result.values - result.lse[..., None], result.indices
    if isinstance(result, cuattn.Sample | cuattn.SampleState):
        return result.log_prob, result.indices
    if hasattr(result, "indices"):
        return result.values, result.indices
    return (result[0] if isinstance(result, tuple) else result), None  # the first of several


def compare(got: np.ndarray, expected: np.ndarray, roundings: int = 8) -> dict[str, Any]:
    """Largest error in units of the largest value, and its bound: one rounding and some."""
    error = np.abs(got.astype(np.float64) - expected).max() / np.abs(expected).max()
    max_error = float(np.nan_to_num(error, nan=sys.float_info.max))
    bound = EPS[got.dtype.name] + roundings * EPS[np.promote_types(got.dtype, np.float32).name]
    return {"max_error": max_error, "bound": bound, "ok": max_error <= bound}
