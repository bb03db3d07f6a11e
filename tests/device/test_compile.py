"""Every configuration that the plans can ask for compiles for every architecture.

A spill fails, and so does every other line of ptxas that a good kernel does not cause. Of the code
of Hopper's attention kernel more is asked: it is what runs beside what that makes it fast.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time

import numpy as np
import pytest
import shared_ptx
import sm90_trace
import wgmma_registers
from configurations import SMS, TARGETS, attention_problem, kernels
from conftest import SEED

from bench import inside
from bench.compiled import (
    attention_sm90_loop,
    backward_ds_loop,
    backward_sm90_loop,
    disassembly,
    latent_sm90_loop,
    sass,
)
from cuattn._attention.plan_sm90 import BLOCKED_TILES, TILES, plan_attention_sm90
from cuattn._device import compiler

cupy = pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")

PARTS = 50  # tests of 20 s or so, so that processes share the work evenly

SM90_PARTS = 7
TILE_PARTS = 4
SM90_SMEM = 227 << 10  # bytes that a block may have

# What ptxas -v says of a kernel that is as it should be.
EXPECTED = re.compile(
    r"Compiling entry function|Function properties|Used \d+ registers|Compile time|bytes gmem"
    r"|0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
)


@pytest.fixture(autouse=True)
def _nvrtc_is_there():
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"no NVRTC: {error}")


def compiled(header: str, names: list[str], arch: str, text: str) -> inside.Program:
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


def logs(arch: str, group: list) -> dict[str, tuple[int, str]]:
    """Of a program, for its architecture and those that share its PTX: how many kernels these ship
    of it, and what ptxas -v says."""
    header, text, found = group[0].header, group[0].text, {}
    program = compiled(header, [kernel.name for kernel in group], arch, text)
    for member, names in shared_ptx.shared(arch, group).items():
        if member == arch:
            found[member] = len(group), program.log
        elif shared_ptx.find_ptxas() is None:
            found[member] = len(names), compiled(header, names, member, text).log
        else:
            ptx = shared_ptx.retargeted(program, names, member)
            inside.keep_ptx(header, {n: program.symbols[n] for n in names}, ptx, member, text)
            found[member] = len(names), shared_ptx.assembled(ptx, member)
    return found


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
    for header in rng.choice(sorted(drawn), 5, replace=False):
        arch, names, text = drawn[header]
        theirs, own = (
            inside.compile_program(header, names, target.replace("sm", "compute"), text)
            for target in (arch, twin)
        )
        assert own.ptx == shared_ptx.retargeted(theirs, names, twin), names


@pytest.mark.parametrize("part", range(SM90_PARTS))
def test_all_configurations_of_hopper_alone(part):
    groups = [group for group in inside.by_file("sm_90") if group[0].suffix == "a"]
    chosen = groups[part::SM90_PARTS]
    assert chosen
    for group in chosen:
        names, text = [kernel.name for kernel in group], group[0].text
        program = compiled(group[0].header, names, "sm_90a", text)
        assert program.log.count("Used ") == len(group)
        assert not complaints(program.log)
        assert register_faults(program.ptx) == dict.fromkeys(program.symbols.values(), [])
    if disassembly.find_nvdisasm() is None:
        pytest.skip("no nvdisasm")
    for group in chosen:
        codes = disassembly.compile_kernels(group, "sm_90")
        for kernel, code in zip(group, codes, strict=True):
            assert not faults(kernel, code), kernel.name


def of_hopper() -> list:
    return [
        kernel for kernel in kernels(90).values() if kernel.template == "attention_forward_sm90"
    ]


def without_type(kernel) -> dict:
    """What a kernel of Hopper is, but for the type of its elements."""
    return {**kernel.arguments, "T": None}


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
    program = compiled(kernel.header, [kernel.name], "sm_90a", kernel.text)
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


@pytest.mark.parametrize("turn", range(PARTS))
def test_all_configurations(turn):
    """Last and in an order that is drawn: CI may take 90 minutes, and a slow machine more."""
    if time.time() > float(os.environ.get("CUATTN_COMPILE_UNTIL", "inf")):
        pytest.skip("CUATTN_COMPILE_UNTIL has passed")
    programs = shared_ptx.programs()
    part = int(np.random.default_rng(int(os.environ[SEED])).permutation(PARTS)[turn])
    first, end = (len(programs) * i // PARTS for i in (part, part + 1))
    bad = []
    for arch, group in programs[first:end]:
        for member, (count, log) in logs(arch, group).items():
            assert log.count("Used ") == count > 0  # else the gate would look at nothing
            bad += [f"{member} {complaint}" for complaint in complaints(log)]
    assert not bad
