"""What the inline assembly of cuda_src/ptx declares to the compiler, beyond what a run can show."""

from __future__ import annotations

import re

import pytest

from cuattn._device.compiler import source_directory

# Instructions on registers alone: those whose result no memory access, thread or time can change.
PURE = r"\s*(ex2|rcp|fma|cvt|mma|mapa)\."
FIXED = r"\s*(mov\.u32 %0, %%|setmaxnreg\.)"  # volatile, but touches and orders no memory
WARP = r"[\s\S]*elect\.sync"
RELAXED = r"barrier\.cluster\.arrive\.relaxed"  # orders nothing
FILES = sorted(path.name for path in (source_directory() / "ptx").glob("*.cuh"))


def statements(text):
    """Each asm statement: its qualifier, what it holds, and its first instruction."""
    for found in re.finditer(r"\basm( volatile)?\(", text):
        depth, end = 1, found.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        body = text[found.end() : end - 1]
        yield bool(found[1]), body, re.search(r'"([\s\S]*)', body)[1]


@pytest.mark.parametrize("file", FILES)
def test_assembly_that_touches_or_orders_memory_says_so(file):
    """Without volatile and a memory clobber compilers may move or drop what it depends on."""
    for volatile, body, code in statements((source_directory() / "ptx" / file).read_text()):
        if re.match(PURE, code):
            assert not volatile and '"memory"' not in body, body
            continue
        assert volatile, body
        if not re.match(f"{FIXED}|{WARP}|{RELAXED}", code):
            assert '"memory"' in body, body
