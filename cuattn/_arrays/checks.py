"""What is raised about arrays; `scalars` has what is raised about options, `_attention.checks`
about arguments of attention.

No other module raises about arguments. Messages read
`<argument> must <requirement>, but <what came>[; <remedy>]`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def kind(value: Any) -> str:
    """The name of the type of a value."""
    if value is None:
        return "None"
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def shown(value: Any) -> str:
    """What a message says of a value: short, and whatever it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # of an integer with too many digits inside it, or of a foreign object
        return kind(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def not_an_array(name: str, value: Any, libraries: tuple[str, ...]) -> TypeError:
    """The error for a `value` that is not an array; the remedy names what converts it."""
    remedy = f"convert it with {' or '.join(f'{xp}.asarray({name})' for xp in libraries)}"
    if hasattr(type(value), "__dlpack_device__"):
        remedy = "it is neither on the CPU nor on one CUDA device, copy it there"
    elif name == "out" or name.startswith("out["):  # nobody would see what is written into that
        remedy = "pass an array"
    return TypeError(
        f"{name} must be a cupy.ndarray, a numpy.ndarray or an array of another library on the CPU "
        f"or a CUDA device, but it is {kind(value)}; {remedy}"
    )


def not_handed_out(name: str, value: Any, error: Exception) -> TypeError:
    """The error for an array that its own library refuses to hand out."""
    return TypeError(
        f"{name} must be an array that can be shared, but {kind(value)} refuses: {error}"
    )


def not_plain(name: str, value: Any) -> TypeError:
    """The error for a kind of NumPy array that behaves unlike others."""
    return TypeError(
        f"{name} must be a plain numpy.ndarray, but it is {kind(value)}; "
        f"convert it with numpy.asarray({name}); what a mask hides, leave out with where"
    )


def no_mix(name: str, value: Any, other: str, other_value: Any) -> TypeError:
    """The error for two arrays of different libraries."""
    return TypeError(
        f"{name} must be an array of the same library as {other} ({kind(other_value)}), "
        f"but it is {kind(value)}; move one with cupy.asarray or cupy.asnumpy"
    )


def other_device(name: str, device: int, other: str, other_device: int) -> ValueError:
    """The error for two arrays on different GPUs."""
    return ValueError(
        f"{name} must be on device {other_device}, as {other} is, but it is on {device}; "
        "copy one of them"
    )


def floating_or_integer(name: str, dtype: np.dtype) -> None:
    """TypeError unless the dtype is a real number's."""
    one_dtype(name, dtype, FLOATS + INTEGERS, f"{', '.join(FLOATS)} or an integer dtype")


def integer(name: str, dtype: np.dtype) -> None:
    """TypeError unless the dtype is one of INTEGERS."""
    one_dtype(name, dtype, INTEGERS, "of an integer dtype")


def floating(name: str, dtype: np.dtype) -> None:
    """TypeError unless the dtype is one of FLOATS."""
    one_dtype(name, dtype, FLOATS, f"one of {', '.join(FLOATS)}")


def real(name: str, dtype: np.dtype) -> None:
    """TypeError unless the dtype is a real number's; what is cast before use."""
    if dtype.name not in FLOATS and dtype.name not in INTEGERS:
        raise TypeError(
            f"{name} must be a real number or an array of them, but its dtype is {dtype}"
        )


def integers(name: str, dtype: np.dtype) -> None:
    """TypeError unless the dtype is an integer's; what is cast before use."""
    if dtype.name not in INTEGERS:
        raise TypeError(f"{name} must be an integer or an array of them, but its dtype is {dtype}")


def result_dtype(dtype: np.dtype | None, x: np.dtype, weight: np.dtype | None = None) -> np.dtype:
    """`dtype` if given, else what SciPy promotes x and weights to, float64 for integers.

    bfloat16 is promoted as float16 is; the two of them to float32.
    """
    if dtype is not None:
        return dtype
    if weight is None or weight == x:
        return np.dtype(np.float64) if x.name in INTEGERS else x
    names = {x.name, weight.name}
    half = np.dtype(np.float16)
    found = np.promote_types(*(half if d.name == "bfloat16" else d for d in (x, weight)))
    if found == half and "bfloat16" in names:
        return np.dtype(np.float32) if "float16" in names else x if x.name == "bfloat16" else weight
    return found if found.kind == "f" else np.dtype(np.float64)


def state_dtype(name: str, dtype: np.dtype) -> None:
    """TypeError unless the dtype is one that softmax_state gives."""
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must be float32 or float64, but its dtype is {dtype}")


def row_shape(name: str, shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    """ValueError unless an array has one number per row."""
    if shape != rows:
        raise ValueError(
            f"{name} must have the shape of x without axis {rows}, but its shape is {shape}"
        )


def misaligned(name: str, array: Any) -> ValueError:
    """The error for an address that a device cannot load an element from."""
    return ValueError(
        f"{name} must start at a multiple of its itemsize ({array.itemsize} bytes), "
        "but it does not; pass a copy"
    )


def too_long(name: str, n: int, most: int) -> ValueError:
    """The error for rows of which not every element has noise of its own."""
    return ValueError(f"{name} must have at most {most} elements along axis, but it has {n}")


def broadcastable(
    name: str, shape: tuple[int, ...], target: tuple[int, ...], what: str, remedy: str = ""
) -> None:
    """ValueError unless `shape` broadcasts to exactly `target`."""
    try:
        fits = np.broadcast_shapes(shape, target) == target
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} must broadcast to {what} {target}, but its shape is {shape}{remedy}"
        )


