"""RESULT.json as Markdown: the complete report of one checkup, and the sections of README."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bench.report import attention as report_attention
from bench.report import formats, schema
from bench.report import tables as report_tables
from bench.report.formats import NOTHING, escape, section, status, table
from bench.timing import analysis

Result = dict[str, Any]
Cell = dict[str, Any]


def markdown(result: Result) -> str:
    """The complete report: what failed first, then how cuattn compares, then every cell."""
    parts = [_head, _parts, _failures, _ceilings, _peers, _comparison]
    parts += [report_attention.headlines]
    parts += [report_tables.cells, report_tables.ladder, report_tables.counters]
    parts += [report_tables.kernels, report_tables.host_cost]
    parts += [report_tables.compile_time, report_tables.import_time]
    return "\n\n".join(text for text in (part(result) for part in parts) if text) + "\n"


def _head(result: Result) -> str:
    env = result["environment"]
    gpu = env["gpu"]
    packages = ", ".join(f"{name} {v}" for name, v in env["packages"].items() if v)
    lines = [
        f"# Checkup of {env['date'][:10]}: {escape(gpu['name']) if gpu else 'no GPU'}",
        f"{_gpu(gpu)}; {escape(env['cpu'])}, {env['cores']} cores; Python {env['python']}, "
        f"{escape(packages)}; {_commit(env)}; {env['date']}.",
    ]
    return "\n\n".join(lines)


def _gpu(gpu: dict[str, Any] | None) -> str:
    if gpu is None:
        return "**no GPU: no number in this report was measured on one**"
    now = [
        f"{gpu[key]:g} {unit}"
        for key, unit in [
            ("sm_mhz", "MHz"),
            ("sm_mhz_max", "MHz at most"),
            ("memory_mhz", "MHz memory clock"),
            ("power_limit_w", "W limit"),
            ("temperature_c", "°C"),
        ]
        if gpu[key] is not None
    ]
    return (
        f"{escape(gpu['name'])} (compute capability {gpu['compute_capability'] / 10:.1f}, "
        f"{gpu['num_sms']} multiprocessors, {gpu['memory_bytes'] / 2**30:.0f} GiB, "
        f"L2 {gpu['l2_bytes'] / 2**20:.0f} MiB, {', '.join(now)}), "
        f"driver {gpu['driver']}, CUDA {gpu['cuda']}"
    )


def _commit(env: dict[str, Any]) -> str:
    changed = ", with changes that are not committed" if env["dirty"] else ""
    return f"commit {env['commit'][:7]}{changed}" if env["commit"] else "commit unknown"


def _parts(result: Result) -> str:
    rows = [
        [escape(part["name"]), status(part["status"]), formats.number(part["seconds"]), detail]
        for part in sorted(
            result["parts"], key=lambda part: formats.WORST_FIRST.index(part["status"])
        )
        for detail in [escape(part["detail"]) or NOTHING]
    ]
    return section("Parts", table(["part", "status", ">seconds", "detail"], rows) if rows else "")


def _failures(result: Result) -> str:
    """The cells without a correct cuattn, before any number."""
    failures = analysis.summary(result).failures
    if not failures:
        return ""
    lines = []
    for cell in failures:
        found = analysis.entry(cell)
        detail = f": {escape(found['detail'])}" if found and found["detail"] else ""
        lines.append(f"- {formats.cell(cell)}: {status(analysis.status(cell))}{detail}")
    title = f"{len(failures)} of {len(result['cells'])} cells without a correct cuattn"
    return section(title, "\n".join(lines))


def _ceilings(result: Result) -> str:
    rows = [
        [name, formats.rate(analysis.ceiling_rate(result, name), name), escape(found["formula"])]
        for name, found in result["ceilings"].items()
    ]
    return section("Ceilings", table(["ceiling", ">median", "formula"], rows) if rows else "")


def _peers(result: Result) -> str:
    peers = result["peers"]
    found = ", ".join(escape(f"{name} {version}") for name, version in peers["found"].items())
    missing = ", ".join(escape(f"{name} ({why})") for name, why in peers["missing"].items())
    return section("Peers", f"Found: {found or 'none'}.\n\nMissing: {missing or 'none'}.")


def _comparison(result: Result) -> str:
    """Ratios to every peer, and against the best one."""
    if not result["cells"]:
        return section("Comparison", "No cell was measured.")
    cold, warm = (analysis.summary(result, state=state) for state in ("cold", "warm"))
    rows = [
        [
            f"`{peer.name}`",
            str(peer.cells),
            formats.times(peer.geometric_mean),
            _comparison_text(peer.worst) if peer.worst else NOTHING,
            str(peer.not_ok),
            str(peer.other_clock),
        ]
        for peer in cold.peers
    ]
    header = ["peer", ">cells", ">geometric mean", "worst cell", ">not ok", ">other clock"]
    lines = [
        f"Ahead of every peer in {cold.ahead} of {cold.compared} cells that a peer ran (warm L2 "
        f"cache: {warm.ahead} of {warm.compared}); a cell without a correct cuattn counts as "
        f"behind. Geometric mean of the ratios to the best peer: "
        f"{formats.times(cold.geometric_mean)} (warm: {formats.times(warm.geometric_mean)}).",
        "A ratio is the median time of a peer over that of cuattn, with a cold L2 cache: above 1 "
        "cuattn is faster. A best peer is the fastest correct one of a cell.",
        table(header, rows),
        table(_OPERATION_HEADER, _operation_rows(result)),
    ]
    losing = analysis.losing_cells(result)
    if losing or cold.worst:
        lines.append("Behind the best peer in:" if losing else "Least ahead of the best peer in:")
        lines.append(
            "\n".join(f"- {_comparison_text(each)}, `{each.peer}`" for each in losing or cold.worst)
        )
    return section("Comparison", "\n\n".join(lines))


_OPERATION_HEADER = [
    "operation",
    ">cells",
    ">no correct cuattn",
    ">ahead of every peer",
    ">geometric mean to the best peer",
    "worst cell",
]


def _operation_rows(result: Result) -> Iterable[list[str]]:
    for operation in dict.fromkeys(cell["operation"] for cell in result["cells"]):
        found = analysis.summary(result, operation)
        worst = found.worst[0] if found.worst else None
        yield [
            f"`{operation}`",
            str(found.cells),
            str(len(found.failures)),
            f"{found.ahead} of {found.compared}",
            formats.times(found.geometric_mean),
            f"{_comparison_text(worst)} `{worst.peer}`" if worst else NOTHING,
        ]


def _comparison_text(found: analysis.Comparison) -> str:
    return f"{formats.cell(found.cell)}: {formats.times(found.ratio)}"


def readme_sections(
    result: Result, file: str | None = None, pictures: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Marker name to Markdown for README: the ladder, and benchmarks if they ran on a GPU.

    Parameters
    ----------
    result
        One checkup.
    file
        Path of the result from the folder of README; by default in its folder ``results``.
    pictures
        Title to path, from the same folder, of the pictures to show.
    """
    sections = {}
    if result["ladder"]:
        first = {key: result["ladder"][0][key] for key in ("rows", "cols")}
        steps = [step for step in result["ladder"] if step.items() >= first.items()]
        sections["ladder"] = report_tables.ladder_table(steps)
    shown = next((group for group in analysis.tables(result).values() if _shown(group)), None)
    if not result["environment"]["gpu"] or shown is None:
        return sections
    sections["benchmarks"] = _benchmarks(result, shown, file)
    if pictures:
        images = [f"![{title}]({path})" for title, path in pictures.items()]
        sections["pictures"] = "\n\n".join(images)
    return sections


