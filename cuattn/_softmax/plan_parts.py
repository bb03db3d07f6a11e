"""How a row is cut into parts that are added up one by one, and what kernels are told of it.

The order in which a row is added up follows from its own length. How many blocks share it may then
depend on the number of rows and on the device: no bit of the result does.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from cuattn._arrays.row_layout import OPERANDS, Layout
from cuattn._device.kernel import ceil_div, power_of_two
from cuattn._device.params import softmax_geometry

PART_TILES = 2  # of a part: a merge takes 85 instructions per warp, a tile 400; 4 halve the blocks
MAX_PARTS = 512  # of a row: every block that normalises it reads the states of them all
WAVES = 4  # blocks per SM that a split aims at


@dataclass(frozen=True)
class Parts:
    """How a row is cut: what is added up by itself, and how many parts a block takes.

    `parts` of `slice` columns follow from the length of the row; `splits` blocks of `share` parts
    each also from the number of rows, as no bit depends on them.
    """

    parts: int
    slice: int
    splits: int = 1
    share: int = 1

    def of(self, cols: int) -> Parts:
        """The same slices of a row that takes a few columns more."""
        return replace(self, parts=ceil_div(cols, self.slice))

    def shared_by(self, groups: int, num_sms: int) -> Parts:
        """The same parts on as many blocks as a device wants: `groups` of rows."""
        wanted = min(self.parts, ceil_div(WAVES * num_sms, groups))
        share = ceil_div(self.parts, wanted)
        return replace(self, splits=ceil_div(self.parts, share), share=share)


def parts_of_row(cols: int, tile: int) -> Parts:
    """Parts of a row of `cols` columns, in tiles of a block."""
    slice_ = max(PART_TILES, ceil_div(ceil_div(cols, tile), MAX_PARTS)) * tile
    return Parts(max(1, ceil_div(cols, slice_)), slice_)


def lanes_of(layout: Layout) -> int:
    """Rows beside each other in a warp: as many as fit between two columns, more if these are few.

    Not as many as there are rows: the order of a row's sum must not depend on their number.
    """
    between = abs(layout.col_stride[OPERANDS.index("x")][-1]) if layout.cols > 1 else 0
    return min(32, max(power_of_two(between), 32 // min(32, power_of_two(layout.cols))))


def geometry(layout: Layout, parts: Parts = Parts(1, 0), segments: int = 0) -> bytes:
    """SoftmaxParams from `rows` on."""
    return softmax_geometry(len(layout.row_size), len(layout.col_size)).pack(
        rows=layout.rows,
        cols=layout.cols,
        splits=parts.splits,
        slice=parts.slice,
        parts=parts.parts,
        share=parts.share,
        segment_width=layout.rows // max(1, segments),
        row_size=layout.row_size,
        col_size=layout.col_size,
        row_stride=tuple(itertools.chain(*layout.row_stride)),
        col_stride=tuple(itertools.chain(*layout.col_stride)),
    )
