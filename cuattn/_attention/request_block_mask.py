"""A `BlockMask` among the arguments of a call: whether it fits the others."""

from __future__ import annotations

from typing import Any

from cuattn._arrays import scalars
from cuattn._arrays.checks import bool_dtype, one_dtype, shown
from cuattn._arrays.inputs import as_array
from cuattn._arrays.results import BlockMask
from cuattn._attention import checks
from cuattn._attention.views import LISTS, Arrays, Sizes
from cuattn._device.kernel import ceil_div

DTYPES = "int32", "int32", "bool"  # of LISTS
FIELDS = dict(zip((*LISTS, "mask"), BlockMask._fields[:4], strict=True))


def lists(block_mask: Any, mask: Any) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Its arrays, by the names that errors give them, and the sizes of a tile."""
    if block_mask is None:
        return {}, None
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"block_mask must be a result of cuattn.block_mask, but it is {shown(block_mask)}"
        )
    if mask is not None:
        raise ValueError(
            "mask must be None beside block_mask, but it was given; block_mask(mask & other) "
            "is a block mask of both"
        )
    block = checks.block("block_mask.block", block_mask.block)
    given = {f"block_mask.{name}": getattr(block_mask, name) for name in FIELDS.values()}
    for name, array in given.items():
        if array is None:
            raise TypeError(f"{name} must be an array, but it is None; make it by cuattn.block_mask")
    return given, block


def name_of(field: str, blocked: bool) -> str:
    """What errors call a field of `Arrays`."""
    return f"block_mask.{FIELDS[field]}" if blocked and field in FIELDS else field


def fields_of(given: dict[str, Any]) -> dict[str, Any]:
    """The same arrays by the fields of `Arrays`."""
    fields = {f"block_mask.{name}": field for field, name in FIELDS.items()}
    return {fields.get(name, name): array for name, array in given.items()}


def check(specs: Arrays, sizes: Sizes, block: tuple[int, int]) -> None:
    """Check that lists are those of a mask of all queries and keys, whose leading axes fit."""
    *lead, rows, columns = specs.mask.shape if len(specs.mask.shape) > 1 else (1, 1, 1)
    if (rows, columns) != sizes[2:]:
        raise ValueError(
            f"block_mask.mask must have {sizes.seqlen_q} queries and {sizes.seqlen_k} keys, "
            f"but its shape is {specs.mask.shape}"
        )
    counts = (*lead, ceil_div(rows, block[0]))
    listed = (*counts, ceil_div(columns, block[1]))
    for field, shape, dtype in zip(LISTS, (counts, listed, listed), DTYPES, strict=True):
        name, spec = name_of(field, True), getattr(specs, field)
        one_dtype(name, spec.dtype, (dtype,), f"of dtype {dtype}")
        what = f"that of a mask of shape {specs.mask.shape} and tiles of {block}"
        checks.one_of_shapes(name, spec.shape, (shape,), what)


def given(mask: Any, q_len: Any, k_len: Any, block: Any) -> tuple[Any, int, int, tuple[int, int]]:
    """Arguments of `block_mask`, checked: the mask, its queries and keys, and a tile's."""
    mask = as_array("mask", mask)
    bool_dtype("mask", mask.dtype, "compare, as in mask != 0")
    if not 2 <= mask.ndim <= 4:
        raise ValueError(
            "mask must have shape (S_q, S_k), (H, S_q, S_k) or (B, H, S_q, S_k), "
            f"but its shape is {mask.shape}"
        )
    lengths = []
    for name, value, size in zip(("q_len", "k_len"), (q_len, k_len), mask.shape[-2:], strict=True):
        length = size if value is None else scalars.count(name, value, checks.MAX_SIZE)
        if size not in (1, length):
            raise ValueError(
                f"{name} must be {size}, as mask has shape {mask.shape}, but it is {length}"
            )
        lengths.append(length)
    return mask, *lengths, checks.block("block", block)
