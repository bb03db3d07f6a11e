"""NumPy-style softmax, top-k and attention for CuPy arrays; and the same calls on NumPy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cuattn import reference
from cuattn._arrays.keywords import FUNCTIONS
from cuattn._arrays.results import (
    AttentionGradients,
    BlockMask,
    LogitsState,
    MaskExpression,
    Sample,
    SampleState,
    SoftmaxState,
    SoftmaxTopK,
    SoftmaxTopKLse,
    SoftmaxTopKState,
    TopK,
)
from cuattn._attention.attention import attention, attention_varlen
from cuattn._attention.backward import attention_backward, attention_backward_varlen
from cuattn._attention.block_mask import block_mask
from cuattn._attention.cascade import attention_cascade
from cuattn._attention.column_sums import attention_column_sums
from cuattn._attention.kvcache import attention_kvcache, kv_append
from cuattn._attention.merge import merge_attention, merge_attention_states
from cuattn._attention.topk import attention_topk
from cuattn._device.config import show_config
from cuattn._device.recorder import compile
from cuattn._softmax.backward import log_softmax_backward, softmax_backward
from cuattn._softmax.cross_entropy import cross_entropy, cross_entropy_backward
from cuattn._softmax.logits import entropy, logits_state
from cuattn._softmax.logsumexp import logsumexp
from cuattn._softmax.segments import segment_softmax, segment_softmax_backward
from cuattn._softmax.softmax import log_softmax, softmax
from cuattn._softmax.state import softmax_state
from cuattn._topk.sample import sample, sample_state
from cuattn._topk.state import merge, softmax_topk_state
from cuattn._topk.topk import softmax_topk, top_k

__version__ = "0.1.0"

__all__ = [
    "AttentionGradients",
    "BlockMask",
    "LogitsState",
    "MaskExpression",
    "Sample",
    "SampleState",
    "SoftmaxState",
    "SoftmaxTopK",
    "SoftmaxTopKLse",
    "SoftmaxTopKState",
    "TopK",
    "attention",
    "attention_backward",
    "attention_backward_varlen",
    "attention_cascade",
    "attention_column_sums",
    "attention_kvcache",
    "attention_topk",
    "attention_varlen",
    "block_mask",
    "compile",
    "cross_entropy",
    "cross_entropy_backward",
    "entropy",
    "kv_append",
    "log_softmax",
    "log_softmax_backward",
    "logits_state",
    "logsumexp",
    "merge",
    "merge_attention",
    "merge_attention_states",
    "reference",
    "sample",
    "sample_state",
    "segment_softmax",
    "segment_softmax_backward",
    "show_config",
    "softmax",
    "softmax_backward",
    "softmax_state",
    "softmax_topk",
    "softmax_topk_state",
    "top_k",
]


def __dir__() -> list[str]:
    """Public names only: what tab completion offers."""
    return [*__all__, "__version__"]


if not TYPE_CHECKING:  # for whom there is nothing but __all__

    def __getattr__(name: str) -> Any:
        meant = f"; it is cuattn.{FUNCTIONS[name]}" if name in FUNCTIONS else ""
        raise AttributeError(f"module 'cuattn' has no attribute {name!r}{meant}", name=name)
