"""What cuattn finds on this machine: where to look first when something does not run."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from cuattn._arrays import scalars

if TYPE_CHECKING:
    from pathlib import Path

VARIABLES = (
    "CUATTN_CACHE_DIR",  # where compiled kernels are kept, a list,
    "XDG_CACHE_HOME",  # if that is not set
    "CUATTN_COMPILE",  # auto or never: whether those that are not there are compiled
    "CUPY_CACHE_DIR",  # the same for CuPy's own kernels
    "CUDA_PATH",  # where compiler, headers and libraries are looked for
    "CUDA_HOME",
    "CONDA_PREFIX",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",  # which devices there are, and their order
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",  # 1: a launch waits for its kernel
    "CUPY_GPU_MEMORY_LIMIT",
    "OMP_NUM_THREADS",  # threads over NumPy arrays
    "OPENBLAS_NUM_THREADS",  # 1: attention on them uses these, not those of BLAS
)


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, Any] | None:
    """Versions, compiler, devices, caches and settings that cuattn finds on this machine.

    As `numpy.show_config`. It also works without a GPU and without CuPy; what is not there, or
    fails, is None, with the reason among the problems.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, optional
        Print for people, or return.

    Returns
    -------
    config : dict or None
        With "dicts": ``versions``, ``compiler`` (paths, the targets it knows, and the mode, auto or
        never), ``devices`` (memory in bytes), ``caches`` (all of cuattn and that of CuPy:
        directory, number and bytes of its files, and why it is not used), ``environment`` (None:
        not set) and ``problems`` (reasons by name). All of it is strings, numbers, lists and None.

    Raises
    ------
    ValueError
        If `mode` is another word.

    See Also
    --------
    numpy.show_config : The same of NumPy.

    Examples
    --------
    >>> list(cuattn.show_config("dicts"))
    ['versions', 'compiler', 'devices', 'caches', 'environment', 'problems']
    """
    scalars.one_of("mode", mode, ("stdout", "dicts"))
    config = _config()
    if mode == "dicts":
        return config
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(_text(config).encode(encoding, "backslashreplace").decode(encoding))
    return None


def _config() -> dict[str, Any]:
    import platform

    import cuattn
    from cuattn._device import cache as own_cache
    from cuattn._device import compiler as own_compiler
    from cuattn._device import directories

    problems: dict[str, str] = {}

    def ask(name: str, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except Exception as error:  # whatever a library or driver that is not whole may raise
            problems[name] = " ".join(f"{type(error).__name__}: {error}".split())
            return None

    def cache(name: str, directory: Path | None) -> dict[str, Any]:
        size = None if directory is None else ask(name, lambda: _size(directory))
        files, size_bytes = (None, None) if size is None else size
        path = None if directory is None else str(directory)
        return {"directory": path, "files": files, "bytes": size_bytes}

    def own_caches() -> Iterator[dict[str, Any]]:
        for i, directory in enumerate(ask("cuattn_caches", directories.cache_directories) or ()):
            name = f"cuattn[{i}]_cache"
            refused = ask(name, functools.partial(directories.refusal, directory))
            yield {**cache(name, directory), "refused": refused}

    versions = {
        "cuattn": cuattn.__version__,
        "python": platform.python_version(),
        "platform": ask("platform", platform.platform),
        "numpy": np.__version__,
        "ml_dtypes": ask("ml_dtypes", _ml_dtypes),
        "cupy": ask("cupy", _cupy),
        "cupy_packages": ask("cupy_packages", _cupy_packages),
        "nvrtc": ask("nvrtc", _nvrtc_version),
        "cuda_runtime": ask("cuda_runtime", _runtime_version),
        "cuda_driver": ask("cuda_driver", _driver_version),
    }
    compiler = {
        "library": ask("library", _nvrtc_library),
        "headers": ask("headers", own_compiler.toolkit_headers),
        "sources": ask("sources", lambda: str(own_compiler.source_directory())),
        "architectures": ask("architectures", _architectures),
        "mode": ask("mode", own_cache.mode),
    }
    return {
        "versions": versions,
        "compiler": compiler,
        "devices": ask("devices", _devices),
        "caches": {
            "cuattn": list(own_caches()),
            "cupy": cache("cupy_cache", ask("cupy_cache", _cupy_cache_directory)),
        },
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "problems": problems,
    }


def _cupy() -> str:
    import cupy

    return str(cupy.__version__)


def _ml_dtypes() -> str:
    from importlib import metadata  # takes as long to import as the rest of cuattn

    return metadata.version("ml_dtypes")


def _cupy_packages() -> list[str]:
    """What is installed under a name of CuPy's; two of them spoil each other."""
    from importlib import metadata

    found = ((d.metadata["Name"] or "", d.version) for d in metadata.distributions())
    return sorted({f"{name} {version}" for name, version in found if name.startswith("cupy")})


