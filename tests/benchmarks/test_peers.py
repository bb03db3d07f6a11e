"""Peers of the benchmarks: every contestant that is installed gives the right result on the CPU.

NumPy stands in for CuPy; torch and JAX are tested where they are installed, on NumPy's memory, and
Triton in its interpreter. The packages of GPU kernels are replaced by stubs with their signatures.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import scipy.special
from conftest import why_no_gpu

from bench import peers
from bench.bench_sample import may_draw
from bench.peers import Filters, _base
from bench.peers._cupy import Cupy
from cuattn import reference

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ["float16", "bfloat16", "float32", "float64"]
NAMES = ["cupy", "torch", "jax", "triton", "flash_attn", "flash_attn_interface", "quack"]
NAMES += ["flashinfer", "liger_kernel", "cuvs", "pylibraft"]
K = 9
# What a few roundings of each dtype may cost, of the largest value of the result.
ERROR = {"float16": 2.0**-7, "bfloat16": 2.0**-4, "float32": 2.0**-18, "float64": 2.0**-46}


def random(rng, *shape, dtype):
    return rng.normal(0, 2, shape).astype(getattr(ml_dtypes, dtype, dtype))


def inputs(operation, rng, dtype, shape=(13, 131), causal=False):
    """Arrays as a contestant of the operation takes them, with sizes that nothing divides."""
    if operation == "attention":
        seqlen_k = 61 if causal else 83
        return [
            random(rng, 2, heads, seqlen, 32, dtype=dtype)
            for heads, seqlen in ((6, 61), (3, seqlen_k), (3, seqlen_k))
        ]
    if operation == "attention_backward":
        q, k, v = inputs("attention", rng, dtype, shape, causal)
        y, lse = reference.attention(q, k, v, is_causal=causal, return_lse=True)
        lse = lse.astype(np.float64 if dtype == "float64" else np.float32)
        return [random(rng, *q.shape, dtype=dtype), q, k, v, y.astype(q.dtype), lse]
    if operation == "attention_column_sums":
        _, q, k, _, _, lse = inputs("attention_backward", rng, dtype, shape, causal)
        return [q, k, lse]
    if operation == "attention_kvcache":  # what every contestant takes: dense, of one length
        arrays = [random(rng, 2, h, n, 32, dtype=dtype) for h, n in ((6, 1), (3, 83), (3, 83))]
        return [*arrays, np.full(2, 83, np.int32), np.arange(2, dtype=np.int32)[:, None]]
    x = random(rng, *shape, dtype=dtype)
    if operation.startswith("cross_entropy"):
        acc = np.promote_types(np.float32, x.dtype)
        grad, lse = rng.normal(0, 2, len(x)).astype(acc), reference.logsumexp(x, axis=-1)
        arrays = [x, rng.integers(0, x.shape[1], len(x))]
        return [grad, *arrays, lse.astype(acc)] if operation.endswith("backward") else arrays
    if operation in ("softmax_backward", "log_softmax_backward"):
        forward = getattr(reference, operation.removesuffix("_backward"))
        return [random(rng, *shape, dtype=dtype), forward(x).astype(x.dtype)]
    return [x]


def attention(q, k, v, causal):
    """The formula in float64, causal to the bottom right corner."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    visible = np.tri(*scores.shape[-2:], scores.shape[-1] - scores.shape[-2], dtype=bool)
    return reference.softmax(scores, where=visible if causal else None) @ v


def cached_attention(q, k, v, kv_lens, page_table, causal):
    """Each sequence by itself, over its pages side by side."""
    return np.concatenate([
        attention(q[b : b + 1], *(
            np.concatenate(list(a[page_table[b]]), axis=1)[None, :, :n] for a in (k, v)
        ), causal)
        for b, n in enumerate(kv_lens)
    ])  # fmt: skip


