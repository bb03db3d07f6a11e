"""What an attention kernel is chosen by, and its parameters, from the specs of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cuattn._arrays.row_layout import ArraySpec
from cuattn._attention.request import Options
from cuattn._attention.run_score import score_arrays_of
from cuattn._attention.views import Operands, is_vector, is_widened, strides_of
from cuattn._device.launches import Block
from cuattn._device.params import (
    ATTENTION_BLOCKED_POINTERS,
    ATTENTION_BLOCKED_TAIL,
    ATTENTION_TAIL,
)

if TYPE_CHECKING:
    from cuattn._attention.problem import AttentionProblem


def blocked_of(x: Operands, options: Options, mask_args: Mapping[str, ArraySpec]) -> Block:
    """What AttentionBlockedParams has more than AttentionParams; nothing without a block mask."""
    if options.block is None:
        return ()
    rows, columns = (0, 0) if options.mask is None else options.mask.shape[-2:]
    tail = ATTENTION_BLOCKED_TAIL.pack(
        block_stride=strides_of(x.block_counts, 3)[:2],
        block_cols=x.block_indices.shape[3],
        block_queries=options.block[0],
        block_keys=options.block[1],
        mask_offset=columns - rows,
    )
    return ATTENTION_BLOCKED_POINTERS, tail, score_arrays_of(mask_args)


def problem_of(
    x: Operands,
    options: Options,
    batch: int,
    ragged: bool,
    vector: bool,
    tma: bool,
    chain: bool = False,
) -> AttentionProblem:
    """What decides on the kernels of a call, of canonical specs; `chain`: they are of gradients."""
    from cuattn._attention.plan import MAX_SCALE
    from cuattn._attention.plan_mask import plan_mask
    from cuattn._attention.plan_score import plan_score
    from cuattn._attention.problem import AttentionProblem

    _, heads, q_rows, head_dim = x.q.shape
    _, kv_heads, k_rows, value_dim = x.v.shape
    score = None
    if options.score is not None:
        score = plan_score(options.score, tuple(spec.dtype.name for spec in x.score_args), chain)
    mask = None
    if options.mask is not None:
        mask = plan_mask(options.mask.expression, tuple(spec.dtype.name for spec in x.mask_args))
    # A larger scale is not left to the exponential, whose factor would be infinite.
    rescored = options.softcap or not 0 < options.scale < MAX_SCALE
    return AttentionProblem(
        op="tf32" if options.tf32 else x.q.dtype.name,
        dtype=x.q.dtype.name,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_rows=q_rows,
        k_rows=k_rows,
        head_dim=head_dim,
        value_dim=value_dim,
        vector=vector,
        tma=tma,
        modified=bool(rescored or score or x.bias is not None or x.alibi_slopes is not None),
        bias=None if x.bias is None else x.bias.dtype.name,
        masked=x.mask is not None or mask is not None,
        ragged=ragged,
        bounded=options.right is not None,
        score=score,
        blocked=options.block is not None,
        mask=mask,
    )


def tail_of(
    x: Operands,
    options: Options,
    problem: AttentionProblem,
    row_blocks: int,
    heads_in_l2: int,
    aligned: bool,
    pack: int = 1,
) -> bytes:
    """All of AttentionParams but pointers. `aligned`: `out` starts on a 16-byte boundary."""
    from cuattn._attention.plan import UNBOUNDED

    mask_rows, mask_cols = (0, 0) if x.mask is None else x.mask.shape[2:]
    bias_rows, bias_cols = (0, 0) if x.bias is None else x.bias.shape[2:]
    return ATTENTION_TAIL.pack(
        scale=options.scale,
        softcap=options.softcap,
        left=UNBOUNDED if options.left is None else min(options.left, UNBOUNDED),
        right=UNBOUNDED if options.right is None else min(options.right, UNBOUNDED),
        offset=max(-UNBOUNDED, min(options.q_offset or 0, UNBOUNDED)),
        bottom_right=options.q_offset is None,
        batch=problem.batch,
        heads=problem.heads // pack,
        sharing=problem.heads // pack // problem.kv_heads,
        q_rows=problem.q_rows,
        k_rows=problem.k_rows,
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        mask_rows=mask_rows,
        mask_cols=mask_cols,
        bias_rows=bias_rows,
        bias_cols=bias_cols,
        row_blocks=row_blocks,
        heads_in_l2=heads_in_l2,
        descending=problem.bounded,
        out_is_vector=aligned and is_vector(x.out),
        out_is_float=is_widened(x.q, x.out),
        q_stride=strides_of(x.q, 4),
        k_stride=strides_of(x.k, 4),
        v_stride=strides_of(x.v, 4),
        out_stride=strides_of(x.out, 4),
        lse_stride=strides_of(x.lse, 3),
        mask_stride=strides_of(x.mask, 4),
        bias_stride=strides_of(x.bias, 4),
        alibi_stride=strides_of(x.alibi_slopes, 2),
    )
