"""The tables of a report: every cell, the ladder, the kernels, and what no GPU is needed for."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from bench.report import attention as report_attention
from bench.report import formats
from bench.report.formats import NOTHING, escape, section, status, table
from bench.timing import analysis

Result = dict[str, Any]
Cell = dict[str, Any]


def cells(result: Result) -> str:
    """One table for each operation and grid."""
    groups = analysis.tables(result)
    source = "" if result["environment"]["gpu"] else " (no GPU)"
    return "\n\n".join(
        section(f"{operation}, {grid}{source}", _cell_table(result, group))
        for (operation, grid), group in groups.items()
    )


_CELL_HEADER = [
    "shape",
    "dtype",
    "plan",
    ">µs cold",
    ">p20–p80",
    ">µs warm",
    ">rate",
    ">% of ceiling",
    ">error / allowed",
    "best peer",
]


def _cell_table(result: Result, cells: list[Cell]) -> str:
    work = sorted({f"{cell['ceiling']}: {escape(cell['work']['formula'])}" for cell in cells})
    ours = [found for cell in cells if (found := analysis.entry(cell))]
    clocks = sorted({found["clock"] for found in ours if found["clock"]})
    header, rows, note = [*_CELL_HEADER], [_cell_row(result, cell) for cell in cells], ""
    if any("predicted" in found for found in ours):
        note = " The prediction is of bench/timing/prediction.py, and not measured."
        place = header.index(">rate") + 1
        header.insert(place, ">a model's prediction")
        for row, cell in zip(rows, cells, strict=True):
            row.insert(place, formats.rate(analysis.predicted_rate(cell), cell["ceiling"]))
    lines = [
        f"Ceiling and work: {'; '.join(work)}. Clock: {', '.join(clocks) or 'none'}. "
        f"Rate and % of ceiling: cold L2 cache.{note}",
        table(header, rows),
    ]
    lines += [*_speed_ups(cells), *report_attention.speed_ups(cells), *_not_ok(cells)]
    return "\n\n".join(lines)


def _cell_row(result: Result, cell: Cell) -> list[str]:
    ours = analysis.entry(cell)
    low_high = analysis.spread(analysis.samples(cell, analysis.OURS))
    outcome = analysis.status(cell)
    errors = [ours["max_error"], ours["allowed_error"]] if ours else [None, None]
    return [
        formats.shape(cell["shape"]),
        cell["dtype"],
        formats.plan(ours["plan"] if ours else None),
        formats.microseconds(analysis.time(cell)) if outcome == "ok" else status(outcome),
        "–".join(map(formats.microseconds, low_high)) if low_high else NOTHING,
        formats.microseconds(analysis.time(cell, state="warm")),
        formats.rate(analysis.rate(cell), cell["ceiling"]),
        formats.percent(analysis.percent_of_ceiling(result, cell)),
        " / ".join(NOTHING if error is None else f"{error:.1e}" for error in errors),
        _best_peer(cell),
    ]


def _best_peer(cell: Cell) -> str:
    peer = analysis.best_peer(cell)
    if peer is None:
        return NOTHING
    clock = analysis.entry(cell, peer) if analysis.other_clock(cell, peer) else None
    return f"`{peer}` {formats.times(analysis.ratio(cell, peer))}" + (
        f" (clock: {clock['clock']})" if clock else ""
    )


def _speed_ups(cells: list[Cell]) -> Iterable[str]:
    """On the paper's shapes also the ratio to every contestant, by its name."""
    names = list(dict.fromkeys(name for cell in cells for name in analysis.peers(cell)))
    if any(name.startswith("paper: ") for name in names):
        yield "Speed-up of cuattn over each contestant, with a cold L2 cache:"
        rows = [
            [formats.shape(cell["shape"]), cell["dtype"]]
            + [formats.times(analysis.ratio(cell, name)) for name in names]
            for cell in cells
        ]
        yield table(["shape", "dtype", *(f">over `{name}`" for name in names)], rows)


def _not_ok(cells: list[Cell]) -> Iterable[str]:
    """Every contestant that is not ok, the cells with the same reason together."""
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for cell in cells:
        for each in cell["contestants"]:
            if each["status"] != "ok":
                where = f"{formats.shape(cell['shape'])} {cell['dtype']}"
                found[each["status"], each["name"], each["detail"]].append(where)
    if found:
        yield "Not ok:"
        yield "\n".join(
            f"- `{name}` {status(outcome)}: {escape(detail) or 'no detail'} ({'; '.join(where)})"
            for (outcome, name, detail), where in sorted(
                found.items(), key=lambda item: (formats.WORST_FIRST.index(item[0][0]), item[0])
            )
        )


def ladder(result: Result) -> str:
    """What the paper's algorithms and cuattn cost."""
    text = "Counted on the emulator: no GPU.\n\n" + ladder_table(result["ladder"])
    return section("Ladder", text) if result["ladder"] else ""


def ladder_table(steps: list[dict[str, Any]]) -> str:
    """One table for each shape, each below a line that names the shape; ours as code."""
    tables = []
    for rows, cols in dict.fromkeys((step["rows"], step["cols"]) for step in steps):
        lines = [
            [
                f"`{step['algorithm']}`" if step["ours"] else escape(step["algorithm"]),
                *(f"{step[key]:.2f}" for key in _COUNTED),
                escape(step["note"]) + "; overflows" * step["overflows"],
                f"`{step['file']}`",
            ]
            for step in steps
            if (step["rows"], step["cols"]) == (rows, cols)
        ]
        header = ["algorithm", *(f">{key}" for key in _COUNTED), "note", "source"]
        caption = f"Per element of x: {rows} × {cols} random numbers in float32."
        tables.append(f"{caption}\n\n{table(header, lines)}")
    return "\n\n".join(tables)


