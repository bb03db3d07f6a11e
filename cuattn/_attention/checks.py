"""What attention raises about its arguments; worded as in `_arrays.checks`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.exceptions import AxisError

from cuattn._arrays.checks import INTEGERS, broadcastable, one_dtype, shown
from cuattn._arrays.scalars import float_dtype, integer, number

Shape = tuple[int, ...]
MAX_HEAD_DIM = 256  # of caches and of gradients
MAX_FORWARD_DIM = 512
MAX_SIZE = 2**31 - 1024  # kernels count rows and keys in 32 bits, up to the end of a tile
MAX_OFFSET = 2**39  # so that sums of places stay within what the kernels count
BLOCK, MAX_BLOCK = 128, 2**30  # queries or keys of a block mask's tile
NORMAL = {  # the least and the largest, by accumulator
    np.dtype(acc): (float(np.finfo(acc).smallest_normal), float(np.finfo(acc).max))
    for acc in (np.float32, np.float64)
}
LAYOUTS = {"BHSD": ("D", "S", "H", "B"), "BSHD": ("D", "H", "S", "B")}  # last axis first


# -- dtypes --------------------------------------------------------------------------------------


def result_dtype(dtype: Any, q: np.dtype) -> np.dtype:
    """The dtype of a result: what was asked for, or that of q."""
    given = q if dtype is None else float_dtype(dtype)
    if given != q and (q.itemsize > 2 or given != np.float32):
        least = f"{q}, that of q" + (", or float32" if q.itemsize == 2 else "")
        raise TypeError(f"dtype must be {least}, but it is {given}")
    return given


# -- numbers -------------------------------------------------------------------------------------


def normal(number: float, acc: np.dtype) -> float:
    """A finite number, but for 0, as the nearest one of its sign that is normal in `acc`."""
    if number == 0 or not math.isfinite(number):
        return number
    least, most = NORMAL[acc]
    return math.copysign(min(max(abs(number), least), most), number)


def hint(name: str, value: Any) -> None:
    """TypeError or ValueError unless this is a length or None."""
    if value is not None and integer(name, value) < 0:
        raise ValueError(f"{name} must be at least 0, but it is {shown(value)}")


def softcap(value: Any) -> float:
    """A positive number; 0 of None."""
    cap = 0.0 if value is None else number("softcap", value)
    if value is not None and not 0 < cap < math.inf:
        raise ValueError(
            f"softcap must be a positive finite number, but it is {shown(value)}; None: no cap"
        )
    return cap


def window(value: Any) -> tuple[int | None, int | None]:
    """(left, right) of keys beside the query's own; None has no bound."""
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(
            f"window must be a pair (left, right) of integers or None, but it is {shown(value)}"
        )
    bounds: list[int | None] = []
    for i, bound in enumerate(value):
        size = None if bound is None else integer(f"window[{i}]", bound)
        if size is not None and size < 0:
            raise ValueError(
                f"window[{i}] must be at least 0, but it is {shown(size)}; None has no bound"
            )
        bounds.append(size if size is None or size <= 2 * MAX_OFFSET else None)
    return bounds[0], bounds[1]


def offset(value: Any) -> int:
    """A place of query 0 among the keys."""
    place = integer("q_offset", value)
    if abs(place) > MAX_OFFSET:
        raise ValueError(f"q_offset must be between -2**39 and 2**39, but it is {shown(place)}")
    return place


def precision(value: Any, dtype: np.dtype) -> bool:
    """Whether scores may be computed in TF32."""
    if value is not None and (not isinstance(value, str) or value not in ("ieee", "tf32")):
        raise ValueError(f"precision must be None, 'ieee' or 'tf32', but it is {shown(value)}")
    if value == "tf32" and dtype.name != "float32":
        raise ValueError(f"precision must be None or 'ieee' for {dtype}, but it is 'tf32'")
    return value == "tf32"


