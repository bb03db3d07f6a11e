"""The benchmark of attention's gradients: what it verifies, counts, and hands to its peers."""

from __future__ import annotations

import contextlib
import dataclasses
import types

import emulator
import numpy as np
import pytest
import scipy.special
import synthetic_results as synthetic
from test_bench_attention import cell_of, run
from test_bench_harness import Arrays

import cuattn
from bench import attention_shapes, conftest, grids, inside, peers
from bench.peers._base import BSHD
from bench.peers._cupy import Cupy
from bench.report import markdown as report
from bench.report import schema
from bench.timing import analysis, environment, harness, measure, prediction
from cuattn._attention import plan_backward, plan_backward_ds, plan_backward_sm90
from cuattn._attention.problem import AttentionProblem

OPERATION = measure.operations()["attention_backward"]


def cell(**sizes):
    return cell_of("attention_backward", **sizes)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        ("float16", {}),
        ("bfloat16", {"seqlen_q": 33, "seqlen_k": 301}),
        ("float16", {"seqlen_q": 1, "seqlen_k": 5, "heads": 2, "batch": 1}),
        ("float32", {}),
        ("float32", {"seqlen_q": 1, "seqlen_k": 5, "heads": 2, "batch": 1}),
    ],
)
def test_ours_and_the_baseline_are_right(dtype, sizes, causal):
    """The baseline in a dtype that has digits for its scores: in float16, 5 of 600 were off."""
    (expression,) = Cupy(np, scipy.special).contestants("attention_backward", None, bool(causal))
    others = [expression] if dtype == "float32" else []
    for name, entry in run(cell(dtype=dtype, causal=causal, **sizes), others=others).items():
        assert entry["status"] == "ok", (name, entry["detail"])
        assert 0 < entry["max_error"] < entry["allowed_error"]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("how", ["first", "last", "heads", "rows", "sign"])
def test_a_wrong_gradient_is_seen(which, how):
    def spoil(gradients):
        found = [np.array(one) for one in gradients]
        one = found[which]
        if how in ("first", "last"):
            one[(0,) * 4 if how == "first" else (-1,) * 4] += 1
        else:
            one[...] = {"heads": one[:, ::-1], "rows": np.roll(one, 1, 2), "sign": -one}[how]
        return tuple(found)

    entry = run(cell(causal=1), spoil)[analysis.OURS]
    assert (entry["status"], entry["cold"]) == ("wrong", []) and "error" in entry["detail"]


def test_the_other_mask_is_seen():
    for causal in (0, 1):
        wrong = peers.Contestant(
            "other", Arrays(), lambda *a, c=causal: OPERATION.ours(*a, causal=not c)
        )
        assert run(cell(causal=causal), others=[wrong])["other"]["status"] == "wrong"


class Turned(BSHD, Arrays):
    """A library whose arrays are (batch, seqlen, heads, head_dim)."""


def test_layouts_of_peers():
    """Arrays of four axes are turned round for them, the log-sum-exp is not."""
    seen = []

    def turned(*arrays):
        seen.extend(a.shape for a in arrays)
        grad, q, k, v, y, lse = arrays
        return cuattn.attention_backward(grad, q, k, v, y, lse, layout="BSHD")[:3]

    entry = run(cell(), others=[peers.Contestant("turned", Turned(), turned)])["turned"]
    assert entry["status"] == "ok", entry["detail"]
    assert {(2, 40, 4, 32), (2, 40, 2, 32), (2, 4, 40)} == set(seen)


def test_work_is_that_of_the_papers():
    """Five products of two FLOPs; six arrays, four of them read, and the log-sum-exp."""
    for causal in (0, 1):
        work = OPERATION.work(cell(causal=causal))
        assert work.flops == 10 * 2 * 4 * 40 * 40 * 32 // (1 + causal)
        assert eval(work.formula, dict(cell(causal=causal).shape)) == work.flops
        of_queries, of_keys = 2 * 4 * 40 * 32 * 2, 2 * 2 * 40 * 32 * 2
        assert work.bytes == 4 * of_queries + 4 * of_keys + 2 * 4 * 40 * 4
    assert any(
        cell.operation == "attention_backward" for cell in grids.cells(["attention_backward"])
    )


# -- What a model predicts ---------------------------------------------------------------------

H200 = {"compute_capability": 90, "num_sms": 132, "sm_mhz_max": 1980}
A100 = {"compute_capability": 80, "num_sms": 108, "sm_mhz_max": 1410}


