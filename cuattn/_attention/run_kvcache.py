"""The calls over a KV cache on a device: plan, and cast what no kernel can read."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from cuattn._arrays.row_layout import ArraySpec, packed, spec_of
from cuattn._attention.plan import UNBOUNDED
from cuattn._attention.plan_decode import DecodeProblem, auto_split, divider, plan_decode
from cuattn._attention.request_kvcache import Call, Options
from cuattn._attention.request_kvcache_specs import Expected
from cuattn._attention.run import INTEGERS, MAX_SCALE
from cuattn._attention.run_append import aligned_rows, plan_append_launch, updated
from cuattn._attention.views import canonical_lse, canonical_spec, is_vector, strides_of
from cuattn._attention.views_kvcache import Arrays, canonical_specs
from cuattn._device.kernel import Kernel, Limits
from cuattn._device.launches import Block, Launches, Made, Prepared, one_or_all
from cuattn._device.params import DECODE_POINTERS, DECODE_TAIL

NAMES = {name: name for name in (*Arrays._fields, "out")}
NAMES_OF_TWO = NAMES | {"out": "out[0]", "lse": "out[1]"}
CACHE_KINDS = {"int8": 1, "float8_e4m3fn": 2}  # kCacheInt8, kCacheE4m3; 0: the dtype of q
WIDE = ("kv_lens", "page_table", "q_lens", "q_offset")  # bits of DecodeParams::wide


def prepare(call: Call) -> Prepared:
    """A call with its launches."""
    runtime, expected, outs = call.runtime, call.expected, call.outs or ()
    append = call.append
    device = runtime.device(call.arrays.q)
    with runtime.on(device):
        arrays = _cast(call.arrays, expected.acc)
    specs = call.specs if arrays is call.arrays else Arrays(*map(spec_of, arrays))
    launches = _planned(
        specs,
        tuple(map(spec_of, outs)),
        expected,
        call.layout,
        call.options,
        call.return_lse,
        _aligned(runtime, arrays, outs),
        None if append is None else (append.acc, aligned_rows(runtime, append.arrays)),
        runtime.limits(device),
    )
    given = {**arrays._asdict(), **dict(zip(("out", "lse"), outs, strict=False))}
    names = NAMES_OF_TWO if len(outs) > 1 else NAMES
    if runtime.xp is np:  # the values of integers are checked at every call
        names = names | dict.fromkeys(INTEGERS, "")
    return Prepared(runtime, launches, given, (), one_or_all, names)


def _cast(given: Arrays, acc: np.dtype) -> Arrays:
    """Arrays of a call as the kernel reads them: few numbers are cast, nothing else."""
    some = {"alibi_slopes": given.alibi_slopes, "sinks": given.sinks}
    cast = {n: a.astype(acc) for n, a in some.items() if a is not None and a.dtype != acc}
    return given._replace(**cast) if cast else given


def _aligned(runtime: Any, arrays: Arrays, outs: tuple[Any, ...]) -> tuple[bool, ...]:
    """Whether q and the caches, new keys and values, and out start on the boundaries of chunks."""
    chunk = _chunk(arrays.k_cache.dtype)
    groups = (
        [(arrays.q, 16), (arrays.k_cache, chunk), (arrays.v_cache, chunk)],
        [(arrays.k_new, 16), (arrays.v_new, 16)],
        [(out, 16) for out in outs[:1]],
    )
    return tuple(
        not any(array is not None and runtime.address(array) % size for array, size in group)
        for group in groups
    )


def _chunk(dtype: np.dtype) -> int:
    """Bytes of a cache that are loaded together."""
    return 8 if dtype.itemsize == 1 else 16


@lru_cache(maxsize=4096)
def _planned(
    given: Arrays,
    outs: tuple[ArraySpec, ...],
    expected: Expected,
    layout: str,
    options: Options,
    return_lse: bool,
    aligned: tuple[bool, ...],
    append: tuple[np.dtype, tuple[bool, bool]] | None,
    limits: Limits,
) -> Launches:
    """Launches of a call, if there is anything to compute.

    `outs` may be empty. `append`: what else `plan_append_launch` is told, where keys are new.
    """
    sizes, scores, results = expected.sizes, options.scores, ("out", "lse")[: 1 + return_lse]
    updates = updated(given) if append else []
    reads = [n for n, spec in given._asdict().items() if spec is not None and n not in updates]
    writes, made = results[: len(outs)], {}
    if not outs:
        shapes = (expected.out_shape, expected.dtype), (expected.lse_shape, expected.acc)
        made = {name: Made(*one) for name, one in zip(results, shapes, strict=False)}
        outs = tuple(
            ArraySpec(one.shape, packed(one.shape, None, one.dtype.itemsize), one.dtype)
            for one in made.values()
        )
    kernels: list[tuple[Kernel, Block]] = []
    nothing = not sizes.batch * sizes.heads * sizes.q_rows
    nothing = nothing or (not sizes.value_dim and not return_lse)
    eight = given.k_cache.dtype.itemsize == 1
    if append and (nothing or eight):
        written, factors = given._replace(new_lens=given.q_lens), (options.k_scale, options.v_scale)
        launch = plan_append_launch(written, sizes, layout, factors, *append, new_lens="q_lens")
        kernels += [launch] if launch else []
    if nothing:
        return Launches(reads, writes, made, results, kernels, updates=updates)
    x = canonical_specs(given, sizes, layout)
    out, lse = canonical_spec(outs[0], layout), None if len(outs) < 2 else canonical_lse(outs[1])
    group = sizes.heads // sizes.kv_heads
    scale = scores.scale * options.k_scale
    masked = x.mask is not None and x.mask.shape[3] > 0
    # A larger scale is not left to the exponential, whose factor would be infinite.
    rule = bool(scores.softcap) or not 0 < scale < MAX_SCALE or masked
    rule = rule or x.alibi_slopes is not None
    chunk = _chunk(x.k_cache.dtype)
    vector = aligned[0] and is_vector(x.q)
    vector = vector and all(is_vector(cache, chunk) for cache in (x.k_cache, x.v_cache))
    fresh = sizes.new_rows > 0 and not eight
    fresh_is_vector = vector and aligned[1] and fresh
    fresh_is_vector = fresh_is_vector and is_vector(x.k_new) and is_vector(x.v_new)
    split_size = options.split_size
    problem = DecodeProblem(
        op="tf32" if scores.tf32 else x.q.dtype.name,
        dtype=x.q.dtype.name,
        batch=sizes.batch,
        kv_heads=sizes.kv_heads,
        rows=group * sizes.q_rows,
        capacity=sizes.capacity,
        head_dim=sizes.head_dim,
        value_dim=sizes.value_dim,
        split_size=auto_split(sizes.capacity) if split_size == "auto" else split_size,
    )
    plan = plan_decode(problem, *limits)
    # Of no room there is no page, and an array without elements may have any address.
    paged = x.page_table is not None and sizes.capacity > 0
    pointers: dict[str, Any] = {
        "k": "k_cache",
        "v": "k_cache" if given.v_cache is None else "v_cache",
    }
    pointers |= {} if paged else {"page_table": 0}
    pointers |= {} if masked else {"mask": 0}
    if not fresh:
        pointers |= {"k_new": 0, "v_new": 0}
    elif not sizes.head_dim:
        pointers["k_new"] = "v_new"  # only whether there are any counts
    if given.v_cache is None and given.k_scale is not None:
        pointers["v_scale"] = "k_scale"
    page_magic, page_shift = divider(x.k_cache.shape[2] if paged else 1)
    k_stride, v_stride = strides_of(x.k_cache, 4), strides_of(x.v_cache, 4)
    tail = DECODE_TAIL.pack(
        scale=scale,
        softcap=scores.softcap,
        v_factor=options.k_scale if given.v_cache is None else options.v_scale,
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
        wide=sum(1 << i for i, name in enumerate(WIDE) if _is_wide(getattr(x, name))),
        cache_kind=CACHE_KINDS.get(x.k_cache.dtype.name, 0),
        rule=rule,
        vector=vector,
        out_is_vector=aligned[2] and is_vector(out),
        new_is_vector=fresh_is_vector,
        is_async=vector and not eight and fresh_is_vector >= fresh,
        same_strides=(k_stride[0], k_stride[2]) == (v_stride[0], v_stride[2]),
        q_stride=strides_of(x.q, 4),
        k_stride=k_stride,
        v_stride=v_stride,
        out_stride=strides_of(out, 4),
        k_new_stride=strides_of(x.k_new, 4),
        v_new_stride=strides_of(x.v_new, 4),
        mask_stride=strides_of(x.mask, 4),
        lse_stride=strides_of(lse, 3),
        k_scale_stride=strides_of(x.k_scale, 3),
        v_scale_stride=strides_of(x.k_scale if given.v_cache is None else x.v_scale, 3),
        alibi_stride=strides_of(x.alibi_slopes, 2),
        table_stride=strides_of(x.page_table, 2),
        sinks_stride=strides_of(x.sinks, 1)[0],
        kv_lens_stride=strides_of(x.kv_lens, 1)[0],
        q_lens_stride=strides_of(x.q_lens, 1)[0],
        q_offset_stride=strides_of(x.q_offset, 1)[0],
    )
    kernels.append((plan.kernel, [(DECODE_POINTERS, pointers), tail]))
    shared = plan.counters, plan.part_bytes
    return Launches(reads, writes, made, results, kernels, updates=updates, shared=shared)


def _is_wide(spec: ArraySpec | None) -> bool:
    return spec is not None and spec.dtype.itemsize == 8
