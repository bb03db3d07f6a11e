"""The calls over a KV cache on a device: plan, and cast what no kernel can read."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from cuattn._arrays.row_layout import ArraySpec, spec_of
from cuattn._attention.request_kvcache import Call, Options
from cuattn._attention.request_kvcache_specs import Expected
from cuattn._attention.run import INTEGERS, made_results
from cuattn._attention.run_append import aligned_rows, plan_append_launch, updated
from cuattn._attention.run_decode import Aligned, decode_launch
from cuattn._attention.views import canonical_lse, canonical_spec
from cuattn._attention.views_kvcache import Arrays, canonical_specs
from cuattn._device.kernel import Kernel, Limits
from cuattn._device.launches import Block, Launches, Made, Prepared, one_or_all

NAMES = {name: name for name in (*Arrays._fields, "out")}
NAMES_OF_TWO = NAMES | {"out": "out[0]", "lse": "out[1]"}


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
        tuple((name, spec_of(array)) for name, array in call.score_args.items()),
    )
    given = {**arrays._asdict(), **call.score_args, **dict(zip(("out", "lse"), outs, strict=False))}
    names = NAMES_OF_TWO if len(outs) > 1 else NAMES
    names = names | {name: name for name in call.score_args}
    if runtime.xp is np:  # the values of integers are checked at every call
        names = names | dict.fromkeys(INTEGERS, "")
    return Prepared(runtime, launches, given, (), one_or_all, names)


def _cast(given: Arrays, acc: np.dtype) -> Arrays:
    """Arrays of a call as the kernel reads them: few numbers are cast, nothing else."""
    some = {"alibi_slopes": given.alibi_slopes, "sinks": given.sinks}
    cast = {n: a.astype(acc) for n, a in some.items() if a is not None and a.dtype != acc}
    return given._replace(**cast) if cast else given


def _aligned(runtime: Any, x: Arrays, outs: tuple[Any, ...]) -> Aligned:
    groups = (x.q, x.k_cache, x.v_cache), (x.k_new, x.v_new), outs[:1]
    return Aligned(
        *(not any(a is not None and runtime.address(a) % 16 for a in group) for group in groups)
    )


@lru_cache(maxsize=4096)
def _planned(
    given: Arrays,
    outs: tuple[ArraySpec, ...],
    expected: Expected,
    layout: str,
    options: Options,
    return_lse: bool,
    aligned: Aligned,
    append: tuple[np.dtype, tuple[bool, bool]] | None,
    limits: Limits,
    indexed: tuple[tuple[str, ArraySpec], ...],
) -> Launches:
    """Launches of a call, if there is anything to compute.

    `outs` may be empty. `append`: what else `plan_append_launch` is told, where keys are new.
    `indexed`: arrays of a score expression, by the names of their fields.
    """
    sizes, results = expected.sizes, ("out", "lse")[: 1 + return_lse]
    updates = updated(given) if append else []
    reads = [n for n, spec in given._asdict().items() if spec is not None and n not in updates]
    reads += [name for name, _ in indexed]
    writes, made = results[: len(outs)], dict[str, Made]()
    if not outs:
        made, outs = made_results(expected, results)
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
    names = {"k": "k_cache", "v": "v_cache"}
    if given.v_cache is None:
        names = {"k": "k_cache", "v": "k_cache"} | ({"v_scale": "k_scale"} if x.k_scale else {})
        x, options = x._replace(v_scale=x.k_scale), options._replace(v_scale=options.k_scale)
    out, lse = canonical_spec(outs[0], layout), None if len(outs) < 2 else canonical_lse(outs[1])
    decode, room = decode_launch(x, out, lse, sizes, options, aligned, limits, names, dict(indexed))
    kernels.append(decode)
    shared = "attention_kvcache", *room
    return Launches(reads, writes, made, results, kernels, updates=updates, shared=shared)
