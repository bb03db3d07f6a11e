"""RESULT.json as SVG pictures, and as the benchmark sections of bench/README.md.

    python -m bench.report.plot RESULT.json [--out DIR] [--readme bench/README.md]

A picture is drawn only if the result has cells from a GPU for it. The same result gives the same
files. matplotlib is needed here and for nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.report import figures, schema
from bench.report import markdown as report
from bench.timing import analysis

Result = dict[str, Any]
Cell = dict[str, Any]
ENOUGH = 4  # points of a line, tiles of a map
COLD = "cold L2 cache"


class Picture(NamedTuple):
    """A file, what it shows, and of what kind it is; README shows the first of each kind."""

    path: Path
    title: str
    kind: str


def draw(result: Result, directory: Path, stem: str | None = None) -> list[Picture]:
    """Draw every picture that the result has cells for; none without a GPU.

    The files' names begin with `stem`, by default the name of the result's file.

    Raises
    ------
    ImportError
        Without matplotlib, before anything is drawn.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("pictures need matplotlib: pip install matplotlib")
    if not result["environment"]["gpu"]:
        return []
    stem = stem or Path(schema.file_name(result)).stem
    directory.mkdir(parents=True, exist_ok=True)
    pictures = []
    with figures.style():
        for (operation, grid), cells in analysis.tables(result).items():
            for kind, (title, make) in _KINDS.items():
                figure = make(result, cells, f"{operation}: {title}")
                if figure is not None:
                    path = directory / f"{stem}-{operation}-{grid}-{kind}.svg"
                    figure.savefig(path, metadata={"Date": None, "Creator": None})
                    pictures.append(Picture(path, f"{operation}, {grid}: {title}", kind))
    return pictures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.report.plot", description=__doc__)
    parser.add_argument("result", type=Path, help="what bench.checkup has written")
    parser.add_argument("--out", type=Path, help="directory of the pictures; default: the result's")
    parser.add_argument("--readme", type=Path, help="a README whose sections are rewritten")
    options = parser.parse_args(arguments)
    result = schema.load(options.result)
    try:
        pictures = draw(result, options.out or options.result.parent, options.result.stem)
    except ImportError as error:
        parser.error(str(error))
    for picture in pictures:
        print(picture.path)
    if options.readme:
        root = options.readme.resolve().parent
        first = {picture.kind: picture for picture in reversed(pictures)}
        shown = {p.title: _relative(p.path, root) for p in reversed(first.values())}
        sections = report.readme_sections(result, _relative(options.result, root), shown)
        text = options.readme.read_bytes().decode()
        options.readme.write_bytes(report.update_readme(text, sections).encode())
        print(f"{options.readme}: {', '.join(sections) or 'no section'}")
    return 0


def _relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path.resolve(), root)).as_posix()


def _bandwidth(result: Result, cells: list[Cell], title: str) -> Any:
    """GB/s over the row length, for the softmax family."""
    if not analysis.is_row_cell(cells[0]):
        return None
    return _lines(result, cells, title, "row length, elements", "GB/s", _rate(1e9))


def _throughput(result: Result, cells: list[Cell], title: str) -> Any:
    """TFLOP/s over the sequence length, where products are the limit."""
    if cells[0]["ceiling"] != "matmul" or "seqlen_k" not in cells[0]["shape"]:
        return None
    return _lines(result, cells, title, "sequence length, tokens", "TFLOP/s", _rate(1e12))


def _memory(result: Result, cells: list[Cell], title: str) -> Any:
    """Peak memory over the sequence length."""
    if "seqlen_k" not in cells[0]["shape"]:
        return None
    return _lines(
        result, cells, title, "sequence length, tokens", "peak memory", analysis.peak_bytes
    )


def _rate(unit: float) -> Callable[[Cell, str], float | None]:
    def y(cell: Cell, name: str) -> float | None:
        value = analysis.rate(cell, name)
        return None if value is None else value / unit

    return y


# What is on the x axis, and the sizes that make a panel of their own only if they must.
_LENGTHS = ("cols", "seqlen_q", "seqlen_k")
_SCALES = ("rows", "batch", "heads", "kv_heads")


def _length(cell: Cell) -> int:
    return next(cell["shape"][name] for name in reversed(_LENGTHS) if name in cell["shape"])


def _lines(
    result: Result,
    cells: list[Cell],
    title: str,
    x_label: str,
    y_label: str,
    y: Callable[[Cell, str], float | None],
) -> Any:
    """Panels of contestants' lines; None without one that has points enough."""
    hidden = {*_LENGTHS, *_SCALES}
    most = Counter((_key(cell, hidden), _length(cell)) for cell in cells).most_common(1)
    if most and most[0][1] > 1:
        hidden -= set(_SCALES)
    groups = _groups(cells, hidden, _length)
    names = _names(result, cells[0])
    is_rate = y is not analysis.peak_bytes
    ceiling = cells[0]["ceiling"]
    scale = 1e12 if ceiling == "matmul" else 1e9
    top = analysis.ceiling_rate(result, ceiling) if is_rate else None
    panels = []
    for key, group in groups.items():
        group = sorted(group, key=_length)
        lines = {name: [(_length(cell), y(cell, name)) for cell in group] for name in names}
        lines = {name: line for name, line in lines.items() if any(point for _, point in line)}
        if lines:
            panels.append(figures.Panel(_title(key, groups), lines, top / scale if top else None))
    if not panels:
        return None
    points = [y for panel in panels for line in panel.lines.values() for _, y in line]
    gaps = "gap: no correct result" if None in points else ""
    return figures.line_panels(
        panels,
        _columns(list(groups)),
        (title, _subtitle(result, cells, groups, COLD if is_rate else "", gaps)),
        (x_label, y_label),
        names,
        f"{ceiling} ceiling, measured",
        y_bytes=not is_rate,
    )


