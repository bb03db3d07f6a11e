"""What the peers share: the interface of a library, and how one says that it cannot do a case."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

# Inputs of each operation, in the order in which a contestant takes them. Rows lie along the last
# axis of two-dimensional arrays. Labels, lse and the gradient of a loss are (rows,); seeds, which
# most generators have no use for, (rows, 1). q, k and v are (batch, heads, seqlen, head_dim), and k
# and v may have fewer heads, a divisor of those of q. A cache is (pages, heads, page_size,
# head_dim), a page table (batch, pages of the longest sequence); one of a single column names all
# pages in order. q and k of "attention_topk" are matrices. A table is that of bench/patterns.py; an
# expression that needs none has none. A mask is (seqlen, seqlen), with its lists.
OPERATIONS = {
    "softmax": ("x",),
    "log_softmax": ("x",),
    "logsumexp": ("x",),
    "softmax_backward": ("grad", "y"),
    "log_softmax_backward": ("grad", "y"),
    "cross_entropy": ("x", "labels"),
    "cross_entropy_backward": ("grad", "x", "labels", "lse"),
    "entropy": ("x",),
    "top_k": ("x",),
    "softmax_topk": ("x",),
    "sample": ("x", "seeds"),
    "attention": ("q", "k", "v"),
    "attention_backward": ("grad", "q", "k", "v", "y", "lse"),
    "attention_column_sums": ("q", "k", "lse"),
    "attention_kvcache": ("q", "k_cache", "v_cache", "kv_lens", "page_table"),
    "attention_topk": ("q", "k"),
    "attention_score": ("q", "k", "v", "table"),
    "attention_block_mask": ("q", "k", "v", "mask", "counts", "indices", "full", "table"),
}
# Of these, what has options of its own: see `Library.variants`.
VARIANTS = ("attention_topk", "attention_score", "attention_block_mask")

# An attention that stores its scores does so up to this size; with the exponentials and the
# quotient beside them, three times that is in use at once.
SCORE_BYTES = 8 * 2**30

Call = Callable[..., Any]


class Unsupported(RuntimeError):
    """This contestant cannot take these dtypes, shapes or options, or this kind of clock."""


class Filters(NamedTuple):
    """Which elements of a row may be drawn, in this order: the `top_k` best, of these the fewest
    best that hold `top_p` of their probability, and what is as probable as `min_p` of the best."""

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


class Contestant(NamedTuple):
    """One way of one library to do an operation."""

    name: str
    library: Library
    call: Call  # arrays of the library, in the order of OPERATIONS, to an array or a tuple of them


class Library:
    """One package: its arrays, its streams, and its contestants.

    `stream` is a CuPy stream throughout, or None for arrays on the CPU.
    """

    name: str
    version: str
    clock: Literal["events", "host"] = "events"  # can events on our stream time its work?

    def contestants(self, operation: str, k: int | None, causal: bool) -> Iterator[Contestant]:
        """The ways of this library to do an operation; none where it does not have it."""
        raise NotImplementedError

    def samplers(self, filters: Filters) -> Iterator[Contestant]:
        """The ways of this library to draw one element of each row: indices, (rows,) or (rows, 1).

        None where it does not have one.
        """
        yield from ()

    def variants(self, operation: str, **options: Any) -> Iterator[Contestant]:
        """The ways of this library to do one of `VARIANTS` with the options of a cell.

        Those are `num`, how many keys, or `pattern`, of bench/patterns.py. None where it has none.
        """
        yield from ()

    def asarray(self, array: Any) -> Any:
        """A CuPy array, or a NumPy one on the CPU, as an array of this library."""
        raise NotImplementedError

    def asnumpy(self, native: Any) -> np.ndarray:
        """An array of this library on the host; bfloat16 may come as the same float32 values."""
        raise NotImplementedError

    def on_stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """While it lasts, calls of this library work on `stream`, where the library can."""
        raise NotImplementedError

    def capture(self, call: Callable[[], Any], stream: Any) -> Callable[[], Any]:
        """The work of `call` as a CUDA graph: a function to call inside `on_stream`, to replay it.

        `call` has warm-up runs first. The function holds all memory that the graph works in.
        """
        raise Unsupported(f"{self.name}: no CUDA graphs here")

    def wait(self, native: Any) -> None:
        """Return when `native`, which a call returned, has been computed."""

    def release(self) -> None:
        """Give memory that is cached and not in use back to the device, for other libraries."""

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Device memory that `call` needs at its peak beside its inputs, its results included.

        None where this cannot be known.
        """
        return None


class BSHD:
    """For a library whose native layout is (batch, seqlen, heads, head_dim).

    Its users hold their arrays like that, so q, k and v are copied to that order when they are
    handed over, before any clock runs, and the result is turned back for the comparison only.
    """

    def asarray(self, array: Any) -> Any:
        """`array`, (batch, heads, seqlen, head_dim), in the order of the library; others as is."""
        array = array.swapaxes(1, 2).copy() if array.ndim == 4 else array
        return super().asarray(array)  # type: ignore[misc]

    def asnumpy(self, native: Any) -> np.ndarray:
        """A result of the library as (batch, heads, seqlen, head_dim)."""
        return super().asnumpy(native).swapaxes(1, 2)  # type: ignore[misc]


def refusing(call: Call, *errors: type[Exception]) -> Call:
    """`call`, with `errors` of it raised as `Unsupported`."""

    @functools.wraps(call)
    def guarded(*arrays: Any) -> Any:
        try:
            return call(*arrays)
        except errors as error:
            raise Unsupported(f"{type(error).__name__}: {error}") from error

    return guarded


def require_dtype(array: Any, *names: str) -> None:
    """Raise `Unsupported` unless the dtype of an array of any library is one of `names`."""
    name = str(array.dtype).removeprefix("torch.")
    if name not in names:
        raise Unsupported(f"takes {', '.join(names)}, not {name}")


def require_scores(batch: int, heads: int, seqlen_q: int, seqlen_k: int, itemsize: int) -> None:
    """Raise `Unsupported` if the scores of this attention are larger than `SCORE_BYTES`."""
    size = batch * heads * seqlen_q * seqlen_k * itemsize
    if size > SCORE_BYTES:
        raise Unsupported(f"stores the scores: {size} bytes, more than {SCORE_BYTES} bytes")


def require_products(q: Any, k: Any) -> None:
    """Raise `Unsupported` if the products of all pairs are larger than `SCORE_BYTES`."""
    require_scores(1, 1, len(q), len(k), q.itemsize)


def top_left_causal(causal: bool, seqlen_q: int, seqlen_k: int) -> bool:
    """Whether to ask for a causal mask where the library aligns it to the top left corner.

    Ours is aligned to the bottom right one: a single query sees every key.
    """
    if not causal or seqlen_q == 1:
        return False
    if seqlen_q != seqlen_k:
        raise Unsupported(f"top-left causal mask, but {seqlen_q} queries and {seqlen_k} keys")
    return True
