"""Masks whose empty tiles attention passes over."""

from __future__ import annotations

from typing import Any, SupportsIndex, overload

from cuattn._arrays.keywords import explained
from cuattn._arrays.results import BlockMask
from cuattn._arrays.types import Host, Other
from cuattn._attention import request_block_mask
from cuattn._attention.run_block_mask import block_mask_of


@overload
def block_mask(
    mask: Host,
    q_len: SupportsIndex | None = None,
    k_len: SupportsIndex | None = None,
    /,
    *,
    block: tuple[SupportsIndex, SupportsIndex] = (128, 128),
) -> BlockMask: ...
@overload
def block_mask(
    mask: Other,
    q_len: SupportsIndex | None = None,
    k_len: SupportsIndex | None = None,
    /,
    *,
    block: tuple[SupportsIndex, SupportsIndex] = (128, 128),
) -> Any: ...
@explained
def block_mask(
    mask: Any,
    q_len: Any = None,
    k_len: Any = None,
    /,
    *,
    block: Any = (128, 128),
) -> BlockMask:
    """A mask of attention by tiles: which are empty, and which hide nothing.

    `attention` neither loads nor multiplies keys of empty tiles, and reads the mask in none that
    hides nothing. Worth it where a mask has large parts without a True: documents laid end to end,
    a prefix beside a window, blocks chosen at random. Made once, it is for any number of calls.

    Parameters
    ----------
    mask : cupy.ndarray or numpy.ndarray of bool, shape (B, H, S_q, S_k)
        True: attend. B, or B and H, may be left out, and be 1 for all alike. Not copied: neither
        mask nor the result may be changed until the last call that takes it.
    q_len, k_len : int, optional
        S_q and S_k, where mask has an axis of 1 for them. Default: as long as that axis.
    block : (queries, keys), optional
        Sizes of a tile, multiples of 128.

    Returns
    -------
    BlockMask
        `counts` (..., M), `indices` and `full` (..., M, N), `mask` and `block`; M = ceil(S_q /
        queries), N = ceil(S_k / keys), and leading axes as mask has them.

    Raises
    ------
    TypeError, ValueError
        If mask is not an array of bool with these axes, a length is not that of mask, or a size in
        `block` is not a multiple of 128.

    See Also
    --------
    attention : What it is for, as `block_mask`.

    Notes
    -----
    Runs on the current stream of the device of mask, by CuPy; does not synchronise.

    Examples
    --------
    >>> document = numpy.arange(512) // 200  # three of them, of 200, 200 and 112 tokens
    >>> same = cuattn.block_mask(document[:, None] == document)
    >>> same.counts
    array([2, 4, 3, 3], dtype=int32)
    >>> same.indices[0]
    array([ 0,  1, -1, -1], dtype=int32)
    >>> x = numpy.ones((512, 8))
    >>> cuattn.attention(x, x, x, block_mask=same, is_causal=True).shape
    (512, 8)
    """
    return block_mask_of(*request_block_mask.given(mask, q_len, k_len, block))
