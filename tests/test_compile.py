"""Every configuration that the plans can ask for compiles for every architecture.

A spill fails, and so does every other line of ptxas that a good kernel does not cause.
"""

from __future__ import annotations

import re

import pytest
from configurations import TARGETS, kernels

from bench import inside
from cuattn import _nvrtc

cupy = pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")

PARTS = 6  # tests an architecture, so that processes can share the work

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


def compile_log(header: str, names: list[str], arch: str) -> str:
    """What ptxas -v says of these instantiations."""
    _, log, _ = inside.compile_together(header, names, arch, ("--ptxas-options=-v",))
    return log


def complaints(log: str) -> list[str]:
    """Lines of a compiler log that a good kernel does not cause, each after its kernel's name."""
    found, kernel = [], ""
    for line in (line.strip(" \0") for line in log.splitlines()):
        if "Compiling entry function" in line:
            kernel = line.split("'")[1]
        elif line and not EXPECTED.search(line):
            found.append(f"{kernel}: {line}")
    return found


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("arch", TARGETS)
def test_all_configurations(arch, part):
    chosen = inside.by_file(arch)[part::PARTS]
    assert sum(map(len, chosen)) > 50
    bad = []
    for group in chosen:
        log = compile_log(group[0].header, [kernel.name for kernel in group], arch)
        assert log.count("Used ") == len(group)  # else the gate would look at nothing
        bad += complaints(log)
    assert not bad


def test_one_module_one_kernel():
    kernel = next(iter(kernels(90).values()))
    cubin, _ = _nvrtc.compile_kernel(kernel.header, kernel.name, "sm_90")
    assert _nvrtc.kernel_symbol(cubin).startswith("_Z")


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
    (tmp_path / "softmax_rows.cuh").write_text(source)
    monkeypatch.setattr(_nvrtc, "source_directory", lambda: tmp_path)
    log = compile_log("softmax_rows.cuh", ["spills"], "sm_90")
    assert any("spill" in line for line in complaints(log))


def test_an_error_names_kernel_and_log():
    with pytest.raises(
        _nvrtc.CompileError, match=r"softmax_rows<int>.*softmax_rows\.cuh.*sm_80[\s\S]*error"
    ):
        _nvrtc.compile_kernel("softmax_rows.cuh", "softmax_rows<int>", "sm_80")
