"""The decoder's table: it has every opcode of our kernels and CuPy's, and ignores nothing."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import count_opcodes
import pytest
from number_models import decode
from ptx_kernels import DeviceError, check_opcode

MAP = Path(__file__).parents[1] / "software_device/README.md"
LISTED = (Path(__file__).parent / "opcodes.txt").read_text().split()


def test_the_list_is_counted_from_ptx(tmp_path, capsys):
    ptx = "@!%p1 bra $L1; // add.u32\n{ mov.u32 %r1, 1; }\n$L1:\n"
    ptx += "\tst.shared::cta.u32 [%r1], 1;\n\tret;"
    (tmp_path / "kernel.cubin").write_bytes(b"\x7fELF;;\0SOFTPTX\0" + ptx.encode())
    assert list(count_opcodes.opcodes_of(ptx)) == ["bra", "mov.u32", "st.shared::cta.u32", "ret"]
    listed = Path(__file__).parent / "opcodes.txt"
    assert count_opcodes.main(["--check", str(listed), str(tmp_path)]) == 1
    assert capsys.readouterr().out.split() == ["1", "st.shared::cta.u32"]


def test_own_kernels_are_compiled_to_be_counted():
    pytest.importorskip("cupy")
    *program, names = next(count_opcodes.own_programs())
    counts = count_opcodes.count_program((*program, names[:1]))
    assert counts["ex2.approx.ftz.f32"] > 0 and counts.keys() <= set(LISTED)


def test_the_map_has_every_opcode_once():
    """README: patterns of opcodes, and the files that execute them."""
    rows = [line.split("|")[1:] for line in MAP.read_text().splitlines() if line.startswith("| `")]
    rows = [[re.findall("`([^`]+)`", cell) for cell in row] for row in rows if len(row) == 5]
    assert len(rows) > 20
    for opcode in LISTED:
        found = [row for row in rows if any(fnmatch.fnmatchcase(opcode, p) for p in row[0])]
        assert len(found) == 1, (opcode, found)
    for patterns, _, files, *_ in rows:
        assert files and all((MAP.parent / file).is_file() for file in files), patterns
    names = {re.match("[a-z0-9]+", pattern)[0] for row in rows for pattern in row[0]}
    for name in names - {"call", "brx"}:  # other statements stand in their place
        with pytest.raises(DeviceError, match=f"the device has no {name}.foo, only"):
            check_opcode(f"{name}.foo")


@pytest.mark.parametrize("opcode", LISTED)
def test_every_opcode_of_our_kernels_is_known(opcode):
    check_opcode(opcode)


@pytest.mark.parametrize(
    "opcode",
    "add.foo.s32 add.sat.u32 add.s8 add.ftz.f64 add.ftz.rn.f32 fma.f32 div.f32 shl.s32 mul.s32 "
    "mul.wide.u64 ex2.f32 cvt.f16.f32 cvt.rn.f32.f16 cvt.s32.f32 cvt.rni.u32.u8 setp.lt.b32 "
    "setp.equ.s32 setp.lo.s32 setp.eq.ftz.f64 min.NaN.f64 bfi.u32 popc.u32 selp.pred "
    "shfl.bfly.b32 ld.global.v3.u32 mov.b8 frobnicate "
    "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 add "
    "cp.async.cg.shared.global.L2::cache_hint".split(),
)
def test_unknown_modifiers_are_errors(opcode):
    with pytest.raises(DeviceError, match=f"the device has no (instruction )?{opcode}"):
        check_opcode(opcode)


def test_bits_of_numbers():
    assert decode(0x3C00, "f16") == 1.0  # the model itself
