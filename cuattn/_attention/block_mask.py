"""Masks whose empty tiles attention passes over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, SupportsIndex, overload

from cuattn._arrays.keywords import explained
from cuattn._arrays.results import BlockMask
from cuattn._arrays.types import Array, Host, Other
from cuattn._attention import request_block_mask, request_mask
from cuattn._attention.run_block_mask import block_mask_of, block_mask_of_expression

Block = tuple[SupportsIndex, SupportsIndex]


@overload
def block_mask(
    mask: Host,
    q_len: SupportsIndex | None = None,
    k_len: SupportsIndex | None = None,
    /,
    *,
    block: Block = (128, 128),
) -> BlockMask: ...
@overload
def block_mask(
    mask: Other,
    q_len: SupportsIndex | None = None,
    k_len: SupportsIndex | None = None,
    /,
    *,
    block: Block = (128, 128),
) -> Any: ...
@overload
def block_mask(
    mask: str,
    q_len: SupportsIndex,
    k_len: SupportsIndex,
    /,
    *,
    args: Mapping[str, Host] | None = None,
    batch: SupportsIndex | None = None,
    heads: SupportsIndex | None = None,
    like: Host | None = None,
    block: Block = (128, 128),
) -> BlockMask: ...
@overload
def block_mask(
    mask: str,
    q_len: SupportsIndex,
    k_len: SupportsIndex,
    /,
    *,
    args: Mapping[str, Array] | None = None,
    batch: SupportsIndex | None = None,
    heads: SupportsIndex | None = None,
    like: Array | None = None,
    block: Block = (128, 128),
) -> Any: ...
@explained
def block_mask(
    mask: Any,
    q_len: Any = None,
    k_len: Any = None,
    /,
    *,
    args: Any = None,
    batch: Any = None,
    heads: Any = None,
    like: Any = None,
    block: Any = (128, 128),
) -> BlockMask:
    """A mask of attention by tiles: which are empty, and which hide nothing.

    `attention` neither loads nor multiplies keys of empty tiles, and asks the mask in none that
    hides nothing. Worth it where a mask has large parts without a True: documents laid end to end,
    a prefix beside a window, blocks chosen at random. Made once, it is for any number of calls.

    Parameters
    ----------
    mask : str, or cupy.ndarray or numpy.ndarray of bool, shape (B, H, S_q, S_k)
        True: attend. An expression of `b`, the sequence, `h`, the head of q, `q` and `k`, the
        places of query (``i + k_len - q_len``) and key (j), and of arrays, in the language of the
        `score` of `attention`: no array of S_q by S_k numbers ever exists. Of an array B, or B and
        H, may be left out, and be 1 for all alike.
    q_len, k_len : int
        S_q and S_k. Optional with an array, which has an axis of that length or of 1.
    args : dict of str to array, optional
        The arrays by the names that the expression has for them, as `score_args` of `attention`.
    batch, heads : int, optional
        B and H. Needed if the expression has `b` or `h`; else it is the same for all.
    like : array, optional
        The lists are made in its library and on its device, if there are no `args`. Default: NumPy.
    block : (queries, keys), optional
        Sizes of a tile, multiples of 128.

    Returns
    -------
    BlockMask
        `counts` (..., M), `indices` and `full` (..., M, N), `mask` and `block`; M = ceil(S_q /
        queries), N = ceil(S_k / keys), and leading axes as mask has them. Those of an expression
        are (B, H) or (B, 1) if it has `b`, else (H,) if it has `h`; its `mask` is a
        `MaskExpression`.

    Raises
    ------
    TypeError, ValueError
        If mask is not an array of bool with these axes or an expression of that type, a length is
        missing or not that of mask, arrays are of two libraries or devices, or a size in `block`
        is not a multiple of 128.

    See Also
    --------
    attention : What it is for, as `block_mask`.

    Notes
    -----
    Arrays are not copied: neither they nor the result may be changed until the last call that
    takes it. Lengths that attention is given later do not move the places of an expression. Its
    floats have 64 bits. A kernel is compiled for each expression, not for each shape.
    Runs on the current stream of the device of the arrays, by CuPy; does not synchronise.

    Examples
    --------
    >>> document = numpy.arange(512) // 200  # three of them, of 200, 200 and 112 tokens
    >>> same = cuattn.block_mask("doc[q] == doc[k]", 512, 512, args={"doc": document})
    >>> same.counts
    array([2, 4, 3, 3], dtype=int32)
    >>> same.indices[0]
    array([ 0,  1, -1, -1], dtype=int32)
    >>> x = numpy.ones((512, 8))
    >>> cuattn.attention(x, x, x, block_mask=same, is_causal=True).shape
    (512, 8)
    >>> cuattn.block_mask(document[:, None] == document).counts  # the same, of an array
    array([2, 4, 3, 3], dtype=int32)
    """
    if isinstance(mask, str):
        options = args, batch, heads, like, block
        return block_mask_of_expression(request_mask.given(mask, q_len, k_len, *options))
    request_mask.no_expression(args=args, batch=batch, heads=heads, like=like)
    return block_mask_of(*request_block_mask.given(mask, q_len, k_len, block))
