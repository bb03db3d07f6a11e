"""What the compiler made of every kernel: registers, spills, occupancy, instruction mix, and what
bounds it.

    python -m bench.compiled.kernel_report --arch sm_90 --match softmax_rows --markdown kernels.md

Needs no GPU. The bound comes from a model of one warp's pass through the kernel's main region
(`bench.compiled.sass`) on a multiprocessor that is kept busy: cycles of the SM that the warp takes
from each resource, the largest being the bound. No latencies, no cache hits, no bank conflicts.
Attention is different in one point: its main region reads keys that other blocks read at the same
time, so these bytes are the L2 cache's; but one block alone reads those of a KV cache. Where TMA
moves them, they are not in the SASS, and taken from the tile.

    HBM             bytes of global memory / (HBM bytes/s / SMs / clock)
    L2              bytes of global memory / 64
    issue           instructions / 4 slots, or the arithmetic of a slower float32 or float64 pipe
    exponential     MUFU lanes / 16
    shared memory   wavefronts of 128 bytes
    tensor          FLOPs / the dense bf16 rate, half of it for tf32; float64 as in GPUS
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from bench import inside
from bench.compiled import disassembly, sass
from bench.compiled.disassembly import WHEEL, find_nvdisasm
from bench.compiled.loops import LOOPS
from bench.report import attention as report_attention

ISSUE_SLOTS = 4  # warp instructions a cycle and SM
MUFU_LANES = 16  # a cycle and SM
L2_BYTES = 64  # a cycle and SM, at most
REGISTERS = 65536  # an SM
REGISTER_UNIT, WARP_UNIT = 256, 4  # registers of a warp, warps of an SM: what is allocated at once


class Gpu(NamedTuple):
    """What the model knows of a GPU; rates of an SM are per cycle."""

    name: str
    sms: int
    clock: float  # Hz, boost
    hbm: float  # bytes/s
    warps: int  # an SM
    blocks: int  # an SM
    shared: int  # bytes an SM
    reserved: int  # bytes of it per block, for the system
    shared_unit: int  # bytes
    float_lanes: int  # float32 multiply-adds
    float64_lanes: int  # tensor cores (of A100 and H100) do twice as much
    tensor: int  # dense bf16 FLOPs (T4: float16), accumulated in float32


# CUDA Programming Guide, "Technical Specifications per Compute Capability" and "Throughput of
# Native Arithmetic Instructions"; SMs, clock and memory: the GPU's datasheet or architecture
# whitepaper. Tensor: the datasheet's dense FLOP/s / SMs / clock.
GPUS = {
    "sm_75": Gpu("T4", 40, 1.59e9, 320e9, 32, 16, 64 << 10, 0, 256, 64, 2, 1024),
    "sm_80": Gpu("A100 80 GB SXM", 108, 1.41e9, 2039e9, 64, 32, 164 << 10, 1024, 128, 64, 32, 2048),
    "sm_86": Gpu("A10", 72, 1.695e9, 600e9, 48, 16, 100 << 10, 1024, 128, 128, 2, 1024),
    "sm_89": Gpu("L4", 58, 2.04e9, 300e9, 48, 24, 100 << 10, 1024, 128, 128, 2, 1024),
    "sm_90": Gpu("H200 SXM", 132, 1.98e9, 4800e9, 64, 32, 228 << 10, 1024, 128, 128, 64, 4096),
    "sm_100": Gpu("B200", 148, 1.965e9, 8000e9, 64, 32, 228 << 10, 1024, 128, 128, 64, 8192),
    "sm_120": Gpu("RTX 5090", 170, 2.407e9, 1792e9, 48, 24, 100 << 10, 1024, 128, 128, 2, 512),
}


# ---- Model ----


def occupancy(gpu: Gpu, threads: int, registers: int, shared: int) -> dict[str, Any]:
    """Blocks and warps an SM holds, and the resource that allows no more.

    Blocks of `threads` threads with `registers` each and `shared` bytes of shared memory.
    """
    warps = -(-threads // 32)
    per_warp = _round_up(max(1, registers) * 32, REGISTER_UNIT)
    per_block = _round_up(shared + gpu.reserved, gpu.shared_unit)
    limits = {
        "warps": gpu.warps // warps,
        "blocks": gpu.blocks,
        "registers": REGISTERS // per_warp // WARP_UNIT * WARP_UNIT // warps,
        "shared memory": gpu.shared // per_block if per_block else gpu.blocks,
    }
    limit = min(limits, key=lambda name: limits[name])
    resident = limits[limit] * warps
    percent = round(100 * resident / gpu.warps)
    return {"blocks": limits[limit], "warps": resident, "percent": percent, "limit": limit}


def loads_in_flight(path: list[sass.Instruction]) -> int:
    """Most global loads that are under way at once, each from its issue to the first instruction
    that names one of its registers: what hides the latency of memory within a thread."""
    pending: dict[str, int] = {}  # register to the address of its load
    most = 0
    for instruction in path:
        for register in re.findall(r"\bR\d+\b", instruction.operands):
            if (awaited := pending.get(register)) is not None:
                pending = {name: load for name, load in pending.items() if load != awaited}
        if instruction.access == "load":
            first = re.match(r"R(\d+)", instruction.operands)
            for i in range(max(1, instruction.width // 4) if first else 0):
                pending[f"R{int(first[1]) + i}"] = instruction.address
        most = max(most, len(set(pending.values())))
    return most


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def cycles(gpu: Gpu, mix: dict[str, int], cached: bool = False) -> dict[str, float]:
    """Cycles of an SM that a warp's pass through its main region takes from each resource; if
    `cached`, global memory is read from L2."""
    memory = ("L2", L2_BYTES) if cached else ("HBM", gpu.hbm / gpu.sms / gpu.clock)
    issue = max(
        mix["total"] / ISSUE_SLOTS,
        32 * mix["float"] / gpu.float_lanes,
        32 * mix["float64"] / gpu.float64_lanes,
    )
    slow = mix["float64_flops"]
    tensor = (mix["tensor_flops"] - slow + mix["tf32_flops"]) / gpu.tensor
    found = {
        memory[0]: 32 * (mix["read_bytes"] + mix["written_bytes"]) / memory[1],
        "issue": issue,
        "exponential": 32 * mix["mufu"] / MUFU_LANES,
        "shared memory": mix["wavefronts"],
        "tensor": tensor + slow / (4 * gpu.float64_lanes),
    }
    return {name: round(value, 2) for name, value in found.items()}


def bound(cycles: dict[str, float]) -> tuple[str, float]:
    """The resource that takes the most cycles, and the runner-up's cycles as a fraction of its."""
    first, second = sorted(cycles, key=lambda name: cycles[name], reverse=True)[:2]
    return first, round(cycles[second] / cycles[first], 3)


