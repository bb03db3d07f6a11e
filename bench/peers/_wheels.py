"""Packages of kernels for torch tensors: FlashAttention 2, 3 and 4, QuACK, FlashInfer, Liger."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

from bench.peers._base import BSHD, Call, Contestant, Filters, Unsupported, refusing, require_dtype
from bench.peers._torch import Backward, TorchArrays

# How these packages say that they do not take an argument.
REFUSALS = (AssertionError, NotImplementedError, TypeError, ValueError)
MAX_HEAD_DIM = 256  # elements, of all FlashAttentions
WORKSPACE_BYTES = 128 * 2**20  # what FlashInfer recommends


class FlashAttention2(BSHD, TorchArrays):
    """`flash_attn.flash_attn_func`."""

    name = "flash_attn 2"

    def __init__(self) -> None:
        import flash_attn

        self.version, self._function = flash_attn.__version__, flash_attn.flash_attn_func

    def contestants(self, operation: str, k: int | None, causal: bool) -> Iterator[Contestant]:
        """Attention and its backward pass; its causal mask is aligned as ours."""

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            require_dtype(q, "float16", "bfloat16")
            if q.shape[-1] > MAX_HEAD_DIM or q.shape[-1] % 8:
                raise Unsupported(f"head_dim must be 8, 16, ..., {MAX_HEAD_DIM}")
            result = self._function(q, k, v, causal=causal)
            return result[0] if isinstance(result, tuple) else result  # (out, lse) in some

        if operation == "attention":
            yield Contestant(self.name, self, refusing(call, *REFUSALS))
        elif operation == "attention_backward":
            yield Contestant(self.name, self, refusing(Backward(call), *REFUSALS))


class FlashAttention3(FlashAttention2):
    """`flash_attn_interface.flash_attn_func`, built from the folder `hopper` of FlashAttention."""

    name = "flash_attn 3"

    def __init__(self) -> None:
        import flash_attn_interface

        self._function = flash_attn_interface.flash_attn_func
        self._cached = flash_attn_interface.flash_attn_with_kvcache
        self.version = metadata.version("flash_attn_3")

    def contestants(self, operation: str, k: int | None, causal: bool) -> Iterator[Contestant]:
        """Also over a cache, whose lengths the device reads."""
        yield from super().contestants(operation, k, causal)

        def call(q: Any, k: Any, v: Any, kv_lens: Any, page_table: Any) -> torch.Tensor:
            require_dtype(k, "float16", "bfloat16")
            if v.numel() == 0:
                raise Unsupported("takes values that are columns of keys as another argument")
            table = page_table if page_table.shape[1] > 1 else None
            how = {"cache_seqlens": kv_lens, "page_table": table, "causal": causal}
            return self._cached(q, k, v, **how)

        if operation == "attention_kvcache":
            yield Contestant(self.name, self, refusing(call, *REFUSALS))


class FlashAttention4(FlashAttention2):
    """`flash_attn.cute.flash_attn_func`."""

    name = "flash_attn 4"

    def __init__(self) -> None:
        import flash_attn.cute

        self._function = flash_attn.cute.flash_attn_func
        self.version = metadata.version("flash-attn-4")


class Quack(TorchArrays):
    """QuACK: softmax, cross-entropy and their backward, and a bitonic top-k for short rows."""

    name = "quack"

    def __init__(self) -> None:
        import quack
        from quack.cross_entropy import cross_entropy_bwd, cross_entropy_fwd
        from quack.softmax import softmax_bwd
        from quack.topk import topk

        self.version = quack.__version__
        self._softmax, self._softmax_backward, self._topk = quack.softmax, softmax_bwd, topk
        self._cross_entropy = cross_entropy_fwd, cross_entropy_bwd  # quack/cross_entropy.py, 0.6.4

    def contestants(self, operation: str, k: int | None, causal: bool) -> Iterator[Contestant]:
        """Its top-k takes powers of two: up to 4096 columns, and k up to 128."""
        loss, loss_backward = self._cross_entropy
        calls: dict[str, Call] = {
            "softmax": self._softmax,
            "softmax_backward": self._softmax_backward,
            "cross_entropy": loss,
            "cross_entropy_backward": lambda grad, x, labels, lse: loss_backward(
                x, labels, grad, lse
            ),
            "top_k": lambda x: self._topk(x, k),
        }
        if operation in calls:
            yield Contestant("quack", self, refusing(calls[operation], *REFUSALS))


class FlashInfer(TorchArrays):
    """FlashInfer: softmax, top-k, sampling, and batch prefill over ragged keys and values."""

    name = "flashinfer"

    def __init__(self) -> None:
        import flashinfer

        self.version, self._package = flashinfer.__version__, flashinfer

    def contestants(self, operation: str, k: int | None, causal: bool) -> Iterator[Contestant]:
        """Softmax computes in float32 and returns it, so it competes in float32 only."""
        package = self._package

        def softmax(x: torch.Tensor) -> torch.Tensor:
            require_dtype(x, "float32")
            return package.softmax(x)

        def top_k(x: torch.Tensor) -> Any:
            require_dtype(x, "float16", "bfloat16", "float32")
            return package.top_k(x, k, sorted=True)

        calls: dict[str, Call] = {
            "softmax": softmax,
            "top_k": top_k,
            "softmax_topk": lambda x: top_k(softmax(x)),
        }
        if operation in calls:
            yield Contestant("flashinfer", self, refusing(calls[operation], *REFUSALS))
        elif operation == "attention":
            library = _FlashInferBSHD()
            call = _RaggedPrefill(package, causal)
            yield Contestant("flashinfer", library, refusing(call, *REFUSALS))
        elif operation == "attention_kvcache":
            yield Contestant("flashinfer", self, refusing(_PagedDecode(package), *REFUSALS))

    def samplers(self, filters: Filters) -> Iterator[Contestant]:
        """From logits, and from the probabilities of torch's softmax, as SGLang calls it.

        flashinfer/sampling.py, 0.6.18: seeds and offsets are two vectors, as a graph needs them.
        """
        top_k, top_p, min_p = filters
        calls = {
            (): {"sampling_from_logits": (), "sampling_from_probs": ()},
            ("top_k",): {
                "top_k_top_p_sampling_from_logits": (top_k, 1.0),
                "top_k_sampling_from_probs": (top_k,),
            },
            ("top_p",): {"top_p_sampling_from_probs": (top_p,)},
            ("min_p",): {"min_p_sampling_from_probs": (min_p,)},
            ("top_k", "top_p"): {"top_k_top_p_sampling_from_logits": (top_k, top_p)},
        }
        given = tuple(name for name, value in filters._asdict().items() if value is not None)

        def sampler(name: str, arguments: tuple[Any, ...]) -> Call:
            def call(x: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
                if name.endswith("probs"):
                    x = torch.softmax(x, -1, dtype=torch.float32)
                function, seeds = getattr(self._package, name), seeds[:, 0]
                return function(x, *arguments, seed=seeds, offset=seeds)

            return refusing(call, *REFUSALS)

        for name, arguments in calls.get(given, {}).items():
            kind = name.rpartition("_")[2]
            yield Contestant(f"flashinfer from {kind}", self, sampler(name, arguments))


class _FlashInferBSHD(BSHD, FlashInfer):
    """A ragged batch lies as (tokens, heads, head_dim)."""


class Liger(TorchArrays):
    """Liger: the cross-entropy. Its gradient is computed by the forward pass, into x."""

    name = "liger"

    def __init__(self) -> None:
        # src/liger_kernel/transformers/functional.py, 0.8.2. It reads labels on the host.
        from liger_kernel.transformers.functional import liger_cross_entropy

        self.version, self._function = metadata.version("liger_kernel"), liger_cross_entropy

    def contestants(self, operation: str, k: int | None, causal: bool) -> Iterator[Contestant]:
        """Losses in the dtype of x."""
        call = functools.partial(self._function, reduction="none")
        if operation == "cross_entropy":
            yield Contestant("liger", self, refusing(call, *REFUSALS))


class _RaggedPrefill:
    """Attention of a batch as `BatchPrefillWithRaggedKVCacheWrapper` does it.

    The plan depends on the lengths only, and is made once for all layers of a model: here in the
    first call with a shape, which is not a timed one.
    """

    __name__ = "ragged prefill"

    def __init__(self, package: Any, causal: bool) -> None:
        self._package, self._causal = package, causal
        self._planned: tuple[Any, Any] = (None, None)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k and v are contiguous, (batch, seqlen, heads, head_dim)."""
        key = (q.shape, k.shape, v.shape, q.dtype)
        if self._planned[0] != key:
            self._planned = (key, self._plan(q, k, v))
        out = self._planned[1].run(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        return out.unflatten(0, q.shape[:2])

    def _plan(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        require_dtype(q, "float16", "bfloat16")
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        wrapper = self._package.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        begins = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
        wrapper.plan(
            begins * q.shape[1],
            begins * k.shape[1],
            q.shape[2],
            k.shape[2],
            q.shape[3],
            head_dim_vo=v.shape[3],
            causal=self._causal,
            q_data_type=q.dtype,
        )
        return wrapper


class _PagedDecode:
    """Attention over pages as `BatchDecodeWithPagedKVCacheWrapper` does it, on tensor cores.

    The plan, from lengths on the host, is made in the first call with a shape, as a model makes it
    once for all layers.
    """

    __name__ = "paged decode"

    def __init__(self, package: Any) -> None:
        self._package = package
        self._planned: tuple[Any, Any] = (None, None)

    def __call__(self, q: Any, k: Any, v: Any, kv_lens: Any, page_table: Any) -> torch.Tensor:
        """q is (batch, heads, 1, head_dim)."""
        key = (q.shape, k.shape, page_table.shape, q.dtype, k.dtype)
        if self._planned[0] != key:
            self._planned = (key, self._plan(q, k, v, kv_lens, page_table))
        return self._planned[1].run(q[:, :, 0], (k, v)).unsqueeze(2)

    def _plan(self, q: Any, k: Any, v: Any, kv_lens: Any, page_table: Any) -> Any:
        require_dtype(q, "float16", "bfloat16")
        if v.numel() == 0 or q.shape[2] != 1:
            raise Unsupported("takes one query of a sequence, and values that are an array")
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        wrapper = self._package.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=True
        )
        size, lengths = k.shape[2], kv_lens.cpu()
        counts = (lengths + size - 1) // size
        ends = torch.zeros(len(q) + 1, dtype=torch.int32)
        ends[1:] = counts.cumsum(0)
        used = torch.arange(page_table.shape[1]) < counts[:, None]
        wrapper.plan(
            ends,
            page_table[used.to(page_table.device)],
            (lengths - (counts - 1) * size).int(),
            q.shape[1],
            k.shape[1],
            q.shape[3],
            size,
            q_data_type=q.dtype,
            kv_data_type=k.dtype,
        )
        return wrapper
