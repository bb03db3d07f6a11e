"""Compiles the software device, and CuPy's module of the CUDA runtime against it.

CuPy's wheels link the CUDA runtime statically, in one module that the others reach it through:
``cupy_backends.cuda.api.runtime``. It is compiled once more here, from the sdist of the version
that is installed, against the device's library. What is built is kept in ``software_device`` in
cuattn's cache directory, named after what went into it, and appears there by renaming.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

from emulator.build import compiler_identity, find_compiler, locked

from cuattn._device.directories import cache_directory
from software_device import Unavailable

HERE = Path(__file__).resolve().parent
CACHE = "SOFTWARE_DEVICE_CACHE"
INCLUDE = "SOFTWARE_DEVICE_INCLUDE"  # folders with CUDA's headers, instead of the wheels'

FLAGS = (
    "-std=c++17 -O2 -fPIC -fwrapv -fno-strict-aliasing -ffp-contract=off -Wall -Wextra"
).split()
# C++ templates are weak symbols, which would stand for those of others.
EXPORTS = "{ global: cu*; soft*; device_*; local: *; };\n"

NAME = "cupy_backends.cuda.api.runtime"
DIRECTIVES = {  # as CuPy's own build has them
    "linetrace": False,
    "profile": False,
    "embedsignature": True,
    "c_api_binop_methods": True,
    "binding": False,
    "warn.deprecated.IF": False,
    "freethreading_compatible": True,
}
INSTALL = "python -m pip install "
TOOLS = "'Cython>=3.2,<3.3' 'setuptools>=77' wheel"


@functools.cache
def cache_dir():
    """Where all of it is kept."""
    path = Path(os.environ.get(CACHE) or cache_directory() / "software_device")
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def _digest(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:32]


def _once(target, make):
    """`target`, made by `make(temporary path)` unless it is there."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(target.name + ".lock")
    with locked(lock):
        if not target.exists():
            handle, name = tempfile.mkstemp(suffix=target.suffix, dir=target.parent)
            os.close(handle)
            temporary = Path(name)
            try:
                make(temporary)
                temporary.chmod(0o755)
                os.replace(temporary, target)
            finally:
                if temporary.is_dir():
                    shutil.rmtree(temporary)
                temporary.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)
    return target


def _run(command, what, error=RuntimeError, **options):
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise error(f"{what} fails:\n{' '.join(command)}\n{done.stderr[-6000:]}")


# -- what is installed --


@functools.cache
def cupy_wheel():
    """Version of the CuPy that is installed, and the major version of CUDA that it is for."""
    for distribution in importlib.metadata.distributions():
        match = re.fullmatch(r"cupy-cuda(\d+)x", distribution.metadata["Name"] or "")
        if match:
            return distribution.version, int(match[1])
    raise Unavailable(f"the software device needs a wheel of CuPy: {INSTALL}cupy-cuda13x")


@functools.cache
def cuda_headers():
    """Folders of CUDA's headers, from $SOFTWARE_DEVICE_INCLUDE or NVIDIA's wheels."""
    if os.environ.get(INCLUDE):
        return tuple(Path(path) for path in os.environ[INCLUDE].split(os.pathsep))
    suffix = "" if cupy_wheel()[1] >= 13 else f"-cu{cupy_wheel()[1]}"
    found, missing = [], []
    for name, header in {
        "nvidia-cuda-runtime": "cuda_runtime_api.h",
        "nvidia-cuda-crt": "crt/host_defines.h",
        "nvidia-cuda-profiler-api": "cuda_profiler_api.h",
    }.items():
        if name == "nvidia-cuda-crt" and suffix:
            name = "nvidia-cuda-nvcc"  # of CUDA 12
        try:
            files = importlib.metadata.files(name + suffix) or ()
        except importlib.metadata.PackageNotFoundError:
            files = ()
        for file in files:
            if file.as_posix().endswith("/include/" + header):
                folder = Path(file.locate())
                found.append(folder.parents[header.count("/")].resolve())
                break
        else:
            missing.append(name + suffix)
    if missing:
        raise Unavailable(f"CUDA's headers are not all there: {INSTALL}{' '.join(missing)}")
    return tuple(dict.fromkeys(found))


def _compiler():
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise Unavailable("the software device runs on Linux only, on x86-64 and aarch64")
    try:
        compiler = find_compiler()
        return compiler, compiler_identity(compiler)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"the software device needs a C++17 compiler: {error}") from error


# -- the device --


