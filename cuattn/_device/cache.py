"""Compiled kernels on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import warnings
from pathlib import Path

from cuattn._device import compiler


def cache_directory() -> Path:
    """$CUATTN_CACHE_DIR, else cuattn in the user's cache folder; a leading ~ is the home folder."""
    given = os.environ.get("CUATTN_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "cuattn"


def cache_key(header: str, name: str, arch: str) -> str:
    """Digest of everything a cubin depends on."""
    from cupy.cuda import nvrtc

    options = compiler.compiler_options(arch)[
        2:
    ]  # paths do not matter: the sources' content is in the digest
    parts = (compiler.source_digest(), header, name, *options, repr(nvrtc.getVersion()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


def load_or_compile(header: str, name: str, arch: str) -> tuple[Path | None, bytes]:
    """Cubin of one instantiation and its file in the cache, None where the cache cannot be written.

    A file is `<key>-<digest of its content>.cubin`: whoever finds it sees at once whether it is
    whole, and processes that compile the same kernel at the same time write the same name. Anything
    else under that key is removed.
    """
    key = cache_key(header, name, arch)
    for path in _cached(key):
        with contextlib.suppress(OSError):
            cubin = path.read_bytes()
            if path.name == _file_name(key, cubin):
                _remove_others(key, path.name)
                return path, cubin
    cubin, _ = compiler.compile_kernel(header, name, arch)
    good = _file_name(key, cubin)
    written = _write(good, cubin)
    _remove_others(key, good)
    return written, cubin


def _file_name(key: str, cubin: bytes) -> str:
    return f"{key}-{hashlib.sha256(cubin).hexdigest()[:16]}.cubin"


def _remove_others(key: str, good: str) -> None:
    """Remove bad files of a key; never by the good name, which another process may be writing."""
    for path in _cached(key):
        if path.name != good:
            with contextlib.suppress(OSError):
                path.unlink()


def _cached(key: str) -> list[Path]:
    """Files of the cache under this key, good or not."""
    try:
        return sorted(cache_directory().glob(f"{key}-*.cubin"))
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return []


def _write(name: str, content: bytes) -> Path | None:
    """Write a file of the cache in one step; one warning per process where that is impossible."""
    directory: Path | str = "the user's cache folder"
    temporary = None
    try:
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=directory, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # others who share the cache may read it
        os.replace(temporary, directory / name)
        return directory / name
    except (OSError, RuntimeError) as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        _warn_once(str(directory), str(error))
        return None


_warned = threading.Event()
_warning_lock = threading.Lock()


def _warn_once(directory: str, reason: str) -> None:
    with _warning_lock:
        if _warned.is_set():
            return
        _warned.set()
    warnings.warn(
        f"cuattn cannot write compiled kernels to {directory} ({reason}), so every process "
        "compiles them anew; set CUATTN_CACHE_DIR to a writable folder",
        RuntimeWarning,
        stacklevel=2,
    )
