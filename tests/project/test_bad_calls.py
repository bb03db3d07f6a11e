"""Calls with spoilt arguments, drawn at random: each gives results of the right shape, or one of
three errors that says which argument must be what, with nothing launched, allocated or changed.

Every function is called on NumPy arrays as such, and as a device would be: through check, plan and
packing up to the launch, which is counted and not made. The run's seed (conftest) is the seed.
"""

from __future__ import annotations

import decimal
import fractions
import inspect
import os
import re
import warnings

import array_api_strict
import emulator
import ml_dtypes
import numpy as np
import pytest
from conftest import SEED
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from numpy.exceptions import AxisError
from test_check import OtherDevice
from test_interchange import CALLS, Exporter, Nowhere, Refusing, each, leaves

import cuattn
from cuattn._device import runtime

EXAMPLES = 1000  # on NumPy arrays, and as many as a device would be called
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [
    *(np.dtype(c) for c in "efdbBhHiIlL"),
    BFLOAT16,
    *map(np.dtype, ("?", "g", "F", "D", "O", "U2", "S2", "M8[s]", "m8[s]", "V4", "i4,f4")),
    *map(np.dtype, (">f4", ">i8", ml_dtypes.float8_e4m3, ml_dtypes.int4)),
]
FLOATS = [np.dtype(c) for c in "efd"] + [BFLOAT16]

# What may stand where a number, a flag or a word is asked for.
NUMBERS = [
    *(0, 1, 2, 3, 4, 5, -1, -2, 7, 2**62, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 10**5000),
    *(-(10**5000), 0.0, -0.0, 0.5, 2.0, -1.5, 1e308, 5e-324, float("nan"), float("inf")),
    *(float("-inf"), True, False, np.True_, np.False_, np.int8(-1), np.int64(2), np.uint64(2**63)),
    *(np.float16(2), np.float32(0.5), np.float64(2.5), np.longdouble(2), ml_dtypes.bfloat16(2)),
    *(np.float64("nan"), 1j, np.complex64(2), np.datetime64(1, "s"), np.timedelta64(1, "s")),
    *(np.str_("1"), np.bytes_(b"1"), np.void(b"1"), fractions.Fraction(1, 2)),
    *(fractions.Fraction(10**400), decimal.Decimal(2), decimal.Decimal("sNaN")),
]
WORDS = [
    *("", "1", b"1", "largest", "smallest", "LARGEST", "prob", "log_prob", "logit", "BHSD", "BSHD"),
    *("bshd", "ieee", "tf32", "float32", "no such dtype", "f4,", "(2,)f4", "x" * 1000),
]
OBJECTS = [
    *(None, ..., object(), range(3), slice(3), {}, {1}, memoryview(b"ab"), bytearray(b"ab"), len),
    *(int, float, np.float32, np.dtype("f8"), np.dtype(">f4"), np.int32, BFLOAT16, np.ndarray),
    *([], [1.0], [True, False], [[1, 2], [3]], (10**5000,), float("nan").__class__),
]
PARTS = [0, 1, -1, 2, None, 10**30, 10**5000, True, 1.5, "0", np.int8(1)]  # of tuples
FOREIGN = [
    lambda: array_api_strict.asarray(np.ones((3, 4))),
    lambda: array_api_strict.asarray(np.array(2)),
    lambda: array_api_strict.asarray(np.array(True)),
    lambda: Exporter(np.ones((3, 4), BFLOAT16)),
    lambda: Exporter(np.ones((), np.float32)),
    lambda: Refusing(np.ones((3, 4), np.float32)),
    lambda: OtherDevice(),
    lambda: Nowhere(np.ones(3)),
    lambda: np.ones((3, 4)).view(np.matrix),
    lambda: np.ma.masked_equal(np.ones((3, 4), np.float32), 0),
]
# What may be done to a valid array.
CHANGES = [
    lambda a: a[None],
    lambda a: a[..., None],
    lambda a: a[0] if a.ndim and a.size else a,
    lambda a: a.T,
    lambda a: a[..., :0] if a.ndim else a,
    lambda a: a[:0] if a.ndim else a,
    lambda a: a[..., ::-1] if a.ndim else a,
    lambda a: np.repeat(a, 2, -1) if a.ndim else a,
    lambda a: np.broadcast_to(a, (2, *a.shape)),
    lambda a: np.lib.stride_tricks.as_strided(a, writeable=False),
    lambda a: np.lib.stride_tricks.as_strided(a, a.shape, (0,) * a.ndim),
    lambda a: np.full(a.shape, np.nan, a.dtype) if a.dtype.kind == "f" else a[..., None],
    lambda a: np.full(a.shape, 2**62).astype(a.dtype) if a.dtype.kind in "iu" else a,
    lambda a: a.reshape(-1),
    lambda a: np.empty((0, 2, 3), a.dtype),
]


