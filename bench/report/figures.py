"""The pictures' look: panels of lines, and maps of ratios. All of matplotlib is in this file."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.timing.analysis import OURS

ACCENT, SLOWER, TEXT, FAINT = "#1a5fd0", "#d9822b", "#222222", "#8a8f98"
MUTED = ("#8c96a3", "#b08d57", "#6f9c84", "#a07fa8", "#5d6b7a", "#c08a8a", "#a3a65c", "#7fa6b8")
MARKERS = "s^Dv<P>Xh"
PANEL = 3.3, 2.3  # inches
MARGIN, GAP = (0.92, 0.3, 0.62), (0.25, 0.62)  # left, right, bottom; between panels
HEAD, LEGEND_ROW = 0.68, 0.21  # title and subtitle; each row of the legend
TILE = 0.9, 0.56
NOTE_WIDTH = 16  # characters that fit into a tile
WIDE = 30  # a range of y that needs a logarithmic axis


class Panel(NamedTuple):
    """Lines over a length: contestant to its points, in the order of x; None where it has none."""

    title: str
    lines: dict[str, list[tuple[int, float | None]]]
    ceiling: float | None = None


class Tile(NamedTuple):
    """One square of a map: a ratio, or None with a word for the reason; and a note below it."""

    ratio: float | None
    note: str


class Map(NamedTuple):
    """Ratios by row and column."""

    title: str
    rows: Sequence[int]
    cols: Sequence[int]
    tiles: dict[tuple[int, int], Tile]


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The look of everything that is made and saved inside; the same input, the same bytes."""
    import matplotlib

    look: Any = {
        "svg.hashsalt": "cuattn",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": TEXT,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": TEXT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": TEXT,
        "ytick.labelcolor": TEXT,
        "grid.color": "#e6e8eb",
        "grid.linewidth": 0.8,
    }
    with matplotlib.rc_context(look):
        yield


def line_panels(
    panels: Sequence[Panel],
    columns: int,
    head: tuple[str, str],
    labels: tuple[str, str],
    names: Sequence[str],
    ceiling: str | None = None,
    y_bytes: bool = False,
) -> Any:
    """A figure of panels that share their axes.

    `head` is title and subtitle, `labels` are those of x (a length, logarithmic) and y. `names` are
    all contestants, drawn or not: whoever passes the same ones gets the same colours. With
    `y_bytes`, y is bytes, and logarithmic, too.
    """
    from matplotlib.lines import Line2D

    drawn = [name for name in names if any(name in panel.lines for panel in panels)]
    looks = {name: _look(name, names) for name in drawn}
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    if any(panel.ceiling for panel in panels):
        handles.append(Line2D([], [], label=ceiling, color=TEXT, lw=1, ls=(0, (4, 3))))
    figure, grid = _figure(len(panels), columns, PANEL, head, handles)
    points = [point for panel in panels for line in panel.lines.values() for point in line]
    ys = [y for _, y in points if y] + [panel.ceiling for panel in panels if panel.ceiling]
    for index, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        for name in reversed(drawn):
            line = panel.lines.get(name, [])
            y = [math.nan if y is None else y for _, y in line]
            axes.plot([x for x, _ in line], y, zorder=3 + (name == OURS), **looks[name])
        if panel.ceiling:
            axes.axhline(panel.ceiling, color=TEXT, lw=1, ls=(0, (4, 3)), zorder=2)
        axes.set_title(panel.title)
        axes.grid(axis="y")
        _binary_axis(axes.xaxis, [x for x, _ in points], _length)
        if y_bytes:
            _binary_axis(axes.yaxis, ys, _bytes)
        elif max(ys) > WIDE * min(ys):
            _decimal_axis(axes, ys)
        else:
            axes.set_ylim(0, 1.08 * max(ys))
        axes.tick_params(axis="y", length=0, labelleft=index % columns == 0)
        _label(axes, index, columns, len(panels), labels)
    return figure


