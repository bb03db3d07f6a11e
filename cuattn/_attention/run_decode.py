"""The launch of the decode kernel: of a call over a KV cache, or of few queries over many keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cuattn._arrays.row_layout import ArraySpec
from cuattn._attention.plan import MAX_SCALE, UNBOUNDED
from cuattn._attention.plan_decode import DecodeProblem, auto_split, divider, plan_decode
from cuattn._attention.request_kvcache import Options
from cuattn._attention.run_score import score_arrays_of, score_of
from cuattn._attention.views import is_vector, is_widened, strides_of
from cuattn._attention.views_kvcache import Arrays, Sizes, wide_bits
from cuattn._device.kernel import Kernel, Limits
from cuattn._device.launches import Block
from cuattn._device.params import DECODE_POINTERS, DECODE_TAIL

CACHE_KINDS = {"int8": 1, "float8_e4m3fn": 2}  # kCacheInt8, kCacheE4m3; 0: the dtype of q
WIDE = ("kv_lens", "page_table", "q_lens", "q_offset")  # bits of DecodeParams::wide


class Aligned(NamedTuple):
    """Which arrays start on the boundaries of their chunks, as new memory does."""

    read: bool  # q and the caches
    new: bool  # new keys and values
    out: bool


def decode_launch(
    x: Arrays,
    out: ArraySpec,
    lse: ArraySpec | None,
    sizes: Sizes,
    options: Options,
    aligned: Aligned,
    limits: Limits,
    names: Mapping[str, str],
    indexed: Mapping[str, ArraySpec],
) -> tuple[tuple[Kernel, Block], tuple[int, int]]:
    """Kernel and parameters, and its workspace: counters and bytes of parts.

    `x`, `out` and `lse` are canonical specs. `names`: what the call calls k and v.
    `indexed`: arrays of a score expression, by the names of their fields.
    """
    scores, group = options.scores, sizes.heads // sizes.kv_heads
    scale = scores.scale * options.k_scale
    masked = x.mask is not None and x.mask.shape[3] > 0
    # A larger scale is not left to the exponential, whose factor would be infinite.
    rule = bool(scores.softcap) or not 0 < scale < MAX_SCALE or masked
    rule = rule or x.alibi_slopes is not None or scores.score is not None
    eight = x.k_cache.dtype.itemsize == 1
    vector = aligned.read and all(map(is_vector, (x.q, x.k_cache, x.v_cache)))
    fresh = sizes.new_rows > 0 and not eight  # else they are in the cache by now
    fresh_is_vector = vector and aligned.new and fresh
    fresh_is_vector = fresh_is_vector and is_vector(x.k_new) and is_vector(x.v_new)
    size = options.split_size
    problem = DecodeProblem(
        op="tf32" if scores.tf32 else x.q.dtype.name,
        dtype=x.q.dtype.name,
        batch=sizes.batch,
        kv_heads=sizes.kv_heads,
        rows=group * sizes.q_rows,
        capacity=sizes.capacity,
        head_dim=sizes.head_dim,
        value_dim=sizes.value_dim,
        split_size=auto_split(sizes.capacity) if isinstance(size, str) else size,
        values_in_keys=names.get("v") == "k_cache",
        plain=not (rule or eight),
        score=score_of(scores.score, indexed),
    )
    plan = plan_decode(problem, *limits)
    # Of no room there is no page, and an array without elements may have any address.
    paged = x.page_table is not None and sizes.capacity > 0
    pointers: dict[str, Any] = {**names}
    pointers |= {} if paged else {"page_table": 0}
    if not fresh:
        pointers |= {"k_new": 0, "v_new": 0}
    elif not sizes.head_dim:
        pointers["k_new"] = "v_new"  # only whether there are any counts
    page_magic, page_shift = divider(sizes.page_size if paged else 1)
    k_stride, v_stride = strides_of(x.k_cache, 4), strides_of(x.v_cache, 4)
    tail = DECODE_TAIL.pack(
        scale=scale,
        softcap=scores.softcap,
        v_factor=options.v_scale,
        left=UNBOUNDED if scores.left is None else min(scores.left, UNBOUNDED),
        right=UNBOUNDED if scores.right is None else min(scores.right, UNBOUNDED),
        offset=max(-UNBOUNDED, min(scores.q_offset or 0, UNBOUNDED)),
        bottom_right=scores.q_offset is None,
        batch=sizes.batch,
        kv_heads=sizes.kv_heads,
        group=group,
        q_rows=sizes.q_rows,
        new_rows=sizes.new_rows,
        head_dim=sizes.head_dim,
        value_dim=sizes.value_dim,
        mask_cols=x.mask.shape[3] if masked else 0,
        pages=sizes.pages,
        page_size=sizes.page_size if sizes.capacity else 0,
        table_cols=x.page_table.shape[1] if paged else 0,
        page_magic=page_magic,
        page_shift=page_shift,
        row_tiles=plan.row_tiles,
        column_tiles=plan.column_tiles,
        least_tiles=plan.least_tiles,
        split=plan.split,
        wide=wide_bits(x, WIDE),
        cache_kind=CACHE_KINDS.get(x.k_cache.dtype.name, 0),
        rule=rule,
        vector=vector,
        out_is_vector=aligned.out and is_vector(out),
        out_is_float=is_widened(x.q, out),
        new_is_vector=fresh_is_vector,
        is_async=vector and fresh_is_vector >= fresh,
        same_strides=(k_stride[0], k_stride[2]) == (v_stride[0], v_stride[2]),
        values_in_keys=plan.values_in_keys,
        q_stride=strides_of(x.q, 4),
        k_stride=k_stride,
        v_stride=v_stride,
        out_stride=strides_of(out, 4),
        k_new_stride=strides_of(x.k_new, 4),
        v_new_stride=strides_of(x.v_new, 4),
        mask_stride=strides_of(x.mask, 4),
        lse_stride=strides_of(lse, 3),
        k_scale_stride=strides_of(x.k_scale, 3),
        v_scale_stride=strides_of(x.v_scale, 3),
        alibi_stride=strides_of(x.alibi_slopes, 2),
        table_stride=strides_of(x.page_table, 2),
        sinks_stride=strides_of(x.sinks, 1)[0],
        kv_lens_stride=strides_of(x.kv_lens, 1)[0],
        q_lens_stride=strides_of(x.q_lens, 1)[0],
        q_offset_stride=strides_of(x.q_offset, 1)[0],
    )
    block: Block = [(DECODE_POINTERS, pointers), tail, score_arrays_of(indexed)]
    return (plan.kernel, block), (plan.counters, plan.part_bytes)
