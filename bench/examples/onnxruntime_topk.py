"""Logits of ONNX Runtime go to `softmax_topk` where they lie, on a GPU or on the CPU, and are
never copied. A matrix that projects onto a vocabulary stands for a model.

    pip install cuattn onnx onnxruntime
    python bench/examples/onnxruntime_topk.py

On a GPU: pip install "cuattn[cuda13x]" onnx onnxruntime-gpu
"""

from __future__ import annotations

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import cuattn

ROWS, HIDDEN, TOKENS, K = 4, 64, 50257, 5
on_gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
provider, device = ("CUDAExecutionProvider", "cuda") if on_gpu else ("CPUExecutionProvider", "cpu")


def project_onto(weights):
    """A model of one layer, logits = hidden @ weights, as an ONNX file holds it."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["hidden", "weights"], ["logits"])],
        "projection",
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["rows", len(weights)])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", weights.shape[1]])],
        [numpy_helper.from_array(weights, "weights")],
    )
    opset = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def best_tokens(session, hidden, k):
    """The k most probable tokens of each row, and their probabilities."""
    binding = session.io_binding()
    binding.bind_cpu_input("hidden", hidden)
    binding.bind_output("logits", device)  # it stays where it is computed
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    (logits,) = binding.get_outputs()
    return cuattn.softmax_topk(logits, k)  # the OrtValue itself, by DLPack


rng = np.random.default_rng(0)
hidden = rng.standard_normal((ROWS, HIDDEN), np.float32)
weights = rng.standard_normal((HIDDEN, TOKENS), np.float32)
session = onnxruntime.InferenceSession(project_onto(weights), providers=[provider])
best = best_tokens(session, hidden, K)

p = np.exp(hidden.astype(float) @ weights)
p /= p.sum(axis=1, keepdims=True)
order = np.argsort(-p, axis=1)[:, :K]
indices, values = (a.get() if on_gpu else a for a in (best.indices, best.values))
assert (indices == order).all()
assert np.allclose(values, np.take_along_axis(p, order, axis=1), rtol=1e-4, atol=0)
print(f"{provider}: tokens {indices[0].tolist()} are the most probable of row 0")
