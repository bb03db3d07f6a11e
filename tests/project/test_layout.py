"""The layout rules as tests: what may stand where, and who may include or import whom.

A rule is a function from files (path -> text) to its violations. Each is run twice: on the tree,
where it has to find nothing, and on a small planted fault, which it has to find.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA_HEADERS = {"cuda_fp16.h", "cuda_bf16.h"}
PYTHON_BUDGET, CUDA_BUDGET = 300, 350  # lines


def read(folder, pattern):
    """All files of a folder by their path in it."""
    base = ROOT / folder
    files = [path for path in sorted(base.rglob(pattern)) if path.is_file()]
    return {path.relative_to(base).as_posix(): path.read_text() for path in files}


# -- CUDA C ------------------------------------------------------------------------------------


@lru_cache
def code(text):
    """Text without comments and without the contents of string literals."""
    token = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    return re.sub(token, lambda m: '""' if m[0][0] == '"' else " ", text, flags=re.DOTALL)


# Folders of cuda_src, and what each may include beside itself. ("kernel": a file at the top, in
# bench/baselines.)
WINGS = {
    "softmax": ("primitives/", "ptx/"),
    "topk": ("softmax/", "primitives/", "ptx/"),
    "attention": ("primitives/", "ptx/"),
}
FOLDERS = {**WINGS, "primitives": ("ptx/",), "ptx": (), "kernel": ("primitives/", "ptx/")}


def layer(path):
    """The folder of a file; "kernel" for one at the top."""
    return Path(path).parts[0] if "/" in path else "kernel"


def includes(text):
    """What a file includes, with its brackets."""
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]*[>"])', text, flags=re.MULTILINE)


def own_includes(path, files):
    return [name[1:-1] for name in includes(files[path]) if name[1:-1] in files]


def asm_outside_ptx(files):
    word = re.compile(r"\b(asm|__asm__|__asm)\b")
    return [p for p, text in files.items() if layer(p) != "ptx" and word.search(code(text))]


def shared_outside_smem(files):
    return [p for p, t in files.items() if p != "ptx/smem.cuh" and "__shared__" in code(t)]


def quoted_include(files):
    return [f"{p}: {i}" for p, text in files.items() for i in includes(text) if i[0] == '"']


def include_direction(files):
    """As FOLDERS says, and no kernel; the CUDA headers for 16-bit types in numeric.cuh only."""
    wrong = []
    for path, text in files.items():
        folder = layer(path)
        own = () if folder == "ptx" else (f"{folder}/",)
        for name in (i[1:-1] for i in includes(text)):
            ours = name in files and name.startswith(FOLDERS[folder] + own)
            ours = ours and not kernels(files[name])
            if not ours and not (path == "primitives/numeric.cuh" and name in CUDA_HEADERS):
                wrong.append(f"{path}: {name}")
    return wrong


def include_cycle(files):
    """Files that reach themselves through what they include."""
    reached = {path: set(own_includes(path, files)) for path in files}
    for _ in files:
        for seen in reached.values():
            seen.update(*(reached[name] for name in list(seen)))
    return [path for path, seen in reached.items() if path in seen]


def conditional_code(files):
    """Only the architecture may be asked for, and only in ptx/: no #ifdef for the emulator."""
    line = re.compile(r"^\s*#\s*(?:if|ifdef|ifndef|elif)\b(.*)$", flags=re.MULTILINE)
    wrong = []
    for path, text in files.items():
        for condition in line.findall(code(text)):
            if layer(path) != "ptx" or set(re.findall(r"[A-Za-z_]\w*", condition)) - {
                "__CUDA_ARCH__",
                "defined",
            }:
                wrong.append(f"{path}: {condition.strip()}")
    return wrong


def kernels(text):
    """Names of the `__global__` functions of a file."""
    text = re.sub(r"(?:__launch_bounds__|\b[A-Z_]+)\s*\((?:[^()]|\([^()]*\))*\)", "", code(text))
    return re.findall(r"__global__[^;{]*?(\w+)\s*\(", text)


