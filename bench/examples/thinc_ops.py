"""Thinc with the softmax family of cuattn, gradients included: every layer that asks its `Ops` for
one gets these, and attention over sequences no longer clips its logits at -20 and 20.

    pip install cuattn thinc
    python bench/examples/thinc_ops.py
"""

from __future__ import annotations

import math

from thinc.api import ParametricAttention_v2, Ragged, get_current_ops, prefer_gpu, set_current_ops

import cuattn

prefer_gpu()
Base = type(get_current_ops())  # CupyOps on a GPU, else NumpyOps


def offsets(lengths):
    """Where sequences begin that lie one behind the other, and where the last one ends."""
    return ops.xp.pad(ops.xp.cumsum(lengths), (1, 0))


class CuattnOps(Base):
    name = f"cuattn_{Base.name}"

    def softmax(self, x, *, inplace=False, axis=-1, temperature=1.0):
        return cuattn.softmax(x, axis, scale=1 / temperature, out=x if inplace else None)

    def backprop_softmax(self, Y, dY, *, axis=-1, temperature=1.0):
        return cuattn.softmax_backward(dY, Y, axis, scale=1 / temperature)

    def softmax_sequences(self, Xs, lengths, *, inplace=False, axis=-1):
        return cuattn.segment_softmax(Xs, offsets(lengths), out=Xs if inplace else None)

    def backprop_softmax_sequences(self, dY, Y, lengths):
        return cuattn.segment_softmax_backward(dY, Y, offsets(lengths))


ops, thinc_ops = CuattnOps(), get_current_ops()
set_current_ops(ops)
x, grad = ops.xp.random.default_rng(0).standard_normal((2, 12, 8)).astype("float32")

# The same as Thinc, forward and backward: its operations, and a layer that is made of them.
results = []
layer = ParametricAttention_v2(nO=8).initialize()
for layer.ops in (ops, thinc_ops):
    y = layer.ops.softmax(x, temperature=0.5)
    dx = layer.ops.backprop_softmax(y, grad, temperature=0.5)
    out, backprop = layer(Ragged(x, ops.asarray1i([3, 5, 4])), is_train=True)
    results.append(ops.xp.stack([y, dx, out.dataXd, backprop(Ragged(grad, out.lengths)).dataXd]))
assert ops.xp.allclose(*results, atol=1e-6)

# And right where Thinc is not, which makes [[0.5], [0.5]] of this.
y = ops.softmax_sequences(ops.asarray2f([[30], [40]]), ops.asarray1i([2]))
assert abs(float(y[0, 0]) - 1 / (1 + math.exp(10))) < 1e-9
print(f"{ops.name}: {y.ravel().tolist()}")
