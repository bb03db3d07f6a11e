"""A picture of block masks: what is hidden, the tiles of their lists, and those that a kernel runs.

    python -m bench.counted.block_tiles --out FILE [--length N]

The tiles that are drawn as run are those that the lists name and that a causal mask leaves. A
kernel on the emulator has to run these and no others: each row of tiles is a sequence of its own,
whose keys are memory that nothing has written but for these tiles, so that another one cannot be
read; and the products are as many as those of all of them. Exit code 1 if they are not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cuattn
from bench import inside, patterns
from bench.patterns import TILE
from bench.report import figures

HEAD_DIM = 64
MMA = 16 * 8 * 16  # products of an instruction, of float16
EMPTY, PARTIAL, FULL = range(3)


class Tiles(NamedTuple):
    """A mask (N, N), its tiles, and which of them run."""

    title: str
    mask: np.ndarray
    is_causal: bool
    kinds: np.ndarray  # EMPTY, PARTIAL or FULL
    run: np.ndarray  # bool


def tiles(title: str, mask: np.ndarray, is_causal: bool = False) -> Tiles:
    """What the lists of a mask say, and what is left of them."""
    lists = cuattn.block_mask(mask, block=(TILE, TILE))
    kinds = np.full(lists.full.shape, EMPTY)
    for row, count in enumerate(lists.counts):
        listed = lists.indices[row, :count]
        kinds[row, listed] = np.where(lists.full[row, :count], FULL, PARTIAL)
    run = kinds != EMPTY
    return Tiles(title, mask, is_causal, kinds, np.tril(run) if is_causal else run)


def examples(length: int) -> list[Tiles]:
    """One of each pattern; documents are causal by an option of the call, not by their mask."""
    table = {name: patterns.mask_table(name, length) for name in patterns.MASKS}
    ids = table["documents"]
    whole = {name: patterns.mask(name, np, table[name], length) for name in patterns.MASKS}
    return [
        tiles("documents, is_causal=True", ids[:, None] == ids, is_causal=True),
        tiles("causal window beside a prefix", whole["prefix"]),
        tiles("random blocks", whole["random"]),
    ]


def padded(shown: Tiles) -> np.ndarray:
    """The mask, with nothing behind it up to the end of the last tiles."""
    behind = [(0, tiles * TILE - len(shown.mask)) for tiles in shown.run.shape]
    return np.pad(shown.mask, behind)


def difference(shown: Tiles) -> str:
    """What a kernel does that `shown.run` does not say; nothing if they agree."""
    import emulator

    rng, (rows, columns) = np.random.default_rng(), shown.run.shape
    half = inside.dtype_of("float16")  # `inside` also makes `import emulator` find it
    q = rng.standard_normal((rows, 1, TILE, HEAD_DIM)).astype(half)
    k, v = (emulator.empty((rows, 1, columns * TILE, HEAD_DIM), half) for _ in range(2))
    for row, column in np.argwhere(shown.run):
        keys = slice(column * TILE, column * TILE + TILE)
        for array in (k, v):
            array[row, 0, keys] = rng.standard_normal((TILE, HEAD_DIM)).astype(half)
    lists = cuattn.block_mask(padded(shown).reshape(rows, 1, TILE, -1), block=(TILE, TILE))
    places = np.arange(rows) * TILE
    try:
        with emulator.activate("sm_80") as runtime:
            options = {"is_causal": shown.is_causal, "q_offset": places}
            cuattn.attention(q, k, v, block_mask=lists, **options)
    except emulator.EmulatorError as error:
        return f"another tile is read: {error}"
    one = TILE * TILE * 2 * HEAD_DIM // MMA
    found = runtime.total().mma / one
    return "" if found == shown.run.sum() else f"{found} tiles run, not {shown.run.sum()}"


def figure(found: Sequence[Tiles]) -> Any:
    """All of them side by side."""
    length = len(found[0].mask)
    head = (
        "Block masks: tiles that are neither loaded nor multiplied",
        f"{length} tokens, tiles of {TILE} × {TILE}; rows: queries, columns: keys; a dot: it runs",
    )
    return figures.tile_maps([(one.title, padded(one), one.kinds, one.run) for one in found], head)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.counted.block_tiles", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="such as tiles.svg")
    parser.add_argument("--length", type=int, default=2048, metavar="N", help="tokens")
    given = parser.parse_args(arguments)
    if given.length < patterns.PREFIX:
        parser.error(f"--length must be at least {patterns.PREFIX}")
    found = examples(given.length)
    wrong = {one.title: text for one in found if (text := difference(one))}
    for one in found:
        all_tiles = one.run.size
        print(f"{one.title}: {wrong.get(one.title) or f'{one.run.sum()} of {all_tiles} tiles run'}")
    with figures.style():
        figures.save(figure(found), given.out)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
