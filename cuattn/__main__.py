"""``python -m cuattn``: every public operation on real data, checked against float64 and timed.

The sample is an English paragraph in the last layer of a small transformer (`data/README.md`).
Exit code 1 if a result is further from float64 than its bound. ``compile`` fills the cache instead.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cuattn
from cuattn import reference
from cuattn._device import compile_command

BEST = 5  # words that are shown
NUM_CHUNKS = 4  # the vocabulary in as many parts, for the mergeable state
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
MARK = {True: "ok", False: "WRONG"}


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


def find_device() -> Device:
    """The current GPU if CuPy sees one, else NumPy."""
    try:
        import cupy
    except ImportError:
        return Device("numpy", "CuPy is not installed: running the NumPy path.", np, int)
    if not cupy.cuda.is_available():
        return Device("numpy", "There is no CUDA device: running the NumPy path.", np, int)
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    return Device(name, f"Running on {name}.", cupy, cupy.cuda.runtime.deviceSynchronize)


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
        yield case(device, f"attention{kind}", *given, *more)
        y, lse = getattr(reference, f"attention{kind}")(*given, *more, return_lse=True)
        lse = lse.astype(np.promote_types(np.float32, dtype))
        grad = np.random.default_rng(0).standard_normal(y.shape).astype(dtype)
        arrays = grad, *given, y.astype(dtype), lse, *more
        yield case(device, f"attention_backward{kind}", *arrays)._replace(roundings=16)
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


def compare(got: np.ndarray, expected: np.ndarray, roundings: int = 8) -> dict[str, Any]:
    """Largest error in units of the largest value, and its bound: one rounding and some."""
    error = np.abs(got.astype(np.float64) - expected).max() / np.abs(expected).max()
    max_error = float(np.nan_to_num(error, nan=sys.float_info.max))
    bound = EPS[got.dtype.name] + roundings * EPS[np.promote_types(got.dtype, np.float32).name]
    return {"max_error": max_error, "bound": bound, "ok": max_error <= bound}


def run_case(case: Case, device: Device, repeat: int) -> dict[str, Any]:
    """Check, then time: the first call compiles and is not counted."""
    got, expected, same = case.call(), case.expected, True
    if isinstance(got, cuattn.SoftmaxState):
        got = got.lse
    elif hasattr(got, "indices"):
        same = np.array_equal(device.to_host(got.indices), expected.indices)
        values = [got.values, expected.values]
        if isinstance(got, cuattn.SoftmaxTopKState):  # the logarithms of its probabilities
            values = [v - a.lse[..., None] for v, a in zip(values, (got, expected), strict=True)]
        got, expected = values
    elif isinstance(got, tuple):  # the first of several results
        got, expected = got[0], expected[0] if isinstance(expected, tuple) else expected
    checked, wait = compare(device.to_host(got), expected, case.roundings), device.synchronize
    seconds = timeit.repeat(lambda: (case.call(), wait()), wait, number=1, repeat=repeat)
    return {
        "operation": case.operation,
        "shape": list(case.data.shape),
        "dtype": case.data.dtype.name,
        "device": device.name,
        **(checked | {"ok": checked["ok"] and same}),
        "microseconds": 1e6 * statistics.median(seconds),
    }


def predict(sample: dict[str, np.ndarray], device: Device) -> tuple[list[Any], dict[str, Any]]:
    """The five most probable words of each kept token beside the stored ones."""
    logits = device.xp.asarray(sample["logits"].astype(np.float32))  # as float16 many would tie
    found = cuattn.softmax_topk(logits, BEST)
    got, best = device.to_host(found.values), device.to_host(found.indices)
    stored = sample["top5_indices"]
    words = np.full(logits.shape[-1], "?", dtype=object)
    words[stored] = sample["top5_words"]
    tables = words[best], got, sample["top5_words"], sample["top5_probs"]
    top5 = []
    for token, *row in zip(sample["tokens"][sample["logit_rows"]], *tables, strict=True):
        names, probs, *known = (part.tolist() for part in row)
        pairs = {"predicted": list(zip(names, probs)), "stored": list(zip(*known))}  # noqa: B905
        top5.append({"token": str(token), **pairs})
    check = compare(got, sample["top5_probs"])
    return top5, check | {"ok": check["ok"] and np.array_equal(best, stored)}


def slope(sample: dict[str, np.ndarray], device: Device) -> dict[str, Any]:
    """What attention_backward says of a step of q, beside central differences of attention."""
    q, k, v = (device.xp.asarray(sample[name].astype(np.float64)) for name in ("q", "k", "v"))
    rng, h = np.random.default_rng(0), 1e-5
    step, grad = (device.xp.asarray(rng.standard_normal(a.shape)) for a in (q, v))
    y, lse = cuattn.attention(q, k, v, return_lse=True)
    got = (cuattn.attention_backward(grad, q, k, v, y, lse).dq * step).sum()
    up, down = ((cuattn.attention(q + by * step, k, v) * grad).sum() for by in (h, -h))
    return compare(np.array(float(got)), np.array(float(up - down) / (2 * h)), roundings=2**30)


def report(device: Device, repeat: int) -> dict[str, Any]:
    """All results as one object, the one that ``--json`` prints."""
    with np.load(Path(__file__).parent / "data" / "minilm.npz") as arrays:
        sample = dict(arrays)
    q, k = sample["q"].astype(np.float64), sample["k"].astype(np.float64)
    scores = (q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])).astype(np.float32)
    operations = [run_case(c, device, repeat) for c in all_cases(sample, scores, device)]
    top5, probs = predict(sample, device)
    lse = cuattn.logsumexp(device.xp.asarray(scores), -1)
    out = cuattn.attention(*(device.xp.asarray(sample[name]) for name in ("q", "k", "v")))
    stored = {"top5_probs": probs, "lse": compare(device.to_host(lse), sample["lse"])}
    stored["attention"] = compare(device.to_host(out), sample["out"])
    gradient = slope(sample, device)
    ok = all(check["ok"] for check in [*operations, *stored.values(), gradient])
    about = {"version": cuattn.__version__, "note": device.note, "ok": ok, "gradient": gradient}
    return {**about, "operations": operations, "top5": top5, "stored": stored}


def show(result: dict[str, Any]) -> None:
    """The same for people: a table, then the words."""
    line = "{:<25} {:<14} {:<9} {:<24} {:>8} {:>8} {:>9}  {}"
    print(f"cuattn {result['version']}. {result['note']}\n")
    print(line.format(*"operation shape dtype device error bound µs".split(), ""))
    for row in result["operations"]:
        call = row["operation"], "x".join(map(str, row["shape"])), row["dtype"], row["device"]
        errors = f"{row['max_error']:.1e}", f"{row['bound']:.1e}"
        print(line.format(*call, *errors, f"{row['microseconds']:.1f}", MARK[row["ok"]]))
    print("\nThe five most probable words for each kept token: predicted, and stored in float64")
    for row in result["top5"]:
        for token, what in ((row["token"], "predicted"), ("", "stored")):
            words = (f"{word} {100 * p:.2f} %" for word, p in row[what])
            print(f"{token:<11} {what:<9}", *words, sep="  ")
    checks = {f"the stored {what}": check for what, check in result["stored"].items()}
    for what, check in {**checks, "central differences of attention": result["gradient"]}.items():
        error, bound = f"{check['max_error']:.1e}", f"{check['bound']:.1e}"
        print(f"against {what}: error {error}, bound {bound}  {MARK[check['ok']]}")


def main(arguments: list[str] | None = None) -> int:
    if (given := sys.argv[1:] if arguments is None else arguments)[:1] == ["compile"]:
        return compile_command.main(given[1:])
    parser = argparse.ArgumentParser(prog="python -m cuattn", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--repeat", type=int, default=20, metavar="N", help="timed calls of each")
    parser.add_argument("--info", action="store_true", help="print cuattn.show_config() instead")
    parser.add_argument("--version", action="version", version=f"cuattn {cuattn.__version__}")
    options = parser.parse_args(given)
    if options.info:
        print(json.dumps(cuattn.show_config("dicts"))) if options.json else cuattn.show_config()
        return 0
    result = report(find_device(), max(1, options.repeat))
    print(json.dumps(result)) if options.json else show(result)
    return 0 if result["ok"] else 1


def main_in_a_pipe() -> int:
    """`main`, ending as other tools do where nobody reads its output any more: ``... | head``."""
    try:
        try:
            return main()
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        # Python flushes once more at exit: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell says of a program that SIGPIPE has ended


if __name__ == "__main__":
    sys.exit(main_in_a_pipe())
