"""The calls of `kv_append` on a device, and the launch of what attention writes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from cuattn._attention.plan_append import CODES, NewRows, plan_append
from cuattn._attention.request_kvcache import Append
from cuattn._attention.views import is_vector, strides_of
from cuattn._attention.views_kvcache import (
    Arrays,
    Sizes,
    canonical_specs,
    is_per_token,
    wide_bits,
)
from cuattn._device.kernel import Kernel
from cuattn._device.launches import Block, Launches, Prepared
from cuattn._device.params import KV_APPEND_POINTERS, KV_APPEND_TAIL

NAMES = {name: name for name in Arrays._fields}
CHECKED = ("kv_lens", "new_lens")  # integers whose values are
DTYPES = ("float16", "bfloat16", "float32", "float64")  # kHalf, kBfloat16, kFloat, kDouble
WIDE = ("kv_lens", "page_table", "new_lens")  # bits of KvAppendParams::wide


def prepare(call: Append) -> Any:
    """A call with its launch."""
    runtime = call.runtime
    aligned = aligned_rows(runtime, call.arrays)
    factors = call.k_scale, call.v_scale
    launches = _planned(call.specs, call.sizes, call.layout, factors, call.acc, aligned)
    names = NAMES
    if runtime.xp is np:  # the values of integers are checked at every call
        names = names | dict.fromkeys(CHECKED, "")
    return Prepared(runtime, launches, call.arrays._asdict(), (), _nothing, names)


def _nothing(*results: Any) -> None:
    """What `kv_append` returns."""


@lru_cache(maxsize=4096)
def _planned(
    given: Arrays,
    sizes: Sizes,
    layout: str,
    factors: tuple[float, float],
    acc: np.dtype,
    aligned: tuple[bool, bool],
) -> Launches:
    launch = plan_append_launch(given, sizes, layout, factors, acc, aligned)
    updates = updated(given)
    reads = [n for n, spec in given._asdict().items() if spec is not None and n not in updates]
    return Launches(reads, (), {}, (), [launch] if launch else (), updates=updates)


def updated(given: Arrays) -> list[str]:
    """What new keys and values are written into."""
    caches = {"k_scale": given.k_cache, "v_scale": given.v_cache}
    names = [f"{name[0]}_cache" for name, cache in caches.items() if cache is not None]
    return names + [n for n, a in caches.items() if a and is_per_token(getattr(given, n), a)]


def aligned_rows(runtime: Any, arrays: Arrays) -> tuple[bool, bool]:
    """Whether new keys and their cache, and values, start on the boundaries of chunks."""

    def aligned(*parts: Any) -> bool:
        return not any(a is not None and runtime.address(a) % _chunk(a.dtype) for a in parts)

    return aligned(arrays.k_new, arrays.k_cache), aligned(arrays.v_new, arrays.v_cache)


def _chunk(dtype: np.dtype) -> int:
    """Bytes that a thread moves at a time."""
    return CODES if dtype.itemsize == 1 else 16


def plan_append_launch(
    given: Arrays,
    sizes: Sizes,
    layout: str,
    factors: tuple[float, float],
    acc: np.dtype,
    aligned: tuple[bool, bool],
    new_lens: str = "new_lens",
) -> tuple[Kernel, Block] | None:
    """Kernel and parameters of the launch that writes new keys and values; None: there are none.

    `factors`: scales that are numbers. `new_lens`: what the call calls this array.
    """
    x, eight = canonical_specs(given, sizes, layout), given.k_cache.dtype.itemsize == 1
    parts = [(x.k_new, x.k_cache, x.k_scale, given.k_scale)]
    if given.v_cache is not None:
        parts.append((x.v_new, x.v_cache, x.v_scale, given.v_scale))
    rows = tuple(
        NewRows(
            columns=cache.shape[3],
            vector=fits and is_vector(new) and is_vector(cache, _chunk(cache.dtype)),
            own_scale=is_per_token(scale, given.k_cache),
        )
        for (new, cache, _, scale), fits in zip(parts, aligned, strict=False)
    )
    # No key has a place beyond the room.
    new_rows = min(sizes.new_rows, sizes.capacity if sizes.pages else 0)
    tokens = sizes.batch * sizes.kv_heads * new_rows
    plan = plan_append(x.k_new.dtype.name, acc.name if eight else None, tokens, rows)
    if plan is None:
        return None
    by_part = [*parts, (None, None, None, None)][:2]
    tail = KV_APPEND_TAIL.pack(
        k_factor=factors[0],
        v_factor=factors[1],
        batch=sizes.batch,
        kv_heads=sizes.kv_heads,
        new_rows=new_rows,
        head_dim=rows[0].columns,
        value_dim=rows[-1].columns,
        pages=sizes.pages,
        page_size=sizes.page_size,
        table_cols=0 if x.page_table is None else x.page_table.shape[1],
        new_dtype=DTYPES.index(x.k_new.dtype.name),
        int8=x.k_cache.dtype.name == "int8",
        wide=wide_bits(x, WIDE),
        key_blocks=plan.key_blocks,
        lanes=plan.lanes,
        vector=(rows[0].vector, rows[-1].vector),
        own_scale=(rows[0].own_scale, rows[-1].own_scale),
        new_stride=_each(new for new, *_ in by_part),
        cache_stride=_each(cache for _, cache, *_ in by_part),
        scale_stride=(*strides_of(by_part[0][2], 3), *strides_of(by_part[1][2], 3)),
        kv_lens_stride=strides_of(x.kv_lens, 1)[0],
        new_lens_stride=strides_of(x.new_lens, 1)[0],
        table_stride=strides_of(x.page_table, 2),
    )
    pointers = {"new_lens": new_lens if given.new_lens is not None else 0}
    return plan.kernel, [(KV_APPEND_POINTERS, pointers), tail]


def _each(arrays: Any) -> tuple[int, ...]:
    return tuple(stride for array in arrays for stride in strides_of(array, 4))