# ---- Rows ----


def rows_of(kernels: list[Any], arch: str) -> list[dict[str, Any]]:
    """The report on kernels of one file; without nvdisasm, what the compiler says."""
    gpu = GPUS[arch]
    found = []
    for kernel, code in zip(kernels, disassembly.compile_kernels(kernels, arch), strict=True):
        shared = code.smem_bytes + kernel.smem_bytes
        held = occupancy(gpu, kernel.block, code.registers, shared)
        row = {
            "arch": arch,
            "gpu": gpu.name,
            "kernel": kernel.name,
            "header": kernel.header,
            "threads": kernel.block,
            "cluster": kernel.cluster,
            "registers": code.registers,
            "spill_bytes": code.spill_bytes,
            "smem_bytes": shared,
            "occupancy": held,
            **dict.fromkeys(("region", "mix", "global_bytes", "cycles", "bound", "headroom")),
            "note": code.note,
        }
        if code.sass is not None:
            blocks = sass.parse(code.sass)
            if kernel.header in LOOPS:
                loop = LOOPS[kernel.header]
                if known := loop.mix(blocks, kernel):
                    row |= predicted(gpu, *known, cached=loop.CACHED)
            else:
                row |= predicted(gpu, sass.main_region(blocks))
        found.append(row)
    return found


def predicted(
    gpu: Gpu, region: sass.Region, mix: dict[str, int] | None = None, cached: bool = False
) -> dict[str, Any]:
    """What a row says of the main region: its mix, and what the model makes of it."""
    mix = (mix or sass.mix(region.path)) | {"loads_in_flight": loads_in_flight(region.path)}
    used = cycles(gpu, mix, cached)
    first, headroom = bound(used)
    return {
        "region": region.kind,
        "mix": mix,
        "global_bytes": {"read": mix["read_bytes"], "written": mix["written_bytes"]},
        "cycles": used,
        "bound": first,
        "headroom": headroom,
        "note": "tensor FLOPs unknown" if mix["tensor"] and not mix["tensor_flops"] else "",
    }


