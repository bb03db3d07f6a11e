"""The tables of a report that only attention has: speed-ups with their baseline, peak memory,
FlashAttention's headlines, and what Hopper's kernels do for a tile of keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench import attention_shapes
from bench.report import formats
from bench.report.formats import section, table
from bench.timing import analysis

Result = dict[str, Any]
Cell = dict[str, Any]
BASELINE = "CuPy expression"
EXPRESSION = "softmax(scale * q @ k.T) @ v"
# FlashAttention, arXiv:2205.14135, abstract: training, over what was the fastest before.
PAPER = {"BERT-large": "1.15×", "GPT-2 medium": "3×"}


def speed_ups(cells: list[Cell]) -> Iterable[str]:
    """Of one table: the ratio to every contestant by its name, and peak memory beside operands."""
    if cells[0]["operation"] not in ("attention", "transformer"):
        return
    names = list(dict.fromkeys(name for cell in cells for name in analysis.peers(cell)))
    names.sort(key=lambda name: name != BASELINE)
    yield (
        f"Speed-up of cuattn over each contestant, with a cold L2 cache. The baseline, "
        f"`{BASELINE}`, is `{EXPRESSION}` with the matrix of the scores in memory. Peak memory is "
        "beside the operands."
    )
    header = ["shape", "dtype", *(f">over `{name}`" for name in names)]
    rows = [
        [formats.shape(cell["shape"]), cell["dtype"]]
        + [formats.times(analysis.ratio(cell, name)) for name in names]
        + _memory(cell)
        for cell in cells
    ]
    yield table([*header, ">MiB", f">MiB of `{BASELINE}`", ">ratio"], rows)


def headlines(result: Result) -> str:
    """Whole transformers with attention written by hand and with cuattn's: time and peak memory."""
    models = [cell for cell in result["cells"] if cell["operation"] == "transformer"]
    if not models:
        return ""
    rows = []
    for cell in models:
        name = model(cell)
        alone = _attention_of(result, cell)
        rows.append(
            [
                name,
                *(_milliseconds(cell, each) for each in (BASELINE, analysis.OURS)),
                formats.times(analysis.ratio(cell, BASELINE)),
                PAPER.get(name, formats.NOTHING),
                *_memory(cell),
                formats.times(analysis.ratio(alone, BASELINE)) if alone else formats.NOTHING,
                *(_memory(alone) if alone else [formats.NOTHING] * 3),
            ]
        )
    text = (
        f"Forward passes with random weights, all in CuPy; attention by hand is `{EXPRESSION}` "
        "with the matrix of the scores in memory, all else is the same code. Cold L2 cache; peak "
        "memory beside weights and tokens. The paper's figures are of training, over the fastest "
        "implementations of its time."
    )
    header = ["model", ">ms by hand", ">ms with cuattn", ">speed-up", ">paper"]
    header += [">MiB", ">MiB by hand", ">ratio", ">attention alone"]
    header += [">its MiB", ">its MiB by hand", ">its ratio"]
    return section("Transformers", f"{text}\n\n{table(header, rows)}")


_COUNTED = ("total", "tensor", "mufu", "ffma", "fadd", "fmnmx", "fmul", "f2fp", "uniform")
_COUNTED += ("shared_load", "shared_store", "bar", "syncs")


_OF_KEYS = ("HBM", "issue", "shared memory", "tensor")


def tiles(kernels: list[dict[str, Any]]) -> str:
    """What a warp of Hopper's attention kernels does for a tile of keys; rows of the kernel
    report, of which others are passed over."""
    found = [row for row in kernels if row["mix"] and row["header"] == "attention/forward_sm90.cuh"]
    if not found:
        return ""
    resources = ("tensor", "exponential", "issue", "L2")
    rows = [
        [
            formats.plan([row["kernel"]]),
            *(str(row["mix"][name]) for name in _COUNTED),
            formats.number(4 * row["mix"]["tensor_flops"] / 1e6),
            *(formats.number(row["cycles"][name]) for name in resources),
            row["bound"],
        ]
        for row in found
    ]
    text = (
        "Attention on Hopper: instructions of a warp for a tile of keys that needs no mask and no "
        "rescale. A tensor instruction is of four warps and counts in each, its FLOPs are those "
        "of all four. Cycles: of an SM, for one warp."
    )
    header = ["kernel", *(f">{name.replace('_', ' ')}" for name in _COUNTED), ">MFLOP"]
    header += [f">{name} cycles" for name in resources]
    return f"{text}\n\n{table([*header, 'bound'], rows)}"


def keys(kernels: list[dict[str, Any]]) -> str:
    """What a warp does for a key of a KV cache; of other kernels the rows are passed over."""
    found = [row for row in kernels if row["mix"] and "keys" in row["mix"]]
    if not found:
        return ""
    rows = []
    for row in found:
        mix, cycles = row["mix"], row["cycles"]
        e4m3 = mix["total"] + mix["converting"]
        rows.append(
            [
                row["arch"],
                formats.plan([row["kernel"]]),
                formats.number(mix["total"] / mix["keys"]),
                *(formats.number(cycles[name] / mix["keys"]) for name in _OF_KEYS),
                row["bound"],
                formats.number(e4m3 / mix["keys"]) if mix["converting"] else "",
                *(
                    [formats.number(cycles["HBM"] / 2 / mix["keys"])]
                    + [formats.number(e4m3 / 4 / mix["keys"])]
                    if mix["converting"]
                    else ["", ""]
                ),
            ]
        )
    text = (
        "Attention over a KV cache: of a warp, for each key of a tile that needs no mask and no "
        "rescale. Cycles: of an SM. Of a cache of e4m3 without scales of tokens: instructions, and "
        "cycles of HBM and of their issue, at most."
    )
    header = ["GPU", "kernel", ">instructions", *(f">{name} cycles" for name in _OF_KEYS), "bound"]
    header += [">e4m3: instructions", ">HBM cycles", ">issue cycles"]
    return f"{text}\n\n{table(header, rows)}"


def model(cell: Cell) -> str:
    """The name of a transformer, or its shape."""
    names = [*attention_shapes.TRANSFORMERS]
    shapes = list(attention_shapes.transformer_shapes())
    if cell["shape"] in shapes:
        return names[shapes.index(cell["shape"])]
    return formats.shape(cell["shape"])


def _attention_of(result: Result, transformer: Cell) -> Cell | None:
    """The attention of one of its layers."""
    sizes = {name: size for name, size in transformer["shape"].items() if name != "layers"}
    wanted = "attention", sizes, transformer["dtype"]
    for cell in result["cells"]:
        if (cell["operation"], cell["shape"], cell["dtype"]) == wanted:
            return cell
    return None


def _milliseconds(cell: Cell, name: str) -> str:
    seconds = analysis.time(cell, name)
    if seconds is None:
        return formats.status(analysis.status(cell, name))
    return formats.number(seconds * 1e3)


def _memory(cell: Cell) -> list[str]:
    """MiB of ours and of the baseline, and how many times ours that is."""
    ours, baseline = (analysis.peak_bytes(cell, name) for name in (analysis.OURS, BASELINE))
    ratio = baseline / ours if ours and baseline is not None else None
    return [formats.mebibytes(ours), formats.mebibytes(baseline), formats.times(ratio)]
