"""Which architectures have the PTX of another one, and what ptxas makes of it for them.

NVVM takes two thirds of a compilation, and makes the same code of most kernels for several targets:
there NVRTC compiles for one of them, and ptxas alone runs for the others. Found by comparing all
kernels; test_compile.py compares some, drawn.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from configurations import TARGETS, kernels

from bench import inside
from cuattn._device import compiler

# Rounding to them asks for the architecture on sm_75, and bfloat16 to float32 on sm_90.
OF_16_BITS, BFLOAT16 = re.compile("half|bfloat16|Half|BFloat"), re.compile("bfloat16|BFloat")
# So do the conversions of a cache of 8 bits.
ASKING = ("attention/decode.cuh", "attention/wide.cuh", "attention/kv_append.cuh")
# NVVM orders the code of these otherwise for sm_120.
ORDERED = ("topk/merge_runs.cuh",)
# Loops of these are unrolled less where a multiprocessor holds fewer warps than that of sm_80.
UNROLLED = re.compile(
    r"softmax_rows<.*, 1, 1>$|softmax_strided<.*, kFused, \d+, 32, \d+>$|attention_kv_append<"
    r"|softmax_segments<SoftmaxBackward<.*, 1, 1, \d+>$"
    r"|softmax_with_state<.*, (32, 32, 1, 8|128, \d+, 4, 1)>$"
)


def is_of_both(header: str, words: str) -> bool:
    """Whether sm_80 and sm_90 have the same PTX of what is called so."""
    return header not in ASKING and not BFLOAT16.search(words)


def head(kernel, arch: str) -> str:
    """The architecture whose PTX of a kernel is this one's."""
    if arch == "sm_120":
        return arch if kernel.header in ORDERED else "sm_100"
    if arch in ("sm_90", "sm_100"):
        return arch
    asking, unrolled = kernel.header in ASKING, UNROLLED.match(kernel.name)
    words = kernel.name + kernel.text
    if arch == "sm_80":
        both = is_of_both(kernel.header, words) and kernel.name in kernels(90)
        return "sm_90" if both else "sm_80"
    if arch == "sm_75":
        arch = arch if asking or OF_16_BITS.search(words) else "sm_86"
    own = arch == "sm_75" or unrolled
    return arch if own else head(kernel, "sm_80")


@functools.cache
def programs() -> list[tuple[str, list]]:
    """Architectures, and kernels that compile together for them: all that the others need, too.

    Those for sm_90 are the kernel report's.
    """
    found = []
    for arch in sorted(TARGETS, key=lambda arch: arch == "sm_90"):  # the report may be under way
        needed = {}
        for member in sorted(TARGETS, key=lambda member: member != arch):  # itself first
            for kernel in kernels(TARGETS[member]).values():
                if not kernel.suffix and head(kernel, member) == arch:
                    needed.setdefault(kernel.name, kernel)
        found += [(arch, group) for group in inside.in_groups(needed.values())]
    return found


def shared(arch: str, group: list) -> dict[str, list[str]]:
    """The names of those kernels of a program that its architecture and others ship."""
    found = {}
    for member in TARGETS:
        shipped = kernels(TARGETS[member])
        names = [k.name for k in group if k.name in shipped and head(k, member) == arch]
        if names:
            found[member] = names
    return found


def retargeted(program: inside.Program, names: list[str], arch: str) -> str:
    """PTX of these instantiations, for another architecture."""
    return for_target(inside.alone(program.ptx, *map(program.symbols.get, names)), arch)


def for_target(ptx: str, arch: str) -> str:
    """The same PTX, for another architecture."""
    ptx = re.sub(r"^\.target \w+", f".target {arch}", ptx, count=1, flags=re.MULTILINE)
    if int(arch[3:]) < 90:  # no clusters, of one block either
        directives = r"^\.(explicitcluster|reqnctapercluster 1, 1, 1)\n"
        ptx = re.sub(directives, "", ptx, flags=re.MULTILINE)
    return ptx


def leave_for_sm_80() -> None:
    """From now on the software device, as sm_90, leaves PTX where it looks for that as sm_80."""
    from software_device import patches

    compile_kernel, folder = compiler.compile_kernel, Path(os.environ[patches.PTX])
    folder.mkdir(parents=True, exist_ok=True)

    def leaving(header, name, arch, text="", options=()):
        made = compile_kernel(header, name, arch, text, options)
        ptx = made[0].partition(patches.MARK)[2].rstrip(b"\0").decode()
        if ptx and arch == "sm_90" and not options and is_of_both(header, name + text):
            inside.write(
                folder / f"{inside.stem(header, name, 'sm_80', text)}.ptx",
                for_target(ptx, "sm_80").encode(),
            )
        return made

    compiler.compile_kernel = leaving


def assembled(ptx: str, arch: str) -> str:
    """What ptxas -v says of PTX."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(find_ptxas()), "-v", f"-arch={arch}", "-o", os.devnull, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@functools.cache
def find_ptxas() -> str | None:
    """ptxas of the wheel, or on PATH, of NVRTC's version."""
    found = shutil.which("ptxas")
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    own = [str(file.locate()) for file in files if Path(file.name).stem == "ptxas"]
    candidates = [path for path in (*own, found) if path and _same_version(path)]
    return candidates[0] if candidates else None


def _same_version(assembler: str) -> bool:
    """Whether a ptxas has the version of NVRTC."""
    done = subprocess.run([assembler, "--version"], capture_output=True, text=True, check=True)
    return f"release {'.'.join(compiler.version().split('.')[:2])}," in done.stdout
