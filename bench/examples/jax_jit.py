"""`attention` as a part of a JAX program like any other: in `jax.jit`, `jax.vmap` and gradients, on
a GPU or on the CPU.

    pip install "cuattn[jax]"
    python bench/examples/jax_jit.py
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import cuattn.jax

HEADS, LENGTH, DIM, TOKENS = 4, 48, 16, 500


def layer(attention, weights, x):
    """Causal self-attention of one sequence, and the logits of the tokens that follow."""
    q, k, v = (x @ weights[name] for name in "qkv")
    heads = (a.reshape(LENGTH, HEADS, DIM).swapaxes(0, 1) for a in (q, k, v))
    mixed = attention(*heads).swapaxes(0, 1).reshape(x.shape)
    return (x + mixed) @ weights["tokens"]


def loss(attention, weights, batch, targets):
    logits = jax.vmap(partial(layer, attention, weights))(batch)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()


def theirs(q, k, v):
    """The same by JAX, of which every score is in memory."""
    q, k, v = (a.swapaxes(0, 1) for a in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).swapaxes(0, 1)


ours = partial(cuattn.jax.attention, is_causal=True)
width = HEADS * DIM
shapes = {"q": (width, width), "k": (width, width), "v": (width, width), "tokens": (width, TOKENS)}
rng = np.random.default_rng(0)
weights = {
    name: jnp.asarray(rng.normal(0, 0.1, shape), "float32") for name, shape in shapes.items()
}
batch = jnp.asarray(rng.normal(size=(2, LENGTH, width)), "float32")
targets = jnp.asarray(rng.integers(0, TOKENS, (2, LENGTH)))

step, expected = (jax.jit(jax.value_and_grad(partial(loss, a))) for a in (ours, theirs))
results = (jax.tree.leaves(f(weights, batch, targets)) for f in (step, expected))
for got, want in zip(*results, strict=True):
    assert jnp.abs(got - want).max() <= 1e-4 * jnp.abs(want).max()
print(f"loss {float(step(weights, batch, targets)[0]):.4f}, gradients of {', '.join(weights)}")
