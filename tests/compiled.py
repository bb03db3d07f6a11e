"""What the compiler has to say of every program of kernels, and a record of those without fault.

To compile all takes half an hour on two cores, but what comes of a program depends on little: its
sources and kernels, the compiler, and the code that judges. compiled.txt has a digest of these for
each program that compiled without a complaint, and the registers of its kernels, all added up.
test_compile.py compiles what has no line there and, of the rest, some that it draws.

    python tests/compiled.py

compiles what has no line, with all cores, and writes the file anew.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))  # as a command

import shared_ptx
import wgmma_registers
from tqdm import tqdm

from bench import inside
from bench.compiled import (
    attention_sm90_loop,
    backward_ds_loop,
    backward_sm90_loop,
    disassembly,
    latent_sm90_loop,
    sass,
)
from cuattn._device import compiler

RECORD = Path(__file__).with_suffix(".txt")
SM90_SMEM = 227 << 10  # bytes that a block may have

# What ptxas -v says of a kernel that is as it should be.
EXPECTED = re.compile(
    r"Compiling entry function|Function properties|Used \d+ registers|Compile time|bytes gmem"
    r"|0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
)


class Unit(NamedTuple):
    """Kernels that compile together, for an architecture and those that share its PTX."""

    arch: str
    kernels: tuple[Any, ...]
    hopper: bool = False  # sm_90a alone, whose SASS is looked at, too

    @property
    def header(self) -> str:
        return self.kernels[0].header

    @property
    def text(self) -> str:
        return self.kernels[0].text

    @property
    def members(self) -> dict[str, list[str]]:
        """Names of the kernels, by the architectures that ship them."""
        if self.hopper:
            return {"sm_90a": [kernel.name for kernel in self.kernels]}
        return shared_ptx.shared(self.arch, list(self.kernels))


@functools.cache
def units() -> list[Unit]:
    """All configurations. Hopper's own kernels come last."""
    shared = [Unit(arch, tuple(group)) for arch, group in shared_ptx.programs()]
    own = [group for group in inside.by_file("sm_90") if group[0].suffix == "a"]
    return shared + [Unit("sm_90a", tuple(group), hopper=True) for group in own]


# ---- What is asked of the code ----


def compile_verbose(header: str, names: list[str], arch: str, text: str) -> inside.Program:
    """These instantiations, with what ptxas -v says of them."""
    return inside.compile_together(header, names, arch, text, disassembly.VERBOSE)


def complaints(log: str) -> list[str]:
    """Lines of a compiler log that a good kernel does not cause, each after its kernel's name."""
    found, kernel = [], ""
    for line in (line.strip(" \0") for line in log.splitlines()):
        if "Compiling entry function" in line:
            kernel = line.split("'")[1]
        elif line and not EXPECTED.search(line):
            found.append(f"{kernel}: {line}")
    return found