def check(operation, got, arrays, causal=False):
    """A result on the host against the reference in float64."""
    dtype = arrays[operation == "cross_entropy_backward"].dtype.name  # of x
    if operation in ("top_k", "softmax_topk"):
        values, indices = got
        x = arrays[0].astype(np.float64)
        wanted = x if operation == "top_k" else reference.softmax(x)
        picked = np.take_along_axis(wanted, np.asarray(indices, np.int64), -1)
        assert values.shape == indices.shape == (len(x), K)
        assert all(len(set(row)) == K for row in indices.tolist())
        pairs = [(values, np.sort(wanted)[:, : -K - 1 : -1]), (picked, values.astype(np.float64))]
    elif operation == "attention":
        pairs = [(got, attention(*arrays, causal))]
    elif operation == "attention_backward":
        wanted = reference.attention_backward(*arrays, is_causal=causal)[:3]
        pairs = list(zip(got, wanted, strict=True))
    elif operation == "attention_column_sums":
        pairs = [(got, reference.attention_column_sums(*arrays, is_causal=causal))]
    elif operation == "attention_kvcache":
        pairs = [(got, cached_attention(*arrays, causal))]
    else:
        axis = {"axis": -1} if operation == "logsumexp" else {}
        pairs = [(got, getattr(reference, operation)(*arrays, **axis))]
    for value, wanted in pairs:
        assert value.shape == wanted.shape
        error = 0 if operation == "top_k" else ERROR[dtype] * abs(wanted).max()
        np.testing.assert_allclose(value.astype(np.float64), wanted, rtol=0, atol=error)


def run(contestant, arrays, stream=None):
    """The result of a contestant on the host."""
    library = contestant.library
    with library.on_stream(stream):
        result = contestant.call(*(library.asarray(a) for a in arrays))
        library.wait(result)
    return on_host(library, result)


def on_host(library, result):
    if isinstance(result, tuple):
        return tuple(library.asnumpy(a) for a in result)
    return library.asnumpy(result)


def options(operation, causal=False):
    return K if operation in ("top_k", "softmax_topk") else None, causal


OWN = ("sample", *peers.VARIANTS)  # elsewhere
CASES = [(name, False) for name in peers.OPERATIONS if name not in OWN] + [
    ("attention", True),
    ("attention_backward", True),
    ("attention_column_sums", True),
]
cases = pytest.mark.parametrize(("operation", "causal"), CASES)


# -- CuPy's expressions, on NumPy --------------------------------------------------------------


@cases
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_cupy_expressions(operation, causal, dtype, rng):
    arrays = inputs(operation, rng, dtype, causal=causal)
    contestants = list(Cupy(np, scipy.special).contestants(operation, *options(operation, causal)))
    library = ["softmax", "log_softmax", "logsumexp", "softmax_topk", "cross_entropy"]
    assert len(contestants) == 1 + (operation in library)
    for contestant in contestants:
        check(operation, run(contestant, arrays), arrays, causal)


def test_a_contestant_that_returns_something_else_is_seen(rng):
    x = random(rng, 13, 131, dtype="float32")
    y = reference.softmax(x)
    y[3, 5] += 1e-4
    with pytest.raises(AssertionError):
        check("softmax", y, [x])
    values, indices = Cupy(np, scipy.special).top_k(x, K)
    indices[2, 3] = indices[2, 4]
    with pytest.raises(AssertionError):
        check("top_k", (values, indices), [x])


def test_causal_expression_is_aligned_to_the_bottom_right(rng):
    q, k, v = (random(rng, 1, 2, n, 8, dtype="float64") for n in (3, 7, 7))
    (contestant,) = Cupy(np, scipy.special).contestants("attention", None, True)
    check("attention", run(contestant, [q, k, v]), [q, k, v], causal=True)


def test_a_dtype_without_loops_is_unsupported():
    (_, contestant) = Cupy(np, scipy.special).contestants("softmax", None, False)
    with pytest.raises(peers.Unsupported, match="TypeError"):
        contestant.call(np.array([["a", "b"]]))