# Valid values of options; what is not here is left out unless it is spoilt.
OPTIONS = {
    **{"axis": 0, "scale": 0.5, "dtype": np.float32, "return_lse": True, "keepdims": True},
    **{"mode": "smallest", "sorted": False, "output": "logit", "renormalize": True},
    **{"index_offset": 7, "layout": "BSHD", "is_causal": True, "window": (1, None), "softcap": 2.0},
    **{"return_log_prob": True, "top_k": 3, "top_p": 0.5, "min_p": 0.5},
    **{"ignore_index": -100, "return_dscore": True},
    **{"block_mask": cuattn.block_mask(np.ones((3, 3), bool)), "block": (128, 256)},
    **{"precision": "ieee", "max_seqlen_q": 3, "max_seqlen_k": 3, "split_size": 256},
}


# Further calls, with all of their options: the first word is the function's.
MORE = {
    "block_mask of an expression": (
        ("d[b, q] < h + k", 3, 5),
        {"args": {"d": np.ones((2, 5), np.int32)}, "batch": 2, "heads": 3},
    )
}


def function(name):
    return getattr(cuattn, name.partition(" ")[0])


def parameters(name):
    """Positional parameters of a function, its options, and those that it must have."""
    found = inspect.signature(function(name)).parameters.values()
    arrays = [p.name for p in found if p.kind is p.POSITIONAL_ONLY]
    options = [p for p in found if p.name not in arrays]
    needed = [p.name for p in options if p.default is p.empty]
    return arrays, [p.name for p in options], [*MORE[name][1]] if name in MORE else needed


class Draw:
    """Choices by the bytes of an example: one draw, so that thousands of calls take seconds."""

    def __init__(self, choices):
        self.choices = iter(choices)

    def __call__(self, options):
        """One of the options; the first of them where the bytes are at an end."""
        return options[(next(self.choices, 0) << 8 | next(self.choices, 0)) % len(options)]

    def few(self, options):
        """Up to three of the options, all different, in an order that no process has of its own."""
        return dict.fromkeys(self(options) for _ in range(self(range(4)))) if options else {}


KINDS = ["changed", "changed", "dtype", "dtype", "array", "number", "foreign", "tuple", "word"]
SHAPES = [(), (), (0,), (1,), (3,), (4,), (3, 1), (3, 4), (0, 3), (1, 2, 3, 1, 1)]


def array(draw, dtype, shape):
    """An array of a dtype, of zeros, ones or a mixture."""
    if dtype.kind in "USMmV" and dtype != BFLOAT16:
        return np.zeros(shape, dtype)
    return np.resize(draw([[0], [1], [1, 0], [3, 1, 2]]), shape).astype(dtype)


def spoilt(draw, valid):
    """Something else in the place of an argument, whose valid value is this."""
    if isinstance(valid, tuple) and valid and draw(range(8)):
        place = draw(range(len(valid)))
        parts = [spoilt(draw, part) if i == place else part for i, part in enumerate(valid)]
        return type(valid)(*parts) if hasattr(valid, "_fields") else tuple(parts)
    kind = draw(KINDS)
    if isinstance(valid, np.ndarray) and kind == "changed":
        return draw(CHANGES)(valid)
    if isinstance(valid, np.ndarray) and kind == "dtype":
        return array(draw, draw(DTYPES), valid.shape)
    if kind == "array":
        return array(draw, draw(DTYPES), draw(SHAPES))
    if kind == "foreign":
        return draw(FOREIGN)()
    if kind == "tuple":
        return draw([tuple, list])(draw(PARTS) for _ in range(draw(range(4))))
    return draw(WORDS + OBJECTS if kind == "word" else NUMBERS)


