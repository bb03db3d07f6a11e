"""Floating-point arithmetic and comparisons of the software device against exact fractions.

Values: zeros, subnormals, the ends of each format and what lies beside them, infinities, NaNs with
payloads, numbers halfway between two of another format, and random bits.
"""

from __future__ import annotations

import itertools
import math

import number_models as models
import numpy as np
import pytest
from number_models import FORMATS, MODES, decode, encode, flush, saturate
from ptx_kernels import elementwise

SIZE = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


def bits_of(name, random=30, seed=0):
    """Bit patterns of a format."""
    mantissa, bias, dtype, _ = FORMATS[name]
    top, hidden = SIZE[name] - 1, 1 << mantissa
    one, infinity = bias << mantissa, (2 * bias + 1) << mantissa
    positive = [0, 1, 2, hidden - 1, hidden, hidden + 1, one, one + 1, one - 1, one + hidden // 2]
    positive += [
        infinity - 1,
        infinity - 2,
        infinity,
        infinity | hidden >> 1,
        infinity | 5,
        3 * hidden,
    ]
    positive += [encode(v, name) for v in (2.0, 3.0, 0.5, 1.5, 2.5, 100.0)]
    fixed = positive + [b | 1 << top for b in positive]
    drawn = np.random.default_rng(seed).integers(0, 1 << top + 1, random, dtype=np.uint64)
    return np.concatenate([np.array(fixed, np.uint64), drawn]).astype(dtype)


def combinations(name, operands, seed=0):
    if operands == 1:
        return [bits_of(name, 400, seed)]
    some = bits_of(name, 8, seed)
    pairs = np.array(list(itertools.product(some, repeat=2)), some.dtype)
    rng = np.random.default_rng(seed)
    # Beside them, numbers of one magnitude, whose sums and quotients are rounded.
    near = (
        rng.integers(0, 1 << 62, (600, operands), dtype=np.uint64) % (40 << FORMATS[name][0])
    ).astype(some.dtype)
    near += some.dtype.type((FORMATS[name][1] - 20) << FORMATS[name][0])
    near ^= rng.integers(0, 2, near.shape).astype(some.dtype) << some.dtype.type(SIZE[name] - 1)
    if operands == 3:
        third = rng.choice(some, len(pairs))
        # The negative of a product, rounded: what is left of the sum is the error of the product.
        product = [
            encode(-models.mul(decode(a, name), decode(b, name), name, "rn"), name)
            for a, b, _ in near[:300]
        ]
        near[:300, 2] = np.array(product, some.dtype)
        pairs = np.column_stack([pairs, third])
    return list(np.concatenate([pairs, near]).T.copy())


def expect(body, inputs, outputs, expected):
    """Compares bits; NaN of an f64 counts by its sign and payload too."""
    result = elementwise(body, inputs, [outputs])
    wanted = np.array(expected, result.dtype)
    wrong = np.flatnonzero(result != wanted)
    if len(wrong):
        k = wrong[0]
        arguments = [f"{int(a[k]):#x}" for a in inputs]
        got, right = int(result[k]), int(wanted[k])
        pytest.fail(f"{body} of {arguments}: {got:#x}, not {right:#x}; {len(wrong)} wrong")


def nan_of(operands, name):
    """The NaN of a result: of .f64 the first that came in, made quiet."""
    if name == "f64":
        for bits in operands:
            if decode(bits, name) != decode(bits, name):
                return int(bits) | 1 << 51
    return FORMATS[name][3]


OPERATIONS = {
    "add": (models.add, 2),
    "sub": (models.sub, 2),
    "mul": (models.mul, 2),
    "div": (models.div, 2),
    "fma": (models.fma, 3),
    "rcp": (models.rcp, 1),
    "sqrt": (models.sqrt, 1),
}


def modifiers_of(operation, name):
    if name == "f64":
        return ("",)
    return ("", ".ftz") if operation in ("div", "rcp", "sqrt") else ("", ".ftz", ".sat", ".ftz.sat")


ARITHMETIC = [
    (operation, name, mode, modifiers)
    for operation, name, mode in itertools.product(OPERATIONS, ("f32", "f64"), MODES)
    for modifiers in modifiers_of(operation, name)
]


@pytest.mark.parametrize(("operation", "name", "mode", "modifiers"), ARITHMETIC)
def test_arithmetic(operation, name, mode, modifiers):
    model, operands = OPERATIONS[operation]
    inputs = combinations(name, operands)
    expected = []
    for row in zip(*inputs, strict=True):
        numbers = [decode(b, name) for b in row]
        if "ftz" in modifiers:
            numbers = [flush(v) for v in numbers]
        value = model(*numbers, name, mode)
        if "ftz" in modifiers:
            value = flush(value)
        if "sat" in modifiers:
            value = saturate(value)
        expected.append(nan_of(row, name) if value != value else encode(value, name))
    sources = ", ".join(f"%x{k}" for k in range(operands))
    body = f"{operation}.{mode}{modifiers}.{name} %y0, {sources};"
    expect(body, inputs, inputs[0].dtype, expected)
    if operation in ("add", "sub", "mul") and mode == "rn":  # the default
        expect(body.replace(".rn", ""), inputs, inputs[0].dtype, expected)
    if operation == "fma":
        expect(body.replace("fma", "mad"), inputs, inputs[0].dtype, expected)


SELECTING = ("", ".ftz", ".NaN", ".ftz.NaN", ".xorsign.abs", ".ftz.NaN.xorsign.abs")


@pytest.mark.parametrize(("name", "modifiers"), [("f64", ""), *(("f32", m) for m in SELECTING)])
@pytest.mark.parametrize("operation", ["min", "max"])
def test_minimum_and_maximum(operation, name, modifiers):
    inputs = combinations(name, 2)
    expected = []
    for row in zip(*inputs, strict=True):
        a, b = (flush(decode(v, name)) if "ftz" in modifiers else decode(v, name) for v in row)
        sign = -1 if (int(row[0]) ^ int(row[1])) >> SIZE[name] - 1 else 1  # a NaN has one too
        if "abs" in modifiers:
            a, b = abs(a), abs(b)
        pick = min if operation == "min" else max
        if a != a or b != b:
            value = math.nan if "NaN" in modifiers or (a != a and b != b) else b if a != a else a
        else:
            value = pick((a, b), key=lambda v: (v, models.sign(v)))
        if value != value:
            expected.append(nan_of(row, name))
        else:
            expected.append(encode(value * sign if "abs" in modifiers else value, name))
    expect(f"{operation}{modifiers}.{name} %y0, %x0, %x1;", inputs, inputs[0].dtype, expected)


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_signs_keep_payloads(name):
    a, b = combinations(name, 2)
    top = 1 << SIZE[name] - 1
    rows = list(zip(a.tolist(), b.tolist(), strict=True))
    dtype = a.dtype
    expect(f"neg.{name} %y0, %x0;", [a], dtype, [x ^ top for x, _ in rows])
    expect(f"abs.{name} %y0, %x0;", [a], dtype, [x & ~top for x, _ in rows])
    signs = [(x & top) | (y & ~top) for x, y in rows]
    expect(f"copysign.{name} %y0, %x0, %x1;", [a, b], dtype, signs)
    if name == "f32":
        flushed = [x & top if x & 0x7F800000 == 0 else x for x, _ in rows]
        expect("neg.ftz.f32 %y0, %x0;", [a], dtype, [x ^ top for x in flushed])
        expect("abs.ftz.f32 %y0, %x0;", [a], dtype, [x & ~top for x in flushed])


# -- comparisons ---------------------------------------------------------------------------------

ORDERED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
ALIASES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def comparison(name, a, b):
    unordered = a != a or b != b
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    if name in ORDERED:
        return not unordered and ORDERED[name](a, b)
    if name in ALIASES:
        return ORDERED[ALIASES[name]](a, b)
    return unordered or ORDERED[name[:-1]](a, b)


FLOATING = (*ORDERED, *(c + "u" for c in ORDERED), "num", "nan")
COMPARED = [
    *((c, t) for c in FLOATING for t in ("f32", "f64", "ftz.f32")),
    *((c, t) for c in (*ORDERED, *ALIASES) for t in ("u16", "u32", "u64")),
    *((c, t) for c in ORDERED for t in ("s16", "s32", "s64")),
    *((c, t) for c in ("eq", "ne") for t in ("b16", "b32", "b64")),
]


def operands_of(name):
    kind = name.rsplit(".", 1)[-1]
    if kind[0] == "f":
        a, b = combinations(kind, 2)
        numbers = [[decode(v, kind) for v in side] for side in (a, b)]
        if "ftz" in name:
            numbers = [[flush(v) for v in side] for side in numbers]
        return a, b, list(zip(*numbers, strict=True))
    bits, signed = int(kind[1:]), kind[0] == "s"
    low, high = models.bounds(bits, signed)
    some = [low, low + 1, -1 if signed else high - 1, 0, 1, high, high // 2, high // 2 + 1]
    rows = list(itertools.product(some, repeat=2))
    a, b = np.array(rows, object).astype(f"{'i' if signed else 'u'}{bits // 8}").T.copy()
    return a, b, rows


@pytest.mark.parametrize(("name", "kind"), COMPARED)
def test_comparison(name, kind):
    a, b, numbers = operands_of(kind)
    yes = np.array([comparison(name, x, y) for x, y in numbers])
    other = np.arange(a.size, dtype=np.uint32) % 3 == 0
    flushing, last = "ftz." if "ftz" in kind else "", kind.rsplit(".", 1)[-1]
    body = f"""setp.ne.u32 %p2, %x2, 0;
      setp.{name}.{kind} %p0|%p1, %x0, %x1; selp.u32 %y0, 1, 0, %p0; selp.u32 %y1, 1, 0, %p1;
      setp.{name}.and.{kind} %p0|%p1, %x0, %x1, %p2;
      selp.u32 %y2, 1, 0, %p0; selp.u32 %y3, 1, 0, %p1;
      setp.{name}.or.{kind} %p0, %x0, %x1, !%p2; selp.u32 %y4, 1, 0, %p0;
      setp.{name}.xor.{kind} %p0, %x0, %x1, %p2; selp.u32 %y5, 1, 0, %p0;
      set.{name}.{flushing}u32.{last} %y6, %x0, %x1;
      set.{name}.or.{flushing}f32.{last} %y7, %x0, %x1, %p2;"""
    results = elementwise(body, [a, b, other.astype(np.uint32)], ["u4"] * 8)
    expected = [yes, ~yes, yes & other, ~yes & other, yes | ~other, yes ^ other]
    for k, wanted in enumerate(expected):
        np.testing.assert_array_equal(results[k], wanted, str(k))
    np.testing.assert_array_equal(results[6], np.where(yes, 0xFFFFFFFF, 0))
    np.testing.assert_array_equal(results[7], np.where(yes | other, 0x3F800000, 0))


@pytest.mark.parametrize(("kind", "one"), [("f16", 0x3C00), ("bf16", 0x3F80)])
def test_comparison_of_halves(kind, one):
    some = bits_of(kind, 8, 0)
    a, b = np.array(list(itertools.product(some, repeat=2)), some.dtype).T.copy()
    numbers = [(decode(x, kind), decode(y, kind)) for x, y in zip(a, b, strict=True)]
    for name in ("lt", "geu", "eq", "neu", "num", "nan"):
        yes = np.array([comparison(name, x, y) for x, y in numbers])
        result = elementwise(f"set.{name}.{kind}.{kind} %y0, %x0, %x1;", [a, b], ["u2"])
        np.testing.assert_array_equal(result, np.where(yes, one, 0))


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_classes(name):
    a = bits_of(name)
    numbers = np.array([decode(v, name) for v in a])
    smallest = 2.0 ** (1 - FORMATS[name][1])
    finite, nan = np.isfinite(numbers), np.isnan(numbers)
    subnormal = (np.abs(numbers) < smallest) & (numbers != 0)
    expected = {
        "finite": finite,
        "infinite": np.isinf(numbers),
        "number": ~nan,
        "notanumber": nan,
        "normal": finite & (np.abs(numbers) >= smallest),
        "subnormal": subnormal,
    }
    for what, wanted in expected.items():
        body = f"testp.{what}.{name} %p0, %x0; selp.u32 %y0, 1, 0, %p0;"
        np.testing.assert_array_equal(elementwise(body, [a], ["u4"]), wanted, what)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_selection(bits):
    a = np.arange(200, dtype=f"u{bits // 8}") + 50
    b = a[::-1].copy()
    kinds = [f"{k}{bits}" for k in "bus"] + ([f"f{bits}"] if bits > 16 else [])
    signs = np.arange(200, dtype=np.int32) - 100
    floats = np.resize(bits_of("f32"), 200)
    numbers = np.array([decode(v, "f32") for v in floats])
    positive = numbers >= 0
    flushed = np.array([flush(v) for v in numbers]) >= 0
    for kind in kinds:
        body = f"""setp.lt.s32 %p0, %x2, 3;
          selp.{kind} %y0, %x0, %x1, %p0; selp.{kind} %y1, %x0, %x1, !%p0;"""
        first, second = elementwise(body, [a, b, signs], [a.dtype] * 2)
        np.testing.assert_array_equal(first, np.where(signs < 3, a, b))
        np.testing.assert_array_equal(second, np.where(signs < 3, b, a))
        by_sign = elementwise(f"slct.{kind}.s32 %y0, %x0, %x1, %x2;", [a, b, signs], [a.dtype])
        np.testing.assert_array_equal(by_sign, np.where(signs >= 0, a, b))
        by_float = elementwise(f"slct.{kind}.f32 %y0, %x0, %x1, %x2;", [a, b, floats], [a.dtype])
        np.testing.assert_array_equal(by_float, np.where(positive, a, b))
        by_float = elementwise(
            f"slct.ftz.{kind}.f32 %y0, %x0, %x1, %x2;", [a, b, floats], [a.dtype]
        )
        np.testing.assert_array_equal(by_float, np.where(flushed, a, b))
