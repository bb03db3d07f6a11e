"""cuattn.show_config: right where something is found, and never an error where it is not."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import cuattn
from cuattn._device import cache, compiler, directories
from cuattn._device import config as device_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_caches(monkeypatch, tmp_path):
    """Nobody else writes there meanwhile."""
    for name in ("CUATTN_CACHE_DIR", "CUPY_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


def printed(capsys):
    cuattn.show_config()
    return capsys.readouterr().out


def leaves(value):
    """The numbers and strings in nested dicts and lists."""
    if isinstance(value, (dict, list)):
        return [leaf for one in (value.values() if isinstance(value, dict) else value)
                for leaf in leaves(one)]  # fmt: skip
    return [] if value is None else [str(value)]


def test_what_is_found(monkeypatch, capsys):
    """With a CuPy that has two devices."""
    devices = (b"NVIDIA H100", 9, 0, 132, 85 * 10**9), (b"NVIDIA T4", 7, 5, 40, 15 * 10**9)
    keys = "name", "major", "minor", "multiProcessorCount", "totalGlobalMem"
    runtime = types.SimpleNamespace(
        getDeviceCount=lambda: 2,
        getDeviceProperties=lambda n: dict(zip(keys, devices[n], strict=True)),
        runtimeGetVersion=lambda: 13020,
        driverGetVersion=lambda: 12090,
    )
    nvrtc = types.SimpleNamespace(
        getVersion=lambda: (13, 5), getSupportedArchs=lambda: (75, 90, 120)
    )
    cuda = types.SimpleNamespace(runtime=runtime, nvrtc=nvrtc)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(__version__="14.9"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    config = cuattn.show_config("dicts")
    versions = config["versions"]
    assert versions["cuattn"] == cuattn.__version__ and versions["numpy"] == np.__version__
    assert versions["python"] == "{}.{}.{}".format(*sys.version_info)
    found = [versions[name] for name in ("cupy", "nvrtc", "cuda_runtime", "cuda_driver")]
    assert found == ["14.9", "13.5", "13.2", "12.9"]
    assert config["compiler"]["architectures"] == ["sm_75", "sm_90", "sm_120"]
    assert (Path(config["compiler"]["sources"]) / "softmax/rows.cuh").is_file()
    h100, t4 = config["devices"]
    assert h100 == {
        "name": "NVIDIA H100",
        "compute_capability": "9.0",
        "multiprocessors": 132,
        "memory_bytes": 85 * 10**9,
    }
    assert (t4["name"], t4["compute_capability"]) == ("NVIDIA T4", "7.5")
    assert json.loads(json.dumps(config)) == config
    text = printed(capsys)
    del config["problems"]
    assert [leaf for leaf in leaves(config) if leaf not in text] == []


def test_caches(monkeypatch, tmp_path):
    """Files of the directory itself and their bytes; one that is not there holds none."""
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "theirs"))
    (tmp_path / "ours" / "folder").mkdir(parents=True)
    (tmp_path / "ours" / "folder" / "x").write_bytes(b"abc")
    for i in range(3):
        (tmp_path / "ours" / f"{i}.cubin").write_bytes(b"x" * 10**i)
    caches = cuattn.show_config("dicts")["caches"]
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    assert caches["cuattn"] == [{"directory": ours, "files": 3, "bytes": 111, "refused": None}]
    assert caches["cupy"] == {"directory": theirs, "files": 0, "bytes": 0}
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path / "none"))
    none = cuattn.show_config("dicts")["caches"]["cuattn"][0]
    assert (none["files"], none["bytes"], (tmp_path / "none").exists()) == (0, 0, False)


def test_a_file_that_another_process_removes(monkeypatch, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.cubin").write_bytes(b"x" * 10**i)
    scandir = os.scandir

    def late(path):
        entries = list(scandir(path))
        (tmp_path / "1.cubin").unlink()
        return contextlib.nullcontext(entries)

    monkeypatch.setattr(device_config.os, "scandir", late)
    assert device_config._size(tmp_path) == (2, 101)


def test_a_list_of_caches(monkeypatch, tmp_path, capsys):
    """Each with its size, and with the reason if it is not used."""
    for name, mode in (("one", 0o755), ("two", 0o777)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    (tmp_path / "two" / "x").write_bytes(b"abc")
    paths = [str(tmp_path / name) for name in ("one", "two")]
    monkeypatch.setenv("CUATTN_CACHE_DIR", os.pathsep.join(paths))
    monkeypatch.setenv("CUATTN_COMPILE", "never")
    config = cuattn.show_config("dicts")
    one, two = config["caches"]["cuattn"]
    assert [one["directory"], two["directory"]] == paths
    assert (one["refused"], two["files"], two["bytes"]) == (None, 1, 3)
    assert config["compiler"]["mode"] == "never"
    text = printed(capsys)
    assert all(path in text for path in paths) and f"  {'mode':<32}never" in text
    if hasattr(os, "geteuid"):
        assert "mode 0777" in two["refused"] and text.count("refused, as others may write") == 1


def test_a_mode_that_is_none(monkeypatch):
    monkeypatch.setenv("CUATTN_COMPILE", "sometimes")
    config = cuattn.show_config("dicts")
    assert config["compiler"]["mode"] is None
    assert "must be auto or never, but it is sometimes" in config["problems"]["mode"]


def test_environment(monkeypatch):
    monkeypatch.setenv("CUDA_PATH", "/some/where")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    environment = cuattn.show_config("dicts")["environment"]
    assert environment["CUDA_PATH"] == "/some/where"
    assert environment["CUDA_VISIBLE_DEVICES"] is None
    sources = "".join(path.read_text() for path in (ROOT / "cuattn").rglob("*.py"))
    read = set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', sources))
    assert {"CUATTN_CACHE_DIR", "CUATTN_COMPILE", "XDG_CACHE_HOME"} <= read <= set(environment)


def test_a_cache_that_cannot_be_read(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path / "file"))
    config = cuattn.show_config("dicts")
    path = str(tmp_path / "file")
    expected = {"directory": path, "files": None, "bytes": None, "refused": None}
    assert config["caches"]["cuattn"] == [expected]
    assert "NotADirectoryError" in config["problems"]["cuattn[0]_cache"]
    assert "NotADirectoryError" in printed(capsys)


def test_without_cupy():
    script = "import sys; sys.modules['cupy'] = None; import cuattn; cuattn.show_config()"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.partition("\ncaches\n")[0].splitlines()
    for name in ("cupy", "nvrtc", "cuda_driver", "devices"):
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert "not found (ModuleNotFoundError: " in line
    assert f"  {'numpy':<32}{np.__version__}" in lines


def test_nothing_raises(monkeypatch, capsys):
    """Whatever fails, and however: every fact is asked for by itself."""

    class Strange(Exception):
        def __str__(self):
            return "several\n  lines"

    def fail(*args, **options):
        raise Strange

    class Broken(types.ModuleType):
        __getattr__ = fail

    monkeypatch.setitem(sys.modules, "cupy", Broken("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", Broken("cupy.cuda"))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", Broken("cuda.pathfinder"))
    for module, names in (
        (cache, ("mode",)),
        (directories, ("cache_directories",)),
        (compiler, ("source_directory", "toolkit_headers")),
        (importlib.metadata, ("version", "distributions")),
        (platform, ("platform",)),
        (Path, ("home",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, fail)
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    config = cuattn.show_config("dicts")
    known = {"cuattn", "python", "numpy"}
    assert all((config["versions"][n] is not None) == (n in known) for n in config["versions"])
    assert leaves([config["compiler"], config["devices"], config["caches"]]) == []
    assert set(config["problems"].values()) == {"Strange: several lines"}
    assert printed(capsys).count("Strange: several lines") == len(config["problems"]) > 10


def test_a_terminal_that_cannot_show_it():
    environment = {os.fsencode(k): os.fsencode(v) for k, v in os.environ.items()}
    environment |= {b"CUDA_PATH": b"/\xff", b"PYTHONIOENCODING": b"ascii"}
    done = subprocess.run(
        [sys.executable, "-c", "import cuattn; cuattn.show_config()"],
        capture_output=True,
        env=environment,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"/\udcff" in done.stdout


@pytest.mark.parametrize("mode", ["dict", "", None, 1])
def test_another_mode(mode):
    with pytest.raises(ValueError, match=r"^mode must be one of stdout, dicts, but it is "):
        cuattn.show_config(mode)