_COUNTED = ("reads", "writes", "accesses", "exponentials")


def counters(result: Result) -> str:
    """What each call costs, per element of an operand."""
    executed = {_call(row): row["instructions"] for row in result.get("instructions", ())}
    amounts = ("reads", "writes", "sectors", "exponentials")
    totals = ("conflicts", "barriers", "allocated_bytes", "mma", "ldmatrix")
    rows = [
        [
            row["operation"],
            row["arch"],
            f"{row['rows']} × {row['cols']} {row['dtype']}",
            formats.plan(row["kernels"]),
            *(formats.number(row[key]) for key in amounts),
            formats.number(executed.get(_call(row))),
            *(str(row.get(key, NOTHING)) for key in totals),
        ]
        for row in result["counters"]
    ]
    header = ["operation", "arch", "shape", "kernels"]
    header += [f">{key}" for key in (*amounts, "instructions", *totals)]
    text = (
        "Counted on the emulator: no GPU. Reads, writes, 32-byte sectors (both, as elements), "
        "exponentials and instructions are per element; the other numbers are of the whole call. "
        "Of attention the shape is queries × keys, reads and sectors are per element of q, k and "
        "v, exponentials and instructions per score. Instructions are those of the PTX that NVRTC "
        "made, executed on the software device: 32 for each that a warp runs.\n\n"
    )
    return section("Counters", text + table(header, rows)) if rows else ""


def instructions_table(found: list[dict[str, Any]]) -> str:
    """Executed instructions of each call by kind, the kinds in their order of frequency."""
    total: Counter[str] = Counter()
    for row in found:
        total.update({kind: n / row["instructions"] for kind, n in row["kinds"].items()})
    kinds = [kind for kind, _ in total.most_common()]
    rows = [
        [
            row["operation"],
            row["arch"],
            f"{row['rows']} × {row['cols']} {row['dtype']}",
            *(formats.number(row["kinds"].get(kind, 0)) for kind in ["all", *kinds]),
        ]
        for row in ({**row, "kinds": {**row["kinds"], "all": row["instructions"]}} for row in found)
    ]
    return table(["operation", "arch", "shape", ">all", *(f">{kind}" for kind in kinds)], rows)


def _call(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row of counters or instructions from the others."""
    return tuple(row[key] for key in ("operation", "arch", "rows", "cols", "dtype"))


def kernels(result: Result) -> str:
    """How many rows the kernel report has for each architecture, what spills, what bounds them."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in result["kernels"]:
        groups[row["arch"]].append(row)
    rows = []
    for arch, found in groups.items():
        spilled = [row for row in found if row["spill_bytes"]]
        worst = max(spilled, key=lambda row: row["spill_bytes"], default=None)
        bounds = Counter(row["bound"] or "not known" for row in found)
        rows.append(
            [
                arch,
                str(len(found)),
                str(max(row["registers"] for row in found)),
                str(len(spilled)),
                f"{formats.plan([worst['kernel']])} {worst['spill_bytes']} bytes"
                if worst
                else NOTHING,
                ", ".join(f"{escape(bound)}: {n}" for bound, n in bounds.most_common()),
            ]
        )
    header = ["arch", ">rows", ">most registers", ">spill", "most spilled", "bound"]
    text = ["From the compiled code: no GPU.", table(header, rows)]
    text += filter(None, [report_attention.tiles(result["kernels"])])
    return section("Kernels", "\n\n".join(text)) if rows else ""


def host_cost(result: Result) -> str:
    """Python of a call, up to the launch."""
    rows = [
        [f"`{found['name']}`", *_median_and_spread(found["seconds"], 1e6)]
        for found in result["host_cost"]
    ]
    header = ["call", ">µs, median", ">p20–p80"]
    text = "The CPU's part of a call; no number of a GPU.\n\n" + table(header, rows)
    return section("Host cost", text) if rows else ""


def compile_time(result: Result) -> str:
    """Medians of the kernels' medians, for each architecture, without and with the cache."""
    groups: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for found in result["compile_time"]:
        seconds = analysis.median(found["seconds"])
        if seconds is not None:
            groups[found["what"], found["arch"]][found["kernel"]] = seconds
    rows = []
    for (what, arch), times in groups.items():
        slowest = max(times, key=lambda kernel: times[kernel])
        middle = analysis.median(list(times.values()))
        rows.append(
            [what, arch, str(len(times)), formats.number((middle or 0) * 1e3)]
            + [formats.number(times[slowest] * 1e3), formats.plan([slowest])]
        )
    header = ["cache", "arch", ">kernels", ">ms, median", ">ms, slowest", "slowest"]
    text = "Compiled on the CPU, for a GPU that need not be there.\n\n" + table(header, rows)
    return section("Compile time", text) if rows else ""


def import_time(result: Result) -> str:
    """Seconds that an import takes in a new process."""
    rows = [
        [f"`import {escape(name)}`", *_median_and_spread(seconds, 1e3)]
        for name, seconds in result["import_time"].items()
    ]
    header = ["import", ">ms, median", ">p20–p80"]
    return section("Import time", "On the CPU.\n\n" + table(header, rows)) if rows else ""


def _median_and_spread(samples: list[float], scale: float) -> list[str]:
    """Samples in seconds, in seconds / scale."""
    middle, ends = analysis.median(samples), analysis.spread(samples)
    if middle is None or ends is None:
        return [NOTHING, NOTHING]
    return [formats.number(middle * scale), "–".join(formats.number(end * scale) for end in ends)]