def faults(kernel, code: disassembly.Code) -> list[str]:
    """What would make a kernel of Hopper hang, or slow: local memory, registers beyond those that
    its warps give each other, a main loop that does not multiply as planned or touches global
    memory, and exponentials that do not run beside the second product."""
    blocks = sass.parse(code.sass)
    found = []
    if "BRA.U.ANY" in code.sass:
        found.append("a loop over lanes around an instruction that one thread executes")
    if code.registers < kernel.registers:
        found.append("fewer registers than planned")
    if kernel.smem_bytes + code.smem_bytes > SM90_SMEM:
        found.append("more shared memory than there is")
    if kernel.header == latent_sm90_loop.HEADER:
        return found + latent_sm90_loop.faults(blocks, kernel)
    if kernel.header in (backward_sm90_loop.Q, backward_sm90_loop.KV):
        return found + backward_sm90_loop.faults(blocks, kernel)
    if kernel.header == backward_ds_loop.HEADER:
        return found + backward_ds_loop.faults(blocks, kernel)

    tile, loop = attention_sm90_loop.tile_of(kernel), attention_sm90_loop.main_loop(blocks)
    if any(i.category == "local" for block in blocks for i in block.instructions):
        found.append("local memory")
    roles = attention_sm90_loop.roles(blocks)
    for role, (budget, used) in roles.items():
        if used > budget:
            found.append(f"{role}: {used} registers of {budget}")
    if roles.keys() != {"producer", "consumers"}:
        found.append(f"setmaxnreg is only of {[*roles]}")
    else:
        together = roles["producer"][0] + tile.groups * roles["consumers"][0]
        if together > (tile.groups + 1) * code.registers:
            found.append("setmaxnreg waits for more registers than the block has")

    passed = attention_sm90_loop.waits_before(blocks, loop)
    inside_loop = [i for i, _ in passed]
    listed = kernel.arguments["Tiles"] != "AllTiles"
    if any(i.access for i in inside_loop) and not (kernel.text or listed):  # these have arrays
        found.append("global memory in the main loop")
    if attention_sm90_loop.products(inside_loop) != tile.products:
        found.append("other products than planned")
    waits = [(i.operands, n) for i, n in passed if i.opcode.startswith(attention_sm90_loop.WAIT)]
    if waits != [("gsb0, 0x1", {0}), ("gsb0, 0x0", {1})]:
        found.append("waits for products are not one for the scores, then one for the values")
    if any(n != {0} for i, n in passed if i.category == "tensor"):
        found.append("a product behind a wait")
    if any(n != {1} for i, n in passed if i.opcode == "MUFU.EX2"):
        found.append("exponentials not between the waits")
    path = attention_sm90_loop.main_path(blocks)
    exponentials = sum(i.opcode == "MUFU.EX2" for i in path)
    if exponentials != 64 * tile.keys // 128:  # rows * keys / threads
        found.append("not one exponential for each score")
    return found


def register_faults(ptx: str) -> dict[str, list[str]]:
    """Of each kernel, registers of wgmma that are touched while it is under way."""
    found = wgmma_registers.kernels(ptx)
    assert all(any(i.kind == "mma" for i in instructions) for instructions in found.values())
    return {symbol: wgmma_registers.faults(code) for symbol, code in found.items()}


class Outcome(NamedTuple):
    """What the compilers made of a program."""

    registers: int  # of all kernels, on all architectures
    faults: list[str]


def outcome(unit: Unit) -> Outcome:
    """Compile a program."""
    if unit.hopper:
        return _outcome_of_hopper(unit)
    registers, found = 0, []
    for member, (count, log) in logs(unit).items():
        used = re.findall(r"Used (\d+) registers", log)
        assert len(used) == count > 0  # else the gate would look at nothing
        registers += sum(map(int, used))
        found += [f"{member} {complaint}" for complaint in complaints(log)]
    return Outcome(registers, found)


def logs(unit: Unit) -> dict[str, tuple[int, str]]:
    """For each architecture, how many kernels ship, and what ptxas -v says of them."""
    header, text, found = unit.header, unit.text, {}
    program = compile_verbose(header, [kernel.name for kernel in unit.kernels], unit.arch, text)
    for member, names in unit.members.items():
        if member == unit.arch:
            found[member] = len(unit.kernels), program.log
        elif shared_ptx.find_ptxas() is None:
            found[member] = len(names), compile_verbose(header, names, member, text).log
        else:
            ptx = shared_ptx.retargeted(program, names, member)
            inside.keep_ptx(header, {n: program.symbols[n] for n in names}, ptx, member, text)
            found[member] = len(names), shared_ptx.assembled(ptx, member)
    return found