def kernel_per_file(files):
    """A file of a wing has at most one kernel, whose name is folder_file; one at the top has one of
    its own name; others have none."""
    wrong = []
    for path, text in files.items():
        allowed = [[Path(path).stem]] if layer(path) == "kernel" else [[]]
        if layer(path) in WINGS:
            allowed.append([f"{layer(path)}_{Path(path).stem}"])
        if kernels(text) not in allowed:
            wrong.append(f"{path}: {kernels(text)}")
    return wrong


def pragma_once(files):
    return [path for path, text in files.items() if code(text).split()[:2] != ["#pragma", "once"]]


def cuda_budget(files):
    return [p for p, text in files.items() if len(text.splitlines()) > CUDA_BUDGET]


CUDA_RULES = [
    (asm_outside_ptx, {"primitives/warp.cuh": '__device__ void f() { asm volatile("nop;"); }'}),
    (shared_outside_smem, {"softmax.cuh": "__global__ void softmax() { __shared__ float x[32]; }"}),
    (quoted_include, {"softmax.cuh": '#include "ptx/math.cuh"', "ptx/math.cuh": ""}),
    (include_direction, {"softmax/x.cuh": "#include <topk/x.cuh>", "topk/x.cuh": ""}),
    (include_direction, {"primitives/x.cuh": "#include <topk/x.cuh>", "topk/x.cuh": ""}),
    (
        include_direction,
        {"topk/x.cuh": "#include <topk/y.cuh>", "topk/y.cuh": "__global__ void topk_y(int a) {}"},
    ),
    (include_direction, {"primitives/x.cuh": "#include <cuda_fp16.h>"}),
    (include_direction, {"ptx/x.cuh": "#include <ptx/math.cuh>", "ptx/math.cuh": ""}),
    (include_direction, {"softmax.cuh": "#include <primitives/missing.cuh>"}),
    (include_direction, {"softmax.cuh": "#include <cuda/std/cstdint>"}),
    (
        include_cycle,
        {
            "primitives/a.cuh": "#include <primitives/b.cuh>",
            "primitives/b.cuh": "#include <primitives/c.cuh>",
            "primitives/c.cuh": "#include <primitives/a.cuh>",
        },
    ),
    (conditional_code, {"ptx/math.cuh": "#ifdef CUATTN_EMULATOR\n#endif"}),
    (
        conditional_code,
        {"ptx/math.cuh": "#if defined(__CUDA_ARCH__) && !defined(EMULATOR)\n#endif"},
    ),
    (conditional_code, {"softmax.cuh": "#if __CUDA_ARCH__ >= 900\n#endif"}),
    (kernel_per_file, {"softmax.cuh": "__global__ void softmax() {}\n__global__ void two() {}"}),
    (kernel_per_file, {"softmax.cuh": "template <int k> __global__ void other(int x) {}"}),
    (kernel_per_file, {"softmax.cuh": "// __global__ void softmax() {}"}),
    (kernel_per_file, {"primitives/x.cuh": "__global__ void __launch_bounds__(32) x(int a) {}"}),
    (kernel_per_file, {"topk/x.cuh": "__global__ void x(int a) {}"}),
    (pragma_once, {"softmax.cuh": "// #pragma once\n#include <ptx/math.cuh>"}),
    (cuda_budget, {"softmax.cuh": "\n" * (CUDA_BUDGET + 1)}),
]


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, _ in CUDA_RULES))
def test_cuda_sources_keep(rule):
    files = read("cuda_src", "*")
    del files["README.md"]  # nothing but this beside the sources
    assert {layer(path) for path in files} == {*FOLDERS} - {"kernel"}
    assert rule(files) == []


INCLUDE_RULES = (include_direction, include_cycle)  # baselines include <baselines/...>, too


@pytest.mark.parametrize(
    "rule", [rule for rule in dict.fromkeys(r for r, _ in CUDA_RULES) if rule not in INCLUDE_RULES]
)
def test_baselines_keep(rule):
    files = read("bench/baselines", "*.cuh")
    assert {layer(path) for path in files} == {"kernel", "primitives"}
    assert rule(files) == []


