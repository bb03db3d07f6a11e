"""What a selection kernel is chosen by: dtypes, options, k, rows and columns."""

from __future__ import annotations

from dataclasses import dataclass

from cuattn._arrays.row_layout import Layout
from cuattn._device.kernel import CTYPES, ITEMSIZE, Instance, ceil_div

# What values are compared as (primitives/candidate.cuh): exact, and as narrow as that allows.
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
        """Type of an element's key and index (primitives/candidate.cuh)."""
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
    def params(self) -> Instance:
        """What the op's kernels are handed."""
        return Instance("TopKParams", {"kRowRank": len(self.layout.row_size)})

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


@dataclass(frozen=True)
class SampleProblem(TopKProblem):
    """Draws from each row, out of a list of its `k` best elements or, by radix, `k` draws.

    `by_noise`: the best are those with noise, which are drawn; else by score, to draw from.
    """

    softmax: bool = True
    by_noise: bool = True

    @property
    def narrow(self) -> bool:
        return not self.by_noise and super().narrow

    @property
    def op(self) -> Instance:
        """The op (topk/sample.cuh)."""
        types = {"In": CTYPES[self.x], "Acc": ORDERED[self.x]}
        rest = {"kMasked": self.masked, "kRowRank": len(self.layout.row_size)}
        if self.by_noise:
            return Instance("SampleByNoise", {**types, **rest})
        return Instance("SampleByScore", {**types, "Candidate_": self.candidate, **rest})

    @property
    def params(self) -> Instance:
        return Instance("SampleParams", {"kRowRank": len(self.layout.row_size)})
