"""Every configuration that the plans can ask for compiles for every architecture.

A spill fails, and so does every other line of ptxas that a good kernel does not cause. Of the code
of Hopper's attention kernel more is asked: it is what runs beside what that makes it fast.

Most programs are known from compiled.txt (tests/compiled.py); what is new is compiled here.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import time

import compiled
import numpy as np
import pytest
import shared_ptx
import sm90_trace
import wgmma_registers
from compiled import (
    compile_verbose,
    complaints,
    digest,
    faults,
    outcome,
    record,
    register_faults,
    units,
)
from configurations import SMS, TARGETS, attention_problem, kernels
from conftest import SEED, is_drawn

from bench import inside
from bench.compiled import disassembly
from cuattn._attention.plan_sm90 import BLOCKED_TILES, TILES, plan_attention_sm90
from cuattn._device import compiler

cupy = pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")

PARTS = 50  # so that processes share the work evenly
KNOWN = 64  # of so many programs that the record knows, one is compiled again
SM90_PARTS = 7
TILE_PARTS = 4


@pytest.fixture(autouse=True)
def _nvrtc_is_there():
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"no NVRTC: {error}")


def test_no_configuration_is_left_out():
    found = {arch: [] for arch in TARGETS}
    for arch, group in shared_ptx.programs():
        for member, names in shared_ptx.shared(arch, group).items():
            found[member] += names
    for arch, names in found.items():
        shipped = [k.name for k in kernels(TARGETS[arch]).values() if not k.suffix]
        assert sorted(names) == sorted(shipped)


@pytest.mark.parametrize("twin", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_120"])
def test_architectures_that_share_their_ptx(rng, twin):
    """NVRTC makes the same for both."""
    drawn = {}  # a program of each file
    for at in rng.permutation(len(shared_ptx.programs())):
        arch, group = shared_ptx.programs()[at]
        names = shared_ptx.shared(arch, group).get(twin)
        if arch != twin and names:
            text = group[0].text
            drawn[group[0].header] = arch, rng.permutation(names)[:3].tolist(), text
    assert len(drawn) > 10
    for header in rng.choice(sorted(drawn), 3, replace=False):
        arch, names, text = drawn[header]
        theirs, own = (
            inside.compile_program(header, names, target.replace("sm", "compute"), text)
            for target in (arch, twin)
        )
        assert own.ptx == shared_ptx.retargeted(theirs, names, twin), names


def is_known(unit) -> bool:
    return digest(unit) in record()


def compile_some(chosen: list) -> None:
    """What the record does not know, and of the rest what is drawn."""
    for unit in chosen:
        if not is_known(unit) or is_drawn(KNOWN, digest(unit)):
            registers, found = outcome(unit)
            assert not found
            assert registers == record().get(digest(unit), registers)


@pytest.mark.parametrize("part", range(SM90_PARTS))
def test_all_configurations_of_hopper_alone(part):
    chosen = [unit for unit in units() if unit.hopper][part::SM90_PARTS]
    assert chosen
    compile_some(chosen)
    if disassembly.find_nvdisasm() is None and not all(map(is_known, chosen)):
        pytest.skip("no nvdisasm")


def of_hopper() -> list:
    return [
        kernel for kernel in kernels(90).values() if kernel.template == "attention_forward_sm90"
    ]


def without_type(kernel) -> dict:
    """What a kernel of Hopper is, but for the type of its elements."""
    return {**kernel.arguments, "T": None}


@pytest.mark.drawn
@pytest.mark.parametrize("part", range(TILE_PARTS))
def test_registers_of_further_tiles_of_hopper(part):
    """Of the sizes that no configuration has: as far as PTX."""
    compiled = [without_type(kernel) for kernel in of_hopper()]
    further = (tile.kernel for tile in sm90_trace.tiles())
    names = [kernel.name for kernel in further if without_type(kernel) not in compiled]
    assert len(names) >= TILE_PARTS
    program = inside.compile_program(
        "attention/forward_sm90.cuh", names[part::TILE_PARTS], "compute_90a"
    )
    assert register_faults(program.ptx) == dict.fromkeys(program.symbols.values(), [])


@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize("row", [*TILES, *BLOCKED_TILES], ids=str)
@pytest.mark.parametrize("blocked", [False, True])
def test_every_tile_of_hopper_is_compiled(row, modified, blocked):
    flags = {"modified": modified, "masked": blocked, "blocked": blocked}
    problem = attention_problem("float16", *row[:2], **flags)
    kernel = plan_attention_sm90(problem, 90, SMS).kernel
    assert without_type(kernel) in map(without_type, of_hopper())


def test_rows_of_clusters_wait_for_no_memory():
    """A fence before the loads of a row would cost a latency."""
    if disassembly.find_nvdisasm() is None:
        pytest.skip("no nvdisasm")
    chosen = [k for k in kernels(90).values() if k.header == "softmax/rows.cuh" and k.cluster > 1]
    for code in disassembly.compile_kernels(chosen[::20], "sm_90"):
        assert "UCGABAR_ARV" in code.sass and "MEMBAR" not in code.sass


def test_one_module_one_kernel():
    kernel = next(iter(kernels(90).values()))
    cubin, _ = compiler.compile_kernel(kernel.header, kernel.name, "sm_90")
    assert compiler.kernel_symbol(cubin).startswith("_Z")


def test_the_gate_sees_a_spill(tmp_path, monkeypatch):
    source = """
    extern "C" __global__ void __launch_bounds__(1024) spills(float* p, int n) {
      float v[200];
      for (int i = 0; i < 200; ++i) v[i] = p[i * n + threadIdx.x];
      for (int r = 0; r < n; ++r)
        for (int i = 0; i < 200; ++i) v[i] = v[i] * v[(i + 7) % 200] + p[r];
      for (int i = 0; i < 200; ++i) p[i * n + threadIdx.x] = v[i];
    }
    """
    (tmp_path / "spills.cuh").write_text(source)
    monkeypatch.setattr(compiler, "source_directory", lambda: tmp_path)
    log = inside.compile_program("spills.cuh", ["spills"], "sm_90", "", disassembly.VERBOSE).log
    assert any("spill" in line for line in complaints(log))


WGMMA = """
#include "{root}/ptx/setmaxnreg.cuh"
#include "{root}/ptx/wgmma.cuh"
extern "C" __global__ void __launch_bounds__({bounds})
    wgmma(float* p, unsigned int a, unsigned int b, int n) {{
  {first}
  float d[32] = {{}};
  for (int i = 0; i < n; ++i) {{
    ptx::wgmma_fence();
    ptx::wgmma_ss<__nv_bfloat16, 64, 128>(d, a, b, true);
    ptx::wgmma_ss<__nv_bfloat16, 64, 128>(d, a + 2, b + 2, true);
    ptx::wgmma_commit();
    {early}
    ptx::wgmma_wait<0>();
  }}
  for (int i = 0; i < 32; ++i) p[threadIdx.x + 128 * i] = d[i];
}}
"""


@pytest.mark.parametrize(
    ("bounds", "first", "early", "expected"),
    [
        ("384, 1", "ptx::setmaxnreg_dec<64>();", "", None),
        ("384", "ptx::setmaxnreg_dec<64>();", "", "C7508.*'setmaxnreg' ignored"),  # from how many?
        ("384, 1", "", "p[i] = d[0];", "C7514.*serialized"),  # not there yet
    ],
)
def test_the_gate_sees_what_ptxas_says_of_wgmma(
    tmp_path, monkeypatch, bounds, first, early, expected
):
    source = WGMMA.format(root=compiler.source_directory(), bounds=bounds, first=first, early=early)
    (tmp_path / "wgmma.cuh").write_text(source)
    monkeypatch.setattr(compiler, "source_directory", lambda: tmp_path)
    program = inside.compile_program("wgmma.cuh", ["wgmma"], "sm_90a", "", disassembly.VERBOSE)
    assert "Used " in program.log
    found = complaints(program.log)
    if expected is None:
        assert not found
    else:
        assert any(re.search(expected, line) for line in found)
    (touched,) = register_faults(program.ptx).values()
    assert bool(touched) == bool(early)


@pytest.fixture(scope="module")
def hopper():
    """A kernel of Hopper that has no fault."""
    if disassembly.find_nvdisasm() is None:
        pytest.skip("no nvdisasm")
    kernel = plan_attention_sm90(attention_problem("float16", 64), 90, SMS).kernel
    (code,) = disassembly.compile_kernels([kernel], "sm_90")
    assert not faults(kernel, code)
    return kernel, code


PRODUCER, CONSUMERS = "USETMAXREG.DEALLOC.CTAPOOL 0x20", "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xa0"
SCORES, VALUES = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def planted(text: str, place: str, line: str) -> str:
    """SASS with an instruction more, behind the first `place`; VALUES: in the main loop."""
    start = text.index(place, text.index(SCORES) if place == VALUES else 0)
    end = text.index("\n", start)
    return f"{text[:end]}\n/*0000*/ {line} ;{text[end:]}"


@pytest.mark.parametrize(
    ("place", "line", "fault"),
    [
        (PRODUCER, "IADD3 R31, R0, R1, RZ", None),
        (PRODUCER, "IADD3 R32, R0, R1, RZ", "producer: 33 registers of 32"),
        (PRODUCER, "STG.E [R2.64], R0", None),
        (PRODUCER, "STL [R1], R0", "local memory"),
        (PRODUCER, "@P0 BRA.U.ANY `(.L_x_9)", "a loop over lanes"),
        (SCORES, "FADD R159, R1, -R2", None),
        (SCORES, "FADD R1, |R160|, -R2", "consumers: 161 registers of 160"),
        (SCORES, "LDL.64 R0, [R1]", "local memory"),
        (SCORES, "LDG.E R0, desc[UR4][R2.64]", "global memory in the main loop"),
        (SCORES, "STG.E desc[UR4][R2.64], R0", "global memory in the main loop"),
        (SCORES, "MUFU.EX2 R0, R1", "not one exponential for each score"),
        (VALUES, "MUFU.EX2 R0, R1", "exponentials not between the waits"),
        (VALUES, VALUES, "waits for products"),
        (VALUES, "HGMMA.64x64x16.F32 R24, R4, gdesc[UR4].tnspB, R24", "a product behind a wait"),
        (VALUES, "HGMMA.64x64x16.F32 R24, R4, gdesc[UR4].tnspB, R24", "other products"),
    ],
)
def test_the_gate_of_hopper_sees_an_instruction(hopper, place, line, fault):
    kernel, code = hopper
    found = faults(kernel, code._replace(sass=planted(code.sass, place, line)))
    assert not found if fault is None else any(fault in each for each in found)


@pytest.mark.parametrize(
    ("pattern", "instead", "fault"),
    [
        (CONSUMERS, CONSUMERS.replace("0xa0", "0xa8"), "setmaxnreg waits for more registers"),
        (PRODUCER, "NOP", "setmaxnreg is only of ['consumers']"),
        (SCORES, VALUES, "waits for products"),
        (
            rf"({SCORES} ;)(.*?)({VALUES} ;)",
            r"\1\n/*0000*/ \3\2NOP ;",
            "exponentials not",
        ),
        (rf"{SCORES}(.*?){VALUES}", r"NOP ;\1NOP", "waits for products"),
        (r"HGMMA.64x128x16", "HGMMA.64x64x16", "other products"),
        (r"\.tnspB", "", "other products"),
        ("MUFU.EX2", "NOP", "not one exponential for each score"),
    ],
)
def test_the_gate_of_hopper_sees_a_change(hopper, pattern, instead, fault):
    kernel, code = hopper
    changed, count = re.subn(pattern, instead, code.sass, flags=re.DOTALL)
    assert count
    assert any(fault in each for each in faults(kernel, code._replace(sass=changed)))


def test_the_gate_of_hopper_looks_into_functions(hopper):
    kernel, code = hopper
    called = planted(code.sass, PRODUCER, "CALL.REL.NOINC `($other)")
    for register, good in ((31, True), (32, False)):
        text = f"{called}\n$other:\n/*0000*/ MOV R{register}, R0 ;\n/*0010*/ RET.REL R2 ;\n"
        assert (not faults(kernel, code._replace(sass=text))) == good


@pytest.mark.parametrize("kind", ["commit", "wait", "fence"])
def test_the_gate_of_hopper_sees_what_orders_wgmma(hopper, kind):
    kernel, _ = hopper
    program = compile_verbose(kernel.header, [kernel.name], "sm_90a", kernel.text)
    (code,) = wgmma_registers.kernels(program.ptx).values()
    places = [i for i, now in enumerate(code) if now.kind == kind]
    assert len(places) == {"commit": 4, "wait": 4, "fence": 3}[kind]
    assert not wgmma_registers.faults(code)
    assert all(wgmma_registers.faults(code[:i] + code[i + 1 :]) for i in places)


def test_the_gate_of_hopper_counts_shared_memory(hopper):
    kernel, code = hopper
    for smem_bytes, good in ((227 << 10, True), ((227 << 10) + 1, False)):
        changed = dataclasses.replace(kernel, smem_bytes=smem_bytes)
        assert (not faults(changed, code)) == good


def test_the_gate_of_hopper_counts_registers(hopper):
    kernel, code = hopper
    assert kernel.registers == 128
    found = faults(dataclasses.replace(kernel, registers=129), code)
    assert found == ["fewer registers than planned"]


def test_an_error_names_kernel_and_log():
    with pytest.raises(
        compiler.CompileError, match=r"softmax_rows<int>.*softmax/rows\.cuh.*sm_80[\s\S]*error"
    ):
        compiler.compile_kernel("softmax/rows.cuh", "softmax_rows<int>", "sm_80")


@pytest.mark.parametrize(
    ("file", "line", "same"),
    [
        ("softmax/rows.cuh", "// a comment", True),
        ("softmax/rows.cuh", "int more;", False),
        ("ptx/math.cuh", "int more;", False),  # which others include
        ("topk/rows.cuh", "int more;", True),
    ],
)
def test_a_line_of_the_record_stands_for_sources(monkeypatch, tmp_path, file, line, same):
    unit = next(unit for unit in units() if unit.header == "softmax/rows.cuh")
    before = digest(unit)
    root = shutil.copytree(compiler.source_directory(), tmp_path / "cuda_src")
    with (root / file).open("a") as changed:
        changed.write(line)
    monkeypatch.setattr(compiler, "source_directory", lambda: root)
    monkeypatch.setattr(compiled, "source", compiled.source.__wrapped__)
    assert (digest(unit) == before) == same


def test_a_line_of_the_record_stands_for_more_than_sources(monkeypatch):
    unit = next(unit for unit in reversed(units()) if len(unit.kernels) > 1)
    assert unit.hopper
    others = [
        digest(unit),
        digest(unit._replace(kernels=unit.kernels[1:])),
        digest(unit._replace(hopper=False)),
        digest(units()[0]),
    ]
    for name, other in (
        ("versions", lambda: ("1.0",)),
        ("asked", lambda hopper: "nothing"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(compiled, name, other)
            others.append(digest(unit))
    assert len({*others}) == len(others)


def test_what_the_record_does_not_know_is_compiled(monkeypatch):
    chosen, asked, said = units()[:3], [], {}

    def answered(unit):
        asked.append(unit)
        return compiled.Outcome(*said.get(unit, (7, [])))

    monkeypatch.setitem(globals(), "outcome", answered)
    monkeypatch.setitem(globals(), "record", lambda: {digest(chosen[0]): 7, digest(chosen[1]): 7})
    monkeypatch.setitem(globals(), "is_drawn", lambda n, word: word == digest(chosen[1]))
    compile_some(chosen)
    assert asked == chosen[1:]  # one drawn, one unknown
    for unit, result in (
        (chosen[1], (8, [])),  # not the registers of the record
        (chosen[1], (7, ["a spill"])),
        (chosen[2], (7, ["a spill"])),
    ):
        said = {unit: result}
        with pytest.raises(AssertionError):
            compile_some(chosen)


@pytest.mark.parametrize("turn", range(PARTS))
def test_all_configurations(turn):
    """Last and in an order that is drawn: CI may take 90 minutes, and a slow machine more."""
    part = int(np.random.default_rng(int(os.environ[SEED])).permutation(PARTS)[turn])
    chosen = [unit for unit in units() if not unit.hopper][part::PARTS]
    if time.time() > float(os.environ.get("CUATTN_COMPILE_UNTIL", "inf")):
        if not all(map(is_known, chosen)):
            pytest.skip("CUATTN_COMPILE_UNTIL has passed")
    compile_some(chosen)
