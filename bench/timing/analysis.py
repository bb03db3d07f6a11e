"""What the samples of a result say: medians, rates, shares of a ceiling, ratios.

Only contestants with status "ok" have times. Where there is nothing to compute from, the answer is
None, never a division by zero. `state` is "cold" or "warm": what the L2 cache holds before a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

OURS = "cuattn"


def median(samples: Sequence[float]) -> float | None:
    """The median of samples in seconds."""
    return float(np.median(samples)) if len(samples) else None


def spread(samples: Sequence[float]) -> tuple[float, float] | None:
    """The 20th and 80th percentile of samples in seconds, interpolated linearly."""
    if not len(samples):
        return None
    low, high = np.percentile(samples, (20, 80))
    return float(low), float(high)


def entry(cell: dict[str, Any], name: str = OURS) -> dict[str, Any] | None:
    """What a cell says about a contestant; None if it did not take part."""
    return next((entry for entry in cell["contestants"] if entry["name"] == name), None)


def status(cell: dict[str, Any], name: str = OURS) -> str:
    """The status of a contestant; "absent" if it did not take part."""
    found = entry(cell, name)
    return found["status"] if found else "absent"


def samples(cell: dict[str, Any], name: str, state: str = "cold") -> list[float]:
    """Seconds per call; empty unless the contestant is ok."""
    found = entry(cell, name)
    return found[state] if found and found["status"] == "ok" else []


def time(cell: dict[str, Any], name: str = OURS, state: str = "cold") -> float | None:
    """The median of a contestant, in seconds per call."""
    return median(samples(cell, name, state))


def rate(cell: dict[str, Any], name: str = OURS, state: str = "cold") -> float | None:
    """Work a second: FLOP/s if the cell's ceiling is matmul, else B/s."""
    return _divide(_work(cell), time(cell, name, state))


def predicted_rate(cell: dict[str, Any], name: str = OURS) -> float | None:
    """The rate that a model predicts, not a measured one; None where there is no model."""
    found = entry(cell, name)
    return _divide(_work(cell), found.get("predicted")) if found else None


def ceiling_rate(result: dict[str, Any], name: str) -> float | None:
    """What the machine reached, in B/s (copy, read) or FLOP/s (matmul)."""
    ceiling = result["ceilings"].get(name)
    return _divide(ceiling["work"], median(ceiling["samples"])) if ceiling else None


def percent_of_ceiling(
    result: dict[str, Any], cell: dict[str, Any], name: str = OURS, state: str = "cold"
) -> float | None:
    """The rate of a contestant as a percentage of the cell's ceiling."""
    share = _divide(rate(cell, name, state), ceiling_rate(result, cell["ceiling"]))
    return None if share is None else 100 * share


def ratio(cell: dict[str, Any], peer: str, state: str = "cold") -> float | None:
    """median(peer) / median(cuattn): above 1 means that cuattn is faster."""
    return _divide(time(cell, peer, state), time(cell, OURS, state))


def peers(cell: dict[str, Any]) -> list[str]:
    """The contestants of a cell other than cuattn."""
    return [entry["name"] for entry in cell["contestants"] if entry["name"] != OURS]


def best_peer(cell: dict[str, Any], state: str = "cold") -> str | None:
    """The ok peer with the smallest median."""
    ok = [name for name in peers(cell) if status(cell, name) == "ok"]
    return min(ok, key=lambda name: time(cell, name, state) or math.inf, default=None)


def peak_bytes(cell: dict[str, Any], name: str = OURS) -> int | None:
    """Device memory of an ok contestant beside its operands, if it is known."""
    found = entry(cell, name)
    return found["peak_bytes"] if found and found["status"] == "ok" else None


def is_row_cell(cell: dict[str, Any]) -> bool:
    """Whether a cell is of the softmax family: rows of a length, without a top-k."""
    return {"rows", "cols"} <= cell["shape"].keys() and "k" not in cell["shape"]


