"""cuattn.compile: what calls on NumPy arrays give and need within it, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import on_a_gpu, software_arch

import cuattn
from cuattn._device import cache, compile_command, compiler, presets, recorder
from cuattn._device import runtime as device_runtime
from cuattn._device.kernel import Limits

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def made(monkeypatch):
    """(name, target) of what was asked of the cache; nothing is compiled."""
    asked = []

    def load_or_compile(header, name, arch, text, *, always=False):
        assert always
        asked.append((name, arch))
        return Path("file"), b""

    monkeypatch.setattr(cache, "load_or_compile", load_or_compile)
    monkeypatch.setattr(compiler, "architecture", lambda capability: f"sm_{capability}")
    return asked


X = np.ones((8, 1000), np.float32)
Q = np.ones((2, 4, 128, 64), np.float16)


# ---- Within the block ----


def test_results_are_zeros(made):
    """Of the shapes and dtypes of the call; they can go into the next one."""
    with cuattn.compile(arch=90):
        y, lse = cuattn.attention(Q, Q, Q, return_lse=True)
        merged, _ = cuattn.merge_attention(y, lse, y, lse)
        best = cuattn.softmax_topk(X, 5)
    for got, like in ((y, Q), (lse, np.ones((2, 4, 128), np.float32)), (merged, Q)):
        assert (type(got), got.shape, got.dtype) == (np.ndarray, like.shape, like.dtype)
        assert not got.any()
    assert best.values.shape == best.indices.shape == (8, 5) and best.indices.dtype == np.int64
    assert len({name for name, _ in made}) == 3


def test_text_goes_with_its_kernel(made, monkeypatch):
    """A score expression's: in Hopper's kernel, in the general one and over a KV cache."""
    asked = []
    monkeypatch.setattr(cache, "load_or_compile", lambda *kernel, always: asked.append(kernel))
    with cuattn.compile(arch=90) as kernels:
        for _ in range(2):
            cuattn.attention(Q, Q, Q, score="s + 1")
            cuattn.attention(Q, Q, Q, score="s + 1", mask=np.ones(128, bool))
            cuattn.attention_kvcache(Q[:, :, :1], Q, Q, score="s + 1")
    assert [header.split("/")[1] for header, *_ in asked] == [
        "forward_sm90.cuh",
        "forward.cuh",
        "decode.cuh",
    ]
    assert [name for _, name, *_ in asked] == kernels
    struct = f"struct {kernels[0].split()[-1][:-1]} {{"
    assert "Score_" in struct and all(text.count(struct) == 1 for *_, text in asked)


def test_out_is_returned_as_it_is(made):
    out = np.full_like(X, 3)
    with cuattn.compile(arch=90):
        assert cuattn.softmax(X, out=out) is out
    assert (out == 3).all() and len(made) == 1


def test_calls_are_checked(made):
    with pytest.raises(TypeError, match="x must be"), cuattn.compile(arch=90):
        cuattn.softmax(X)
        cuattn.softmax([1, 2])
    assert made == [] and device_runtime.recorders == {}


def test_kernels_come_at_the_end_and_once(made):
    with cuattn.compile(arch="sm_90") as kernels:
        for _ in range(3):
            cuattn.attention(Q, Q, Q)
            cuattn.softmax(X)
        assert kernels == [] and made == []
    assert len(kernels) == 2 and [name for name, _ in made] == kernels
    assert [target for _, target in made] == ["sm_90a", "sm_90"]


def test_behind_the_block_all_is_as_before(made):
    expected = cuattn.softmax(X)
    with cuattn.compile(arch=90):
        assert not cuattn.softmax(X).any()
    assert (cuattn.softmax(X) == expected).all() and expected.any()


def test_blocks_within_blocks(made):
    with cuattn.compile(arch=90) as outer:
        with cuattn.compile(arch=80) as inner:
            cuattn.attention(Q, Q, Q)
        cuattn.softmax(X)
    assert [target for _, target in made] == ["sm_80", "sm_90"]
    assert len(outer) == len(inner) == 1 and device_runtime.recorders == {}


def test_other_threads_compute(made):
    """And those in a block of their own compile for it."""
    found = {}

    def computes():
        found["y"] = cuattn.softmax(X)

    def compiles():
        with cuattn.compile(arch=80):
            found["zeros"] = cuattn.attention(Q, Q, Q)

    with cuattn.compile(arch=90):
        for work in (computes, compiles):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        cuattn.top_k(X, 3)
    assert np.allclose(found["y"], 1e-3) and not found["zeros"].any()
    assert [target for _, target in made] == ["sm_80", "sm_90"]


@pytest.mark.parametrize("inside", [False, True])
def test_the_block_comes_before_the_emulator(inside, made):
    emulator = pytest.importorskip("emulator")
    with emulator.activate(arch="sm_80") as runtime:
        with cuattn.compile(arch=90):
            cuattn.softmax(X)
        assert runtime.kernels == []
        assert device_runtime.runtime_of(X) is runtime
    assert device_runtime.runtime_of(X) is None


# ---- Its arguments ----


@pytest.mark.parametrize("arch", [90, "90", "sm_90", "sm_90a", np.int64(90)])
def test_arch(arch):
    assert recorder.limits_of(arch, None) == (90, 132)
    assert recorder.limits_of(arch, 78) == (90, 78)


@pytest.mark.parametrize(
    ("arch", "num_sms", "error", "words"),
    [
        (None, None, TypeError, "arch must be a compute capability such as 90 or 'sm_90'"),
        (9.0, None, TypeError, "arch must be .* it is 9.0"),
        (True, None, TypeError, "arch must be"),
        ("9.0", None, ValueError, "arch must be .* it is '9.0'"),
        ("compute_90", None, ValueError, "arch must be"),
        (9, None, ValueError, "arch must be .* it is 9"),
        (91, None, ValueError, "num_sms must be given for arch 91"),
        (90, 0, ValueError, "num_sms must be"),
        (90, -1, ValueError, "num_sms must be"),
        (90, 1.5, TypeError, "num_sms must be"),
    ],
)
def test_bad_arguments(arch, num_sms, error, words):
    with pytest.raises(error, match=words), cuattn.compile(arch=arch, num_sms=num_sms):
        pass


# ---- As on a device ----


def shapes_and_options(dtype):
    """Calls (function, arrays, options) of every function: large, small, misaligned, with `out`."""
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.standard_normal(shape).astype(dtype)

    for shape in ((4, 33), (1, 50257), (12, 30_000), (300, 1000), (2, 2**17), (5000, 64)):
        x, y = array(*shape), array(*shape)
        for axis in (-1, 0):
            yield "softmax", (x,), {"axis": axis}
            yield "log_softmax", (x,), {"axis": axis, "where": x > 0}
            yield "softmax_backward", (x, y), {"axis": axis}
            yield "log_softmax_backward", (x, y), {"axis": axis}
            yield "softmax_state", (x,), {"axis": axis}
            yield "logsumexp", (x,), {"axis": axis, "b": y}
            yield "entropy", (x,), {"axis": axis, "where": x > 0}
            row = np.zeros(shape[0 if axis else 1], np.int32)
            yield "cross_entropy", (x, row), {"axis": axis}
            yield "logits_state", (x, row.astype(np.int64)), {"axis": axis}
            lse = row.astype(np.promote_types(np.float32, dtype))
            yield "cross_entropy_backward", (0.5, x, row, lse), {"axis": axis}
        yield "softmax", (x[:, 1:],), {"return_lse": True}
        yield "softmax", (x,), {"out": np.empty_like(x)}
        for k in (1, 20, 33, 300):
            if k <= shape[1]:
                yield "top_k", (x, k), {}
                yield "softmax_topk", (x[:, ::-1], k), {}
                yield "softmax_topk_state", (x, k), {}
                yield "sample", (x, k), {"seed": 1}
                yield "sample_state", (x, k), {"seed": 1}
    ends = np.array([0, 3, 40, 64])
    x = array(64, 2)
    yield "segment_softmax", (x, ends), {}
    yield "segment_softmax_backward", (x, x, ends), {}
    state = array(64).astype(np.promote_types(np.float32, dtype))
    states = cuattn.SoftmaxState(state, state), cuattn.SoftmaxState(state, state)
    yield "merge", states, {}
    yield "merge", (cuattn.LogitsState(*[state] * 4),) * 2, {}
    for dim in (64, 80, 128):
        q, k, v = array(2, 8, 100, dim), array(2, 2, 300, dim), array(2, 2, 300, dim)
        lse = array(2, 8, 100).astype(state.dtype)
        for options in ({}, {"is_causal": True}, {"window": (16, 0), "bias": array(100, 300)}):
            yield "attention", (q, k, v), options
            yield "attention_backward", (q, q, k, v, q, lse), options
            yield "attention_column_sums", (q, k, lse), options
        yield "attention", (q[..., 1:], k[..., 1:], v), {}
        yield "attention", (q, k, v), {"block_mask": cuattn.block_mask(np.ones((100, 300), bool))}
        yield "block_mask", ("d[q] < d[k]", 100, 300), {"args": {"d": array(300)}}
        yield "attention", (q, k, v), {"out": np.empty_like(q)}
        yield "attention", (q[:, :, :1], *(np.repeat(a, 8, axis=2) for a in (k, v))), {}
        rows = [np.ascontiguousarray(a[0].swapaxes(0, 1)) for a in (q, k, v)]
        ends = np.array([0, 40, 100]), np.array([0, 40, 300])
        yield "attention_varlen", (*rows, *ends), {"is_causal": True}
        lse = np.ascontiguousarray(lse[0])
        score = {
            "score": "s + t[h, q - k]",
            "score_args": {"t": array(8, 9)},
            "return_dscore": True,
        }
        for options in ({}, score):
            yield "attention_backward_varlen", (rows[0], *rows, rows[0], lse, *ends), options
        new, lens = array(2, 2, 1, dim), np.array([7, 299])
        table = np.arange(8).reshape(2, 4)
        pages = array(8, 2, 64, dim), array(8, 2, 64, dim)
        for caches, more in (((k, v), {}), (pages, {"page_table": table})):
            given = {"kv_lens": lens % 256, **more}
            yield "attention_kvcache", (q[:, :, :1], *caches), given
            yield "attention_kvcache", (q[:, :, :1], *caches), {"k_new": new, "v_new": new, **given}
            yield "kv_append", (*caches, new, new), given
        yield "attention_cascade", (q[:, :, :1], [(k[0], v[0])], k, v), {}
        yield "attention_topk", (q, k, 5), {"is_causal": True}
        yield "attention_topk", (q[:, :, :1], k, 65), {"output": "state"}
        outs, lses = array(3, 2, 8, 100, dim), array(3, 2, 8, 100).astype(state.dtype)
        yield "merge_attention", (outs[0], lses[0], outs[1], lses[1]), {}
        yield "merge_attention_states", (outs, lses), {}


def on(xp, value):
    """Arrays in nested arguments, on a device; views stay what they are."""
    if isinstance(value, np.ndarray):
        owner = value.base if isinstance(value.base, np.ndarray) else value
        moved = xp.asarray(owner)
        start = moved.data + (
            value.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
        )
        return xp.ndarray(value.shape, value.dtype, start, value.strides)
    if isinstance(value, (tuple, list)):
        items = [on(xp, one) for one in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return {name: on(xp, one) for name, one in value.items()} if type(value) is dict else value


@on_a_gpu
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_same_kernels_as_on_a_device(backend, dtype, monkeypatch):
    """Of every function, call by call; on the device they are planned and not launched."""
    launched = []

    def launch(self, kernel, params, reads, writes):
        launched.append((kernel.name, kernel.suffix))

    cuda = device_runtime._cuda()
    monkeypatch.setattr(device_runtime.Cuda, "launch", launch)
    monkeypatch.setattr(cuda, "recent", type(cuda.recent)())
    limits, functions = cuda.limits(0), set()
    for name, arrays, options in shapes_and_options(dtype):
        launched.clear()
        getattr(cuattn, name)(*on(backend.xp, arrays), **on(backend.xp, options))
        with recorder.recording(limits) as recorded:
            getattr(cuattn, name)(*arrays, **options)
        needed = dict.fromkeys(launched)
        about = name, [getattr(a, "shape", a) for a in arrays], [*options]
        assert (list(recorded.kernels), about) == ([*needed], about) and needed
        functions.add(name)
    assert functions == {n for n in cuattn.__all__ if n.islower()} - {
        "compile",
        "reference",
        "show_config",
    }


CALLS = """
import logging, os, sys
import numpy as np
import cuattn

