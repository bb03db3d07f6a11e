"""Integers of several registers: carries that one instruction leaves and the next one takes."""

from __future__ import annotations

import itertools
import operator

import numpy as np
import pytest
from ptx_kernels import elementwise
from test_opcodes import check, mapped, pairs


def wide_values(bits, parts):
    """Pairs of integers that take several registers."""
    ones = (1 << bits * parts) - 1
    rng = np.random.default_rng(parts)
    fixed = [0, 1, ones, ones - 1, 1 << bits, (1 << bits) - 1, 1 << bits * parts - 1, ones >> 1]
    random = [int.from_bytes(rng.bytes(bits * parts // 8), "little") for _ in range(12)]
    return list(itertools.product(fixed + random, repeat=2))


@pytest.mark.parametrize("kind", ["u", "s"])
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("opcode", ["add", "sub"])
def test_carry_chain(opcode, bits, kind):
    cases, name = wide_values(bits, 3), f"{kind}{bits}"
    split = [
        np.array([c[side] >> bits * k & (1 << bits) - 1 for c in cases], object).astype(
            f"u{bits // 8}"
        )
        for side in (0, 1)
        for k in range(3)
    ]
    body = f"""{opcode}.cc.{name} %y0, %x0, %x3;
      {opcode}c.cc.{name} %y1, %x1, %x4;
      {opcode}c.{name} %y2, %x2, %x5;"""
    result = elementwise(body, split, [f"u{bits // 8}"] * 3)
    model = {"add": operator.add, "sub": operator.sub}[opcode]
    for k, (a, b) in enumerate(cases):
        got = sum(int(r[k]) << bits * j for j, r in enumerate(result))
        assert got == model(a, b) & (1 << 3 * bits) - 1, (a, b)


@pytest.mark.parametrize("bits", [32, 64])
def test_long_multiplication(bits):
    """The product of two registers by two, as the CUDA headers write it."""
    cases, name = wide_values(bits, 2), f"u{bits}"
    split = [
        np.array([c[side] >> bits * k & (1 << bits) - 1 for c in cases], object).astype(
            f"u{bits // 8}"
        )
        for side in (0, 1)
        for k in range(2)
    ]
    body = f"""
      mul.lo.{name} %y0, %x0, %x2;
      mul.hi.{name} %y1, %x0, %x2;
      mad.lo.cc.{name} %y1, %x0, %x3, %y1;
      madc.hi.{name} %y2, %x0, %x3, 0;
      mad.lo.cc.{name} %y1, %x1, %x2, %y1;
      madc.hi.cc.{name} %y2, %x1, %x2, %y2;
      madc.hi.{name} %y3, %x1, %x3, 0;
      mad.lo.cc.{name} %y2, %x1, %x3, %y2;
      addc.{name} %y3, %y3, 0;"""
    result = elementwise(body, split, [f"u{bits // 8}"] * 4)
    for k, (a, b) in enumerate(cases):
        assert sum(int(r[k]) << bits * j for j, r in enumerate(result)) == a * b, (a, b)


def test_only_cc_changes_the_carry():
    a, b = pairs("u32")
    body = """add.cc.u32 %r0, %x0, %x1; addc.u32 %r1, 0xffffffff, 1; add.u32 %r1, %r1, %r1;
      madc.lo.u32 %r1, %r1, %r1, 0xffffffff; addc.u32 %y0, 0, 0;"""
    check(body, [a, b], "u32", mapped(lambda x, y: x + y >> 32, a, b))


def test_carry_of_products():
    a, b = pairs("u32")
    c = np.roll(a, 9)
    body = """mad.hi.cc.u32 %y0, %x0, %x1, %x2; addc.u32 %y1, 0, 0;
      add.cc.u32 %r0, %x0, %x1; madc.lo.cc.u32 %y2, %x0, %x1, %x2; addc.cc.u32 %y3, 0, 0;"""
    result = elementwise(body, [a, b, c], ["u4"] * 4)
    for k, (x, y, z) in enumerate(zip(a.tolist(), b.tolist(), c.tolist(), strict=True)):
        total = (x * y >> 32) + z
        low = (x * y & 0xFFFFFFFF) + z + (x + y >> 32)
        expected = [total & 0xFFFFFFFF, total >> 32, low & 0xFFFFFFFF, low >> 32]
        assert [int(r[k]) for r in result] == expected
