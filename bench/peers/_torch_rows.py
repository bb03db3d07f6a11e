"""PyTorch: losses of rows of logits, and draws from them, as its users write them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

from bench.peers._base import Call, Filters


def wide(x: torch.Tensor) -> torch.dtype:
    """What sums of `x` are in."""
    return torch.promote_types(x.dtype, torch.float32)


def cross_entropy(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A loss per row, in the dtype of x."""
    return torch.nn.functional.cross_entropy(x, labels, reduction="none")


def cross_entropy_backward(
    grad: torch.Tensor, x: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor
) -> torch.Tensor:
    """The gradient from the log-sum-exp: for a compiler, which makes one loop of it."""
    hit = torch.arange(x.shape[1], device=x.device) == labels[:, None]
    p = torch.exp(x.to(wide(x)) - lse[:, None])
    return (grad[:, None] * (p - hit.to(p.dtype))).to(x.dtype)


def entropy(x: torch.Tensor) -> torch.Tensor:
    """As `torch.distributions.Categorical` has it."""
    log_p = torch.log_softmax(x, -1, dtype=wide(x))
    return -(torch.exp(log_p) * log_p).sum(-1)


def samplers(filters: Filters) -> Iterator[tuple[str, Call]]:
    """Functions of x and seeds, which torch's own generator makes nothing of."""
    for name, draw in (("multinomial", _multinomial), ("exponential race", _race)):
        yield name, functools.partial(_sample, filters=filters, draw=draw)


def _sample(x: torch.Tensor, seeds: torch.Tensor, *, filters: Filters, draw: Call) -> Any:
    x, indices = _filtered(x, filters)
    drawn = draw(torch.softmax(x, -1, dtype=wide(x)))
    return drawn if indices is None else indices.gather(-1, drawn)


def _multinomial(p: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(p, 1)


def _race(p: torch.Tensor) -> torch.Tensor:
    """As vLLM draws, vllm/v1/sample/ops/topk_topp_sampler.py: the first of exponential times."""
    return (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)


def _filtered(x: torch.Tensor, filters: Filters) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What may be drawn, the rest at -inf, and its indices in the row where these differ."""
    (top_k, top_p, min_p), indices = filters, None
    if top_k is not None:
        x, indices = torch.topk(x, top_k)
    if top_p is not None:
        if indices is None:
            x, indices = torch.sort(x, -1, descending=True)
        p = torch.softmax(x, -1, dtype=wide(x))
        x = x.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
    if min_p is not None:
        m = x.amax(-1, keepdim=True).to(wide(x))
        x = x.masked_fill(x < m + math.log(min_p), -torch.inf)
    return x, indices
