"""Integer, logic, comparison and move instructions of the software device against Python integers.

Values: the ends of each type, what lies beside them, and random ones.
"""

from __future__ import annotations

import itertools
import operator

import numpy as np
import pytest
from number_models import bounds, wrap
from ptx_kernels import elementwise

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")


def width(name):
    return int("".join(c for c in name if c.isdigit()))


def dtype(name):
    kind = {"u": "u", "s": "i", "b": "u", "f": "f"}[name[0]]
    return np.dtype(f"{kind}{width(name) // 8}")


def values(name, count=40, seed=0):
    """Integers of a type: its ends and what is beside them, powers of two, random bits."""
    bits, signed = width(name), name[0] == "s"
    low, high = bounds(bits, signed)
    fixed = [low, low + 1, high, high - 1, 0, 1, 2, 3, 7, high // 2, high // 3, 1 << bits - 2]
    if signed:
        fixed += [-1, -2, -7, low // 2]
    rng = np.random.default_rng(seed)
    random = [wrap(int.from_bytes(rng.bytes(8), "little"), bits, signed) for _ in range(count)]
    shifts = rng.integers(0, bits, count).tolist()
    small = [wrap(v >> s, bits, signed) for v, s in zip(random, shifts, strict=True)]
    return fixed + random + small


def pairs(name):
    """Two arrays: every value with every other."""
    both = np.array(list(itertools.product(values(name, 8), values(name, 8, 1))), object)
    return list(both.T.astype(dtype(name)))


def check(body, inputs, name, expected):
    result = elementwise(body, inputs, [dtype(name)])
    wanted = np.array([wrap(int(e), width(name), name[0] == "s") for e in expected], object)
    wrong = np.flatnonzero(result.astype(object) != wanted)
    if len(wrong):
        k = wrong[0]
        arguments = [int(a.ravel()[k]) for a in np.broadcast_arrays(*inputs)]
        pytest.fail(f"{body} of {arguments}: {result[k]}, not {wanted[k]}; {len(wrong)} wrong")


def mapped(function, *arrays):
    return [function(*(int(v) for v in row)) for row in zip(*arrays, strict=True)]


def divide(a, b, name):
    if b == 0:
        return -1
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def remainder(a, b, name):
    return a if b == 0 else a - b * divide(a, b, name)


BINARY = {
    "add": lambda a, b, t: a + b,
    "sub": lambda a, b, t: a - b,
    "mul.lo": lambda a, b, t: a * b,
    "mul.hi": lambda a, b, t: a * b >> width(t),
    "div": divide,
    "rem": remainder,
    "min": lambda a, b, t: min(a, b),
    "max": lambda a, b, t: max(a, b),
}
TERNARY = {
    "mad.lo": lambda a, b, c, t: a * b + c,
    "mad.hi": lambda a, b, c, t: (a * b >> width(t)) + c,
    "sad": lambda a, b, c, t: c + abs(a - b),
}
BITS = {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("opcode", BINARY)
def test_of_two(opcode, name):
    a, b = pairs(name)
    model = BINARY[opcode]
    check(
        f"{opcode}.{name} %y0, %x0, %x1;",
        [a, b],
        name,
        mapped(lambda x, y: model(x, y, name), a, b),
    )


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("opcode", TERNARY)
def test_of_three(opcode, name):
    a, b = pairs(name)
    c = np.roll(a, 5)
    model = TERNARY[opcode]
    expected = mapped(lambda x, y, z: model(x, y, z, name), a, b, c)
    check(f"{opcode}.{name} %y0, %x0, %x1, %x2;", [a, b, c], name, expected)


@pytest.mark.parametrize("name", ["u16", "s16", "u32", "s32"])
def test_wide(name):
    a, b = pairs(name)
    wide = name[0] + str(2 * width(name))
    c = np.array(values(wide, 400)[: a.size], object).astype(dtype(wide))
    c = np.resize(c, a.size)
    check(f"mul.wide.{name} %y0, %x0, %x1;", [a, b], wide, mapped(operator.mul, a, b))
    expected = mapped(lambda x, y, z: x * y + z, a, b, c)
    check(f"mad.wide.{name} %y0, %x0, %x1, %x2;", [a, b, c], wide, expected)


@pytest.mark.parametrize("opcode", ["add", "sub"])
def test_saturated(opcode):
    a, b = pairs("s32")
    low, high = bounds(32, True)
    model = {"add": operator.add, "sub": operator.sub}[opcode]
    expected = mapped(lambda x, y: max(low, min(high, model(x, y))), a, b)
    check(f"{opcode}.sat.s32 %y0, %x0, %x1;", [a, b], "s32", expected)


@pytest.mark.parametrize("name", ["s16", "s32", "s64"])
def test_sign(name):
    a = np.array(values(name), dtype(name))
    check(f"neg.{name} %y0, %x0;", [a], name, mapped(operator.neg, a))
    check(f"abs.{name} %y0, %x0;", [a], name, mapped(abs, a))


@pytest.mark.parametrize("name", ["b16", "b32", "b64"])
def test_logic(name):
    a, b = pairs("u" + name[1:])
    for opcode, model in BITS.items():
        check(f"{opcode}.{name} %y0, %x0, %x1;", [a, b], name, mapped(model, a, b))
    check(f"not.{name} %y0, %x0;", [a], name, mapped(operator.inv, a))
    check(f"cnot.{name} %y0, %x0;", [a], name, mapped(lambda x: x == 0, a))
    check(f"mov.{name} %y0, %x0;", [a], name, mapped(int, a))


@pytest.mark.parametrize("name", [*INTEGERS, "f32", "f64"])
def test_move(name):
    a = np.array(values("u" + name[1:]), dtype("u" + name[1:]))
    np.testing.assert_array_equal(elementwise(f"mov.{name} %y0, %x0;", [a], [a.dtype]), a)


def test_predicates():
    a, b = (np.arange(8, dtype=np.uint32) >> k & 1 for k in (0, 1))
    head = "setp.ne.u32 %p0, %x0, 0; setp.ne.u32 %p1, %x1, 0; "
    for opcode, model in BITS.items():
        body = head + f"{opcode}.pred %p2, %p0, %p1; selp.u32 %y0, 1, 0, %p2;"
        check(body, [a, b], "u32", mapped(model, a, b))
    for opcode, expected in (("not", 1 - a), ("mov", a)):
        body = head + f"{opcode}.pred %p2, %p0; selp.u32 %y0, 1, 0, %p2;"
        check(body, [a, b], "u32", expected)
    # Only lanes under the guard are written.
    check(head + "@%p1 mov.pred %p0, 1; selp.u32 %y0, 1, 0, %p0;", [a, b], "u32", a | b)


@pytest.mark.parametrize("name", ["b16", "b32", "b64", *INTEGERS])
def test_shifts(name):
    bits = width(name)
    counts = [0, 1, 2, bits // 2, bits - 1, bits, bits + 1, 63, 64, 255, 256, 2**31, 2**32 - 1]
    unsigned = name if name[0] != "b" else "u" + name[1:]
    both = list(itertools.product(values(unsigned, 10), counts))
    a = np.array([v for v, _ in both], dtype(unsigned))
    n = np.array([c for _, c in both], np.uint32)
    right = mapped(lambda x, s: x >> min(s, bits), a, n)
    check(f"shr.{name} %y0, %x0, %x1;", [a, n], unsigned, right)
    if name[0] == "b":
        left = mapped(lambda x, s: x << s if s < bits else 0, a, n)
        check(f"shl.{name} %y0, %x0, %x1;", [a, n], unsigned, left)


@pytest.mark.parametrize("wrapping", ["wrap", "clamp"])
@pytest.mark.parametrize("direction", ["l", "r"])
def test_funnel_shift(direction, wrapping):
    low, high = pairs("u32")
    n = np.resize(np.array([0, 1, 5, 31, 32, 33, 40, 64, 2**32 - 1], np.uint32), low.size)

    def model(lo, hi, count):
        count = count % 32 if wrapping == "wrap" else min(count, 32)
        both = hi << 32 | lo
        return (both << count >> 32 if direction == "l" else both >> count) & 0xFFFFFFFF

    body = f"shf.{direction}.{wrapping}.b32 %y0, %x0, %x1, %x2;"
    check(body, [low, high, n], "u32", mapped(model, low, high, n))


def bit(value, k):
    return value >> k & 1


@pytest.mark.parametrize("name", ["u32", "s32", "u64", "s64"])
def test_bit_fields(name):
    bits, signed = width(name), name[0] == "s"
    places = [0, 1, 5, bits - 1, bits, bits + 3, 100, 255, 256]
    cases = list(itertools.product(values(name, 3), places, [0, 1, 4, bits - 1, bits, 200, 255]))
    a = np.array([c[0] for c in cases], dtype(name))
    position, length = (np.array([c[k] for c in cases], np.uint32) for k in (1, 2))

    def extract(x, p, n):
        x, p, n = x & (1 << bits) - 1, p & 255, n & 255
        fill = bit(x, min(p + n - 1, bits - 1)) if signed and n else 0
        inside = [bit(x, p + k) if k < n and p + k < bits else fill for k in range(bits)]
        return sum(b << k for k, b in enumerate(inside))

    expected = mapped(extract, a, position, length)
    check(f"bfe.{name} %y0, %x0, %x1, %x2;", [a, position, length], name, expected)
    if signed:
        return
    b = np.roll(a, 77)

    def insert(x, y, p, n):
        p, n = p & 255, n & 255
        result = [bit(x, k - p) if p <= k < p + n else bit(y, k) for k in range(bits)]
        return sum(v << k for k, v in enumerate(result))

    expected = mapped(insert, a, b, position, length)
    body = f"bfi.b{bits} %y0, %x0, %x1, %x2, %x3;"
    check(body, [a, b, position, length], name, expected)


@pytest.mark.parametrize("bits", [32, 64])
def test_counting(bits):
    a = np.array(values(f"u{bits}"), dtype(f"u{bits}"))
    check(f"popc.b{bits} %y0, %x0;", [a], "u32", mapped(lambda x: bin(x).count("1"), a))
    check(f"clz.b{bits} %y0, %x0;", [a], "u32", mapped(lambda x: bits - x.bit_length(), a))
    reverse = mapped(lambda x: int(f"{x:0{bits}b}"[::-1], 2), a)
    check(f"brev.b{bits} %y0, %x0;", [a], f"u{bits}", reverse)
    for name in (f"u{bits}", f"s{bits}"):
        b = a.astype(dtype(name))

        def highest(x):
            return (~x if x < 0 else x).bit_length() - 1

        check(f"bfind.{name} %y0, %x0;", [b], "u32", mapped(highest, b))
        shift = mapped(lambda x: -1 if highest(x) < 0 else bits - 1 - highest(x), b)
        check(f"bfind.shiftamt.{name} %y0, %x0;", [b], "u32", shift)


ATOMICS = {
    "add": operator.add,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "exch": lambda old, b: b,
    "min": min,
    "max": max,
    "inc": lambda old, b: 0 if old >= b else old + 1,
    "dec": lambda old, b: b if old == 0 or old > b else old - 1,
}
ATOMIC_KINDS = dict.fromkeys(("and", "or", "xor", "exch"), "b32 b64")
ATOMIC_KINDS |= {"inc": "u32", "dec": "u32", "add": "u32 s32 u64"}


@pytest.mark.parametrize("order", " .relaxed.gpu .acquire.sys .release.cta .acq_rel.gpu".split(" "))
@pytest.mark.parametrize("opcode", ATOMICS)
def test_atomics(opcode, order):
    """`atom` returns what was there; `red` returns nothing, and cannot acquire."""
    for kind in ATOMIC_KINDS.get(opcode, "u32 s32 u64 s64").split():
        name = kind.replace("b", "u")
        a, b = pairs(name)
        expected = mapped(ATOMICS[opcode], a, b)
        suffix = f"{order}.global.{opcode}.{kind}"
        updated = f"ld.relaxed.gpu.global.b{width(name)} %y0, [%a0];"
        check(f"atom{suffix} %y0, [%a0], %x1;", [a, b], name, mapped(lambda x, _: x, a, b))
        check(f"atom{suffix} _, [%a0], %x1; {updated}", [a, b], name, expected)
        if opcode != "exch" and "acq" not in order:
            check(f"red{suffix} [%a0], %x1; {updated}", [a, b], name, expected)


MODES = {
    "f4e": ["3210", "4321", "5432", "6543"],
    "b4e": ["5670", "6701", "7012", "0123"],
    "rc8": ["0000", "1111", "2222", "3333"],
    "ecl": ["3210", "3211", "3222", "3333"],
    "ecr": ["0000", "1110", "2210", "3210"],
    "rc16": ["1010", "3232", "1010", "3232"],
}


def test_permute():
    a, b = pairs("u32")
    selector = np.resize(np.array(values("u32", 60), np.uint32), a.size)

    def model(x, y, s):
        data, result = (y << 32 | x).to_bytes(8, "little"), []
        for k in range(4):
            index = s >> 4 * k & 15
            byte = data[index & 7]
            result.append((255 if byte & 128 else 0) if index & 8 else byte)
        return int.from_bytes(bytes(result), "little")

    body = "prmt.b32{} %y0, %x0, %x1, %x2;"
    check(body.format(""), [a, b, selector], "u32", mapped(model, a, b, selector))
    for mode, table in MODES.items():
        expected = mapped(lambda x, y, s: model(x, y, int(table[s & 3], 16)), a, b, selector)  # noqa: B023
        check(body.format("." + mode), [a, b, selector], "u32", expected)


@pytest.mark.parametrize("table", [0, 0x80, 0xFE, 0x96, 0xE8, 0xCA, 0xFF, 0x2A])
def test_logic_of_three(table):
    a, b = pairs("u32")
    c = np.roll(a, 3)

    def model(x, y, z):
        index = [bit(x, k) << 2 | bit(y, k) << 1 | bit(z, k) for k in range(32)]
        return sum(bit(table, i) << k for k, i in enumerate(index))

    check(f"lop3.b32 %y0, %x0, %x1, %x2, {table};", [a, b, c], "u32", mapped(model, a, b, c))


@pytest.mark.parametrize("kinds", list(itertools.product(("u32", "s32"), repeat=2)), ids=".".join)
def test_dot_of_bytes(kinds):
    a, b = pairs("u32")
    c = np.roll(a, 3)

    def parts(x, kind):
        return [wrap(byte, 8, kind[0] == "s") for byte in x.to_bytes(4, "little")]

    def model(x, y, z):
        return z + sum(p * q for p, q in zip(parts(x, kinds[0]), parts(y, kinds[1]), strict=True))

    body = f"dp4a.{kinds[0]}.{kinds[1]} %y0, %x0, %x1, %x2;"
    check(body, [a, b, c], "u32", mapped(model, a, b, c))
