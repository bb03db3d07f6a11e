"""PTX that a check of all configurations has left in cuattn's cache is not compiled once more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import software_device

from bench import inside

ROOT = Path(__file__).resolve().parents[2]
if software_device.device is None:
    pytest.skip("this process has no software device", allow_module_level=True)

SCRIPT = """
import cupy, cuattn, numpy
from cupy.cuda import nvrtc

create = nvrtc.createProgram

def refuse(source, name, *rest):
    assert name != "cuattn.cu", "a kernel of ours is compiled"
    return create(source, name, *rest)

nvrtc.createProgram = refuse
state = cuattn.SoftmaxState(cupy.asarray([0.0, 1.0], "f"), cupy.asarray([1.0, 2.0], "f"))
print(cuattn.merge(state, state).l.tolist())
"""


def test_alone():
    """One of two kernels; a block of assembly ends in a line of its own, as a kernel does."""
    head = ".version 9.0\n.visible .global .align 4 .b8 table[4] = {1, 2, 3, 4};\n"
    body = "(\n\t.param .u32 p\n)\n.maxntid 32\n{\n\t{\n.reg .pred q;\n}\n"
    body += "\tld.v2.u32 {a, b}, [c];\n\tret;\n\n}\n"
    one, other = (f"\t// .globl {name}\n.visible .entry {name}{body}" for name in ("one", "other"))
    assert inside.alone(head + one + other, "one") == head + one + "\t// .globl other\n"
    assert inside.alone(head + one + other, "other") == head + "\t// .globl one\n" + other


@pytest.mark.parametrize("left", [True, False])
def test_left_ptx(tmp_path, left):
    arch = f"sm_{os.environ['SOFTWARE_DEVICE_CC']}"
    ((kernel,),) = inside.by_file(arch, "^softmax_state_merge<float, false")
    environment = {**os.environ, "CUATTN_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("SOFTWARE_DEVICE_PTX", None)  # of this process
    script = tmp_path / "merge.py"
    script.write_text(SCRIPT)
    if left:
        compiled = (
            "from bench import inside; "
            f"inside.compile_together({kernel.header!r}, [{kernel.name!r}], {arch!r})"
        )
        subprocess.run([sys.executable, "-c", compiled], cwd=ROOT, env=environment, check=True)
    device = Path(environment["SOFTWARE_DEVICE_CACHE"])
    own = tmp_path / "device"  # the same, but for the kernels of earlier runs
    own.mkdir()
    for path in device.iterdir():
        if path.name != "kernels":
            (own / path.name).symlink_to(path)
    environment["SOFTWARE_DEVICE_CACHE"] = str(own)
    command = [sys.executable, "tests/software_device", str(script)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "[2.0, 4.0]\n" if left else "is compiled" in done.stderr, done.stderr