def heat_maps(
    maps: Sequence[Map], columns: int, head: tuple[str, str], labels: tuple[str, str]
) -> Any:
    """A figure of maps: the colour is the logarithm of the ratio, the number is written into it.

    `head` is title and subtitle, `labels` are those of the columns and the rows of a map.
    """
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colours = LinearSegmentedColormap.from_list("ratio", [SLOWER, "#f4f4f2", ACCENT])
    scale = Normalize(-2, 2, clip=True)  # a quarter to four times
    size = (
        TILE[0] * max(len(each.cols) for each in maps),
        TILE[1] * max(len(each.rows) for each in maps),
    )
    figure, grid = _figure(len(maps), columns, size, head, [])
    for index, (axes, each) in enumerate(zip(grid, maps, strict=True)):
        for (row, col), tile in each.tiles.items():
            x, y = each.cols.index(col), each.rows.index(row)
            value = None if tile.ratio is None else scale(math.log2(tile.ratio))
            fill = "#dddddd" if value is None else colours(value)
            ink = "white" if value is not None and not 0.2 < value < 0.8 else TEXT
            axes.add_patch(_square(x, y, fill))
            number = "" if tile.ratio is None else f"{tile.ratio:.2f}×"
            note = textwrap.fill(tile.note, NOTE_WIDTH, max_lines=2, placeholder=" …")
            lift = 0.17 if note and number else 0
            axes.text(x, y - lift, number, ha="center", va="center", color=ink, size=9)
            axes.text(x, y + 1.2 * lift, note, ha="center", va="center", color=ink, size=6.5)
        axes.set_xlim(-0.5, len(each.cols) - 0.5)
        axes.set_ylim(len(each.rows) - 0.5, -0.5)
        axes.set_xticks(range(len(each.cols)), [str(col) for col in each.cols])
        axes.set_yticks(range(len(each.rows)), [str(row) for row in each.rows])
        axes.tick_params(length=0, labelleft=index % columns == 0)
        axes.spines[:].set_visible(False)
        axes.set_title(each.title)
        _label(axes, index, columns, len(maps), labels)
    return figure


