"""Tensor cores on the emulator: mma, ldmatrix and stmatrix; and asynchronous copies."""

from __future__ import annotations

import re

import emulator
import numpy as np
import pytest

ml_dtypes = pytest.importorskip("ml_dtypes")

HEAD = """
#include <primitives/numeric.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/mma.cuh>
#include <ptx/smem.cuh>
struct Params { const unsigned int* x; unsigned int* y; long long fault; };
__global__ void kernel(const __grid_constant__ Params p) {
  const int t = threadIdx.x;
  const int fault = p.fault;
"""


def run(body, fault=0, *, x=None, y=None, block=32, **options):
    """Runs a kernel body on words x, read, and y, written; returns the counters and y."""
    x = np.arange(1024, dtype=np.uint32) if x is None else x
    y = emulator.empty((1024,), np.uint32) if y is None else y
    source, params = HEAD + body + "\n}\n", emulator.pack(x, y, fault)
    counters = emulator.launch_source(source, "kernel", 1, block, params, (x,), (y,), **options)
    return counters, y


def fails(pattern, body, fault=1, **options):
    """The kernel is fine with fault = 0, and an error that matches and is located with `fault`."""
    run(body, **options)
    with pytest.raises(emulator.EmulatorError, match=pattern) as caught:
        run(body, fault, **options)
    message = str(caught.value)
    assert re.search(r"^kernel kernel, block \(0, 0, 0\), thread \d+: .*source:\d+$", message), (
        message
    )


def refused(needed, body, arch):
    with pytest.raises(emulator.EmulatorError, match=f"needs {needed}, but this is {arch}"):
        run(body, arch=arch)


# -- mma ------------------------------------------------------------------------------------------

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def slots(*positions):
    """Rows and columns of a fragment, [lane, slot], from a pair for each slot."""
    return tuple(np.stack([np.broadcast_to(p[i], (32,)) for p in positions], 1) for i in (0, 1))