def test_scores_over_the_budget_are_unsupported(rng, monkeypatch):
    arrays = inputs("attention", rng, "float32")
    size = 2 * 6 * 61 * 83 * 4
    monkeypatch.setattr(_base, "SCORE_BYTES", size)
    (contestant,) = Cupy(np, scipy.special).contestants("attention", None, False)
    run(contestant, arrays)
    monkeypatch.setattr(_base, "SCORE_BYTES", size - 1)
    with pytest.raises(peers.Unsupported, match=f"{size} bytes"):
        run(contestant, arrays)


def test_native_layout_is_contiguous_and_turned_back(rng):
    class Library(_base.BSHD, Cupy):
        pass

    array, library = random(rng, 2, 3, 5, 7, dtype="bfloat16"), Library(np, scipy.special)
    native = library.asarray(array)
    assert native.shape == (2, 5, 3, 7) and native.flags.c_contiguous
    np.testing.assert_array_equal(library.asnumpy(native), array)


@pytest.mark.parametrize(
    ("causal", "queries", "keys", "asked"),
    [(False, 3, 9, False), (True, 9, 9, True), (True, 1, 9, False), (True, 3, 9, None)],
)
def test_top_left_causal(causal, queries, keys, asked):
    if asked is None:
        with pytest.raises(peers.Unsupported, match="3 queries and 9 keys"):
            _base.top_left_causal(causal, queries, keys)
    else:
        assert _base.top_left_causal(causal, queries, keys) is asked


class Stream:
    """Records what a capture does to it."""

    def __init__(self):
        self.calls = []

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def __getattr__(self, name):
        return lambda: self.calls.append(name) or self

    def launch(self, stream):
        self.calls.append("launch")


def cupy_stub(pools):
    cuda = types.SimpleNamespace(
        MemoryPool=lambda: pools.append(types.SimpleNamespace(malloc=None)) or pools[-1],
        using_allocator=lambda malloc: contextlib.nullcontext(),
    )
    return types.SimpleNamespace(cuda=cuda, __version__="0")


def test_cupy_capture():
    stream, pools = Stream(), []
    library = Cupy(cupy_stub(pools))
    replay = library.capture(lambda: stream.calls.append("call"), stream)
    assert stream.calls[-4:] == ["synchronize", "begin_capture", "call", "end_capture"]
    assert stream.calls.count("call") > 1 and len(pools) == 1
    replay()
    assert stream.calls[-1] == "launch"


def test_cupy_capture_that_fails_is_ended():
    stream = Stream()

    def call():
        if "begin_capture" in stream.calls:
            raise ValueError("device to host")

    with pytest.raises(peers.Unsupported, match="device to host"):
        Cupy(cupy_stub([])).capture(call, stream)
    assert stream.calls[-1] == "end_capture"


def test_no_graph_and_no_device_memory_on_the_cpu():
    library = Cupy(np, scipy.special)
    with pytest.raises(peers.Unsupported, match="CUDA graphs"):
        library.capture(lambda: None, None)
    assert library.peak_bytes(lambda: np.zeros(9)) is None


def test_cupy_has_what_is_used_of_it():
    cupy = pytest.importorskip("cupy")
    import cupyx.scipy.special as special

    for name in ("argpartition", "argsort", "asnumpy", "exp", "log", "matmul", "tri", "where"):
        assert callable(getattr(cupy, name))
    assert {"a", "indices", "axis"} == set(inspect.signature(cupy.take_along_axis).parameters)
    for name in ("softmax", "log_softmax", "logsumexp"):
        assert "axis" in inspect.signature(getattr(special, name)).parameters
    for name in ("begin_capture", "end_capture", "synchronize", "__enter__"):
        assert callable(getattr(cupy.cuda.Stream, name))
    assert callable(cupy.cuda.Graph.launch)
    assert callable(cupy.cuda.MemoryPool.total_bytes)
    assert callable(cupy.cuda.runtime.deviceSynchronize)
    with cupy.cuda.using_allocator(cupy.cuda.MemoryPool().malloc):
        pass


# -- the registry --------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is found yet, and of the packages nothing can be imported."""
    for name in list(sys.modules):
        if name.startswith("bench.peers._") and name != "bench.peers._base":
            monkeypatch.delitem(sys.modules, name)
    for name in peers._LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    peers._libraries.cache_clear()
    yield monkeypatch
    peers._libraries.cache_clear()