def bool_dtype(name: str, dtype: np.dtype, remedy: str) -> None:
    """TypeError unless a mask is bool."""
    if dtype.name != "bool":
        raise TypeError(f"{name} must be a bool array, but its dtype is {dtype}; {remedy}")


def same_shape_and_dtype(
    name: str, shape: Any, dtype: Any, other: str, other_shape: Any, other_dtype: Any
) -> None:
    """TypeError / ValueError unless two arrays agree."""
    if dtype != other_dtype:
        raise TypeError(
            f"{name} must have the dtype of {other} ({other_dtype}), but its dtype is {dtype}"
        )
    if shape != other_shape:
        raise ValueError(
            f"{name} must have the shape of {other} {other_shape}, but its shape is {shape}"
        )


def out_count(out: Any, count: int) -> tuple[Any, ...]:
    """`out` as a tuple of `count` arrays."""
    if isinstance(out, tuple) != (count > 1) or (count > 1 and len(out) != count):
        raise TypeError(
            f"out must be {'one array' if count == 1 else f'a tuple of {count} arrays'}, but it is "
            + (f"a tuple of {len(out)}" if isinstance(out, tuple) else kind(out))
        )
    return out if count > 1 else (out,)


def out_array(name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """TypeError / ValueError unless the result fits into `array` exactly."""
    if array.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, but its dtype is {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, but its shape is {array.shape}")
    if not getattr(array.flags, "writeable", True):
        raise read_only(name)
    strides = array.strides
    if 0 in strides and any(
        s == 0 and n > 1 and 0 not in shape for s, n in zip(strides, shape, strict=True)
    ):
        raise ValueError(f"{name} must not overlap itself, but its strides are {strides}")


def read_only(name: str) -> ValueError:
    """The error for a result that cannot be written to."""
    return ValueError(f"{name} must be writeable, but it is read-only")


def apart(name: str, other: str) -> ValueError:
    """The error for a result that is an input, where it must not be."""
    return ValueError(
        f"{name} must share no memory with {other}, but it is the same array; pass another"
    )


def same_view(
    name: str,
    array: Any,
    extent: tuple[int, int],
    other: str,
    input_: Any,
    input_extent: tuple[int, int],
) -> None:
    """ValueError unless two arrays that overlap are one view: else writing one spoils the other."""
    same = extent == input_extent and (array.shape, array.strides, array.dtype) == (
        input_.shape,
        input_.strides,
        input_.dtype,
    )
    if not same:
        raise ValueError(
            f"{name} must be {other} itself or share no memory with it, but they overlap; "
            "pass a copy"
        )


def ends_spec(name: str, shape: tuple[int, ...], dtype: np.dtype, what: str) -> None:
    """TypeError or ValueError unless these can be the ends of sequences or segments."""
    if dtype not in (np.int32, np.int64):
        raise TypeError(f"{name} must be int32 or int64, but its dtype is {dtype!r}")
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"{name} must have shape ({what} + 1,), but its shape is {shape}")


def ends(name: str, values: np.ndarray, total: int, other: str) -> None:
    """ValueError unless these values are the ends of sequences or segments of `other`."""
    if values[0] != 0:
        raise ValueError(f"{name} must begin with 0, but it begins with {values[0]}")
    if np.any(values[1:] < values[:-1]):
        raise ValueError(f"{name} must never fall, but it does")
    if values[-1] != total:
        raise ValueError(
            f"{name} must end with the length of {other}, {total}, but its end is {values[-1]}"
        )


def labels(name: str, values: np.ndarray, size: int, ignore_index: int) -> None:
    """ValueError unless each of these is an element of its row, or is ignored."""
    wrong = ((values < 0) | (values >= size)) & (values != ignore_index)
    if np.any(wrong):
        ends = f"from 0 to {size - 1} or " if size else ""
        raise ValueError(
            f"{name} must be {ends}ignore_index ({ignore_index}), "
            f"but one of them is {values[wrong].flat[0]}"
        )


def state(name: str, value: Any, *wanted: type) -> None:
    """TypeError unless `value` is a state of a kind that is wanted."""
    if not isinstance(value, wanted):
        kinds = " or ".join(f"a {one.__name__}" for one in wanted)
        raise TypeError(f"{name} must be {kinds}, but it is {kind(value)}; use softmax_state")


def at_least_1d(name: str, shape: tuple[int, ...]) -> None:
    """ValueError for a 0-dimensional array."""
    if not shape:
        raise ValueError(f"{name} must have at least one dimension, but its shape is ()")


def one_dtype(name: str, dtype: np.dtype, known: tuple[str, ...], what: str) -> None:
    """TypeError unless the dtype is a known one, in native byte order."""
    if dtype.name not in known:
        raise TypeError(
            f"{name} must be {what}, but its dtype is {dtype}; cast it with {name}.astype(...)"
        )
    if not dtype.isnative:
        raise TypeError(f"{name} must be in native byte order, but its dtype is {dtype!r}; cast it")