@pytest.mark.parametrize(("rule", "planted"), CUDA_RULES)
def test_cuda_rule_sees(rule, planted):
    assert rule(planted) != []


def test_cuda_rules_accept_what_is_right():
    files = {
        "softmax.cuh": '// asm "x" __shared__ __global__ void no();\n#pragma once\n'
        "#include <primitives/numeric.cuh>\n#include <ptx/math.cuh>\n"
        "template <class T, int k>\n"
        "__global__ void CLUSTER_DIMS(k) __launch_bounds__(32 * k) softmax(const T* x) {}",
        "topk/rows.cuh": "#pragma once\n#include <softmax/ops.cuh>\n#include <topk/ops.cuh>\n"
        "__global__ void topk_rows(int a) {}",
        "topk/ops.cuh": "#pragma once\n#include <softmax/ops.cuh>",
        "softmax/ops.cuh": "#pragma once\n#include <primitives/numeric.cuh>",
        "primitives/numeric.cuh": "#pragma once\n#include <cuda_fp16.h>\n#include <ptx/math.cuh>",
        "ptx/math.cuh": '#pragma once\n#if __CUDA_ARCH__ >= 900\n#endif\nvoid f() { asm("nop;"); }',
    }
    assert {rule.__name__: rule(files) for rule, _ in CUDA_RULES if rule(files)} == {}


# -- the emulator's twins of ptx/ ----------------------------------------------------------------


def functions(text):
    """Names of the functions that stand directly in ``namespace ptx``."""
    names, depth, inside, head = set(), 0, None, ""
    text = re.sub(r"^\s*#(?:[^\n]*\\\n)*[^\n]*", "", code(text), flags=re.MULTILINE)
    for token in re.findall(r"[{};]|[^{};]+", text):
        if token not in "{};":
            head = token
            continue
        if token == "{" and inside is None and re.search(r"\bnamespace\s+ptx\s*$", head):
            inside = depth + 1
        elif token != "}" and depth == inside:
            head = re.sub(r"\b(?:alignas|__attribute__|decltype|static_assert)\s*\(.*\)", "", head)
            found = re.search(r"(\w+)\s*\(", head)
            if found and not re.search(r"\b(?:using|typedef)\b", head):
                names.add(found[1])
        depth += {"{": 1, "}": -1, ";": 0}[token]
        if inside is not None and depth < inside:
            inside = None
        head = ""
    return names


def missing_twins(ptx, twins):
    """Files and functions that only one of the two folders has."""
    wrong = [f"{path}: one side only" for path in sorted(ptx.keys() ^ twins.keys())]
    for path in sorted(ptx.keys() & twins.keys()):
        one_sided = functions(ptx[path]) ^ functions(twins[path])
        wrong += [f"{path}: {name}" for name in sorted(one_sided)]
    return wrong


def test_ptx_wrappers_and_their_twins_agree():
    ptx, twins = read("cuda_src/ptx", "*.cuh"), read("tests/emulator/ptx", "*.cuh")
    assert all(functions(text) for text in ptx.values())
    assert missing_twins(ptx, twins) == []


def test_a_missing_twin_is_seen():
    wrapper = """
    #define MACRO(x) f(x)
    namespace ptx {
    struct Bits { int get() { return 0; } };
    template <class T> using BitsOf = Other<sizeof(T)>;
    // not_me(int x)
    template <class T>
    __device__ __forceinline__ T exp2_approx(T x) { if (x) { call(x); } return x; }
    __device__ __forceinline__ int rank() { asm("mov %0;" : "=r"(r)); }
    }  // namespace ptx
    int outside() { return 0; }
    """
    assert functions(wrapper) == {"exp2_approx", "rank"}
    twin = "namespace emu { void helper() {} }\nnamespace ptx { inline int rank() { return 0; } }"
    assert functions(twin) == {"rank"}
    assert missing_twins({"x.cuh": wrapper}, {"x.cuh": twin}) == ["x.cuh: exp2_approx"]
    assert missing_twins({"x.cuh": twin}, {"x.cuh": wrapper}) == ["x.cuh: exp2_approx"]
    assert missing_twins({"x.cuh": twin}, {}) == ["x.cuh: one side only"]
    assert missing_twins({"x.cuh": twin}, {"x.cuh": twin}) == []


