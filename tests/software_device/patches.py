"""What is changed in CuPy, in the running process and nowhere else."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import struct
import sys
import threading
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import numpy

from software_device import Unavailable
from software_device.build import NAME

MARK = b"\0SOFTPTX\0"  # driver/modules.cpp looks for it
PTX = "SOFTWARE_DEVICE_PTX"  # the folder where a check of all configurations leaves PTX


def check_first():
    """CuPy finds its driver when it is imported."""
    if "cupy" in sys.modules or "cupy_backends" in sys.modules:
        raise RuntimeError("the software device must be installed before cupy is imported")


class NoLibrary(NotImplementedError, ImportError):
    """A library of NVIDIA is needed; CuPy does without some that cannot be imported."""


class _Finder:
    """Finds our module under the name of CuPy's."""

    def __init__(self, path):
        self.path = str(path)

    def find_spec(self, name, path=None, target=None):
        if name != NAME:
            return None
        loader = ExtensionFileLoader(name, self.path)
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


def replace_runtime(module):
    """From now on CuPy's other modules find `module` as their CUDA runtime."""
    sys.meta_path.insert(0, _Finder(module))


def patch(device):
    """Imports CuPy and changes what the software device cannot run as it is."""
    try:
        import cupy
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # each part of CUDA that is missing has its own class
        raise Unavailable(f"CuPy or NVRTC cannot be used: {error}") from error
    _add_ptx(nvrtc)
    _refuse_other_runtimes()
    _check_parameters(device)
    if os.environ.get("SOFTWARE_DEVICE_EXACT") == "1":
        cupy.cuda.set_allocator(cupy.cuda.malloc_async)


