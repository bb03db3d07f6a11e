"""What benchmarks and reports need of cuattn's inside; nothing else in bench imports from there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cuattn import reference
from cuattn._device import compiler, runtime
from cuattn._device.cache import cache_key, load_or_compile
from cuattn._device.directories import cache_directory

# The list of all shipped configurations is the compile test's, the error bound that of all tests.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import attention_backward_cases
import attention_cases
import tolerance
from configurations import TARGETS, kernels

# Instantiations a program. It takes 0.05 s to begin one, and nvdisasm 0.2 s: with 8, all programs
# took 3 % longer and nvdisasm half as long again, for the same registers and spills.
TOGETHER = 32
# Half a second to a second each: several processes share them.
FEWER = {"attention/forward_sm90.cuh": 3, "attention/forward.cuh": 8, "topk/rows.cuh": 8}

RUN = ("sm_80", "sm_90", "sm_90a")  # by the software device

architecture = compiler.architecture
compile_kernel = compiler.compile_kernel
kernel_symbol = compiler.kernel_symbol
load_or_compile = load_or_compile
source_directory = compiler.source_directory
dtype_of = tolerance.dtype_of
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def by_file(arch: str, match: str | None = None) -> list[list[Any]]:
    """Shipped kernels whose name holds the regular expression `match`, in groups that compile
    together: of one source file, for one target."""
    shipped = kernels(TARGETS[arch]).values()
    return in_groups(kernel for kernel in shipped if re.search(match or "", kernel.name))


def in_groups(chosen: Iterable[Any]) -> list[list[Any]]:
    """Kernels in groups that compile together."""
    files: dict[tuple[str, str], list[Any]] = {}
    for kernel in chosen:
        files.setdefault((kernel.header, kernel.text), []).append(kernel)
    groups = []
    for (header, _), group in files.items():
        size = min(TOGETHER, FEWER.get(header, TOGETHER))
        groups += [group[i : i + size] for i in range(0, len(group), size)]
    return groups


class Program(NamedTuple):
    """Several instantiations, compiled together."""

    cubin: bytes  # empty for a virtual target, as compute_90a is
    log: str
    symbols: dict[str, str]  # by name expression
    ptx: str


def compile_together(
    header: str, names: list[str], arch: str, text: str = "", options: tuple[str, ...] = ()
) -> Program:
    """Several instantiations in one program: headers are parsed once.

    Kept in the cache of kernels: the report and the compile test ask for the same ones.
    """
    together = "\n".join((*names, *options))
    kept = cache_directory() / f"{stem(header, together, arch, text)}.together"
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there, damaged, of another form
        return Program(kept.read_bytes(), *json.loads(kept.with_suffix(".json").read_text()))
    program = compile_program(header, names, arch, text, options)
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write(kept, program.cubin)
        write(kept.with_suffix(".json"), json.dumps(program[1:]).encode())  # the text last
        keep_ptx(header, program.symbols, program.ptx, arch, text)
    return program


def keep_ptx(header: str, symbols: dict[str, str], ptx: str, arch: str, text: str = "") -> None:
    """Keep a file of PTX for each kernel of what the software device runs, which then need not
    compile it once more."""
    for name, symbol in symbols.items() if arch in RUN else ():
        path = cache_directory() / f"{stem(header, name, arch, text)}.ptx"
        write(path, alone(ptx, symbol).encode())


def stem(header: str, name: str, arch: str, text: str = "") -> str:
    """What names a file of a kernel, or of some together, by this NVRTC."""
    return f"{cache_key(header, name, arch, text)}-{compiler.version()}"


def write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def alone(ptx: str, *symbols: str) -> str:
    """PTX without the kernels of other names."""
    kept, depth, entry = [], 0, ""
    for line in ptx.splitlines(keepends=True):
        found = re.search(r"\.entry (\w+)", line)
        entry = found[1] if found else entry
        if entry in ("", *symbols):
            kept.append(line)
        depth += line.count("{") - line.count("}")  # assembly has blocks, vectors are balanced
        if depth == 0 and "}" in line:
            entry = ""
    return "".join(kept)


def compile_program(
    header: str, names: list[str], arch: str, text: str = "", options: tuple[str, ...] = ()
) -> Program:
    """The same, whatever the cache holds."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(f"#include <{header}>\n{text}", "together.cu", (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (*compiler.compiler_options(arch), *options))
        except nvrtc.NVRTCError as error:
            raise RuntimeError(nvrtc.getProgramLog(program)) from error
        symbols = {name: nvrtc.getLoweredName(program, name) for name in names}
        virtual = arch.startswith("compute")
        cubin = b"" if virtual else nvrtc.getCUBIN(program) + b"\0"  # CuPy strips the last byte
        ptx = nvrtc.getPTX(program).decode()
        return Program(cubin, nvrtc.getProgramLog(program), symbols, ptx)
    finally:
        nvrtc.destroyProgram(program)


__all__ = [
    "E4M3",
    "TARGETS",
    "allowed",
    "architecture",
    "by_file",
    "compile_kernel",
    "compile_program",
    "compile_together",
    "dtype_of",
    "in_groups",
    "keep_ptx",
    "kernel_symbol",
    "kernels",
    "launched",
    "load_or_compile",
    "source_directory",
    "truth",
    "truth_attention",
    "truth_attention_backward",
    "truth_column_sums",
    "truth_loss",
    "truth_loss_backward",
    "truth_topk",
]


@contextlib.contextmanager
def launched() -> Iterator[list[Any]]:
    """A list of the kernels that calls on a GPU launch while the context lasts, in order."""
    found: list[Any] = []
    launch = runtime.Cuda.launch

    def noted(self: runtime.Cuda, kernel: Any, *args: Any) -> None:
        found.append(kernel)
        launch(self, kernel, *args)

    runtime.Cuda.launch = noted
    try:
        yield found
    finally:
        runtime.Cuda.launch = launch