def _nvrtc_version() -> str:
    from cupy.cuda import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def _architectures() -> list[str]:
    from cupy.cuda import nvrtc

    return [f"sm_{number}" for number in nvrtc.getSupportedArchs()]


def _nvrtc_library() -> str:
    """The compiler's file, as CuPy finds it."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return str(load_nvidia_dynamic_lib("nvrtc").abs_path)


def _runtime_version() -> str:
    from cupy.cuda import runtime

    return _cuda_version(runtime.runtimeGetVersion())


def _driver_version() -> str:
    """Newest CUDA version that the driver knows."""
    from cupy.cuda import runtime

    return _cuda_version(runtime.driverGetVersion())


def _cuda_version(number: int) -> str:
    if not number:
        raise LookupError("there is none")
    return f"{number // 1000}.{number % 1000 // 10}"


def _devices() -> list[dict[str, Any]]:
    from cupy.cuda import runtime

    devices = []
    for number in range(runtime.getDeviceCount()):
        properties = runtime.getDeviceProperties(number)
        devices.append(
            {
                "name": properties["name"].decode(errors="replace"),
                "compute_capability": f"{properties['major']}.{properties['minor']}",
                "multiprocessors": int(properties["multiProcessorCount"]),
                "memory_bytes": int(properties["totalGlobalMem"]),
            }
        )
    return devices


def _cupy_cache_directory() -> Path:
    from pathlib import Path

    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


def _size(directory: Path) -> tuple[int, int]:
    """Number of files in a directory, and bytes; none where there is no such directory so far."""
    files = size = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another process may remove it meanwhile
                if entry.is_file():
                    size += entry.stat().st_size
                    files += 1
    return files, size


def _text(config: dict[str, Any]) -> str:
    """For people: a line for each of its values."""
    problems = config["problems"]

    def line(name: str, value: Any) -> str:
        if value is None:
            value = f"not found ({problems.get(name, 'no reason given')})"
        return f"  {name:<32}{' '.join(value) or 'none' if isinstance(value, list) else value}"

    lines = []
    for section in ("versions", "compiler"):
        lines += [section, *(line(name, value) for name, value in config[section].items())]
    lines.append("devices")
    if not config["devices"]:
        lines.append(line("devices", None if config["devices"] is None else "none"))
    for number, device in enumerate(config["devices"] or ()):
        about = (
            f"{device['name']}, compute capability {device['compute_capability']}, "
            f"{device['multiprocessors']} multiprocessors, {device['memory_bytes']} bytes"
        )
        lines.append(line(str(number), about))
    lines.append("caches")
    if not config["caches"]["cuattn"]:
        lines.append(line("cuattn_caches", None))
    own = {f"cuattn[{i}]": cache for i, cache in enumerate(config["caches"]["cuattn"])}
    for name, cache in {**own, "cupy": config["caches"]["cupy"]}.items():
        size = f"{cache['files']} files, {cache['bytes']} bytes"
        if cache["files"] is None:
            size = f"not readable ({problems[f'{name}_cache']})"
        refused = f"; refused, as {cache['refused']}" if cache.get("refused") else ""
        lines.append(line(name, f"{cache['directory'] or 'no directory'}: {size}{refused}"))
    lines.append("environment")
    for name, value in config["environment"].items():
        lines.append(line(name, "not set" if value is None else value))
    return "\n".join(lines)