def _add_ptx(nvrtc):
    """Behind the end of every cubin: the PTX that it was made of, which the device runs.

    A cubin stays a whole ELF file, so that caches and names of kernels are what they always are.
    Of a kernel that is compiled to be loaded nobody looks at the machine code, and ptxas would take
    half of the time: NVRTC makes the PTX alone, which is the same, and the ELF file has the name.
    PTX that the check of all configurations has left in the cache (bench/inside.py) is that, too,
    and what the device as sm_90 has left for sm_80 (tests/shared_ptx.py).
    """
    from cupy.cuda import compiler

    from cuattn._device import cache
    from cuattn._device import compiler as own
    from cuattn._device.runtime import Cuda

    compile_program, get_cubin = nvrtc.compileProgram, nvrtc.getCUBIN
    here = threading.local()  # loads: the thread compiles what it will load

    def compileProgram(program, options):
        if getattr(here, "loads", False):
            options = [
                re.sub(r"^(-arch|--gpu-architecture)=sm_", r"\1=compute_", o) for o in options
            ]
        return compile_program(program, options)

    def getCUBIN(program):
        ptx = nvrtc.getPTX(program)
        cubin = _elf(ptx) if getattr(here, "loads", False) else get_cubin(program)
        return cubin + MARK + ptx + b"\0"

    def loading(function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            before, here.loads = getattr(here, "loads", False), True
            try:
                return function(*args, **kwargs)
            finally:
                here.loads = before

        return run

    compile_kernel = own.compile_kernel

    def compiled(header, name, arch, text="", options=()):
        key = f"{cache.cache_key(header, name, arch, text)}-{own.version()}"
        left = Path(os.environ[PTX]) / f"{key}.ptx"
        if options or not getattr(here, "loads", False) or not left.exists():
            return compile_kernel(header, name, arch, text, options)
        ptx = left.read_bytes()
        return _elf(ptx) + MARK + ptx + b"\0", ""

    own.compile_kernel = compiled
    nvrtc.compileProgram, nvrtc.getCUBIN = compileProgram, getCUBIN
    Cuda._load = loading(Cuda._load)
    compiler._NVRTCProgram.compile = loading(compiler._NVRTCProgram.compile)


def _elf(ptx):
    """An ELF file of EM_CUDA with an empty section ``.text.NAME`` for each kernel of the PTX.

    System V ABI, "Object Files": header, strings, table of sections.
    """
    kernels = [name.decode() for name in re.findall(rb"\.entry\s+([\w$]+)", ptx)]
    names = ["", *(f".text.{kernel}" for kernel in kernels), ".shstrtab"]
    strings = "\0".join(names).encode() + b"\0"
    header = 2, 190, 1, 0, 0, 64 + len(strings), 0, 64, 0, 0, 64, len(names), len(names) - 1
    image = struct.pack("<16s2HI3QI6H", b"\x7fELF\2\1\1", *header) + strings
    for number, name in enumerate(names):
        kind = 0 if not name else 3 if name == ".shstrtab" else 1  # SHT_STRTAB, SHT_PROGBITS
        at = sum(len(other) + 1 for other in names[:number])
        size = len(strings) if kind == 3 else 0
        image += struct.pack("<2I4Q2I2Q", at, kind, 0, 0, 64, size, 0, 0, 1, 0)
    return image


def _refusal(name, why):
    def refuse(*args, **kwargs):
        raise NotImplementedError(f"the software device cannot run {name}: {why}")

    return refuse


def _refuse_other_runtimes():
    """These have a CUDA runtime of their own, which sees no device, and not all of them say so."""
    for module in ("thrust", "cub", "jitify"):
        _refuse_functions(f"cupy.cuda.{module}", "it is compiled with a CUDA runtime of its own")
    for name in ("Generator", "BitGenerator", "XORWOW", "MRG32k3a", "Philox4x3210"):
        _refuse_name("cupy.random", name, "it is compiled with a CUDA runtime of its own")
    _replace("cupy.random", "default_rng", _HostGenerator)
    for name in ("RandomState", "get_random_state", "seed"):
        _refuse_name("cupy.random", name, "it needs cuRAND; draw with NumPy and copy")

    libraries = importlib.import_module("cupy_backends.cuda.libs")
    names = {"cublas", "cusolver", "cusparse", "curand", "nccl", "cutensor", "cusparselt"}
    find = libraries.__getattr__

    def find_library(name):
        if name in names:
            raise NoLibrary(f"the software device cannot run {name}, a library of NVIDIA")
        return find(name)

    libraries.__getattr__ = find_library


def _refuse_functions(module, why):
    try:
        namespace = importlib.import_module(module)
    except ImportError:
        return  # then CuPy says so itself
    for name, function in vars(namespace).items():
        if type(function).__name__ in ("builtin_function_or_method", "cython_function_or_method"):
            setattr(namespace, name, _refusal(f"{module}.{name}", why))


def _refuse_name(package, name, why):
    replacement = _refusal(f"{package}.{name}", why)
    original = getattr(importlib.import_module(package), name, None)
    if isinstance(original, type):  # it stays a class with all its names
        replacement = type(name, (original,), {"__new__": staticmethod(replacement)})
    _replace(package, name, replacement)


def _replace(package, name, replacement):
    """In the package and wherever its modules hold the same object under that name."""
    original = getattr(importlib.import_module(package), name, None)
    for module in list(sys.modules.values()):
        inside = getattr(module, "__name__", "").startswith(package)
        if inside and original is not None and vars(module).get(name) is original:
            setattr(module, name, replacement)


class _HostGenerator:
    """Stands for `cupy.random.default_rng`: NumPy draws, other numbers than CuPy would."""

    def __init__(self, seed=None):
        self._generator = numpy.random.default_rng(seed)

    def __getattr__(self, name):
        import cupy

        draw = getattr(self._generator, name)
        return lambda *args, **kwargs: cupy.asarray(draw(*args, **kwargs))


def _check_parameters(device):
    """A driver copies as many bytes as a kernel declares, whatever it is given."""
    from cuattn._device.runtime import Cuda

    launch, load = Cuda.launch, Cuda._load

    @functools.wraps(launch)
    def checked(self, kernel, params, reads, writes):
        key = kernel.name, kernel.suffix, self._current_device()
        function = self._kernels.get(key) or load(self, kernel, key[-1])
        declared = device.param_bytes(getattr(function, "kernel", function).ptr)
        if declared != len(params):
            raise RuntimeError(
                f"{kernel.name} declares {declared} bytes of parameters, but is given {len(params)}"
            )
        launch(self, kernel, params, reads, writes)

    Cuda.launch = checked