def test_importing_the_peers_imports_no_library():
    code = f"import sys, bench.peers; print({{*{NAMES}}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_missing_packages_are_listed_with_the_reason(fresh):
    found, missing = peers.find()
    assert found == {} and missing.keys() == peers._LIBRARIES.keys()
    assert missing["cupy"] == missing["torch"] == missing["jax"] == "not installed"
    assert missing["quack"] == "needs torch, which is not installed"
    assert all(peers.contestants(name, k=K) == [] for name in peers.OPERATIONS)


def test_a_package_that_breaks_at_import_is_missing(fresh, tmp_path):
    (tmp_path / "cupy.py").write_text("raise RuntimeError('no driver\\nsecond line')")
    (tmp_path / "jax.py").write_text("raise ImportError('wrong ABI')")
    fresh.syspath_prepend(tmp_path)
    for name in ("cupy", "jax"):
        fresh.delitem(sys.modules, name)
    _, missing = peers.find()
    assert missing["cupy"] == "RuntimeError: no driver"
    assert missing["jax"] == "ImportError: wrong ABI"


def test_packages_are_looked_for_once(fresh):
    before = peers.find()
    fresh.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    assert peers.find() == before


def test_found_packages_compete(fresh):
    cupy = types.ModuleType("cupy")
    cupy.__version__ = "1.2"
    fresh.setitem(sys.modules, "cupy", cupy)
    for name in ("cupyx", "cupyx.scipy", "cupyx.scipy.special"):
        fresh.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["cupyx.scipy.special"].softmax = scipy.special.softmax
    sys.modules["cupyx"].scipy = sys.modules["cupyx.scipy"]
    sys.modules["cupyx.scipy"].special = sys.modules["cupyx.scipy.special"]
    assert peers.find()[0] == {"cupy": "1.2"}
    names = [contestant.name for contestant in peers.contestants("softmax")]
    assert names == ["cupyx.scipy.special", "CuPy expression"]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="softmaxx"):
        peers.contestants("softmaxx")
    with pytest.raises(ValueError, match="k must be given for top_k"):
        peers.contestants("top_k")


# -- torch, JAX and Triton, where they are installed ---------------------------------------------

GPU_ONLY = {"torch SDPA cuDNN", "torch SDPA efficient", "jax.nn cuDNN"}


def refuses(name, dtype):
    """What a contestant does not take on the CPU."""
    return name in GPU_ONLY or (name, dtype) == ("jax.nn XLA", "float64")


def elsewhere(name, dtype):
    """What has a test of its own, and what XLA cannot compile for the CPU."""
    return name.startswith("torch.compile") or (name, dtype) == ("jax.nn XLA", "float16")


def installed(name):
    """The library, as it is found."""
    pytest.importorskip(name)
    found = peers._libraries()[0]
    assert name in found, peers.find()[1]
    return found[name]


@cases
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_contestants(name, operation, causal, dtype, rng):
    arrays = inputs(operation, rng, dtype, causal=causal)
    contestants = list(installed(name).contestants(operation, *options(operation, causal)))
    assert contestants or (name, operation) in [
        ("jax", "attention_backward"),
        ("jax", "attention_column_sums"),
        ("jax", "attention_kvcache"),
    ]
    for contestant in contestants:
        if refuses(contestant.name, dtype):
            with pytest.raises(peers.Unsupported):
                run(contestant, arrays)
        elif not elsewhere(contestant.name, dtype):
            check(operation, run(contestant, arrays), arrays, causal)


