"""Benchmarks of attention: verification, FLOPs, the transformer, what is counted, the reports."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import emulator
import numpy as np
import pytest
import scipy.special
import synthetic_results as synthetic
from conftest import on_a_gpu, software_arch
from test_bench_device import patient  # noqa: F401
from test_bench_harness import Arrays, Device
from test_kernel_report import TRAP, listing, nvdisasm, nvrtc  # noqa: F401

import cuattn
from bench import (
    attention_map,
    attention_shapes,
    bench_transformer,
    grids,
    inside,
    peers,
    transformer,
)
from bench.bench_attention import some
from bench.compiled import attention_loop, kernel_report, sass
from bench.counted import counters, io_complexity
from bench.peers._base import BSHD
from bench.peers._cupy import Cupy
from bench.report import markdown as report
from bench.report import plot, schema
from bench.timing import analysis, device, harness, measure
from cuattn._device.kernel import Kernel

OPERATIONS = measure.operations()


def cell_of(operation="attention", dtype="float16", grid="flash-attention", **sizes):
    shape = attention_shapes.attention_shape(2, 4, 2, 40, 32, sizes.pop("causal", 0))
    shape |= {"layers": 2, "kv_heads": 4} if operation == "transformer" else {}
    return grids.Cell(operation, grid, dtype, tuple((shape | sizes).items()), 1)


def run(cell, spoil=lambda result: result, others=()):
    """Contestant to its entry, of a cell that is measured without a GPU."""
    device, operation = Device(), OPERATIONS[cell.operation]
    options = operation.options(cell)

    def slow(call):
        def timed(*arrays, **more):
            device.now += 1e-3
            return call(*arrays, **more)

        return timed

    ours = slow(lambda *arrays, **more: spoil(operation.ours(*arrays, **options, **more)))
    measured = harness.measure(
        cell,
        operation,
        peers.Contestant(analysis.OURS, Arrays(), ours),
        [peer._replace(call=slow(peer.call)) for peer in others],
        device,
        seconds=0.0,
        plan=inside.launched,
    )
    result = {**synthetic.empty(), "cells": [measured]}
    assert schema.validate(result) is True
    return {entry["name"]: entry for entry in measured["contestants"]}


# -- Attention ---------------------------------------------------------------------------------


@pytest.mark.drawn
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        ("float16", {}),
        ("bfloat16", {"seqlen_q": 33, "seqlen_k": 301}),
        ("float16", {"seqlen_q": 1, "seqlen_k": 5, "heads": 2, "batch": 1}),
    ],
)
def test_ours_is_right(dtype, sizes, causal):
    cell = cell_of(dtype=dtype, causal=causal, **sizes)
    for where in (contextlib.nullcontext(), emulator.activate("sm_80")):
        with where:
            ours = run(cell)[analysis.OURS]
        assert (ours["status"], len(ours["cold"])) == ("ok", harness.ROUNDS[0]), ours["detail"]
        assert 0 < ours["max_error"] < ours["allowed_error"] < 0.02


def moved(result, place, by):
    result[place] += by
    return result


SPOILED = {
    "first": lambda result: moved(result, (0, 0, 0, 0), 0.1),
    "last": lambda result: moved(result, (-1, -1, -1, 3), 0.1),
    "nan": lambda result: moved(result, (-1, -1, -1, 3), np.nan),
    "heads": lambda result: result[:, ::-1],
    "rows": lambda result: np.roll(result, 1, axis=2),
    "zero": lambda result: moved(result, ..., -result),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_wrong_result_is_seen(how):
    entry = run(cell_of(causal=1), SPOILED[how])[analysis.OURS]
    assert (entry["status"], entry["cold"]) == ("wrong", []) and "error" in entry["detail"]


def test_the_other_mask_is_seen(monkeypatch):
    """Peers and we are told whether the mask is causal, and it is noticed."""
    right = OPERATIONS["attention"].ours
    for causal in (0, 1):
        cell = cell_of(causal=causal)
        wrong = peers.Contestant("other", Arrays(), lambda *a, c=causal: right(*a, causal=not c))
        assert run(cell, others=[wrong])["other"]["status"] == "wrong"
        assert OPERATIONS["attention"].options(cell) == {"causal": bool(causal)}


class Swapped(BSHD, Arrays):
    """A library whose arrays are (batch, seqlen, heads, head_dim)."""

    def asarray(self, array):
        return array.swapaxes(1, 2).copy()

    def asnumpy(self, native):
        return native.swapaxes(1, 2)


@pytest.mark.parametrize("causal", [False, True])
def test_peers_are_right(causal):
    def native(q, k, v):
        return cuattn.attention(q, k, v, is_causal=causal, layout="BSHD")

    found = [peers.Contestant("flash", Swapped(), native)]
    found += Cupy(np, scipy.special).contestants("attention", None, causal)
    entries = run(cell_of(causal=int(causal)), others=found)
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "cuattn": "ok",
        "flash": "ok",
        "CuPy expression": "ok",
    }


def test_places_that_are_verified():
    for count, size in ((3, 64), (3, 3), (3, 2), (3, 1), (1, 9)):
        found = some(count, size)
        assert found == sorted(set(found)) and {0, size - 1} <= set(found) <= set(range(size))
        assert len(found) == min(max(count, 2), size)
    assert len({some(3, 100)[1] for _ in range(50)}) > 5


def test_flops_are_those_of_flash_attention():
    """16 K tokens of 2048: 4 * tokens * length * 2048, by hand, and half of that."""
    cells = [c for c in grids.cells(["attention"]) if c.grid == "flash-attention"]
    assert len(cells) == 2 * 3 * 2 * 6
    work = OPERATIONS["attention"].work
    for cell in cells:
        full = 4 * 16_384 * cell.shape["seqlen_k"] * 2048
        assert work(cell).flops == full // (1 + cell.shape["causal"])
        assert work(cell).bytes == 4 * 16_384 * 2048 * 2
    grouped = cell_of()
    assert work(grouped).flops == 4 * 2 * 4 * 40 * 40 * 32
    assert work(grouped).bytes == 2 * (2 * (4 + 2) * 40 * 32) * 2
    assert OPERATIONS["attention"].ceiling == OPERATIONS["transformer"].ceiling == "matmul"


# -- Transformer -------------------------------------------------------------------------------


def tiny(rng, causal, dtype="float32"):
    cell = cell_of("transformer", dtype, head_dim=8, seqlen_q=24, seqlen_k=24, causal=causal)
    x, *weights = bench_transformer.inputs(cell, np, rng)
    return cell, x, transformer.Weights(*weights)


@pytest.mark.parametrize("causal", [False, True])
def test_both_attentions_give_the_same(rng, causal):
    """In NumPy and on the emulator; the other mask gives something else."""
    _, x, weights = tiny(rng, int(causal))
    assert weights.down.shape == (2, 4 * 32 + 1, 32) and x.shape == (2, 24, 32)

    def forward(attention, causal=causal):
        return transformer.forward(x, weights, 4, causal, attention)

    expected = forward(transformer.unfused(np))
    for where in (contextlib.nullcontext(), emulator.activate("sm_80")):
        with where:
            got = forward(transformer.fused)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    other = forward(transformer.fused, not causal)
    assert np.max(abs(other - expected)) > 0.1


def test_a_causal_model_does_not_look_ahead(rng):
    _, x, weights = tiny(rng, 1)
    changed = x.copy()
    changed[:, -1] += 1
    for causal in (True, False):
        a, b = (transformer.forward(y, weights, 4, causal, transformer.fused) for y in (x, changed))
        assert np.array_equal(a[:, :-1], b[:, :-1]) is causal
        assert not np.array_equal(a[:, -1], b[:, -1])


def test_layers_of_the_model(rng):
    x = rng.standard_normal((5, 64)) * 3 + 2
    plain = transformer.norm(x, np.array([np.ones(64), np.zeros(64)]))
    np.testing.assert_allclose(plain.mean(-1), 0, atol=1e-9)
    np.testing.assert_allclose(plain.std(-1), 1, rtol=1e-5)
    moved = transformer.norm(x, np.array([np.full(64, 3.0), np.ones(64)]))
    np.testing.assert_allclose(moved, 3 * plain + 1)
    exact = x * (1 + scipy.special.erf(x / math.sqrt(2))) / 2
    np.testing.assert_allclose(transformer.gelu(x), exact, atol=2e-3)
    matrix = rng.standard_normal((65, 7))
    np.testing.assert_allclose(transformer.linear(x, matrix), x @ matrix[:64] + matrix[64])


def test_a_layer_is_attention_and_mlp(rng):
    """One head, one layer, written out; each part has weights of its own."""
    x = rng.standard_normal((1, 6, 8))
    shapes = (1, 2, 2, 8), (1, 9, 24), (1, 9, 8), (1, 9, 32), (1, 33, 8)
    weights = transformer.Weights(*(rng.standard_normal(shape) for shape in shapes))
    norms, qkv, project, up, down = (array[0] for array in weights)
    linear, norm = transformer.linear, transformer.norm
    q, k, v = np.split(linear(norm(x[0], norms[0]), qkv), 3, axis=1)
    mixed = scipy.special.softmax(q @ k.T / math.sqrt(8), axis=1) @ v
    expected = x[0] + linear(mixed, project)
    hidden = transformer.gelu(linear(norm(expected, norms[1]), up))
    expected = expected + linear(hidden, down)
    got = transformer.forward(x, weights, 1, False, transformer.unfused(np))
    np.testing.assert_allclose(got[0], expected, rtol=1e-9)


def test_a_transformer_is_measured_beside_the_one_by_hand(rng, monkeypatch):
    cell, *_ = tiny(rng, 1, "float16")
    monkeypatch.setattr(measure, "Cupy", Arrays)
    others = measure.others(cell, OPERATIONS["transformer"])
    assert [other.name for other in others] == [bench_transformer.PLAIN]
    entries = run(cell, others=others)
    assert {entry["status"] for entry in entries.values()} == {"ok"}
    assert entries["cuattn"]["peak_bytes"] == 7
    last = run(cell, lambda y: moved(y, (-1, -1, 5), 0.3), others)
    assert last["cuattn"]["status"] == "wrong"


def test_the_models_have_their_published_sizes():
    """Weights without embeddings: 302 M, 302 M, 1.47 G; FLOPs of a token 2 a weight, and scores."""
    cells = grids.cells(["transformer"])
    alone = [cell for cell in grids.cells(["attention"]) if cell.grid == "transformer-attention"]
    work = [OPERATIONS["transformer"].work(cell) for cell in cells]
    weights = [24 * 12 * 1024**2, 24 * 12 * 1024**2, 48 * 12 * 1600**2]
    assert [w.bytes for w in work] == [2 * n for n in weights]
    for cell, one, size, n in zip(cells, alone, work, weights, strict=True):
        attention = cell.shape["layers"] * OPERATIONS["attention"].work(one).flops
        tokens = cell.shape["batch"] * cell.shape["seqlen_q"]
        assert size.flops == 2 * tokens * n + attention
        assert {**one.shape, "layers": cell.shape["layers"]} == cell.shape
    assert [cell.shape["causal"] for cell in cells] == [0, 1, 1]


@on_a_gpu
@pytest.mark.parametrize("operation", ["attention", "transformer"])
@pytest.mark.usefixtures("patient")
def test_a_cell_on_a_gpu(backend, operation):
    """The whole of the harness on the real thing, and every peer that is there."""
    cell = cell_of(operation, head_dim=64, seqlen_q=200, seqlen_k=200, causal=1)
    found = measure.measure_cell(cell, OPERATIONS[operation], device.CudaDevice())["contestants"]
    entries = {entry["name"]: entry for entry in found}
    if software_arch() and operation == "transformer":  # our own layers need CuPy's products
        assert "the software device cannot run cublas" in entries["cuattn"]["detail"]
        return
    assert entries["cuattn"]["status"] == "ok" and entries["cuattn"]["peak_bytes"] > 0
    if not software_arch():
        assert entries["CuPy expression"]["status"] == "ok"
        assert entries["cuattn"]["peak_bytes"] <= entries["CuPy expression"]["peak_bytes"]
    assert [e["name"] for e in found if e["status"] in ("wrong", "failed")] == []


# -- Counted on the emulator -------------------------------------------------------------------


def test_counters_of_attention(monkeypatch):
    launch, kernels = emulator.Runtime.launch, []

    def noted(runtime, kernel, *rest):
        kernels.append(kernel)
        launch(runtime, kernel, *rest)

    monkeypatch.setattr(emulator.Runtime, "launch", noted)
    rows = counters.count_attention(("sm_80",))
    result = {**synthetic.full(), "counters": rows}
    assert schema.validate(result) is True
    assert len({(row["operation"], row["dtype"]) for row in rows}) == len(rows)
    for call, row, kernel in zip(counters.ATTENTION, rows, kernels, strict=True):
        assert row["kernels"] == [kernel.name]
        keys, dim, value_dim = (kernel.arguments[n] for n in ("kKeys", "kDim", "kValueDim"))
        tile = io_complexity.tile_rows(kernel)
        assert row["writes"] == 1 and row["allocated_bytes"] == row["rows"] * call.head_dim * (
            inside.dtype_of(row["dtype"]).itemsize
        )
        if call.op in ("float16", "bfloat16") and not call.options:
            tiles = call.heads * -(-call.seqlen_q // tile) * -(-call.seqlen_k // keys)
            assert row["mma"] == tiles * tile * keys * (dim + value_dim) // (16 * 8 * 16)
            assert row["exponentials"] == tiles * tile * keys / row["rows"] / row["cols"]
            assert row["conflicts"] == 0 < row["ldmatrix"]
            assert kernel.arguments["kMTiles"] in (1, 2)
        assert (row["mma"] > 0) is (call.op != "float32")
    text = report.markdown(result)
    causal = next(row for row in rows if "4 heads on 1" in row["operation"])
    assert causal["exponentials"] < 1 < causal["reads"]
    assert "| attention, head_dim 64, 4 heads on 1, causal | sm_80 | 1024 × 256 float16 |" in text
    assert f"| {causal['mma']} | {causal['ldmatrix']} |" in text


@pytest.mark.parametrize(
    ("head_dim", "arch", "length"),
    [(64, "sm_80", 128), (64, "sm_80", 300), (128, "sm_80", 256), (256, "sm_86", 200)],
)
def test_bytes_are_exactly_those_of_the_formula(head_dim, arch, length):
    found = io_complexity.count(head_dim, arch, length)
    tiles = math.ceil(length / found.tile_rows)
    assert found.read == (1 + 2 * tiles) * length * head_dim * 2
    assert found.written == length * head_dim * 2
    assert found.total == found.formula


def test_less_fast_memory_costs_more_traffic():
    """sm_86 against sm_80: the same problem, N^2 d^2 / M and what is counted rise together."""
    large, small = (io_complexity.count(256, arch, 256) for arch in ("sm_80", "sm_86"))
    assert small.shared_elements < large.shared_elements
    assert small.total > large.total and small.bound > large.bound
    assert 2 < small.total / small.bound < 10 and 2 < large.total / large.bound < 10
    longer = io_complexity.count(64, "sm_80", 512)
    assert longer.total < longer.unfused == 4 * 512 * 512 * 2
    assert longer.bound == pytest.approx((512 * 64) ** 2 / longer.shared_elements * 2)


def test_the_table_of_traffic(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(io_complexity, "SETTINGS", ((64, "sm_80"), (256, "sm_86")))
    monkeypatch.setattr(io_complexity, "LENGTHS", (128, 256))
    picture = tmp_path / "io.svg"
    assert io_complexity.main(["--plot", str(picture)]) == 0
    text = picture.read_text(encoding="utf-8")
    for words in ("N² d² / M", "4 N²", "d = 256", "cuattn", "no GPU"):
        assert words in text
    row = io_complexity.count(64, "sm_80", 256)
    assert f"| 256 | {row.total} | {row.formula} | {row.bound:.0f} |" in capsys.readouterr().out
    wrong = row._replace(read=row.read + 2)
    monkeypatch.setattr(io_complexity, "count", lambda *_: wrong)
    assert io_complexity.main([]) == 1


# -- The map of a head -------------------------------------------------------------------------


def test_the_map_of_a_head(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    files = [tmp_path / name for name in ("a.svg", "b.svg", "head.png")]
    for file in files[:2]:
        assert attention_map.main(["--out", str(file), "--head", "3"]) == 0
    text = files[0].read_text(encoding="utf-8")
    assert text.count("lighthouse") >= 2 and "head 3" in text
    assert files[1].read_bytes() == files[0].read_bytes()
    assert attention_map.main(["--out", str(files[2])]) == 0
    assert files[2].read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit):
        attention_map.main(["--out", str(files[2]), "--head", "12"])
    right = cuattn.attention
    monkeypatch.setattr(cuattn, "attention", lambda q, k, v: right(q, k, v, is_causal=True))
    assert attention_map.main(["--out", str(files[2])]) == 1


def test_the_map_is_that_of_the_sample():
    sample = attention_map.load()
    q, k, v = (sample[name] for name in "qkv")
    with np.load(attention_map.SAMPLE) as file:
        expected = file["out"]
    weights = attention_map.attention_map(q, k)
    np.testing.assert_allclose(weights @ v, expected, atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert weights.shape == (12, len(sample["tokens"]), len(sample["tokens"]))
    assert attention_map.error(q, k, v) < attention_map.TOLERANCE


# -- Reports -----------------------------------------------------------------------------------


def measured(cell, ours, by_hand, memory=(1 << 24, 5 << 24)):
    """A cell of a result, in seconds and bytes."""
    entries = [
        synthetic.contestant("cuattn", ours, peak_bytes=memory[0]),
        synthetic.contestant("flash_attn", status="unsupported"),
        synthetic.contestant("CuPy expression", by_hand, peak_bytes=memory[1])
        if by_hand
        else synthetic.contestant("CuPy expression", status="failed", detail="no memory"),
    ]
    work = OPERATIONS[cell.operation].work(cell)
    where = (cell.operation, cell.grid, cell.shape, cell.dtype)
    return synthetic.cell(*where, entries, (work.bytes, work.flops), "matmul")


@pytest.fixture
def result():
    bert, gpt, xl = grids.cells(["transformer"])
    attention = [c for c in grids.cells(["attention"]) if c.grid == "transformer-attention"]
    cells = [
        measured(bert, 10e-3, 13e-3, (3 << 20, 9 << 20)),
        measured(gpt, 20e-3, 64e-3),
        measured(xl, 40e-3, None),
        measured(attention[0], 1e-3, 7e-3, (1 << 20, 24 << 20)),
    ]
    result = {**synthetic.full(), "cells": cells}
    assert schema.validate(result) is True
    return result


@pytest.fixture
def text(result):
    return report.markdown(result)


def test_three_models_are_no_picture(result, tmp_path):
    pytest.importorskip("matplotlib")
    assert plot.draw(result, tmp_path) == []


def test_the_report_has_the_headlines(text):
    part = text.partition("## Transformers\n")[2].partition("\n## ")[0]
    assert (
        "| BERT-large | 13.0 | 10.0 | 1.30× | 1.15× | 3.00 | 9.00 | 3.00× "
        "| 7.00× | 1.00 | 24.0 | 24.0× |\n"
    ) in part
    assert (
        "| GPT-2 medium | 64.0 | 20.0 | 3.20× | 3× | 16.0 | 80.0 | 5.00× | – | – | – | – |" in part
    )
    assert "| GPT-2 XL | **failed** | 40.0 | – | – | 16.0 | – | – |" in part
    assert "`softmax(scale * q @ k.T) @ v`" in part
    assert "## Transformers" not in report.markdown(synthetic.full())


def test_the_baseline_is_named_beside_the_speed_up(text):
    part = text.partition("## attention, transformer-attention\n")[2].partition("\n## ")[0]
    assert "`CuPy expression`, is `softmax(scale * q @ k.T) @ v` with the matrix" in part
    assert (
        "| over `CuPy expression` | over `flash_attn` | MiB | MiB of `CuPy expression` | ratio |"
    ) in part
    assert "| 7.00× | – | 1.00 | 24.0 | 24.0× |" in part
    assert "TFLOP/s" in part and "| matmul: 4 * batch" not in part
    softmax = report.markdown(synthetic.full()).partition("## softmax, quack\n")[2]
    assert "MiB of" not in softmax.partition("\n## ")[0]


# -- Kernels -----------------------------------------------------------------------------------

TILE = {
    "Op": "HalfOp<__half>",
    "kWarps": 4,
    "kMTiles": 2,
    "kKeys": 48,
    "kDim": 64,
    "kPartDim": 64,
    "kValueDim": 64,
    "kSlots": 3,
    "kVector": True,
    "kModified": False,
    "Bias": "NoBias",
    "kMasked": False,
    "Tiles": "AllTiles",
    "Score": "NoScore",
}
KERNEL = Kernel("attention_forward", TILE, grid=1, block=128)
LOOP = (
    "LDG.E.128 R4, [R2.64]",
    ".L_x_0:",
    *["LDGSTS.E.BYPASS.128 [R4], desc[UR4][R6.64]"] * 3,
    ".L_x_1:",
    *["LDSM.16.M88.4 R8, [R3]"] * 2,
    *["HMMA.16816.F32 R4, R8, R10, R4"] * 24,
    "@P1 BRA `(.L_x_1)",
    "MUFU.EX2 R4, R4",
    *["HMMA.16816.F32 R4, R8, R10, R4"] * 48,
    "@P0 BRA `(.L_x_0)",
    ".L_x_2:",
    *["STG.E.128 [R2.64], R0"] * 9,
    "@P2 BRA `(.L_x_2)",
    "EXIT",
    *TRAP,
)


def test_products_in_inner_loops_count_as_often_as_they_run():
    """96 products a tile, by hand: 48 in the loop, 24 in each of two passes of the inner one."""
    assert attention_loop.tile_flops(KERNEL) == 96 * 2 * 16 * 8 * 16
    region, mix = attention_loop.mix(sass.parse(listing(*LOOP)), KERNEL)
    assert region.kind == "loop" and mix["tensor"] == 96
    assert mix["tensor_flops"] == attention_loop.tile_flops(KERNEL)
    assert (mix["shared_load"], mix["mufu"], mix["branch"], mix["async_copy"]) == (4, 1, 3, 3)
    assert mix["total"] == 96 + 4 + 1 + 3 + 3 and mix["written_bytes"] == 0
    found = kernel_report.predicted(kernel_report.GPUS["sm_80"], region, mix, cached=True)
    assert (found["bound"], found["cycles"]["tensor"]) == ("tensor", 192)
    assert found["cycles"]["L2"] == 32 * 3 * 16 / 64 and "HBM" not in found["cycles"]


def test_float32_products_are_found_without_tensor_cores():
    """The loop that stores moves more, and is not the main one."""
    kernel = dataclasses.replace(KERNEL, arguments={**TILE, "Op": "FloatOp", "kKeys": 32})
    code = [line.replace("HMMA.16816.F32", "FFMA") for line in LOOP]
    blocks = sass.parse(listing(*code))
    assert sass.main_region(blocks).path[0].base == "STG"
    _, mix = attention_loop.mix(blocks, kernel)
    assert attention_loop.tile_flops(kernel) == 64 * (2 * 16 * 32 * 128 // 32)
    assert mix["float"] == 2 * 16 * 32 * 128 // 32
    with pytest.raises(ValueError, match="softmax_rows"):
        attention_loop.tile_flops(dataclasses.replace(KERNEL, template="softmax_rows"))


def test_rates_of_tensor_cores():
    gpu = kernel_report.GPUS["sm_80"]

    def cycles(opcode):
        path = [sass.Instruction(0, "", opcode, "")]
        return kernel_report.predicted(gpu, sass.Region("body", path, path))["cycles"]["tensor"]

    assert cycles("HMMA.16816.F32.BF16") == 4096 / 2048
    assert cycles("HMMA.1688.F32.TF32") == 2048 / 1024
    assert cycles("DMMA.884") == 512 / 128


@pytest.mark.usefixtures("nvdisasm")
def test_a_real_kernel():
    """Tensor products as many as the tile has, LDSM, and shared memory of the launch."""
    kernel = inside.kernels(80)[KERNEL.name]
    (row,) = kernel_report.rows_of([kernel], "sm_80")
    assert row["mix"]["tensor"] * 2 * 16 * 8 * 16 == attention_loop.tile_flops(kernel)
    assert row["mix"]["shared_load"] > 0 and row["mix"]["async_copy"] > 0
    assert row["smem_bytes"] == kernel.smem_bytes > 10_000
    assert row["region"] == "loop" and set(row["cycles"]) >= {"L2", "tensor"}
    roomy = kernel_report.occupancy(
        kernel_report.GPUS["sm_80"], kernel.block, row["registers"], 100 << 10
    )
    assert roomy["limit"] == "shared memory"  # it is looked at
