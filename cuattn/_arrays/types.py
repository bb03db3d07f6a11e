"""What the public functions take, for type checkers.

What comes out of NumPy arrays are NumPy arrays. CuPy has no type information: its arrays are `Any`,
and so is what comes out of arrays of any library but NumPy.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, Protocol, SupportsIndex, TypedDict

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack  # typing has it from Python 3.11 on
else:
    Unpack = Any  # annotations are not evaluated


# No NumPy array may be one of these: where an `NDArray[Any]` fits two overloads, mypy infers Any.
class DLPackArray(Protocol):
    """An array of PyTorch, JAX and others; NumPy does not call its device by an `Enum`."""

    def __dlpack_device__(self) -> tuple[Enum, Any]: ...


class CudaArray(Protocol):
    """An array on a GPU."""

    @property
    def __cuda_array_interface__(self) -> Any: ...


class RowState(Protocol):
    """A SoftmaxState, LogitsState or SoftmaxTopKState."""

    @property
    def m(self) -> Any: ...
    @property
    def l(self) -> Any: ...  # noqa: E743


Host = NDArray[Any] | np.generic  # what NumPy computes
Other = DLPackArray | CudaArray
Array = NDArray[Any] | Other
Pair = tuple[NDArray[Any], NDArray[Any]]
Number = float | np.floating[Any] | np.integer[Any]
Axis = SupportsIndex | tuple[SupportsIndex, ...] | None
Factor = Number | Array | None
Seed = SupportsIndex | Array
Where = Array | np.bool_ | Literal[True] | None
Mode = Literal["largest", "smallest"]
Output = Literal["prob", "log_prob", "logit"]


# ---- Options by keyword ----
# `return_lse` says whether there is an lse beside the result, and what `out` has to be. Open: where
# results are Any.


class Alone(TypedDict, total=False):
    return_lse: Literal[False]


class WithLse(TypedDict):
    return_lse: Literal[True]


class Open(TypedDict, total=False):
    return_lse: bool


class OutAlone(Alone, total=False):
    out: Array | None


class OutWithLse(WithLse, total=False):
    out: tuple[Array, Array] | None


class OutOpen(Open, total=False):
    out: Array | tuple[Array, Array] | None


class Scaled(TypedDict, total=False):
    scale: Factor
    out: Array | None


class Gradient(Scaled, total=False):
    where: Where


class LogSoftmax(Gradient, total=False):
    dtype: DTypeLike | None
    state: RowState | None


class LogSumExp(TypedDict, total=False):
    b: Factor
    where: Where
    keepdims: bool
    dtype: DTypeLike | None
    out: Array | None


class _Softmax(TypedDict, total=False):
    scale: Factor
    where: Where
    dtype: DTypeLike | None
    state: RowState | None


class SoftmaxAlone(_Softmax, OutAlone): ...


class SoftmaxWithLse(_Softmax, OutWithLse): ...


class SoftmaxOpen(_Softmax, OutOpen): ...


class State(TypedDict, total=False):
    scale: Factor
    out: tuple[Array, Array] | None


class _CrossEntropy(TypedDict, total=False):
    axis: SupportsIndex | None
    scale: Factor
    ignore_index: SupportsIndex


class CrossEntropyAlone(_CrossEntropy, OutAlone): ...


class CrossEntropyWithLse(_CrossEntropy, OutWithLse): ...


class CrossEntropyOpen(_CrossEntropy, OutOpen): ...


class CrossEntropyBackward(_CrossEntropy, total=False):
    index_offset: SupportsIndex | None
    out: Array | None


class Entropy(TypedDict, total=False):
    scale: Factor
    where: Where
    keepdims: bool
    out: Array | None


class LogitsOptions(TypedDict, total=False):
    axis: SupportsIndex | None
    scale: Factor
    index_offset: SupportsIndex
    out: tuple[Array, Array, Array, Array] | None


class TopK(TypedDict, total=False):
    axis: SupportsIndex | None
    mode: Mode
    sorted: bool
    out: tuple[Array, Array] | None


class _SoftmaxTopK(TypedDict, total=False):
    axis: SupportsIndex | None
    scale: Factor
    where: Where
    renormalize: bool
    output: Output


class SoftmaxTopKAlone(_SoftmaxTopK, Alone, total=False):
    out: tuple[Array, Array] | None


class SoftmaxTopKWithLse(_SoftmaxTopK, WithLse, total=False):
    out: tuple[Array, Array, Array] | None


class SoftmaxTopKOpen(_SoftmaxTopK, Open, total=False):
    out: tuple[Array, Array] | tuple[Array, Array, Array] | None


class SoftmaxTopKState(TypedDict, total=False):
    axis: SupportsIndex | None
    scale: Factor
    index_offset: SupportsIndex
    out: tuple[Array, Array, Array, Array] | None


class _Sample(TypedDict):
    seed: Seed


class _SampleOptions(TypedDict, total=False):
    offset: Seed
    axis: SupportsIndex | None
    scale: Factor


class _SampleFilters(_SampleOptions, total=False):
    where: Where
    top_k: SupportsIndex | None
    top_p: Number | None
    min_p: Number | None


class SampleAlone(_Sample, _SampleFilters, total=False):
    return_log_prob: Literal[False]
    out: Array | None


class _WithLogProb(TypedDict):
    return_log_prob: Literal[True]


class SampleWithLogProb(_Sample, _SampleFilters, _WithLogProb, total=False):
    out: tuple[Array, Array] | None


class SampleOpen(_Sample, _SampleFilters, total=False):
    return_log_prob: bool
    out: Array | tuple[Array, Array] | None


class SampleState(_Sample, _SampleOptions, total=False):
    rows: Array | None
    index_offset: SupportsIndex
    out: tuple[Array, Array, Array, Array, Array] | None