def drawn(draw, name):
    """Arguments of a function, by name, of which up to three are spoilt."""
    arrays, options, needed = parameters(name)
    dtype = draw([np.dtype(np.float32), np.dtype(np.int32), *FLOATS])

    def retyped(a):
        return a.astype(dtype) if a.dtype == np.float32 else a.copy()

    args, named = each(retyped, (CALLS | MORE)[name])
    valid = {**dict.fromkeys(options), **OPTIONS, **named}
    call = dict(zip(arrays, args, strict=True))
    asked = draw.few(options) | dict.fromkeys(needed)
    call.update({n: valid[n] for n in asked if valid[n] is not None})
    for changed in draw.few(arrays * 2 + options):  # arrays more often
        call[changed] = spoilt(draw, call.get(changed, valid.get(changed)))
    return call


def shape_of(value):
    """The shape of an array of whatever library."""
    return value.array.shape if isinstance(value, Exporter) else np.shape(value)


def without(shape, axis, keepdims=False):
    """A shape without the reduced axes."""
    if not shape or axis is None:
        return (1,) * len(shape) if keepdims else ()
    return np.zeros(shape, bool).any(axis, keepdims=keepdims).shape


def selected(call, k):
    """Shape of a selection of k: (values, one number a row)."""
    shape, axis = shape_of(call["x"]), call.get("axis", -1)
    if not shape or axis is None:
        return (k,), ()
    axis = int(axis) % len(shape)
    return (*shape[:axis], k, *shape[axis + 1 :]), shape[:axis] + shape[axis + 1 :]


def has_gradient(option):
    """Whether there is an array, and not of integers."""
    array = getattr(option, "array", option)
    return array is not None and np.asarray(array).dtype.kind not in "iu"


def dscore_shapes(call):
    """Shapes of the gradients of arrays of a score; () without any."""
    arrays, names = call.get("score_args") or {}, call.get("return_dscore", False)
    if isinstance(names, (bool, np.bool_)):
        names = [n for n in sorted(arrays) if names and has_gradient(arrays[n])]
    return [shape_of(arrays[n]) for n in names] or [()]


