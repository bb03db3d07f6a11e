"""What an attention kernel is chosen by: dtypes, sizes, options."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionProblem:
    """What of one call decides on its kernel."""

    op: str  # a key of OPS
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    q_rows: int
    k_rows: int
    head_dim: int
    value_dim: int
    vector: bool = True  # q, k, v can be read 16 bytes at a time
    tma: bool = False  # q, k, v, out can be moved by TMA
    modified: bool = False  # scores are more than scaled by a positive number
    bias: str | None = None  # its dtype
    masked: bool = False
    ragged: bool = False
    bounded: bool = False  # later queries see later keys only
