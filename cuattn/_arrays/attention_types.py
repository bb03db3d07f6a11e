"""What the functions of attention take, for type checkers, beside `types`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, SupportsIndex, TypedDict

from numpy.typing import DTypeLike, NDArray

from cuattn._arrays.results import BlockMask
from cuattn._arrays.types import Array, Host, Number, Other, OutAlone, OutOpen, Output, OutWithLse

Window = tuple[SupportsIndex | None, SupportsIndex | None]
Layout = Literal["BHSD", "BSHD"]
Precision = Literal["ieee", "tf32"]
SplitSize = SupportsIndex | Literal["auto"] | None
CacheScale = Number | Array | None
HostPrefixes = Sequence[tuple[Host, Host | None]]
OtherPrefixes = Sequence[tuple[Other, Other | None]]


class _Seen(TypedDict, total=False):
    is_causal: bool
    q_offset: SupportsIndex | Array | None
    window: Window | None
    scale: Number | NDArray[Any] | None
    softcap: Number | NDArray[Any] | None
    mask: Array | None
    alibi_slopes: Array | None
    q_lens: Array | None
    kv_lens: Array | None
    precision: Precision | None


class _Placed(_Seen, total=False):
    sinks: Array | None


class _Scores(_Placed, total=False):
    bias: Array | None


class _Expression(TypedDict, total=False):
    score: str | None
    score_args: Mapping[str, Array] | None


class _Attention(_Scores, total=False):
    layout: Layout


class _Typed(TypedDict, total=False):
    dtype: DTypeLike | None


class _Blocked(_Attention, _Expression, _Typed, total=False):
    block_mask: BlockMask | None


class AttentionAlone(_Blocked, OutAlone): ...


class AttentionWithLse(_Blocked, OutWithLse): ...


class AttentionOpen(_Blocked, OutOpen): ...


class _Varlen(_Scores, total=False):
    max_seqlen_q: SupportsIndex | None
    max_seqlen_k: SupportsIndex | None


class VarlenAlone(_Varlen, _Expression, _Typed, OutAlone): ...


class VarlenWithLse(_Varlen, _Expression, _Typed, OutWithLse): ...


class VarlenOpen(_Varlen, _Expression, _Typed, OutOpen): ...


class _Gradients(TypedDict, total=False):
    grad_lse: Array | None
    return_dbias: bool
    return_dscore: bool | Sequence[str]
    out: tuple[Array, Array, Array] | tuple[Array, Array, Array, Array] | None


class Backward(_Attention, _Expression, _Gradients): ...


class VarlenBackward(_Varlen, _Expression, _Gradients): ...


class ColumnSums(_Seen, total=False):
    bias: Array | None
    layout: Layout
    out: Array | None


class _TopK(TypedDict, total=False):
    is_causal: bool
    q_offset: SupportsIndex | Array | None
    window: Window | None
    scale: Number | NDArray[Any] | None
    softcap: Number | NDArray[Any] | None
    mask: Array | None
    bias: Array | None
    alibi_slopes: Array | None
    q_lens: Array | None
    kv_lens: Array | None
    layout: Layout
    precision: Precision | None
    index_offset: SupportsIndex


class TopKAlone(_TopK, total=False):
    output: Output
    out: tuple[Array, Array] | None


class _ForState(TypedDict):
    output: Literal["state"]


class TopKState(_TopK, _ForState, total=False):
    out: tuple[Array, Array, Array, Array] | None


class TopKOpen(_TopK, total=False):
    output: Output | Literal["state"]
    out: tuple[Array, Array] | tuple[Array, Array, Array, Array] | None


class _Cached(_Placed, _Typed, total=False):
    page_table: Array | None
    k_new: Array | None
    v_new: Array | None
    value_dim: SupportsIndex | None
    k_scale: CacheScale
    v_scale: CacheScale
    split_size: SplitSize
    layout: Layout


class CachedAlone(_Cached, _Expression, OutAlone): ...


class CachedWithLse(_Cached, _Expression, OutWithLse): ...


class CachedOpen(_Cached, _Expression, OutOpen): ...


class CascadeAlone(_Cached, OutAlone): ...


class CascadeWithLse(_Cached, OutWithLse): ...


class CascadeOpen(_Cached, OutOpen): ...


class Merge(TypedDict, total=False):
    layout: Layout
    out: tuple[Array, Array] | None