def tables(result: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Operation and grid to their cells, by the priority of the first cell."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in sorted(result["cells"], key=lambda cell: cell["priority"]):
        groups.setdefault((cell["operation"], cell["grid"]), []).append(cell)
    return groups


def geometric_mean(values: Sequence[float]) -> float | None:
    """The geometric mean of positive numbers."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if len(values) else None


@dataclass(frozen=True)
class Comparison:
    """One cell against one peer."""

    cell: dict[str, Any]
    peer: str
    ratio: float


@dataclass(frozen=True)
class PeerSummary:
    """All cells against one peer; cells without an ok cuattn or an ok peer have no ratio."""

    name: str
    cells: int  # with a ratio
    geometric_mean: float | None
    worst: Comparison | None
    not_ok: int  # cells where the peer took part and was not ok
    other_clock: int  # of `cells`, those where it was not timed with cuattn's clock


@dataclass(frozen=True)
class Summary:
    """All cells of an operation, or of all operations."""

    cells: int
    failures: list[dict[str, Any]]  # cells without an ok cuattn
    compared: int  # cells with an ok peer: those of `failures` among them count as not ahead
    ahead: int  # cells where cuattn is faster than every ok peer
    geometric_mean: float | None  # of the ratios to each cell's best peer
    worst: list[Comparison]  # the three lowest ratios to the best peer, lowest first
    peers: list[PeerSummary]


def summary(result: dict[str, Any], operation: str | None = None, state: str = "cold") -> Summary:
    """How cuattn compares in all cells, or those of one operation."""
    cells = [cell for cell in result["cells"] if operation in (None, cell["operation"])]
    names = sorted({name for cell in cells for name in peers(cell)})
    best = _comparisons(cells, lambda cell: best_peer(cell, state), state)
    return Summary(
        cells=len(cells),
        failures=[cell for cell in cells if status(cell) != "ok"],
        compared=sum(best_peer(cell, state) is not None for cell in cells),
        ahead=sum(found.ratio > 1 for found in best),
        geometric_mean=geometric_mean([found.ratio for found in best]),
        worst=best[:3],
        peers=[_peer_summary(cells, name, state) for name in names],
    )


def losing_cells(result: dict[str, Any], state: str = "cold") -> list[Comparison]:
    """The cells where the best peer is faster than cuattn, the worst first."""
    best = _comparisons(result["cells"], lambda cell: best_peer(cell, state), state)
    return [found for found in best if found.ratio < 1]


def _peer_summary(cells: list[dict[str, Any]], name: str, state: str) -> PeerSummary:
    found = _comparisons(cells, lambda cell: name, state)
    return PeerSummary(
        name=name,
        cells=len(found),
        geometric_mean=geometric_mean([each.ratio for each in found]),
        worst=found[0] if found else None,
        not_ok=sum(status(cell, name) not in ("ok", "absent") for cell in cells),
        other_clock=sum(other_clock(each.cell, name) for each in found),
    )


def other_clock(cell: dict[str, Any], peer: str) -> bool:
    """Whether an ok peer and an ok cuattn were timed with different clocks."""
    clocks = {found["clock"] for name in (OURS, peer) if (found := entry(cell, name))}
    return status(cell) == status(cell, peer) == "ok" and len(clocks) > 1


def _comparisons(
    cells: list[dict[str, Any]], peer_of: Callable[[dict[str, Any]], str | None], state: str
) -> list[Comparison]:
    """The cells that have a ratio to the peer that `peer_of` names, the lowest first."""
    found = []
    for cell in cells:
        peer = peer_of(cell)
        value = ratio(cell, peer, state) if peer else None
        if peer and value is not None:
            found.append(Comparison(cell, peer, value))
    return sorted(found, key=lambda each: each.ratio)


def _work(cell: dict[str, Any]) -> int:
    return cell["work"]["flops" if cell["ceiling"] == "matmul" else "bytes"]


def _divide(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