@functools.cache
def device_library():
    """Path of the library that stands for libcuda and libcudart."""
    compiler, identity = _compiler()
    include = [f"-I{path}" for path in (HERE, *cuda_headers())]
    version = _digest(*(path.joinpath("cuda_runtime_api.h").exists() for path in cuda_headers()))
    inputs = sorted(p for p in HERE.rglob("*") if p.suffix in {".hpp", ".inc"})
    common = _digest(identity, *FLAGS, *cuda_headers(), version, *(p.read_bytes() for p in inputs))

    def compile_object(source):
        stem = f"{source.stem}_{_digest(common, source.read_bytes())}.o"
        command = [*compiler, *FLAGS, *include, "-c", source, "-o"]
        return _once(
            cache_dir() / "objects" / stem,
            lambda to: _run([*command, to], f"the compilation of {source.name}"),
        )

    sources = sorted(HERE.rglob("*.cpp"))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_object, sources))
    stem = _digest(identity, EXPORTS, *(path.name for path in objects))

    def link(to):
        exports = to.with_suffix(".map")
        exports.write_text(EXPORTS)
        try:
            options = ["-shared", "-Wl,-soname,libcuda.so.1", f"-Wl,--version-script={exports}"]
            _run([*compiler, *options, *objects, "-o", to], "the link of the software device")
        finally:
            exports.unlink()

    return _once(cache_dir() / f"libcuda_{stem}.so", link)


@functools.cache
def load(library):
    """The library, loaded: its soname answers whoever opens libcuda.so.1 afterwards."""
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_LOCAL)


# -- CuPy's module --


def cupy_sources():
    """Folder with cupy_backends of the installed version, from its sdist, with the C++ in it."""
    version, _ = cupy_wheel()
    folder = cache_dir() / f"cupy-{version}"

    def fetch(to):
        if importlib.util.find_spec("Cython") is None:
            raise Unavailable(f"CuPy's module needs Cython: {INSTALL}{TOOLS}")
        with tempfile.TemporaryDirectory() as work:
            options = "--quiet --no-binary :all: --no-deps --no-build-isolation".split()
            command = [sys.executable, "-m", "pip", "download", *options, "-d", work]
            environment = {**os.environ, "CUPY_INSTALL_USE_STUB": "1"}  # no CUDA toolkit is needed
            _run(
                [*command, f"cupy=={version}"],
                f"the download of CuPy's sources (which needs {TOOLS})",
                Unavailable,
                env=environment,
            )
            (sdist,) = Path(work).glob("*.tar.gz")
            os.replace(sdist, to)

    sdist = _once(cache_dir() / f"cupy-{version}.tar.gz", fetch)

    def extract(to):
        to.unlink()
        to.mkdir()
        with tarfile.open(sdist) as archive:
            inside = f"cupy-{version}/"
            for member in archive.getmembers():
                if member.isfile() and member.name.startswith(inside + "cupy_backends/"):
                    path = to / member.name[len(inside) :]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.extractfile(member).read())

    return _once(folder, extract)


CYTHONIZE = """
import json, sys
from Cython.Build import cythonize
from setuptools import Extension
name, source, environment, directives, to = json.loads(sys.argv[1])
cythonize([Extension(name, [source], language="c++")], language_level=3, build_dir=to,
          compile_time_env=environment, compiler_directives=directives)
"""


def cupy_runtime():
    """Path of CuPy's module of the CUDA runtime, for this Python, linked with the device."""
    compiler, identity = _compiler()
    version, major = cupy_wheel()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    headers, flags = cuda_headers(), ["-O1", "-fPIC", "-shared", "-std=c++17", "-w"]
    key = _digest(version, major, identity, *flags, *headers, CYTHONIZE, repr(DIRECTIVES))

    def make(to):
        source = cupy_sources()
        environment = {
            "CUPY_USE_CUDA_PYTHON": False,
            "CUPY_CUFFT_STATIC": False,
            "CUPY_CYTHON_VERSION": importlib.metadata.version("Cython"),
            "CUPY_CUDA_VERSION": 1000 * major,
            "CUPY_HIP_VERSION": 0,
        }
        with tempfile.TemporaryDirectory() as work:
            module = NAME.replace(".", "/")
            arguments = [NAME, f"{module}.pyx", environment, DIRECTIVES, work]
            _run(
                [sys.executable, "-c", CYTHONIZE, json.dumps(arguments)],
                "Cython",
                cwd=source,
            )
            own = (source / module).parent, source / "cupy_backends"
            include = [f"-I{path}" for path in (sysconfig.get_path("include"), *headers, *own)]
            unit = Path(work) / f"{module}.cpp"
            _run(
                [*compiler, *flags, *include, unit, device_library(), "-o", to],
                "the compilation of CuPy's module",
            )

    return _once(cache_dir() / f"cupy_runtime_{key}{suffix}", make)
