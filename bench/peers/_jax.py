"""JAX: `jax.nn` and `jax.lax` under `jax.jit`."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to the others

import jax
import jax.numpy as jnp

from bench.peers._base import (
    BSHD,
    Call,
    Contestant,
    Filters,
    Library,
    Unsupported,
    refusing,
    require_dtype,
    require_scores,
    top_left_causal,
)


def _softmax_backward(grad: jax.Array, y: jax.Array) -> jax.Array:
    return y * (grad - jnp.sum(grad * y, -1, keepdims=True))


def _log_softmax_backward(grad: jax.Array, y: jax.Array) -> jax.Array:
    return grad - jnp.exp(y) * jnp.sum(grad, -1, keepdims=True)


def _softmax_then_top_k(x: jax.Array, k: int) -> Any:
    return jax.lax.top_k(jax.nn.softmax(x, -1), k)


def _top_k_and_logsumexp(x: jax.Array, k: int) -> Any:
    values, indices = jax.lax.top_k(x, k)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    lse = jax.nn.logsumexp(x.astype(wide), -1, keepdims=True)
    return jnp.exp(values - lse).astype(x.dtype), indices


def _cross_entropy(x: jax.Array, labels: jax.Array) -> jax.Array:
    """As `optax.softmax_cross_entropy_with_integer_labels`, in float32."""
    x = _widened(x)
    picked = jnp.take_along_axis(x, labels[:, None], -1)[:, 0]
    return jax.nn.logsumexp(x, -1) - picked


def _cross_entropy_backward(
    grad: jax.Array, x: jax.Array, labels: jax.Array, lse: jax.Array
) -> jax.Array:
    hit = jax.nn.one_hot(labels, x.shape[1], dtype=lse.dtype)
    return (grad[:, None] * (jnp.exp(_widened(x) - lse[:, None]) - hit)).astype(x.dtype)


def _entropy(x: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(_widened(x), -1)
    return -jnp.sum(jnp.exp(log_p) * log_p, -1)


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sample(x: jax.Array, seeds: jax.Array, filters: Filters) -> jax.Array:
    """`jax.random.categorical` of what may be drawn."""
    (top_k, top_p, min_p), indices = filters, None
    if top_k is not None:
        x, indices = jax.lax.top_k(x, top_k)
    if top_p is not None:
        if indices is None:
            indices = jnp.argsort(x, axis=-1, descending=True)
            x = jnp.take_along_axis(x, indices, -1)
        p = jax.nn.softmax(_widened(x), -1)
        x = jnp.where(jnp.cumsum(p, -1) - p < top_p, x, -jnp.inf)
    if min_p is not None:
        m = _widened(jnp.max(x, -1, keepdims=True))
        x = jnp.where(x >= m + math.log(min_p), x, -jnp.inf)
    key = jax.random.key(seeds[0, 0])  # of an operand: XLA must not fold the noise
    drawn = jax.random.categorical(key, _widened(x))[:, None]
    return drawn if indices is None else jnp.take_along_axis(indices, drawn, -1)


FUNCTIONS: dict[str, Call] = {
    "softmax": lambda x: jax.nn.softmax(x, -1),
    "log_softmax": lambda x: jax.nn.log_softmax(x, -1),
    "logsumexp": lambda x: jax.nn.logsumexp(x, -1),
    "softmax_backward": _softmax_backward,
    "log_softmax_backward": _log_softmax_backward,
    "cross_entropy": _cross_entropy,
    "cross_entropy_backward": _cross_entropy_backward,
    "entropy": _entropy,
}


class Jax(Library):
    """JAX arrays. JAX works on streams of its own, so only a clock on the host can time it."""

    name = "jax"
    version = jax.__version__
    clock = "host"

    def contestants(self, operation: str, k: int | None, causal: bool) -> Iterator[Contestant]:
        """Jitted functions; the attention of `jax.nn` by cuDNN, and by XLA."""
        if operation in FUNCTIONS:
            yield Contestant("jax.jit", self, _jit(FUNCTIONS[operation]))
        elif operation == "top_k":
            yield Contestant("jax.lax.top_k", self, _jit(lambda x: jax.lax.top_k(x, k)))
        elif operation == "softmax_topk":
            for name, function in {
                "softmax, top_k": _softmax_then_top_k,  # computes all probabilities
                "top_k, logsumexp": _top_k_and_logsumexp,  # reads the logits twice
            }.items():
                yield Contestant(f"jax.jit {name}", self, _jit(functools.partial(function, k=k)))
        elif operation == "attention":
            library = _JaxBSHD()
            cudnn = refusing(_attention("cudnn", causal), NotImplementedError, ValueError)
            yield Contestant("jax.nn cuDNN", library, cudnn)
            yield Contestant("jax.nn XLA", library, _attention("xla", causal))

    def samplers(self, filters: Filters) -> Iterator[Contestant]:
        """One, with all filters."""
        call = functools.partial(_sample, filters=filters)
        yield Contestant("jax.random.categorical", self, _jit(call))

    def asarray(self, array: Any) -> jax.Array:
        """The same memory where JAX takes it; bfloat16, which passes as int16, is copied once."""
        if not isinstance(array, np.ndarray) and jax.default_backend() == "cpu":
            raise Unsupported("this JAX is without CUDA")
        with _wide(array):
            if array.dtype.name == "bfloat16":
                bits = jax.dlpack.from_dlpack(array.view(np.int16))
                return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
            return jax.dlpack.from_dlpack(array)

    def asnumpy(self, native: jax.Array) -> np.ndarray:
        """The array on the host, in its dtype."""
        return np.asarray(native)

    def on_stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Does nothing: JAX cannot be given a stream."""
        return contextlib.nullcontext()

    def wait(self, native: Any) -> None:
        """Wait for these arrays."""
        jax.block_until_ready(native)


class _JaxBSHD(BSHD, Jax):
    """`jax.nn.dot_product_attention` takes (batch, seqlen, heads, head_dim)."""


def _wide(array: Any) -> contextlib.AbstractContextManager[Any]:
    """float64 has to be turned on in JAX; all else runs in its default setting."""
    return jax.enable_x64(True) if array.dtype == np.float64 else contextlib.nullcontext()


def _jit(function: Call) -> Call:
    compiled = jax.jit(function)

    def call(*arrays: jax.Array) -> Any:
        with _wide(arrays[0]):
            return compiled(*arrays)

    return call


def _attention(implementation: str, causal: bool) -> Call:
    @functools.partial(jax.jit, static_argnames="is_causal")
    def compiled(q: jax.Array, k: jax.Array, v: jax.Array, is_causal: bool) -> jax.Array:
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=is_causal, implementation=implementation
        )

    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        batch, seqlen_q, heads, _ = q.shape
        if implementation == "cudnn":
            if q.device.platform != "gpu":
                raise Unsupported("cuDNN needs a GPU")
            require_dtype(q, "float16", "bfloat16")
        else:
            require_dtype(q, "float16", "bfloat16", "float32")  # its softmax is in float32
            require_scores(batch, heads, seqlen_q, k.shape[1], max(4, q.dtype.itemsize))
        return compiled(q, k, v, is_causal=top_left_causal(causal, seqlen_q, k.shape[1]))

    return call
