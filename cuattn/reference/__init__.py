"""The ground truth: every public function on NumPy arrays, in float64, as short as the formula.

Same names and signatures as the package. Integers and narrow floats are widened to float64 (a
wider input keeps its type), and results stay that wide unless `dtype` or `out` says otherwise. No
argument is checked here beyond what NumPy does by itself, and no RuntimeWarning escapes.

Notation of Milakov & Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867):
``m`` is the running maximum and ``l`` the running sum (``d`` in the paper, ℓ in FlashAttention).
"""

from __future__ import annotations

from cuattn.reference._attention import (
    attention,
    attention_varlen,
    block_mask,
    merge_attention,
    merge_attention_states,
)
from cuattn.reference._attention_backward import attention_backward, attention_backward_varlen
from cuattn.reference._attention_topk import attention_topk
from cuattn.reference._column_sums import attention_column_sums
from cuattn.reference._kvcache import attention_cascade, attention_kvcache, kv_append
from cuattn.reference._logits import (
    cross_entropy,
    cross_entropy_backward,
    entropy,
    logits_state,
)
from cuattn.reference._sample import sample, sample_state
from cuattn.reference._softmax import (
    log_softmax,
    log_softmax_backward,
    logsumexp,
    segment_softmax,
    segment_softmax_backward,
    softmax,
    softmax_backward,
    softmax_state,
)
from cuattn.reference._topk import merge, softmax_topk, softmax_topk_state, top_k

__all__ = [
    "attention",
    "attention_backward",
    "attention_backward_varlen",
    "attention_cascade",
    "attention_column_sums",
    "attention_kvcache",
    "attention_topk",
    "attention_varlen",
    "block_mask",
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
    "sample",
    "sample_state",
    "segment_softmax",
    "segment_softmax_backward",
    "softmax",
    "softmax_backward",
    "softmax_state",
    "softmax_topk",
    "softmax_topk_state",
    "top_k",
]
