"""Results of checkups that never were: every number is known, none is a measurement."""

from __future__ import annotations

from typing import Any

MICROSECOND = 1e-6
COPY, MATMUL = 4.0e12, 8.0e14  # B/s, FLOP/s


def contestant(name: str, seconds: float | None = None, status: str = "ok", **more: Any) -> dict:
    """Five samples around a median of `seconds` cold, and half of that warm; or a failure."""
    ok = status == "ok"
    assert ok == (seconds is not None)
    factors = (1.0, 0.9, 1.3, 0.8, 1.1)
    return {
        "name": name,
        "status": status,
        "detail": "" if ok else f"{name} is {status}",
        "plan": ["softmax_rows<Forward<float, 1>, 512, 1>"] if ok and name == "cuattn" else None,
        "max_error": 2e-7 if ok else None,
        "allowed_error": 1e-6 if ok else None,
        "clock": "graph" if ok else None,
        "peak_bytes": None,
        "cold": [seconds * f for f in factors] if ok else [],
        "warm": [seconds * f / 2 for f in factors] if ok else [],
    } | more


def cell(operation, grid, shape, dtype, entries, work=(1 << 30, 0), ceiling="copy", priority=1):
    """One cell; `work` is bytes and FLOPs."""
    return {
        "operation": operation,
        "grid": grid,
        "shape": shape,
        "dtype": dtype,
        "priority": priority,
        "work": {"bytes": work[0], "flops": work[1], "formula": "read x + write y"},
        "ceiling": ceiling,
        "contestants": entries,
    }


def empty() -> dict[str, Any]:
    """A checkup on a machine without a GPU, of which no part gave a number."""
    return {
        "schema": 1,
        "environment": {
            "date": "2031-02-03T04:05:06Z",
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "dirty": False,
            "gpu": None,
            "cpu": "a CPU",
            "cores": 2,
            "python": "3.11.7",
            "packages": {"numpy": "2.4.0", "cupy": None},
        },
        "parts": [{"name": "benchmarks", "status": "skipped", "seconds": 0, "detail": "no GPU"}],
        "ceilings": {},
        "peers": {"found": {}, "missing": {"torch": "not installed"}},
        "cells": [],
        "ladder": [],
        "counters": [],
        "kernels": [],
        "host_cost": [],
        "compile_time": [],
        "import_time": {},
    }


def softmax_cells() -> list[dict[str, Any]]:
    """11 lengths in two dtypes; the peer is slower by 2 everywhere but in the last cell."""
    cells = []
    for dtype, itemsize in (("bfloat16", 2), ("float32", 4)):
        for exponent in range(8, 19):
            rows, cols = 1 << 26 - exponent, 1 << exponent
            moved = 2 * rows * cols * itemsize
            share = 0.9 - 0.1 * (exponent < 10)
            seconds = moved / (share * COPY)
            slowed = 0.8 if (dtype, exponent) == ("float32", 18) else 2.0
            entries = [
                contestant("cuattn", seconds),
                contestant("torch.compile", seconds * slowed),
                contestant("cupyx", seconds * 4.0, clock="events"),
            ]
            if exponent == 12:
                entries[1] = contestant("torch.compile", status="wrong", detail="error 3 > 1e-6")
            if exponent == 16:
                entries[2] = contestant("cupyx", status="hung", detail="no answer in 60 s")
            shape = {"rows": rows, "cols": cols}
            cells.append(cell("softmax", "quack", shape, dtype, entries, (moved, 0)))
    return cells


def top_k_cells() -> list[dict[str, Any]]:
    """3 numbers of rows by 4 lengths; ours is wrong in one cell, and slower in one."""
    cells = []
    for i, rows in enumerate((1, 8, 64)):
        for j, cols in enumerate((32_000, 50_257, 128_256, 201_088)):
            seconds = 10 * MICROSECOND * (i + j + 1)
            peer = ("torch", "cupy")[(i + j) % 2]
            entries = [
                contestant("cuattn", seconds),
                contestant(peer, seconds * (0.5 if (i, j) == (0, 0) else 1.0 + i + j / 4)),
            ]
            if (i, j) == (2, 3):
                entries[0] = contestant("cuattn", status="wrong", detail="indices differ")
            shape = {"rows": rows, "cols": cols, "k": 5}
            where = ("softmax_topk", "vocabulary-topk", shape, "float32")
            cells.append(cell(*where, entries, (4 * rows * cols, 0)))
    return cells


def paper_cells() -> list[dict[str, Any]]:
    """3 cells of the paper's top-k; torch is wrong in one, the paper's kernels faster in one."""
    cells = []
    for (rows, cols), paper, torch in (
        ((4000, 63), 5.0, 2.0),
        ((4000, 126), 2.5, None),
        ((10, 63), 0.5, 1.5),
    ):
        seconds = 10 * MICROSECOND
        entries = [
            contestant("cuattn", seconds),
            contestant("paper: safe softmax, then top-5", seconds * paper),
            contestant("torch softmax, topk", seconds * torch)
            if torch
            else contestant("torch softmax, topk", status="wrong"),
        ]
        shape = {"rows": rows, "cols": cols, "k": 5}
        where = ("softmax_topk", "paper-topk", shape, "float32")
        cells.append(cell(*where, entries, (4 * rows * cols, 0), "read"))
    return cells