def _outcome_of_hopper(unit: Unit) -> Outcome:
    names = [kernel.name for kernel in unit.kernels]
    program = compile_verbose(unit.header, names, unit.arch, unit.text)
    used = re.findall(r"Used (\d+) registers", program.log)
    assert len(used) == len(names)
    touched = register_faults(program.ptx)
    assert touched.keys() == set(program.symbols.values())
    found = complaints(program.log) + [fault for each in touched.values() for fault in each]
    if disassembly.find_nvdisasm() is not None:
        codes = disassembly.compile_kernels(list(unit.kernels), "sm_90")
        for kernel, code in zip(unit.kernels, codes, strict=True):
            found += [f"{kernel.name}: {fault}" for fault in faults(kernel, code)]
    return Outcome(sum(map(int, used)), found)


# ---- The record ----


@functools.cache
def source(header: str) -> str:
    """A file of cuda_src and those that it includes, without comments."""
    root, found = compiler.source_directory(), {}

    def add(name: str) -> None:
        path = root / name
        if name in found or not path.is_file():
            return
        found[name] = re.sub(r"//.*|/\*[\s\S]*?\*/", "", path.read_text("utf-8"))
        for included in re.findall(r"#include [<\"](.+)[>\"]", found[name]):
            add(included)

    add(header)
    return "".join(f"{name}\n{text}" for name, text in sorted(found.items()))


@functools.cache
def versions() -> tuple[str, ...]:
    """Of NVRTC, the headers of CUDA, and ptxas."""
    found = [compiler.version()]
    for wheel in ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cuda-nvcc"):
        try:
            found.append(importlib.metadata.version(wheel))
        except importlib.metadata.PackageNotFoundError:
            found.append("unknown")
    return tuple(found)


@functools.cache
def asked(hopper: bool) -> str:
    """The code that judges a program."""
    of_all = EXPECTED, complaints, inside.alone, shared_ptx.retargeted, shared_ptx.for_target
    of_hopper = (
        faults,
        register_faults,
        wgmma_registers,
        disassembly,
        sass,
        attention_sm90_loop,
        backward_ds_loop,
        backward_sm90_loop,
        latent_sm90_loop,
    )
    judges = (*of_all, *of_hopper) if hopper else of_all
    return "".join(j.pattern if j is EXPECTED else inspect.getsource(j) for j in judges)


def digest(unit: Unit) -> str:
    """Of everything that the outcome of a program depends on."""
    parts = [*versions(), asked(unit.hopper), source(unit.header), unit.text, *disassembly.VERBOSE]
    for member, names in unit.members.items():
        parts += [*compiler.code_options(member), *names]
    if unit.hopper:
        parts += map(repr, unit.kernels)
    return hashlib.sha256("\n".join((unit.arch, *parts)).encode()).hexdigest()[:32]


@functools.cache
def record() -> dict[str, int]:
    """Registers of the programs that are known to be right, by digest."""
    lines = RECORD.read_text().splitlines() if RECORD.exists() else ()
    return {line.split()[0]: int(line.split()[-2]) for line in lines}


def as_lines(known: dict[str, int]) -> Iterator[str]:
    """Of all programs that are known, a line each."""
    for unit in units():
        if (key := digest(unit)) in known:
            count = sum(map(len, unit.members.values()))
            yield f"{key} {unit.arch} {unit.header} {count} kernels {known[key]} registers\n"


def main() -> int:
    """Compile what the record lacks, with all cores, and write it anew."""
    if disassembly.find_nvdisasm() is None or shared_ptx.find_ptxas() is None:
        sys.exit("nvdisasm and ptxas of NVRTC's version are needed: pip install -e '.[dev]'")
    lacking = [unit for unit in units() if digest(unit) not in record()]
    known, bad = dict(record()), []
    with concurrent.futures.ProcessPoolExecutor() as pool:
        under_way = {pool.submit(outcome, unit): unit for unit in lacking}
        try:
            done = concurrent.futures.as_completed(under_way)
            for future in tqdm(done, total=len(lacking), unit="program"):
                registers, found = future.result()
                bad += found
                if not found:
                    known[digest(under_way[future])] = registers
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            RECORD.write_text("".join(as_lines(known)))
    print(*bad, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
