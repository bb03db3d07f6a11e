"""Every bad argument of attention_column_sums, as `test_attention_check` has those of attention.

What both check by the same lines has one case here: that they are called.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from test_attention_check import Attention, between
from test_check import NOT_ARRAYS

import cuattn
from cuattn import reference

SUMS = "attention_column_sums"
NAMES = ["q", "k", "lse"]


class ColumnSums(Attention):
    """Arguments of the sizes of `Attention`."""

    def args(self, name=SUMS):
        q, k, _ = super().args("attention")
        return q, k, self.floats(2, 4, 3)

    def bad(self, error, argument, words="", change=None, **options):
        args = dict(zip(NAMES, self.args(), strict=True)) | (change or {})
        return self.refuses(error, argument, SUMS, *args.values(), words=words, **options)


@pytest.fixture
def at(backend):
    return ColumnSums(backend)


def test_what_is_right_passes(at):
    """Else the tests below would prove nothing."""
    out = at.floats(2, 4, 5)
    assert at.call(SUMS, *at.args()).shape == out.shape
    assert at.call(SUMS, *at.args(), out=out) is out


def test_not_an_array(at):
    for value in NOT_ARRAYS:
        for argument in NAMES:
            at.bad(TypeError, argument, f"{at.xp.__name__}.asarray", {argument: value})


def test_dtypes(at):
    q, k, lse = at.args()
    for dtype in (np.float16, np.float64, np.int32, bool):
        at.bad(TypeError, "k", "dtype of q", {"k": k.astype(dtype)})
        at.bad(TypeError, "lse", "float32", {"lse": lse.astype(dtype)})
    wide = {"q": q.astype(np.float64), "k": k.astype(np.float64)}
    at.bad(TypeError, "lse", "float64", wide)
    at.bad(TypeError, "q", "float", {"q": q.astype(np.int32), "k": k.astype(np.int32)})


def test_shapes(at):
    _, k, _ = at.args()
    for shape in [(4, 3), (2, 4, 3, 1), (2, 3, 4), (1, 4, 3), ()]:
        at.bad(ValueError, "lse", "shape (2, 4, 3)", {"lse": at.floats(*shape)})
    at.bad(ValueError, "k", "head dimension", {"k": at.floats(2, 2, 5, 6)})
    at.bad(ValueError, "k", "number of heads", {"k": at.floats(2, 3, 5, 8)})
    at.bad(ValueError, "k", "as many dimensions", {"k": k[0]})
    at.bad(
        ValueError, "k", "at most 256", {"q": at.floats(2, 4, 3, 257), "k": at.floats(2, 2, 5, 257)}
    )
    at.bad(ValueError, "alibi_slopes", "(4,)", alibi_slopes=at.floats(3))
    swapped = [a.swapaxes(1, 2) for a in at.args()]
    at.refuses(ValueError, "lse", SUMS, *swapped, layout="BSHD")


def test_options(at):
    for value in (1, None, "yes"):
        at.bad(TypeError, "is_causal", is_causal=value)
    at.bad(ValueError, "precision", "'tf32'", precision="fp32")
    at.bad(ValueError, "layout", "BHSD, BSHD", layout="HSD")
    at.bad(TypeError, "sinks", "attention has it", sinks=at.floats(4))


@pytest.mark.host("device arrays are trusted")
def test_values(at):
    at.bad(ValueError, "q_lens", "from 0 to", q_lens=np.array([-1, 0]))


def test_out(at):
    for shape in [(4, 5), (2, 4, 3), (2, 2, 5), (2, 4, 5, 1)]:
        at.bad(ValueError, "out", "shape (2, 4, 5)", out=at.floats(*shape))
    for dtype in (np.float16, np.float64):
        at.bad(TypeError, "out", "float32", out=at.floats(2, 4, 5, dtype=dtype))
    at.bad(TypeError, "out", out=(at.floats(2, 4, 5),))
    memory = at.xp.zeros(1000, np.float32)
    for name, own in zip(NAMES, at.args(), strict=True):  # the same array, too: others still read
        for offset in (0, 1):
            shared = memory[: own.size].reshape(own.shape)
            out = memory[offset : offset + 40].reshape(2, 4, 5)
            at.bad(ValueError, "out", name, {name: shared}, out=out)


def test_address_between_elements(at):
    """NumPy reads and writes such an array, a device would fault."""
    shapes = dict(zip(NAMES, (a.shape for a in at.args()), strict=True))
    out = between(at, (2, 4, 5))
    if at.backend.name == "numpy":
        at.call(SUMS, *(between(at, shape) for shape in shapes.values()), out=out)
        return
    for name, shape in shapes.items():
        at.bad(ValueError, name, "pass a copy", {name: between(at, shape)})
    at.bad(ValueError, "out", "must start", out=out)


def test_signature():
    """That of the reference; and the options of the forward call, but for those of its results."""
    ours, theirs, forward = (
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (cuattn.attention_column_sums, reference.attention_column_sums,
                         cuattn.attention)
    )  # fmt: skip
    assert ours == theirs
    lacking = {name for name, *_ in {*forward} - {*ours}}
    assert lacking == {"v", "sinks", "dtype", "return_lse", "score", "score_args", "block_mask"}
    assert {name for name, *_ in {*ours} - {*forward}} == {"lse"}