def shapes(name, call):
    """Shapes of the results of a call that succeeds."""
    first = shape_of(next(iter(call.values()))) if name != "merge" else None
    lse = bool(call.get("return_lse", False))
    if name in ("softmax", "log_softmax", "softmax_backward", "log_softmax_backward"):
        return [first, without(first, call.get("axis", -1))][: 1 + lse]
    if name in ("segment_softmax", "segment_softmax_backward"):
        return [first]
    if name == "logsumexp":
        return [without(first, call.get("axis"), bool(call.get("keepdims", False)))]
    if name == "entropy":
        return [without(first, call.get("axis", -1), bool(call.get("keepdims", False)))]
    if name in ("cross_entropy", "logits_state"):
        row = without(first, call.get("axis", -1))
        return [row] * 4 if name == "logits_state" else [row, row][: 1 + lse]
    if name == "cross_entropy_backward":
        return [shape_of(call["x"])]
    if name == "softmax_state":
        return [without(first, call.get("axis", -1))] * 2
    if name in ("top_k", "softmax_topk"):
        values, row = selected(call, int(call["k"]))
        return [values, values, row][: 2 + lse]
    if name == "softmax_topk_state":
        _, row = selected(call, 0)
        return [row, row, (*row, int(call["k"])), (*row, int(call["k"]))]
    if name == "sample":
        indices, _ = selected(call, int(call["num"]))
        return [indices, indices][: 1 + bool(call.get("return_log_prob", False))]
    if name == "sample_state":
        _, row = selected(call, 0)
        return [row, row, *[(*row, int(call["num"]))] * 3]
    if name == "merge":
        return [shape_of(part) for part in call["a"]]
    if name == "merge_attention":
        return [first, shape_of(call["lse_a"])]
    if name == "merge_attention_states":
        axis = int(call.get("axis", 0)) % len(first)
        return [s[:axis] + s[axis + 1 :] for s in (first, shape_of(call["lses"]))]
    if name == "block_mask":
        *lead, rows, columns = first
        m, n = ([rows, columns][i] if call[f] is None else int(call[f])
                for i, f in enumerate(("q_len", "k_len")))  # fmt: skip
        rows, keys = call.get("block", (128, 128))
        counts = (*lead, -(-m // int(rows)))
        return [counts, *[(*counts, -(-n // int(keys)))] * 2, (*lead, m, n)]
    if name in MORE:
        rows, keys = call.get("block", (128, 128))
        tiles = -(-int(call["q_len"]) // int(rows)), -(-int(call["k_len"]) // int(keys))
        lead = int(call["batch"]), int(call["heads"])
        return [(*lead, tiles[0]), *[(*lead, *tiles)] * 2]
    if name == "kv_append":
        return [()]  # None
    if name.startswith("attention_backward"):
        options = [call.get(n) for n in ("bias", "alibi_slopes", "sinks")]
        given = [bool(call.get("return_dbias", False)), *map(has_gradient, options[1:])]
        large = [shape_of(call[n]) for n in "qkv"]
        small = [shape_of(a) if b else () for a, b in zip(options, given, strict=True)]
        return large + small + dscore_shapes(call)
    if name == "attention_column_sums":
        bshd = call.get("layout") == "BSHD" and len(shape_of(call["k"])) > 2
        return [(*shape_of(call["lse"])[:-1], shape_of(call["k"])[-3 if bshd else -2])]
    if name == "attention_topk":
        out = (*first[:-1], int(call["num"]))
        return [first[:-1]] * 2 + [out] * 2 if call.get("output") == "state" else [out] * 2
    values = call["v_cache" if "v_cache" in call else "v"]
    out = (*first[:-1], int(call["value_dim"]) if values is None else shape_of(values)[-1])
    if name == "attention_varlen":
        return [out, (first[1], first[0])][: 1 + lse]
    swapped = call.get("layout") == "BSHD" and len(first) > 2
    rows = (*first[:-3], first[-2], first[-3]) if swapped else first[:-1]
    return [out, rows][: 1 + lse]


def memory(value):
    """The bytes of every array in an argument."""
    found = []
    each(lambda a: found.append((a.shape, a.dtype, a.tobytes())), value)
    return found


class Counting(emulator.Runtime):
    """A device that counts what it is asked for, and does nothing."""

    def __init__(self):
        super().__init__("sm_90a")
        self.asked = 0

    def empty(self, shape, dtype):
        self.asked += 1
        return np.zeros(shape, dtype)

    def launch(self, kernel, params, reads, writes):
        self.asked += 1


@pytest.fixture(params=["numpy", "device"])
def device(request, monkeypatch):
    """None, or a device that counts."""
    device = Counting() if request.param == "device" else None
    monkeypatch.setattr(runtime, "emulator", device)
    return device


@pytest.mark.drawn
@pytest.mark.parametrize("name", [*CALLS, *MORE])
def test_bad_calls(name, device):
    arrays, options, _ = parameters(name)
    argument = rf"^(?:{'|'.join(arrays + options)})\b[\w.\[\]']* must .+, but .+"
    counts = dict.fromkeys(("right", "type", "value"), 0)

    @seed(f"{os.environ[SEED]} {name} {device is None}")
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(min_size=64, max_size=64))
    def call_it(choices):
        call = drawn(Draw(choices), name)
        note(call)
        before = memory(call)
        if device is not None:
            device.asked = 0
        given = dict(call)
        args = [given.pop(array) for array in arrays]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                results = function(name)(*args, **given)
        except (TypeError, ValueError, AxisError) as error:
            assert type(error) in (TypeError, ValueError, AxisError)
            assert re.match(argument, str(error), re.DOTALL), str(error)
            assert len(str(error)) < 1000
            assert memory(call) == before
            assert device is None or device.asked == 0
            counts["type" if type(error) is TypeError else "value"] += 1
        else:
            made = [np.shape(result) for result in leaves(results)]
            assert made == shapes(name, call)
            counts["right"] += 1

    call_it()
    assert min(counts.values()) > EXAMPLES // 100, counts  # each of them 3 to 60 in 100
