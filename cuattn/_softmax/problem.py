"""What a softmax kernel is chosen by: dtypes, options, rows and columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cuattn._arrays.row_layout import Layout

CTYPES = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
    "int8": "signed char",
    "uint8": "unsigned char",
    "int16": "short",
    "uint16": "unsigned short",
    "int32": "int",
    "uint32": "unsigned int",
    "int64": "long long",
    "uint64": "unsigned long long",
}
ITEMSIZE = {
    name: 8 if "64" in name else 4 if "32" in name else 2 if "16" in name else 1 for name in CTYPES
}

# enum SoftmaxResult (softmax/ops.cuh).
RESULTS = {
    "prob": "kProb",
    "prob_lse": "kProbLse",
    "log_prob": "kLogProb",
    "lse": "kLse",
    "state": "kState",
}


@dataclass(frozen=True)
class Instance:
    """A C++ template with its arguments, by the names and in the order of the template's head."""

    template: str
    arguments: Mapping[str, object] = field(hash=False)

    @cached_property
    def name(self) -> str:
        """Name expression."""
        values = self.arguments.values()
        words = (str(v).lower() if isinstance(v, bool) else str(v) for v in values)
        return f"{self.template}<{', '.join(words)}>"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class SoftmaxProblem:
    """What a softmax kernel is chosen by.

    `result` is a key of RESULTS, or "grad" / "log_grad"; dtypes are names (CTYPES); `aligned`: x
    and all its rows start on 16-byte boundaries; `offsets`: dtype of ragged rows' offsets, whose
    columns are `layout`'s and `segments` their number.
    """

    result: str
    x: str
    acc: str
    out: str
    layout: Layout
    masked: bool = False
    weighted: bool = False
    aligned: bool = False
    offsets: str | None = None
    segments: int = 0

    @property
    def backward(self) -> bool:
        return self.result in ("grad", "log_grad")

    @property
    def reduces(self) -> bool:
        return self.result in ("lse", "state")

    @property
    def op(self) -> Instance:
        """The op (softmax/ops.cuh)."""
        x, acc = CTYPES[self.x], CTYPES[self.acc]
        ranks = {"kRowRank": len(self.layout.row_size), "kColRank": len(self.layout.col_size)}
        if self.backward:
            log = self.result == "log_grad"
            return Instance("SoftmaxBackward", {"T": x, "Acc": acc, "kLog": log, **ranks})
        arguments = {
            "In": x,
            "Acc": acc,
            "Out": CTYPES[self.out],
            "kResult": RESULTS[self.result],
            "kMasked": self.masked,
            "kWeighted": self.weighted,
        }
        return Instance("SoftmaxForward", {**arguments, **ranks})

    @property
    def vec(self) -> int:
        """Elements of one fragment: 16 bytes of the wider of input and output."""
        widest = ITEMSIZE[self.x] if self.reduces else max(ITEMSIZE[self.x], ITEMSIZE[self.out])
        return 16 // widest

    @property
    def words(self) -> int:
        """Register words an element takes."""
        return ITEMSIZE[self.acc] // 4 * (2 if self.backward or self.weighted else 1)

    @property
    def state_bytes(self) -> int:
        return ITEMSIZE[self.acc] * (1 if self.backward else 4 if self.weighted else 2)

    @property
    def fragments(self) -> int:
        """Fragments of a row that starts on the boundary of one."""
        return ceil_div(self.layout.cols, self.vec)

    @property
    def fragments_most(self) -> int:
        """Fragments that cover a row, wherever it starts."""
        past = 0 if self.aligned else self.vec - 1
        return ceil_div(self.layout.cols + past, self.vec)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# What values are compared as (topk/candidate.cuh): exact, and as narrow as that allows.
ORDERED = {
    **dict.fromkeys(("float16", "bfloat16", "float32"), "float"),
    "float64": "double",
    **dict.fromkeys(("int8", "int16", "int32"), "int"),
    **dict.fromkeys(("uint8", "uint16", "uint32"), "unsigned int"),
    "int64": "long long",
    "uint64": "unsigned long long",
}


@dataclass(frozen=True)
class TopKProblem:
    """What a selection kernel is chosen by: `k` elements of each row.

    `softmax`: with the row's state, and values as they leave a softmax; `masked` only there.
    Operands of `layout` are those of a softmax, out the values; columns have one dimension.
    """

    x: str
    layout: Layout
    k: int
    softmax: bool = False
    masked: bool = False
    aligned: bool = False

    @property
    def narrow(self) -> bool:
        """Whether an element's key and index fit into 64 bits."""
        return ITEMSIZE[self.x] <= 4 and self.layout.cols < 2**32 - 1

    @property
    def candidate(self) -> str:
        """Type of an element's key and index (topk/candidate.cuh)."""
        return "NarrowCandidate" if self.narrow else "WideCandidate"

    @property
    def op(self) -> Instance:
        """The op (topk/ops.cuh)."""
        x, value, rank = CTYPES[self.x], ORDERED[self.x], len(self.layout.row_size)
        if self.softmax:
            types = {"In": x, "Acc": value, "Candidate_": self.candidate}
            return Instance("SoftmaxTopK", {**types, "kMasked": self.masked, "kRowRank": rank})
        types = {"In": x, "Value_": value, "Candidate_": self.candidate}
        return Instance("TopK", {**types, "kRowRank": rank})

    @property
    def candidate_bytes(self) -> int:
        return 8 if self.narrow else 16

    @property
    def state_bytes(self) -> int:
        """Bytes of a row's state, 0 without."""
        return 0 if not self.softmax else 16 if self.x == "float64" else 8

    @property
    def vec(self) -> int:
        """Elements of one fragment of 16 bytes."""
        return 16 // ITEMSIZE[self.x]

    @property
    def fragments(self) -> int:
        """Fragments of a row that starts on the boundary of one."""
        return ceil_div(self.layout.cols, self.vec)

    @property
    def fragments_most(self) -> int:
        """Fragments that cover a row, wherever it starts."""
        past = 0 if self.aligned else self.vec - 1
        return ceil_div(self.layout.cols + past, self.vec)
