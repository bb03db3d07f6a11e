"""The calls over a KV cache on a device."""

from __future__ import annotations

from typing import Any

from cuattn._attention.request_kvcache import Append, Call


def prepare(call: Call | Append) -> Any:
    """A call with its launches."""
    raise NotImplementedError("attention over a KV cache has no kernels yet: pass NumPy arrays")
