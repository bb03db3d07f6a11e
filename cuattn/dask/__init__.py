"""The functions of cuattn on dask arrays, whose chunks are arrays of NumPy or CuPy.

A row may lie in any number of chunks. What has to be known of it is computed of each chunk and
merged in a tree. No function is called before dask computes.
"""

from __future__ import annotations

from cuattn.dask.attention import attention
from cuattn.dask.logits import cross_entropy, cross_entropy_backward, entropy
from cuattn.dask.sample import sample
from cuattn.dask.softmax import log_softmax, logsumexp, softmax
from cuattn.dask.topk import softmax_topk, top_k

__all__ = [
    "attention",
    "cross_entropy",
    "cross_entropy_backward",
    "entropy",
    "log_softmax",
    "logsumexp",
    "sample",
    "softmax",
    "softmax_topk",
    "top_k",
]
