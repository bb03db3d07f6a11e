"""Exact models of PTX arithmetic: Python integers and fractions, rounded once.

A floating-point number is a Python float here (of float64 where it matters: each format is a part
of it); formats are NumPy dtypes and "bf16".
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

MODES = ("rn", "rz", "rm", "rp")
# (explicit bits of the mantissa, bias, unsigned type of the bits, NaN of arithmetic)
FORMATS = {
    "f16": (10, 15, np.uint16, 0x7FFF),
    "bf16": (7, 127, np.uint16, 0x7FFF),
    "f32": (23, 127, np.uint32, 0x7FFFFFFF),
    "f64": (52, 1023, np.uint64, 0xFFF8000000000000),
}


def decode(bits, name):
    """The number with these bits, as a Python float: exact."""
    mantissa, bias, _, _ = FORMATS[name]
    bits = int(bits)
    width = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}[name]
    sign = -1.0 if bits >> (width - 1) else 1.0
    exponent = bits >> mantissa & (2 * bias + 1)
    fraction = bits & ((1 << mantissa) - 1)
    if exponent == 2 * bias + 1:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(fraction, 1 - bias - mantissa)
    return sign * math.ldexp(fraction | 1 << mantissa, exponent - bias - mantissa)


def encode(value, name):
    """The bits of a float that the format has exactly."""
    mantissa, bias, dtype, nan = FORMATS[name]
    width = 8 * np.dtype(dtype).itemsize
    if value != value:
        return nan
    sign = (math.copysign(1, value) < 0) << (width - 1)
    if math.isinf(value):
        return sign | (2 * bias + 1) << mantissa
    if value == 0:
        return sign
    fraction, exponent = math.frexp(abs(value))  # in [0.5, 1)
    exponent -= 1
    if exponent < 1 - bias:
        return sign | int(math.ldexp(abs(value), mantissa + bias - 1))
    return (
        sign
        | (exponent + bias) << mantissa
        | (int(fraction * 2 ** (mantissa + 1)) - (1 << mantissa))
    )


def round_fraction(value, name, mode):
    """A Fraction that is not 0, in the format, as a float."""
    mantissa, bias, _, _ = FORMATS[name]
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    last = max(exponent, 1 - bias) - mantissa
    scaled = magnitude / Fraction(2) ** last
    kept = math.floor(scaled)
    rest = scaled - kept
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and kept % 2),
        "rna": rest >= Fraction(1, 2),
        "rz": False,
        "rm": value < 0 and rest > 0,
        "rp": value > 0 and rest > 0,
    }[mode]
    result = (kept + bool(up)) * Fraction(2) ** last
    largest = (2 - Fraction(1, 2**mantissa)) * Fraction(2) ** bias
    sign = -1.0 if value < 0 else 1.0
    if result > largest:
        away = mode in ("rn", "rna") or mode == ("rm" if value < 0 else "rp")
        return sign * (math.inf if away else float(largest))
    return sign * float(result)


def special(value):
    return value != value or math.isinf(value)


def zero(mode, *signs):
    """The zero that an exact sum of terms of these signs gives."""
    if all(s < 0 for s in signs):
        return -0.0
    if all(s > 0 for s in signs):
        return 0.0
    return -0.0 if mode == "rm" else 0.0


def sign(x):
    return math.copysign(1, x)


def add(a, b, name, mode):
    if special(a) or special(b):
        return a + b
    total = Fraction(a) + Fraction(b)
    if total == 0:
        return zero(mode, sign(a), sign(b))
    return round_fraction(total, name, mode)


def sub(a, b, name, mode):
    return add(a, -b, name, mode)


def mul(a, b, name, mode):
    if special(a) or special(b) or a == 0 or b == 0:
        return a * b
    return round_fraction(Fraction(a) * Fraction(b), name, mode)


def div(a, b, name, mode):
    if a != a or b != b or (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b)):
        return math.nan
    if math.isinf(a) or b == 0:
        return sign(a) * sign(b) * math.inf
    if math.isinf(b) or a == 0:
        return sign(a) * sign(b) * 0.0
    return round_fraction(Fraction(a) / Fraction(b), name, mode)


def fma(a, b, c, name, mode):
    if special(a) or special(b) or special(c):
        product = math.nan if a != a or b != b else a * b
        if not special(a) and not special(b):
            product = sign(a) * sign(b)  # finite: only c counts
        return product + c
    product = Fraction(a) * Fraction(b)
    if product + Fraction(c) == 0:
        return zero(mode, sign(a) * sign(b), sign(c))
    return round_fraction(product + Fraction(c), name, mode)


def rcp(a, name, mode):
    return div(1.0, a, name, mode)


def sqrt(a, name, mode):
    if a != a or a == 0 or a == math.inf:
        return a
    if a < 0:
        return math.nan
    # A root of 2^400 times the precision: what is cut off never lies at a boundary unless it is 0.
    value = Fraction(a)
    shift = 2 * (400 + abs(math.frexp(a)[1]))
    scaled = value * 2**shift
    root = math.isqrt(int(scaled))
    exact = root * root == scaled
    approximate = Fraction(root, 2 ** (shift // 2))
    return round_fraction(
        approximate if exact else approximate + Fraction(1, 2 ** (shift // 2 + 9)), name, mode
    )


def flush(value, name="f32"):
    """.ftz"""
    if name == "f32" and abs(value) < 2.0**-126:
        return sign(value) * 0.0
    return value


def saturate(value):
    """.sat"""
    return min(value, 1.0) if value > 0 else 0.0


def to_integer(value, bits, signed, mode, from_double):
    """cvt to an integer type; `mode` is rni, rzi, rmi or rpi."""
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    if value != value:
        if not from_double and bits < 64:
            return 0
        return low if signed else 1 << bits - 1
    if math.isinf(value):
        return high if value > 0 else low
    exact = Fraction(value)
    whole = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode](exact)
    return max(low, min(high, whole))


def wrap(value, bits, signed):
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> bits - 1 else value


def bounds(bits, signed):
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
