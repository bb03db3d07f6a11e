"""The calls of attention on a device: plan, and cast what no kernel can read."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from cuattn._arrays.row_layout import ArraySpec, packed, spec_of
from cuattn._attention import numpy_attention, request_kvcache, views_kvcache
from cuattn._attention.request import Call, Expected, Options
from cuattn._attention.run_problem import blocked_of, problem_of, tail_of
from cuattn._attention.run_score import score_arrays_of
from cuattn._attention.views import (
    LISTS,
    Arrays,
    Operands,
    broadcast_spec,
    canonical_specs,
    canonical_views,
    cast,
    is_vector,
    is_widened,
    specs_of,
    whole_elements,
)
from cuattn._device.host import HOST, Computed
from cuattn._device.kernel import Kernel, Limits
from cuattn._device.launches import Block, Launches, Made, Prepared, one_or_all
from cuattn._device.params import ATTENTION_BLOCKED_SM90, ATTENTION_POINTERS, ATTENTION_SM90

NAMES = {name: name for name in (*Arrays._fields, "out")}
BLOCK_NAMES = {name: f"block_mask[{i}]" for i, name in enumerate((*LISTS, "mask"))}
NAMES_OF_TWO = NAMES | {"out": "out[0]", "lse": "out[1]"}
INTEGERS = ("q_offset", "q_lens", "kv_lens", "cu_seqlens_q", "cu_seqlens_k")


def prepare(call: Call) -> Any:
    """A call with its launch."""
    runtime, expected, outs = call.runtime, call.expected, call.outs or ()
    if runtime is None:
        given = {n: array for n, array in call.arrays._asdict().items() if array is not None}
        given |= {**call.score_args, **call.mask_args}
        if outs or any(name in given for name in INTEGERS):  # whose values are checked
            return one_or_all(*_compute(call))
        names = NAMES | names_of(call)
        return Prepared(HOST, _computed(call, tuple(given)), given, (), one_or_all, names)
    device = runtime.device(call.arrays.q)
    with runtime.on(device):
        arrays = cast(call.arrays, expected.acc, expected.fractional, runtime.xp)
        indexed, masked = (
            {n: whole_elements(runtime.xp, array) for n, array in some.items()}
            for some in (call.score_args, call.mask_args)
        )
    aligned = tuple(
        not any(runtime.address(array) % 16 for array in some) for some in (arrays[:3], outs[:1])
    )
    launches = _planned(
        call.specs if arrays is call.arrays else specs_of(arrays),
        tuple(map(spec_of, outs)),
        expected,
        call.layout,
        call.options,
        call.return_lse,
        aligned,
        runtime.limits(device),
        *(tuple((n, spec_of(array)) for n, array in some.items()) for some in (indexed, masked)),
    )
    given = {**arrays._asdict(), **indexed, **masked}
    given |= zip(("out", "lse"), outs, strict=False)
    names = NAMES_OF_TWO if len(outs) > 1 else NAMES
    names = names | names_of(call)
    if runtime.xp is np:  # the values of integers are checked at every call
        names = names | dict.fromkeys(INTEGERS, "")
    return Prepared(runtime, launches, given, (), one_or_all, names)


def names_of(call: Call) -> dict[str, str]:
    """What the arguments are called that expressions index, and those of a block mask."""
    of_mask = {n: n.replace("block_mask.mask.args", "block_mask[3][1]") for n in call.mask_args}
    blocks = BLOCK_NAMES if call.options.block else {}
    return {name: name for name in call.score_args} | of_mask | blocks


def _compute(call: Call) -> list[Any]:
    """The results of a call on NumPy arrays."""
    expected, outs = call.expected, call.outs or tuple(np.empty(*one) for one in call.results)
    arrays = cast(call.arrays, expected.acc, expected.fractional, np)
    operands = canonical_views(arrays, outs, expected.sizes, call.layout, np)
    indexed = tuple(call.score_args.values()), tuple(call.mask_args.values())
    operands = operands._replace(score_args=indexed[0], mask_args=indexed[1])
    numpy_attention.attention(operands, call.options)
    return [*outs]


def _computed(call: Call, given: tuple[str, ...]) -> Computed:
    """What is left of a call on NumPy arrays, without these arrays."""
    few, names = numpy_attention.few(call, given), ([*call.score_args], [*call.mask_args])
    call = call._replace(arrays=call.specs, score_args={}, mask_args={})

    def run(runtime: Any, arrays: list[Any], numbers: tuple[Any, ...]) -> list[Any]:
        if few is not None and (results := few(*arrays)) is not None:
            return results
        by_name = dict(zip(given, arrays, strict=True))
        indexed, masked = ({name: by_name.pop(name) for name in some} for some in names)
        found = call._replace(arrays=Arrays(**by_name), score_args=indexed, mask_args=masked)
        return _compute(found)

    return Computed(given, run)


def made_results(
    expected: Any, names: tuple[str, ...]
) -> tuple[dict[str, Made], tuple[ArraySpec, ...]]:
    """out, and lse if it is among the names, as arrays that are allocated, and their specs."""
    shapes = (expected.out_shape, expected.dtype), (expected.lse_shape, expected.acc)
    made = {name: Made(*one) for name, one in zip(names, shapes, strict=False)}
    specs = (ArraySpec(a.shape, packed(a.shape, None, a.dtype.itemsize), a.dtype)
             for a in made.values())  # fmt: skip
    return made, tuple(specs)


@lru_cache(maxsize=4096)
def _planned(
    given: Arrays,
    outs: tuple[ArraySpec, ...],
    expected: Expected,
    layout: str,
    options: Options,
    return_lse: bool,
    aligned: tuple[bool, ...],
    limits: Limits,
    indexed: tuple[tuple[str, ArraySpec], ...],
    masked: tuple[tuple[str, ArraySpec], ...],
) -> Launches:
    """Launch of a call, if there is anything to compute.

    `outs` may be empty. `aligned`: q, k and v, and out, start on 16-byte boundaries, as new memory
    does. `indexed`, `masked`: arrays of a score and of a mask expression, by the names of their
    fields.
    """
    from cuattn._attention.plan import plan_attention
    from cuattn._attention.plan_sm90 import SM90_SOFTCAP, box_of, is_tma, plan_attention_sm90

    sizes, results = expected.sizes, ("out", "lse")[: 1 + return_lse]
    reads = [name for name, spec in given._asdict().items() if spec is not None]
    reads += [name for name, _ in (*indexed, *masked)]
    writes, made = results[: len(outs)], dict[str, Made]()
    if not outs:
        made, outs = made_results(expected, results)
    operands = canonical_specs(given, outs, sizes, layout)
    of_score, of_mask = (tuple(spec for _, spec in some) for some in (indexed, masked))
    operands = operands._replace(score_args=of_score, mask_args=of_mask)
    q, k, v, out, lse, *_ = operands
    batch, heads, q_rows, value_dim = sizes.batch, q.shape[1], q.shape[2], v.shape[3]
    if not batch * heads * q_rows or (not value_dim and lse is None):
        return Launches(reads, writes, made, results, ())
    widened = is_widened(q, out)  # which TMA does not store
    problem = problem_of(
        operands,
        options,
        batch,
        given.cu_seqlens_q is not None,
        aligned[0] and all(map(is_vector, (q, k, v))),
        aligned[0]
        and options.softcap <= SM90_SOFTCAP
        and all(is_tma(a.shape, a.strides) for a in (q, k, v))
        and (widened or (aligned[1] and is_tma(out.shape, out.strides))),
    )
    if problem.is_decode:
        decode, room = _decode(given, operands, options, aligned, limits, dict(indexed))
        return Launches(reads, writes, made, results, [decode], shared=("attention", *room))
    sm90 = plan_attention_sm90(problem, *limits)
    plan = sm90 or plan_attention(problem, limits.compute_capability)
    pack = sm90.pack if sm90 else 1
    tail = tail_of(operands, options, problem, plan.row_blocks, plan.heads_in_l2, aligned[1], pack)
    block: Block = (ATTENTION_POINTERS, tail, score_arrays_of(dict(indexed)))
    block = (*block, *blocked_of(operands, options, dict(masked)))
    if sm90 is None:
        return Launches(reads, writes, made, results, [(plan.kernel, block)])
    dtype, keys, rows = q.dtype.name, (sm90.keys, 1), (64, sm90.pack)
    boxes = [
        (name, box_of(dtype, array.shape, array.strides, *size, columns))
        for name, array, size, columns in zip(
            ("q", "k", "v", "q" if widened else "out"),  # the last one unused, or of `out`
            (q, k, v, q if widened else out),
            (rows, keys, keys, rows),
            (sm90.q_panel, sm90.q_panel, sm90.v_panel, sm90.v_panel),
            strict=True,
        )
    ]
    end = (ATTENTION_BLOCKED_SM90 if problem.blocked else ATTENTION_SM90).pack(
        pack_log2=sm90.pack.bit_length() - 1, **sm90.schedule._asdict()
    )
    kernels = [(sm90.kernel, (*block, end))]
    return Launches(reads, writes, made, results, kernels, boxes=[boxes])


def _decode(
    given: Arrays,
    x: Operands,
    options: Options,
    aligned: tuple[bool, ...],
    limits: Limits,
    indexed: dict[str, ArraySpec],
) -> tuple[tuple[Kernel, Block], tuple[int, int]]:
    """`decode_launch` over keys that are no cache."""
    from cuattn._attention.run_decode import Aligned, decode_launch

    batch, heads, q_rows, head_dim = x.q.shape
    kv_heads, k_rows, value_dim = x.v.shape[1:]
    sizes = views_kvcache.Sizes(
        batch, heads, kv_heads, q_rows, 0, batch, k_rows, k_rows, head_dim, value_dim
    )
    lengths = {
        name: broadcast_spec(spec, (batch,))
        for name in ("q_offset", "q_lens", "kv_lens")
        if (spec := getattr(given, name)) is not None
    }
    sinks = None if given.sinks is None else broadcast_spec(given.sinks, (heads,))
    arrays = views_kvcache.Arrays(
        x.q, x.k, x.v, alibi_slopes=x.alibi_slopes, sinks=sinks, **lengths
    )
    numbers = request_kvcache.Options(options, "auto")
    where = Aligned(aligned[0], False, aligned[1])
    return decode_launch(arrays, x.out, x.lse, sizes, numbers, where, limits, {}, indexed)