def attention_cells() -> list[dict[str, Any]]:
    """6 lengths, three head dimensions, causal or not; plain products need quadratic memory."""
    cells = []
    for head_dim in (64, 128, 256):
        for causal in (0, 1):
            for exponent in range(9, 15):
                n, heads = 1 << exponent, 2048 // head_dim
                shape = {"batch": (1 << 14) // n, "heads": heads, "kv_heads": heads}
                shape |= {"seqlen_q": n, "seqlen_k": n, "head_dim": head_dim, "causal": causal}
                flops = 4 * (1 << 14) * n * 2048 // (1 + causal)
                best = flops / (MATMUL * (0.4 + 0.05 * (exponent - 9)))
                plain = (1 << 14) * n * heads * 4
                entries = [
                    contestant("cuattn", best, peak_bytes=1 << 26),
                    contestant("flash_attn", best * 1.1, peak_bytes=(1 << 26) + (1 << 20)),
                    contestant("matmul", best * 5, peak_bytes=plain),
                ]
                if n == 1 << 14:
                    entries[2] = contestant("matmul", status="failed", detail="out of | memory")
                where = ("attention", "flash-attention", shape, "bfloat16")
                cells.append(cell(*where, entries, (1 << 26, flops), "matmul"))
    return cells


def full() -> dict[str, Any]:
    """A checkup on a GPU with something in every part."""
    ceiling = {"formula": "2 * n bytes / s: read + write", "samples": [2e-3, 1e-3, 3e-3]}
    kernel = {
        "arch": "sm_90",
        "gpu": "H100",
        "kernel": "softmax_rows<Forward<float, 1>, 512, 1>",
        "header": "softmax/rows.cuh",
        "threads": 512,
        "cluster": 1,
        "registers": 64,
        "spill_bytes": 0,
        "smem_bytes": 128,
        "occupancy": {"blocks": 4, "warps": 64, "percent": 100.0, "limit": "registers"},
        "region": "kernel",
        "mix": {"mufu": 8, "total": 200},
        "global_bytes": {"read": 64, "written": 64},
        "cycles": {"memory": 50.0, "issue": 20.5},
        "bound": "memory",
        "headroom": 0.4,
        "note": "",
    }
    gpu = {
        "name": "NVIDIA Test GPU",
        "compute_capability": 90,
        "num_sms": 132,
        "memory_bytes": 80 << 30,
        "l2_bytes": 50 << 20,
        "driver": "580.1",
        "cuda": "13.0",
        "sm_mhz": 1980,
        "sm_mhz_max": 1980,
        "memory_mhz": None,
        "power_limit_w": 700.0,
        "temperature_c": 40,
    }
    step = {
        "algorithm": "online softmax",
        "file": "bench/baselines/online_softmax.cuh",
        "ours": False,
        "group": "softmax",
        "rows": 8,
        "cols": 4096,
        "reads": 2.0,
        "writes": 1.0,
        "accesses": 3.0,
        "exponentials": 2.25,
        "overflows": False,
        "note": "algorithm 3",
    }
    counted = {
        "operation": "logsumexp",
        "arch": "sm_80",
        "rows": 4,
        "cols": 1000,
        "dtype": "float32",
        "kernels": ["softmax_split<SoftmaxForward<float, kLse>, kReduce, 32, 4, 8>"],
        "reads": 1.0,
        "writes": 0.25,
        "sectors": 1.5,
        "exponentials": 1.125,
        "conflicts": 0,
        "barriers": 3,
        "allocated_bytes": 4096,
    }
    result = empty()
    result["environment"]["gpu"] = gpu
    return result | {
        "parts": [
            {"name": "benchmarks", "status": "ok", "seconds": 60.5, "detail": ""},
            {"name": "tests", "status": "timeout", "seconds": 30.0, "detail": "a | b\nc"},
        ],
        "ceilings": {
            "copy": ceiling | {"unit": "B/s", "work": COPY * 2e-3},
            "matmul": ceiling | {"unit": "FLOP/s", "work": MATMUL * 2e-3},
        },
        "peers": {"found": {"torch": "2.11.0"}, "missing": {"flash_attn": "not installed"}},
        "cells": softmax_cells() + top_k_cells() + attention_cells(),
        "ladder": [
            step | {"overflows": True},
            step | {"algorithm": "cuattn.softmax", "ours": True, "accesses": 2.0},
        ],
        "counters": [counted],
        "kernels": [kernel, kernel | {"spill_bytes": 24, "bound": "issue"}],
        "host_cost": [{"name": "softmax", "seconds": [9e-6, 8e-6, 10e-6]}],
        "compile_time": [
            {"what": "cold", "kernel": kernel["kernel"], "arch": "sm_90", "seconds": [0.25, 0.75]}
        ],
        "import_time": {"numpy": [0.1, 0.2, 0.3], "cuattn": [0.125]},
    }