@pytest.mark.slow
@pytest.mark.parametrize("operation", [n for n, _ in CASES if n[:9] != "attention"])
def test_torch_compile(operation, rng):
    """Also more shapes than it compiles for by itself."""
    contestants = list(installed("torch").contestants(operation, *options(operation)))
    compiled = [one for one in contestants if one.name.startswith("torch.compile")]
    assert len(compiled) == {"top_k": 0, "softmax_topk": 2}.get(operation, 1)
    for contestant in compiled:
        for cols in range(131, 142) if operation == "logsumexp" else (131,):
            arrays = inputs(operation, rng, "float32", shape=(13, cols))
            check(operation, run(contestant, arrays), arrays)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_arrays_pass_unchanged(name, dtype, rng):
    library, array = installed(name), random(rng, 3, 129, dtype=dtype)
    native = library.asarray(array)
    assert str(native.dtype).removeprefix("torch.") == dtype
    got = library.asnumpy(native)
    assert got.dtype.name == ("float32" if (name, dtype) == ("torch", "bfloat16") else dtype)
    np.testing.assert_array_equal(got.astype(np.float64), array.astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_shares_the_memory(dtype, rng):
    library, array = installed("torch"), random(rng, 3, 129, dtype=dtype)
    assert library.asarray(array).data_ptr() == array.ctypes.data


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_no_graph_without_a_stream(name):
    library = installed(name)
    with pytest.raises(peers.Unsupported, match="CUDA graphs"):
        library.capture(lambda: None, None)
    assert library.clock == ("host" if name == "jax" else "events")


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_other_causal_masks_are_unsupported(name, rng):
    q, k, v = (random(rng, 1, 2, n, 16, dtype="float32") for n in (3, 7, 7))
    for contestant in installed(name).contestants("attention", None, True):
        if contestant.name == "torch":
            check("attention", run(contestant, [q, k, v]), [q, k, v], causal=True)
        else:
            with pytest.raises(peers.Unsupported):
                run(contestant, [q, k, v])


INTERPRET = """
import pickle, sys
sys.path += ["tests", "tests/benchmarks"]
import numpy as np
from bench.peers import _triton
from test_peers import check, inputs, run
rng, library = np.random.default_rng(int(sys.argv[1])), _triton.Triton()
(softmax,) = library.contestants("softmax", None, False)
for dtype in ("float16", "bfloat16", "float32"):
    x = inputs("softmax", rng, dtype)
    check("softmax", run(softmax, x), x)
for causal in (False, True):
    (attention,) = library.contestants("attention", None, causal)
    qkv = inputs("attention", rng, "float16", causal=causal)
    check("attention", run(attention, qkv), qkv, causal)
qkv = [a[:, :, :n] for a, n in zip(qkv, (21, 61, 61), strict=True)]
qkv = [np.ascontiguousarray(a) for a in qkv]
check("attention", run(attention, qkv), qkv, causal=True)
print("right")
"""


def test_triton_kernels_in_the_interpreter(rng):
    """In a process of its own, since Triton decides at its import; bfloat16 products it cannot."""
    installed("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRET, str(rng.integers(2**32))],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        text=True,
        capture_output=True,
    )
    assert done.stdout.strip() == "right", done.stderr


@pytest.mark.parametrize(
    ("operation", "dtype", "shape", "match"),
    [
        ("softmax", "float64", (3, 5), "not float64"),
        ("softmax", "float32", (1, 65537), "65537"),
        ("attention", "float32", (1, 1, 8, 16), "not float32"),
        ("attention", "float16", (1, 1, 8, 24), "24"),
    ],
)
def test_triton_refuses(operation, dtype, shape, match, rng):
    library = installed("triton")
    (contestant,) = library.contestants(operation, None, False)
    arrays = [random(rng, *shape, dtype=dtype) for _ in peers.OPERATIONS[operation]]
    with pytest.raises(peers.Unsupported, match=match):
        run(contestant, arrays)


def test_triton_refuses_rows_that_are_not_contiguous(rng):
    library = installed("triton")
    (contestant,) = library.contestants("softmax", None, False)
    x = library.asarray(rng.standard_normal((5, 3), np.float32))
    with pytest.raises(peers.Unsupported, match="contiguous"):
        contestant.call(x.mT)


# -- packages of GPU kernels, replaced by stubs --------------------------------------------------


def stub_attention(q, k, v, causal=False):
    """(batch, seqlen, heads, head_dim) in and out, contiguous."""
    import torch

    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    dtype = q.dtype
    q, k, v = (a.transpose(1, 2).double() for a in (q, k, v))
    k, v = (a.repeat_interleave(q.shape[1] // a.shape[1], 1) for a in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool)
    hidden = hidden.triu(1 + k.shape[2] - q.shape[2]) if causal else ~hidden
    out = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v
    return out.transpose(1, 2).to(dtype)


def stub_cache(q, k, v, cache_seqlens=None, page_table=None, causal=False):
    """Pages (pages, page_size, heads, head_dim); FlashAttention 3 aligns to the bottom right."""
    import torch

    assert q.is_contiguous() and k.is_contiguous() and cache_seqlens.dtype == torch.int32
    if page_table is None:
        page_table = torch.arange(len(k), dtype=torch.int32)[:, None]
    q, k, v = (a.transpose(1, 2).numpy() for a in (q, k, v))
    out = cached_attention(q, k, v, cache_seqlens.tolist(), page_table.numpy(), causal)
    return torch.from_numpy(out).transpose(1, 2).to(torch.from_numpy(q).dtype)


class StubDecode:
    plans = 0

    def __init__(self, workspace, layout, use_tensor_cores=False):
        assert workspace.nbytes == 128 * 2**20 and layout == "HND" and use_tensor_cores

    def plan(self, indptr, indices, last, heads, kv_heads, head_dim, page_size, *, q_data_type,
             kv_data_type):  # fmt: skip
        StubDecode.plans += 1
        counts = indptr.diff()
        self.lens = ((counts - 1) * page_size + last).tolist()
        self.pages = [p.tolist() for p in indices.split(counts.tolist())]
        self.expected = (heads, kv_heads, head_dim, page_size, q_data_type, kv_data_type)

    def run(self, q, cache):
        import torch

        k, v = cache
        assert self.expected == (q.shape[1], *k.shape[1:4:2], k.shape[2], q.dtype, k.dtype)
        longest = max(map(len, self.pages))
        table = np.array([p + [0] * (longest - len(p)) for p in self.pages])
        arrays = q[:, :, None].numpy(), k.numpy(), v.numpy()
        return torch.from_numpy(cached_attention(*arrays, self.lens, table, True)[:, :, 0]).to(
            q.dtype
        )


def stub_samplers():
    """Of FlashInfer: indices in int32 from Gumbel noise, among what the filters leave."""
    import torch

    def draw(logits, indices=None, *, seed, offset, top_k=None, top_p=None, min_p=None):
        assert seed.dtype == offset.dtype == torch.int64
        assert seed.shape == offset.shape == (len(logits),)
        keep = may_draw(logits.numpy(), top_k, None if top_p == 1 else top_p, min_p)
        logits = logits.masked_fill(~torch.from_numpy(keep), -torch.inf)
        noise = torch.from_numpy(np.random.default_rng().gumbel(size=logits.shape))
        return (logits + noise).argmax(-1).int()

    def from_probs(filter=None):
        def sampler(probs, *value, **how):
            assert probs.dtype == torch.float32 and abs(probs.sum(-1) - 1).max() < 1e-5
            return draw(probs.log(), **dict(zip([filter], value)), **how)  # noqa: B905

        return sampler

    filters = {f"{name}_sampling_from_probs": from_probs(name) for name in Filters._fields}
    return {
        "sampling_from_logits": draw,
        "sampling_from_probs": from_probs(),
        "top_k_top_p_sampling_from_logits": lambda logits, top_k, top_p, **how: draw(
            logits, top_k=top_k, top_p=top_p, **how
        ),
        **filters,
    }


class StubWrapper:
    plans = 0

    def __init__(self, workspace, layout):
        assert workspace.nbytes == 128 * 2**20 and layout == "NHD"

    def plan(self, qo, kv, heads, kv_heads, head_dim, *, head_dim_vo, causal, q_data_type):
        StubWrapper.plans += 1
        self.lengths, self.causal = (qo.diff().tolist(), kv.diff().tolist()), causal
        self.expected = (heads, kv_heads, head_dim, head_dim_vo, q_data_type)

    def run(self, q, k, v):
        import torch

        assert self.expected == (q.shape[1], k.shape[1], q.shape[2], v.shape[2], q.dtype)
        parts = zip(q.split(self.lengths[0]), *(a.split(self.lengths[1]) for a in (k, v)))  # noqa: B905
        done = [stub_attention(*(a[None] for a in part), self.causal)[0] for part in parts]
        return torch.cat(done)


@pytest.fixture
def stubs(monkeypatch):
    """All packages, each with the function that we call, in the signature of its wheel."""
    torch = pytest.importorskip("torch")

    def module(name, version="0", **contents):
        made = types.ModuleType(name)
        made.__dict__.update(contents, __version__=version, __path__=[])
        monkeypatch.setitem(sys.modules, name, made)
        return made

    def loss(x, target, ignore_index=-100):
        assert target.dtype == torch.int64 and target.dim() == 1
        return torch.nn.functional.cross_entropy(x.float(), target, reduction="none")

    def loss_backward(x, target, dloss, lse, ignore_index=-100):
        hit = torch.nn.functional.one_hot(target, x.shape[1])
        return dloss[:, None] * (torch.exp(x - lse[:, None]) - hit)

    def liger(input, target, reduction="mean"):
        return torch.nn.functional.cross_entropy(input, target, reduction=reduction)

    def topk(x, k, softmax=False):
        assert k == 2 ** int(np.log2(k)), "k must be a power of 2"
        return torch.topk(x, k)

    def top_k(input, k, sorted=False):
        return torch.topk(input, k, sorted=sorted)

    with_lse = {"flash_attn_func": lambda *args, **kw: (stub_attention(*args, **kw), None)}
    cute = module("flash_attn.cute", **with_lse)
    module("flash_attn", "2", flash_attn_func=stub_attention, cute=cute)
    cached = {"flash_attn_with_kvcache": stub_cache}
    module("flash_attn_interface", flash_attn_func=stub_attention, **cached)
    module("quack", "5", softmax=lambda x: torch.softmax(x, -1))
    module("quack.softmax", softmax_bwd=lambda dy, y: y * (dy - (dy * y).sum(-1, keepdim=True)))
    module("quack.topk", topk=topk)
    module("quack.cross_entropy", cross_entropy_fwd=loss, cross_entropy_bwd=loss_backward)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        module(name)
    module("liger_kernel.transformers.functional", liger_cross_entropy=liger)
    softmax = lambda logits: torch.softmax(logits.float(), -1)  # noqa: E731
    wrapper = {"BatchPrefillWithRaggedKVCacheWrapper": StubWrapper}
    wrapper["BatchDecodeWithPagedKVCacheWrapper"] = StubDecode
    module("flashinfer", "6", softmax=softmax, top_k=top_k, **wrapper, **stub_samplers())
    from bench.peers import _wheels

    versions = {"flash_attn_3": "3", "flash-attn-4": "4", "liger_kernel": "7"}
    monkeypatch.setattr(_wheels.metadata, "version", versions.get)
    names = ["FlashAttention2", "FlashAttention3", "FlashAttention4", "Quack", "FlashInfer"]
    names.append("Liger")
    return [getattr(_wheels, name)() for name in names]


@cases
def test_wheels_are_called_as_they_are_to_be(stubs, operation, causal, rng):
    assert [library.version for library in stubs] == ["2", "3", "4", "5", "6", "7"]
    contestants = [
        one for each in stubs for one in each.contestants(operation, *options(operation, causal))
    ]
    counts = {"softmax": 2, "softmax_backward": 1, "top_k": 2, "softmax_topk": 1, "attention": 4}
    counts |= {"attention_backward": 3, "attention_kvcache": 2}
    counts |= {"cross_entropy": 2, "cross_entropy_backward": 1}
    assert len(contestants) == counts.get(operation, 0)
    dtype = "float16" if operation[:9] == "attention" else "float32"
    arrays = inputs(operation, rng, dtype, causal=causal)
    for contestant in contestants:
        if contestant.name == "quack" and operation == "top_k":
            with pytest.raises(peers.Unsupported, match="power of 2"):
                run(contestant, arrays)
        else:
            check(operation, run(contestant, arrays), arrays, causal)


def test_flashinfer_plans_once_for_a_shape(stubs, rng):
    (contestant,) = stubs[4].contestants("attention", None, True)
    before = StubWrapper.plans
    for _ in range(3):
        arrays = inputs("attention", rng, "float16", causal=True)
        check("attention", run(contestant, arrays), arrays, causal=True)
    assert StubWrapper.plans == before + 1
    shorter = [np.ascontiguousarray(a[:, :, :17]) for a in arrays]
    check("attention", run(contestant, shorter), shorter, causal=True)
    assert StubWrapper.plans == before + 2


def paged(rng, dtype, rows=1):
    """Pages of 16 keys in any order, of sequences of many lengths."""
    q = random(rng, 3, 6, rows, 32, dtype=dtype)
    caches = [random(rng, 11, 3, 16, 32, dtype=dtype) for _ in range(2)]
    table = rng.permutation(11)[:9].reshape(3, 3).astype(np.int32)
    return [q, *caches, np.array([40, 7, 16], np.int32), table]


def test_peers_of_pages(stubs, rng):
    """What has no pages, or not these queries and values, says so; a plan is made once."""
    libraries = {
        "cuattn": Cupy(np, scipy.special),
        "flash_attn 3": stubs[1],
        "flashinfer": stubs[4],
    }
    for name, library in libraries.items():
        for rows in (1, 3):
            (contestant,) = library.contestants("attention_kvcache", None, True)
            arrays, before = paged(rng, "float16", rows), StubDecode.plans
            if name == "flashinfer" and rows > 1:
                with pytest.raises(peers.Unsupported, match="one query"):
                    run(contestant, arrays)
                continue
            for _ in range(2):
                check("attention_kvcache", run(contestant, arrays), arrays, True)
            assert StubDecode.plans == before + (name == "flashinfer")
            arrays[2] = arrays[2][:0]  # values that are columns of the keys
            with pytest.raises(peers.Unsupported, match="takes"):
                run(*library.contestants("attention_kvcache", None, True), arrays)
    for contestant in installed("torch").contestants("attention_kvcache", None, True):
        for arrays in (paged(rng, "float16"), inputs("attention_kvcache", rng, "float16")):
            arrays[3] = np.array([40, 7, 16][: len(arrays[0])], np.int32)
            with pytest.raises(peers.Unsupported, match="takes no (pages|lengths)"):
                run(contestant, arrays)


def test_wheels_refuse_other_dtypes(stubs, rng):
    for library in stubs:
        for operation in ("attention", "attention_kvcache"):
            for contestant in library.contestants(operation, None, False):
                with pytest.raises(peers.Unsupported, match="not float32"):
                    run(contestant, inputs(operation, rng, "float32"))


# -- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@cases
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_contestants_on_the_gpu(operation, causal, dtype, rng):
    """Results on our stream, and again from a replayed graph, where the contestant can."""
    if reason := why_no_gpu():
        pytest.skip(reason)
    import cupy

    arrays = inputs(operation, rng, dtype, causal=causal)
    on_device, stream = [cupy.asarray(a) for a in arrays], cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    ran = []
    for contestant in peers.contestants(operation, k=K, causal=causal):
        library = contestant.library
        try:
            check(operation, run(contestant, on_device, stream), arrays, causal)
        except peers.Unsupported as error:
            if "the software device cannot run" in str(error):
                ran.append(contestant.name)  # as far as it can
            continue
        ran.append(contestant.name)
        with contextlib.suppress(peers.Unsupported):
            native, kept = [library.asarray(a) for a in on_device], []
            call = lambda: kept.append(contestant.call(*native))  # noqa: B023, E731
            assert library.peak_bytes(call) != 0
            replay = library.capture(call, stream)
            with library.on_stream(stream):
                replay()
            library.wait(kept[-1])
            check(operation, on_host(library, kept[-1]), arrays, causal)
    assert ran
