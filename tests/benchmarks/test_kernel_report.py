"""The kernel report: parser and instruction mix on hand-written SASS, the model, real kernels."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bench import inside
from bench.compiled import (
    attention_sm90_loop,
    backward_loop,
    backward_sm90_loop,
    decode_loop,
    disassembly,
    kernel_report,
    sass,
)
from bench.report import attention as report_attention
from bench.report import formats
from bench.report import tables as report_tables
from cuattn._attention.plan_decode import DecodeProblem, plan_decode
from cuattn._device.kernel import Kernel

GPU = kernel_report.GPUS["sm_90"]


def listing(*lines: str) -> str:
    """Text as nvdisasm prints it: an address before each instruction, none before a label."""
    text, address = "", 0
    for line in lines:
        if line.endswith(":"):
            text += f"{line}\n"
        else:
            text += f"        /*{address:04x}*/                   {line} ;\n"
            address += 16
    return text


def main_opcodes(*lines: str) -> list[str]:
    """Opcodes on the path through the main region."""
    return [i.opcode for i in sass.main_region(sass.parse(listing(*lines))).path]


def mix(*lines: str) -> dict[str, int]:
    return sass.mix(sass.main_region(sass.parse(listing(*lines))).path)


TRAP = (".L_x_99:", "BRA `(.L_x_99)", "NOP", "NOP")


# ---- Parser: blocks, loops, paths ----


def test_a_line_becomes_an_instruction():
    (block,) = sass.parse("        /*0a30*/              @!P0 LDG.E.U8 R6, desc[UR4][R10.64+0x4] ;")
    (instruction,) = block.instructions
    assert instruction.address == 0xA30
    assert instruction.predicate == "!P0"
    assert instruction.opcode == "LDG.E.U8"
    assert instruction.operands == "R6, desc[UR4][R10.64+0x4]"
    assert instruction.width == 1


def test_blocks_end_at_labels_and_jumps():
    blocks = sass.parse(
        listing(
            "@P0 BRA `(.L_x_0)",
            "BRA P1, `(.L_x_0)",  # conditional too
            "BRA `(.L_x_1)",
            ".L_x_0:",
            "@!P0 EXIT",
            "BSSY B0, `(.L_x_1)",  # names a label, but does not jump
            ".L_x_1:",
            "EXIT",
            *TRAP,
        )
    )
    assert [b.next for b in blocks] == [[3, 1], [3, 2], [5], [4], [5], [], [6], []]


def test_straight_code_is_the_body():
    region = sass.main_region(
        sass.parse(listing("LDG.E R0, [R2.64]", "STG.E [R4.64], R0", "EXIT", *TRAP))
    )
    assert region.kind == "body"
    assert [i.opcode for i in region.path] == ["LDG.E", "STG.E", "EXIT"]


def test_nested_loops():
    """The loop that moves the most is the main one; a spin loop inside it is left out."""
    code = (
        "LDG.E R0, [R2.64]",
        ".L_x_0:",
        "LDG.E.128 R4, [R2.64]",
        ".L_x_1:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R8",
        "@!P0 BRA `(.L_x_1)",
        "FADD R4, R4, R5",
        "@P1 BRA `(.L_x_0)",
        ".L_x_2:",
        "LDG.E.64 R4, [R2.64]",
        "@P2 BRA `(.L_x_2)",
        "EXIT",
        *TRAP,
    )
    region = sass.main_region(sass.parse(listing(*code)))
    assert region.kind == "loop"
    assert [i.opcode for i in region.path] == ["LDG.E.128", "FADD", "BRA"]


def test_code_moved_behind_the_end_is_no_loop():
    code = (
        "@P0 BRA `(.L_x_2)",
        ".L_x_1:",
        "STG.E [R2.64], R0",
        "EXIT",
        ".L_x_2:",
        "LDG.E R0, [R2.64]",
        "BRA `(.L_x_1)",
        *TRAP,
    )
    assert main_opcodes(*code) == ["BRA", "LDG.E", "BRA", "STG.E", "EXIT"]


def test_detours_of_a_warp_are_left_out():
    """What a vote decides, if it only adds to the path, and what diverged lanes do."""
    code = (
        "LDG.E R0, [R2.64]",
        "VOTE.ANY P1, P0",
        "@!P1 BRA `(.L_x_0)",
        *["FADD R4, R4, R5"] * 3,
        ".L_x_0:",
        "BRA.DIV UR4, `(.L_x_4)",
        ".L_x_1:",
        "VOTE.ANY P1, P2",
        "@!P1 BRA `(.L_x_2)",
        *["FMUL R4, R4, R5"] * 3,
        "BRA `(.L_x_3)",
        ".L_x_2:",
        "MUFU.EX2 R4, R5",
        ".L_x_3:",
        "STG.E [R4.64], R0",
        "EXIT",
        ".L_x_4:",
        *["FADD R4, R4, R5"] * 9,
        "BRA `(.L_x_1)",
        *TRAP,
    )
    assert main_opcodes(*code) == [
        *("LDG.E", "VOTE.ANY", "BRA", "BRA.DIV", "VOTE.ANY", "BRA"),
        *("FMUL", "FMUL", "FMUL", "BRA", "STG.E", "EXIT"),
    ]


def test_edges_and_options_are_left_out():
    code = (
        "@P0 BRA `(.L_x_0)",
        *["@!P1 LDG.E R4, [R2.64]"] * 4,  # element by element: an unaligned end
        "BRA `(.L_x_1)",
        ".L_x_0:",
        "LDG.E.128 R4, [R2.64]",
        ".L_x_1:",
        "LDG.E.U8 R8, [R6.64]",  # a mask
        "@P2 BRA `(.L_x_2)",  # skips the arithmetic
        "FMUL R4, R4, R9",
        ".L_x_2:",
        "STG.E.128 [R2.64], R4",
        "@P3 EXIT",
        "MUFU.LG2 R0, R1",
        "STG.E [R10.64], R0",  # an optional statistic
        "EXIT",
    )
    assert main_opcodes(*code) == [
        "BRA", "LDG.E.128", "LDG.E.U8", "BRA", "FMUL", "STG.E.128", "EXIT",
    ]  # fmt: skip


# ---- Instructions: categories, widths, FLOPs ----


@pytest.mark.parametrize(
    ("category", "opcodes"),
    [
        ("global_load", "LDG.E.EF.128 LD.E"),
        ("global_store", "STG.E.EF.128 REDG.E.ADD.F32.FTZ.RN ATOMG.E.ADD"),
        ("local", "LDL.64 STL"),
        ("shared_load", "LDS.128 LDSM.16.M88.4"),
        ("shared_store", "STS.64 STAS.64 STSM.16.M88.4 ATOMS.ADD"),
        ("mufu", "MUFU.EX2 MUFU.RCP64H"),
        ("float", "FFMA.FTZ FMNMX.FTZ FSETP.NEU.FTZ.AND HFMA2.BF16_V2 HADD2"),
        ("float64", "DFMA DSETP.LEU.AND"),
        ("integer", "IMAD.WIDE.U32 UIADD3 ULOP3.LUT FSEL PRMT UMOV"),
        ("conversion", "F2FP.BF16.F32.PACK_AB F2F.F64.F32 I2FP.F32.S32 HADD2.F32"),
        ("shuffle", "SHFL.BFLY VOTEU.ALL VOTE.ANY REDUX.MAX.S32"),
        ("barrier", "BAR.SYNC.DEFER_BLOCKING SYNCS.PHASECHK.TRANS64.TRYWAIT UCGABAR_WAIT"),
        ("barrier", "WARPGROUP.DEPBAR.LE LDGDEPBAR DEPBAR.LE MEMBAR.ALL.GPU"),
        ("branch", "BRA.DIV BSSY BSYNC.RECONVERGENT WARPSYNC.ALL EXIT CALL.REL.NOINC"),
        ("tensor", "HMMA.16816.F32.BF16 HGMMA.64x128x16.F32.BF16 IMMA.16832.S8.S8 DMMA.884"),
        ("tensor", "QGMMA.64x256x32.F32.E4M3.E4M3 UTCHMMA"),
        ("async_copy", "LDGSTS.E.BYPASS.128 UBLKCP.S.G UTMALDG.4D UTMASTG.4D"),
        ("other", "ULDC.64 S2R CS2R NOP"),
    ],
)
def test_category(category, opcodes):
    found = {opcode: sass.Instruction(0, "", opcode, "").category for opcode in opcodes.split()}
    assert found == dict.fromkeys(opcodes.split(), category)


@pytest.mark.parametrize(
    ("opcode", "flops", "of_a_warp"),
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16, 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8, 2 * 16 * 8 * 8),
        ("IMMA.16832.S8.S8", 2 * 16 * 8 * 32, 2 * 16 * 8 * 32),
        ("DMMA.884", 2 * 8 * 8 * 4, 2 * 8 * 8 * 4),
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16, 2 * 64 * 128 * 16 // 4),
        ("QGMMA.64x256x32.F32.E4M3.E4M3", 2 * 64 * 256 * 32, 2 * 64 * 256 * 32 // 4),
        ("UTCHMMA.2CTA", 0, 0),
        ("LDSM.16.M88.4", 0, 0),
    ],
)
def test_tensor_flops(opcode, flops, of_a_warp):
    instruction = sass.Instruction(0, "", opcode, "")
    assert (instruction.flops, sass.mix([instruction])["tensor_flops"]) == (flops, of_a_warp)


def test_mix_of_an_attention_loop():
    code = (
        "LDG.E.128 R4, [R2.64]",  # Q, once
        ".L_x_0:",
        *["LDGSTS.E.BYPASS.128 [R4], desc[UR4][R6.64]"] * 2,
        "LDSM.16.M88.4 R8, [R3]",
        "LDSM.16.M88 R8, [R3]",
        "LDS.64 R8, [R3]",
        "STS [R3], R8",
        *["HMMA.16816.F32.BF16 R4, R8, R10, R4"] * 3,
        "MUFU.EX2 R4, R4",
        "@P0 BRA `(.L_x_0)",
        "EXIT",
        *TRAP,
    )
    found = mix(*code)
    assert found["total"] == sum(found[name] for name in sass.CATEGORIES) == 11
    assert found["global_load"] == 0 and found["async_copy"] == 2
    assert (found["read_bytes"], found["written_bytes"]) == (32, 0)
    assert found["wavefronts"] == 2 * 4 + 4 + 1 + 2 + 1
    assert found["tensor_flops"] == 3 * 2 * 16 * 8 * 16
    assert found["mufu"] == found["branch"] == 1


# ---- Model ----


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "limit"),
    [
        ("sm_90", 512, 64, 128, 2, "registers"),
        ("sm_90", 512, 65, 0, 1, "registers"),  # 65 registers are allocated as 72
        ("sm_90", 256, 128, 0, 2, "registers"),
        ("sm_90", 128, 32, 0, 16, "warps"),
        ("sm_90", 32, 16, 0, 32, "blocks"),
        ("sm_90", 96, 168, 0, 4, "registers"),  # 12 warps fit
        ("sm_90", 128, 32, 112 << 10, 2, "shared memory"),  # with 1 KiB each: 226 of 228 KiB
        ("sm_90", 128, 32, 114 << 10, 1, "shared memory"),
        ("sm_86", 128, 32, 0, 12, "warps"),
        ("sm_75", 128, 32, 32 << 10, 2, "shared memory"),
    ],
)
def test_occupancy(arch, threads, registers, shared, blocks, limit):
    gpu = kernel_report.GPUS[arch]
    found = kernel_report.occupancy(gpu, threads, registers, shared)
    assert (found["blocks"], found["limit"]) == (blocks, limit)
    assert found["warps"] == blocks * -(-threads // 32)
    assert found["percent"] == round(100 * found["warps"] / gpu.warps)


@pytest.mark.parametrize(
    ("lines", "bound", "cycles"),
    [
        (["LDG.E.128 R0, [R2.64]"], "HBM", 32 * 16 / (4800e9 / 132 / 1.98e9)),
        (["MUFU.EX2 R0, R1"] * 3, "exponential", 6),
        (["IADD3 R0, R1, R2, R3"] * 8, "issue", 9 / 4),
        (["DFMA R0, R2, R4, R6"] * 8, "issue", 8 * 32 / 64),
        (["LDS.128 R0, [R4]", "STS.64 [R4], R0"], "shared memory", 6),
        (["HGMMA.64x128x16.F32.BF16 R4, R8, gdesc[UR4], R4"], "tensor", 2 * 64 * 128 * 4 / 4096),
    ],
)
def test_planted_bound(lines, bound, cycles):
    region = sass.main_region(sass.parse(listing(*lines, "EXIT", *TRAP)))
    found = kernel_report.predicted(GPU, region)
    assert found["bound"] == bound
    assert found["cycles"][bound] == pytest.approx(cycles, abs=0.01)
    runner_up = sorted(found["cycles"].values())[-2]
    assert found["headroom"] == pytest.approx(runner_up / cycles, abs=0.01)


@pytest.mark.parametrize(
    ("lines", "most"),
    [
        (["LDG.E.128 R4, [R2.64]", "LDG.E R8, [R2.64+0x10]", "FADD R1, R4, R8"], 2),
        (["LDG.E.128 R4, [R2.64]", "FADD R1, R7, R7", "LDG.E R8, [R2.64+0x10]"], 1),
        (["LDG.E.64 R4, [R2.64]", "FADD R6, R1, R1", "LDG.E R8, [R2.64]", "FADD R1, R5, R8"], 2),
        (["LDG.E R4, [R2.64]", "LDG.E R4, [R2.64]"], 1),  # the second waits for the register
        (["LDG.E.64 R2, [R2.64]", "LDG.E R4, [R2.64]"], 1),  # and here for its address
        (["FADD R1, R7, R7"], 0),
    ],
)
def test_loads_in_flight(lines, most):
    (block,) = sass.parse(listing(*lines, "EXIT"))
    assert kernel_report.loads_in_flight(block.instructions) == most


def test_compiler_figures():
    log = (
        "ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 56 registers, used 1 barriers, 128 bytes smem\n"
    )
    assert disassembly.figures(log) == (56, 28, 128)


# ---- Real kernels ----


@pytest.fixture(scope="module")
def nvrtc():
    cupy = pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")
    try:
        cupy.cuda.nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"no NVRTC: {error}")


@pytest.fixture
def nvdisasm(nvrtc):
    if disassembly.find_nvdisasm() is None:
        pytest.skip("no nvdisasm")


def row_of(compute_capability, name):
    """The row of one shipped kernel."""
    kernel = inside.kernels(compute_capability)[name]
    (row,) = kernel_report.rows_of([kernel], f"sm_{compute_capability}")
    return row


REAL = [  # kernel, region, elements a thread, bytes read and written of each, MUFU.EX2
    ("softmax_rows<SoftmaxForward<float, float, float, kProb, false, false, 1, 1>, 512, 1, 8, 1>",
     "body", 32, 4, 4, 32),
    ("softmax_rows<SoftmaxForward<__nv_bfloat16, float, __nv_bfloat16, kProb, false, false, 1, 1>,"
     " 8, 16, 2, 1>", "body", 16, 2, 2, 16),
    ("softmax_rows<SoftmaxForward<float, float, float, kProb, true, false, 1, 1>, 32, 4, 4, 1>",
     "body", 16, 4 + 1, 4, 16),
    ("softmax_rows<SoftmaxBackward<float, float, false, false, 1, 1>, 512, 1, 8, 8>",
     "body", 32, 8, 4, 0),
    ("softmax_rows<SoftmaxForward<double, double, double, kProb, false, false, 1, 1>, 32, 4, 4, 1>",
     "body", 8, 8, 8, 0),
    ("softmax_split<SoftmaxForward<float, float, float, kProb, false, false, 1, 1>,"
     " kReduce, 256, 1, 8>", "loop", 32, 4, 0, 32),  # the states of parts are outside
    ("softmax_split<SoftmaxForward<float, float, float, kProb, false, false, 1, 1>,"
     " kNormalize, 256, 1, 8>", "loop", 32, 4, 4, 32),
    ("softmax_strided<SoftmaxForward<__half, float, __half, kProb, false, false, 1, 1>,"
     " kFused, 32, 128, 16>", "body", 16, 2, 2, 16),
]  # fmt: skip


@pytest.mark.drawn
@pytest.mark.parametrize(("name", "region", "elements", "read", "written", "exponentials"), REAL)
def test_real_kernel(nvdisasm, name, region, elements, read, written, exponentials):
    row = row_of(90, name)
    assert row["region"] == region
    scale = 8 if "double" in name else 4  # bytes, which each thread may load beside
    assert row["global_bytes"]["read"] - elements * read in (0, scale)
    assert row["global_bytes"]["written"] == elements * written
    # Beside the exponentials: a reciprocal, and those of rescales and of the merge of a block.
    assert 0 <= row["mix"]["mufu"] - exponentials <= 9
    assert row["spill_bytes"] == row["mix"]["local"] == 0
    assert row["mix"]["total"] == sum(row["mix"][name] for name in sass.CATEGORIES)
    assert row["mix"]["other"] < row["mix"]["total"] / 4
    assert set(row["cycles"]) == {"HBM", "issue", "exponential", "shared memory", "tensor"}


FORWARD = "SoftmaxForward<{0}, float, {0}, {1}, {2}, false, 1, 1>"


@pytest.mark.parametrize(
    ("name", "loads"),
    [
        (f"softmax_rows<{FORWARD.format('float', 'kProb', 'false')}, 512, 1, 8, 1>", 8),
        (f"softmax_rows<{FORWARD.format('__nv_bfloat16', 'kProb', 'false')}, 512, 1, 4, 1>", 4),
        (f"softmax_rows<{FORWARD.format('__nv_bfloat16', 'kLogProb', 'false')}, 512, 1, 4, 8>", 4),
        (f"softmax_rows<{FORWARD.format('float', 'kProb', 'true')}, 32, 4, 4, 1>", 8),
        (
            "softmax_rows<SoftmaxBackward<__nv_bfloat16, float, false, false, 1, 1>, 512, 1, 2, 1>",
            4,
        ),
        (
            f"softmax_split<{FORWARD.format('__nv_bfloat16', 'kLse', 'false')}, "
            "kReduce, 256, 1, 4>",
            4,
        ),
        (f"softmax_strided<{FORWARD.format('float', 'kProb', 'false')}, kFused, 32, 32, 8>", 8),
        (f"softmax_split<{FORWARD.format('float', 'kProb', 'false')}, kNormalize, 256, 1, 8>", 8),
    ],
)
def test_a_thread_has_its_whole_tile_in_flight(nvdisasm, name, loads):
    """No load waits for the one before: elements are unpacked when all are under way."""
    assert row_of(90, name)["mix"]["loads_in_flight"] >= loads


def test_kernels_compiled_together_are_told_apart(nvdisasm):
    found = [
        kernel for kernel in inside.kernels(90).values() if kernel.header == "softmax/merge.cuh"
    ]
    assert len(found) > 3
    alone = [kernel_report.rows_of([kernel], "sm_90")[0] for kernel in found]
    assert kernel_report.rows_of(found, "sm_90") == alone
    assert len({str(row["mix"]) for row in alone}) > 1


def test_state_merge(nvdisasm):
    row = row_of(80, "softmax_state_merge<float, false, 128>")
    assert row["global_bytes"] == {"read": 16, "written": 8}
    assert (row["bound"], row["threads"], row["occupancy"]["warps"]) == ("HBM", 128, 64)


def test_without_nvdisasm(nvrtc, monkeypatch):
    monkeypatch.setattr(disassembly, "find_nvdisasm", lambda: None)
    row = row_of(90, "softmax_state_merge<float, false, 128>")
    assert row["registers"] > 0 and row["occupancy"]["blocks"] > 0
    assert row["mix"] is row["bound"] is row["cycles"] is None
    assert disassembly.WHEEL in row["note"]
    assert disassembly.WHEEL in kernel_report.markdown([row], [])


# ---- Attention on Hopper ----

SM90 = Kernel(
    "attention_forward_sm90",
    {
        "T": "__half",
        "kWarpgroups": 3,
        "kKeys": 128,
        "kStages": 4,
        "kDim": 64,
        "kValueDim": 64,
        "kOwnOut": True,
        "kPingPong": True,
        "kModified": False,
    },
    grid=132,
    block=512,
)
SM90_LOOP = (
    "@P0 BRA `(.L_x_9)",
    ".L_x_0:",
    "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xa0",
    "@!P0 BRA `(.L_x_0)",
    "MOV R157, R2",
    ".L_x_1:",  # the main loop
    "UMOV UR4, UR5",
    *["HGMMA.64x128x16.F32 R24, gdesc[UR24], R24"] * 4,
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R8",
    "@!P0 BRA `(.L_x_7)",
    ".L_x_2:",
    *["HGMMA.64x64x16.F32 R88, R152, gdesc[UR8].tnspB, R88"] * 8,
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    "@!P0 BRA P1, `(.L_x_3)",
    *["FSEL R24, R24, -INF , P0"] * 5,  # a mask
    ".L_x_3:",
    *["FMNMX.FTZ R3, R24, R25, !PT"] * 2,
    "@!P0 BRA `(.L_x_4)",
    "MUFU.EX2 R4, R3",  # how much O is rescaled
    ".L_x_4:",
    *["FFMA.FTZ R24, R24, UR4, -R5", "MUFU.EX2 R24, R24", "FADD.FTZ R7, R7, R24"] * 3,
    "@P1 BRA `(.L_x_5)",  # the last tile
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R9",
    "@!P0 BRA `(.L_x_8)",
    ".L_x_5:",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "@!P2 BRA `(.L_x_6)",
    *["FMUL.FTZ R88, R88, R4"] * 9,  # the rescale
    ".L_x_6:",
    "F2FP.F16.F32.PACK_AB R152, R25, R24",
    "@P3 BRA `(.L_x_1)",
    "CALL.REL.NOINC `($divide)",
    "EXIT",
    ".L_x_7:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R8",
    "@!P0 BRA `(.L_x_7)",
    "BRA `(.L_x_2)",
    ".L_x_8:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R9",
    "@!P0 BRA `(.L_x_8)",
    "BRA `(.L_x_5)",
    ".L_x_9:",
    "MOV R200, R0",
    "USETMAXREG.DEALLOC.CTAPOOL 0x20",
    "UTMALDG.5D [UR4], [UR6]",
    "MOV R20, R2",
    "EXIT",
    "$divide:",
    "MOV R158, R2",
    "RET.REL.NODEC R6 `(attention)",
    *TRAP,
)


def test_main_path_of_hopper():
    """All products and waits; no mask, no rescale, no second try, and not the last tile."""
    blocks = sass.parse(listing(*SM90_LOOP))
    region, mix = attention_sm90_loop.mix(blocks, SM90)
    assert region.kind == "loop"
    opcodes = [i.opcode for i in region.path]
    assert "FSEL" not in opcodes and "FMUL.FTZ" not in opcodes
    assert [mix[name] for name in ("tensor", "mufu", "ffma", "fadd", "fmnmx", "fmul")] == [
        12, 3, 3, 3, 2, 0,
    ]  # fmt: skip
    assert [mix[name] for name in ("f2fp", "syncs", "bar", "barrier", "uniform")] == [1, 2, 0, 4, 1]
    assert mix["total"] == len(opcodes) == 12 + 3 + 3 + 3 + 2 + 1 + 4 + 1 + 7  # and branches
    assert mix["tensor_flops"] == 2 * 64 * 128 * (64 + 64) // 4
    assert mix["read_bytes"] == 128 * (64 + 64) * 2 // (3 * 128)
    assert attention_sm90_loop.products(region.path) == attention_sm90_loop.tile_of(SM90).products


def test_waits_before_each_instruction():
    """On every path: the second tries of a barrier change nothing."""
    blocks = sass.parse(listing(*SM90_LOOP))
    loop = attention_sm90_loop.main_loop(blocks)
    passed = attention_sm90_loop.waits_before(blocks, loop)
    assert len(passed) == sum(len(blocks[b].instructions) for b in loop.members)
    found = {i.base: set() for i, _ in passed}
    for i, waits in passed:
        found[i.base] |= waits
    assert (found["HGMMA"], found["MUFU"], found["FMNMX"]) == ({0}, {1}, {1})
    assert (found["WARPGROUP"], found["FMUL"], found["F2FP"]) == ({0, 1}, {2}, {2})


def test_registers_of_the_roles():
    """From setmaxnreg on, functions included: not what the producer had before."""
    blocks = sass.parse(listing(*SM90_LOOP))
    assert attention_sm90_loop.roles(blocks) == {"consumers": (160, 159), "producer": (32, 21)}


@pytest.mark.parametrize(
    ("opcode", "operands", "registers"),
    [
        ("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR24], R24, gsb0", 88),
        ("HGMMA.64x64x16.F32", "R88, R152, gdesc[UR8].tnspB, R88", 153),
        ("FADD.FTZ", "R7, |R9|, -R8.reuse", 10),
        ("STG.E.128", "desc[UR44][R12.64+0x10], R4", 13),
        ("UMOV", "UR51, UR7", 0),
        ("CS2R", "R6, SRZ", 7),
    ],
)
def test_registers_of_an_instruction(opcode, operands, registers):
    assert attention_sm90_loop.registers(sass.Instruction(0, "", opcode, operands)) == registers


def test_tiles_of_hopper_are_those_of_the_kernel():
    sizes = {**SM90.arguments, "kDim": 192, "kValueDim": 96}
    found = attention_sm90_loop.tile_of(dataclasses.replace(SM90, arguments=sizes))
    assert found == (3, 128, 192, 96)
    assert found.products == {"64x128x16": 12, "64x96x16 tnspB": 8}
    with pytest.raises(ValueError, match="softmax_rows"):
        attention_sm90_loop.tile_of(dataclasses.replace(SM90, template="softmax_rows"))
    with pytest.raises(ValueError, match="no loop"):
        attention_sm90_loop.main_loop(sass.parse(listing("EXIT", *TRAP)))


@pytest.mark.parametrize(
    ("dim", "value_dim", "most", "bounds"),
    [
        (64, 64, 410, {"exponential", "tensor"}),  # they take the same time
        (128, 128, 440, {"tensor"}),
        (256, 256, 360, {"tensor"}),
    ],
)
def test_instructions_of_hopper(nvdisasm, dim, value_dim, most, bounds):
    """FlashAttention-3 has 431 and 469 in its tiles of 128 keys, of 64 and 128 columns."""
    wanted = {"kDim": dim, "kValueDim": value_dim, "kModified": False}
    kernel = next(
        kernel
        for kernel in inside.kernels(90).values()
        if kernel.template == "attention_forward_sm90"
        and wanted.items() <= kernel.arguments.items()
    )
    row = row_of(90, kernel.name)
    tile, mix = attention_sm90_loop.tile_of(kernel), row["mix"]
    assert mix["total"] <= most
    assert mix["mufu"] == mix["ffma"] == 64 * tile.keys // 128  # one exponential for each score
    assert mix["f2fp"] == mix["mufu"] // 2
    assert mix["fmul"] <= 4  # no rescale
    assert mix["tensor"] == sum(tile.products.values())
    assert 4 * mix["tensor_flops"] == 2 * 64 * tile.keys * (dim + value_dim)
    assert row["spill_bytes"] == mix["local"] == mix["shared_load"] == mix["shared_store"] == 0
    assert (row["arch"], row["region"]) == ("sm_90", "loop") and row["bound"] in bounds
    assert row["cycles"]["tensor"] == 2 * 64 * tile.keys * (dim + value_dim) / 4 / 4096
    assert row["occupancy"]["warps"] == 4 * (tile.groups + 1)  # one block an SM

    for text in (kernel_report.markdown([row], []), report_tables.kernels({"kernels": [row]})):
        assert report_attention.tiles([row]) in text
        assert f"| `{kernel.name}` | {mix['total']} | {mix['tensor']} | {mix['mufu']} | " in text
        flops = formats.number(2 * 64 * tile.keys * (dim + value_dim) / 1e6)
        assert f"| 4 | {flops} | {formats.number(row['cycles']['tensor'])} | " in text


@pytest.mark.parametrize(
    ("kernel", "most"),
    [
        ("q<HalfOp<__half>, 4, 2, 32, 64, 64, 64, 2", 510),
        ("kv<HalfOp<__half>, 4, 2, 16, 64, 64, 64, 64, 4", 410),
        ("kv<HalfOp<__half>, 8, 1, 32, 128, 128, 128, 128, 2", 600),
        ("kv<DoubleOp, 4, 1, 16, 64, 64, 0, 64, 2", 1000),
    ],
)
def test_instructions_of_gradients(nvdisasm, kernel, most):
    """Of a warp for a tile: its products, one exponential for each score, no local memory."""
    row = row_of(80, f"attention_backward_{kernel}, true, false, NoBias, false, NoScore>")
    shipped, mix = inside.kernels(80)[row["kernel"]], row["mix"]
    assert mix["tensor_flops"] == backward_loop.tile_flops(shipped) and mix["total"] <= most
    tile = shipped.arguments
    scores = 16 * tile["kMTiles"] * tile.get("kKeys", tile.get("kQueries"))
    if tile["Op"] != "DoubleOp":  # whose exponential is a polynomial
        assert mix["mufu"] == scores // 32
    assert row["spill_bytes"] == mix["local"] == mix["shared_store"] == 0
    assert row["region"] == "loop" and row["bound"] in ("shared memory", "tensor", "issue")


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("kernel", "most"),
    [
        ("q_sm90<__half, 2, 128, 3, 3, 64, 64, true>", 410),
        ("q_sm90<__half, 2, 128, 2, 2, 128, 128, true>", 440),
        ("q_sm90<__half, 2, 64, 2, 1, 256, 256, false>", 320),
        ("kv_sm90<__half, 2, 128, 3, 64, 64, false>", 600),
        ("kv_sm90<__half, 2, 64, 3, 128, 128, false>", 380),
    ],
)
def test_instructions_of_gradients_of_hopper(nvdisasm, kernel, most):
    """Bound by the tensor cores; one exponential for each score, no local or global memory."""
    row = row_of(90, f"attention_backward_{kernel}")
    shipped, mix = inside.kernels(90)[row["kernel"]], row["mix"]
    wanted = backward_sm90_loop.products(shipped)
    rows, dim, _ = backward_sm90_loop.sizes(shipped)
    assert mix["total"] <= most and mix["tensor"] == sum(sum(part.values()) for part in wanted)
    assert mix["mufu"] == rows // 2
    assert 4 * mix["tensor_flops"] == 2 * 64 * rows * dim * (4 if "kv" in kernel else 3)
    assert 4 * mix["tensor_flops"] == backward_sm90_loop.tile_flops(shipped)
    assert row["spill_bytes"] == mix["local"] == mix["global_load"] == mix["shared_store"] == 0
    assert (row["region"], row["bound"]) == ("loop", "tensor")


@pytest.mark.parametrize(("queries", "dim", "most"), [(128, 64, 650), (64, 128, 400)])
def test_instructions_of_gradients_of_hopper_that_store(nvdisasm, queries, dim, most):
    """Two bytes of each score are written; else what `test_instructions_of_gradients_of_hopper`
    has. Of dS they become dq, bound by reading them."""
    sizes = f"2, {queries}, 3, {dim}, {dim}"
    row = row_of(90, f"attention_backward_kv_sm90<__half, {sizes}, true>")
    without = row_of(90, f"attention_backward_kv_sm90<__half, {sizes}, false>")
    mix, scores = row["mix"], 64 * queries // 128  # of a thread
    assert mix["total"] <= min(most, without["mix"]["total"] * 1.1)
    assert mix["written_bytes"] == 2 * scores and mix["global_store"] == scores // 8
    assert row["spill_bytes"] == mix["local"] == mix["global_load"] == mix["shared_store"] == 0
    same = ("tensor_flops", "mufu", "shared_load", "float", "conversion")
    assert all(mix[name] == without["mix"][name] for name in same)
    assert (row["region"], row["bound"]) == ("loop", "tensor")

    row = row_of(90, f"attention_backward_ds_sm90<__half, 4, 4, {dim}>")
    mix = row["mix"]
    assert mix["total"] <= 95 and mix["mufu"] == mix["shared_load"] == mix["local"] == 0
    assert 4 * mix["tensor_flops"] == 2 * 64 * 64 * dim
    assert mix["read_bytes"] == 64 * 64 * 2 // 128 and row["bound"] == "HBM"


def test_gradients_have_a_tile_of_their_own():
    kernels = inside.kernels(80).values()
    other = next(kernel for kernel in kernels if kernel.template == "attention_forward")
    with pytest.raises(ValueError, match="not a kernel of attention/backward_q"):
        backward_loop.tile_flops(other)
    with pytest.raises(ValueError, match="not a kernel of attention/backward_q_sm90"):
        backward_sm90_loop.products(other)


def test_other_kernels_have_no_table_of_tiles(nvdisasm):
    row = row_of(90, "softmax_state_merge<float, false, 128>")
    assert (
        report_attention.tiles([row, row | {"mix": None, "header": "attention/forward_sm90.cuh"}])
        == ""
    )


# ---- Command line ----


def test_command_line(nvdisasm, tmp_path, capsys):
    files = tmp_path / "kernels.json", tmp_path / "kernels.md"
    arguments = [
        "--arch",
        "sm_80",
        "sm_90",
        "--match",
        "^softmax_state_merge<float, f",
        "--jobs",
        "1",
    ]
    assert not kernel_report.main(
        [*arguments, "--json", str(files[0]), "--markdown", str(files[1])]
    )
    written = json.loads(files[0].read_text())
    assert [row["arch"] for row in written["kernels"]] == ["sm_80", "sm_90"]
    assert written["left_out"] == []
    table = files[1].read_text()
    assert table.count("\n|`softmax_state_merge<float, false, 128>`|") == 2
    assert "| sm_90 (H200 SXM) | 1 | 0 | HBM 1 |" in table
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("most", [1, 24])
def test_groups_compile_together(monkeypatch, most):
    monkeypatch.setattr(inside, "TOGETHER", most)
    groups = inside.by_file("sm_90", "attention")
    assert sum(map(len, groups)) == sum("attention" in name for name in inside.kernels(90))
    for group in groups:
        ((header, suffix),) = {(kernel.header, kernel.suffix) for kernel in group}
        assert suffix == ("a" if "sm90" in header else "")
        assert len(group) <= min(most, inside.FEWER.get(header, most))


def test_the_time_limit_shows(nvrtc, monkeypatch):
    monkeypatch.setattr(inside, "TOGETHER", 1)
    rows, left_out = kernel_report.report(["sm_90"], "softmax_merge", jobs=1, limit_seconds=0)
    wanted = [f"sm_90 {name}" for name in inside.kernels(90) if "softmax_merge" in name]
    assert left_out
    assert sorted([*left_out, *(f"sm_90 {row['kernel']}" for row in rows)]) == sorted(wanted)
    assert f"{len(left_out)} kernels are left out" in kernel_report.markdown(rows, left_out)


# ---- A KV cache ----


def decode_kernel(op="bfloat16", dim=64, capability=90):
    dtype = "float32" if op == "tf32" else op
    problem = DecodeProblem(op, dtype, 1, 1, 1, 1000, dim, dim)
    return plan_decode(problem, capability, 132).kernel


def test_mix_of_a_decode_loop():
    """Copies and products in loops of their own; masks and new keys are passed by."""
    kernel = decode_kernel(dim=64, capability=80)  # 16 keys: 8 products, 8 copies of a lane
    code = (
        "LDG.E.128 R4, [R2.64]",
        ".L_x_0:",
        "DEPBAR.LE SB0, 0x1",
        ".L_x_1:",
        *["LDGSTS.E.BYPASS.128 [R4], desc[UR4][R6.64]"] * 4,
        "@P0 BRA `(.L_x_1)",
        "@P1 BRA `(.L_x_3)",
        *["LDG.E R5, [R6.64]", "FADD R5, R5, R5"] * 9,  # an edge
        ".L_x_3:",
        ".L_x_2:",
        *["HMMA.16816.F32.BF16 R4, R8, R10, R4"] * 2,
        "@P2 BRA `(.L_x_2)",
        "HMMA.16816.F32.BF16 R4, R8, R10, R4",
        "@P3 BRA `(.L_x_0)",
        "@P4 CALL.REL.NOINC `(.L_x_4)",  # leaves the loop
        "BRA `(.L_x_0)",
        ".L_x_4:",
        "EXIT",
        *TRAP,
    )
    region, found = decode_loop.mix(sass.parse(listing(*code)), kernel)
    products = 2 * 16 * 16 * 128 // (2 * 16 * 8 * 16)
    assert region.kind == "loop" and found["keys"] == 16
    assert found["tensor"] == products and found["tensor_flops"] == 2 * 16 * 16 * 128
    assert found["async_copy"] == 8 and found["read_bytes"] == 16 * 128 * 2 // 32
    assert found["global_load"] == found["float"] == 0


@pytest.mark.drawn
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("dim", "most"), [(64, 20), (128, 18), (256, 45)])
def test_keys_are_bound_by_memory(nvdisasm, dim, most, arch):
    kernel = decode_kernel(dim=dim, capability=int(arch[3:]))
    (row,) = kernel_report.rows_of([kernel], arch)
    assert row["bound"] == "HBM" and row["headroom"] < 0.5
    assert row["mix"]["total"] / row["mix"]["keys"] <= most
    assert row["mix"]["read_bytes"] * 32 == row["mix"]["keys"] * 2 * dim * 2
    # A cache of e4m3 has half of the bytes.
    converting = row["mix"]["converting"]
    assert (converting > 0) == (arch == "sm_90")
    if converting and dim == 128:
        assert (row["mix"]["total"] + converting) / 4 < row["cycles"]["HBM"] / 2
    assert report_attention.keys([row]) in kernel_report.markdown([row], [])


def test_bytes_of_wide_keys(nvdisasm):
    """Values that are not columns of the keys count, too; two of four warps load."""
    (row,) = kernel_report.rows_of([decode_kernel("float64", 256, 80)], "sm_80")
    assert 4 * row["mix"]["read_bytes"] * 32 == row["mix"]["keys"] * 2 * 256 * 8


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("arch", "rows", "warps"), [("sm_80", 16, 4), ("sm_90", 16, 4), ("sm_90", 64, 12)]
)
def test_keys_that_hold_values_are_bound_by_memory(nvdisasm, arch, rows, warps):
    """Each of the warps has its part of the bytes."""
    shape = (1, 1, rows, 1000, 576, 512)
    problem = DecodeProblem("bfloat16", "bfloat16", *shape, values_in_keys=True)
    (row,) = kernel_report.rows_of([plan_decode(problem, int(arch[3:]), 132).kernel], arch)
    assert row["bound"] == "HBM" and row["headroom"] < 0.7
    keys, mix = row["mix"]["keys"], row["mix"]
    assert warps * mix["read_bytes"] * 32 == keys * 576 * 2
    flops = 2 * rows * keys * (576 + 512)
    assert warps * mix["tensor_flops"] == pytest.approx(flops, rel=1e-5)
    if rows == 64:  # one exponential for each score; others where O is rescaled
        assert warps * (mix["mufu"] - 1) <= rows * keys / 32 <= warps * mix["mufu"]
        assert mix["local"] == mix["global_load"] == 0 and warps * mix["total"] < 3200


def test_no_mix_without_tensor_cores(nvdisasm):
    (row,) = kernel_report.rows_of([decode_kernel("float32")], "sm_90")
    assert row["mix"] is None and not report_attention.keys([row])
