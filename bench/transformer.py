"""The forward pass of a transformer in plain array code, for CuPy and NumPy.

Layers as GPT-2 has them, norms first; BERT's norms stand behind the sums and cost the same. Neither
embeddings nor a vocabulary: what is here is done `layers` times. The attention is an argument:
`fused` is cuattn's, `unfused` what users of CuPy write by hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import cuattn
from bench.peers._cupy import Cupy

EPSILON = 1e-5


class Weights(NamedTuple):
    """Of all layers, along the first axis; the last row of a matrix is its bias."""

    norms: Any  # (layers, 2, 2, hidden): gain and bias, before attention and before the MLP
    qkv: Any  # (layers, hidden + 1, 3 * hidden)
    project: Any  # (layers, hidden + 1, hidden)
    up: Any  # (layers, hidden + 1, 4 * hidden)
    down: Any  # (layers, 4 * hidden + 1, hidden)


def forward(x: Any, weights: Weights, heads: int, causal: bool, attention: Any) -> Any:
    """x, (batch, seqlen, hidden), after all layers."""
    batch, seqlen, hidden = x.shape
    x = x.reshape(-1, hidden)
    for norms, *matrices in zip(*weights, strict=True):
        qkv, project, up, down = matrices
        q_k_v = linear(norm(x, norms[0]), qkv).reshape(batch, seqlen, 3, heads, hidden // heads)
        mixed = attention(*(q_k_v[:, :, i] for i in range(3)), causal)
        x = x + linear(mixed.reshape(x.shape), project)
        x = x + linear(gelu(linear(norm(x, norms[1]), up)), down)
    return x.reshape(batch, seqlen, hidden)


def linear(x: Any, matrix: Any) -> Any:
    return x @ matrix[:-1] + matrix[-1]


def norm(x: Any, gain_and_bias: Any) -> Any:
    """Layer norm; means of narrow floats are taken in float32."""
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred * centred).mean(-1, keepdims=True) + EPSILON)
    return centred / deviation * gain_and_bias[0] + gain_and_bias[1]


def gelu(x: Any) -> Any:
    """The form with tanh, which GPT-2 and BERT were trained with."""
    return 0.5 * x * (1 + np.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))


def fused(q: Any, k: Any, v: Any, causal: bool) -> Any:
    """q, k and v are views, (batch, seqlen, heads, head_dim)."""
    return cuattn.attention(q, k, v, is_causal=causal, layout="BSHD")


def unfused(xp: Any) -> Any:
    """`softmax(scale * q @ k.T) @ v`, the scores in memory, on arrays of `xp`."""
    expression = Cupy(xp, special=xp).attention

    def attention(q: Any, k: Any, v: Any, causal: bool) -> Any:
        return expression(*(array.swapaxes(1, 2) for array in (q, k, v)), causal).swapaxes(1, 2)

    return attention
