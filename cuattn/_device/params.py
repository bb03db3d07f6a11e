"""What kernels are handed: C structs of cuda_src, field by field in the order of their header.

A struct that is declared in parts, or that begins with another one, is their bytes one after the
other. tests/device/test_params.py compares every declaration with the headers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from typing import Any, NoReturn


class Params:
    """A C struct or a part of one, packed by the names of its fields.

    Parameters
    ----------
    name : str
        The struct in cuda_src.
    *rows : str
        ``"code: field field ..."`` with a format character of `struct`, aligned as C does; with a
        number before it the fields are arrays. ``"56x:"``: padding, which has no name.

    Attributes
    ----------
    codes : dict of str to str
        The code of each field, in order.
    struct : struct.Struct
        All fields in order, arrays element by element.
    pack : callable
        ``pack(field=..., ...)`` is the struct as bytes. Every field must be given, by keyword:
        TypeError. Arrays are sequences of the declared length: ValueError.

    Examples
    --------
    >>> point = Params("Point", "q: id", "2d: xy")
    >>> point.unpack(point.pack(id=7, xy=(0.5, 1.5)))
    {'id': 7, 'xy': (0.5, 1.5)}
    """

    def __init__(self, name: str, *rows: str) -> None:
        self.name = name
        self.codes: dict[str, str] = {}
        layout = ""
        for row in rows:
            code, _, fields = row.partition(":")
            self.codes |= dict.fromkeys(fields.split(), code)
            layout += code * (len(fields.split()) or 1)
        self.struct = struct.Struct(layout)
        # As namedtuple does: a loop over the fields at every call would take many times as long.
        values = [
            f"*({f} if len({f}) == {_count(c)} else _wrong({f!r}, {f}))" if _count(c) else f
            for f, c in self.codes.items()
        ]
        self.pack: Callable[..., bytes] = eval(
            f"lambda {', '.join(['*', *self.codes] if values else [])}: _pack({', '.join(values)})",
            {"_pack": self.struct.pack, "_wrong": self._wrong},
        )
        self.pack.__qualname__ = f"{name}.pack"

    def unpack(self, data: bytes, offset: int = 0) -> dict[str, Any]:
        """The fields by name, from the byte `offset` on."""
        values = iter(self.struct.unpack_from(data, offset))
        return {
            field: tuple(islice(values, _count(code))) if _count(code) else next(values)
            for field, code in self.codes.items()
        }

    def _wrong(self, field: str, values: Sequence[Any]) -> NoReturn:
        raise ValueError(
            f"{self.name}.{field} must have {_count(self.codes[field])} elements, but it has "
            f"{len(values)}"
        )


def _count(code: str) -> int:
    """Elements of an array; 0: a single value."""
    return int(code[:-1] or 0)


# ---- Rows: softmax/params.cuh, softmax/state_merge.cuh ----

SOFTMAX_HEAD = Params(
    "SoftmaxParams",
    "Q: x y where weight scale out stat stat_l stat_t stat_logit partial offsets",
    "d: scale_value grad_value",
    "q: ignore_index index_offset label_bytes in_part",
)
OPERANDS = 7  # kNumOperands


@cache
def softmax_geometry(row_rank: int, col_rank: int) -> Params:
    """SoftmaxParams<row_rank, col_rank> from `rows` on: what does not change from call to call."""
    return Params(
        "SoftmaxParams",
        "q: rows cols splits slice parts share segment_width",
        f"{row_rank}q: row_size",
        f"{col_rank}q: col_size",
        f"{OPERANDS * row_rank}q: row_stride",
        f"{OPERANDS * col_rank}q: col_stride",
    )


STATE_MERGE = Params(
    "StateMergeParams",
    "Q: m_a l_a t_a logit_a m_b l_b t_b logit_b m l t logit",
    "q: n",
)

# ---- Selections: topk/ops.cuh (behind SoftmaxParams), topk/sample.cuh (behind TopKParams),
# ---- topk/radix.cuh (behind either) ----

TOPK = Params("TopKParams", "Q: indices lists", "q: k index_offset output renormalize")
SAMPLE = Params(
    "SampleParams",
    "Q: values seed offset numbers finished cut seed_value offset_value",
    "d: top_p log_min_p",
    "q: num top_k",
)


@cache
def sample_strides(row_rank: int) -> Params:
    """SampleParams<row_rank> behind SAMPLE."""
    return Params("SampleParams", f"{row_rank}q: seed_stride offset_stride number_stride")


RADIX_WORKSPACE = Params("RadixParams", "Q: workspace")
RADIX_GEOMETRY = Params(
    "RadixParams",
    "q: first_row splits slice wanted counters buffer list cleared run source target",
)
TOPK_STATE_MERGE = Params(
    "TopKStateMergeParams",
    "Q: m_a l_a values_a logits_a indices_a m_b l_b values_b logits_b indices_b",
    "Q: m l values logits indices",
    "q: rows k",
)

# ---- Attention: attention/params.cuh, attention/merge.cuh, attention/backward_params.cuh ----

ATTENTION_POINTERS = Params(
    "AttentionParams",
    "Q: q k v out lse mask bias alibi_slopes sinks",
    "Q: q_offset q_lens kv_lens cu_seqlens_q cu_seqlens_k",
)
ATTENTION_TAIL = Params(
    "AttentionParams",
    "d: scale softcap",
    "q: left right offset",
    "i: bottom_right batch heads sharing q_rows k_rows head_dim value_dim",
    "i: mask_rows mask_cols bias_rows bias_cols row_blocks heads_in_l2 descending out_is_vector",
    "i: out_is_float",
    "4q: q_stride k_stride v_stride out_stride",
    "3q: lse_stride",
    "4q: mask_stride bias_stride",
    "2q: alibi_stride",
)
SCORE_ARRAYS = Params("ScoreArrays", "6Q: array", "24q: size stride")  # the end of AttentionParams
# Behind AttentionParams.
ATTENTION_BLOCKED_POINTERS = Params(
    "AttentionBlockedParams", "Q: block_counts block_indices block_full"
)
ATTENTION_BLOCKED_TAIL = Params(
    "AttentionBlockedParams",
    "2q: block_stride",
    "q: mask_offset",
    "i: block_cols block_queries block_keys",
    "4x:",
)  # before SCORE_ARRAYS
ATTENTION_BLOCK_MASK = Params(
    "AttentionBlockMaskParams",
    "Q: kinds",
    "q: batch heads tile_rows tile_cols queries keys block_queries block_keys",
)  # before SCORE_ARRAYS
# Behind four tensor maps and AttentionParams; a TensorMap aligns the struct to 128 bytes.
ATTENTION_SM90, ATTENTION_BLOCKED_SM90 = (
    Params("AttentionSm90Params", "i: pack_log2 blocks section rounds turns", padding)
    for padding in ("116x:", "4x:")
)
ATTENTION_MERGE = Params(
    "AttentionMergeParams",
    "Q: outs lses out lse",
    "q: parts batch heads rows columns",
    "5q: outs_stride",
    "4q: lses_stride out_stride",
    "3q: lse_stride",
)
# Behind AttentionParams.
ATTENTION_TOPK = Params(
    "AttentionTopKParams",
    "Q: indices l bounds states lists",
    "q: index_offset",
    "i: first count part parts splits output",
    "4q: indices_stride",
    "3q: l_stride",
)
# Each behind AttentionParams, the backward's last three also behind AttentionBackwardParams.
ATTENTION_BACKWARD = Params(
    "AttentionBackwardParams",
    "Q: grad grad_lse dq dk dv stats",
    "i: has_slopes dq_is_vector dk_is_vector dv_is_vector",
    "q: stat_rows",
    "4q: grad_stride dq_stride dk_stride dv_stride",
    "3q: grad_lse_stride",
)
# Behind tensor maps and these two; what is behind it ends at a multiple of 128 bytes.
SCORE_GRADIENTS = Params("ScoreGradients", "Q: images", "i: units unit q_tiles k_tiles")
ATTENTION_BACKWARD_SM90 = Params("AttentionBackwardSm90Params", "i: blocks section rounds turns")
ATTENTION_BACKWARD_DS = Params("AttentionBackwardDsParams", "i: blocks section rounds turns")
ATTENTION_BACKWARD_BIAS = Params(
    "AttentionBackwardBiasParams",
    "Q: dbias",
    "i: batches heads rows cols row_blocks col_blocks",
    "4q: dbias_stride",
)
ATTENTION_BACKWARD_SCORE = Params(
    "AttentionBackwardScoreParams",
    "Q: sums",
    "i: slots log2 by_distance units unit_step shared",
    "Q: before elements",
    "q: count range shared_step",
)
ATTENTION_BACKWARD_SUMS = Params(
    "AttentionBackwardSumsParams", "Q: dsinks dslopes", "q: slope_batches"
)
ATTENTION_COLUMN_SUMS = Params(
    "AttentionColumnSumsParams", "Q: sums", "q: group", "3q: sums_stride"
)
DECODE_POINTERS = Params(
    "DecodeParams",
    "Q: q k v out lse mask alibi_slopes sinks",
    "Q: kv_lens page_table q_lens q_offset k_new v_new k_scale v_scale parts counters",
)
DECODE_TAIL = Params(
    "DecodeParams",
    "d: scale softcap v_factor",
    "q: left right offset",
    "i: bottom_right batch kv_heads group q_rows new_rows head_dim value_dim mask_cols",
    "i: pages page_size table_cols",
    "I: page_magic",
    "i: page_shift row_tiles column_tiles least_tiles split wide",
    "i: cache_kind rule vector out_is_vector out_is_float new_is_vector is_async same_strides",
    "i: values_in_keys",
    "4q: q_stride k_stride v_stride out_stride k_new_stride v_new_stride mask_stride",
    "3q: lse_stride k_scale_stride v_scale_stride",
    "2q: alibi_stride table_stride",
    "q: kv_lens_stride q_lens_stride q_offset_stride sinks_stride",
)
KV_APPEND_POINTERS = Params(
    "KvAppendParams", "Q: k_new v_new k_cache v_cache k_scale v_scale kv_lens page_table new_lens"
)
KV_APPEND_TAIL = Params(
    "KvAppendParams",
    "d: k_factor v_factor",
    "i: batch kv_heads new_rows head_dim value_dim pages page_size table_cols",
    "i: new_dtype int8 wide key_blocks",
    "2i: lanes vector own_scale",  # of keys and of values, as the strides
    "8q: new_stride cache_stride",
    "6q: scale_stride",
    "q: kv_lens_stride new_lens_stride",
    "2q: table_stride",
)
