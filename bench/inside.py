"""What benchmarks and reports need of cuattn's inside; nothing else in bench imports from there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cuattn import _jit, _nvrtc, reference

# The list of all shipped configurations is the compile test's, the error bound that of all tests.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import tolerance
from configurations import TARGETS, kernels

architecture = _nvrtc.architecture
compile_kernel = _nvrtc.compile_kernel
kernel_symbol = _nvrtc.kernel_symbol
load_or_compile = _nvrtc.load_or_compile
source_directory = _nvrtc.source_directory
dtype_of = tolerance.dtype_of


def compile_together(
    header: str, names: list[str], arch: str, options: tuple[str, ...] = ()
) -> tuple[bytes, str, dict[str, str]]:
    """Cubin and log of several instantiations, and the symbol of each; headers are parsed once."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(f"#include <{header}>\n", "together.cu", (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (*_nvrtc.compiler_options(arch), *options))
        except nvrtc.NVRTCError as error:
            raise RuntimeError(nvrtc.getProgramLog(program)) from error
        symbols = {name: nvrtc.getLoweredName(program, name) for name in names}
        cubin = nvrtc.getCUBIN(program) + b"\0"  # CuPy strips the last byte
        return cubin, nvrtc.getProgramLog(program), symbols
    finally:
        nvrtc.destroyProgram(program)


__all__ = [
    "TARGETS",
    "architecture",
    "compile_kernel",
    "compile_together",
    "dtype_of",
    "kernel_symbol",
    "kernels",
    "launched",
    "load_or_compile",
    "source_directory",
    "truth",
    "truth_topk",
]


@contextlib.contextmanager
def launched() -> Iterator[list[Any]]:
    """A list of the kernels that calls on a GPU launch while the context lasts, in order."""
    found: list[Any] = []
    launch = _jit.Cuda.launch

    def noted(self: _jit.Cuda, kernel: Any, *args: Any) -> None:
        found.append(kernel)
        launch(self, kernel, *args)

    _jit.Cuda.launch = noted
    try:
        yield found
    finally:
        _jit.Cuda.launch = launch


def truth(name: str, operands: list[np.ndarray], dtype: str) -> tuple[np.ndarray, float]:
    """Float64 result over the last axis of a function of the softmax family, and the largest error
    that the contract allows: twice that of the plain expression in this dtype, and one rounding."""
    if name == "segment_softmax":
        expected = naive = reference.segment_softmax(*operands)
    else:
        expected = getattr(reference, name)(*operands, axis=-1)
        naive = tolerance.NAIVE[name](*operands, axis=-1)
    table = tolerance.TABLE[dtype]
    size = tolerance.TERMS[name](*operands) if name in tolerance.TERMS else abs(expected)
    naive_error = np.max(abs(naive.astype(np.float64) - expected), initial=0)
    one_rounding = table.relative * np.max(abs(expected), initial=0) + table.absolute
    least = table.plain * (table.relative * np.max(size, initial=0) + table.absolute)
    return expected, float(2 * max(naive_error, least) + one_rounding)


def truth_topk(
    name: str, x: np.ndarray, k: int, dtype: str
) -> tuple[np.ndarray, np.ndarray, float]:
    """What a function of the top-k family chooses from in float64, the indices of its k best
    elements, and the largest error that the contract allows a value."""
    rows, allowed = (x.astype(np.float64), 0.0) if name == "top_k" else truth("softmax", [x], dtype)
    return rows, reference.top_k(x, k).indices, allowed
