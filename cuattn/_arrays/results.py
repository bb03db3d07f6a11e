"""What the public functions return where it is more than one array."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class SoftmaxState(NamedTuple):
    """What online softmax knows of a row: its maximum `m` and ``l = sum(exp(x - m))``.

    The empty state is ``(-inf, 0)``. Where `m` is not finite, `l` is the sum without the shift.
    """

    m: NDArray[Any]
    l: NDArray[Any]  # noqa: E741 - the name in the papers

    @property
    def lse(self) -> NDArray[Any]:
        """Natural log-sum-exp of the row, ``m + log(l)``; -inf for an empty state."""
        with np.errstate(all="ignore"):
            return np.add(self.m, np.log(self.l), out=np.empty_like(self.m))


class LogitsState(NamedTuple):
    """A `SoftmaxState`, the sum ``t = sum(exp(x - m) * (x - m))`` and the score of a label.

    `logit` is NaN in parts of a row that have not got its label. The empty state is
    ``(-inf, 0, 0, nan)``. Where `m` is infinite, `t` is `l`.
    """

    m: NDArray[Any]
    l: NDArray[Any]  # noqa: E741
    t: NDArray[Any]
    logit: NDArray[Any]

    @property
    def lse(self) -> NDArray[Any]:
        """Natural log-sum-exp of the row."""
        return SoftmaxState(self.m, self.l).lse

    @property
    def entropy(self) -> NDArray[Any]:
        """Entropy of the row in nats, ``log(l) - t / l``; NaN for an empty state."""
        with np.errstate(all="ignore"):
            return np.subtract(np.log(self.l), self.t / self.l, out=np.empty_like(self.m))

    @property
    def log_prob(self) -> NDArray[Any]:
        """Logarithm of the label's probability, ``logit - m - log(l)``."""
        with np.errstate(all="ignore"):
            return np.subtract(self.logit - self.m, np.log(self.l), out=np.empty_like(self.m))

    @property
    def cross_entropy(self) -> NDArray[Any]:
        """Loss of the label, ``-log_prob``."""
        log_prob = self.log_prob
        return np.negative(log_prob, out=log_prob)


class TopK(NamedTuple):
    """The k best elements of each row, best first, and their indices."""

    values: NDArray[Any]
    indices: NDArray[np.int64]


class SoftmaxTopK(NamedTuple):
    """Probabilities, their logarithms or the logits of the k best elements, and their indices."""

    values: NDArray[Any]
    indices: NDArray[np.int64]


class SoftmaxTopKLse(NamedTuple):
    """A `SoftmaxTopK` with the natural log-sum-exp of the whole row."""

    values: NDArray[Any]
    indices: NDArray[np.int64]
    lse: NDArray[Any]


class SoftmaxTopKState(NamedTuple):
    """A `SoftmaxState` and, on the last axis, the k best scores; what a row lacks is (-inf, -1)."""

    m: NDArray[Any]
    l: NDArray[Any]  # noqa: E741 - the name in the papers
    values: NDArray[Any]
    indices: NDArray[np.int64]

    @property
    def lse(self) -> NDArray[Any]:
        """Natural log-sum-exp of the row."""
        return SoftmaxState(self.m, self.l).lse


class Sample(NamedTuple):
    """What has been drawn of each row, in the order of the draw, and its log-probability."""

    indices: NDArray[np.int64]
    log_prob: NDArray[Any]


class SampleState(NamedTuple):
    """A `SoftmaxState` and, on the last axis, the draws: `values` decide, the largest is the first.

    What a row lacks is (-inf, -inf, -1).
    """

    m: NDArray[Any]
    l: NDArray[Any]  # noqa: E741 - the name in the papers
    values: NDArray[np.float64]
    logits: NDArray[Any]
    indices: NDArray[np.int64]

    @property
    def lse(self) -> NDArray[Any]:
        """Natural log-sum-exp of the row."""
        return SoftmaxState(self.m, self.l).lse

    @property
    def log_prob(self) -> NDArray[Any]:
        """Log-probability of each draw in the row's softmax, -inf of what it lacks; NaN where m is
        not finite."""
        with np.errstate(all="ignore"):
            m, l = self.m[..., None], self.l[..., None]  # noqa: E741
            return np.where(np.isfinite(m), (self.logits - m) - np.log(l), np.nan)


class MaskExpression(NamedTuple):
    """A mask of which no array holds the elements: they are computed where they are needed."""

    text: str
    args: Mapping[str, NDArray[Any]]  # the arrays that it indexes
    shape: tuple[int, ...]  # (..., S_q, S_k)


class BlockMask(NamedTuple):
    """A mask, and which of its tiles are not empty: M rows of N tiles, of `block` queries and keys.

    Only these are listed. What `block` does not divide ends in smaller tiles.
    """

    counts: NDArray[np.int32]  # (..., M): of each row of tiles, how many are listed
    indices: NDArray[np.int32]  # (..., M, N): these, ascending; behind them -1
    full: NDArray[np.bool_]  # (..., M, N): of each that is listed, whether it hides nothing
    mask: NDArray[np.bool_] | MaskExpression  # (..., S_q, S_k)
    block: tuple[int, int]


class AttentionGradients(NamedTuple):
    """Gradients of attention; None for what was not given or not asked for."""

    dq: NDArray[Any]
    dk: NDArray[Any]
    dv: NDArray[Any]
    dbias: NDArray[Any] | None = None
    dalibi_slopes: NDArray[Any] | None = None
    dsinks: NDArray[Any] | None = None
    dscore: dict[str, NDArray[Any]] | None = None  # of arrays of `score_args`, by name
