"""Triton: softmax and flash attention as a user of Triton would write them, on torch's tensors.

One program per row for the softmax, which holds the row in registers; for the attention one program
per tile of queries, online softmax over tiles of keys, and a few configurations to choose from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from bench.peers._base import Contestant, Unsupported, require_dtype
from bench.peers._torch import TorchArrays

MAX_COLS = 65536  # elements of a row that one program can hold
HEAD_DIMS = (16, 32, 64, 128, 256)

# (queries per tile, keys per tile, warps, stages of the pipeline)
TILES = [(64, 32, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 8, 2)]
if os.environ.get("TRITON_INTERPRET") == "1":
    TILES = TILES[:1]  # the interpreter cannot time them


class Triton(TorchArrays):
    """Kernels below; torch's arrays, streams and graphs."""

    name = "triton"
    version = triton.__version__

    def contestants(self, operation: str, k: int | None, causal: bool) -> Iterator[Contestant]:
        """The two operations that Triton's own tutorials show."""
        if operation == "softmax":
            yield Contestant("Triton", self, softmax)
        elif operation == "attention":
            yield Contestant("Triton", self, lambda q, k, v: attention(q, k, v, causal))


def softmax(x: torch.Tensor) -> torch.Tensor:
    """Softmax of each row of a contiguous two-dimensional tensor."""
    require_dtype(x, "float16", "bfloat16", "float32")
    rows, cols = x.shape
    if not x.is_contiguous():
        raise Unsupported("takes contiguous rows")
    if cols > MAX_COLS:
        raise Unsupported(f"takes rows of up to {MAX_COLS} elements, not {cols}")
    y = torch.empty_like(x)
    block = triton.next_power_of_2(cols)
    warps = min(max(block // 512, 4), 32)
    _softmax_kernel[(rows,)](y, x, cols, BLOCK=block, num_warps=warps)
    return y


@triton.jit
def _softmax_kernel(y, x, cols, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * cols
    column = tl.arange(0, BLOCK)
    inside = column < cols
    value = tl.load(x + start + column, mask=inside, other=-float("inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, 0))
    tl.store(y + start + column, value / tl.sum(value, 0), mask=inside)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention of contiguous (batch, heads, seqlen, head_dim) tensors."""
    require_dtype(q, "float16", "bfloat16")
    batch, heads, seqlen_q, head_dim = q.shape
    kv_heads, seqlen_k = k.shape[1:3]
    if head_dim not in HEAD_DIMS:
        raise Unsupported(f"head_dim must be one of {HEAD_DIMS}, not {head_dim}")
    if causal and seqlen_q > seqlen_k:
        raise Unsupported(f"causal, and {seqlen_q} queries for {seqlen_k} keys: some see none")
    out = torch.empty_like(q)
    scale_log2 = head_dim**-0.5 * math.log2(math.e)
    grid = lambda meta: (triton.cdiv(seqlen_q, meta["TILE_Q"]), batch * heads)  # noqa: E731
    _attention_kernel[grid](
        out, q, k, v, scale_log2, seqlen_q, seqlen_k, heads // kv_heads, causal, head_dim
    )
    return out


@triton.autotune(
    configs=[
        triton.Config({"TILE_Q": q, "TILE_K": k}, num_warps=warps, num_stages=stages)
        for q, k, warps, stages in TILES
    ],
    key=["seqlen_q", "seqlen_k", "CAUSAL", "HEAD_DIM"],
)
@triton.jit
def _attention_kernel(
    out,
    q,
    k,
    v,
    scale_log2,
    seqlen_q,
    seqlen_k,
    group,  # query heads to a key head
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    first_query = tl.program_id(0) * TILE_Q
    query = first_query + tl.arange(0, TILE_Q)
    feature = tl.arange(0, HEAD_DIM)
    q_offset = (head * seqlen_q + query)[:, None] * HEAD_DIM + feature[None, :]
    q_present = (query < seqlen_q)[:, None]
    q_tile = tl.load(q + q_offset, mask=q_present, other=0.0)
    k += head // group * seqlen_k * HEAD_DIM
    v += head // group * seqlen_k * HEAD_DIM

    m = tl.full([TILE_Q], -float("inf"), tl.float32)
    l = tl.zeros([TILE_Q], tl.float32)  # noqa: E741 - the name in the papers
    acc = tl.zeros([TILE_Q, HEAD_DIM], tl.float32)
    end = seqlen_k
    whole = seqlen_k // TILE_K * TILE_K  # before this key no tile has anything masked
    if CAUSAL:
        shift = seqlen_k - seqlen_q
        end = tl.minimum(end, first_query + shift + TILE_Q)
        whole = tl.minimum(whole, (first_query + shift + 1) // TILE_K * TILE_K)
    for masked in tl.static_range(2):
        for start in range(whole * masked, whole + (end - whole) * masked, TILE_K):
            key = start + tl.arange(0, TILE_K)
            offset = key[:, None] * HEAD_DIM + feature[None, :]
            if masked:
                present = (key < seqlen_k)[:, None]
                k_tile = tl.load(k + offset, mask=present, other=0.0)
                v_tile = tl.load(v + offset, mask=present, other=0.0)
            else:
                k_tile = tl.load(k + offset)
                v_tile = tl.load(v + offset)
            scores = tl.dot(q_tile, tl.trans(k_tile)) * scale_log2
            if masked:
                visible = (key < seqlen_k)[None, :]
                if CAUSAL:
                    visible = visible & (key[None, :] <= (query + shift)[:, None])
                scores = tl.where(visible, scores, -float("inf"))
            new_m = tl.maximum(m, tl.max(scores, 1))
            p = tl.exp2(scores - new_m[:, None])
            rescale = tl.exp2(m - new_m)
            l = l * rescale + tl.sum(p, 1)  # noqa: E741
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None])
            m = new_m
    tl.store(out + q_offset, (acc / l[:, None]).to(q_tile.dtype), mask=q_present)
