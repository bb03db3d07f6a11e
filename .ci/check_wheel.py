"""Is the installed package whole, and light to import? Argument: the checkout it was built from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cuattn
from cuattn._device import compiler

LIMIT = 0.1  # seconds that `import cuattn` may take after `import numpy`
IMPORT = """
import sys, time, numpy
start = time.perf_counter()
import cuattn
later = {"cupy", "ml_dtypes", "scipy", "concurrent.futures", "cuattn._device.compiler"}
later |= {f"cuattn.{function}.plan" for function in ("_attention", "_softmax", "_topk")}
print(time.perf_counter() - start, *later & set(sys.modules))
"""


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.suffix not in (".py", ".pyc"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


checkout, package = Path(sys.argv[1]).resolve(), Path(cuattn.__file__).resolve().parent
assert "site-packages" in package.parts, f"this is not the installed package: {package}"
sources = contents(checkout / "cuda_src")
assert sources and contents(package / "cuda_src") == sources, "cuda_src in the wheel differs"
assert compiler.source_directory() == package / "cuda_src", compiler.source_directory()
data = contents(checkout / "cuattn")
assert "py.typed" in data and data.items() <= contents(package).items(), "package data is missing"

runs = [subprocess.check_output([sys.executable, "-c", IMPORT], text=True) for _ in range(5)]
times, heavy = [float(run.split()[0]) for run in runs], runs[0].split()[1:]
assert not heavy, f"import cuattn imports {heavy}"
assert min(times) < LIMIT, f"import cuattn takes {min(times):.3f} s"
number = sum(name.endswith(".cuh") for name in sources)
print(f"{number} CUDA sources, import in {1e3 * min(times):.0f} ms beyond NumPy")
