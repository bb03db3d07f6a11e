"""Attention over prefixes and a cache: for each part one call of `attention` or its siblings."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np

from cuattn._arrays.row_layout import spec_of
from cuattn._attention import checks, run_kvcache_host
from cuattn._attention.attention import attention
from cuattn._attention.kvcache import attention_kvcache
from cuattn._attention.merge import merge_attention_states
from cuattn._attention.request_kvcache import Call
from cuattn._attention.views import canonical
from cuattn._device.runtime import keeping


def over_parts(call: Call, prefixes: list[tuple[Any, Any]]) -> Any:
    """The results of a call behind prefixes, (1, H_kv, P, ·)."""
    if not prefixes:
        return _over_cache(call)
    runtime = call.runtime
    on: Any = contextlib.nullcontext()
    if runtime is not None:
        on = runtime.on(runtime.device(call.arrays.q))
    with on, keeping(runtime) if call.outs else contextlib.nullcontext():
        merged = _merged(call, prefixes)
    return merged if call.return_lse else merged[0]


def _merged(call: Call, prefixes: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """out and lse from those over each prefix, (1, H_kv, P, ·), and over the cache."""
    sizes, given, runtime = call.expected.sizes, call.arrays, call.runtime
    xp, empty = (np, np.empty) if runtime is None else (runtime.xp, runtime.empty)
    batch, heads, rows = sizes.batch, sizes.heads, sizes.q_rows
    outs = empty((len(prefixes) + 1, batch, rows, heads, sizes.value_dim), call.expected.dtype)
    lses = empty((len(prefixes) + 1, heads, batch, rows), call.expected.acc)
    ends = [0, *itertools.accumulate(k.shape[2] for k, _ in prefixes)]
    whole = [_see_all(call, end, ends[-1]) for end in ends[1:]]
    place = None  # of query 0 of each sequence among all keys
    if given.q_offset is not None or not all(whole):
        place = _place(call, ends[-1], xp)
    for i, pair in enumerate(prefixes):
        if whole[i]:
            _over_shared(call, *pair, outs[i], lses[i])
        else:
            k, v = (xp.broadcast_to(a, (batch, *a.shape[1:])) for a in pair)
            _over_own(call, k, v, place - ends[i], outs[i], lses[i])
    if given.q_lens is not None:
        padding = xp.arange(rows) >= given.q_lens.reshape(batch, 1)
        xp.copyto(lses, -np.inf, where=padding)
    outs = outs.swapaxes(2, 3) if call.layout == "BHSD" else outs
    states: Any = outs, lses.swapaxes(1, 2)
    if given.q.ndim == 3:
        states = states[0][:, 0], states[1][:, 0]
    last = states[0][-1], states[1][-1]
    _over_cache(_placed(call, place, ends[-1])._replace(outs=last, return_lse=True))
    layout: Any = call.layout
    out: Any = call.outs
    if out is not None and not call.return_lse:
        out = *out, empty(last[1].shape, last[1].dtype)
    return merge_attention_states(*states, layout=layout, out=out)


def _see_all(call: Call, end: int, before: int) -> bool:
    """Whether all queries see all keys up to `end`, of `before` in prefixes, and all alike."""
    sizes, scores, given = call.expected.sizes, call.options.scores, call.arrays
    if scores.left is not None or given.alibi_slopes is not None:
        return False
    if scores.right is None:
        return True
    first = scores.q_offset
    if first is None:  # as far in front as queries may stand
        keys = sizes.capacity if given.kv_lens is None else min(sizes.new_rows, sizes.capacity)
        first = before + min(0, keys - sizes.q_rows)
    return given.q_offset is None and first + scores.right >= end - 1


def _place(call: Call, before: int, xp: Any) -> Any:
    """Place of query 0 of each sequence: a number, or int64 (B,)."""
    sizes, given = call.expected.sizes, call.arrays
    if given.q_offset is not None:
        return given.q_offset.reshape(sizes.batch).astype(np.int64)
    if call.options.scores.q_offset is not None:
        return call.options.scores.q_offset
    keys, rows, new = sizes.capacity, sizes.q_rows, sizes.new_rows
    if given.q_lens is not None:
        rows = xp.clip(given.q_lens.reshape(sizes.batch).astype(np.int64), 0, rows)
        new = xp.minimum(rows, new)
    if given.kv_lens is not None:
        old = xp.clip(given.kv_lens.reshape(sizes.batch).astype(np.int64), 0, keys)
        keys = xp.minimum(old + new, keys)
    return before + keys - rows


def _placed(call: Call, place: Any, before: int) -> Call:
    """The call over the cache alone."""
    scores = call.options.scores
    if scores.q_offset is not None:
        scores = scores._replace(q_offset=scores.q_offset - before)
        return call._replace(options=call.options._replace(scores=scores))
    if call.arrays.q_offset is not None:
        offset = place - before
        specs = call.specs._replace(q_offset=spec_of(offset))
        return call._replace(arrays=call.arrays._replace(q_offset=offset), specs=specs)
    return call


# ---- parts: k and v (B or 1, H_kv, P, ·), out (B, S, H, D_v), lse (H, B, S) ----


def _over_shared(call: Call, k: Any, v: Any, out: Any, lse: Any) -> None:
    """The queries of all sequences, as those of one, over all keys of a prefix."""
    sizes = call.expected.sizes
    rows = sizes.batch * sizes.q_rows
    q = canonical(call.arrays.q, call.layout).swapaxes(1, 2)
    q = q.reshape(1, rows, sizes.heads, sizes.head_dim)
    outs = out.reshape(1, rows, sizes.heads, sizes.value_dim), lse.reshape(1, sizes.heads, rows)
    over: Any = attention if sizes.head_dim <= checks.MAX_HEAD_DIM else attention_kvcache
    over(q, *_keys(call, k, v), out=outs, **_options(call))


def _over_own(call: Call, k: Any, v: Any, place: Any, out: Any, lse: Any) -> None:
    """The queries of each sequence over those keys of a prefix that they see."""
    scores, given = call.options.scores, call.arrays
    split_size: Any = call.options.split_size
    attention_kvcache(
        canonical(given.q, call.layout).swapaxes(1, 2),
        *_keys(call, k, v),
        q_offset=place,
        window=(scores.left, scores.right),
        alibi_slopes=given.alibi_slopes,
        split_size=split_size,
        out=(out, lse.swapaxes(0, 1)),
        **_options(call),
    )


def _over_cache(call: Call) -> Any:
    """The queries of each sequence over its cache."""
    if call.runtime is None:
        return run_kvcache_host.compute(call)
    from cuattn._attention.run_kvcache import prepare

    return prepare(call).launch()


def _keys(call: Call, k: Any, v: Any) -> tuple[Any, Any]:
    """Keys and values in the layout of parts."""
    wide = call.expected.sizes.head_dim > checks.MAX_HEAD_DIM  # whose values are columns of keys
    return k.swapaxes(1, 2), None if wide else v.swapaxes(1, 2)


def _options(call: Call) -> dict[str, Any]:
    """What every part over a prefix is told."""
    scores, sizes = call.options.scores, call.expected.sizes
    options: dict[str, Any] = {
        "scale": scores.scale,
        "softcap": scores.softcap or None,
        "layout": "BSHD",
    }
    options |= {"precision": "tf32" if scores.tf32 else None, "return_lse": True}
    options["dtype"] = call.expected.dtype
    wide = sizes.head_dim > checks.MAX_HEAD_DIM
    return options | ({"value_dim": sizes.value_dim} if wide else {})
