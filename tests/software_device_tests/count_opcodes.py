"""Which PTX opcodes kernels consist of: the list opcodes.txt, and how often each stands there.

    python tests/software_device_tests/count_opcodes.py [--own] [--add LIST] [PATH ...]

``--own`` stands for every shipped configuration of cuattn's kernels for sm_80 and sm_90, compiled
to PTX here. A PATH is PTX, a cubin of the software device's cache with its PTX behind it, or a
folder of such files. ``--add`` adds to LIST what it lacks; ``--check`` prints only what LIST
lacks, and fails if that is anything. Otherwise every opcode is printed with its count.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import os
import re
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("sm_80", "sm_90")
TOGETHER = 16  # instantiations a program: headers are parsed once
MARK = b"\0SOFTPTX\0"
INSTRUCTION = re.compile(r"^(?:@!?%\w+\s+)?([a-z][a-zA-Z0-9_.:]*)(?=[\s;]|$)")


def ptx_of(path):
    """The PTX in a file; nothing where there is none."""
    data = path.read_bytes()
    if MARK in data:
        return data[data.rfind(MARK) + len(MARK) :].decode(errors="replace")
    if data[:4] == b"\x7fELF" or b".version" not in data:  # the cache holds other files, too
        return ""
    return data.decode(errors="replace")


def opcodes_of(ptx):
    """The opcodes of a PTX text, once for each time that they stand there."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
    for statement in re.split(r"[;{}]|^\s*[$\w]+:(?!:)", text, flags=re.MULTILINE):
        found = INSTRUCTION.match(statement.strip())
        if found:
            yield found.group(1)


def count_files(path):
    """Opcodes of a file, or of all files of a folder."""
    counts = collections.Counter()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            counts.update(opcodes_of(ptx_of(file)))
    return counts


def own_programs():
    """What to compile: a source file, an NVRTC target, and names of kernels."""
    from configurations import TARGETS, kernels

    groups = collections.defaultdict(list)
    for arch in ARCHITECTURES:
        for kernel in kernels(TARGETS[arch]).values():
            target = arch.replace("sm_", "compute_") + kernel.suffix  # no ptxas
            groups[kernel.header, target, kernel.text].append(kernel.name)
    for (header, target, text), names in groups.items():
        for first in range(0, len(names), TOGETHER):
            yield header, target, text, names[first : first + TOGETHER]


def count_program(program):
    """Opcodes of some kernels that are compiled together."""
    from cupy.cuda import nvrtc

    from cuattn._device import compiler

    header, target, text, names = program
    handle = nvrtc.createProgram(f"#include <{header}>\n{text}", "opcodes.cu", (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(handle, name)
        nvrtc.compileProgram(handle, compiler.compiler_options(target))
        return collections.Counter(opcodes_of(nvrtc.getPTX(handle).decode()))
    finally:
        nvrtc.destroyProgram(handle)


def count_own(jobs):
    """Opcodes of cuattn's kernels."""
    counts = collections.Counter()
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        for found in pool.map(count_program, own_programs()):
            counts.update(found)
    return counts


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--own", action="store_true", help="cuattn's kernels")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--check", type=Path, metavar="LIST")
    target.add_argument("--add", type=Path, metavar="LIST")
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH")
    options = parser.parse_args(arguments)
    if not options.own and not options.paths:
        parser.error("nothing to count: give --own or a PATH")
    counts = collections.Counter(count_own(options.jobs) if options.own else ())
    for path in options.paths:
        counts.update(count_files(path))
    file = options.check or options.add
    listed = set(file.read_text().split()) if file else set()
    if options.add:
        file.write_text("".join(f"{opcode}\n" for opcode in sorted(listed | counts.keys())))
    missing = {opcode: count for opcode, count in counts.items() if opcode not in listed}
    for opcode, count in sorted(missing.items()):
        print(f"{count:8}  {opcode}")
    return 1 if options.check and missing else 0


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    sys.exit(main())