def truth(name: str, operands: list[np.ndarray], dtype: str) -> tuple[np.ndarray, float]:
    """Float64 result over the last axis of a function of the softmax family, and the largest error
    that the contract allows: twice that of the plain expression in this dtype, and one rounding."""
    if name == "segment_softmax":
        expected = naive = reference.segment_softmax(*operands)
    else:
        expected = getattr(reference, name)(*operands, axis=-1)
        naive = tolerance.NAIVE[name](*operands, axis=-1)
    size = tolerance.TERMS[name](*operands) if name in tolerance.TERMS else abs(expected)
    return expected, allowed(expected, naive, size, dtype)


def truth_loss(name: str, operands: list[np.ndarray], dtype: str) -> tuple[np.ndarray, float]:
    """Float64 result of `cross_entropy` or `entropy`, and the largest error that the contract
    allows a result of this dtype: as in `truth`."""
    expected = getattr(reference, name)(*operands)
    logs = tolerance.naive_log_softmax(operands[0], dtype=dtype_of(dtype))
    if name == "entropy":
        naive = -np.sum(np.exp(logs) * logs, axis=-1, dtype=tolerance.lse_dtype(logs.dtype))
    else:
        naive = -np.take_along_axis(logs, operands[1][:, None], -1)[:, 0]
    return expected, allowed(expected, naive, abs(expected), dtype)


def truth_loss_backward(operands: list[np.ndarray], dtype: str) -> tuple[np.ndarray, float]:
    """The same of `cross_entropy_backward`."""
    grad, x, labels, lse = operands
    hit = labels[:, None] == np.arange(x.shape[1])
    p = np.exp(x.astype(lse.dtype) - lse[:, None])
    naive = (grad[:, None] * (p - hit)).astype(x.dtype)
    size = abs(grad[:, None]) * (p + hit)
    expected = reference.cross_entropy_backward(*operands)
    return expected, allowed(expected, naive, size, dtype)


def truth_topk(
    name: str, x: np.ndarray, k: int, dtype: str
) -> tuple[np.ndarray, np.ndarray, float]:
    """What a function of the top-k family chooses from in float64, the indices of its k best
    elements, and the largest error that the contract allows a value."""
    rows, allowed = (x.astype(np.float64), 0.0) if name == "top_k" else truth("softmax", [x], dtype)
    return rows, reference.top_k(x, k).indices, allowed


def truth_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int, dtype: str, **options: Any
) -> tuple[np.ndarray, float]:
    """Attention of heads (H, S, D) in float64, query 0 standing at place `first` among the keys,
    and the largest error that the contract allows."""
    options["q_offset"] = first
    expected = reference.attention(q, k, v, **options)
    arrays = [array[None] for array in (q, k, v)]
    seen = attention_cases.visible((1, *q.shape[:2], k.shape[1]), **options)
    plain = attention_cases.naive(*arrays, seen, dtype, **options)
    terms = attention_cases.out_terms(dtype, expected, plain)
    size = abs(expected) if terms is None else terms
    return expected, allowed(expected, plain.out[0], size, dtype)


def truth_attention_backward(
    arrays: list[np.ndarray], causal: bool, first: int, dtype: str
) -> list[tuple[np.ndarray, float]]:
    """Gradients dq, dk and dv in float64 of heads that share keys, grad, q, k, v, y (H or 1, S, D)
    and lse (H, S), query 0 standing at place `first` among the keys; and the largest error that the
    contract allows each."""
    options = {"is_causal": causal, "q_offset": first}
    expected = reference.attention_backward(*arrays, **options)[:3]
    shape = (1, *arrays[1].shape[:2], arrays[2].shape[1])
    seen = attention_cases.visible(shape, **options)
    whole = [array[None] for array in arrays]
    naive, sizes = attention_backward_cases.naive_backward(*whole, None, seen, dtype, **options)
    wide = dtype_of(dtype).itemsize > 2  # as `attention_backward_cases.Backward`
    return [
        (ref, allowed(ref, one[0], size if wide else abs(ref), dtype))
        for ref, one, size in zip(expected, naive, sizes, strict=False)
    ]


def truth_column_sums(
    q: np.ndarray, k: np.ndarray, lse: np.ndarray, causal: bool, first: int, dtype: str
) -> tuple[np.ndarray, float, float]:
    """Sums of the probabilities of keys (H, S, D) in float64, query 0 standing at place `first`
    among them; and the largest error that the contract allows, and that of scores in `dtype`."""
    expected = reference.attention_column_sums(q, k, lse, is_causal=causal, q_offset=first)
    s = attention_cases.naive_scores(q[None], k[None], dtype).s[0]
    seen = attention_cases.visible((1, *s.shape), is_causal=causal, q_offset=first)[0]
    p = np.where(seen, np.exp(s - lse[..., None]), 0).astype(lse.dtype)
    size = np.sum(p * (1 + 2 * abs(s) + abs(lse)[..., None]), axis=1)
    limits = (allowed(expected, p.sum(axis=1), size, name) for name in (lse.dtype.name, dtype))
    return (expected, *limits)


def allowed(expected: np.ndarray, naive: np.ndarray, size: np.ndarray, dtype: str) -> float:
    """Twice the error of the plain expression, and one rounding; `size` is of what is added up."""
    table = tolerance.TABLE[dtype]
    naive_error = np.max(abs(naive.astype(np.float64) - expected), initial=0)
    one_rounding = table.relative * np.max(abs(expected), initial=0) + table.absolute
    least = table.plain * (table.relative * np.max(size, initial=0) + table.absolute)
    return float(2 * max(naive_error, least) + one_rounding)