def block(name: str, value: Any) -> tuple[int, int]:
    """(queries, keys) of a tile of a block mask, in which those of every kernel fit."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(
            f"{name} must be a pair (queries, keys) of integers, but it is {shown(value)}"
        )
    sizes = []
    for i, given in enumerate(value):
        size = integer(f"{name}[{i}]", given)
        if size <= 0 or size % BLOCK or size > MAX_BLOCK:
            raise ValueError(
                f"{name}[{i}] must be a multiple of {BLOCK} up to {MAX_BLOCK}, "
                f"but it is {shown(size)}"
            )
        sizes.append(size)
    return sizes[0], sizes[1]


def state_axis(axis: Any, ndim: int) -> int:
    """The axis of outs, of `ndim` dimensions, that lses has, too."""
    place = integer("axis", axis)
    if not -ndim <= place < ndim - 1 or place == -1:
        raise AxisError(
            f"axis must be in [0, {ndim - 1}) or [{-ndim}, -1), one of outs and of lses, "
            f"but it is {shown(place)}"
        )
    return place % ndim


# -- dtypes and shapes ---------------------------------------------------------------------------


def same_dtype(name: str, dtype: np.dtype, other: str, expected: np.dtype) -> None:
    """TypeError unless two arrays have one dtype."""
    if dtype != expected:
        raise TypeError(f"{name} must have the dtype of {other} ({expected}), but it is {dtype}")


def dimensions(name: str, shape: Shape, layout: str, least: int = 2, most: int = 4) -> None:
    """ValueError unless an array has the axes of the layout, or all but the leading ones."""
    if not least <= len(shape) <= most:
        axes = LAYOUTS[layout]
        wanted = " or ".join(
            f"({', '.join(a for a in (axes if n > 2 else ('D', 'S'))[n - 1 :: -1])})"
            for n in range(least, most + 1)
        )
        raise ValueError(f"{name} must have shape {wanted}, but its shape is {shape}")


def key_shape(name: str, shape: Shape, canonical: Shape, q: Shape, q_canonical: Shape) -> None:
    """ValueError unless k or v fits q: number of dimensions, batch and heads."""
    if len(shape) != len(q):
        raise ValueError(
            f"{name} must have as many dimensions as q, of shape {q}, but its shape is {shape}"
        )
    if canonical[0] != q_canonical[0]:
        raise ValueError(
            f"{name} must have the batch size of q, {q_canonical[0]}, but its shape is {shape}"
        )
    heads, heads_kv = q_canonical[1], canonical[1]
    if heads % heads_kv if heads_kv else heads:
        raise ValueError(
            f"{name} must have a number of heads that divides that of q, {heads}, "
            f"but it has {heads_kv}; its shape is {shape}"
        )


def same_size(name: str, what: str, shape: Shape, size: int, other: str, expected: int) -> None:
    """ValueError unless an axis of an array is as long as that of another one."""
    if size != expected:
        raise ValueError(
            f"{name} must have the {what} of {other}, {expected}, but its shape is {shape}"
        )


def sizes(name: str, canonical: Shape, most: int = MAX_HEAD_DIM) -> None:
    """ValueError for more than the kernels hold, or count."""
    if canonical[3] > most:
        raise ValueError(
            f"{name} must have a head dimension of at most {most}, but it has {canonical[3]}"
        )
    if max(canonical) > MAX_SIZE:
        raise ValueError(
            f"{name} must have axes of at most {MAX_SIZE}, but as (B, H, S, D) it has {canonical}"
        )


def capability(name: str, number: int) -> None:
    """ValueError below sm_80, whose asynchronous copies and matrix instructions are needed."""
    if number < 80:
        found = f"{number // 10}.{number % 10}"
        raise ValueError(
            f"{name} must be on a device of compute capability 8.0 or newer, but it is on {found}"
        )


def integers(name: str, dtype: np.dtype) -> None:
    """TypeError unless the dtype is an integer's, in native byte order."""
    one_dtype(name, dtype, INTEGERS, "of an integer dtype")


def one_of_shapes(name: str, shape: Shape, shapes: tuple[Shape, ...], what: str) -> None:
    """ValueError unless an option has one of the shapes."""
    if shape not in shapes:
        wanted = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"{name} must have shape {wanted}, {what}, but its shape is {shape}")


def mask_shape(name: str, shape: Shape, target: Shape) -> None:
    """ValueError unless mask or bias broadcasts to the scores; with the way from common shapes."""
    remedy = ""
    if len(target) == 4 and shape == (target[0], target[3]):
        remedy = f"; for one value per key pass {name}[:, None, None, :], or kv_lens for padding"
    elif len(target) == 4 and shape == (target[0], *target[2:]):
        remedy = f"; for one value per query and key pass {name}[:, None]"
    broadcastable(name, shape, target, "the shape of the scores", remedy)


def mask_of_sequences(name: str, shape: Shape, target: Shape) -> None:
    """ValueError unless mask or bias broadcasts to (B, H, its own last two sizes)."""
    lead = shape[:-2]
    if len(shape) > 4 or any(
        size not in (1, wanted) for size, wanted in zip(lead, target[2 - len(lead) :], strict=True)
    ):
        raise ValueError(
            f"{name} must broadcast to (batch, heads, M, N) with batch and heads {target}, "
            f"but its shape is {shape}"
        )


# -- values: only of NumPy arrays, as reading a device array would wait for it --------------------


def offset_values(values: np.ndarray) -> None:
    """ValueError unless every sequence's `offset` is one."""
    if np.any(values > MAX_OFFSET) or np.any(values < -MAX_OFFSET):
        raise ValueError(f"q_offset must be between -2**39 and 2**39, but it is {shown(values)}")


def lengths(name: str, values: np.ndarray, most: Any) -> None:
    """ValueError unless lengths are from 0 to `most`."""
    if np.any(values < 0) or np.any(values > most):
        raise ValueError(f"{name} must be from 0 to {most}, but it is {shown(values)}")


def fractional(name: str, strides: Shape, itemsize: int) -> ValueError:
    """The error for a result whose elements lie at fractions of an element from each other."""
    return ValueError(
        f"{name} must have strides that are multiples of its itemsize ({itemsize} bytes), "
        f"but they are {strides}"
    )


def lse(
    name: str, dtype: np.dtype, expected: np.dtype, shape: Shape, wanted: Shape, out: str
) -> None:
    """TypeError or ValueError unless this is the lse of a part."""
    if dtype != expected:
        raise TypeError(f"{name} must have dtype {expected}, but its dtype is {dtype}")
    if shape != wanted:
        raise ValueError(
            f"{name} must have shape {wanted}, that of {out}, but its shape is {shape}"
        )


def no_bias() -> ValueError:
    """The error for a gradient of a bias that was not given."""
    return ValueError("bias must be given for return_dbias=True, but it is None")


def states(name: str, shape: Shape, layout: str) -> None:
    """ValueError unless an array has the dimensions of parts."""
    if not 3 <= len(shape) <= 5:
        raise ValueError(
            f"{name} must have one axis more than ({', '.join(layout)}), with or without B and H, "
            f"but its shape is {shape}"
        )


def same_parts(outs: Shape, lses: Shape, axis: int) -> None:
    """ValueError unless lses has one dimension less than outs, and as many parts."""
    if len(lses) != len(outs) - 1 or lses[axis] != outs[axis]:
        raise ValueError(
            f"lses must have one axis less than outs, of shape {outs}, and as many parts on axis "
            f"{axis}, but its shape is {lses}"
        )
