"""CuPy: `cupyx.scipy.special`, and the expressions that its users write by hand.

The same code runs on NumPy arrays with `Cupy(numpy, scipy.special)`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.peers import _cupy_variants
from bench.peers._base import (
    Call,
    Contestant,
    Filters,
    Library,
    Unsupported,
    refusing,
    require_scores,
)

WARM_UPS = 3


class Cupy(Library):
    """CuPy arrays; a dtype that CuPy has no loops for (bfloat16 in places) is `Unsupported`."""

    name = "cupy"

    def __init__(self, xp: Any = None, special: Any = None) -> None:
        if xp is None:
            import cupy as xp
            import cupyx.scipy.special as special
        self.xp, self.special, self.version = xp, special, xp.__version__

    def contestants(self, operation: str, k: int | None, causal: bool) -> Iterator[Contestant]:
        """The hand-written expression, and `cupyx.scipy.special` where it has the operation."""
        own, library = getattr(self, operation), getattr(self.special, operation, None)
        if operation in ("top_k", "softmax_topk"):
            own = _with_k(own, k)
        elif operation.startswith("attention"):
            own = _with_causal(own, causal)
        if library is not None:
            yield self._contestant(f"{self.special.__name__}", lambda x: library(x, axis=-1))
        if operation == "softmax_topk":
            softmax = self.special.softmax
            yield self._contestant(
                f"{self.special.__name__}.softmax, argpartition",
                lambda x: self.top_k(softmax(x, axis=-1), k),
            )
        if operation == "cross_entropy":
            log_softmax = self.special.log_softmax
            yield self._contestant(
                f"{self.special.__name__}.log_softmax, take_along_axis",
                lambda x, labels: -self._picked(log_softmax(x, axis=-1), labels),
            )
        yield self._contestant("CuPy expression", own)

    def samplers(self, filters: Filters) -> Iterator[Contestant]:
        """The largest of x plus Gumbel noise, and the inverse of the summed probabilities."""
        draws = self.xp.random.default_rng()

        def gumbel(x: Any, seeds: Any) -> Any:
            x, indices = self._filtered(x, filters)
            noise = -self.xp.log(draws.standard_exponential(x.shape, dtype=np.float32))
            return self._original(indices, (x + noise).argmax(axis=-1))

        def inverse(x: Any, seeds: Any) -> Any:
            x, indices = self._filtered(x, filters)
            total = self.softmax(x).cumsum(axis=-1, dtype=np.promote_types(x.dtype, np.float32))
            u = draws.random((len(x), 1), dtype=np.float32)
            return self._original(indices, (total <= u * total[:, -1:]).sum(axis=-1))

        for name, call in (("x + Gumbel noise", gumbel), ("softmax, cumsum", inverse)):
            yield self._contestant(f"CuPy {name}", call)

    def variants(self, operation: str, **options: Any) -> Iterator[Contestant]:
        """One expression."""
        yield self._contestant(*_cupy_variants.variants(self, operation, **options))

    def _contestant(self, name: str, call: Call) -> Contestant:
        return Contestant(name, self, refusing(call, TypeError, NotImplementedError))

    def softmax(self, x: Any) -> Any:
        """Five kernels: maximum, difference, exponential, sum, quotient."""
        e = self.xp.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    def log_softmax(self, x: Any) -> Any:
        """The shifted row less the logarithm of its sum of exponentials."""
        s = x - x.max(axis=-1, keepdims=True)
        return s - self.xp.log(self.xp.exp(s).sum(axis=-1, keepdims=True))

    def logsumexp(self, x: Any) -> Any:
        """The maximum plus the logarithm of the shifted sum of exponentials."""
        m = x.max(axis=-1, keepdims=True)
        return m[:, 0] + self.xp.log(self.xp.exp(x - m).sum(axis=-1))

    def softmax_backward(self, grad: Any, y: Any) -> Any:
        """The product of the Jacobian of softmax and `grad`."""
        return y * (grad - (grad * y).sum(axis=-1, keepdims=True))

    def log_softmax_backward(self, grad: Any, y: Any) -> Any:
        """The product of the Jacobian of log_softmax and `grad`."""
        return grad - self.xp.exp(y) * grad.sum(axis=-1, keepdims=True)

    def cross_entropy(self, x: Any, labels: Any) -> Any:
        """The log-sum-exp of each row less what its label selects."""
        return self.logsumexp(x) - self._picked(x, labels)

    def cross_entropy_backward(self, grad: Any, x: Any, labels: Any, lse: Any) -> Any:
        """The softmax from its log-sum-exp, 1 less at the labels, times `grad`."""
        p = self.xp.exp(x - lse[:, None])
        p[self.xp.arange(len(x)), labels] -= 1
        return (p * grad[:, None]).astype(x.dtype, copy=False)

    def entropy(self, x: Any) -> Any:
        """The logarithm of the sum of exponentials less the mean of the shifted row."""
        s = x - x.max(axis=-1, keepdims=True)
        e = self.xp.exp(s)
        total = e.sum(axis=-1)
        return self.xp.log(total) - (e * s).sum(axis=-1) / total

    def _picked(self, x: Any, labels: Any) -> Any:
        return self.xp.take_along_axis(x, labels[:, None], -1)[:, 0]

    def _filtered(self, x: Any, filters: Filters) -> tuple[Any, Any]:
        """What may be drawn, the rest at -inf, and its indices in the row where these differ."""
        xp, (top_k, top_p, min_p), indices = self.xp, filters, None
        if top_k is not None:
            x, indices = self.top_k(x, top_k)
        if top_p is not None:
            if indices is None:
                indices = xp.argsort(-x, axis=-1)
                x = xp.take_along_axis(x, indices, -1)
            p = self.softmax(x).astype(np.promote_types(x.dtype, np.float32), copy=False)
            x = xp.where(p.cumsum(axis=-1) - p < top_p, x, -np.inf)
        if min_p is not None:
            m = x.max(axis=-1, keepdims=True).astype(np.promote_types(x.dtype, np.float32))
            x = xp.where(x >= m + math.log(min_p), x, -np.inf)
        return x, indices

    def _original(self, indices: Any, drawn: Any) -> Any:
        """Of draws among sorted elements, the indices that these had."""
        return drawn if indices is None else self._picked(indices, drawn)

    def top_k(self, x: Any, k: int) -> tuple[Any, Any]:
        """Select with argpartition, then sort the k best.

        Of -x and from the small end: `argpartition(x, -k)` sorts the whole row in CuPy.
        """
        xp = self.xp
        indices = xp.argpartition(-x, k - 1, axis=-1)[:, :k]
        values = xp.take_along_axis(x, indices, -1)
        order = xp.argsort(-values, axis=-1)
        return xp.take_along_axis(values, order, -1), xp.take_along_axis(indices, order, -1)

    def softmax_topk(self, x: Any, k: int) -> tuple[Any, Any]:
        """The k best of the hand-written softmax."""
        return self.top_k(self.softmax(x), k)

    def attention(self, q: Any, k: Any, v: Any, causal: bool, lens: Any = None) -> Any:
        """Product, softmax, product; the queries of heads that share a key head are one matrix."""
        xp, (batch, heads, seqlen_q, head_dim) = self.xp, q.shape
        kv_heads, seqlen_k = k.shape[1:3]
        require_scores(batch, heads, seqlen_q, seqlen_k, q.dtype.itemsize)
        scores = xp.matmul(q.reshape(batch, kv_heads, -1, head_dim), k.swapaxes(-1, -2))
        scores *= head_dim**-0.5
        by_head = scores.reshape(batch, heads, seqlen_q, seqlen_k)
        if lens is not None:
            behind = xp.arange(seqlen_q)[::-1] if causal else xp.zeros(1, int)  # the last query
            visible = xp.arange(seqlen_k) < (lens[:, None] - behind)[:, None, :, None]
            by_head += xp.where(visible, 0.0, -np.inf).astype(scores.dtype)
        elif causal:
            visible = xp.tri(seqlen_q, seqlen_k, seqlen_k - seqlen_q, dtype=bool)
            by_head += xp.where(visible, 0.0, -np.inf).astype(scores.dtype)
        return xp.matmul(self.softmax(scores), v).reshape(*q.shape[:-1], v.shape[-1])

    def attention_backward(
        self, grad: Any, q: Any, k: Any, v: Any, y: Any, lse: Any, causal: bool
    ) -> tuple[Any, Any, Any]:
        """Five products, with the probabilities and their gradients in memory."""
        xp, (batch, heads, seqlen_q, head_dim), acc = self.xp, q.shape, lse.dtype
        kv_heads, seqlen_k = k.shape[1:3]
        require_scores(batch, heads, seqlen_q, seqlen_k, acc.itemsize)
        scale = head_dim**-0.5

        def by_key_head(a: Any) -> Any:
            return a.reshape(batch, kv_heads, -1, a.shape[-1])

        scores = xp.matmul(by_key_head(q), k.swapaxes(-1, -2)).astype(acc)
        p = scores.reshape(batch, heads, seqlen_q, seqlen_k) * scale - lse[..., None]
        if causal:
            visible = xp.tri(seqlen_q, seqlen_k, seqlen_k - seqlen_q, dtype=bool)
            p += xp.where(visible, 0.0, -np.inf).astype(acc)
        p = xp.exp(p)
        delta = (grad.astype(acc) * y.astype(acc)).sum(axis=-1, keepdims=True)
        dp = xp.matmul(by_key_head(grad), v.swapaxes(-1, -2)).reshape(p.shape)
        ds, p = (by_key_head(a.astype(q.dtype)) for a in (p * (dp - delta) * scale, p))
        dq = xp.matmul(ds, k).reshape(q.shape)
        dk = xp.matmul(ds.swapaxes(-1, -2), by_key_head(q))
        return dq, dk, xp.matmul(p.swapaxes(-1, -2), by_key_head(grad))

    def attention_column_sums(self, q: Any, k: Any, lse: Any, causal: bool) -> Any:
        """The probabilities in memory, added up."""
        xp, (batch, heads, seqlen_q, head_dim), acc = self.xp, q.shape, lse.dtype
        kv_heads, seqlen_k = k.shape[1:3]
        require_scores(batch, heads, seqlen_q, seqlen_k, acc.itemsize)
        scores = xp.matmul(q.reshape(batch, kv_heads, -1, head_dim), k.swapaxes(-1, -2))
        p = scores.astype(acc).reshape(batch, heads, seqlen_q, seqlen_k) * head_dim**-0.5
        if causal:
            visible = xp.tri(seqlen_q, seqlen_k, seqlen_k - seqlen_q, dtype=bool)
            p += xp.where(visible, 0.0, -np.inf).astype(acc)
        return xp.exp(p - lse[..., None]).sum(axis=2)

    def attention_kvcache(
        self, q: Any, k: Any, v: Any, kv_lens: Any, page_table: Any, causal: bool
    ) -> Any:
        """The pages of each sequence side by side, then the same with a mask."""
        if v.size == 0 or k.dtype != q.dtype:
            raise Unsupported("takes no such cache")
        keys, values = (
            a[page_table].swapaxes(1, 2).reshape(len(q), a.shape[1], -1, a.shape[3]) for a in (k, v)
        )
        return self.attention(q, keys, values, causal, kv_lens)

    def asarray(self, array: Any) -> Any:
        """`array` itself."""
        return array

    def asnumpy(self, native: Any) -> np.ndarray:
        """The array on the host, in its dtype."""
        return native if self.xp is np else self.xp.asnumpy(native)

    def on_stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """CuPy streams are context managers."""
        return contextlib.nullcontext() if stream is None else stream

    def capture(self, call: Callable[[], Any], stream: Any) -> Callable[[], Any]:
        """What a capture allocates is from a pool of its own, which lives as long as the graph."""
        if stream is None:
            return super().capture(call, stream)
        pool = self.xp.cuda.MemoryPool()
        with stream, self.xp.cuda.using_allocator(pool.malloc):
            for _ in range(WARM_UPS):
                call()
            stream.synchronize()
            stream.begin_capture()
            try:
                result = call()
            except Exception as error:
                with contextlib.suppress(Exception):  # ends a capture that has been invalidated
                    stream.end_capture()
                raise Unsupported(f"cannot be captured: {error}") from error
            graph = stream.end_capture()
        return _Replay(graph, stream, (pool, result))

    def wait(self, native: Any) -> None:
        """Synchronise the device."""
        if self.xp is not np:
            self.xp.cuda.runtime.deviceSynchronize()

    def release(self) -> None:
        """Empty CuPy's default pool."""
        if self.xp is not np:
            self.xp.get_default_memory_pool().free_all_blocks()

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """What a fresh memory pool takes from the device: it gives nothing back while it lives."""
        if self.xp is np:
            return None
        pool = self.xp.cuda.MemoryPool()
        with self.xp.cuda.using_allocator(pool.malloc):
            result = call()
        self.wait(result)
        return pool.total_bytes()


class _Replay:
    """Launches a graph, and keeps the memory that it works in."""

    def __init__(self, graph: Any, stream: Any, memory: Any) -> None:
        self._graph, self._stream, self._memory = graph, stream, memory

    def __call__(self) -> None:
        self._graph.launch(self._stream)


def _with_k(call: Call, k: int | None) -> Call:
    return lambda x: call(x, k)


def _with_causal(call: Call, causal: bool) -> Call:
    return lambda *arrays: call(*arrays, causal)
