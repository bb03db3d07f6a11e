"""Compiles the emulator's runtime and kernels, and keeps what it compiled.

The compiler is ``$CXX``, g++, clang++, c++ or the one in the ``ziglang`` wheel. Libraries live in
``$CUATTN_CACHE_DIR/emulator`` or ``~/.cache/cuattn/emulator``, named after everything that went
into them, and appear there by renaming, so that several processes may build at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cuattn._device.directories import cache_directory

HERE = Path(__file__).resolve().parent
CUDA_SRC = HERE.parents[1] / "cuda_src"

FLAGS = (
    "-std=c++17 -fPIC -shared -ffp-contract=off -fno-strict-aliasing -fwrapv -fno-exceptions "
    "-fno-rtti -fvisibility=default"
).split()
RUNTIME_FLAGS = ["-O2", "-Wall", "-Wextra"]
# -O2 compiles a fifth slower and runs no faster (softmax, 256 x 4096): time goes in the runtime.
KERNEL_FLAGS = ["-O1", "-w", "-fno-omit-frame-pointer"]

ENTRY = """
static constexpr auto emu_kernel = &{name};
extern "C" unsigned long long emu_params_size() {{ return ::emu::params_size(emu_kernel); }}
extern "C" void emu_call(const void* params) {{ ::emu::call(emu_kernel, params); }}
"""


@functools.cache
def find_compiler(use_environment=True):
    """Command of a C++17 compiler, as a tuple."""
    if use_environment and os.environ.get("CXX"):
        return tuple(shlex.split(os.environ["CXX"]))
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return (name,)
    return zig_compiler()


def zig_compiler():
    """Command of the compiler in the ``ziglang`` wheel."""
    if importlib.util.find_spec("ziglang") is None:
        raise RuntimeError(
            "the emulator needs a C++17 compiler: install g++ or clang++, set CXX, or run "
            "`python -m pip install ziglang`"
        )
    # zig adds traps on undefined behaviour unless told not to.
    return (sys.executable, "-m", "ziglang", "c++", "-fno-sanitize=undefined")


def cache_dir():
    """Where compiled libraries are kept."""
    path = cache_directory() / "emulator"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


@functools.cache
def compiler_identity(compiler):
    """What tells two compilers apart."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    return " ".join(compiler) + version.stdout


@functools.cache
def _sources_digest(*roots):
    """Hash of every file that a translation unit can reach."""
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(Path(root).rglob("*")):
            if path.suffix in {".cuh", ".hpp", ".h", ".cpp"}:
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path):
    """Held by one process at a time, where the system has such locks; else no lock."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(stem, compiler, arguments, what):
    """Path of the library `stem`, compiled unless it is there."""
    target = cache_dir() / f"{stem}.so"
    if target.exists():
        return target
    with locked(target.with_suffix(".lock")):
        if not target.exists():
            handle, temporary = tempfile.mkstemp(suffix=".so", dir=target.parent)
            os.close(handle)
            try:
                command = [*compiler, *FLAGS, *arguments, "-o", temporary]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{what} does not compile:\n{done.stderr[:6000]}")
                os.replace(temporary, target)
            finally:
                Path(temporary).unlink(missing_ok=True)
    target.with_suffix(".lock").unlink(missing_ok=True)
    return target


@functools.cache
def coverage_flags(compiler):
    """What makes a compiler call ``__sanitizer_cov_trace_pc`` at the start of every basic block."""
    if sys.platform != "linux":
        raise RuntimeError("profile=True works on Linux only")
    for kinds in ("trace-pc,no-prune", "trace-pc"):  # clang leaves blocks out unless told not to
        flags = (f"-fsanitize-coverage={kinds}", "-fno-optimize-sibling-calls")
        probe = [*compiler, *flags, "-x", "c++", "-E", os.devnull]
        if subprocess.run(probe, capture_output=True).returncode == 0:
            return flags
    raise RuntimeError(
        f"profile=True needs a compiler with -fsanitize-coverage=trace-pc; {compiler[0]} has none"
    )


def _stem(kind, *parts):
    return f"{kind}_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}"


@functools.cache
def runtime_library(compiler=None):
    """The runtime, loaded."""
    compiler = compiler or find_compiler()
    flags = [*RUNTIME_FLAGS, f"-I{HERE}"]
    stem = _stem(
        "runtime", compiler_identity(compiler), *FLAGS, *RUNTIME_FLAGS, _sources_digest(HERE)
    )
    name = f"{stem}.so"
    soname = (
        f"-Wl,-install_name,@rpath/{name}" if sys.platform == "darwin" else f"-Wl,-soname,{name}"
    )
    sources = [str(path) for path in sorted((HERE / "runtime").glob("*.cpp"))]
    path = _compile(stem, compiler, [*flags, soname, *sources], "the emulator's runtime")
    # Local symbols: a kernel finds the runtime it was linked with, should there be two.
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
    library.emu_launch.restype = ctypes.c_int
    library.path = path
    return library


@functools.cache
def kernel_library(source, name, arch=None, compiler=None, include_dirs=(), profile=False):
    """The kernel `name` of the translation unit `source`, loaded.

    The library has ``emu_params_size()`` and ``emu_call(params)``. With `profile` it counts cost.
    `arch` is what ``__CUDA_ARCH__`` stands for. None: the code may not ask, as only ptx/ may, whose
    twins do not; then all architectures share what is compiled.
    """
    compiler = compiler or find_compiler()
    runtime = runtime_library(compiler)
    text = source + ENTRY.format(name=name)
    if arch is None:
        text = f"#pragma GCC poison __CUDA_ARCH__\n{text}"
    flags = [*KERNEL_FLAGS, *([] if arch is None else [f"-D__CUDA_ARCH__={arch}"])]
    flags += ("-DEMU_PROFILE", *coverage_flags(compiler)) if profile else ()
    digest = _sources_digest(HERE, CUDA_SRC, *include_dirs)
    stem = _stem(
        "kernel", compiler_identity(compiler), *FLAGS, *flags, digest, runtime.path.name, text
    )
    unit = cache_dir() / f"{stem}.cpp"
    if not unit.with_suffix(".so").exists():
        handle, temporary = tempfile.mkstemp(suffix=".cpp", dir=unit.parent)
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, unit)
    includes = [f"-I{path}" for path in (HERE, *include_dirs, CUDA_SRC)]
    origin = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
    arguments = [*flags, *includes, "-include", "cuda.hpp", str(unit), str(runtime.path)]
    path = _compile(stem, compiler, [*arguments, f"-Wl,-rpath,{origin}"], f"kernel {name}")
    library = ctypes.CDLL(str(path))
    library.emu_params_size.restype = ctypes.c_uint64
    return library
