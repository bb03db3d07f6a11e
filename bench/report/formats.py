"""Numbers, names and tables as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from bench.grids import FLAGS

NOTHING = "–"
WORST_FIRST = "crashed failed timeout hung wrong absent unsupported skipped ok".split()
LONGEST_DETAIL = 300  # characters; the result file has all of them


def escape(text: str) -> str:
    """Text of any origin as one line that means nothing to Markdown tables or HTML."""
    text = " ".join(text.split())
    if len(text) > LONGEST_DETAIL:
        text = text[:LONGEST_DETAIL] + " …"
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a column whose header starts with ">" is set to the right."""
    lines = [
        "| " + " | ".join(name.removeprefix(">") for name in header) + " |",
        "|" + "|".join("--:" if name.startswith(">") else "---" for name in header) + "|",
    ]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def section(title: str, text: str) -> str:
    """A section; nothing if it has no text."""
    return f"## {title}\n\n{text}" if text else ""


def status(name: str) -> str:
    """A status; bold where something went wrong."""
    return name if name in ("ok", "skipped", "unsupported") else f"**{name}**"


def number(value: float | None, digits: int = 3) -> str:
    """A number rounded to significant digits, never with an exponent."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    rounded = round(value, digits - 1 - magnitude)
    magnitude = math.floor(math.log10(abs(rounded)))  # 9.996 has become 10.00
    return f"{rounded:.{max(0, digits - 1 - magnitude)}f}"


def microseconds(seconds: float | None) -> str:
    """Seconds as microseconds, without the unit."""
    return number(None if seconds is None else seconds * 1e6)


def rate(value: float | None, ceiling: str) -> str:
    """A rate in B/s as GB/s or, where the ceiling is matmul, in FLOP/s as TFLOP/s."""
    if value is None:
        return NOTHING
    return (
        f"{number(value / 1e12)} TFLOP/s" if ceiling == "matmul" else f"{number(value / 1e9)} GB/s"
    )


def mebibytes(size: int | None) -> str:
    """Bytes as MiB, without the unit."""
    return number(None if size is None else size / 2**20)


def percent(value: float | None) -> str:
    """A percentage, to whole percents."""
    return NOTHING if value is None else f"{value:.0f} %"


def times(ratio: float | None) -> str:
    """A ratio; bold where cuattn is the slower one."""
    if ratio is None:
        return NOTHING
    return f"**{number(ratio)}×**" if ratio < 1 else f"{number(ratio)}×"


def shape(sizes: dict[str, int]) -> str:
    """The sizes of a cell: "rows × cols" first, then the other names with their values.

    Flags are words or nothing; key heads and key length are there only where they are not those of
    the query.
    """
    rest = dict(sizes)
    parts = []
    if {"rows", "cols"} <= rest.keys():
        parts.append(f"{rest.pop('rows')} × {rest.pop('cols')}")
    if rest.get("kv_heads") == rest.get("heads"):
        rest.pop("kv_heads", None)
    if "seqlen_k" in rest and rest["seqlen_k"] == rest.get("seqlen_q"):
        rest = {"seqlen" if n == "seqlen_q" else n: v for n, v in rest.items() if n != "seqlen_k"}
    for name, value in rest.items():
        if name not in FLAGS:
            parts.append(f"{name} {value}")
        elif value:
            parts.append(name)
    return ", ".join(parts)


def cell(where: dict[str, Any]) -> str:
    """The name of a cell: operation, shape, dtype."""
    return f"{where['operation']} {shape(where['shape'])} {where['dtype']}"


def plan(kernels: Sequence[str] | None) -> str:
    """Kernels with their numbers, without the types of their operation."""
    short = [re.sub(r"(?<=[<, ])\w+<[^<>]*>(?:, )?", "", kernel) for kernel in kernels or ()]
    return " + ".join(f"`{kernel}`" for kernel in short) or NOTHING