def launches(shape, gpu, dtype="float16", **options):
    """The kernels of a call with arrays of this shape."""
    sizes = [shape[name] for name in ("batch", "heads", "kv_heads", "seqlen_q", "seqlen_k")]
    problem = AttentionProblem(
        dtype, dtype, *sizes, *[shape["head_dim"]] * 2, tma=True, bounded=bool(shape["causal"])
    )
    problem, capability = dataclasses.replace(problem, **options), gpu["compute_capability"]
    limits = capability, gpu["num_sms"]
    found = [plan_backward.plan_rows(problem, True).kernel]
    if of_ds := plan_backward_ds.plan_ds(problem, *limits):
        return found + [launch.kernel for part in of_ds.rounds for launch in (part.kv, part.ds)]
    of_q = plan_backward_sm90.plan_q_sm90(problem, *limits)
    found.append((of_q.launch if of_q else plan_backward.plan_q(problem, capability)).kernel)
    of_kv = plan_backward_sm90.plan_kv_sm90(problem, *limits)
    of_keys = [of_kv.launch] if of_kv else plan_backward.plan_kv(problem, capability)
    return found + [launch.kernel for launch in of_keys]


def predicted(shape, gpu, **options):
    return prediction.attention_backward(shape, launches(shape, gpu, **options), gpu)


@pytest.mark.parametrize(
    ("gpu", "head_dim", "rows", "tflops", "start"),
    [
        (H200, 64, 768, 353, 320),  # 989.4 * 5 / (4 / 0.50 + 3 / 0.50)
        (H200, 128, 768, 447, 320),  # 989.4 * 5 / (4 / 0.62 + 3 / 0.65)
        (H200, 256, 8192, 216, 320),  # 989.4 * 5 / (5 / 0.28 + 3 / 0.60): kv is two kernels
        (H200, 64, 1024, 373, 320),  # 989.4 * 5 / (4 / 0.50 + 1 / 0.19): dS is stored
        (H200, 128, 1024, 545, 320),  # 989.4 * 5 / (4 / 0.62 + 1 / 0.38)
        (A100, 64, 8192, 149, 160),  # 312 * 5 / (4 / 0.67 + 3 / 0.67)
        (A100, 128, 8192, 133, 160),  # 312 * 5 / (4 / 0.56 + 3 / 0.66)
        (A100, 256, 8192, 112, 160),  # 312 * 5 / (5 / 0.56 + 3 / 0.60)
    ],
)
def test_the_model_s_rate_is_that_of_the_hand(gpu, head_dim, rows, tflops, start):
    """Of loops that keep all multiprocessors busy to the end."""
    heads = gpu["num_sms"] // 4
    shape = attention_shapes.attention_shape(4, heads, heads, rows, head_dim, 0)
    flops = 10 * 4 * heads * rows**2 * head_dim
    rate = flops / predicted(shape, gpu) / 1e12
    assert rate == pytest.approx(tflops * rows / (rows + start), rel=4e-3)


def test_the_model_counts_the_blocks_of_a_call_by_hand():
    """88 heads of three blocks, which see 384, 256 and 128 rows: the longest first, 88 multi-
    processors have one of each end, 44 two of the middle. A head more, and three have three."""
    shape = attention_shapes.attention_shape(1, 88, 88, 384, 128, 1)
    of_row = 2 * 128 * 128 * (3 / 0.65 + 4 / 0.62) * 132 / 989.4e12  # both kernels
    seconds = (384 + 128 + 2 * 320) * of_row
    assert seconds == pytest.approx(5.574e-5, rel=1e-3)
    assert predicted(shape, H200) == pytest.approx(seconds)
    one_more = (384 + 2 * 128 + 3 * 320) * of_row
    assert predicted(shape | {"heads": 89, "kv_heads": 89}, H200) == pytest.approx(one_more)


def test_the_model_lets_two_small_blocks_share_a_multiprocessor():
    """Of 128 threads; one by itself has half of it."""
    shape = attention_shapes.attention_shape(1, 1, 1, 128, 64, 0)
    flops = 2 * 128 * 64 * (3 + 4) * (128 + 160)
    assert predicted(shape, A100) == pytest.approx(flops * 2 * 108 / 312e12 / 0.67)


