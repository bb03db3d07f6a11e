"""Compiled kernels on disk.

A file is `<key>-<version of NVRTC>-<digest of its content>.cubin`. The key is of all that goes into
a kernel save for the compiler, so that it is known where there is none. Whoever finds the file sees
at once whether it is whole, and processes that compile the same kernel at the same time write the
same name. A folder that has been filled can be copied, and read where NVRTC and its headers are not
installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import time
from pathlib import Path

from cuattn._device import compiler
from cuattn._device.directories import cache_directories, is_trusted, warn_once

MODES = "auto", "never"
NAME = re.compile(r"[0-9a-f]+-(\d+)\.(\d+)-[0-9a-f]+\.cubin")
log = logging.getLogger("cuattn")


def mode() -> str:
    """$CUATTN_COMPILE: whether a kernel that is not in the cache is compiled."""
    given = os.environ.get("CUATTN_COMPILE") or MODES[0]
    if given not in MODES:
        raise ValueError(f"CUATTN_COMPILE must be {' or '.join(MODES)}, but it is {given}")
    return given


def cache_key(header: str, name: str, arch: str, text: str = "") -> str:
    """Digest of everything a cubin depends on, save for the compiler and its headers."""
    parts = (compiler.source_digest(), header, name, *compiler.code_options(arch), text)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


def load_or_compile(
    header: str, name: str, arch: str, text: str = "", *, always: bool = False
) -> tuple[Path | None, bytes]:
    """Cubin of one instantiation and its file in the cache, None where the cache cannot be written.

    What the installed NVRTC has compiled, now or earlier. Where there is none, or its headers are
    missing, or nothing is to be compiled (`mode`, unless `always`): what any other one has.
    """
    never = mode() == "never" and not always
    key, version, lack = cache_key(header, name, arch, text), None, None
    try:
        version = compiler.installed()
    except (ImportError, OSError, RuntimeError) as error:
        lack = error
    found = _find(key, version) if version else None
    if found is None and (never or lack):
        found = _find(key, None)
    if found is not None:
        log.debug("found %s for %s: %s", name, arch, found[0])
        return found
    if never or lack:
        raise compiler.CompileError(
            f"{name} ({header}) for {arch} is not in the cache, {_places()}, and is not compiled, "
            f"{'as CUATTN_COMPILE is never' if never else f'as that is impossible here: {lack}'}; "
            f"where NVRTC is, the same call within cuattn.compile(arch={arch[3:].rstrip('a')}) "
            "compiles it into the cache"
        ) from lack
    began = time.perf_counter()
    cubin, _ = compiler.compile_kernel(header, name, arch, text)
    seconds = time.perf_counter() - began
    written = _write(_file_name(key, compiler.installed(), cubin), cubin)
    if written is not None:
        _remove_others(written)
    log.info("compiled %s for %s in %.2f s: %s", name, arch, seconds, written or "not kept")
    return written, cubin


def _file_name(key: str, version: str, cubin: bytes) -> str:
    return f"{key}-{version}-{hashlib.sha256(cubin).hexdigest()[:16]}.cubin"


def _version(path: Path) -> tuple[int, ...]:
    """Of the NVRTC that has made a file; empty if the name does not say."""
    found = NAME.fullmatch(path.name)
    return tuple(map(int, found.groups())) if found else ()


def _find(key: str, version: str | None) -> tuple[Path, bytes] | None:
    """A whole file of this key in the first directory that has one, and its content. Of several the
    one of the latest NVRTC, where it may be of any.
    """
    with contextlib.suppress(RuntimeError):  # the user has no home folder
        for directory in filter(is_trusted, cache_directories()):
            for path in sorted(_cached(directory, key), key=_version, reverse=True):
                made_by = ".".join(map(str, _version(path)))
                if version not in (None, made_by):
                    continue
                with contextlib.suppress(OSError):
                    cubin = path.read_bytes()
                    if path.name == _file_name(key, made_by, cubin):
                        _remove_others(path)
                        return path, cubin
    return None


def _remove_others(good: Path) -> None:
    """Remove bad files of a key beside a good one: those of the same NVRTC, and of none. Never by
    the good name, which another process may be writing.
    """
    for path in _cached(good.parent, good.name.partition("-")[0]):
        if path.name != good.name and _version(path) in ((), _version(good)):
            with contextlib.suppress(OSError):
                path.unlink()


def _cached(directory: Path, key: str) -> list[Path]:
    """Files of a directory under this key, good or not."""
    try:
        return sorted(directory.glob(f"{key}-*.cubin"))
    except OSError:
        return []


def _places() -> str:
    """The directories of the cache, for people."""
    try:
        return os.pathsep.join(map(str, cache_directories()))
    except RuntimeError:  # the user has no home folder
        return "the user's cache folder"


def _write(name: str, content: bytes) -> Path | None:
    """Write a file in one step, into the first directory that takes it; one warning per process
    where none does.
    """
    problems, directories = [], []
    try:
        directories = cache_directories()
    except RuntimeError as error:  # the user has no home folder
        problems.append(str(error))
    for directory in directories:
        temporary = None
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            if not is_trusted(directory):
                continue
            handle, temporary = tempfile.mkstemp(dir=directory, suffix=".tmp")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o644)  # others who share the cache may read it
            os.replace(temporary, directory / name)
            return directory / name
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            problems.append(str(error))
    if problems:
        warn_once(
            "unwritable",
            f"cuattn cannot write compiled kernels to {_places()} ({'; '.join(problems)}), so "
            "every process compiles them anew; set CUATTN_CACHE_DIR to a writable folder",
        )
    return None
