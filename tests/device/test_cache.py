"""Several caches, whom they belong to, and none to compile with. Compiles nothing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

from cuattn._device import cache, compiler, directories
from cuattn._device.cache import load_or_compile

ROOT = Path(__file__).resolve().parents[2]
KERNEL = "softmax/rows.cuh", "softmax_rows<int>", "sm_90"
on_posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are those of POSIX")
as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away"
)


class Compiler:
    """An NVRTC of a version; None: there is none."""

    def __init__(self):
        self.version, self.compiled = "13.5", []

    def installed(self):
        if self.version is None:
            raise RuntimeError("CuPy failed to load libnvrtc")
        return self.version

    def compile_kernel(self, header, name, arch, text):
        self.compiled.append(name)
        return f"{name} {arch} {self.installed()}".encode(), ""


@pytest.fixture(autouse=True)
def nvrtc(monkeypatch):
    found = Compiler()
    monkeypatch.setattr(compiler, "installed", found.installed)
    monkeypatch.setattr(compiler, "compile_kernel", found.compile_kernel)
    monkeypatch.delenv("CUATTN_COMPILE", raising=False)
    directories._warned.clear()
    yield found
    directories._warned.clear()


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Three directories of a list; none of them is there."""
    found = [tmp_path / name for name in ("a", "b", "c")]
    monkeypatch.setenv("CUATTN_CACHE_DIR", os.pathsep.join(map(str, found)))
    return found


