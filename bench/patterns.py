"""Score expressions and masks that are measured and drawn, each from one formula for all libraries.

`score` and `visible` take arrays of indices, of NumPy, CuPy or PyTorch, that broadcast; so they are
also what FlexAttention calls `score_mod` and `mask_mod`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

TILE = 128  # queries and keys of a tile of a block mask
DOCUMENTS = 8
DISTANCES = 128  # T5's decoder tells no larger ones apart
CAP, SLOPE = 30.0, 0.05
# Of a window beside a prefix: a sequence is so many times longer.
WINDOW, PREFIX = 8, 16
CHOSEN = 0.25  # of all tiles, at random

# What `cuattn.attention` is told; the array that comes with a pattern is its `table`.
SCORES = {
    "t5": "s + table[h, q - k]",
    "documents": "where(table[b, q] == table[b, k], s, -inf)",
    "cap": f"{CAP} * tanh(s / {CAP}) - {SLOPE} * abs(q - k)",
}
MASKS = ("documents", "prefix", "random")


def named(shape: dict[str, int]) -> str:
    """The pattern of a cell: the one flag that is set."""
    return next(name for name in (*SCORES, *MASKS) if shape.get(name))


def documents(rng: np.random.Generator, size: int) -> np.ndarray:
    """The document of each token: they lie end to end, of random lengths."""
    ends = np.sort(rng.integers(0, size, DOCUMENTS - 1))
    return np.searchsorted(ends, np.arange(size), side="right").astype(np.int32)


def score_tables(pattern: str, shape: dict[str, int]) -> list[np.ndarray]:
    """The array of an expression, or none; the same ones for every cell of this shape."""
    rng = np.random.default_rng(0)
    if pattern == "t5":
        return [rng.standard_normal((shape["heads"], DISTANCES)).astype(np.float32)]
    if pattern == "documents":
        return [np.stack([documents(rng, shape["seqlen_k"]) for _ in range(shape["batch"])])]
    return []


def score(pattern: str, xp: Any, table: Any, s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    """What a score becomes; `xp` is the library."""
    if pattern == "t5":
        return s + table[h, xp.clip(q - k, 0, DISTANCES - 1)]
    if pattern == "documents":
        return xp.where(table[b, q] == table[b, k], s, -np.inf)
    return CAP * xp.tanh(s / CAP) - SLOPE * abs(q - k)


def mask_table(pattern: str, size: int) -> np.ndarray:
    """What a mask is made from: documents, or which tiles are chosen."""
    rng = np.random.default_rng(0)
    if pattern == "documents":
        return documents(rng, size)
    tiles = -(-size // TILE)
    return (rng.random((tiles, tiles)) < CHOSEN) | np.eye(tiles, dtype=bool)


def visible(pattern: str, table: Any, size: int, q: Any, k: Any) -> Any:
    """Whether query q sees key k, in a sequence of `size` tokens."""
    if pattern == "documents":
        return (table[q] == table[k]) & (k <= q)
    if pattern == "prefix":
        return (k <= q) & ((q - k < size // WINDOW) | (k < size // PREFIX))
    return table[q // TILE, k // TILE]


def mask(pattern: str, xp: Any, table: Any, size: int) -> Any:
    """All of it."""
    places = xp.arange(size)
    return visible(pattern, table, size, places[:, None], places[None])


def pairs(pattern: str, size: int) -> int:
    """How many keys all queries see, by a few queries at a time."""
    table, places = mask_table(pattern, size), np.arange(size)
    starts = range(0, size, TILE)
    rows = (visible(pattern, table, size, places[i : i + TILE, None], places) for i in starts)
    return sum(int(np.count_nonzero(part)) for part in rows)
