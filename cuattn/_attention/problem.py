"""What an attention kernel is chosen by: dtypes, sizes, options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cuattn._device.kernel import ITEMSIZE, Kernel, ceil_div

FEW_ROWS, MANY_KEYS = 16, 1024  # what the decode kernel is for
DECODE_DIM = 256  # columns that it has at most

L2_BYTES = 32 * 2**20  # of K and V that should stay there while heads are computed side by side


class Grid(NamedTuple):
    """Blocks of rows, of heads or of packs of heads."""

    row_blocks: int  # of a unit, in AttentionParams
    units: int  # heads, or packs of heads, of all sequences
    heads_in_l2: int  # units side by side, whose K and V stay in L2, in AttentionParams


class Score(NamedTuple):
    """A score or mask expression as C++: a struct for a template argument of kernels."""

    name: str
    text: str  # that defines it
    expression: str  # as the caller wrote it


NO_SCORE, ARRAY_MASK = Score("NoScore", "", ""), Score("ArrayMask", "", "")


@dataclass(frozen=True)
class AttentionProblem:
    """What of one call decides on its kernel."""

    op: str  # a key of OPS
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    q_rows: int
    k_rows: int
    head_dim: int
    value_dim: int
    vector: bool = True  # q, k, v can be read 16 bytes at a time
    tma: bool = False  # q, k, v, out can be moved by TMA
    modified: bool = False  # scores are more than scaled by a positive number
    bias: str | None = None  # its dtype
    masked: bool = False
    ragged: bool = False
    bounded: bool = False  # later queries see later keys only
    score: Score | None = None  # then `modified`, too
    blocked: bool = False  # the mask is a block mask
    mask: Score | None = None  # of an expression

    @property
    def is_decode(self) -> bool:
        """Whether blocks share the keys of a head instead of its rows, which are too few."""
        rows = self.q_rows * (self.heads // self.kv_heads)
        changed = self.bias is not None or self.masked or self.ragged
        wide = max(self.head_dim, self.value_dim) > DECODE_DIM
        return rows <= FEW_ROWS and self.k_rows >= MANY_KEYS and not changed and not wide

    @property
    def tiles(self) -> str:
        """The template argument `Tiles`."""
        return f"ListedTiles<{(self.mask or ARRAY_MASK).name}>" if self.blocked else "AllTiles"

    def kernel(
        self, template: str, arguments: dict[str, object], grid: int, warps: int, smem: int
    ) -> Kernel:
        """A kernel that makes scores, with `Score` behind its arguments."""
        score, mask = self.score or NO_SCORE, self.mask or ARRAY_MASK
        return Kernel(
            template,
            {**arguments, "Score": score.name},
            grid,
            32 * warps,
            smem_bytes=smem,
            text=score.text + mask.text,
            expression="; ".join(one for one in (score.expression, mask.expression) if one),
        )

    def grid(self, rows: int, pack: int = 1) -> Grid:
        """How blocks of `rows` rows, of `pack` query heads each, cover the call."""
        row_blocks, units = ceil_div(self.q_rows, rows // pack), self.heads // pack
        if self.ragged:
            row_blocks += self.batch  # each sequence may end in a block of its own
        else:
            units *= self.batch
        kv_bytes = self.k_rows * (self.head_dim + self.value_dim) * ITEMSIZE[self.dtype]
        sharing = self.heads // self.kv_heads // pack
        heads_in_l2 = min(units, sharing * max(1, L2_BYTES // max(1, kv_bytes)))
        return Grid(row_blocks, units, heads_in_l2)
