"""Attention over dask arrays: a task for each block of queries and block of keys that they see."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

import cuattn
from cuattn._arrays.keywords import explained
from cuattn._attention import request
from cuattn.dask import graph

# Axes of the options, from the last one on; K is that of the keys.
AXES = {"mask": "BHSK", "bias": "BHSK", "alibi_slopes": "BH", "sinks": "H"}
AXES |= dict.fromkeys(("q_offset", "q_lens", "kv_lens"), "B")
Blocks = dict[str, tuple[int, ...]]  # of an axis


@explained
def attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    is_causal: bool = False,
    q_offset: Any = None,
    window: Any = None,
    scale: Any = None,
    softcap: Any = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    q_lens: Any = None,
    kv_lens: Any = None,
    layout: str = "BHSD",
    precision: str | None = None,
    dtype: Any = None,
    return_lse: bool = False,
    split_every: int | None = None,
) -> Any:
    """`cuattn.attention` of dask arrays, with queries and keys in any chunks.

    Parameters
    ----------
    q, k, v : dask.array.Array
        Chunks are arrays of NumPy or CuPy. They are cut further where those of q, k and v do not
        fit each other; heads that share keys stay together.
    is_causal, q_offset, window, scale, softcap, mask, bias, alibi_slopes, sinks, q_lens, kv_lens
        As `cuattn.attention`. Arrays are of dask, or of the library of the chunks.
    layout, precision, dtype, return_lse
        As `cuattn.attention`.
    split_every : int, optional
        As `softmax`.

    Returns
    -------
    out : dask.array.Array
        As `cuattn.attention`.
    lse : dask.array.Array
        Only with `return_lse`.

    Raises
    ------
    TypeError, ValueError
        As `cuattn.attention`, before there is a graph.

    See Also
    --------
    cuattn.attention : The same of arrays.
    cuattn.merge_attention : What merges the results over blocks of keys.

    Notes
    -----
    There is no task for keys that `is_causal`, `window` or `kv_lens` hide from a whole block of
    queries, as far as numbers and NumPy arrays tell: values of other arrays are not read. Results
    over blocks of keys are merged in float32 (float64 for float64).

    Examples
    --------
    >>> q = k = dask.array.zeros((2, 4), chunks=(1, 4))
    >>> v = dask.array.from_array(numpy.array([[1.0], [3.0]]), chunks=1)
    >>> cuattn.dask.attention(q, k, v, is_causal=True).compute()
    array([[1.],
           [2.]])
    """
    required = {name: graph.checked(name, x) for name, x in {"q": q, "k": k, "v": v}.items()}
    optional = {"mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    optional |= {"q_lens": q_lens, "kv_lens": kv_lens}
    call = request.attention(
        {name: graph.stand_in(array) for name, array in required.items()},
        {name: graph.stand_in(array) for name, array in optional.items()},
        graph.stand_in(q_offset),
        layout,
        (is_causal, window, scale, softcap, precision),
        dtype,
        return_lse,
        None,
    )
    width = graph.width(split_every) or dask.config.get("split_every", 4)
    how = {"is_causal": is_causal, "window": window, "scale": scale, "softcap": softcap}
    how |= {"layout": layout, "precision": precision}
    optional["q_offset"] = q_offset
    letters = layout if q.ndim == 4 else layout.replace("B", "") if q.ndim == 3 else "SD"
    blocks, arrays = _aligned(required, optional, letters, call.expected.sizes.heads)
    sees = _sight(call, optional, blocks)
    states = _states(call, blocks, arrays, sees, letters, how, width)
    rows = [letter for letter in "BHS" if letter in letters]
    result, acc = call.expected.dtype, call.expected.acc
    out = functools.partial(_out, dtype=result)
    y = graph.of_states(out, states, rows, letters, result, "attention-out", {"D": v.shape[-1]})
    if not return_lse:
        return y
    return y, graph.of_states(_lse, states, rows, rows, acc, "attention-lse")


def _aligned(
    required: dict[str, Any], optional: dict[str, Any], letters: str, heads: int
) -> tuple[Blocks, dict[str, Any]]:
    """The blocks of each axis, and arrays as (array, letters of its axes), cut into these.

    q decides on blocks of the batch and of queries, k on those of heads and of keys.
    """
    q, k, _ = required.values()
    shared = letters.replace("S", "K")
    keys = dict(zip(shared, k.chunks, strict=True))
    group = heads // max(sum(keys.get("H", (1,))), 1)
    blocks = {"B": (1,), **dict(zip(letters, q.chunks, strict=True)), "K": keys["K"]}
    blocks["H"] = tuple(group * size for size in keys.get("H", (1,)))
    arrays = {}
    for name, array in required.items():
        own, cut = (letters, blocks) if name == "q" else (shared, blocks | {"H": keys.get("H")})
        cut = cut | {"D": array.shape[-1:]}
        arrays[name] = array.rechunk(tuple(cut[letter] for letter in own)), own
    for name, value in optional.items():
        if not hasattr(value, "ndim"):
            continue
        array = graph.collection(name, value, "q", q)
        own = AXES[name][len(AXES[name]) - array.ndim :]
        sizes = zip(array.shape, own, strict=True)
        fit = tuple((1,) if size == 1 else blocks[letter] for size, letter in sizes)
        arrays[name] = array.rechunk(fit), own
    return blocks, arrays


def _sight(
    call: request.Call, optional: dict[str, Any], blocks: Blocks
) -> Callable[[int, int, int], bool]:
    """Whether a query in a block of the batch and of queries may see a key in a block of keys."""
    batch, _, seqlen_q, seqlen_k = call.expected.sizes
    left, right = call.options.left, call.options.right

    def bounds(value: Any) -> list[tuple[float, float]]:
        """The least and the largest number of each block of the batch."""
        if value is None:  # not known before it is computed
            return [(-math.inf, math.inf)] * len(blocks["B"])
        parts = np.split(np.broadcast_to(np.float64(value), batch), np.cumsum(blocks["B"])[:-1])
        return [(part.min(initial=math.inf), part.max(initial=-math.inf)) for part in parts]

    def known(name: str, otherwise: Any) -> Any:
        value = optional[name]
        if value is None:
            return otherwise
        host = isinstance(value, (int, np.integer, np.ndarray))
        return np.asarray(value, np.int64) if host else None

    q_lens, kv_lens = known("q_lens", seqlen_q), known("kv_lens", seqlen_k)
    lens = q_lens is not None and kv_lens is not None
    offsets = bounds(known("q_offset", kv_lens - q_lens if lens else None))
    ends_q, ends_k = bounds(q_lens), bounds(kv_lens)
    starts_q, starts_k = (np.cumsum((0, *blocks[letter])).tolist() for letter in "SK")

    def sees(b: int, i: int, j: int) -> bool:
        first, last = starts_q[i], min(starts_q[i + 1], ends_q[b][1]) - 1
        begin, end = starts_k[j], min(starts_k[j + 1], ends_k[b][1]) - 1
        low, high = offsets[b]
        return (
            first <= last
            and begin <= end
            and (right is None or begin <= last + high + right)
            and (left is None or end >= first + low - left)
        )

    return sees


def _states(
    call: request.Call,
    blocks: Blocks,
    arrays: dict[str, Any],
    sees: Callable[[int, int, int], bool],
    letters: str,
    how: dict[str, Any],
    width: int,
) -> Any:
    """An array over the axes that q has of (B, H, S), with chunks (out, lse)."""
    dependencies = [array for array, _ in arrays.values()]
    token = tokenize(dependencies, [*arrays], call.options, how, width)
    name, rows = f"attention-{token}", [letter for letter in "BHS" if letter in letters]
    tasks: dict[Any, Any] = {}
    starts = {letter: np.cumsum((0, *blocks[letter])).tolist() for letter in "SK"}
    merged = functools.partial(_merged, layout=how["layout"])
    for place in itertools.product(*(range(len(blocks[letter])) for letter in "BHS")):
        b, _, i = place
        seen = [j for j in range(len(blocks["K"])) if sees(b, i, j)] or [0]  # or all is hidden
        parts: list[Any] = []
        for j in seen:
            names = [n for n in arrays if n != "sinks" or j == seen[0]]  # they count once
            at = dict(zip("BHSKD", (*place, j, 0), strict=True))
            function = functools.partial(
                _attention,
                names=tuple(names),
                begin=(starts["S"][i], starts["K"][j]),
                whole=call.expected.sizes[2:],
                offset=call.options.q_offset,
                axis=letters.index("S"),
                how=how,
            )
            parts.append((f"attention-part-{token}", *place, j))
            tasks[parts[-1]] = (function, *(_key(arrays[n], at) for n in names))
        for depth in itertools.count():
            groups = [parts[n : n + width] for n in range(0, len(parts), width)]
            if len(groups) == 1:
                break
            parts = [(f"attention-merge-{token}", *place, depth, n) for n in range(len(groups))]
            tasks |= {key: (merged, group) for key, group in zip(parts, groups, strict=True)}
        whole = (name, *(at[letter] for letter in rows))
        tasks[whole] = (merged, parts)
    made = HighLevelGraph.from_collections(name, tasks, dependencies)
    chunks = tuple(blocks[letter] for letter in rows)
    return da.Array(made, name, chunks, meta=dependencies[0]._meta)


def _key(placed: tuple[Any, str], at: dict[str, int]) -> tuple[Any, ...]:
    """The task of the block of an array at a place; an axis of one block has but that."""
    array, letters = placed
    blocks = zip(letters, array.numblocks, strict=True)
    return (array.name, *(at[letter] if n > 1 else 0 for letter, n in blocks))


def _attention(
    *blocks: Any,
    names: tuple[str, ...],
    begin: tuple[int, int],
    whole: tuple[int, int],
    offset: int | None,
    axis: int,
    how: dict[str, Any],
) -> tuple[Any, Any]:
    """Attention of a block of queries over one of keys, which begin there in the whole."""
    given = dict(zip(names, blocks, strict=True))
    q, k, v = (given.pop(name) for name in ("q", "k", "v"))
    ints: dict[str, Any] = {
        n: given[n].astype(np.int64) for n in ("q_offset", "q_lens", "kv_lens") if n in given
    }
    q_lens, kv_lens = ints.get("q_lens", whole[0]), ints.get("kv_lens", whole[1])
    if offset is None:
        offset = ints.get("q_offset", kv_lens - q_lens)
    given["q_offset"] = offset + begin[0] - begin[1]
    for name, start, size in zip(("q_lens", "kv_lens"), begin, (q, k), strict=True):
        if name in given:
            given[name] = np.clip(ints[name] - start, 0, size.shape[axis])
    dtype = np.float32 if q.itemsize == 2 else None
    return cuattn.attention(q, k, v, **given, **how, dtype=dtype, return_lse=True)


def _merged(parts: list[Any], *, layout: Any) -> tuple[Any, Any]:
    return graph.merged(parts, lambda a, b: cuattn.merge_attention(*a, *b, layout=layout))


def _out(state: tuple[Any, Any], *, dtype: Any) -> Any:
    return state[0].astype(dtype, copy=False)


def _lse(state: tuple[Any, Any]) -> Any:
    return state[1]