# -- Python --------------------------------------------------------------------------------------

# Rooms of the package: the rooms, or modules of a room, that a file there may import beside its own
# room, and the packages of others. What it imports may be anywhere in it.
ROOMS = {
    "_arrays": (set(), {"cupy", "ml_dtypes", "numpy", "typing_extensions"}),
    "_device": ({"_arrays"}, {"cuda", "cupy", "numpy"}),  # cuda: cuda.pathfinder, a part of CuPy
    "reference": ({"_arrays/results"}, {"numpy"}),
    "_softmax": ({"_arrays", "_device"}, {"numpy"}),
    "_topk": ({"_arrays", "_device", "_softmax", "reference"}, {"numpy"}),
    "_attention": ({"_arrays", "_device"}, {"numpy"}),
    # Calls the public functions ("": cuattn itself), and lets requests check what it is given.
    "dask": ({"", "_arrays", "_softmax", "_topk", "_attention"}, {"dask", "numpy"}),
    # The main job's calls on the sample: it, too, calls the public functions.
    "data": ({"", "reference"}, {"numpy"}),
    "jax": ({"_arrays", "_attention", "_softmax", "_topk"}, {"cupy", "jax", "numpy"}),
}
# Stages of a call, by the first word of a file's name: the stages of its own or another wing that
# it may import. Files of other names hold public functions.
STAGES = {
    "checks": set(),
    "views": {"views"},
    "request": {"checks", "request", "views"},
    "numpy": {"numpy", "request", "views"},
    "problem": set(),
    "plan": {"plan", "problem"},
    "run": {"numpy", "plan", "problem", "request", "run", "views"},
    "public": {"checks", "public", "request", "run", "views"},
}
MAX_ROOMS = 12  # entries of cuattn/ itself


