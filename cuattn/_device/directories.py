"""Where compiled kernels are kept on disk, and which of these places are to be trusted."""

from __future__ import annotations

import os
import stat
import threading
import warnings
from pathlib import Path

ROOT = 0  # user and group


def cache_directories() -> list[Path]:
    """Those of $CUATTN_CACHE_DIR, which is a list as $PATH is, else cuattn in the user's cache
    folder; a leading ~ is the home folder. The first comes first, whether it is there or not.
    """
    given = os.environ.get("CUATTN_CACHE_DIR", "").split(os.pathsep)
    if found := [Path(one).expanduser() for one in given if one]:
        return found
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [caches.expanduser() / "cuattn"]


def cache_directory() -> Path:
    """The first of `cache_directories`."""
    return cache_directories()[0]


def refusal(directory: Path) -> str | None:
    """Why a directory is not to be used: what somebody else writes there would run on our GPU.

    None where only those may write who can run code in this process anyway: its user, root, and who
    owns the files of cuattn. A group counts as its user where it is root's, which containers of an
    arbitrary user run in, or has the user's name and nobody else in it. The sticky bit is no help,
    as it lets everybody add files. None, too, of a directory that is not there.
    """
    if not hasattr(os, "geteuid"):  # Windows
        return None
    try:
        found = os.stat(directory)
    except OSError:
        return None
    if found.st_uid not in (os.geteuid(), ROOT, _owner_of_cuattn()):
        return f"it belongs to user {found.st_uid}, another one"
    shared = found.st_mode & stat.S_IWGRP and not _is_private(found.st_gid)
    if shared or found.st_mode & stat.S_IWOTH:
        return f"others may write to it (mode {stat.S_IMODE(found.st_mode):04o})"
    return None


def _owner_of_cuattn() -> int:
    try:
        return os.stat(__file__).st_uid
    except OSError:  # code that a process may no longer read, or that is in an archive
        return ROOT


def _is_private(group: int) -> bool:
    """Whether nobody is in a group but root, or the user whose name it has."""
    if group == ROOT:
        return True
    try:
        import grp
        import pwd

        user, found = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except (ImportError, KeyError):  # no such files, or not in them
        return False
    return found.gr_name == user and not {*found.gr_mem} - {user}


def is_trusted(directory: Path) -> bool:
    """Whether a directory may be used; one warning for each that may not."""
    reason = refusal(directory)
    if reason is not None:
        warn_once(
            str(directory),
            f"cuattn neither reads nor writes compiled kernels in {directory}: {reason}, and they "
            "would run on your GPU; set CUATTN_CACHE_DIR to a folder that only you may write to, "
            "perhaps inside of it",
        )
    return reason is None


_warned: set[str] = set()  # what about
_warning_lock = threading.Lock()


def warn_once(about: str, message: str) -> None:
    """A RuntimeWarning, once in a process."""
    with _warning_lock:
        if about in _warned:
            return
        _warned.add(about)
    warnings.warn(message, RuntimeWarning, stacklevel=2)
