"""`attention` as a function of PyTorch, with gradients that are the same bits on every run, in any
dtype: float64, too, in which `gradcheck` compares them with differences. Tensors are not copied.

    pip install cuattn torch
    python bench/examples/torch_function.py
"""

from __future__ import annotations

import contextlib

import torch

import cuattn


def call(function, *tensors, **options):
    """The results as tensors; on a GPU they are computed on PyTorch's current stream."""
    stream = contextlib.nullcontext()
    if tensors[0].is_cuda:
        import cupy

        handle = torch.cuda.current_stream(tensors[0].device).cuda_stream
        stream = cupy.cuda.ExternalStream(handle, tensors[0].device.index)
    with stream:
        results = function(*(tensor.detach() for tensor in tensors), **options)
    return [torch.from_dlpack(result) for result in results if result is not None]


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, is_causal):
        ctx.options = {"is_causal": is_causal}
        y, lse = call(cuattn.attention, q, k, v, return_lse=True, **ctx.options)
        ctx.save_for_backward(q, k, v, y, lse)
        return y

    @staticmethod
    def backward(ctx, grad):
        dq, dk, dv = call(cuattn.attention_backward, grad, *ctx.saved_tensors, **ctx.options)
        return dq, dk, dv, None


device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
q, k, v = (
    torch.randn(2, heads, 12, 8, dtype=torch.float64, device=device, requires_grad=True)
    for heads in (4, 2, 2)
)
assert torch.autograd.gradcheck(lambda *qkv: Attention.apply(*qkv, True), (q, k, v))
sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
torch.testing.assert_close(Attention.apply(q, k, v, True), sdpa)
print(f"{device}: the gradients of attention are those that differences give")
