"""How many bytes attention moves, counted: N^2 d^2 / M against the N^2 of the scores.

    python -m bench.counted.io_complexity [--plot FILE]

FlashAttention (arXiv:2205.14135, theorem 2) reads and writes O(N^2 d^2 / M) elements with M
elements of fast memory. Here a head of N queries and keys of d float16 elements runs on the
emulator, which counts. Beside it, in bytes: the formula of the tiles, which it has to meet exactly
(Q and the result once, K and V once per tile of query rows); N^2 d^2 / M, M being the shared memory
of a block; and what the unfused expression moves of the scores alone, 4 N^2: S written and read, P
written and read. No number is typed; tile and M are those of the kernel that ran.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cuattn
from bench import inside
from bench.report import figures, formats

# sm_86 has less shared memory than sm_80: with the same d, M and the tile are smaller.
SETTINGS = ((64, "sm_80"), (128, "sm_80"), (256, "sm_80"), (256, "sm_86"))
LENGTHS = (128, 256, 512, 1024)
ITEM = 2  # bytes of an element, float16


class Counted(NamedTuple):
    """One call: what ran, and bytes of global memory."""

    head_dim: int
    arch: str
    length: int
    tile_rows: int  # of queries
    shared_elements: int  # M
    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written

    @property
    def formula(self) -> int:
        """Q and the result once, K and V once per tile of query rows."""
        tiles = -(-self.length // self.tile_rows)
        return (2 + 2 * tiles) * self.length * self.head_dim * ITEM

    @property
    def bound(self) -> float:
        """N^2 d^2 / M, without its constant."""
        return (self.length * self.head_dim) ** 2 / self.shared_elements * ITEM

    @property
    def unfused(self) -> int:
        """Of the scores and probabilities alone."""
        return 4 * self.length**2 * ITEM


def count(head_dim: int, arch: str, length: int) -> Counted:
    """Run one head on the emulator."""
    import emulator

    rng = np.random.default_rng()
    dtype = inside.dtype_of("float16")  # `inside` also makes `import emulator` find it
    q, k, v = rng.standard_normal((3, length, head_dim)).astype(dtype)
    with emulator.activate(arch) as runtime:
        cuattn.attention(q, k, v)
    (kernel,) = runtime.kernels
    total = runtime.total()
    return Counted(
        head_dim,
        arch,
        length,
        tile_rows(kernel),
        kernel.smem_bytes // ITEM,
        total.global_bytes_read,
        total.global_bytes_written,
    )


def tile_rows(kernel: Any) -> int:
    """Query rows of a block: 16 of each of its warps' row tiles."""
    return 16 * kernel.arguments["kWarps"] * kernel.arguments["kMTiles"]


def table(rows: Sequence[Counted]) -> str:
    """Markdown."""
    header = ["d", "arch", "tile rows", "M", "N", "bytes counted", "formula", "N² d² / M"]
    header += ["counted / (N² d² / M)", "4 N²", "4 N² / counted"]
    lines = [
        [
            str(row.head_dim),
            row.arch,
            *map(str, (row.tile_rows, row.shared_elements, row.length, row.total, row.formula)),
            f"{row.bound:.0f}",
            f"{row.total / row.bound:.2f}",
            str(row.unfused),
            formats.times(row.unfused / row.total),
        ]
        for row in rows
    ]
    return formats.table([header[0], header[1], *(f">{name}" for name in header[2:])], lines)


def figure(rows: Sequence[Counted]) -> Any:
    """Bytes over N, a panel for each tile."""
    lines = {
        figures.OURS: lambda row: row.total,
        "formula of its tiles": lambda row: row.formula,
        "N² d² / M": lambda row: row.bound,
        "unfused: scores and probabilities, 4 N²": lambda row: row.unfused,
    }
    panels = []
    for head_dim, arch in dict.fromkeys((row.head_dim, row.arch) for row in rows):
        group = [row for row in rows if (row.head_dim, row.arch) == (head_dim, arch)]
        title = f"d = {head_dim}, M = {group[0].shared_elements} elements ({arch})"
        points = {name: [(r.length, value(r)) for r in group] for name, value in lines.items()}
        panels.append(figures.Panel(title, points))
    return figures.line_panels(
        panels,
        2,
        (
            "attention: bytes of global memory",
            "one head, float16, counted on the emulator: no GPU",
        ),
        ("sequence length N, tokens", "bytes"),
        list(lines),
        y_bytes=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.counted.io_complexity", description=__doc__
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it, too: needs matplotlib")
    given = parser.parse_args(arguments)
    rows = [count(*setting, length) for setting in SETTINGS for length in LENGTHS]
    print(table(rows))
    if given.plot:
        with figures.style():
            figures.save(figure(rows), given.plot)
    return 0 if all(row.total == row.formula for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