# Of each instruction its dtype, and where in A, B and D the elements of a lane's registers are, as
# the PTX ISA has it (9.7.14.5, matrix fragments).
D_16x8 = slots(*((G + 8 * (i // 2), 2 * T + i % 2) for i in range(4)))
SIXTEEN = (
    slots(*((G + 8 * (i // 2 % 2), 2 * T + i % 2 + 8 * (i // 4)) for i in range(8))),
    slots(*((2 * T + i % 2 + 8 * (i // 2), G) for i in range(4))),
    D_16x8,
)
MMA = {
    "f16": (np.float16, *SIXTEEN),
    "bf16": (ml_dtypes.bfloat16, *SIXTEEN),
    "tf32": (
        np.float32,
        slots((G, T), (G + 8, T), (G, T + 4), (G + 8, T + 4)),
        slots((T, G), (T + 4, G)),
        D_16x8,
    ),
    "f64": (np.float64, slots((G, T)), slots((T, G)), slots((G, 2 * T), (G, 2 * T + 1))),
}
DEPTH = {"f16": 16, "bf16": 16, "tf32": 8, "f64": 4}
CALL = {
    "f16": "ptx::mma_m16n8k16<__half>(d, a, b[0], b[1])",
    "bf16": "ptx::mma_m16n8k16<__nv_bfloat16>(d, a, b[0], b[1])",
    "tf32": "ptx::mma_m16n8k8_tf32(d, a, b[0], b[1])",
    "f64": "ptx::mma_m8n8k4_f64(d, a[0], b[0])",
}
MMA_BODY = """
for (int i = 0; i < fault; ++i) {
  FRAGMENTS
  const unsigned int* x = p.x + (i * 32 + t) * (NA + NB + ND);
  unsigned int* words[3] = {(unsigned int*)a, (unsigned int*)b, (unsigned int*)d};
  int sizes[3] = {NA, NB, ND};
  for (int f = 0; f < 3; ++f) {
    for (int w = 0; w < sizes[f]; ++w) words[f][w] = ptx::ld_global(x++);
  }
  CALL;
  for (int w = 0; w < ND; ++w) ptx::st_global(p.y + (i * 32 + t) * ND + w, words[2][w]);
}
"""


def mma(kind, a, b, d, maps=None, **options):
    """a @ b + d by the instruction, through registers; the operands may be stacks of matrices."""
    dtype, *true_maps = MMA[kind]
    maps = maps or true_maps
    accumulator = np.float64 if kind == "f64" else np.float32
    shape = np.broadcast_shapes(a.shape[:-2], b.shape[:-2], d.shape[:-2])
    words = [
        np.ascontiguousarray(np.broadcast_to(m, (*shape, *m.shape[-2:]))[..., rows, columns])
        .astype(kind_of, copy=False)
        .view(np.uint32)
        .reshape(-1, 32, rows.shape[1] * np.dtype(kind_of).itemsize // 4)
        for m, (rows, columns), kind_of in zip(
            (a, b, d), maps, (dtype, dtype, accumulator), strict=True
        )
    ]
    x, d_words = np.concatenate(words, axis=2), words[2].shape[2]
    y = emulator.empty((len(x), 32, d_words), np.uint32)
    fragments = "double a[1], b[1], d[2];" if kind == "f64" else "unsigned a[4], b[2]; float d[4];"
    body = MMA_BODY.replace("FRAGMENTS", fragments).replace("CALL", CALL[kind])
    for name, part in zip(("NA", "NB", "ND"), words, strict=True):
        body = body.replace(name, str(part.shape[2]))
    counters, _ = run(body, len(x), x=x, y=y, **options)
    assert counters.mma == len(x) and counters.warp_collectives == 0
    result = np.empty((len(x), *d.shape[-2:]), accumulator)
    rows, columns = maps[2]
    result[:, rows, columns] = y.view(accumulator)
    return result.reshape(*shape, *d.shape[-2:])


def operands(rng, kind, count=1):
    """Random integers, few enough for exact products and sums in every format."""
    rows, depth = 8 if kind == "f64" else 16, DEPTH[kind]
    return tuple(
        rng.integers(-9, 10, (count, *shape)).astype(np.float64)
        for shape in ((rows, depth), (depth, 8), (rows, 8))
    )


@pytest.mark.parametrize("kind", MMA)
def test_mma_multiplies(kind, rng):
    a, b, d = operands(rng, kind, 20)
    np.testing.assert_array_equal(mma(kind, a, b, d), a @ b + d)


def wrong_maps(kind):
    """Fragment maps with one mistake each."""
    a, b, d = MMA[kind][1:]
    flip = {
        "A's registers reversed": ((a[0][:, ::-1], a[1][:, ::-1]), b, d),
        "A's lanes by columns": ((a[0][T * 8 + G], a[1][T * 8 + G]), b, d),
        "B's lanes by columns": (a, (b[0][T * 8 + G], b[1][T * 8 + G]), d),
        "B's registers reversed": (a, (b[0][:, ::-1], b[1][:, ::-1]), d),
        "D's lanes by columns": (a, b, (d[0][T * 8 + G], d[1][T * 8 + G])),
        "D's columns swapped": (a, b, (d[0], d[1] ^ 1)),
    }
    if kind == "f64":  # one register has no order
        del flip["A's registers reversed"], flip["B's registers reversed"]
    else:
        order = [0, 2, 1, 3] if kind == "tf32" else [0, 1, 4, 5, 2, 3, 6, 7]
        flip["A's middle registers swapped"] = ((a[0][:, order], a[1][:, order]), b, d)
        flip["D's middle registers swapped"] = (a, b, tuple(m[:, [0, 2, 1, 3]] for m in d))
    if kind in ("f16", "bf16"):
        flip["B's halves swapped"] = (a, (b[0] ^ 1, b[1]), d)
    return flip


@pytest.mark.parametrize(("kind", "wrong"), [(k, w) for k in MMA for w in wrong_maps(k)])
def test_a_wrong_fragment_map_is_seen(kind, wrong, rng):
    a, b, d = operands(rng, kind)
    assert (mma(kind, a, b, d, wrong_maps(kind)[wrong]) != a @ b + d).any()


@pytest.mark.parametrize("operand", "ABD")
@pytest.mark.parametrize("kind", MMA)
def test_mma_element(kind, operand, rng):
    """One element of one operand differs from the base, each element in its turn."""
    base = operands(rng, kind)
    which = "ABD".index(operand)
    size = base[which].size
    changed = np.repeat(base[which], size, axis=0)
    changed.reshape(size, size)[np.diag_indices(size)] += 1
    a, b, d = (changed if i == which else base[i] for i in range(3))
    np.testing.assert_array_equal(mma(kind, a, b, d), a @ b + d)


def truncated(x):
    """Float64 to float32 towards zero."""
    with np.errstate(over="ignore"):
        y = x.astype(np.float32)
    return np.where(abs(y.astype(np.float64)) > abs(x), np.nextafter(y, np.float32(0)), y)


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_mma_truncates(kind, rng):
    a, b, d = operands(rng, kind, 10)
    d = (rng.uniform(-4, 4, d.shape) * 2.0 ** rng.integers(0, 20, d.shape)).astype(np.float32)
    a, b, exact = a / 64, b / 64, a @ b / 4096 + d
    result = mma(kind, a, b, d)
    np.testing.assert_array_equal(result, truncated(exact))
    assert (result != exact.astype(np.float32)).any()


def single(kind, a, b, d):
    """What the instruction makes of one product a * b and an accumulator d."""
    full = [np.zeros(m.shape[1:]) for m in operands(np.random.default_rng(0), kind)]
    for matrix, value in zip(full, (a, b, d), strict=True):
        matrix[0, 0] = value
    return mma(kind, *full)[0, 0]


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_mma_special_values(kind):
    largest = np.finfo(np.float32).max
    assert single(kind, np.inf, 2, 1) == np.inf
    assert single(kind, 1, -np.inf, 1) == -np.inf
    assert single(kind, 2.0**15, 2.0**15, np.inf) == np.inf
    assert single(kind, 1, 1, largest) == largest  # truncated, not rounded to infinity
    for nan in ((np.inf, 0, 1), (np.nan, 1, 1), (1, 1, np.nan), (np.inf, 1, -np.inf)):
        assert single(kind, *nan).view(np.uint32) == 0x7FFFFFFF
    assert single(kind, 0, 0, 2.0**-149) == np.float32(2.0**-149)  # nothing is flushed
    assert single(kind, 2.0**-14, 1, 0) == 2.0**-14
    assert np.signbit(single(kind, -1, 1, 0))


def test_mma_beyond_half():
    assert single("bf16", 2.0**100, 2.0**100, -1) == np.inf
    assert single("tf32", 2.0**100, 2.0**100, -1) == np.inf
    assert single("f16", 2.0**-24, 3 * 2.0**-24, 0) == 3 * 2.0**-48  # subnormal halves
    assert single("f16", 2.0**-24, -1, 1) == np.float32(1) - np.float32(2.0**-24)
    assert single("bf16", 2.0**-70, 2.0**-70, 0) == np.float32(2.0**-140)
    assert single("bf16", 1.5 * 2.0**-79, 2.0**-70, 0) == np.float32(2.0**-149)
    assert single("bf16", 1.5 * 2.0**-80, 2.0**-70, 0) == 0


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma_reads_every_16_bit_number(kind):
    words = np.arange(1 << 16, dtype=np.uint16)
    infinity = np.array(np.inf, MMA[kind][0]).view(np.uint16)
    values = np.where(words & 0x7FFF < infinity, words, 0).astype(np.uint16).view(MMA[kind][0])
    a = values.reshape(-1, 16, 16)  # 256 matrices
    result = mma(kind, a, np.eye(16, 8), np.zeros((16, 8)))
    np.testing.assert_array_equal(result, a[..., :8].astype(np.float32))
    result = mma(kind, a, np.eye(16, 8, -8), np.zeros((16, 8)))
    np.testing.assert_array_equal(result, a[..., 8:].astype(np.float32))
    b = values.reshape(-1, 16, 8)
    result = mma(kind, np.eye(16), b, np.zeros((16, 8)))
    np.testing.assert_array_equal(result, b.astype(np.float32))


def test_tf32_ignores_the_low_bits(rng):
    a, b, d = (m.astype(np.float32) for m in operands(rng, "tf32", 10))
    noisy = [
        (m.view(np.uint32) | rng.integers(0, 1 << 13, m.shape, np.uint32)).view(np.float32)
        for m in (a, b)
    ]
    np.testing.assert_array_equal(mma("tf32", *noisy, d), a @ b + d)
    assert (noisy[0].astype(np.float64) @ noisy[1] + d != a @ b + d).any()
    bit = (np.float32(1).view(np.uint32) | 1 << 13).view(np.float32)  # the last one that counts
    assert single("tf32", bit, 1, 0) == bit


def test_f64_rounds_once_a_product():
    eps = 2.0**-52
    assert single("f64", 1 + eps, 1 + eps, -1 - 2 * eps) == eps**2
    assert single("f64", 2.0**-1074, 1, 2.0**-1074) == 2.0**-1073


def test_mma_counts_and_costs(rng):
    a, b, d = operands(rng, "f16", 50)
    mma("f16", a, b, d, profile=True)
    body = """
    unsigned int a[4] = {}; float d[4] = {};
    for (int i = 0; i < 5; ++i) ptx::mma_m16n8k16<__half>(d, a, a[0], a[1]);
    ptx::mma_m16n8k8_tf32(d, a, a[0], a[1]);
    double e[2] = {};
    ptx::mma_m8n8k4_f64(e, 1.0, 2.0);
    """
    counters, _ = run(body, block=96, profile=True)
    assert (counters.mma, counters.ldmatrix, counters.warp_collectives) == (21, 0, 0)
    assert counters.cost > 0


@pytest.mark.parametrize("call", CALL.values())
def test_mma_is_of_the_whole_warp(call):
    kind = (
        "double a[1] = {}, b[1] = {}, d[2] = {};"
        if "f64" in call
        else ("unsigned int a[4] = {}, b[2] = {}; float d[4] = {};")
    )
    fails("exited", f"{kind}\nif (fault && t == 7) return;\n{call};")
    fails("two warp collectives", f"{kind}\nif (fault && t > 20)\n{call};\nelse\n{call};")
    body = f"{kind}\nif (t < 32 || fault) {call};"
    fails("lanes that do not exist", body, block=48)
    refused("sm_80", f"{kind}\n{call};", "sm_75")


def test_mma_meets_no_other_collective():
    body = """
    unsigned int a[4] = {}, b[2] = {}; float d[4] = {};
    if (fault && t % 2) __syncwarp();
    else if (!fault) ptx::mma_m16n8k16<__half>(d, a, b[0], b[1]);
    else ptx::mma_m16n8k16<__nv_bfloat16>(d, a, b[0], b[1]);
    """
    fails("two warp collectives", body)


def test_mma_does_not_order_memory():
    body = """
    unsigned int* s = ptx::static_smem<unsigned int, 32>();
    unsigned int a[4] = {}; float d[4] = {};
    ptx::st_shared(s + t, 1u);
    if (!fault) __syncwarp();
    ptx::mma_m16n8k16<__half>(d, a, 0, 0);
    ptx::ld_shared(s + 31 - t);
    """
    fails("race in shared memory", body)


# -- conversions ----------------------------------------------------------------------------------


def convert(call, words):
    body = f"""
    for (int i = t; i < fault; i += 32) {{
      const float f = __uint_as_float(ptx::ld_global(p.x + i));
      const float g = __uint_as_float(ptx::ld_global(p.x + fault + i));
      ptx::st_global(p.y + i, {call});
    }}
    """
    n = words.shape[-1]
    y = emulator.empty((n,), np.uint32)
    run(body, n, x=np.ascontiguousarray(np.broadcast_to(words, (2, n))), y=y)
    return y


def random_floats(rng, shape):
    """Of every exponent and sign, ties of every format among them."""
    words = rng.integers(0, 1 << 32, shape, np.uint32)
    words[..., ::3] &= np.uint32(0xFFFFF000)
    words[..., 1::9] &= np.uint32(0xFFFF8000)
    words[..., :8] = np.float32(
        [0, -0.0, np.inf, -np.inf, np.nan, 65520, 1e-45, 3.4028235e38]
    ).view(np.uint32)
    return words


def test_cvt_rna_tf32(rng):
    words = random_floats(rng, 4096)
    x = words.view(np.float32)
    magnitude = words.astype(np.int64) & 0x7FFFFFFF
    rounded = np.where(np.isinf(x), magnitude, (magnitude + 4096) // 8192 * 8192)
    expected = np.where(np.isnan(x), 0x7FFFFFFF, rounded | (words & 0x80000000))
    np.testing.assert_array_equal(convert("ptx::cvt_rna_tf32(f)", words), expected)
    assert (expected & 8191 == 0)[~np.isnan(x)].all()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_cvt_rn_x2(kind, rng):
    words = random_floats(rng, (2, 4096))
    words[1] = rng.permutation(words[1])
    dtype, name = MMA[kind][0], {"f16": "__half", "bf16": "__nv_bfloat16"}[kind]
    halves = words.view(np.float32).astype(dtype).view(np.uint16).astype(np.uint32)
    halves[np.isnan(words.view(np.float32))] = 0x7FFF
    result = convert(f"ptx::cvt_rn_x2<{name}>(f, g)", words)
    np.testing.assert_array_equal(result, halves[0] | halves[1] << 16)


def test_cvt_f32_e4m3x2():
    """Every pair of numbers."""
    pairs = np.arange(1 << 16, dtype=np.uint32)
    numbers = pairs.astype(np.uint16).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    numbers = numbers.view(np.uint32).reshape(-1, 2)
    for i, half in enumerate(("x[0]", "x[1]")):
        call = f"[&] {{ float x[2]; ptx::cvt_f32_e4m3x2(x, __float_as_uint(f)); return {half}; }}()"
        found = convert(f"__float_as_uint({call})", pairs)
        expected = np.where(numbers[:, i] & 0x7FFFFFFF > 0x7F800000, 0x7FFFFFFF, numbers[:, i])
        np.testing.assert_array_equal(found, expected)


def test_conversions_need_sm_80():
    refused("sm_80", "ptx::cvt_rna_tf32(1.0f);", "sm_75")
    refused("sm_80", "ptx::cvt_rn_x2<__half>(1.0f, 2.0f);", "sm_75")


# -- ldmatrix and stmatrix ------------------------------------------------------------------------

# 64 rows of 16 bytes; words 0 to 31 of x say which row each lane passes.
ROWS = """
uint4* s = ptx::static_smem<uint4, 64>();
const uint4* rows = reinterpret_cast<const uint4*>(p.x + 32);
for (int i = t; i < 64; i += 32) ptx::st_shared(s + i, ptx::ld_global(rows + i));
__syncwarp();
uint4* row = s + ptx::ld_global(p.x + t);
unsigned int r[4];
"""


def fragments(matrices):
    """What the lanes hold of four 8x8 matrices, [lane, register]."""
    low, high = matrices[:, G, 2 * T], matrices[:, G, 2 * T + 1]
    return (low | high.astype(np.uint32) << 16).T


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed, rng):
    chosen = rng.permutation(64)[:32].astype(np.uint32)
    elements = rng.integers(0, 1 << 16, (64, 8), np.uint16)
    x = np.concatenate([chosen, elements.view(np.uint32).reshape(-1)])
    call = f"ptx::ldmatrix_x4{'_trans' * transposed}(r, row);\n"
    store = "for (int i = 0; i < 4; ++i) ptx::st_global(p.y + 4 * t + i, r[i]);"
    counters, y = run(ROWS + call + store, x=x, y=emulator.empty((32, 4), np.uint32))
    matrices = elements[chosen].reshape(4, 8, 8)
    expected = fragments(matrices.swapaxes(1, 2) if transposed else matrices)
    np.testing.assert_array_equal(y, expected)
    assert (y != fragments(matrices if transposed else matrices.swapaxes(1, 2))).any()
    assert (counters.ldmatrix, counters.mma, counters.warp_collectives) == (1, 0, 0)


def test_stmatrix(rng):
    chosen = rng.permutation(64)[:32].astype(np.uint32)
    old = rng.integers(0, 1 << 16, (64, 8), np.uint16)
    new = rng.integers(0, 1 << 16, (4, 8, 8), np.uint16)
    parts = (chosen, old.view(np.uint32).reshape(-1), fragments(new).reshape(-1))
    body = """
    for (int i = 0; i < 4; ++i) r[i] = ptx::ld_global(p.x + 32 + 256 + 4 * t + i);
    ptx::stmatrix_x4(row, r);
    __syncwarp();
    for (int i = t; i < 64; i += 32) ptx::st_global((uint4*)p.y + i, ptx::ld_shared(s + i));
    """
    y = emulator.empty((64, 4), np.uint32)
    counters, _ = run(ROWS + body, x=np.concatenate(parts), y=y)
    expected = old.copy()
    expected[chosen] = new.reshape(32, 8)
    np.testing.assert_array_equal(y.view(np.uint16), expected)
    assert counters.ldmatrix == 1


CHUNK = {
    "swizzled": ("8 * (t % 32) + (t % 8)", 4),
    "128-byte pitch": ("8 * (t % 32)", 32),
    "64-byte pitch": ("4 * (t % 32)", 16),
    "144-byte pitch": ("9 * (t % 32)", 4),
    "dense": ("t % 32", 4),
    "one row": ("5", 4),
    "two rows of one bank group": ("t % 2 * 8", 8),
    "one matrix in conflict": ("t % 32 < 8 ? 64 + 8 * t : t % 32", 11),
}


ROW_CALLS = ("ldmatrix_x4(r, row)", "ldmatrix_x4_trans(r, row)", "stmatrix_x4(row, r)")


@pytest.mark.parametrize(
    ("layout", "what"),  # two lanes may not write to one row
    [(c, w) for c in CHUNK for w in ROW_CALLS if not ("row" in c and w.startswith("st"))],
)
def test_matrix_wavefronts(layout, what):
    chunk, passes = CHUNK[layout]
    body = f"""
    uint4* s = ptx::static_smem<uint4, 288>();
    for (int i = t; i < 288; i += 64) ptx::st_shared(s + i, uint4{{}});
    __syncthreads();
    unsigned int r[4] = {{}};
    uint4* row = s + ({chunk});
    if (t / 32 < fault) ptx::{what};
    """
    before, after = (run(body, fault, block=64)[0] for fault in (0, 1))
    assert after.shared_wavefronts - before.shared_wavefronts == passes
    assert after.shared_wavefronts_ideal - before.shared_wavefronts_ideal == 4
    assert (before.ldmatrix, after.ldmatrix) == (0, 1)


MATRIX_HEAD = """
uint4* s = ptx::static_smem<uint4, 96>();
unsigned int r[4] = {};
ptx::st_shared(s + t, uint4{});
"""
MATRIX_RULES = {
    "no __syncwarp after writes to the own row": (
        "race in shared memory: reads",
        "if (!fault) __syncwarp();\nptx::ldmatrix_x4(r, s + t);",
    ),
    "no __syncwarp before a write to the own row": (
        "race in shared memory: writes .* the warp of thread 0 .*reads",
        "__syncwarp();\nptx::ldmatrix_x4_trans(r, s + t);\nif (!fault) __syncwarp();\n"
        "if (t == 9) ptx::st_shared(s + t, uint4{});",
    ),
    "no __syncwarp before a write of the first lane": (
        "race in shared memory: writes .* the warp of thread 0 .*reads",
        "__syncwarp();\nptx::ldmatrix_x4(r, s + t);\nif (!fault) __syncwarp();\n"
        "if (t == 0) ptx::st_shared(s + 7, uint4{});",
    ),
    "no __syncwarp after the second ldmatrix": (
        "race in shared memory: writes .* the warp of thread 0 .*reads",
        "for (int i = 0; i < 2; ++i) {\n__syncwarp();\nptx::ldmatrix_x4(r, s + t);\n}\n"
        "if (!fault) __syncwarp();\nif (t == 9) ptx::st_shared(s + t, uint4{});",
    ),
    "no __syncwarp before a write to the end of a row": (
        "race in shared memory: writes .* the warp of thread 0 .*reads",
        "__syncwarp();\nptx::ldmatrix_x4(r, s + t);\nif (!fault) __syncwarp();\n"
        "if (t == 9) ptx::st_shared((unsigned int*)(s + t) + 3, 1u);",
    ),
    "no __syncwarp after a write to a part of a row": (
        "race in shared memory: reads",
        "__syncwarp();\nif (t == 9) ptx::st_shared((unsigned int*)(s + t) + 2, 1u);\n"
        "if (!fault) __syncwarp();\nptx::ldmatrix_x4(r, s + t);",
    ),
    "no __syncwarp before a write to a row of two writers": (
        "race in shared memory: writes .* the warp of thread 0 .*reads",
        "__syncwarp();\nif (t == 9) ptx::st_shared((unsigned int*)(s + 7) + 1, 1u);\n"
        "__syncwarp();\nptx::ldmatrix_x4(r, s + t);\nif (!fault) __syncwarp();\n"
        "if (t == 8) ptx::st_shared((unsigned int*)(s + 7) + 3, 1u);",
    ),
    "no __syncwarp before stmatrix": (
        "race in shared memory: writes",
        "if (!fault) __syncwarp();\nptx::stmatrix_x4(s + t, r);",
    ),
    "no __syncwarp after reads of the own row": (
        "race in shared memory: writes .*reads",
        "__syncwarp();\nptx::ld_shared(s + t);\nif (!fault) __syncwarp();\n"
        "ptx::stmatrix_x4(s + t, r);",
    ),
    "no __syncwarp after stmatrix": (
        "race in shared memory: reads .*the warp of thread 0 .*wrote",
        "__syncwarp();\nptx::stmatrix_x4(s + t, r);\nif (!fault) __syncwarp();\n"
        "ptx::ld_shared(s + t);",
    ),
    "ldmatrix after stmatrix": (
        "race in shared memory: reads",
        "__syncwarp();\nptx::stmatrix_x4(s + t, r);\nif (!fault) __syncwarp();\n"
        "ptx::ldmatrix_x4(r, s + t);",
    ),
    "stmatrix after ldmatrix": (
        "race in shared memory: writes",
        "__syncwarp();\nptx::ldmatrix_x4(r, s + t);\nif (!fault) __syncwarp();\n"
        "ptx::stmatrix_x4(s + t, r);",
    ),
    "never written": ("never written", "__syncwarp();\nptx::ldmatrix_x4(r, s + t + 8 * fault);"),
    "out of bounds": (
        "out of bounds",
        "__syncwarp();\nptx::ldmatrix_x4(r, s + t + 65 * (fault && t == 31));",
    ),
    "stmatrix out of bounds": (
        "out of bounds",
        "__syncwarp();\nptx::stmatrix_x4(s + t + 65 * (fault && t == 31), r);",
    ),
    "misaligned": (
        "misaligned",
        "__syncwarp();\nptx::ldmatrix_x4(r, (char*)(s + t % 31) + (fault && t == 5) * 8);",
    ),
    "stmatrix misaligned": (
        "misaligned",
        "__syncwarp();\nptx::stmatrix_x4((char*)(s + t) + (fault && t == 5) * 8, r);",
    ),
    "a global pointer": (
        "not to the block's shared memory",
        "__syncwarp();\nptx::ldmatrix_x4(r, fault && t == 3 ? (const void*)p.x : s + t);",
    ),
    "exited": (
        "exited",
        "__syncwarp();\nif (fault && t == 30) return;\nptx::ldmatrix_x4(r, s + t);",
    ),
    "two places": (
        "two warp collectives",
        "__syncwarp();\nif (fault && t < 4)\nptx::ldmatrix_x4(r, s + t);\n"
        "else\nptx::ldmatrix_x4(r, s + t);",
    ),
    "plain and transposed": (
        "two warp collectives",
        "__syncwarp();\nif (fault && t < 4) ptx::ldmatrix_x4(r, s + t);"
        " else ptx::ldmatrix_x4_trans(r, s + t);",
    ),
    "two rows stored to one place": (
        "race in shared memory: writes",
        "__syncwarp();\nptx::stmatrix_x4(s + (fault ? t & ~1 : t), r);",
    ),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_matrix_rule(rule, seed):
    pattern, body = MATRIX_RULES[rule]
    fails(pattern, MATRIX_HEAD + body, seed=seed)


@pytest.mark.parametrize("lane", [0, 20, 31])
def test_a_bad_row_is_its_lanes(lane):
    flight = f"__syncwarp();\nif (t == {lane}) ptx::cp_async_16(s + t, p.x, 16);\n"
    for call in ("ldmatrix_x4(r, s + t)", "stmatrix_x4(s + t, r)"):
        with pytest.raises(emulator.EmulatorError, match=f"thread {lane}: .*has not landed"):
            run(MATRIX_HEAD + flight + f"ptx::{call};")


def test_matrix_of_a_partial_warp():
    fails(
        "lanes that do not exist",
        MATRIX_HEAD
        + """
    __syncthreads();
    if (t < 32 || fault) ptx::ldmatrix_x4(r, s + t);
    """,
        block=48,
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("call", ["ldmatrix_x4(r, s + (t ^ 32))", "stmatrix_x4(s + (t ^ 32), r)"])
def test_matrices_of_other_warps(call, seed):
    body = f"""
    if (!fault || t % 32 == 1) __syncwarp();
    if (fault != 1) __syncthreads();
    ptx::{call};
    """
    fails(
        "race|never written",
        MATRIX_HEAD + body.replace("|| t % 32 == 1", "|| 1"),
        seed=seed,
        block=64,
    )
    body = f"""
    __syncthreads();
    ptx::{call};
    if (!fault) __syncthreads();
    ptx::st_shared(s + t, uint4{{}});
    """
    fails("race", MATRIX_HEAD + body, seed=seed, block=64)


def test_every_lane_comes_after_the_writer():
    """Only one lane waits for the other warp's bytes, or all do."""
    body = """
    unsigned long long* bar = ptx::static_smem<unsigned long long, 1>();
    if (t == 0) ptx::mbarrier_init(bar, 32);
    __syncthreads();
    if (t < 32) {
      ptx::st_shared(s + 64 + t, uint4{});
      ptx::mbarrier_arrive_expect_tx(bar, 0);
    } else {
      if (!fault || t == 40) ptx::mbarrier_wait(bar, 0);
      if (fault != 1) __syncwarp();
      ptx::ldmatrix_x4(r, s + 32 + t);
    }
    """
    fails("race|never written", MATRIX_HEAD + body, block=64)
    run(MATRIX_HEAD + body, 2, block=64)


def test_stmatrix_needs_sm_90():
    body = MATRIX_HEAD + "__syncwarp();\nptx::STMATRIX;"
    refused("sm_90", body.replace("STMATRIX", "stmatrix_x4(s + t, r)"), "sm_80")
    run(body.replace("STMATRIX", "ldmatrix_x4(r, s + t)"), arch="sm_80")


# -- cp.async -------------------------------------------------------------------------------------

COPY_HEAD = """
uint4* s = ptx::static_smem<uint4, 128>();
const uint4* x = reinterpret_cast<const uint4*>(p.x);
"""
COPY = "ptx::cp_async_16(s + t, x + t, 16);\n"
COMMIT = "ptx::cp_async_commit();\n"
WAIT = "ptx::cp_async_wait<0>();\n"
# All lanes of a warp meet, but nothing is ordered.
MEET = """
{ unsigned int a[4] = {}; float d[4] = {}; ptx::mma_m16n8k16<__half>(d, a, 0, 0); }
"""
COPY_RULES = {
    "read before the wait": (
        "reads shared byte .*cp.async that has not landed",
        COPY + COMMIT + "if (fault) ptx::ld_shared(s + t);\n" + WAIT,
    ),
    "read by another thread before the wait": (
        "cp.async that has not landed|never written",
        COPY + COMMIT + "if (!fault) ptx::cp_async_wait<0>();\n__syncthreads();\n"
        "ptx::ld_shared(s + (t ^ 32));\n" + WAIT,
    ),
    "write before the wait": (
        "writes shared byte .*cp.async that has not landed",
        COPY + COMMIT + "if (fault) ptx::st_shared(s + t, uint4{});\n" + WAIT,
    ),
    "relaxed read before the wait": (
        "cp.async that has not landed",
        COPY + COMMIT + "if (fault) ptx::ld_shared_relaxed((unsigned int*)(s + t));\n" + WAIT,
    ),
    "atomic before the wait": (
        "cp.async that has not landed",
        COPY + COMMIT + "if (fault) atomicAdd((unsigned int*)(s + t), 1u);\n" + WAIT,
    ),
    "second copy before the wait": (
        "cp.async that has not landed",
        COPY + COMMIT + "if (fault) ptx::cp_async_16(s + t, x + t, 0);\n" + WAIT + COMMIT + WAIT,
    ),
    "second copy by another thread": (
        "cp.async that has not landed",
        COPY.replace("s + t", "s + (fault && t == 9 ? 8 : t)") + COMMIT + MEET + WAIT,
    ),
    "ldmatrix before the wait": (
        "cp.async that has not landed|never written",
        COPY + COMMIT + "__syncwarp();\nunsigned int r[4];\nif (!fault) ptx::cp_async_wait<0>();\n"
        "__syncwarp();\nptx::ldmatrix_x4(r, s + t);\n" + WAIT,
    ),
    "wait for too few groups": (
        "cp.async that has not landed",
        COPY
        + COMMIT
        + "ptx::cp_async_16(s + 64 + t, x + t, 16);\n"
        + COMMIT
        + "if (!fault) ptx::cp_async_wait<0>(); else ptx::cp_async_wait<1>();\n"
        "ptx::ld_shared(s + t);\nptx::ld_shared(s + 64 + t);\n" + WAIT,
    ),
    "an empty group counts": (
        "cp.async that has not landed",
        COPY + COMMIT + "if (!fault) ptx::cp_async_commit();\nptx::cp_async_wait<1>();\n"
        "ptx::ld_shared(s + t);\n" + WAIT,
    ),
    "not committed": (
        "cp.async that has not landed",
        COPY + "if (!fault) ptx::cp_async_commit();\n" + WAIT + "ptx::ld_shared(s + t);",
    ),
    "no barrier after the wait": (
        "race in shared memory|has not landed|never written",
        COPY + COMMIT + WAIT + "if (!fault) __syncthreads(); else __syncwarp();\n"
        "ptx::ld_shared(s + (t ^ 32));",
    ),
    "no __syncwarp after the wait": (
        "race in shared memory|has not landed|never written",
        COPY + COMMIT + WAIT + "if (!fault) __syncwarp();\nptx::ld_shared(s + (t ^ 1));",
    ),
    "barrier before the wait": (
        "race in shared memory|has not landed",
        COPY + COMMIT + "if (fault) __syncthreads();\n" + WAIT + "if (!fault) __syncthreads();\n"
        "ptx::ld_shared(s + (t ^ 32));",
    ),
    "another warp still reads": (
        "race in shared memory|not landed",
        "ptx::st_shared(s + t, uint4{});\n__syncthreads();\nptx::ld_shared(s + (t ^ 32));\n"
        "if (!fault) __syncthreads();\n" + COPY + COMMIT + WAIT,
    ),
    "another lane still reads": (
        "race in shared memory: writes .*reads",
        "ptx::st_shared(s + t, uint4{});\n__syncwarp();\nptx::ld_shared(s + (t ^ 1));\n"
        "if (!fault) __syncwarp();\n" + MEET + COPY + COMMIT + WAIT,
    ),
    "its warp still reads by ldmatrix": (
        "race in shared memory: writes .*the warp of thread .*reads",
        "ptx::st_shared(s + t, uint4{});\n__syncwarp();\nunsigned int r[4];\n"
        "ptx::ldmatrix_x4(r, s + t);\nif (!fault) __syncwarp();\n" + COPY + COMMIT + WAIT,
    ),
    "another warp still reads by ldmatrix": (
        "race in shared memory|not landed",
        "ptx::st_shared(s + t, uint4{});\n__syncthreads();\nunsigned int r[4];\n"
        "ptx::ldmatrix_x4(r, s + (t ^ 32));\nif (!fault) __syncthreads();\n" + COPY + COMMIT + WAIT,
    ),
    "another warp wrote": (
        "race in shared memory: writes .*wrote|has not landed",
        "ptx::st_shared(s + (t ^ 32), uint4{});\nif (!fault) __syncthreads();\n"
        + COPY
        + COMMIT
        + WAIT,
    ),
    "exit in flight": (
        "exited with 1 cp.async in flight.*, the first one committed",
        COPY + COMMIT + "if (!fault || t != 9) ptx::cp_async_wait<0>();",
    ),
    "exit before the commit": (
        "exited with 1 cp.async in flight.*, the first one not committed",
        COPY + "if (!fault || t != 9) ptx::cp_async_commit();\n" + WAIT,
    ),
    "exit after a wait for too few": (
        "exited with 2 cp.async in flight",
        COPY
        + "ptx::cp_async_16(s + 64 + t, x + t, 16);\n"
        + COMMIT
        + "if (!fault) ptx::cp_async_wait<0>(); else ptx::cp_async_wait<1>();",
    ),
    "shared address misaligned": (
        "shared memory misaligned",
        COPY.replace("s + t", "(char*)(s + t) + (fault && t == 9 ? 8 : 0)") + COMMIT + WAIT,
    ),
    "global address misaligned": (
        "read misaligned",
        "ptx::cp_async_16(s + t, p.x + 4 * t + 2 * (fault && t == 9), 8);\n" + COMMIT + WAIT,
    ),
    "an address that is not read misaligned": (
        "read misaligned",
        "ptx::cp_async_16(s + t, p.x + 4 * t + 2 * (fault && t == 9), 0);\n" + COMMIT + WAIT,
    ),
    "shared out of bounds": (
        "shared memory out of bounds",
        COPY.replace("s + t", "s + t + 65 * fault") + COMMIT + WAIT,
    ),
    "global out of bounds": (
        "out of bounds: .* past the start of reads",
        COPY.replace("x + t", "x + t + 192 + fault") + COMMIT + WAIT,
    ),
    "null pointer": (
        "null pointer",
        "ptx::cp_async_16(s + t, t == 9 ? nullptr : x + t, t == 9 ? fault : 16);\n" + COMMIT + WAIT,
    ),
    "too many bytes": (
        "cp_async_16 of 17 bytes",
        COPY.replace("16)", "16 + fault)") + COMMIT + WAIT,
    ),
    "fewer than no bytes": (
        "cp_async_16 of -1 bytes",
        COPY.replace("16)", "-fault)") + COMMIT + WAIT,
    ),
    "never written source": (
        "never written|only writes",
        "ptx::st_global(p.y + t, 1u);\n"
        "ptx::cp_async_16(s + t, fault ? (const uint4*)p.y + 64 + t : x + t, 16);\n"
        + COMMIT
        + WAIT,
    ),
    "source of another thread": (
        "wrote in the same launch",
        "ptx::st_global((uint4*)p.y + t, uint4{});\n__syncthreads();\n"
        "ptx::cp_async_16(s + t, (const uint4*)p.y + (fault ? t ^ 1 : t), 16);\n" + COMMIT + WAIT,
    ),
    "source overwritten": (
        "overwritten before it landed",
        "ptx::st_global(p.y + 4 * t, 1u);\nptx::cp_async_16(s + t, p.y + 4 * t, 4);\n"
        + COMMIT
        + "if (fault) ptx::st_global(p.y + 4 * t, 2u);\n"
        + WAIT,
    ),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rule", COPY_RULES)
def test_copy_rule(rule, seed):
    pattern, body = COPY_RULES[rule]
    fails(pattern, COPY_HEAD + body, seed=seed, block=64)


def test_copy_fills_with_zeros(rng):
    x = rng.integers(1, 256, 256 * 4, np.uint8).view(np.uint32)
    sizes = rng.integers(0, 17, 64)
    sizes[:17] = np.arange(17)
    body = "ptx::cp_async_16(s + t, x + t, ptx::ld_global(p.x + 256 + t));\n" + COMMIT + WAIT
    body += "ptx::st_global((uint4*)p.y + t, ptx::ld_shared(s + t));"
    x = np.concatenate([x, sizes.astype(np.uint32)])
    y = emulator.empty((64, 4), np.uint32)
    counters, _ = run(COPY_HEAD + body, x=x, y=y, block=64)
    expected = x[:256].view(np.uint8).reshape(64, 16) * (np.arange(16) < sizes[:, None])
    np.testing.assert_array_equal(y.view(np.uint8), expected)
    assert counters.global_bytes_read == sizes.sum() + 64 * 4


@pytest.mark.parametrize("tail", range(1, 16))
def test_copy_reads_no_more_than_it_says(tail):
    x = np.arange(16 * 63 + tail, dtype=np.uint8)
    body = f"ptx::cp_async_16(s + t, x + t, t == 63 ? {tail} + fault : 16);\n" + COMMIT + WAIT
    fails("out of bounds", COPY_HEAD + body, x=x, block=64)


def test_copies_land_group_by_group(rng):
    """A pipeline of three stages; each stage is read a warp away from who copied it."""
    x = rng.integers(0, 1 << 32, (20, 64, 4), np.uint32)
    y = emulator.empty(x.shape, np.uint32)
    body = """
    uint4* s = ptx::dynamic_smem<uint4>();
    const uint4* x = reinterpret_cast<const uint4*>(p.x);
    for (int i = 0; i < 2; ++i) {
      ptx::cp_async_16(s + 64 * i + t, x + 64 * i + t, 16);
      ptx::cp_async_commit();
    }
    for (int i = 0; i < 20; ++i) {
      ptx::cp_async_wait<1>();
      if (fault != 1 || i != 7) __syncthreads();
      if (i + 2 < 20) ptx::cp_async_16(s + (i + 2) % (3 - (fault == 2)) * 64 + t, x + 64 * (i + 2) + t, 16);
      ptx::cp_async_commit();
      ptx::st_global((uint4*)p.y + 64 * i + (t ^ 32), ptx::ld_shared(s + 64 * (i % 3) + (t ^ 32)));
    }
    """  # noqa: E501
    counters, _ = run(body, x=x, y=y, block=64, smem_bytes=3 * 1024)
    np.testing.assert_array_equal(y, x)
    assert counters.barriers == 20
    for fault in (1, 2):
        fails(
            "race in shared memory|has not landed|never written",
            body,
            fault,
            x=x,
            y=y,
            block=64,
            smem_bytes=3 * 1024,
        )


def test_copy_counters():
    body = """
    ptx::cp_async_16(s + t, x + t, t == 5 ? 3 : t > 60 ? 0 : 16);
    ptx::cp_async_16(s + 64 + t / 8 + t % 8 * 8, x + 4 * t, t < 32 ? 16 : 0);
    """
    counters, _ = run(COPY_HEAD + body + COMMIT + WAIT, x=np.zeros(1024, np.uint32), block=64)
    assert counters.global_bytes_read == 60 * 16 + 3 + 32 * 16
    assert counters.global_sectors_read == 16 + 15 + 32
    assert counters.global_requests == counters.loads_by_size[16] == 3
    assert counters.shared_wavefronts_ideal == 8 + 8
    assert counters.shared_wavefronts == 8 + 8 * 8
    assert counters.warp_collectives == counters.global_bytes_written == 0


def test_copies_need_sm_80():
    refused("sm_80", COPY_HEAD + COPY, "sm_75")
    refused("sm_80", COMMIT, "sm_75")
    refused("sm_80", WAIT, "sm_75")
    run(COPY_HEAD + COPY + COMMIT + WAIT, arch="sm_80")


def test_a_launch_after_a_failed_one_starts_with_no_copies():
    body = COPY_HEAD + COPY + "if (fault) return;\n" + COMMIT + WAIT
    fails("in flight", body)
    run(body)


# -- all together ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_tile_through_all_of_them(kind, rng):
    """16x64 times the transpose of 8x64: copied, swizzled, loaded, multiplied."""
    dtype, name = MMA[kind][0], {"f16": "__half", "bf16": "__nv_bfloat16"}[kind]
    a, b = (rng.integers(-9, 10, (rows, 64)).astype(dtype) for rows in (16, 8))
    x = np.concatenate([a, b]).view(np.uint32)
    y = emulator.empty((16, 8), np.float32)
    body = f"""
    uint4* s = ptx::static_smem<uint4, 24 * 8>();  // 24 rows of 8 chunks, swizzled
    for (int i = t; i < 24 * 8; i += 32) {{
      ptx::cp_async_16(s + (i ^ (i / 8 & 7)), (const uint4*)p.x + i, 16);
    }}
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
    float d[4] = {{}};
    for (int k = 0; k < 8; k += 4) {{
      unsigned int a0[4], a1[4], b[4];
      const int row = t % 16, half = t / 16;
      ptx::ldmatrix_x4(a0, s + row * 8 + ((k + half) ^ (row & 7)));
      ptx::ldmatrix_x4(a1, s + row * 8 + ((k + 2 + half) ^ (row & 7)));
      ptx::ldmatrix_x4(b, s + (16 + t % 8) * 8 + ((k + t / 8) ^ (t % 8)));
      ptx::mma_m16n8k16<{name}>(d, a0, b[0], b[1]);
      ptx::mma_m16n8k16<{name}>(d, a1, b[2], b[3]);
    }}
    float* y = reinterpret_cast<float*>(p.y);
    for (int i = 0; i < 4; ++i) {{
      ptx::st_global(y + (t / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2, d[i]);
    }}
    """
    counters, _ = run(body, x=x, y=y)
    np.testing.assert_array_equal(y, a.astype(np.float64) @ b.astype(np.float64).T)
    assert (counters.mma, counters.ldmatrix) == (4, 6)
    assert counters.shared_wavefronts == counters.shared_wavefronts_ideal == 24 + 24
