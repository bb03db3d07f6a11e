"""The calls of attention_backward: plan, and cast what no kernel can read."""

from __future__ import annotations

from cuattn._attention.numpy_backward import run_numpy
from cuattn._attention.request_backward import Call
from cuattn.results import AttentionGradients


def prepare(call: Call) -> AttentionGradients:
    """The results of a call."""
    if call.runtime is None:
        return run_numpy(call)
    raise NotImplementedError("attention_backward has no kernels yet")
