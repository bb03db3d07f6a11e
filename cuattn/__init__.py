"""NumPy-style softmax for CuPy arrays; the same calls run on NumPy arrays in float64."""

from __future__ import annotations

from cuattn.logsumexp import logsumexp, merge, softmax_state
from cuattn.reference import SoftmaxState
from cuattn.softmax import (
    log_softmax,
    log_softmax_backward,
    segment_softmax,
    softmax,
    softmax_backward,
)

__version__ = "0.1.0"

__all__ = [
    "SoftmaxState",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "merge",
    "segment_softmax",
    "softmax",
    "softmax_backward",
    "softmax_state",
]
