"""Peers: the same operations by other libraries, on the same data in the same process.

    found, missing = peers.find()
    for name, library, call in peers.contestants("top_k", k=64):
        x = library.asarray(cupy_array)
        with library.on_stream(stream):
            values, indices = call(x)

All of them are optional. What is installed is found by itself, and imported once, by `find`;
importing this package imports none of them.

Each does its honest best. Inputs are handed over before the clock starts (through DLPack, with no
copy where the library can), results are allocated by the library as its users have them, gradients
are off, and nothing is copied or converted in the timed call. float32 matrix products keep the
default of each library: torch and CuPy multiply in float32, JAX may use TF32 on a GPU.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from bench.peers._base import (
    OPERATIONS,
    SCORE_BYTES,
    VARIANTS,
    Contestant,
    Filters,
    Library,
    Unsupported,
)

__all__ = [
    "OPERATIONS",
    "SCORE_BYTES",
    "VARIANTS",
    "Contestant",
    "Filters",
    "Library",
    "Unsupported",
    "contestants",
    "find",
]

# What is imported -> our module for it, and the class there.
_LIBRARIES = {
    "cupy": ("_cupy", "Cupy"),
    "torch": ("_torch", "Torch"),
    "jax": ("_jax", "Jax"),
    "triton": ("_triton", "Triton"),
    "flash_attn": ("_wheels", "FlashAttention2"),
    "flash_attn_interface": ("_wheels", "FlashAttention3"),
    "flash_attn.cute": ("_wheels", "FlashAttention4"),
    "quack": ("_wheels", "Quack"),
    "flashinfer": ("_wheels", "FlashInfer"),
    "liger_kernel": ("_wheels", "Liger"),
    "cuvs": ("_rapids", "Cuvs"),
    "pylibraft": ("_rapids", "Raft"),
}


@functools.cache
def _libraries() -> tuple[dict[str, Library], dict[str, str]]:
    """The libraries that can be imported, and why the others cannot."""
    found, missing = {}, {}
    for package, (module, name) in _LIBRARIES.items():
        try:
            found[package] = getattr(importlib.import_module(f"{__name__}.{module}"), name)()
        except Exception as error:  # a broken installation raises anything
            missing[package] = _reason(package, error)
    return found, missing


def _reason(package: str, error: Exception) -> str:
    """Why a package is missing, in a line."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        absent = error.name.partition(".")[0]
        if package.partition(".")[0] == absent:
            return "not installed"
        return f"needs {absent}, which is not installed"
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"


def find() -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the packages found, and of those missing the reason, by the name to import."""
    found, missing = _libraries()
    return {package: library.version for package, library in found.items()}, dict(missing)


def contestants(
    operation: str, *, k: int | None = None, causal: bool = False, **options: Any
) -> list[Contestant]:
    """Every way of the found libraries to do an operation of `OPERATIONS`.

    `k` is for "top_k" and "softmax_topk", which return (values, indices) sorted from the largest;
    the values of "softmax_topk" are probabilities of the full row. `causal` is for attention; the
    mask is aligned to the bottom right corner. `options` are the filters of "sample", and those of
    `VARIANTS`. A call raises `Unsupported` for arrays that its contestant cannot take.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, but is {operation!r}")
    if operation in ("top_k", "softmax_topk") and k is None:
        raise ValueError(f"k must be given for {operation}")
    libraries = _libraries()[0].values()
    if operation == "sample":
        return [one for library in libraries for one in library.samplers(Filters(**options))]
    if operation in VARIANTS:
        return [one for library in libraries for one in library.variants(operation, **options)]
    return [one for library in libraries for one in library.contestants(operation, k, causal)]