def report(
    archs: list[str], match: str | None = None, jobs: int = 2, limit_seconds: float | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of all shipped kernels whose name expression holds the regular expression `match`.

    `jobs` processes work on them, for `limit_seconds` at most. The second result names architecture
    and kernel of those that the limit left out.
    """
    tasks = [(kernels, arch) for arch in archs for kernels in inside.by_file(arch, match)]
    with (  # not forked: the caller may have a CUDA context
        concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool,
        tqdm(total=len(tasks), unit="program", disable=None) as bar,
    ):
        futures = [pool.submit(rows_of, *task) for task in tasks]
        for future in futures:
            future.add_done_callback(lambda _: bar.update())
        done, late = concurrent.futures.wait(futures, limit_seconds, return_when="FIRST_EXCEPTION")
        for future in late:
            future.cancel()
        for process in multiprocessing.active_children() if late else ():
            process.kill()  # what has begun may take minutes
    found = list(zip(tasks, futures, strict=True))
    rows = [row for _, future in found if future in done for row in future.result()]
    left_out = [task for task, future in found if future not in done]
    return rows, [f"{arch} {kernel.name}" for kernels, arch in left_out for kernel in kernels]


# ---- Output ----


def markdown(rows: list[dict[str, Any]], left_out: list[str]) -> str:
    """Summary, and one table an architecture."""
    lines = ["| architecture | kernels | with spills | bound |", "|---|--:|--:|---|"]
    groups = [(arch, list(group)) for arch, group in itertools.groupby(rows, lambda r: r["arch"])]
    for arch, group in groups:
        bounds = Counter(r["bound"] or "unknown" for r in group).most_common()
        spills = sum(r["spill_bytes"] > 0 for r in group)
        text = ", ".join(f"{name} {count}" for name, count in bounds)
        lines.append(f"| {arch} ({group[0]['gpu']}) | {len(group)} | {spills} | {text} |")
    if left_out:
        lines += ["", f"{len(left_out)} kernels are left out: the time limit."]
    lines += ["", *sorted({r["note"] for r in rows if r["note"]})]
    columns = "kernel|regs|spills|smem|warps/SM|instructions|MUFU|MMA|LDS/STS|bytes|in flight"
    columns += "|bound|headroom"
    for arch, group in groups:
        lines += ["", f"## {arch}", "", f"|{columns}|", "|---" + "|--:" * 10 + "|---|--:|"]
        lines += [_line(r) for r in group]
    for own in (report_attention.tiles(rows), report_attention.keys(rows)):
        lines += ["", own] if own else []
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    cells = [f"`{row['kernel']}`", row["registers"], row["spill_bytes"]]
    cells += [row["smem_bytes"], row["occupancy"]["warps"]]
    if mix := row["mix"]:
        cells += [mix[name] for name in ("total", "mufu", "tensor")]
        cells += [f"{mix['shared_load']}/{mix['shared_store']}"]
        cells += [f"{mix['read_bytes']} + {mix['written_bytes']}", mix["loads_in_flight"]]
        cells += [row["bound"], row["headroom"]]
    else:
        cells += [""] * 8
    return f"|{'|'.join(map(str, cells))}|"


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        "bench.compiled.kernel_report", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--arch", nargs="+", default=["sm_80", "sm_90"], choices=[*GPUS, "all"])
    add("--match", metavar="REGEX", help="only kernels whose name expression holds it")
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE", help="standard output if neither file is given")
    add("--limit-seconds", type=float, metavar="S")
    add("--jobs", type=int, default=2)
    given = parser.parse_args(arguments)
    archs = list(GPUS) if "all" in given.arch else given.arch
    rows, left_out = report(archs, given.match, given.jobs, given.limit_seconds)
    if given.json:
        given.json.write_text(json.dumps({"kernels": rows, "left_out": left_out}, indent=1) + "\n")
    if given.markdown:
        given.markdown.write_text(markdown(rows, left_out))
    if not (given.json or given.markdown):
        print(markdown(rows, left_out), end="")
    if rows and find_nvdisasm() is None:
        print(f"no instruction mix: pip install {WHEEL}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
