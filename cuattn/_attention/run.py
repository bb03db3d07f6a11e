"""The second half of every attention call on a device: plan, pack, launch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from cuattn._arrays import scalars as _check_option
from cuattn._arrays.row_layout import Meta
from cuattn._attention import checks as _check_attention
from cuattn._attention import plan as _plan_attention
from cuattn._attention import request as _call_attention
from cuattn._attention.plan import UNBOUNDED, AttentionProblem
from cuattn._attention.plan_sm90 import SM90_SOFTCAP, box_of, is_tma, plan_attention_sm90
from cuattn._device import runtime as _jit
from cuattn._device.params import (
    ATTENTION_MERGE,
    ATTENTION_POINTERS,
    ATTENTION_SM90,
    ATTENTION_TAIL,
)
from cuattn._device.tensor_map import Boxes
from cuattn._softmax import request as _call
from cuattn._softmax.plan import Kernel

MOST_SCALE = 2**127  # its product with log2 e is finite in float32


class AttentionOperands(NamedTuple):
    """Arrays of one call, on one device: views of any strides, 0 where they are broadcast.

    Ragged calls have ``cu_seqlens``: q, k, v, out and lse have batch 1 then and all tokens in
    their rows, everything else has the batch of the sequences.
    """

    q: Any  # (B, H, S_q, D)
    k: Any  # (B, H_kv, S_k, D)
    v: Any  # (B, H_kv, S_k, D_v)
    out: Any  # (B, H, S_q, D_v), written
    lse: Any = None  # (B, H, S_q), written
    mask: Any = None  # bool (B, H, M, N)
    bias: Any = None  # (B, H, M, N)
    alibi_slopes: Any = None  # (B, H)
    sinks: Any = None  # (H,)
    q_offset: Any = None  # (B,) int64, contiguous, as what follows
    q_lens: Any = None  # (B,)
    kv_lens: Any = None  # (B,)
    cu_seqlens_q: Any = None  # (B + 1,)
    cu_seqlens_k: Any = None  # (B + 1,)


class AttentionOptions(NamedTuple):
    """Numbers of one call."""

    scale: float
    softcap: float = 0.0  # 0: none
    left: int | None = None
    right: int | None = None
    q_offset: int | None = None  # None, and no array: bottom-right
    tf32: bool = False


def options(
    offset: int | None,
    made: _call_attention.Results,
    is_causal: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    precision: Any,
) -> AttentionOptions:
    """Numbers of a call, checked."""
    left, right = _check_attention.window(window)
    factor = max(made.head_dim, 1) ** -0.5
    if scale is not None:
        factor = _check_attention.normal(_check_option.number("scale", scale), made.acc)
    return AttentionOptions(
        scale=factor,
        softcap=_check_attention.normal(_check_attention.softcap(softcap), made.acc),
        left=left,
        right=0 if _check_option.flag("is_causal", is_causal) else right,
        q_offset=offset,
        tf32=_check_attention.precision(precision, made.dtype),
    )


def run(
    arrays: _call_attention.Arrays,
    metas: _call_attention.Arrays,
    outs: tuple[Any, ...],
    layout: str,
    options: AttentionOptions,
) -> None:
    """Launch a checked call on the device of q; `metas` are those of `arrays`."""
    runtime = _jit.runtime_of(arrays.q)
    device = runtime.device(arrays.q)
    given = (*arrays[:3], outs[0], outs[1] if len(outs) > 1 else None, *arrays[3:])
    addresses = [0 if array is None else runtime.address(array) for array in given]
    aligned = not any(address % 16 for address in addresses[:3]), addresses[3] % 16 == 0
    out_metas = tuple(map(_call.meta, outs))
    limits = runtime.limits(device)
    planned = _planned(metas, out_metas, layout, options, aligned, limits)
    if planned is not None:
        kernel, boxes, tail = planned
        with runtime.on(device):
            maps = (runtime.tensor_map(a, *b) for a, b in zip(addresses, boxes, strict=False))
            params = b"".join((*maps, ATTENTION_POINTERS.struct.pack(*addresses), tail))
            runtime.launch(kernel, params, arrays, outs)


@lru_cache(maxsize=4096)
def _planned(
    given: _call_attention.Arrays,
    outs: tuple[Meta, ...],
    layout: str,
    options: AttentionOptions,
    aligned: tuple[bool, bool],
    limits: _jit.Limits,
) -> tuple[Kernel, tuple[Boxes, ...], bytes] | None:
    """Kernel of a call, boxes of q, k, v and out if it moves any, and all of its parameters but
    tensor maps and pointers; None: nothing to launch.

    `aligned`: q, k and v, and out, start on 16-byte boundaries.
    """
    made = _call_attention.results(given, layout)
    canonical: Any = _call_attention.canonical_strides(given, outs, made, layout)
    operands = AttentionOperands(**canonical)
    q, k, v, out, lse, mask, bias, alibi_slopes = operands[:8]
    ragged, batch = given.cu_seqlens_q is not None, made.batch
    heads, q_rows, head_dim = q.shape[1:]
    kv_heads, k_rows, value_dim = v.shape[1:]
    if not batch * heads * q_rows or (not value_dim and lse is None):
        return None
    # A larger scale is not left to the exponential, whose factor would be infinite.
    rescored = options.softcap or not 0 < options.scale < MOST_SCALE
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
        vector=aligned[0] and all(map(_is_vector, (q, k, v))),
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
    plan = sm90 or _plan_attention.plan_attention(problem, limits.compute_capability)
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
        group=heads // pack // kv_heads,
        q_rows=q_rows,
        k_rows=k_rows,
        head_dim=head_dim,
        value_dim=value_dim,
        mask_rows=0 if mask is None else mask.shape[2],
        mask_cols=0 if mask is None else mask.shape[3],
        bias_rows=0 if bias is None else bias.shape[2],
        bias_cols=0 if bias is None else bias.shape[3],
        row_blocks=plan.row_blocks,
        section=plan.section,
        descending=problem.bounded,
        out_is_vector=aligned[1] and _is_vector(out),
        q_stride=_strides(q, 4),
        k_stride=_strides(k, 4),
        v_stride=_strides(v, 4),
        out_stride=_strides(out, 4),
        lse_stride=_strides(lse, 3),
        mask_stride=_strides(mask, 4),
        bias_stride=_strides(bias, 4),
        alibi_stride=_strides(alibi_slopes, 2),
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


def merge(outs: list[Any], lses: list[Any], out: Any, lse: Any) -> None:
    """Launch the merge of results over parts of the keys: outs (B, H, S, D_v), lses (B, H, S)."""
    if not lse.size:
        return
    runtime = _jit.runtime_of(out)
    with runtime.on(runtime.device(out)):
        outs, lses = _alike(runtime, outs), _alike(runtime, lses)
        parts = [*outs, out]
        metas, addresses = list(map(_call.meta, parts)), list(map(runtime.address, parts))
        vector = all(map(_is_vector, metas)) and not any(a % 16 for a in addresses)
        kernel = _plan_attention.plan_attention_merge(
            out.dtype.name, lse.dtype.name, lse.size, out.shape[-1], vector
        )
        batch, heads, rows, columns = out.shape
        part_strides = _strides(metas[0] if outs else None, 4)
        part_lse_strides = _strides(_call.meta(lses[0]) if lses else None, 3)
        params = ATTENTION_MERGE.pack(
            outs=addresses[0] if outs else 0,
            lses=runtime.address(lses[0]) if lses else 0,
            out=addresses[-1],
            lse=runtime.address(lse),
            parts=len(outs),
            batch=batch,
            heads=heads,
            rows=rows,
            columns=columns,
            outs_stride=(_spacing(runtime, outs), *part_strides),
            lses_stride=(_spacing(runtime, lses), *part_lse_strides),
            out_stride=_strides(metas[-1], 4),
            lse_stride=_strides(_call.meta(lse), 3),
        )
        runtime.launch(kernel, params, (*outs, *lses), (out, lse))


def _strides(array: Meta | None, ndim: int) -> tuple[int, ...]:
    """Strides in elements."""
    if array is None:
        return (0,) * ndim
    return tuple(stride // array.dtype.itemsize for stride in array.strides)


def _is_vector(array: Meta) -> bool:
    """Whether every row is whole chunks of 16 bytes, each on a boundary if the first is."""
    *outer, columns = zip(array.shape, array.strides, strict=True)
    return (
        columns[0] * array.dtype.itemsize % 16 == 0
        and columns[1] == array.dtype.itemsize
        and all(size <= 1 or stride % 16 == 0 for size, stride in outer)
    )


def _alike(runtime: Any, arrays: list[Any]) -> list[Any]:
    """Arrays of equal strides, equally far apart: as they are, or copies."""
    strides = {array.strides for array in arrays}
    addresses = [runtime.address(array) for array in arrays]
    steps = {b - a for a, b in zip(addresses, addresses[1:], strict=False)}
    if len(strides) <= 1 and len(steps) <= 1 and all(s % arrays[0].itemsize == 0 for s in steps):
        return arrays
    return list(runtime.xp.stack(arrays))


def _spacing(runtime: Any, arrays: list[Any]) -> int:
    """Elements from one part to the next."""
    if len(arrays) < 2:
        return 0
    return (runtime.address(arrays[1]) - runtime.address(arrays[0])) // arrays[0].itemsize
