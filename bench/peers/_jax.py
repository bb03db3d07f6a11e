"""JAX: `jax.nn` and `jax.lax` under `jax.jit`."""

from __future__ import annotations

import contextlib
import functools
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


FUNCTIONS: dict[str, Call] = {
    "softmax": lambda x: jax.nn.softmax(x, -1),
    "log_softmax": lambda x: jax.nn.log_softmax(x, -1),
    "logsumexp": lambda x: jax.nn.logsumexp(x, -1),
    "softmax_backward": _softmax_backward,
    "log_softmax_backward": _log_softmax_backward,
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
