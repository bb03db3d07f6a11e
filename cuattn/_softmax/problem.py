"""What a softmax kernel is chosen by: dtypes, options, rows and columns."""

from __future__ import annotations

from dataclasses import dataclass

from cuattn._arrays.row_layout import OPERANDS, Layout
from cuattn._device.kernel import CTYPES, ITEMSIZE, Instance, ceil_div

# enum SoftmaxResult (softmax/ops.cuh).
RESULTS = {
    "prob": "kProb",
    "prob_lse": "kProbLse",
    "log_prob": "kLogProb",
    "lse": "kLse",
    "state": "kState",
    "entropy": "kEntropy",
    "loss": "kLoss",
    "logits": "kLogits",
}


@dataclass(frozen=True)
class SoftmaxProblem:
    """What a softmax kernel is chosen by.

    `result` is a key of RESULTS, or of a gradient "grad", "log_grad", "loss_grad"; dtypes are names
    (CTYPES); `aligned`: x and all its rows start on 16-byte boundaries; `offsets`: dtype of ragged
    rows' offsets, whose columns are `layout`'s and `segments` their number; `state`: dtype of the m
    and l of whole rows, whose strides are `layout`'s of y and weight, or of the lse of a loss.
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
    state: str | None = None

    @property
    def backward(self) -> bool:
        return self.result in ("grad", "log_grad")

    @property
    def reduces(self) -> bool:
        return self.result in ("lse", "state", "entropy", "loss", "logits")

    @property
    def op(self) -> Instance:
        """The op (softmax/ops.cuh)."""
        x, acc = CTYPES[self.x], CTYPES[self.acc]
        ranks = {"kRowRank": len(self.layout.row_size), "kColRank": len(self.layout.col_size)}
        if self.result == "loss_grad":
            return Instance("LossBackward", {"T": x, "Acc": acc, "kRowRank": ranks["kRowRank"]})
        if self.result in ("loss", "logits"):
            of_logits = {"kResult": RESULTS[self.result], "kRowRank": ranks["kRowRank"]}
            return Instance("LogitsForward", {"In": x, "Acc": acc, **of_logits})
        if self.backward:
            of_backward = {"kLog": self.result == "log_grad", "kMasked": self.masked}
            return Instance("SoftmaxBackward", {"T": x, "Acc": acc, **of_backward, **ranks})
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
    def rows_are_vectors(self) -> bool:
        """Whether elements of a row are neighbours, in all that is moved element by element."""
        layout = self.layout
        moved = ["x"] + ["y"] * self.backward + ["out"] * (not self.reduces)
        return len(layout.col_size) == 1 and all(
            layout.col_stride[OPERANDS.index(name)] == (1,) for name in moved
        )

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
        wide = self.weighted or self.result in ("entropy", "logits")
        return ITEMSIZE[self.acc] * (1 if self.backward else 4 if wide else 2)

    @property
    def fragments(self) -> int:
        """Fragments of a row that starts on the boundary of one."""
        return ceil_div(self.layout.cols, self.vec)

    @property
    def fragments_most(self) -> int:
        """Fragments that cover a row, wherever it starts."""
        past = 0 if self.aligned else self.vec - 1
        return ceil_div(self.layout.cols + past, self.vec)
