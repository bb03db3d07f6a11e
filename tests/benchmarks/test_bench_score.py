"""Benchmarks of score expressions and block masks: what is verified, counted, handed to peers."""

from __future__ import annotations

import emulator
import numpy as np
import pytest
import scipy.special
from conftest import on_a_gpu, software_arch
from test_bench_attention import SPOILED, cell_of, run

import cuattn
from bench import patterns, peers
from bench.peers import _base
from bench.peers._cupy import Cupy
from bench.timing import analysis, measure

CASES = [("attention_score", name) for name in patterns.SCORES]
CASES += [("attention_block_mask", name) for name in patterns.MASKS]
cases = pytest.mark.parametrize(("operation", "pattern"), CASES)


def cell(operation, pattern, dtype="float16", seqlen=200, **sizes):
    heads = {"batch": 2, "heads": 2, "kv_heads": 2, "head_dim": 16}
    sizes = {**heads, "seqlen_q": seqlen, "seqlen_k": seqlen, **sizes, pattern: 1}
    causal = int(operation == "attention_score")
    return cell_of(operation, dtype, "score", causal=causal, **sizes)


def by_hand(operation, pattern):
    return list(Cupy(np, scipy.special).variants(operation, pattern=pattern))


@pytest.mark.drawn
@cases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_and_the_baseline_are_right(operation, pattern, dtype):
    """On NumPy, with the baseline in a dtype that has digits for its scores, and by a kernel."""
    if dtype == "float32":
        entries = run(cell(operation, pattern, dtype), others=by_hand(operation, pattern))
    else:
        with emulator.activate("sm_80"):
            small = {"batch": 1, "heads": 1, "kv_heads": 1, "seqlen": 130}
            entries = run(cell(operation, pattern, dtype, **small))
    for name, entry in entries.items():
        assert entry["status"] == "ok", (name, entry["detail"])
        assert 0 < entry["max_error"] < entry["allowed_error"] < 0.1


@cases
@pytest.mark.parametrize("how", ["first", "heads", "rows"])
def test_a_wrong_result_is_seen(operation, pattern, how):
    entry = run(cell(operation, pattern), SPOILED[how])[analysis.OURS]
    assert entry["status"] == "wrong"


@cases
def test_attention_without_the_pattern_is_wrong(operation, pattern):
    causal = {"is_causal": operation == "attention_score"}
    plain = lambda q, k, v, *more: cuattn.attention(q, k, v, **causal)  # noqa: E731
    library = Cupy(np, scipy.special)
    others = [peers.Contestant("plain", library, plain)]
    assert run(cell(operation, pattern), others=others)["plain"]["status"] == "wrong"


@cases
def test_scores_over_the_budget_are_unsupported(operation, pattern, monkeypatch):
    found = cell(operation, pattern)
    monkeypatch.setattr(_base, "SCORE_BYTES", 2 * 2 * 200 * 200 * 2 - 1)
    (expression,) = by_hand(operation, pattern)
    assert run(found, others=[expression])[expression.name]["status"] == "unsupported"


@cases
def test_torch_is_right(operation, pattern, monkeypatch, rng):
    """Of FlexAttention its definition, which a compiler fuses; of the fused backends the one that
    is there on the CPU."""
    torch = pytest.importorskip("torch")
    from bench.peers import _torch, _torch_variants

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    library, found = _torch.Torch(), cell(operation, pattern, "float32")
    math = {
        "math": lambda q, k, v, mask: _torch._sdpa(q, k, v, backend="math", causal=False, mask=mask)
    }
    calls = dict(_torch_variants.variants(operation, math, pattern=pattern))
    assert [*calls] == ["torch FlexAttention", "torch SDPA math"]
    others = [peers.Contestant(name, library, call) for name, call in calls.items()]
    for name, entry in run(found, others=others).items():
        refused = (name, pattern) == ("torch SDPA math", "cap")
        assert entry["status"] == ("unsupported" if refused else "ok"), (name, entry["detail"])
    names = [one.name for one in library.variants(operation, pattern=pattern)]
    assert names == ["torch FlexAttention", "torch SDPA cuDNN", "torch SDPA efficient"]


@cases
def test_flex_attention_makes_its_block_mask_once(operation, pattern, monkeypatch, rng):
    """With tiles of the same size as ours, as many of them, and the same pairs in them."""
    torch = pytest.importorskip("torch")
    from bench.peers import _torch, _torch_variants

    made, make = [], _torch_variants.flex.create_block_mask
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(
        _torch_variants.flex,
        "create_block_mask",
        lambda *args, **how: made.append(make(*args, **how)) or made[-1],
    )
    library, found = _torch.Torch(), cell(operation, pattern, "float32", 512, head_dim=8)
    call, *_ = (one.call for one in library.variants(operation, pattern=pattern))
    for _ in range(2):
        inputs = measure.operations()[operation].inputs(found, np, rng)
        call(*map(library.asarray, inputs))
    assert len(made) == 1
    if operation == "attention_block_mask":
        counts = made[0].kv_num_blocks + made[0].full_kv_num_blocks
        np.testing.assert_array_equal(counts[0, 0], inputs[4])


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "pattern"), [CASES[0], CASES[3]])
def test_flex_attention_is_compiled(operation, pattern):
    pytest.importorskip("torch")
    from bench.peers import _torch

    library = _torch.Torch()
    flex, *_ = library.variants(operation, pattern=pattern)
    entry = run(cell(operation, pattern, "float32"), others=[flex])[flex.name]
    assert entry["status"] == "ok", entry["detail"]


@pytest.mark.parametrize("pattern", patterns.MASKS)
@pytest.mark.parametrize("size", [8, 130, 700])
def test_pairs_are_counted(pattern, size):
    table = patterns.mask_table(pattern, size)
    mask = patterns.mask(pattern, np, table, size)
    assert mask.shape == (size, size) and mask.diagonal().all()
    assert patterns.pairs(pattern, size) == mask.sum()


def test_work():
    """Products of the pairs that are shown; of an expression, of all that are not in the future."""
    table = measure.operations()
    scored, masked = cell("attention_score", "cap"), cell("attention_block_mask", "prefix")
    work = table["attention_score"].work(scored)
    assert work.flops == 2 * 2 * 2 * 200 * 200 * 16
    work = table["attention_block_mask"].work(masked)
    assert work.flops == 4 * 2 * 2 * patterns.pairs("prefix", 200) * 16
    assert eval(work.formula, {}, masked.shape) == work.flops
    assert work.bytes == 4 * 2 * 2 * 200 * 16 * 2


@on_a_gpu
@cases
def test_on_a_gpu(backend, operation, pattern, monkeypatch, rng):
    """CuPy takes the formulas; where there is no cuBLAS, NumPy multiplies."""
    xp, table = backend.xp, measure.operations()[operation]
    if software_arch():
        asnumpy = backend.asnumpy
        monkeypatch.setattr(
            xp, "matmul", lambda a, b: xp.asarray(np.matmul(asnumpy(a), asnumpy(b)))
        )
    found = cell(operation, pattern, seqlen=130, batch=1)
    inputs = table.inputs(found, xp, rng)
    (expression,) = Cupy().variants(operation, pattern=pattern)
    ours, by_hand = table.ours(*inputs, **table.options(found)), expression.call(*inputs)
    for sample in table.samples(found, inputs, backend.asnumpy):
        for result in (ours, by_hand):
            got = backend.asnumpy(result[sample.index])[sample.part]
            np.testing.assert_allclose(got, sample.expected, rtol=0, atol=2 * sample.allowed)