os.environ["CUATTN_CACHE_DIR"] = sys.argv[1]
rng = np.random.default_rng(0)
x, q = rng.standard_normal((40, 300)).astype("f4"), rng.standard_normal((2, 32, 64)).astype("f2")

def calls(to):
    a, b = to(x), to(q)
    return cuattn.softmax(a), *cuattn.softmax_topk(a, 3)[:2], cuattn.attention(b, b, b)
"""
FILL = """
with cuattn.compile(arch=sys.argv[2], num_sms=int(sys.argv[3])):
    calls(np.asarray)
"""
# No NVRTC, no headers, and no compilation.
USE = """
import cupy
from cupy.cuda import nvrtc
import cuda.pathfinder

def gone(*args):
    raise RuntimeError("NVRTC is gone")

for name in ("createProgram", "compileProgram", "getVersion", "getSupportedArchs"):
    assert hasattr(nvrtc, name)
    setattr(nvrtc, name, gone)
cuda.pathfinder.find_nvidia_header_directory = lambda name: None
logging.basicConfig(level=logging.DEBUG, format="%(levelname)s %(name)s %(message)s")
logging.getLogger("cuattn").setLevel(logging.DEBUG)
for got, expected in zip(calls(cupy.asarray), calls(np.asarray), strict=True):
    assert np.allclose(got.get().astype("f4"), expected.astype("f4"), atol=1e-2)
