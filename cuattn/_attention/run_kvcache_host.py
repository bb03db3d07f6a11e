"""The calls over a KV cache on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn._attention import numpy_kvcache
from cuattn._attention.request_kvcache import Append, Call
from cuattn._attention.views import canonical
from cuattn._attention.views_kvcache import Arrays, Sizes, canonical_views, is_per_token
from cuattn._device.launches import one_or_all


def compute(call: Call) -> Any:
    """The results of a call of `attention_kvcache`."""
    if call.append is not None:
        append(call.append)
    outs = call.outs or tuple(np.empty(*one) for one in call.results)
    scales, sizes = (call.options.k_scale, call.options.v_scale), call.expected.sizes
    x = _operands(call.arrays, sizes, call.layout, scales)
    lse = outs[1][(None,) * (3 - outs[1].ndim)] if len(outs) > 1 else None
    out = canonical(outs[0], call.layout)
    indexed = tuple(call.score_args.values())
    numpy_kvcache.attention(x, sizes, call.options.scores, indexed, out, lse)
    return one_or_all(*outs)


def append(call: Append) -> None:
    """A call of `kv_append`, or what one of `attention_kvcache` writes."""
    given = call.arrays
    x = _operands(given, call.sizes, call.layout, (call.k_scale, call.v_scale))
    computed = is_per_token(given.k_scale, given.k_cache)
    computed_v = given.v_cache is not None and is_per_token(given.v_scale, given.v_cache)
    numpy_kvcache.append(x, call.sizes, (computed, computed_v), call.acc)


def _operands(given: Arrays, sizes: Sizes, layout: str, scales: tuple[float, float]) -> Arrays:
    """Canonical views; a scale that is a number is the array of it."""
    for name, number in zip(("k_scale", "v_scale"), scales, strict=True):
        if number != 1:
            given = given._replace(**{name: np.array(number)})
    x = canonical_views(given, sizes, layout, np)
    return x if given.v_cache is not None else x._replace(v_scale=x.k_scale)