def update_readme(text: str, sections: Mapping[str, str]) -> str:
    """`text` with what is between ``<!-- NAME ... -->`` and ``<!-- end -->`` replaced.

    Raises
    ------
    ValueError
        Where a section has no marker, two, or no end before the next marker.
    """
    for name, body in sections.items():
        marker = rf"^<!-- {re.escape(name)}(?![\w-])[^\n]*-->\n"
        whole = rf"({marker})((?!<!-- ).*\n)*?(?=<!-- end -->)"
        found = re.search(whole, text, re.MULTILINE)
        if found is None or len(re.findall(marker, text, re.MULTILINE)) != 1:
            raise ValueError(f"README must have `<!-- {name} -->` once, with an `<!-- end -->`")
        start, end = text[: found.start()] + found[1], text[found.end() :]
        text = f"{start}\n{body.strip()}\n\n{end}"
    return text


def _shown(cells: list[Cell]) -> bool:
    """Whether this is a table of the softmax family with times in it."""
    return analysis.is_row_cell(cells[0]) and any(analysis.time(cell) for cell in cells)


def _benchmarks(result: Result, cells: list[Cell], file: str | None) -> str:
    """The medians of one table, and the comparison of every operation."""
    env = result["environment"]
    dtypes = list(dict.fromkeys(cell["dtype"] for cell in cells))
    by_shape: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        by_shape.setdefault(formats.shape(cell["shape"]), {})[cell["dtype"]] = cell
    header = ["shape"]
    header += [f">{dtype}, {what}" for dtype in dtypes for what in ("µs", "% of ceiling", "× best")]
    rows = [
        [shape, *(text for dtype in dtypes for text in _readme_cell(result, row.get(dtype)))]
        for shape, row in by_shape.items()
    ]
    file = file or f"results/{schema.file_name(result)}"
    link = f"[`{file.rpartition('/')[2]}`]({file})"
    return "\n\n".join(
        [
            f"{escape(env['gpu']['name'])}, {env['date'][:10]}, {_commit(env)}, {link}. "
            f"`{cells[0]['operation']}`: median time of a call with a cold L2 cache, its share of "
            f"the ceiling that the same run measured ({cells[0]['ceiling']}), and the time of the "
            "fastest other contestant over ours: above 1 cuattn is faster.",
            table(header, rows),
            "Every operation, all cells:",
            table(_OPERATION_HEADER, _operation_rows(result)),
        ]
    )


def _readme_cell(result: Result, cell: Cell | None) -> list[str]:
    if cell is None:
        return [NOTHING] * 3
    outcome = analysis.status(cell)
    return [
        formats.microseconds(analysis.time(cell)) if outcome == "ok" else status(outcome),
        formats.percent(analysis.percent_of_ceiling(result, cell)),
        _best_peer_ratio(cell),
    ]


def _best_peer_ratio(cell: Cell) -> str:
    peer = analysis.best_peer(cell)
    return f"{formats.times(analysis.ratio(cell, peer))} {peer}" if peer else NOTHING