"""


@on_a_gpu
@pytest.mark.parametrize("mode", ["auto", "never"])
def test_a_filled_cache_runs_without_a_compiler(backend, mode, tmp_path):
    """In another process, in which there is neither NVRTC nor its headers."""
    python = [sys.executable, *([str(ROOT / "tests/software_device")] if software_arch() else [])]
    limits = device_runtime._cuda().limits(0)

    def run(code, folder):
        (tmp_path / "script.py").write_text(CALLS + code)
        arguments = [tmp_path / "script.py", folder, *map(str, limits)]
        paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
        environment = {**os.environ, "CUATTN_COMPILE": mode, "PYTHONPATH": paths}
        return subprocess.run(
            [*python, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
        )

    folder = tmp_path / "cache"
    filled = run(FILL, folder)
    assert (filled.returncode, filled.stderr) == (0, "")
    kernels = len(list(folder.iterdir()))
    folder.chmod(0o555)
    used = run(USE, folder)
    assert used.returncode == 0, used.stderr
    assert used.stderr.count("DEBUG cuattn found ") == kernels == 3
    assert "INFO cuattn" not in used.stderr
    empty = run(USE, tmp_path / "empty")
    assert empty.returncode != 0 and "CompileError: softmax_rows<" in empty.stderr
    reason = "CUATTN_COMPILE is never" if mode == "never" else "NVRTC is gone"
    assert reason in empty.stderr and "INFO cuattn" not in empty.stderr


# ---- python -m cuattn compile ----


@pytest.fixture
def small(monkeypatch):
    """Presets of one kernel for each dtype, and of none."""

    def rows(cuattn, dtype):
        cuattn.softmax(np.zeros((4, 100), dtype))

    found = {"softmax": rows, "nothing": lambda cuattn, dtype: None}
    monkeypatch.setattr(compile_command, "PRESETS", found)


def test_the_command(small, made, capsys):
    """Every architecture, dtype and preset."""
    assert compile_command.main(["--arch", "80,sm_90", "--jobs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [target for _, target in made] == ["sm_80"] * 3 + ["sm_90"] * 3
    assert lines[0].startswith("6 kernels into ") and lines[-1].startswith("6 kernels in the cache")
    for number, (line, (name, target)) in enumerate(zip(lines[1:-1], made, strict=True), 1):
        assert line.startswith(f"[{number}/6] {target} ") and line.endswith(f" s  {name}")


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        (["--preset", "nothing"], 0),
        (["--preset", "nothing,softmax"], 3),
        (["--dtype", "float64"], 1),
        (["--dtype", "float32, float64", "--num-sms", "7"], 2),
    ],
)
def test_its_options(options, kernels, small, made):
    assert compile_command.main(["--arch", "90", "--jobs", "1", *options]) == 0
    assert len(made) == kernels


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--arch"),
        (["--arch", "x"], "arch must be"),
        (["--arch", "91"], "num_sms must be given"),
        (["--arch", "90", "--preset", "soft"], "--preset must be of softmax, nothing, but it is"),
        (["--arch", "90", "--dtype", "int8"], "--dtype must be of float16, "),
        (["--arch", "90", "--num-sms", "0"], "num_sms must be"),
    ],
)
def test_its_bad_options(options, words, small, made, capsys):
    with pytest.raises(SystemExit) as end:
        compile_command.main(options)
    assert end.value.code == 2 and words in capsys.readouterr().err and made == []


def test_a_cache_that_cannot_be_written_is_a_failure(small, monkeypatch, capsys):
    monkeypatch.setattr(compiler, "architecture", lambda capability: f"sm_{capability}")
    monkeypatch.setattr(cache, "load_or_compile", lambda *kernel, always: (None, b""))
    assert compile_command.main(["--arch", "90", "--jobs", "1"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 kernels in the cache")


@pytest.mark.drawn
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("preset", presets.PRESETS)
def test_presets(arch, preset):
    """Each has kernels of its own in every dtype."""
    everything = set()
    for dtype in compile_command.DTYPES:
        tasks = list(compile_command.found([Limits(arch, 132)], [preset], [dtype]))
        names = {kernel.name for kernel, _ in tasks}
        assert names or (dtype == "bfloat16" and compile_command._dtype(dtype) is None)
        assert names - everything or not names
        assert len(tasks) == len(names) and {capability for _, capability in tasks} <= {arch}
        everything |= names


def test_processes_of_the_command(tmp_path):
    """A real compilation of real kernels, without a GPU; then they are found."""
    try:
        compiler.installed()
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"nothing to compile with: {error}")
    command = [sys.executable, "-m", "cuattn", "compile", "--arch", "80", "--preset", "decoding"]
    environment = {**os.environ, "CUATTN_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    written = []
    for _ in range(2):
        done = subprocess.run(
            [*command, "--dtype", "float32", "--jobs", "2"],
            capture_output=True,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        assert (done.returncode, done.stderr) == (0, "")
        files = sorted(tmp_path.iterdir())
        assert len(files) == done.stdout.count("  attention_") > 1
        written.append([(file.name, file.stat().st_mtime_ns) for file in files])
    assert written[0] == written[1]
