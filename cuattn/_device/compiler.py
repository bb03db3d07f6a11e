"""Name expression → cubin: CUDA sources and NVRTC. Needs no GPU."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from cuattn._arrays.interchange import INSTALL


class CompileError(RuntimeError):
    """A kernel cannot be had: its name and configuration, and the reason or the compiler's log."""


# ---- Sources ----


@lru_cache(maxsize=1)
def source_directory() -> Path:
    """Folder of the CUDA sources: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "cuda_src", package.parent / "cuda_src"):
        if (candidate / "softmax/rows.cuh").is_file():
            return candidate
    raise FileNotFoundError(
        "cuattn's CUDA sources are neither in the package nor beside it; install cuattn again"
    )


@lru_cache(maxsize=1)
def source_digest() -> str:
    """SHA-256 over names and contents of all CUDA sources."""
    digest = hashlib.sha256()
    root = source_directory()
    for path in sorted(root.rglob("*.cuh")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


# ---- Compiler ----


@lru_cache(maxsize=1)
def toolkit_headers() -> str:
    """Folder of cuda_fp16.h and cuda_bf16.h."""
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        found = find_nvidia_header_directory("cudart")
    except (ImportError, RuntimeError):
        found = None
    if found is None:
        raise RuntimeError(
            f"cuattn needs the CUDA headers cuda_fp16.h and cuda_bf16.h to compile: {INSTALL}"
        )
    return str(found)


def version() -> str:
    """Version of NVRTC."""
    from cupy.cuda import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def installed() -> str:
    """Version of NVRTC, if it is there and so are its headers; else what importing, loading or
    finding them raises."""
    found = version()
    toolkit_headers()
    return found


# Targets of compute capability 7.5 and later that NVRTC has had: for where there is none.
TARGETS = (75, 80, 86, 87, 88, 89, 90, 100, 101, 103, 110, 120, 121)
# Targets of Jetson and DRIVE. Their code runs nowhere else, and no other code there:
# https://docs.nvidia.com/cuda/cuda-c-programming-guide/#binary-compatibility
TEGRA = {53, 62, 72, 87, 101, 110}


@lru_cache(maxsize=64)
def architecture(compute_capability: int) -> str:
    """Newest target of NVRTC whose code runs on this compute capability: itself, or off Tegra an
    older one of the same major version. Without an NVRTC, of all there have been.
    """
    try:
        from cupy.cuda import nvrtc

        targets, whose = nvrtc.getSupportedArchs(), f"; it is {version()}"
    except (ImportError, OSError, RuntimeError):
        targets, whose = TARGETS, ", and there is none"
    known = [
        a
        for a in targets
        if a == compute_capability
        or (
            a // 10 == compute_capability // 10
            and a < compute_capability
            and not TEGRA & {a, compute_capability}
        )
    ]
    if not known:
        raise RuntimeError(
            f"cuattn needs an NVRTC that knows compute capability {compute_capability / 10}{whose}"
            "; install a newer CUDA toolkit"
        )
    return f"sm_{max(known)}"


def compile_kernel(
    header: str, name: str, arch: str, text: str = "", options: tuple[str, ...] = ()
) -> tuple[bytes, str]:
    """Compile one instantiation; needs no GPU.

    Parameters
    ----------
    header : str
        File of `cuda_src`.
    name : str
        Name expression of the kernel.
    arch : str
        NVRTC target, e.g. ``"sm_90"``.
    text : str
        C++ that follows the header.
    options : tuple of str
        More NVRTC options.

    Returns
    -------
    cubin : bytes
    log : str

    Raises
    ------
    CompileError
        With the kernel's name expression, target and log.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(f"#include <{header}>\n{text}", "cuattn.cu", (), ())
    try:
        nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (*compiler_options(arch), *options))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise CompileError(
                f"cannot compile {name} ({header}) for {arch}: {error}\n{log}"
            ) from error
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(
            program
        )  # CuPy strips the last byte
    finally:
        nvrtc.destroyProgram(program)


def compiler_options(arch: str) -> tuple[str, ...]:
    """Options of every compilation."""
    return (f"-I{source_directory()}", f"-I{toolkit_headers()}", *code_options(arch))


def code_options(arch: str) -> tuple[str, ...]:
    """Those that the code depends on; paths do not matter, as the sources' content counts."""
    return f"-arch={arch}", "--std=c++17"


def kernel_symbol(cubin: bytes) -> str:
    """Mangled name of a cubin's only kernel, from the ELF section `.text.<name>`."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(cubin[at : at + size], "little")

    programs, sections = number(32, 8), number(40, 8)
    entry, count, names = number(58, 2), number(60, 2), number(62, 2)
    end = max(programs + number(54, 2) * number(56, 2), sections + entry * count)
    if cubin[:4] != b"\x7fELF" or end > len(cubin):
        raise ValueError("the cubin is not a whole ELF file")
    strings = number(sections + names * entry + 24, 8)
    for i in range(count):
        start = strings + number(sections + i * entry, 4)
        if cubin.startswith(b".text.", start):
            return cubin[start + 6 : cubin.index(b"\0", start)].decode("ascii")
    raise ValueError("the cubin holds no kernel")
