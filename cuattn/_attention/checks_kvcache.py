"""What attention over a KV cache raises about its arguments; worded as in `_arrays.checks`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cuattn._arrays.checks import FLOATS, one_dtype, shown
from cuattn._arrays.scalars import integer, number

Shape = tuple[int, ...]
EIGHT_BITS = ("float8_e4m3fn", "int8")  # dtypes whose numbers have a scale
MAX_SHARED_DIM = 576  # of a cache whose values are columns of its keys
MAX_KEYS = 2**31 - 1024  # as checks.MAX_SIZE
LEAST_SPLIT, SPLIT_UNIT = 128, 16


def rows(heads: int, kv_heads: int, queries: int) -> None:
    """ValueError if there are more rows of a key head than kernels count."""
    found = heads // max(1, kv_heads) * queries
    if found > MAX_KEYS:
        raise ValueError(
            f"q must have at most {MAX_KEYS} queries of all heads that share one of k_cache, but "
            f"it has {found}"
        )


def split_size(value: Any) -> int | str | None:
    """Keys of a part: "auto", None or a number."""
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    if isinstance(value, str):
        raise ValueError(f"split_size must be 'auto', None or an integer, but it is {shown(value)}")
    size = integer("split_size", value)
    if size < LEAST_SPLIT or size % SPLIT_UNIT:
        raise ValueError(
            f"split_size must be a multiple of {SPLIT_UNIT} and at least {LEAST_SPLIT}, "
            f"but it is {shown(size)}"
        )
    return min(size, MAX_KEYS)


def scale(name: str, value: Any) -> float:
    """What a number of the cache is multiplied with."""
    factor = number(name, value, "a positive number or an array of float32")
    if not 0 < factor < math.inf:
        raise ValueError(f"{name} must be a positive finite number, but it is {shown(value)}")
    return factor


# -- which arguments come together ---------------------------------------------------------------


def together(name: str, given: bool, other: str, wanted: bool) -> None:
    """ValueError unless an argument is there exactly where another one asks for it."""
    if given and not wanted:
        raise ValueError(f"{name} must come with {other}, but that is None")
    if wanted and not given:
        raise ValueError(f"{name} must be given with {other}, but it is None")


def no_values() -> TypeError:
    """The error for no v_cache, and no columns of k_cache in its place."""
    return TypeError(
        "v_cache must be an array, but it is None; value_dim=n takes the first n columns of k_cache"
    )


def two_values(name: str) -> ValueError:
    """The error for values of their own, where those of `value_dim` are columns of the keys."""
    return ValueError(
        f"{name} must be None where values are the first columns of k_cache, but it was given"
    )


# -- dtypes and shapes ---------------------------------------------------------------------------


def cache_dtype(name: str, dtype: np.dtype, q: np.dtype | None) -> bool:
    """Whether numbers of the cache have 8 bits; TypeError unless these or those of q."""
    if dtype.name in EIGHT_BITS:
        return True
    eight = " or ".join(EIGHT_BITS)
    if q is None:
        one_dtype(name, dtype, FLOATS, f"one of {', '.join(FLOATS)}, {eight}")
    elif dtype != q:
        raise TypeError(f"{name} must have the dtype of q ({q}), {eight}, but its dtype is {dtype}")
    return False


def int32_or_int64(name: str, dtype: np.dtype) -> None:
    """TypeError unless kernels read such integers as they are."""
    if dtype not in (np.int32, np.int64):
        raise TypeError(f"{name} must be int32 or int64, but its dtype is {dtype!r}")


def page_table(shape: Shape, batch: int | None, page_size: int) -> None:
    """ValueError unless these are the pages of `batch` sequences, or of any number."""
    if len(shape) != 2 or (batch is not None and shape[0] != batch):
        sequences = "B" if batch is None else batch
        raise ValueError(
            f"page_table must have shape ({sequences}, pages of a sequence), "
            f"but its shape is {shape}"
        )
    if shape[1] * page_size > MAX_KEYS:
        raise ValueError(
            f"page_table must lead to at most {MAX_KEYS} keys of a sequence, "
            f"but {shape[1]} pages of {page_size} are more"
        )


def shape_of(name: str, shape: Shape, wanted: tuple[int | str, ...]) -> None:
    """ValueError unless an array has this shape; a str is any size."""
    if len(shape) != len(wanted) or any(
        isinstance(size, int) and size != found for size, found in zip(wanted, shape, strict=True)
    ):
        shown_ = ", ".join(map(str, wanted))
        raise ValueError(f"{name} must have shape ({shown_}), but its shape is {shape}")


def tree_mask(shape: Shape, target: Shape) -> None:
    """ValueError unless a mask of the last keys broadcasts to (B, H, S_q, its own last size)."""
    lead = shape[:-1]
    if (
        not 0 <= len(lead) <= len(target)
        or not shape
        or shape[-1] > MAX_KEYS
        or any(
            size not in (1, wanted)
            for size, wanted in zip(lead, target[len(target) - len(lead) :], strict=True)
        )
    ):
        wanted = ", ".join(map(str, target))
        raise ValueError(
            f"mask must broadcast to ({wanted}, M) for the last M keys, but its shape is {shape}"
        )


def scale_array(name: str, shape: Shape, dtype: np.dtype, heads: int, tokens: Shape) -> None:
    """TypeError or ValueError unless this is the scale of all, of each head, or of each token."""
    if dtype != np.float32:
        raise TypeError(f"{name} must have dtype float32, but its dtype is {dtype}")
    if shape not in ((), (heads,), tokens):
        raise ValueError(
            f"{name} must have shape (), ({heads},) or {tokens}: one value, one of each head, or "
            f"one of each token and head, but its shape is {shape}"
        )


def no_scale(name: str, cache: str, dtype: np.dtype) -> ValueError:
    """The error for the scale of a cache that has none."""
    return ValueError(f"{name} must be None for {cache} of {dtype}, but it was given")


def overlaps(name: str, other: str) -> ValueError:
    """The error for an array that a call reads where it writes."""
    return ValueError(
        f"{name} must share no memory with {other}, which is written to, but they overlap; "
        "pass a copy"
    )