def _speed_up(result: Result, cells: list[Cell], title: str) -> Any:
    """Ratio to the best peer by rows and columns, for top-k."""
    if not {"rows", "cols", "k"} <= cells[0]["shape"].keys():
        return None
    groups = _groups(cells, {"rows", "cols"}, lambda cell: (cell["shape"]["rows"], _length(cell)))
    best = {analysis.best_peer(cell) for group in groups.values() for cell in group} - {None}
    if not best:
        return None
    over = next(iter(best)) if len(best) == 1 else "the fastest other contestant"
    maps = [
        figures.Map(
            _title(key, groups),
            sorted({cell["shape"]["rows"] for cell in group}),
            sorted({cell["shape"]["cols"] for cell in group}),
            {
                (cell["shape"]["rows"], cell["shape"]["cols"]): _tile(cell, len(best) > 1)
                for cell in group
            },
        )
        for key, group in groups.items()
    ]
    return figures.heat_maps(
        maps,
        _columns(list(groups)),
        (
            f"{title} over {over}",
            _subtitle(result, cells, groups, COLD, "blue: cuattn is faster, orange: slower"),
        ),
        ("row length, elements", "rows"),
    )


def _tile(cell: Cell, named: bool) -> figures.Tile:
    peer = analysis.best_peer(cell)
    ratio = analysis.ratio(cell, peer) if peer else None
    if ratio is None:
        status = analysis.status(cell)
        return figures.Tile(None, status if status != "ok" else "no other")
    return figures.Tile(ratio, peer if named and peer else "")


Key = tuple[tuple[str, Any], ...]


def _key(cell: Cell, hidden: set[str]) -> Key:
    """The panel of a cell; `head_dim` last, so that it runs along the columns."""
    sizes = {name: size for name, size in cell["shape"].items() if name not in hidden}
    sizes |= {"head_dim": sizes.pop("head_dim")} if "head_dim" in sizes else {}
    return (("dtype", cell["dtype"]), *sizes.items())


def _groups(
    cells: list[Cell], hidden: set[str], point: Callable[[Cell], Any]
) -> dict[Key, list[Cell]]:
    """Panel to its cells, in order; those with too few points are left out."""
    groups: dict[Key, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(_key(cell, hidden), []).append(cell)
    return {
        key: groups[key] for key in sorted(groups) if len(set(map(point, groups[key]))) >= ENOUGH
    }


def _varying(groups: dict[Key, Any]) -> set[str]:
    return {
        name
        for key in groups
        for name, value in key
        if any((name, value) not in other for other in groups)
    }


def _words(parts: Sequence[tuple[str, Any]]) -> str:
    """Sizes as a person writes them."""
    words = {("rows", 1): "1 row", ("causal", 0): "not causal", ("causal", 1): "causal"}
    forms = {"dtype": "{}", "rows": "{} rows", "k": "k = {}"}
    return ", ".join(
        words.get(part) or forms.get(part[0], f"{part[0]} {{}}").format(part[1]) for part in parts
    )


def _title(key: Key, groups: dict[Key, Any]) -> str:
    varying = _varying(groups)
    return _words([part for part in key if part[0] in varying])


def _columns(keys: list[Key]) -> int:
    """Panels that differ in nothing but the last size stand side by side, at most four."""
    rows = Counter(key[:-1] for key in keys)
    return min(4, max(rows.values())) if max(rows.values()) > 1 else min(3, len(keys))


def _subtitle(result: Result, cells: list[Cell], groups: dict[Key, Any], *more: str) -> str:
    env = result["environment"]
    varying = _varying(groups)
    common = _words([part for part in next(iter(groups)) if part[0] not in varying])
    commit = f"commit {env['commit'][:7]}" if env["commit"] else ""
    parts = [env["gpu"]["name"], env["date"][:10], commit, f"{cells[0]['grid']} shapes", common]
    return " · ".join(part for part in (*parts, *more) if part)


def _names(result: Result, like: Cell) -> list[str]:
    """All contestants in attention, or in everything else, cuattn first."""
    attention = "seqlen_k" in like["shape"]
    cells = [cell for cell in result["cells"] if ("seqlen_k" in cell["shape"]) == attention]
    return [analysis.OURS, *sorted({name for cell in cells for name in analysis.peers(cell)})]


_KINDS: dict[str, tuple[str, Callable[[Result, list[Cell], str], Any]]] = {
    "bandwidth": ("bandwidth by row length", _bandwidth),
    "throughput": ("throughput by sequence length", _throughput),
    "speed-up": ("speed-up", _speed_up),
    "memory": ("peak memory by sequence length", _memory),
}


if __name__ == "__main__":
    raise SystemExit(main())