def files(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def only(monkeypatch, *folders):
    monkeypatch.setenv("CUATTN_CACHE_DIR", os.pathsep.join(map(str, folders)))


# ---- A list of directories ----


@pytest.mark.skipif(os.pathsep != ":", reason="the list is that of POSIX")
def test_the_list(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("CUATTN_CACHE_DIR", "/a::~/b:c:")
    expected = [Path("/a"), Path("/h/b"), Path("c")]
    assert directories.cache_directories() == expected
    assert directories.cache_directory() == expected[0]
    monkeypatch.setenv("CUATTN_CACHE_DIR", ":")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert directories.cache_directories() == [Path("/x/cuattn")]


def test_the_first_is_written(places, nvrtc):
    path, _ = load_or_compile(*KERNEL)
    assert path.parent == places[0] and not places[1].exists() and not places[2].exists()


@pytest.mark.parametrize("full", range(3))
def test_all_are_read(full, places, nvrtc, monkeypatch):
    only(monkeypatch, places[full])
    path, cubin = load_or_compile(*KERNEL)
    only(monkeypatch, *places)
    assert load_or_compile(*KERNEL) == (path, cubin)
    assert len(nvrtc.compiled) == 1
    assert [len(files(place)) for place in places] == [i == full for i in range(3)]


def test_the_first_that_has_it_is_taken(places, nvrtc, monkeypatch):
    for place in places[:0:-1]:
        only(monkeypatch, place)
        load_or_compile(*KERNEL)
    only(monkeypatch, *places)
    assert load_or_compile(*KERNEL)[0].parent == places[1]


def test_the_first_that_takes_it_is_written(places, nvrtc, recwarn):
    """Without a warning, as this is what a list is for."""
    places[0].write_bytes(b"a file")
    path, _ = load_or_compile(*KERNEL)
    assert path.parent == places[1]
    assert load_or_compile(*KERNEL)[0] == path
    assert len(nvrtc.compiled) == 1 and not places[2].exists() and len(recwarn) == 0


def test_none_takes_it(places, nvrtc):
    for place in places:
        place.write_bytes(b"a file")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [load_or_compile(*KERNEL)[0] for _ in range(2)] == [None, None]
    (warning,) = caught
    assert all(str(place) in str(warning.message) for place in places)
    assert len(nvrtc.compiled) == 2


def test_a_bad_file_in_front_of_a_good_one(places, nvrtc, monkeypatch):
    only(monkeypatch, places[1])
    path, cubin = load_or_compile(*KERNEL)
    places[0].mkdir()
    (places[0] / path.name).write_bytes(cubin[:-1])
    only(monkeypatch, *places)
    assert load_or_compile(*KERNEL) == (path, cubin)
    assert len(nvrtc.compiled) == 1


# ---- Without a compiler ----


@pytest.fixture
def warm(places, nvrtc):
    """The kernel in the cache, compiled by one NVRTC and by a later one."""
    made = {}
    for nvrtc.version in ("13.10", "13.9"):
        made[nvrtc.version] = load_or_compile(*KERNEL)
    nvrtc.compiled.clear()
    return made


def test_the_version_of_the_compiler_is_preferred(warm, nvrtc):
    for version, made in warm.items():
        nvrtc.version = version
        assert load_or_compile(*KERNEL) == made
    nvrtc.version = "12.9"
    assert b"12.9" in load_or_compile(*KERNEL)[1] and len(nvrtc.compiled) == 1


@pytest.mark.parametrize(
    ("mode", "version"),
    [("auto", None), *(("never", version) for version in (None, "12.9", "13.9", "13.10"))],
)
def test_without_a_compiler_any_version_is_taken(mode, version, warm, nvrtc, monkeypatch):
    """And the latest one; so it is where nothing is to be compiled."""
    monkeypatch.setenv("CUATTN_COMPILE", mode)
    nvrtc.version = version
    assert load_or_compile(*KERNEL) == warm[version if version in warm else "13.10"]
    assert nvrtc.compiled == []


def test_a_bad_file_of_the_latest_version(warm, nvrtc):
    warm["13.10"][0].write_bytes(b"")
    nvrtc.version = None
    assert load_or_compile(*KERNEL) == warm["13.9"]


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_no_good_file_and_no_compiler(content, warm, nvrtc):
    for path, _ in warm.values():
        path.unlink() if content is None else path.write_bytes(content)
    nvrtc.version = None
    with pytest.raises(compiler.CompileError) as caught:
        load_or_compile(*KERNEL)
    said = str(caught.value)
    assert all(word in said for word in (*KERNEL, "CuPy failed to load libnvrtc", "cuattn.compile"))


def test_never_names_the_kernel_and_what_to_do(places, nvrtc, monkeypatch):
    monkeypatch.setenv("CUATTN_COMPILE", "never")
    with pytest.raises(compiler.CompileError) as caught:
        load_or_compile(*KERNEL)
    said = str(caught.value)
    words = *KERNEL, "CUATTN_COMPILE is never", "cuattn.compile(arch=90)", *map(str, places)
    assert [word for word in words if word not in said] == []
    assert nvrtc.compiled == [] and files(places[0]) == []


def test_always_is_stronger_than_never(places, nvrtc, monkeypatch):
    monkeypatch.setenv("CUATTN_COMPILE", "never")
    made = load_or_compile(*KERNEL, always=True)
    assert nvrtc.compiled == [KERNEL[1]] and load_or_compile(*KERNEL) == made


@pytest.mark.parametrize("value", ["", "auto"])
def test_auto_compiles(value, places, nvrtc, monkeypatch):
    monkeypatch.setenv("CUATTN_COMPILE", value)
    load_or_compile(*KERNEL)
    assert nvrtc.compiled == [KERNEL[1]]


@pytest.mark.parametrize("value", ["no", "NEVER", "0"])
def test_another_mode(value, places, nvrtc, monkeypatch):
    monkeypatch.setenv("CUATTN_COMPILE", value)
    with pytest.raises(ValueError, match=f"must be auto or never, but it is {value}"):
        load_or_compile(*KERNEL)


# ---- Whom a directory belongs to ----


@on_posix
@pytest.mark.parametrize(
    ("mode", "used"),
    [(0o700, True), (0o755, True), (0o555, True), (0o757, False), (0o777, False), (0o1777, False)],
)
def test_permissions(mode, used, places, nvrtc, monkeypatch):
    """What is there is not read, and nothing is written."""
    only(monkeypatch, places[0])
    _, cubin = load_or_compile(*KERNEL)
    places[0].chmod(mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [load_or_compile(*KERNEL) for _ in range(3)]
    before = files(places[0])
    assert len(before) == 1 and len(nvrtc.compiled) == (1 if used else 4)
    assert [path is not None for path, _ in found] == [used] * 3
    assert [w.category for w in caught] == ([] if used else [RuntimeWarning])
    for warning in caught:
        said = str(warning.message)
        assert str(places[0]) in said and f"{mode:04o}" in said and "CUATTN_CACHE_DIR" in said


@on_posix
def test_the_next_one_is_used_instead(places, nvrtc):
    places[0].mkdir()
    places[0].chmod(0o777)
    with pytest.warns(RuntimeWarning, match="others may write"):
        path, _ = load_or_compile(*KERNEL)
    assert path.parent == places[1] and files(places[0]) == []


@on_posix
def test_a_folder_within_one_that_is_open_to_all(places, nvrtc, recwarn, monkeypatch):
    """As in a volume that anybody may write to."""
    places[0].mkdir()
    places[0].chmod(0o777)
    only(monkeypatch, places[0] / "own")
    before = os.umask(0)
    try:
        path, _ = load_or_compile(*KERNEL)
    finally:
        os.umask(before)
    assert path.parent == places[0] / "own" and len(recwarn) == 0
    assert path.parent.stat().st_mode & 0o777 == 0o755 and path.stat().st_mode & 0o777 == 0o644
    assert load_or_compile(*KERNEL)[0] == path and len(nvrtc.compiled) == 1


@as_root
@pytest.mark.parametrize(
    ("user", "group", "mode", "used"),
    [
        (0, 0, 0o775, True),  # as in containers of an arbitrary user
        (0, 12345, 0o755, True),
        (0, 12345, 0o775, False),
        (0, 12345, 0o2775, False),
        (12345, 0, 0o700, False),
        (12345, 12345, 0o755, False),
    ],
)
def test_owners(user, group, mode, used, places, nvrtc, monkeypatch):
    places[0].mkdir()
    os.chown(places[0], user, group)
    places[0].chmod(mode)
    reason = directories.refusal(places[0])
    assert (reason is None) == used
    assert used or ("belongs to user 12345" if user else "others may write") in reason


@as_root
def test_the_owner_of_the_package_is_trusted(places, monkeypatch, tmp_path):
    """Who can change its code already, as who has installed it for others on a cluster."""
    places[0].mkdir()
    os.chown(places[0], 12345, 12345)
    assert directories.refusal(places[0]) is not None
    (tmp_path / "directories.py").touch()
    os.chown(tmp_path / "directories.py", 12345, 12345)
    monkeypatch.setattr(directories, "__file__", str(tmp_path / "directories.py"))
    assert directories.refusal(places[0]) is None
    places[0].chmod(0o757)
    assert directories.refusal(places[0]) is not None


@on_posix
def test_a_private_group(places, monkeypatch):
    """Debian and Fedora give each user a group, and let it write."""
    grp, pwd = pytest.importorskip("grp"), pytest.importorskip("pwd")
    user, group = pwd.struct_passwd(["u", "", 1, 777, "", "", ""]), ["u", "", 777, []]
    monkeypatch.setattr(pwd, "getpwuid", lambda number: user)
    monkeypatch.setattr(grp, "getgrgid", lambda number: grp.struct_group(group))
    assert directories._is_private(777)
    group[3] = ["u"]
    assert directories._is_private(777)
    group[3] = ["u", "v"]
    assert not directories._is_private(777)
    group[:] = ["users", "", 777, []]
    assert not directories._is_private(777)


IMAGE = """
import os, sys, warnings
from cuattn._device import cache, compiler
warnings.simplefilter("error")
compiler.installed = lambda: "13.5"
compiler.compile_kernel = lambda header, name, arch, text: (name.encode(), "")
compiler.source_digest()
user, *names = sys.argv[1:]
os.setgroups([])  # what another user cannot read has been imported
os.setgid(int(user))
os.setuid(int(user))
for name in names:
    print(*cache.load_or_compile("softmax/rows.cuh", name, "sm_90"))
"""


@as_root
def test_an_image_of_root_is_read_by_another_user():
    """What it lacks goes into the second directory; root's is left as it is."""
    with tempfile.TemporaryDirectory() as folder:  # that of pytest is closed to others
        Path(folder).chmod(0o755)
        image, own = Path(folder, "image"), Path(folder, "own")
        own.mkdir()
        os.chown(own, 12345, 12345)

        def run(user, *names, directories):
            done = subprocess.run(
                [sys.executable, "-c", IMAGE, str(user), *names],
                capture_output=True,
                text=True,
                env={**os.environ, "CUATTN_CACHE_DIR": os.pathsep.join(map(str, directories))},
                cwd=ROOT,
            )
            assert (done.returncode, done.stderr) == (0, "")
            return done.stdout.splitlines()

        (warm,) = run(0, "first", directories=[image])
        before = files(image)
        lines = run(12345, "first", "second", "second", directories=[image, own])
        assert lines[0] == warm and lines[1] == lines[2] and lines[1].startswith(f"{own}{os.sep}")
        assert files(image) == before and len(files(own)) == 1
        assert next(own.iterdir()).stat().st_uid == 12345


# ---- What is logged ----


def test_records(places, nvrtc, caplog):
    caplog.set_level(logging.DEBUG, "cuattn")
    path, _ = load_or_compile(*KERNEL)
    load_or_compile(*KERNEL)
    compiled, found = caplog.records
    assert (compiled.name, found.name) == ("cuattn", "cuattn")
    assert (compiled.levelno, found.levelno) == (logging.INFO, logging.DEBUG)
    for record in (compiled, found):
        assert all(word in record.getMessage() for word in (KERNEL[1], "sm_90", str(path)))
    assert " s: " in compiled.getMessage() and compiled.args[2] >= 0


def test_a_record_of_what_is_not_kept(places, nvrtc, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "cuattn")
    places[0].write_bytes(b"a file")
    only(monkeypatch, places[0])
    with pytest.warns(RuntimeWarning, match="cannot write"):
        load_or_compile(*KERNEL)
    (record,) = caplog.records
    assert record.getMessage().endswith("not kept")


def test_no_handlers(places, nvrtc, capsys):
    load_or_compile(*KERNEL)
    logger = logging.getLogger("cuattn")
    assert logger.handlers == [] and logger.level == logging.NOTSET
    assert capsys.readouterr() == ("", "")
    assert cache.log is logger
