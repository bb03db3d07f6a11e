"""PyTorch: eager, `torch.compile`, `torch.topk`, and the backends of its fused attention."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from bench.peers import _torch_rows, _torch_variants
from bench.peers._base import (
    Call,
    Contestant,
    Filters,
    Library,
    Unsupported,
    require_scores,
    top_left_causal,
)

WARM_UPS = 3

# torch.compile specialises on each shape (`dynamic=False`); beyond eight of them it would fall back
# to eager, or raise with `fullgraph=True`.
torch._dynamo.config.recompile_limit = 10_000
torch._dynamo.config.accumulated_recompile_limit = 10_000


def _softmax_then_topk(x: torch.Tensor, k: int) -> Any:
    return torch.topk(torch.softmax(x, -1), k)


def _topk_and_logsumexp(x: torch.Tensor, k: int) -> Any:
    values, indices = torch.topk(x, k)
    wide = torch.promote_types(x.dtype, torch.float32)
    lse = torch.logsumexp(x.to(wide), -1, keepdim=True)
    return torch.exp(values - lse).to(x.dtype), indices


FUNCTIONS: dict[str, Call] = {
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
    "softmax_backward": lambda grad, y: torch.ops.aten._softmax_backward_data(grad, y, -1, y.dtype),
    "log_softmax_backward": lambda grad, y: torch.ops.aten._log_softmax_backward_data(
        grad, y, -1, y.dtype
    ),
    "cross_entropy": _torch_rows.cross_entropy,
    "entropy": _torch_rows.entropy,
}
SOFTMAX_TOPK = {
    "softmax, topk": _softmax_then_topk,  # writes and reads all probabilities
    "topk, logsumexp": _topk_and_logsumexp,  # reads the logits twice
}
SDPA = {  # backend -> its switch
    "cuDNN": torch.backends.cuda.enable_cudnn_sdp,
    "flash": torch.backends.cuda.enable_flash_sdp,
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
}
AS_INTEGERS = {  # dtypes that DLPack of NumPy or CuPy lacks
    "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
    "bfloat16": (np.int16, torch.bfloat16),
    "bool": (np.uint8, torch.bool),
}
MASKED = ("cuDNN", "efficient")  # backends that take a mask
NO_BACKEND = ("No available kernel", "No viable backend")  # what torch says on a GPU, on the CPU


class TorchArrays(Library):
    """torch tensors that share the memory of CuPy's (or NumPy's) arrays."""

    name = "torch"
    version = torch.__version__

    def asarray(self, array: Any) -> torch.Tensor:
        """The same memory; what DLPack of NumPy and CuPy lacks passes as integers."""
        if array.dtype.name not in AS_INTEGERS:
            return torch.from_dlpack(array)
        bits, dtype = AS_INTEGERS[array.dtype.name]
        return torch.from_dlpack(array.view(bits)).view(dtype)

    def asnumpy(self, native: torch.Tensor) -> np.ndarray:
        """The tensor on the host; bfloat16 as the same values in float32."""
        native = native.detach()
        return (native.float() if native.dtype == torch.bfloat16 else native).cpu().numpy()

    @contextlib.contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        """Also turns on inference mode, once for all calls."""
        with torch.inference_mode():
            if stream is None:
                yield
            else:
                with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
                    yield

    def capture(self, call: Callable[[], Any], stream: Any) -> Callable[[], Any]:
        """The memory is from the graph's own pool."""
        if stream is None:
            return super().capture(call, stream)
        with self.on_stream(stream):
            for _ in range(WARM_UPS):
                call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                call()
        return graph.replay

    def wait(self, native: Any) -> None:
        """Synchronise the device."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def release(self) -> None:
        """Empty torch's cache."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """What torch's allocator has handed out at once; what a library takes past it is unseen."""
        if not torch.cuda.is_available():
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        self.wait(result)
        return torch.cuda.max_memory_allocated() - before


class Torch(TorchArrays):
    """What PyTorch itself has."""

    def contestants(self, operation: str, k: int | None, causal: bool) -> Iterator[Contestant]:
        """Eager and compiled.

        The mode of torch.compile is the default one, which users and the published comparisons
        have; "max-autotune" would cost many more compilations for each shape.
        """
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        if operation in FUNCTIONS:
            yield Contestant("torch", self, FUNCTIONS[operation])
            yield Contestant("torch.compile", self, compiled(FUNCTIONS[operation]))
        elif operation == "top_k":
            yield Contestant("torch.topk", self, lambda x: torch.topk(x, k))
        elif operation == "softmax_topk":
            for name, function in SOFTMAX_TOPK.items():
                call = functools.partial(function, k=k)
                yield Contestant(f"torch {name}", self, call)
                yield Contestant(f"torch.compile {name}", self, compiled(call))
        elif operation == "cross_entropy_backward":
            loss = Backward(_torch_rows.cross_entropy, leaves=1, others=1)
            yield Contestant("torch", self, lambda *arrays: loss(*arrays)[0])
            by_lse = compiled(_torch_rows.cross_entropy_backward)
            yield Contestant("torch.compile", self, by_lse)
        elif operation == "attention":
            yield Contestant("torch", self, functools.partial(_eager_attention, causal=causal))
            for name in ("cuDNN", "flash", "efficient"):
                call = functools.partial(_sdpa, backend=name, causal=causal)
                yield Contestant(f"torch SDPA {name}", self, call)
        elif operation == "attention_backward":
            eager = functools.partial(_eager_attention, causal=causal)
            yield Contestant("torch", self, Backward(eager))
            for name in ("cuDNN", "flash", "efficient"):
                call = functools.partial(_sdpa, backend=name, causal=causal)
                yield Contestant(f"torch SDPA {name}", self, Backward(call))
        elif operation == "attention_column_sums":
            call = functools.partial(_column_sums, causal=causal)
            yield Contestant("torch", self, call)
            yield Contestant("torch.compile", self, compiled(call))
        elif operation == "attention_kvcache":
            for name in ("cuDNN", "flash"):
                call = DenseCache(functools.partial(_sdpa, backend=name, causal=causal))
                yield Contestant(f"torch SDPA {name}", self, call)

    def variants(self, operation: str, **options: Any) -> Iterator[Contestant]:
        """FlexAttention, and the fused attention with a mask of all pairs."""
        fused = {n: functools.partial(_sdpa, backend=n, causal=False) for n in MASKED}
        for name, call in _torch_variants.variants(operation, fused, **options):
            yield Contestant(name, self, call)

    def samplers(self, filters: Filters) -> Iterator[Contestant]:
        """Eager and, with the noise that a compiler can see, compiled."""
        for name, call in _torch_rows.samplers(filters):
            yield Contestant(f"torch {name}", self, call)
        compiled = torch.compile(call, fullgraph=True, dynamic=False)
        yield Contestant(f"torch.compile {name}", self, compiled)


class Backward:
    """The backward pass of a function, whose forward pass is that of the first call.

    That one is not timed. Its graph is kept, so that each call has what the forward pass saves.
    """

    __name__ = "backward"

    def __init__(self, forward: Call, leaves: int = 3, others: int = 0) -> None:
        self._forward, self._leaves, self._others = forward, leaves, others
        self._graphs: dict[tuple[int, ...], tuple[Any, ...]] = {}

    def __call__(self, grad: Any, *arrays: Any) -> Any:
        """Gradients of the leaves, which come first in `arrays`; then what else the forward pass
        takes, and what its results were."""
        count = self._leaves
        key = tuple(array.data_ptr() for array in (grad, *arrays[:count]))
        with torch.inference_mode(False), torch.enable_grad():
            if key not in self._graphs:
                leaves = tuple(array.clone().requires_grad_() for array in arrays[:count])
                others = [array.clone() for array in arrays[count : count + self._others]]
                self._graphs[key] = self._forward(*leaves, *others), leaves, grad.clone()
            out, leaves, own_grad = self._graphs[key]
            return torch.autograd.grad(out, leaves, own_grad, retain_graph=True)


class DenseCache:
    """Attention without lengths over a dense cache: of sequences that are all of one length.

    That length is read in the first call with a shape, which is not a timed one.
    """

    __name__ = "dense cache"

    def __init__(self, attention: Call) -> None:
        self._attention = attention
        self._lengths: tuple[Any, set[int]] = (None, set())

    def __call__(self, q: Any, k: Any, v: Any, kv_lens: Any, page_table: Any) -> Any:
        """q, and a cache of pages."""
        if page_table.shape[1] > 1:
            raise Unsupported("takes no pages")
        if v.numel() == 0 or k.dtype != q.dtype:
            raise Unsupported("takes no such cache")
        key = (q.shape, k.shape)
        if self._lengths[0] != key:
            self._lengths = key, set(kv_lens.tolist())
        if len(self._lengths[1]) > 1:
            raise Unsupported("takes no lengths")
        (length,) = self._lengths[1]
        return self._attention(q, k[:, :, :length], v[:, :, :length])


def _eager_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> torch.Tensor:
    """Product, softmax, product; the queries of heads that share a key head are one matrix."""
    batch, heads, seqlen_q, head_dim = q.shape
    kv_heads, seqlen_k = k.shape[1:3]
    require_scores(batch, heads, seqlen_q, seqlen_k, q.itemsize)
    scores = q.reshape(batch, kv_heads, -1, head_dim) @ k.mT
    scores *= head_dim**-0.5
    if causal:
        hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
        hidden = hidden.triu_(seqlen_k - seqlen_q + 1)
        scores.view(batch, heads, seqlen_q, seqlen_k).masked_fill_(hidden, -torch.inf)
    return (torch.softmax(scores, -1) @ v).view(*q.shape[:-1], v.shape[-1])


def _column_sums(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, *, causal: bool
) -> torch.Tensor:
    """The probabilities in memory, added up."""
    (batch, heads, seqlen_q, head_dim), (kv_heads, seqlen_k) = q.shape, k.shape[1:3]
    require_scores(batch, heads, seqlen_q, seqlen_k, lse.itemsize)
    scores = (q.reshape(batch, kv_heads, -1, head_dim) @ k.mT).to(lse.dtype)
    scores = scores.view(batch, heads, seqlen_q, seqlen_k) * head_dim**-0.5
    if causal:
        hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(hidden.triu(seqlen_k - seqlen_q + 1), -torch.inf)
    return torch.exp(scores - lse[..., None]).sum(dim=2)


def _sdpa(q: Any, k: Any, v: Any, *, backend: str, causal: bool, mask: Any = None) -> torch.Tensor:
    """torch's fused attention with no other backend than this one.

    The switches stay as they are: `torch.nn.attention.sdpa_kernel`, which turns them back, costs
    the host several times what the call itself does.
    """
    is_causal = top_left_causal(causal, q.shape[2], k.shape[2])
    for name, enable in SDPA.items():
        enable(name == backend)
    try:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
        )
    except RuntimeError as error:
        if any(words in str(error) for words in NO_BACKEND):
            raise Unsupported(f"the {backend} backend does not take this case") from error
        raise
