"""Gumbel noise of NumPy arrays, in the bits of `cuattn.reference.sample`, whose names are here.

A counter of Philox gives the noise of four elements. It costs 20 operations of NumPy an element,
and the logarithm of a logarithm 40 more: these are for elements that may be drawn, see numpy_draws.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays.blocks import FLOAT32

LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
LN2 = np.float32(0.6931472)
# Minimax polynomials, from the constant up: -log(1 - v / 2) / v and log(1 + x) / x.
EXPONENTIAL = np.array(
    [
        *(0.49999994, 0.12500913, 0.04148284, 0.017015588),
        *(0.0011882656, 0.012272065, -0.008449318, 0.0046285773),
    ],
    FLOAT32,
)
LOGARITHM = np.array(
    [
        *(1, -0.49999988, 0.33334187, -0.25002074, 0.19956833),
        *(-0.16562402, 0.14952284, -0.14366786, 0.0872224),
    ],
    FLOAT32,
)
MOST_NOISE = np.float32(32 * np.log(2) + 1e-4)  # -log(u), u = 2**-32, and more than its roundings
NUMBERS = np.uint64


class Streams(NamedTuple):
    """Seeds, offsets and numbers of rows: uint64, one for all or (rows, 1)."""

    seed: Any
    offset: Any
    row: Any

    def words(self, quads: np.ndarray) -> list[np.ndarray]:
        """The four words of each counter whose first word these are."""
        R0, L0 = quads, self.row & LOW
        R1, L1 = self.offset & LOW, (self.offset >> HALF) ^ (self.row >> HALF)
        k0, k1 = self.seed & LOW, self.seed >> HALF
        shape = np.broadcast_shapes(quads.shape, np.shape(k0), np.shape(R1), np.shape(L0))
        p0, p1 = np.empty(shape, NUMBERS), np.empty(shape, NUMBERS)
        for i in range(10):
            if i < 3:  # at first few words depend on both row and column
                p0, p1 = R0 * FACTORS[0], R1 * FACTORS[1]
                R0, L0, R1, L1 = (p1 >> HALF) ^ L0 ^ k0, p1 & LOW, (p0 >> HALF) ^ L1 ^ k1, p0 & LOW
                if i == 2:
                    words = [np.array(np.broadcast_to(word, shape)) for word in (R0, L0, R1, L1)]
                    R0, L0, R1, L1 = words
                    p0, p1 = np.empty(shape, NUMBERS), np.empty(shape, NUMBERS)
            else:
                np.multiply(R0, FACTORS[0], out=p0)
                np.multiply(R1, FACTORS[1], out=p1)
                np.right_shift(p1, HALF, out=R0)
                np.right_shift(p0, HALF, out=R1)
                R0 ^= L0
                R1 ^= L1
                R0 ^= k0
                R1 ^= k1
                np.bitwise_and(p1, LOW, out=L0)
                np.bitwise_and(p0, LOW, out=L1)
            k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
        return [R0, L0, R1, L1]

    def between(self, begin: int, end: int) -> np.ndarray:
        """Words of elements next to each other, (rows, end - begin) uint32."""
        first, last = begin // 4, -(-end // 4)
        parts = self.words(np.arange(first, last, dtype=NUMBERS)[None])
        found = np.empty((*parts[0].shape, 4), np.uint32)
        for i, part in enumerate(parts):
            found[..., i] = part
        return found.reshape(len(found), -1)[:, begin - 4 * first : end - 4 * first]

    def at(self, index: np.ndarray) -> np.ndarray:
        """Words of some elements of each row, (rows, n) uint32."""
        parts = self.words(index.astype(NUMBERS) >> np.uint64(2))
        return np.choose(index & 3, parts).astype(np.uint32)


def gumbel(word: np.ndarray) -> np.ndarray:
    """``-log(-log(1 - (word + 1/2) / 2**32))`` in float32."""
    bits = (~word | np.uint32(1)).astype(np.float64).view(np.int64)
    ones = (1023 + 31 - (bits >> 52)).astype(np.uint32)  # that it begins with
    word = word << ones
    word <<= np.uint32(1)
    word |= np.uint32(1) << ones
    v = word.astype(FLOAT32)
    v *= np.float32(2.0**-32)
    E = _polynomial(EXPONENTIAL, v)
    E *= v
    E += ones.astype(FLOAT32) * LN2
    bits = E.view(np.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # of E / sqrt(1/2)
    x = (bits - (exponent << 23)).view(FLOAT32)
    x -= np.float32(1)
    g = _polynomial(LOGARITHM, x)
    g *= x
    g += exponent.astype(FLOAT32) * LN2
    return np.negative(g, out=g)


def _polynomial(coefficients: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Horner's rule; every operation is rounded."""
    y = np.full(x.shape, coefficients[-1])
    for c in coefficients[-2::-1]:
        y *= x
        y += c
    return y


def bounds(word: np.ndarray) -> np.ndarray:
    """What is not less than `gumbel`, and not much more where that is large: ``-log(u)``."""
    u = word.astype(FLOAT32)
    u += np.float32(0.5)
    np.log(u, out=u)
    return np.subtract(MOST_NOISE, u, out=u)
