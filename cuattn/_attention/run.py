"""The calls of attention on a device: plan, allocate, pack, launch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from cuattn._arrays.row_layout import ArraySpec, spec_of
from cuattn._attention.plan import UNBOUNDED, plan_attention
from cuattn._attention.plan_sm90 import SM90_SOFTCAP, box_of, is_tma, plan_attention_sm90
from cuattn._attention.problem import AttentionProblem
from cuattn._attention.request import Call, Options, expect
from cuattn._attention.views import (
    Arrays,
    canonical_specs,
    cast,
    is_vector,
    specs_of,
    strides_of,
)
from cuattn._device.kernel import Kernel, Limits
from cuattn._device.params import ATTENTION_POINTERS, ATTENTION_SM90, ATTENTION_TAIL
from cuattn._device.tensor_map import Boxes

MAX_SCALE = 2**127  # its product with log2 e is finite in float32


def run(call: Call) -> Any:
    """Launch a call on the device of q; results that are not given are allocated."""
    runtime, arrays, outs = call.runtime, call.arrays, call.outs
    device = runtime.device(arrays.q)
    with runtime.on(device):
        if outs is None:
            outs = tuple(runtime.empty(*one) for one in call.results)
        if outs[0].size or outs[-1].size:
            _launch(call, runtime.limits(device), outs)
    return outs if call.return_lse else outs[0]


def _launch(call: Call, limits: Limits, outs: tuple[Any, ...]) -> None:
    runtime, expected = call.runtime, call.expected
    arrays = cast(call.arrays, expected.acc, expected.fractional, runtime.xp)
    specs = call.specs if arrays is call.arrays else specs_of(arrays)
    given = (*arrays[:3], outs[0], outs[1] if len(outs) > 1 else None, *arrays[3:])
    addresses = [0 if array is None else runtime.address(array) for array in given]
    aligned = not any(address % 16 for address in addresses[:3]), addresses[3] % 16 == 0
    out_specs = tuple(map(spec_of, outs))
    planned = _planned(specs, out_specs, call.layout, call.options, aligned, limits)
    if planned is not None:
        kernel, boxes, tail = planned
        maps = (runtime.tensor_map(a, *b) for a, b in zip(addresses, boxes, strict=False))
        params = b"".join((*maps, ATTENTION_POINTERS.struct.pack(*addresses), tail))
        runtime.launch(kernel, params, arrays, outs)


@lru_cache(maxsize=4096)
def _planned(
    given: Arrays,
    outs: tuple[ArraySpec, ...],
    layout: str,
    options: Options,
    aligned: tuple[bool, bool],
    limits: Limits,
) -> tuple[Kernel, tuple[Boxes, ...], bytes] | None:
    """Kernel of a call, boxes of q, k, v and out if it moves any, and all of its parameters but
    tensor maps and pointers; None: nothing to launch.

    `aligned`: q, k and v, and out, start on 16-byte boundaries.
    """
    sizes = expect(given, layout).sizes
    operands = canonical_specs(given, outs, sizes, layout)
    q, k, v, out, lse, mask, bias, alibi_slopes = operands[:8]
    ragged, batch = given.cu_seqlens_q is not None, sizes.batch
    heads, q_rows, head_dim = q.shape[1:]
    kv_heads, k_rows, value_dim = v.shape[1:]
    if not batch * heads * q_rows or (not value_dim and lse is None):
        return None
    # A larger scale is not left to the exponential, whose factor would be infinite.
    rescored = options.softcap or not 0 < options.scale < MAX_SCALE
    rescored = rescored or bias is not None or alibi_slopes is not None
    problem = AttentionProblem(
        op="tf32" if options.tf32 else q.dtype.name,
        dtype=q.dtype.name,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_rows=q_rows,
        k_rows=k_rows,
        head_dim=head_dim,
        value_dim=value_dim,
        vector=aligned[0] and all(map(is_vector, (q, k, v))),
        tma=all(aligned)
        and options.softcap <= SM90_SOFTCAP
        and all(is_tma(a.shape, a.strides) for a in (q, k, v, out)),
        modified=bool(rescored),
        bias=None if bias is None else bias.dtype.name,
        masked=mask is not None,
        ragged=ragged,
        bounded=options.right is not None,
    )
    sm90 = plan_attention_sm90(problem, *limits)
    plan = sm90 or plan_attention(problem, limits.compute_capability)
    pack = sm90.pack if sm90 else 1
    tail = ATTENTION_TAIL.pack(
        scale=options.scale,
        softcap=options.softcap,
        left=UNBOUNDED if options.left is None else min(options.left, UNBOUNDED),
        right=UNBOUNDED if options.right is None else min(options.right, UNBOUNDED),
        offset=max(-UNBOUNDED, min(options.q_offset or 0, UNBOUNDED)),
        bottom_right=options.q_offset is None,
        batch=batch,
        heads=heads // pack,
        sharing=heads // pack // kv_heads,
        q_rows=q_rows,
        k_rows=k_rows,
        head_dim=head_dim,
        value_dim=value_dim,
        mask_rows=0 if mask is None else mask.shape[2],
        mask_cols=0 if mask is None else mask.shape[3],
        bias_rows=0 if bias is None else bias.shape[2],
        bias_cols=0 if bias is None else bias.shape[3],
        row_blocks=plan.row_blocks,
        heads_in_l2=plan.heads_in_l2,
        descending=problem.bounded,
        out_is_vector=aligned[1] and is_vector(out),
        q_stride=strides_of(q, 4),
        k_stride=strides_of(k, 4),
        v_stride=strides_of(v, 4),
        out_stride=strides_of(out, 4),
        lse_stride=strides_of(lse, 3),
        mask_stride=strides_of(mask, 4),
        bias_stride=strides_of(bias, 4),
        alibi_stride=strides_of(alibi_slopes, 2),
    )
    if sm90 is None:
        return plan.kernel, (), tail
    dtype, keys, rows = q.dtype.name, (sm90.keys, 1), (64, sm90.pack)
    boxes = tuple(
        box_of(dtype, array.shape, array.strides, *size, columns)
        for array, size, columns in zip(
            (q, k, v, out),
            (rows, keys, keys, rows),
            (sm90.q_panel, sm90.q_panel, sm90.v_panel, sm90.v_panel),
            strict=True,
        )
    )
    tail += ATTENTION_SM90.pack(pack_log2=sm90.pack.bit_length() - 1, blocks=sm90.blocks)
    return sm90.kernel, boxes, tail