@pytest.mark.parametrize("gpu", [H200, A100])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("sizes", [(256, 256), (100, 300), (300, 100), (1, 5), (777, 778)])
def test_the_model_s_tiles_are_those_with_something_visible(gpu, causal, sizes):
    shape = attention_shapes.attention_shape(2, 4, 2, 0, 64, causal)
    shape["seqlen_q"], shape["seqlen_k"] = queries, keys = sizes
    visible = np.tri(queries, keys, keys - queries, bool) | (not causal)
    _, of_q, of_kv = launches(shape, gpu)
    for kernel, seen, loops in ((of_q, visible, 1), (of_kv, visible.T, 2)):
        arguments = kernel.arguments
        loop = arguments["kKeys"] if kernel is of_q else arguments["kQueries"]
        expected = [
            loops * sum(block[:, i : i + loop].any() for i in range(0, seen.shape[1], loop))
            for block in np.split(seen, range(128, len(seen), 128))
        ]
        assert prediction.tiles(kernel, shape) == expected
        blocks = len(expected) * 2 * (4 if kernel is of_q else 2)
        assert kernel.grid == (min(132, blocks) if gpu is H200 else blocks)


def test_the_model_follows_the_clock():
    shape = attention_shapes.attention_shape(1, 132, 132, 256, 128, 1)
    slow, unknown = (predicted(shape, H200 | {"sm_mhz_max": mhz}) for mhz in (990, None))
    assert slow == pytest.approx(2 * predicted(shape, H200)) and unknown == predicted(shape, H200)


def test_the_model_says_nothing_of_what_it_does_not_know():
    shape = attention_shapes.attention_shape(1, 4, 4, 256, 64, 0)
    for gpu in (H200, A100):
        assert predicted(shape, gpu) > 0
        for dtype in ("float32", "float64"):
            assert predicted(shape, gpu, dtype=dtype) is None
        for options in ({"masked": True}, {"modified": True}, {"vector": False, "tma": False}):
            assert predicted(shape, gpu, **options) is None
        assert predicted(shape, gpu, bias="float16", modified=True) is None
        kernels = launches(shape, gpu)
        problem = AttentionProblem("float16", "float16", 1, 4, 4, 256, 256, 64, 64, bias="float16")
        sizes = plan_backward.BiasSizes(1, 1, 256, 256)
        of_bias = plan_backward.plan_bias(problem, sizes, gpu["compute_capability"]).kernel
        for others in ([*kernels, of_bias], kernels[:1], []):
            assert prediction.attention_backward(shape, others, gpu) is None
        assert prediction.attention_backward(shape, kernels, None) is None
    for capability, sms in ((86, 84), (89, 128), (90, 78), (100, 148), (120, 170)):
        assert predicted(shape, {"compute_capability": capability, "num_sms": sms}) is None


@pytest.mark.parametrize(("arch", "gpu"), [("sm_90a", H200), ("sm_80", A100)])
def test_the_prediction_is_of_the_kernels_that_ran(arch, gpu, monkeypatch):
    measured = cell(causal=1)
    kernels = launches(measured.shape, gpu)

    @contextlib.contextmanager
    def launched():
        found, before = [], len(runtime.kernels)
        yield found
        found += runtime.kernels[before:]

    monkeypatch.setattr(inside, "launched", launched)
    monkeypatch.setattr(harness, "ROUNDS", (1, 1))
    monkeypatch.setattr(environment, "gpu", lambda: gpu)
    with emulator.activate(arch) as runtime:
        ours = run(measured)[analysis.OURS]
    assert [kernel.name for kernel in kernels] == ours["plan"]
    assert ours["predicted"] == prediction.attention_backward(measured.shape, kernels, gpu) > 0


@pytest.mark.parametrize("seconds", [2e-3, None])
def test_the_prediction_is_shown_beside_the_measured_rate(seconds):
    """A dash where there is none, and no column where there is no model."""
    entry = synthetic.contestant("cuattn", 1e-3, predicted=seconds)
    where = ("attention_backward", "flash-attention", cell().shape, "float16")
    found = synthetic.cell(*where, [entry], (1, 3 * 10**11), "matmul")
    rate = seconds and 1.5e14
    assert analysis.predicted_rate(found) == rate
    assert analysis.predicted_rate(found, "torch") is None
    benchmark = types.SimpleNamespace(extra_info={}, pedantic=lambda *args, **options: None)
    conftest.Measured(found, "cuattn", "cold", {"ceilings": {}}).replay(benchmark)
    assert benchmark.extra_info["rate"] == pytest.approx(3e14)
    assert benchmark.extra_info["rate_predicted_by_model"] == rate
    result = {**synthetic.empty(), "cells": [found]}
    assert schema.validate(result) is True
    text = report.markdown(result)
    assert "The prediction is of bench/timing/prediction.py, and not measured." in text
    assert "| rate | a model's prediction | % of ceiling |" in text
    assert f"| 300 TFLOP/s | {'150 TFLOP/s' if seconds else '–'} | – |" in text
    del entry["predicted"]
    assert "prediction" not in report.markdown(result)
