"""What comes before the keys of a cache: whether prefixes fit a call over one."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn._arrays.checks import kind, shown
from cuattn._arrays.inputs import as_array
from cuattn._arrays.outputs import as_outputs
from cuattn._arrays.row_layout import spec_of
from cuattn._attention import checks
from cuattn._attention import checks_kvcache as own_checks
from cuattn._attention.request import check_alignment
from cuattn._attention.request_kvcache import Call
from cuattn._attention.views import canonical, canonical_shape, fractional


def prefixes(given: Any, call: Call, out: Any) -> list[tuple[Any, Any]]:
    """Keys and values of the prefixes of a call, (1, H_kv, P, ·)."""
    if not isinstance(given, (list, tuple)):
        raise TypeError(
            f"prefixes must be a list or tuple of pairs (k, v), but it is {shown(given)}"
        )
    pairs = [_pair(f"prefixes[{i}]", one, call) for i, one in enumerate(given)]
    arrays = [one for pair in pairs for one in pair.items()]
    owner = "q", call.arrays.q
    if out is not None:
        as_outputs(out, call.results, [owner, *arrays], in_place=False)
    if call.runtime is not None:
        check_alignment(call.runtime, arrays, None)
        for name, array in arrays:
            if fractional(spec_of(array)):
                raise checks.fractional(name, array.strides, array.itemsize)
    found = []
    for pair in pairs:
        k, *v = (canonical(array, call.layout) for array in pair.values())
        found.append((k, v[0] if v else k[..., : call.expected.sizes.value_dim]))
    _check_offsets(call, sum(k.shape[2] for k, _ in found))
    return found


def _pair(name: str, given: Any, call: Call) -> dict[str, Any]:
    """k and v of a prefix by name, checked; without v where values are columns of k."""
    if not isinstance(given, (list, tuple)) or len(given) != 2:
        found = shown(given) if isinstance(given, (list, tuple)) else kind(given)
        raise TypeError(f"{name} must be a pair (k, v) of arrays, but it is {found}")
    q, sizes = call.arrays.q, call.expected.sizes
    keys: Any = "P"
    arrays, shared = {}, call.arrays.v_cache is None
    for i, dim in enumerate((sizes.head_dim, sizes.value_dim)):
        part = f"{name}[{i}]"
        if i and shared:
            if given[1] is not None:
                raise own_checks.two_values(part)
            continue
        arrays[part] = array = as_array(part, given[i], ("q", q))
        checks.same_dtype(part, array.dtype, "q", q.dtype)
        own_checks.shape_of(part, array.shape, _in_layout(call, keys, dim))
        shape = canonical_shape(array.shape, call.layout)
        checks.sizes(part, shape, own_checks.MAX_SHARED_DIM)
        keys = shape[2]
    return arrays


def _in_layout(call: Call, keys: Any, dim: int) -> tuple[Any, ...]:
    heads = call.expected.sizes.kv_heads
    return (heads, keys, dim) if call.layout == "BHSD" else (keys, heads, dim)


def _check_offsets(call: Call, before: int) -> None:
    """Check that places among the keys of the cache are counted, too."""
    number, array = call.options.scores.q_offset, call.arrays.q_offset
    if number is not None:
        checks.offset(number - before)
    if isinstance(array, np.ndarray):
        checks.offset_values(array.astype(np.int64) - before)
