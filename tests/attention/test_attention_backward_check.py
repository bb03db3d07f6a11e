"""Every bad argument of attention_backward, as `test_attention_check` has those of attention.

What both check by the same lines has one case here: that they are called.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from test_attention_check import Attention, between
from test_check import NOT_ARRAYS

import cuattn
from cuattn import AttentionGradients, reference

DENSE, VARLEN = BOTH = ["attention_backward", "attention_backward_varlen"]
NAMES = ["grad", "q", "k", "v", "y", "lse", "cu_seqlens_q", "cu_seqlens_k"]


class Gradients(Attention):
    """Arguments of the sizes of `Attention`, with `bad` for them."""

    def args(self, name):
        q, k, v, *ends = super().args(name.replace("_backward", ""))
        y, lse = ((6, 4, 6), (4, 6)) if ends else ((2, 4, 3, 6), (2, 4, 3))
        return self.floats(*y), q, k, v, self.floats(*y), self.floats(*lse), *ends

    def bad(self, error, argument, name, words="", change=None, **options):
        args = list(self.args(name))
        for key, value in (change or {}).items():
            args[NAMES.index(key)] = value
        return self.refuses(error, argument, name, *args, words=words, **options)

    def outs(self, name, dtype=np.float32):
        return tuple(self.floats(*a.shape).astype(dtype) for a in self.args(name)[1:4])


@pytest.fixture
def at(backend):
    return Gradients(backend)


def test_what_is_right_passes(at):
    """Else the tests below would prove nothing."""
    for name in BOTH:
        got = at.call(name, *at.args(name))
        assert type(got) is AttentionGradients and got[3:] == (None, None, None, None)
        outs = at.outs(name)
        bias = at.floats(4, 3, 5)
        got = at.call(name, *at.args(name), bias=bias, return_dbias=True, out=(*outs, bias.copy()))
        assert all(one is out for one, out in zip(got, outs, strict=False))


@pytest.mark.parametrize("name", BOTH)
def test_not_an_array(at, name):
    for value in NOT_ARRAYS:
        for argument in NAMES[: len(at.args(name))]:
            at.bad(TypeError, argument, name, f"{at.xp.__name__}.asarray", {argument: value})
        if value is not None:
            at.bad(TypeError, "grad_lse", name, grad_lse=value)


@pytest.mark.parametrize("name", BOTH)
def test_dtypes(at, name):
    args = dict(zip(NAMES, at.args(name), strict=False))
    for dtype in (np.float16, np.float64, np.int32, bool):
        for argument, words in (("grad", "dtype of y"), ("y", "dtype of q"), ("k", "dtype of q"),
                                ("lse", "float32")):  # fmt: skip
            at.bad(TypeError, argument, name, words, {argument: args[argument].astype(dtype)})
        lse = args["lse"].astype(dtype)
        at.bad(TypeError, "grad_lse", name, "float32", grad_lse=lse)
    floats = {n: a.astype(np.float64) for n, a in args.items() if n not in ("lse", *NAMES[6:])}
    at.bad(TypeError, "lse", name, "float64", floats)
    at.bad(TypeError, "bias", name, bias=at.xp.ones((3, 5), np.int32))
    at.bad(TypeError, "mask", name, "bool", mask=at.xp.ones((3, 5), np.float32))


@pytest.mark.parametrize("name", BOTH)
def test_shapes(at, name):
    y, lse = ((2, 4, 3, 6), (2, 4, 3)) if name == DENSE else ((6, 4, 6), (4, 6))
    for shape in [y[1:], (1, *y), (*y[:-1], 8), (*y[:-1], 1), (1, *y[1:]), ()]:
        for argument, words in (("grad", f"the shape of y {y}"), ("y", f"shape {y}")):
            at.bad(ValueError, argument, name, words, {argument: at.floats(*shape)})
    for shape in [lse[1:], (*lse, 1), lse[::-1], (1, *lse[1:]), ()]:
        at.bad(ValueError, "lse", name, f"shape {lse}", {"lse": at.floats(*shape)})
        at.bad(ValueError, "grad_lse", name, f"shape {lse}", grad_lse=at.floats(*shape))
    at.bad(ValueError, "sinks", name, "(4,)", sinks=at.floats(3))
    if name == DENSE:
        swapped = [a.swapaxes(1, 2) for a in at.args(name)[:5]]
        at.refuses(ValueError, "lse", name, *swapped, at.args(name)[5].swapaxes(1, 2),
                   layout="BSHD")  # fmt: skip


@pytest.mark.host("device arrays are trusted")
def test_values(at):
    for name in BOTH:
        at.bad(ValueError, "q_lens", name, "from 0 to", q_lens=np.array([-1, 0]))
    at.bad(ValueError, "cu_seqlens_q", VARLEN, "end with", {"cu_seqlens_q": np.array([0, 2, 7])})


@pytest.mark.parametrize("name", BOTH)
def test_options(at, name):
    for flag in ("return_dbias", "is_causal"):
        for value in (1, None, "yes", np.ones(1, bool)):
            at.bad(TypeError, flag, name, **{flag: value})
    at.bad(ValueError, "bias", name, "return_dbias=True", return_dbias=True)
    at.bad(ValueError, "precision", name, "'tf32'", precision="fp32")
    at.bad(ValueError, "softcap", name, "None", softcap=0)
    at.bad(TypeError, "window", name, "(left, right)", window=3)
    at.bad(TypeError, "dropout_p", name, "no dropout", dropout_p=0.1)
    if name == VARLEN:
        at.bad(ValueError, "max_seqlen_k", name, "at least 0", max_seqlen_k=-1)
    else:
        at.bad(ValueError, "layout", name, "BHSD, BSHD", layout="HSD")


# ---- out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_out(at, name):
    dq, dk, dv = outs = at.outs(name)
    bias = at.floats(3, 5)
    both = {"bias": bias, "return_dbias": True}
    for bad in (dq, outs[:2], (*outs, bias), (), list(outs), AttentionGradients(*outs)):
        at.bad(TypeError, "out", name, "a tuple of 3 arrays", out=bad, bias=bias)
    for bad in (outs, (*outs, bias, bias)):
        at.bad(TypeError, "out", name, "a tuple of 4 arrays", out=bad, **both)
    for bad in ((dk, dq, dv), (dq, dv, dk), (dq, dk[:1], dv)):
        at.bad(ValueError, "out", name, "shape", out=bad)
    at.bad(
        ValueError,
        "out",
        name,
        "out[3] must have shape",
        out=(*outs, at.floats(2, 4, 3, 5)),
        **both,
    )
    at.bad(
        TypeError,
        "out",
        name,
        "out[3] must have dtype",
        out=(*outs, bias.astype(np.float16)),
        **both,
    )
    for dtype in (np.float16, np.float64):
        at.bad(TypeError, "out", name, "dtype", out=at.outs(name, dtype))
    at.bad(TypeError, "out", name, "out[2]", out=(dq, dk, None))


@pytest.mark.parametrize("name", BOTH)
def test_out_is_apart_from_every_input_and_other_result(at, name):
    """Even exactly the same array: other blocks still read what one has written."""
    names, args = NAMES[: len(at.args(name))], at.args(name)
    lse = at.xp.zeros(args[5].shape, np.float32)
    memory = at.xp.zeros(1000, np.float32)

    def overlapping(shape, offset=0):
        return memory[offset : offset + int(np.prod(shape))].reshape(shape)

    for i in range(6):
        some, outs = list(args), at.outs(name)
        for place, out in enumerate(outs):
            some[i] = overlapping(args[i].shape)
            bad = [*outs]
            bad[place] = overlapping(out.shape, 1)
            words = f"out[{place}] must be {names[i]} itself"
            at.refuses(ValueError, "out", name, *some, out=tuple(bad), words=words)
    dq, dk, dv = at.outs(name)
    at.refuses(ValueError, "out", name, *args, out=(args[1], dk, dv), words="must share no memory")
    more = {"grad_lse": overlapping(lse.shape), "bias": overlapping((3, 5), 200)}
    for offset, words in ((1, "grad_lse"), (201, "bias")):
        bad = overlapping(dq.shape, offset)
        at.refuses(ValueError, "out", name, *args, out=(bad, dk, dv), words=words, **more)
    same = at.floats(*dk.shape[:-1], 6)
    square = [a[..., :6] if n in "qk" else a for n, a in zip(names, args, strict=True)]
    at.refuses(ValueError, "out", name, *square, out=(dq[..., :6], same, same),
               words="out[2] must share no memory with out[1]")  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
def test_address_between_elements(at, name):
    """NumPy reads and writes such an array, a device would fault."""
    floats = dict(list(zip(NAMES, at.args(name), strict=False))[:6])
    outs = tuple(between(at, a.shape) for a in at.outs(name))
    if at.backend.name == "numpy":
        args = [between(at, a.shape) for a in floats.values()]
        at.call(name, *args, *at.args(name)[6:], out=outs)
        return
    for argument, a in floats.items():
        at.bad(ValueError, argument, name, "pass a copy", {argument: between(at, a.shape)})
    lse = between(at, floats["lse"].shape)
    at.bad(ValueError, "grad_lse", name, "pass a copy", grad_lse=lse)
    for i, out in enumerate(outs):
        bad = [*at.outs(name)]
        bad[i] = out
        at.bad(ValueError, "out", name, f"out[{i}] must start", out=tuple(bad))


# ---- how arguments are passed -------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_signature(name):
    """That of the reference; and the options of the forward call, but for those of its results."""
    ours, theirs, forward = (
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (getattr(cuattn, name), getattr(reference, name),
                         getattr(cuattn, name.replace("_backward", "")))
    )  # fmt: skip
    assert ours == theirs
    of_both = {one for one in forward if one[0] not in ("dtype", "return_lse", "block_mask")}
    own = {"grad", "y", "lse", "grad_lse", "return_dbias", "return_dscore"}
    assert {n for n, *_ in {*ours} - of_both} == own
    assert of_both <= {*ours}