def token_map(weights: Any, tokens: Sequence[str], head: tuple[str, str]) -> Any:
    """A matrix of weights, whose rows and columns are tokens."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    colours = LinearSegmentedColormap.from_list("weight", ["white", ACCENT, "#0b1f44"])
    edge = 0.105 * len(tokens)
    figure, (axes,) = _figure(1, 1, (edge, edge), head, [])
    axes.imshow(weights, cmap=colours, norm=PowerNorm(0.5, 0, weights.max()), aspect="auto")
    axes.set_yticks(range(len(tokens)), tokens, size=5)
    axes.set_xticks(range(len(tokens)), tokens, size=5, rotation=90)
    axes.tick_params(length=0)
    return figure


def tile_maps(maps: Sequence[tuple[str, Any, Any, Any]], head: tuple[str, str]) -> Any:
    """Masks over their tiles: title, mask, kinds of tiles (none, some, all seen), and which ran."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    fills = {"empty": "#f4f4f2", "partial": "#f3d9bd", "full": "#b9cdf0"}
    handles = [Patch(label=name, color=fill) for name, fill in fills.items()]
    seen = Patch(label="a query sees a key", color=TEXT, alpha=0.4)
    figure, grid = _figure(len(maps), len(maps), (PANEL[0], PANEL[0]), head, [*handles, seen])
    for axes, (title, mask, kinds, ran) in zip(grid, maps, strict=True):
        rows, columns = kinds.shape
        axes.imshow(kinds, cmap=ListedColormap([*fills.values()]), vmin=0, vmax=2)
        image = {"interpolation": "none", "extent": (-0.5, columns - 0.5, rows - 0.5, -0.5)}
        axes.imshow(mask, cmap=ListedColormap(["#0000", "#0006"]), vmin=0, vmax=1, **image)
        y, x = ran.nonzero()
        axes.plot(x, y, "o", color=ACCENT, ms=2.5)
        axes.set_title(title)
        axes.set_axis_off()
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a picture in the format that its name says; the same picture, the same bytes."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def _figure(
    count: int, columns: int, panel: tuple[float, float], head: tuple[str, str], handles: list[Any]
) -> tuple[Any, list[Any]]:
    """A figure with title, subtitle and legend above `count` axes; all sizes in inches."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    left, right, bottom = MARGIN
    width = left + columns * panel[0] + (columns - 1) * GAP[0] + right
    width = max(width, left + right + 5)  # of the title
    subtitle = textwrap.wrap(head[1], int(13.5 * (width - right)))
    head_height = HEAD + LEGEND_ROW * (len(subtitle) - 1)
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    entries = max(1, int((width - right) / (0.65 + 0.077 * longest)))
    top = head_height + LEGEND_ROW * math.ceil(len(handles) / entries) + 0.36
    height = top + rows * panel[1] + (rows - 1) * GAP[1] + bottom
    figure = Figure((width, height), facecolor="white")
    figure.text(0.15 / width, 1 - 0.3 / height, head[0], size=13, weight="bold")
    for index, line in enumerate(subtitle):
        y = 1 - (0.54 + LEGEND_ROW * index) / height
        figure.text(0.15 / width, y, line, size=9, color="#5a6068")
    if handles:
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.15 / width, 1 - head_height / height),
            ncols=min(entries, len(handles)),
            frameon=False,
            borderaxespad=0,
            borderpad=0,
            handlelength=2.4,
            columnspacing=1.6,
        )
    grid = []
    for index in range(count):
        row, column = divmod(index, columns)
        x = left + column * (panel[0] + GAP[0])
        y = height - top - (row + 1) * panel[1] - row * GAP[1]
        grid.append(figure.add_axes((x / width, y / height, panel[0] / width, panel[1] / height)))
    return figure, grid


def _label(axes: Any, index: int, columns: int, count: int, labels: tuple[str, str]) -> None:
    """Labels of x and y, where nothing is below or to the left."""
    if index + columns >= count:
        axes.set_xlabel(labels[0])
    if index % columns == 0:
        axes.set_ylabel(labels[1])


def _look(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Ours stands out; the others have each its own muted colour and marker."""
    if name == OURS:
        return {"color": ACCENT, "lw": 2.4, "marker": "o", "ms": 5}
    index = [each for each in names if each != OURS].index(name)
    colour, marker = MUTED[index % len(MUTED)], MARKERS[index % len(MARKERS)]
    dashes = "-" if index < len(MUTED) else ":"
    return {"color": colour, "lw": 1.4, "marker": marker, "ms": 3.6, "ls": dashes}


def _square(x: int, y: int, fill: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, facecolor=fill, edgecolor="none")


def _binary_axis(axis: Any, values: Sequence[float], text: Any) -> None:
    """A logarithmic axis with at most six ticks, all powers of two."""
    low, high = math.log2(min(values)), math.log2(max(values))
    step = max(1, math.ceil((high - low) / 6))
    name = axis.axis_name
    getattr(axis.axes, f"set_{name}scale")("log", base=2)
    getattr(axis.axes, f"set_{name}lim")(2 ** (low - 0.25), 2 ** (high + 0.25))
    ticks = [2**e for e in range(math.ceil(low), math.floor(high) + 1, step)]
    axis.set_ticks(ticks, [text(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def _decimal_axis(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic y axis with powers of ten."""
    low, high = math.log10(min(values)), math.log10(max(values))
    ticks = [10.0**e for e in range(math.ceil(low), math.floor(high) + 1)]
    axes.set_yscale("log")
    axes.set_ylim(10 ** (low - 0.1), 10 ** (high + 0.15))
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)


def _length(value: float) -> str:
    return f"{value:g}" if value < 1024 else f"{value / 1024:g}K"


def _bytes(value: float) -> str:
    """Bytes in the largest unit that leaves no fraction below 1."""
    exponent = max(0, min(4, int(math.log2(value) // 10)))
    return f"{value / 1024**exponent:g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"
