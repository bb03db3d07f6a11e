"""Kernels as the compiler and nvdisasm show them; many at a time, since both take long to start."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from bench import inside

WHEEL = "nvidia-cuda-nvdisasm"
VERBOSE = ("--ptxas-options=-v",)


class Code(NamedTuple):
    """A compiled kernel: what ptxas says of it, and its SASS or the reason why there is none."""

    registers: int  # of a thread
    spill_bytes: int  # stores and loads
    smem_bytes: int  # static shared memory of a block
    sass: str | None
    note: str


def compile_kernels(kernels: list[Any], arch: str) -> list[Code]:
    """Code of kernels of one source file, in their order."""
    names = [kernel.name for kernel in kernels]
    header, target, text = kernels[0].header, arch + kernels[0].suffix, kernels[0].text
    program = inside.compile_together(header, names, target, text, VERBOSE)
    said = logs(program.log)
    sass, note = {}, f"no SASS: nvdisasm is missing (pip install {WHEEL})"
    if find_nvdisasm() is not None:
        try:
            sass, note = _parts(disassemble(program.cubin), r"^\.text\.(\w+):"), ""
        except subprocess.CalledProcessError as error:
            note = f"no SASS: {error.stderr.strip()}"
    return [Code(*figures(said[s]), sass.get(s), note) for s in map(program.symbols.get, names)]


def logs(log: str) -> dict[str, str]:
    """What `ptxas -v` says of each kernel, by symbol."""
    return _parts(log, r"Compiling entry function '(\w+)'")


def figures(log: str) -> tuple[int, int, int]:
    """Registers, bytes spilled and bytes of static shared memory, from the log of `ptxas -v`."""

    def found(pattern: str) -> list[int]:
        return [int(figure) for figure in re.findall(pattern, log)]

    spilled = sum(found(r"(\d+) bytes spill (?:stores|loads)"))
    return max(found(r"Used (\d+) registers")), spilled, sum(found(r"(\d+) bytes smem"))


def _parts(text: str, heading: str) -> dict[str, str]:
    """Symbol to the text from its heading to the next one."""
    _, *parts = re.split(heading, text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@functools.lru_cache(maxsize=1)
def find_nvdisasm() -> str | None:
    """nvdisasm on PATH, or of the wheel."""
    found = shutil.which("nvdisasm")
    if found is None:
        try:
            files = importlib.metadata.files(WHEEL) or []
        except importlib.metadata.PackageNotFoundError:
            return None
        found = next((str(f.locate()) for f in files if Path(f.name).stem == "nvdisasm"), None)
    return found


def disassemble(cubin: bytes) -> str:
    """SASS of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(find_nvdisasm()), "-c", "-ndf", file.name]  # no dataflow: a third faster
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
