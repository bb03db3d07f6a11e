"""PyTorch: attention with expressions and masks, and nearest neighbours, as users write them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention import flex_attention as flex

from bench import patterns
from bench.peers._base import Call, Unsupported, require_products, require_scores


def variants(operation: str, fused: dict[str, Call], **options: Any) -> Iterator[tuple[str, Call]]:
    """Names and calls; `fused` are the backends of torch's attention that take a mask."""
    if operation == "attention_topk":
        yield "torch matmul, topk", functools.partial(_top_k_of_products, **options)
        return
    kind = FlexScore if operation == "attention_score" else FlexMask
    yield "torch FlexAttention", kind(**options)
    for name, call in fused.items():
        yield f"torch SDPA {name}", Masked(operation, call, **options)


def _top_k_of_products(q: torch.Tensor, k: torch.Tensor, num: int) -> Any:
    require_products(q, k)
    return torch.topk(q @ k.T, num)


class FlexScore:
    """FlexAttention, compiled, with an expression behind a causal block mask.

    The block mask is made in the first call with a shape, as a model makes it once for all layers.
    Documents are a mask there, as PyTorch's own examples have them.
    """

    __name__ = "FlexAttention"

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._made: tuple[Any, Any] = (None, None)
        self._call = torch.compile(self._attention, fullgraph=True, dynamic=False)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: Any) -> Any:
        """q, k and v, and what the operation has beside them."""
        if self._made[0] != (key := (q.shape, k.shape)):
            self._made = key, self._block_mask(q, k, *more)
        return self._call(q, k, v, self._made[1], *more)

    def _attention(self, q: Any, k: Any, v: Any, block_mask: Any, *more: Any) -> Any:
        table, mod = more[0] if more else None, None
        if self._pattern != "documents":

            def mod(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
                return patterns.score(self._pattern, torch, table, s, b, h, i, j)

        return flex.flex_attention(q, k, v, score_mod=mod, block_mask=block_mask)

    def _block_mask(self, q: Any, k: Any, *more: Any) -> Any:
        documents = more[0] if self._pattern == "documents" else None

        def mod(b: Any, h: Any, i: Any, j: Any) -> Any:
            if documents is None:
                return j <= i
            return (documents[b, i] == documents[b, j]) & (j <= i)

        batch = len(q) if documents is not None else None
        return _made(mod, batch, q, k)


class FlexMask(FlexScore):
    """FlexAttention with a block mask alone, made from what the mask was made from."""

    def _attention(self, q: Any, k: Any, v: Any, block_mask: Any, *more: Any) -> Any:
        return flex.flex_attention(q, k, v, block_mask=block_mask)

    def _block_mask(self, q: Any, k: Any, *more: Any) -> Any:
        table = more[-1]

        def mod(b: Any, h: Any, i: Any, j: Any) -> Any:
            return patterns.visible(self._pattern, table, k.shape[2], i, j)

        return _made(mod, None, q, k)


def _made(mod: Call, batch: int | None, q: Any, k: Any) -> Any:
    lengths = q.shape[2], k.shape[2]
    return flex.create_block_mask(mod, batch, None, *lengths, device=str(q.device))


class Masked:
    """Fused attention with a mask, or a bias, of all pairs, made in the first call with a shape."""

    __name__ = "masked attention"

    def __init__(self, operation: str, attention: Call, pattern: str) -> None:
        self._operation, self._attention, self._pattern = operation, attention, pattern
        self._made: tuple[Any, Any] = (None, None)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: Any) -> Any:
        """q, k and v, and what the operation has beside them."""
        if self._operation == "attention_block_mask":
            return self._attention(q, k, v, mask=more[0])
        if self._made[0] != (key := (q.shape, k.shape)):
            self._made = key, self._bias(q, k, *more)
        return self._attention(q, k, v, mask=self._made[1])

    def _bias(self, q: Any, k: Any, *more: Any) -> Any:
        if self._pattern == "cap":
            raise Unsupported("takes no soft cap")
        (batch, heads, seqlen_q, _), seqlen_k = q.shape, k.shape[2]
        batch, heads = (batch, 1) if self._pattern == "documents" else (1, heads)
        require_scores(batch, heads, seqlen_q, seqlen_k, more[0].itemsize)
        b, h, i, j = (
            torch.arange(size, device=q.device).view(-1, *[1] * behind)
            for behind, size in ((3, batch), (2, heads), (1, seqlen_q), (0, seqlen_k))
        )
        bias = patterns.score(self._pattern, torch, *more, q.new_zeros(()), b, h, i, j)
        return bias.to(q.dtype).masked_fill(j > i, -torch.inf)