def imports(text, package="cuattn"):
    """Modules of ours, without the package's name, and packages of others that a file imports."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == package:
                ours.add(rest)
            elif top not in sys.stdlib_module_names:
                others.add(top)
    return ours, others


def stage(path):
    """The stage of a call that a file of a wing holds; None elsewhere."""
    room, _, file = path.partition("/")
    if room not in ("_softmax", "_topk", "_attention"):
        return None
    word = Path(file).stem.split("_")[0]
    return word if word in STAGES else "public"


def import_direction(files):
    """Each room imports what ROOMS says, each stage of a call what STAGES says."""
    wrong = []
    for path, text in files.items():
        room, own = path.partition("/")[0].removesuffix(".py"), stage(path)
        if room in ("__init__", "__main__"):
            continue  # they may import everything; the cost of `import cuattn` is tested below
        rooms, foreign = ROOMS[room]
        ours, others = imports(text)
        for name in ours:
            module = "/".join(name.split(".")[:2])
            allowed = bool({module, module.split("/")[0]} & (rooms | {room}))
            if own and stage(module):
                allowed = allowed and stage(module) in STAGES[own]
            if not allowed and (path, name) != ("_device/config.py", ""):  # it tells the version
                wrong.append(f"{path}: {name or 'cuattn'}")
        foreign = set() if own in ("plan", "problem") else foreign
        wrong += [f"{path}: {name}" for name in others - foreign]
    return sorted(wrong)


def private_in_bench(files):
    """Benchmarks see what users see; two files look inside: one measures the host cost at the seam
    to the device, and one hands tools what they need."""
    inside = {"bench_host_cost.py", "inside.py"}
    return [
        path
        for path, text in files.items()
        if any(name[:1] == "_" for name in imports(text)[0]) and path not in inside
    ]


def python_budget(files):
    return [path for path, text in files.items() if len(text.splitlines()) > PYTHON_BUDGET]


PYTHON_RULES = [
    ("cuattn", import_direction, {"_softmax/softmax.py": "from cuattn._topk.topk import top_k"}),
    ("cuattn", import_direction, {"_softmax/softmax.py": "from cuattn._topk import topk"}),
    ("cuattn", import_direction, {"_softmax/softmax.py": "from cuattn import _topk"}),
    ("cuattn", import_direction, {"_topk/topk.py": "def f():\n    import cuattn._attention"}),
    ("cuattn", import_direction, {"_softmax/softmax.py": "import cuattn"}),
    ("cuattn", import_direction, {"_softmax/softmax.py": "from cuattn._softmax import plan"}),
    ("cuattn", import_direction, {"_topk/request.py": "from cuattn._softmax.run import run"}),
    ("cuattn", import_direction, {"_topk/run_large.py": "from cuattn._topk.topk import top_k"}),
    ("cuattn", import_direction, {"_attention/plan_sm90.py": "import numpy as np"}),
    ("cuattn", import_direction, {"_attention/plan.py": "from cuattn._attention import request"}),
    ("cuattn", import_direction, {"reference/_topk.py": "from cuattn._arrays import checks"}),
    ("cuattn", import_direction, {"reference/_softmax.py": "import scipy.special"}),
    ("cuattn", import_direction, {"_device/params.py": "from cuattn._softmax import plan"}),
    ("cuattn", import_direction, {"_device/compiler.py": "import cuattn"}),
    ("cuattn", import_direction, {"_arrays/checks.py": "from cuattn._device import runtime"}),
    ("cuattn", import_direction, {"_softmax/softmax.py": "import jax"}),
    ("cuattn", import_direction, {"_topk/topk.py": "from cuattn.jax import top_k"}),
    ("cuattn", import_direction, {"jax/_calls.py": "from cuattn._device import runtime"}),
    ("cuattn", python_budget, {"softmax.py": "\n" * (PYTHON_BUDGET + 1)}),
    ("bench", private_in_bench, {"bench_softmax.py": "from cuattn._device.runtime import launch"}),
    ("bench", private_in_bench, {"peers/inside.py": "from cuattn import _topk"}),
    ("bench", python_budget, {"harness.py": "\n" * (PYTHON_BUDGET + 1)}),
]


@pytest.mark.parametrize(("folder", "rule"), dict.fromkeys(row[:2] for row in PYTHON_RULES))
def test_python_modules_keep(folder, rule):
    assert rule(read(folder, "*.py")) == []


@pytest.mark.parametrize(("folder", "rule", "planted"), PYTHON_RULES)
def test_python_rule_sees(folder, rule, planted):
    assert rule(planted) != []


def test_a_room_is_a_folder():
    """Everything else of the package stands in one: the first look shows the rooms."""
    entries = {path.name for path in (ROOT / "cuattn").iterdir() if path.name != "__pycache__"}
    assert {name.removesuffix(".py") for name in entries} >= ROOMS.keys()
    assert len(entries) <= MAX_ROOMS


def test_import_rule_accepts_what_is_right():
    files = {
        "_topk/topk.py": "from cuattn._arrays import results\nfrom cuattn._softmax import run",
        "_topk/plan_lanes.py": "from cuattn._device import kernel\nfrom ._topk import problem",
        "reference/_topk.py": "from cuattn._arrays.results import TopK\nimport numpy as np",
        "_device/config.py": "import cuattn",
    }
    assert import_direction(files) == []


# -- what `import cuattn` pulls in -----------------------------------------------------------------

HEAVY = {"cupy", "ml_dtypes", "scipy", "dask", "jax", "importlib.metadata"}


def loaded_after(statement):
    """The heavy packages that a fresh interpreter has loaded after `statement`."""
    script = f"import sys; {statement}; print(*({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return result.stdout.split()


def test_import_is_light():
    assert loaded_after("import cuattn; cuattn.softmax, cuattn.__version__") == []


def test_a_heavy_import_is_seen():
    pytest.importorskip("scipy")
    assert "scipy" in loaded_after("import scipy")
