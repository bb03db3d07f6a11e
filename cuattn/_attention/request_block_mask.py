"""A `BlockMask` among the arguments of a call: whether it fits the others."""

from __future__ import annotations

from typing import Any, NamedTuple

from cuattn._arrays import scalars
from cuattn._arrays.checks import bool_dtype, one_dtype, shown
from cuattn._arrays.inputs import as_array
from cuattn._arrays.results import BlockMask, MaskExpression
from cuattn._attention import checks, request_mask
from cuattn._attention.request_mask import Predicate
from cuattn._attention.views import LISTS, Arrays, Shape, Sizes
from cuattn._device.kernel import ceil_div

DTYPES = "int32", "int32", "bool"  # of LISTS
FIELDS = dict(zip((*LISTS, "mask"), BlockMask._fields[:4], strict=True))


class Given(NamedTuple):
    """Its arrays, by the names that errors give them, and the sizes of a tile."""

    lists: dict[str, Any]  # and the mask, if that is an array
    mask_args: dict[str, Any]  # of a mask that is an expression
    mask: MaskExpression | None
    block: tuple[int, int] | None


def lists(block_mask: Any, mask: Any) -> Given:
    """A block mask as it is given to attention."""
    if block_mask is None:
        return Given({}, {}, None, None)
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
    found = {f"block_mask.{name}": getattr(block_mask, name) for name in FIELDS.values()}
    for name, array in found.items():
        if array is None:
            raise TypeError(
                f"{name} must be an array, but it is None; make it by cuattn.block_mask"
            )
    if not isinstance(block_mask.mask, MaskExpression):
        return Given(found, {}, None, block)
    mask = found.pop("block_mask.mask")
    return Given(found, request_mask.arrays_of(mask), mask, block)


def name_of(field: str, blocked: bool) -> str:
    """What errors call a field of `Arrays`."""
    return f"block_mask.{FIELDS[field]}" if blocked and field in FIELDS else field


def fields_of(given: dict[str, Any]) -> dict[str, Any]:
    """The same arrays by the fields of `Arrays`."""
    fields = {f"block_mask.{name}": field for field, name in FIELDS.items()}
    return {fields.get(name, name): array for name, array in given.items()}


def check(specs: Arrays, predicate: Predicate | None, sizes: Sizes, block: tuple[int, int]) -> None:
    """Check that lists are those of a mask of all queries and keys, whose leading axes fit."""
    shape: Shape = specs.mask.shape if predicate is None else predicate.shape
    *lead, rows, columns = shape if len(shape) > 1 else (1, 1, 1)
    if (rows, columns) != sizes[2:]:
        raise ValueError(
            f"block_mask.mask must have {sizes.seqlen_q} queries and {sizes.seqlen_k} keys, "
            f"but its shape is {shape}"
        )
    if predicate is not None:
        request_mask.check(predicate, sizes, len(specs.q.shape))
    counts = (*lead, ceil_div(rows, block[0]))
    listed = (*counts, ceil_div(columns, block[1]))
    for field, wanted, dtype in zip(LISTS, (counts, listed, listed), DTYPES, strict=True):
        name, spec = name_of(field, True), getattr(specs, field)
        one_dtype(name, spec.dtype, (dtype,), f"of dtype {dtype}")
        what = f"that of a mask of shape {shape} and tiles of {block}"
        checks.one_of_shapes(name, spec.shape, (wanted,), what)


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
