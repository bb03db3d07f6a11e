"""Conversions of the software device against exact fractions; approximations within bounds."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import number_models as models
import numpy as np
import pytest
from number_models import FORMATS, decode, encode, flush, saturate
from ptx_kernels import elementwise
from test_numbers import SIZE, bits_of, expect, nan_of
from test_opcodes import INTEGERS, dtype, values, width

ALL_INTEGERS = ("u8", "s8", *INTEGERS)


def halfway(source, target):
    """Numbers of a format halfway between two of a smaller one, and beside them."""
    mantissa, _, kind, _ = FORMATS[source]
    drawn = np.random.default_rng(3).integers(0, 1 << SIZE[source], 200, dtype=np.uint64)
    dropped = mantissa - FORMATS[target][0]
    if dropped <= 0:
        return drawn.astype(kind)
    middle = (drawn >> np.uint64(dropped) << np.uint64(dropped)) + np.uint64(1 << dropped - 1)
    # In the range of the smaller format, its subnormals included.
    exponents = FORMATS[source][1] + np.random.default_rng(4).integers(
        -FORMATS[target][1] - 12, FORMATS[target][1] + 2, 200
    )
    middle &= np.uint64(((1 << mantissa) - 1) | 1 << SIZE[source] - 1)
    middle |= np.clip(exponents, 0, 2 * FORMATS[source][1]).astype(np.uint64) << np.uint64(mantissa)
    return np.concatenate([middle, middle + np.uint64(1), middle - np.uint64(1)]).astype(kind)


def float_cases(source, target=None):
    extra = [halfway(source, target)] if target else []
    # Small numbers with a fraction, for conversions to integers.
    small = [encode(v + f, source) for v in (0, 1, 2, 100, -3, -100) for f in (0.25, 0.5, 0.75, 0)]
    # Around the ends of the integer types.
    ends = [
        encode(models.round_fraction(Fraction(s * (2**e + d)), source, "rz"), source)
        for s, e, d in itertools.product((1, -1), (7, 8, 15, 16, 31, 32, 63, 64), (-1, 0, 1))
    ]
    kind = FORMATS[source][2]
    return np.concatenate(
        [bits_of(source, 100), np.array(small + ends, np.uint64).astype(kind), *extra]
    )


def round_integer(value, mode):
    if models.special(value) or value == 0:
        return value
    whole = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode](
        Fraction(value)
    )
    return math.copysign(float(whole), value)


def narrowed(bits, source, target, mode, modifiers):
    value = decode(bits, source)
    if "ftz" in modifiers and source == "f32":
        value = flush(value)
    if mode.endswith("i"):
        value = round_integer(value, mode)
    if "sat" in modifiers:
        value = saturate(value)
    if "relu" in modifiers and value <= 0:
        value = 0.0
    if value != value:
        if target == "f64":
            return nan_of([bits], "f64") if source == "f64" else None
        return FORMATS[target][3]
    if not models.special(value) and value != 0:
        value = models.round_fraction(
            Fraction(value), target, mode if mode and not mode.endswith("i") else "rn"
        )
    return encode(flush(value, target) if "ftz" in modifiers else value, target)


MODES = ("rn", "rz", "rm", "rp")
INTEGRAL = ("rni", "rzi", "rmi", "rpi")
FLOATS = [
    *(("", m, "f32", s) for s in ("f16", "bf16") for m in ("", ".ftz", ".sat", ".ftz.sat")),
    *(("", m, "f64", s) for s in ("f16", "bf16", "f32") for m in ("", ".sat", ".ftz")),
    *((r, m, "f32", "f64") for r in MODES for m in ("", ".ftz", ".sat")),
    *((r, m, "f16", "f32") for r in MODES for m in ("", ".ftz", ".sat")),
    *((r, "", t, "f64") for r in MODES for t in ("f16", "bf16")),
    *((r, m, t, "f32") for r in ("rn", "rz") for m in ("", ".relu") for t in ("f16", "bf16")),
    *((r, m, "f32", "f32") for r in ("", *INTEGRAL) for m in ("", ".ftz", ".sat", ".ftz.sat")),
    *((r, m, t, t) for r in INTEGRAL for m in ("", ".sat") for t in ("f16", "f64")),
]


@pytest.mark.parametrize(("mode", "modifiers", "target", "source"), sorted(set(FLOATS)))
def test_between_floats(mode, modifiers, target, source):
    a = float_cases(source, target)
    expected = [narrowed(b, source, target, mode, modifiers) for b in a]
    keep = [k for k, e in enumerate(expected) if e is not None]
    a, expected = a[keep], [expected[k] for k in keep]
    dot = "." + mode if mode else ""
    expect(f"cvt{dot}{modifiers}.{target}.{source} %y0, %x0;", [a], FORMATS[target][2], expected)


@pytest.mark.parametrize("modifiers", ["", ".relu"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("target", ["f16", "bf16"])
def test_pairs(target, mode, modifiers):
    a = float_cases("f32", target)
    b = np.roll(a, 7)
    high, low = ([narrowed(v, "f32", target, mode, modifiers) for v in side] for side in (a, b))
    expected = [h << 16 | v for h, v in zip(high, low, strict=True)]
    expect(f"cvt.{mode}{modifiers}.{target}x2.f32 %y0, %x0, %x1;", [a, b], np.uint32, expected)


@pytest.mark.parametrize("mode", ["rna", "rn", "rz", "rn.relu"])
def test_tensor_float(mode):
    a = np.concatenate(
        [bits_of("f32", 300), (bits_of("f32", 300, 1) & 0xFFFFE000) + 0x1000]
    ).astype(np.uint32)
    FORMATS["tf32"] = (10, 127, np.uint32, 0x7FFFFFFF)

    def model(bits):
        value = decode(bits, "f32")
        if "relu" in mode and models.sign(value) < 0:
            value = 0.0
        if value != value:
            return 0x7FFFFFFF
        if not models.special(value) and value != 0:
            value = models.round_fraction(Fraction(value), "tf32", mode.split(".")[0])
        return encode(value, "f32")

    expected = [model(b) for b in a if decode(b, "f32") == decode(b, "f32")]
    numbers = np.array([b for b in a if decode(b, "f32") == decode(b, "f32")], np.uint32)
    expect(f"cvt.{mode}.tf32.f32 %y0, %x0;", [numbers], np.uint32, expected)
    nan = np.array([0x7FC00001, 0xFF800001], np.uint32)
    expect(f"cvt.{mode}.tf32.f32 %y0, %x0;", [nan], np.uint32, [0x7FFFFFFF] * 2)


@pytest.mark.parametrize("mode", INTEGRAL)
@pytest.mark.parametrize("target", ALL_INTEGERS)
@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64"])
def test_to_integer(source, target, mode):
    a = float_cases(source)
    bits, signed = width(target), target[0] == "s"
    numbers = [decode(b, source) for b in a]
    expected = [models.to_integer(v, bits, signed, mode, source == "f64") for v in numbers]
    # To a register of 64 bits: what is narrower is extended.
    stored = [v & (1 << 64) - 1 for v in expected]
    wide = f"cvt.{mode}.{target}.{source} %y0, %x0;"
    expect(wide, [a], np.uint64, stored)
    if source == "f32":
        flushed = [models.to_integer(flush(v), bits, signed, mode, False) for v in numbers]
        stored = [v & (1 << 64) - 1 for v in flushed]
        for saturation in ("", ".sat"):  # a conversion to an integer always saturates
            body = f"cvt.{mode}.ftz{saturation}.{target}.f32 %y0, %x0;"
            expect(body, [a], np.uint64, stored)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ALL_INTEGERS)
@pytest.mark.parametrize("target", ["f16", "bf16", "f32", "f64"])
def test_from_integer(target, source, mode):
    a = np.array(values(source, 200), object).astype(dtype(source))
    expected = []
    for v in a.tolist():
        number = models.round_fraction(Fraction(v), target, mode) if v else 0.0
        expected.append(encode(number, target))
    expect(f"cvt.{mode}.{target}.{source} %y0, %x0;", [a], FORMATS[target][2], expected)
    clamped = [encode(saturate(float(v)), target) for v in a.tolist()]
    expect(f"cvt.{mode}.sat.{target}.{source} %y0, %x0;", [a], FORMATS[target][2], clamped)


@pytest.mark.parametrize("target", ALL_INTEGERS)
@pytest.mark.parametrize("source", ALL_INTEGERS)
def test_between_integers(source, target):
    a = np.array(values(source), object).astype(dtype(source))
    bits, signed = width(target), target[0] == "s"
    low, high = models.bounds(bits, signed)
    # From the lower bits of a register of 64, to another one.
    wide = a.astype(np.uint64) | np.uint64(0xABCDEF0123456789) << np.uint64(width(source) % 64)
    wide = wide if width(source) < 64 else a.astype(np.uint64)
    plain = [models.wrap(v, bits, signed) & (1 << 64) - 1 for v in a.tolist()]
    expect(f"cvt.{target}.{source} %y0, %x0;", [wide], np.uint64, plain)
    clamped = [max(low, min(high, v)) & (1 << 64) - 1 for v in a.tolist()]
    expect(f"cvt.sat.{target}.{source} %y0, %x0;", [wide], np.uint64, clamped)
    exact = [int(v) & (1 << bits) - 1 for v in plain]
    expect(f"cvt.{target}.{source} %y0, %x0;", [a], f"u{bits // 8}", exact)


# -- approximations: the bounds that the PTX ISA gives ------------------------------------------


def ulp(value):
    return math.ldexp(1.0, max(math.frexp(value)[1] - 24, -149))


def numbers_in(low, high, count=500):
    drawn = np.random.default_rng(5).uniform(low, high, count).astype(np.float32)
    return np.concatenate([drawn, np.array([low, high], np.float32)])


WIDE = (2.0 ** np.random.default_rng(6).uniform(-120, 120, 500)).astype(np.float32)
APPROXIMATE = {
    "ex2.approx": (lambda x: 2.0**x, numbers_in(-120, 120), lambda v: 2**-22.5 * v),
    "lg2.approx": (math.log2, WIDE, lambda v: 2**-22 * max(1, abs(v))),
    "rcp.approx": (lambda x: 1 / x, WIDE, ulp),
    "rsqrt.approx": (lambda x: x**-0.5, WIDE, lambda v: 2**-22.9 * v),
    "sqrt.approx": (math.sqrt, WIDE, lambda v: 2**-23 * v),
    "sin.approx": (math.sin, numbers_in(-np.pi, np.pi), lambda v: 2**-20.5),
    "cos.approx": (math.cos, numbers_in(-np.pi, np.pi), lambda v: 2**-20.5),
    "tanh.approx": (math.tanh, numbers_in(-10, 10), lambda v: 2**-11 * abs(v)),
}


@pytest.mark.parametrize("modifier", ["", ".ftz"])
@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_approximations(opcode, modifier):
    function, x, bound = APPROXIMATE[opcode]
    if opcode == "tanh.approx":
        modifier = ""
    result = elementwise(f"{opcode}{modifier}.f32 %y0, %x0;", [x], ["f4"])
    for value, got in zip(x.tolist(), result.tolist(), strict=True):
        exact = function(value)
        assert abs(got - exact) <= bound(exact), (value, got, exact)


INF, NAN = math.inf, math.nan
SPECIAL = {  # of -inf, -1, -subnormal, -0, +0, +subnormal, +inf, NaN; with .ftz
    "ex2.approx": [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, INF, NAN],
    "lg2.approx": [NAN, NAN, -INF, -INF, -INF, -INF, INF, NAN],
    "rcp.approx": [-0.0, -1.0, -INF, -INF, INF, INF, 0.0, NAN],
    "rsqrt.approx": [NAN, NAN, -INF, -INF, INF, INF, 0.0, NAN],
    "sqrt.approx": [NAN, NAN, -0.0, -0.0, 0.0, 0.0, INF, NAN],
    "sin.approx": [NAN, None, -0.0, -0.0, 0.0, 0.0, NAN, NAN],
    "cos.approx": [NAN, None, 1.0, 1.0, 1.0, 1.0, NAN, NAN],
}


@pytest.mark.parametrize("opcode", SPECIAL)
def test_approximations_of_special_values(opcode):
    x = np.array([-INF, -1, -1e-40, -0.0, 0.0, 1e-40, INF, NAN], np.float32)
    result = elementwise(f"{opcode}.ftz.f32 %y0, %x0;", [x], ["u4"])
    for value, got, wanted in zip(x, result, SPECIAL[opcode], strict=True):
        if wanted is not None:
            assert int(got) == encode(wanted, "f32"), value


@pytest.mark.parametrize("kind", ["approx", "full"])
def test_divisions(kind):
    a, b = np.tile(WIDE[:100], 100), np.repeat(WIDE[100:200], 100)
    result = elementwise(f"div.{kind}.f32 %y0, %x0, %x1;", [a, b], ["f4"])
    exact = a.astype(np.float64) / b
    normal = (exact > 2.0**-126) & (exact < 2.0**127)
    result, exact = result[normal], exact[normal]
    assert (np.abs(result - exact) <= 2 * np.spacing(exact.astype(np.float32))).all()
    large = np.array([2.0**127], np.float32)
    quotient = elementwise(
        f"div.{kind}.f32 %y0, %x0, %x1;", [np.float32([2.0**126]), large], ["f4"]
    )
    assert quotient[0] == (0.5 if kind == "full" else 0.0)  # beyond the range of div.approx
    infinite = elementwise(f"div.{kind}.f32 %y0, %x0, %x1;", [np.float32([INF]), large], ["f4"])
    assert np.isnan(infinite[0]) == (kind == "approx")


@pytest.mark.parametrize("opcode", ["rcp.approx.ftz", "rsqrt.approx", "rsqrt.approx.ftz"])
def test_approximations_of_doubles(opcode):
    x = 2.0 ** np.random.default_rng(8).uniform(-900, 900, 300)
    result = elementwise(f"{opcode}.f64 %y0, %x0;", [x], ["f8"])
    exact = 1 / x if opcode[:3] == "rcp" else x**-0.5
    assert (np.abs(result - exact) <= 2.0**-19 * exact).all()
    assert (result.view(np.uint64) & 0xFFFFFFFF == 0).all()  # only the upper word
