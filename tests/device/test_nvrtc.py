"""Name expression → cubin → file: what is compiled, what is found again, and what damage costs.

Needs NVRTC, but no GPU.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cuattn._device import compiler
from cuattn._device.cache import cache_key, load_or_compile
from cuattn._device.directories import _warned, cache_directory

cupy = pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")

ROOT = Path(__file__).resolve().parents[2]
ARCH = "sm_90"
# The quickest kernels to compile.
KERNELS = (
    ("softmax/state_merge.cuh", "softmax_state_merge<float, false, 128>", ARCH),
    ("softmax/state_merge.cuh", "softmax_state_merge<double, false, 128>", ARCH),
)
KERNEL = KERNELS[0]


@pytest.fixture(autouse=True, scope="module")
def nvrtc():
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"no NVRTC: {error}")
    return nvrtc


@pytest.fixture(autouse=True)
def fresh():
    """What a process remembers, forgotten before and after."""

    def forget():
        compiler.source_digest.cache_clear()
        compiler.architecture.cache_clear()
        _warned.clear()

    forget()
    yield
    forget()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, which does not exist yet."""
    folder = tmp_path / "some" / "cache"
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="module")
def cubins(nvrtc):
    """What the compiler makes of KERNELS."""
    return {kernel: compiler.compile_kernel(*kernel)[0] for kernel in KERNELS}


@pytest.fixture
def compiled(monkeypatch):
    """Name expressions that were compiled, in order."""
    names, compile_kernel = [], compiler.compile_kernel

    def counted(header, name, arch, text):
        names.append(name)
        return compile_kernel(header, name, arch, text)

    monkeypatch.setattr(compiler, "compile_kernel", counted)
    return names


def files(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def stem(kernel):
    """What the names of its files begin with."""
    return f"{cache_key(*kernel)}-{compiler.version()}"


def good_name(kernel, cubin):
    """The file name that says what is in it."""
    return f"{stem(kernel)}-{hashlib.sha256(cubin).hexdigest()[:16]}.cubin"


# ---- Cold and warm ----


def test_cold_then_warm(cache, compiled, cubins):
    path, cubin = load_or_compile(*KERNEL)
    assert cubin == cubins[KERNEL]
    assert files(cache) == [path.name] == [good_name(KERNEL, cubin)]
    assert path == cache / path.name and path.read_bytes() == cubin
    assert compiled == [KERNEL[1]]
    assert load_or_compile(*KERNEL) == (path, cubin)
    assert compiled == [KERNEL[1]]


def test_each_kernel_has_its_file(cache, cubins):
    for kernel in KERNELS:
        assert load_or_compile(*kernel)[1] == cubins[kernel]
    assert files(cache) == sorted(good_name(kernel, cubins[kernel]) for kernel in KERNELS)


def test_a_rejected_kernel_leaves_no_file(cache):
    with pytest.raises(compiler.CompileError):
        load_or_compile("softmax/state_merge.cuh", "softmax_state_merge<float, false, 0x>", ARCH)
    assert files(cache) == []


# ---- Several at once ----

# Prints a line when the first kernel is compiled, and goes on when it reads one: no process writes
# before all have found the cache empty.
PROCESS = """
import hashlib, sys
from cuattn._device import cache, compiler

compile_kernel = compiler.compile_kernel

def compile_and_wait(*kernel):
    made = compile_kernel(*kernel)
    print("compiled", flush=True)
    sys.stdin.readline()
    return made

first, second = {kernels!r}
compiler.compile_kernel = compile_and_wait
one = cache.load_or_compile(*first)
compiler.compile_kernel = compile_kernel
for path, cubin in (one, cache.load_or_compile(*second)):
    assert path.read_bytes() == cubin
    print(path.name, hashlib.sha256(cubin).hexdigest(), flush=True)
"""


def test_processes_on_a_cold_cache(cache, cubins):
    command = [sys.executable, "-W", "error", "-c", PROCESS.format(kernels=KERNELS)]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(6)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "compiled\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    names = [good_name(kernel, cubins[kernel]) for kernel in KERNELS]
    digests = [hashlib.sha256(cubins[kernel]).hexdigest() for kernel in KERNELS]
    lines = [f"{name} {digest}\n" for name, digest in zip(names, digests, strict=True)]
    assert said == ["".join(lines)] * 6
    assert files(cache) == sorted(names)


def test_threads_on_a_cold_cache(cache, cubins):
    barrier = threading.Barrier(8)

    def work(i):
        barrier.wait()
        return [load_or_compile(*KERNELS[(i + j) % 2]) for j in range(2)]

    with ThreadPoolExecutor(8) as pool:
        got = {made for pair in pool.map(work, range(8)) for made in pair}
    names = {kernel: good_name(kernel, cubins[kernel]) for kernel in KERNELS}
    assert got == {(cache / names[kernel], cubins[kernel]) for kernel in KERNELS}
    assert files(cache) == sorted(names.values())


# ---- Damage ----


def truncated(path, cubin):
    path.write_bytes(cubin[:-1])


def one_bit(path, cubin):
    path.write_bytes(cubin[:2000] + bytes([cubin[2000] ^ 1]) + cubin[2001:])


def longer(path, cubin):
    path.write_bytes(cubin + b"\0")


def empty(path, cubin):
    path.write_bytes(b"")


def dangling_link(path, cubin):
    path.symlink_to(path.with_name("nowhere"))


def other_digest(path, cubin):
    path.with_name(f"{path.name.rpartition('-')[0]}-{'0' * 16}.cubin").write_bytes(cubin[:500])


def no_digest(path, cubin):
    key = path.name.split("-")[0]
    path.with_name(f"{key}-garbage.cubin").write_bytes(b"garbage")


def no_version(path, cubin):
    key = path.name.split("-")[0]
    path.with_name(f"{key}-{hashlib.sha256(cubin).hexdigest()[:16]}.cubin").write_bytes(cubin)


@pytest.mark.parametrize(
    "damage",
    [truncated, one_bit, longer, empty, dangling_link, other_digest, no_digest, no_version],
)
def test_a_bad_file_is_replaced(damage, cache, compiled, cubins):
    cubin = cubins[KERNEL]
    path = cache / good_name(KERNEL, cubin)
    cache.mkdir(parents=True)
    damage(path, cubin)
    assert load_or_compile(*KERNEL) == (path, cubin)
    assert compiled == [KERNEL[1]]
    assert files(cache) == [path.name] and path.read_bytes() == cubin
    assert not path.is_symlink()
    load_or_compile(*KERNEL)
    assert compiled == [KERNEL[1]]


def test_bad_files_beside_a_good_one(cache, compiled, cubins):
    cubin = cubins[KERNEL]
    path, _ = load_or_compile(*KERNEL)
    compiled.clear()
    other_digest(path, cubin)
    assert load_or_compile(*KERNEL) == (path, cubin)
    assert compiled == [] and files(cache) == [path.name]


def test_foreign_files_are_left_alone(cache, compiled, cubins):
    cache.mkdir(parents=True)
    foreign = {"notes.txt": b"mine", f"{'0' * 40}-{'0' * 16}.cubin": b"of another kernel"}
    for name, content in foreign.items():
        (cache / name).write_bytes(content)
    (cache / "folder").mkdir()
    for _ in range(2):
        path, cubin = load_or_compile(*KERNEL)
        assert cubin == cubins[KERNEL]
    assert compiled == [KERNEL[1]]
    assert files(cache) == sorted([*foreign, "folder", path.name])
    assert all((cache / name).read_bytes() == content for name, content in foreign.items())


def test_a_folder_of_that_name(cache, compiled, cubins):
    """It cannot be replaced in one step, so this kernel is compiled anew by every process."""
    name = good_name(KERNEL, cubins[KERNEL])
    (cache / name).mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="CUATTN_CACHE_DIR"):
        assert load_or_compile(*KERNEL) == (None, cubins[KERNEL])
    assert files(cache) == [name]
    path, cubin = load_or_compile(*KERNELS[1])
    assert path.read_bytes() == cubin == cubins[KERNELS[1]]


def test_a_folder_beside_a_good_file(cache, compiled, cubins):
    path, _ = load_or_compile(*KERNEL)
    (cache / f"{stem(KERNEL)}-{'0' * 16}.cubin").mkdir()
    compiled.clear()
    assert load_or_compile(*KERNEL) == (path, cubins[KERNEL])
    assert compiled == []


# ---- A cache that cannot be written ----


def plain_file(cache, monkeypatch):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"")


def below_a_plain_file(cache, monkeypatch):
    cache.parent.parent.mkdir(parents=True, exist_ok=True)
    cache.parent.write_bytes(b"")


def read_only_folder(cache, monkeypatch):
    cache.mkdir(parents=True)
    cache.chmod(0o500)


def raises(number):
    def function(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return function


def no_temporary_file(cache, monkeypatch):
    monkeypatch.setattr(tempfile, "mkstemp", raises(errno.EROFS))


def disk_full(cache, monkeypatch):
    class Full:
        """A file that takes one half and no more."""

        def __init__(self, handle, mode):
            self.handle = handle

        def __enter__(self):
            return self

        def __exit__(self, *error):
            os.close(self.handle)

        def write(self, content):
            os.write(self.handle, content[: len(content) // 2])
            raises(errno.ENOSPC)()

    monkeypatch.setattr(os, "fdopen", Full)


def no_rename(number):
    def no_rename(cache, monkeypatch):
        monkeypatch.setattr(os, "replace", raises(number))

    return no_rename


@pytest.mark.parametrize(
    "obstacle",
    [
        plain_file,
        below_a_plain_file,
        pytest.param(
            read_only_folder,
            marks=pytest.mark.skipif(
                not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere"
            ),
        ),
        no_temporary_file,
        disk_full,
        pytest.param(no_rename(errno.ENOSPC), id="no_rename_ENOSPC"),
        pytest.param(no_rename(errno.EROFS), id="no_rename_EROFS"),
    ],
)
def test_an_unwritable_cache_costs_one_warning(obstacle, cache, cubins, monkeypatch):
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        obstacle(cache, patch)
        for _ in range(2):
            for kernel in KERNELS:
                assert load_or_compile(*kernel) == (None, cubins[kernel])
    assert [w.category for w in caught] == [RuntimeWarning]
    message = str(caught[0].message)
    assert str(cache) in message and "CUATTN_CACHE_DIR" in message
    assert files(cache) == []


def test_an_unwritable_cache_is_still_read(cache, compiled, cubins, monkeypatch):
    path, cubin = load_or_compile(*KERNEL)
    monkeypatch.setattr(tempfile, "mkstemp", raises(errno.EROFS))
    assert load_or_compile(*KERNEL) == (path, cubin)
    assert compiled == [KERNEL[1]]


# ---- Where the cache is ----


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CUATTN_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"CUATTN_CACHE_DIR": "~/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/c/a"),
        ({"XDG_CACHE_HOME": "~/b", "HOME": "/c"}, "/c/b/cuattn"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/cuattn"),
        ({"HOME": "/c"}, "/c/.cache/cuattn"),
        ({"CUATTN_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/cuattn"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="HOME is where POSIX looks")
def test_cache_directory(environment, expected, monkeypatch):
    for name in ("CUATTN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_directory() == Path(expected)


def test_the_emulator_keeps_its_libraries_there(tmp_path, monkeypatch):
    import emulator

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUATTN_CACHE_DIR", "~/x")
    assert emulator.build.cache_dir() == (tmp_path / "x" / "emulator").resolve()


def test_no_home(compiled, cubins, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("CUATTN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(RuntimeWarning, match="CUATTN_CACHE_DIR"):
        assert load_or_compile(*KERNEL) == (None, cubins[KERNEL])


# ---- What a key depends on ----


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the CUDA sources, which the package takes for its own."""
    folder = tmp_path / "copy"
    shutil.copytree(compiler.source_directory(), folder)
    monkeypatch.setattr(compiler, "source_directory", lambda: folder)
    compiler.source_digest.cache_clear()
    return folder


def key(header=KERNEL[0], name=KERNEL[1], arch=ARCH, text=""):
    compiler.source_digest.cache_clear()
    return cache_key(header, name, arch, text)


def test_key_of_the_arguments():
    keys = [key(), key(header="softmax/rows.cuh"), key(name=KERNELS[1][1]), key(arch="sm_80")]
    keys.append(key(text="struct Own {};"))
    assert len(set(keys)) == 5 and key() == keys[0]
    assert all(len(k) == 40 and k.isalnum() for k in keys)


def test_key_of_the_options(nvrtc, monkeypatch):
    """And not of the compiler, which need not be there."""
    before = key()
    monkeypatch.setattr(nvrtc, "getVersion", lambda: (99, 1))
    monkeypatch.setattr(compiler, "toolkit_headers", lambda: "elsewhere")
    assert key() == before
    options = compiler.code_options
    monkeypatch.setattr(compiler, "code_options", lambda arch: (*options(arch), "-lineinfo"))
    assert key() != before


def test_another_compiler_compiles_anew(cache, compiled, nvrtc, monkeypatch):
    """What the one before has made stays."""
    old, _ = load_or_compile(*KERNEL)
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "getVersion", lambda: (99, 1))
        new, _ = load_or_compile(*KERNEL)
        assert load_or_compile(*KERNEL)[0] == new
    assert load_or_compile(*KERNEL)[0] == old
    assert compiled == [KERNEL[1]] * 2
    assert files(cache) == sorted([old.name, new.name]) and "-99.1-" in new.name


def append(folder):
    with open(folder / "primitives" / "warp.cuh", "a") as file:
        file.write("\n")


def same_length(folder):
    path = folder / "ptx" / "math.cuh"
    path.write_bytes(path.read_bytes()[::-1])


def rename(folder):
    (folder / "softmax/merge.cuh").rename(folder / "softmax_merged.cuh")


def add(folder):
    (folder / "ptx" / "new.cuh").write_bytes(b"")


def delete(folder):
    (folder / "softmax/merge.cuh").unlink()


def swap(folder):
    one, other = folder / "ptx" / "math.cuh", folder / "ptx" / "smem.cuh"
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)


def swallow(folder):
    """One file becomes the end of the one before it, name and all."""
    one, other = folder / "softmax/merge.cuh", folder / "softmax/rows.cuh"
    one.write_bytes(one.read_bytes() + b"softmax/rows.cuh\n" + other.read_bytes())
    other.unlink()


@pytest.mark.parametrize("edit", [append, same_length, rename, add, delete, swap, swallow])
def test_key_of_the_sources(edit, sources):
    before = key()
    edit(sources)
    assert key() != before


def test_key_is_that_of_the_content(sources, monkeypatch):
    """Two installations of the same version share their files."""
    copied = key()
    monkeypatch.undo()
    assert key() == copied


def test_an_edited_header_is_compiled(cache, compiled, sources):
    old, _ = load_or_compile(*KERNEL)
    append(sources)
    compiler.source_digest.cache_clear()
    new, _ = load_or_compile(*KERNEL)
    assert compiled == [KERNEL[1]] * 2
    assert files(cache) == sorted([old.name, new.name])


def test_missing_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "cuattn" / "_device" / "compiler.py"))
    with pytest.raises(FileNotFoundError, match="install cuattn again"):
        compiler.source_directory.__wrapped__()


@pytest.mark.parametrize("where", ["cuattn/cuda_src", "cuda_src"])
def test_sources_inside_a_package_or_beside_it(where, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "cuattn" / "_device" / "compiler.py"))
    (tmp_path / where / "softmax").mkdir(parents=True)
    (tmp_path / where / "softmax" / "rows.cuh").write_bytes(b"")
    assert compiler.source_directory.__wrapped__() == tmp_path / where


# ---- The compiler ----

# What an NVRTC knows that newer devices are strange to; 53, 62, 72, 87, 101 and 110 are Tegra's.
KNOWN = (53, 60, 62, 70, 72, 75, 80, 86, 87, 90, 100, 101, 110, 120)


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        (53, "sm_53"),
        (61, "sm_60"),
        (70, "sm_70"),
        (72, "sm_72"),
        (73, "sm_70"),
        (75, "sm_75"),
        (86, "sm_86"),
        (87, "sm_87"),
        (88, "sm_86"),
        (89, "sm_86"),
        (90, "sm_90"),
        (101, "sm_101"),
        (103, "sm_100"),
        (110, "sm_110"),
        (121, "sm_120"),
    ],
)
def test_architecture(capability, target, nvrtc, monkeypatch):
    monkeypatch.setattr(nvrtc, "getSupportedArchs", lambda: list(KNOWN))
    assert compiler.architecture(capability) == target


@pytest.mark.parametrize("capability", [53, 62, 72, 87, 101, 110])
def test_no_other_code_runs_on_tegra(capability, nvrtc, monkeypatch):
    """Nor does its own anywhere else, not on a newer device of the same major version."""
    monkeypatch.setattr(nvrtc, "getSupportedArchs", lambda: [a for a in KNOWN if a != capability])
    with pytest.raises(RuntimeError, match=f"compute capability {capability / 10}"):
        compiler.architecture(capability)
    monkeypatch.setattr(nvrtc, "getSupportedArchs", lambda: [capability])
    with pytest.raises(RuntimeError, match=f"compute capability {capability // 10}.9"):
        compiler.architecture(capability // 10 * 10 + 9)


@pytest.mark.parametrize(("capability", "version"), [(52, "5.2"), (119, "11.9"), (130, "13.0")])
def test_unknown_architecture(capability, version, nvrtc, monkeypatch):
    monkeypatch.setattr(nvrtc, "getSupportedArchs", lambda: list(KNOWN))
    with pytest.raises(RuntimeError, match=rf"{version}; .*install a newer CUDA toolkit"):
        compiler.architecture(capability)


def test_architectures_of_this_compiler(nvrtc):
    known = nvrtc.getSupportedArchs()
    assert [compiler.architecture(a) for a in known] == [f"sm_{a}" for a in known]


def test_compile_error(nvrtc, monkeypatch):
    destroyed, destroy = [], nvrtc.destroyProgram
    monkeypatch.setattr(nvrtc, "destroyProgram", lambda p: (destroyed.append(p), destroy(p)))
    name = "softmax_rows<SoftmaxForward<float>, 32, 4, 1, 1>"
    with pytest.raises(compiler.CompileError) as caught:
        compiler.compile_kernel("softmax/rows.cuh", name, "sm_80")
    message = str(caught.value)
    assert all(part in message for part in (name, "softmax/rows.cuh", "sm_80", "too few arguments"))
    assert isinstance(caught.value, RuntimeError) and len(destroyed) == 1


def test_missing_headers(monkeypatch):
    pathfinder = pytest.importorskip("cuda.pathfinder")
    monkeypatch.setattr(pathfinder, "find_nvidia_header_directory", lambda name: None)
    with pytest.raises(RuntimeError, match=r"cuda_fp16\.h.*pip install"):
        compiler.toolkit_headers.__wrapped__()


# ---- Symbols ----


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel[1])
def test_kernel_symbol(kernel, cubins):
    symbol = compiler.kernel_symbol(cubins[kernel])
    assert symbol.startswith("_Z") and "state_merge" in symbol
    assert f".text.{symbol}\0".encode() in cubins[kernel]


def test_kernel_symbol_of_a_part(cubins):
    cubin = cubins[KERNEL]
    for length in range(len(cubin)):
        with pytest.raises(ValueError, match="cubin"):
            compiler.kernel_symbol(cubin[:length])


def test_kernel_symbol_of_garbage(cubins, rng):
    """ValueError or a string, whatever the bytes are, and never another error."""
    cubin = cubins[KERNEL]
    garbage = [b"\xff" * 5000, b"\x7fELF" + b"\xff" * 5000, b"\x7fELF" + bytes(5000), bytes(64)]
    garbage += [b"\0" + cubin[1:], b"\0" * len(cubin), *(rng.bytes(n) for n in (1, 63, 64, 1000))]
    for bad in garbage:
        with pytest.raises(ValueError, match="cubin"):
            compiler.kernel_symbol(bad)
    table = int.from_bytes(cubin[40:48], "little")
    places = [*range(64), *rng.integers(table, len(cubin), 500)]
    for place in places:
        for value in (0, 0x7F, 0xFF, int(rng.integers(256))):
            broken = bytearray(cubin)
            broken[place] = value
            try:
                assert isinstance(compiler.kernel_symbol(bytes(broken)), str)
            except ValueError:
                pass


def test_kernel_symbol_needs_a_kernel(cubins):
    with pytest.raises(ValueError, match="no kernel"):
        compiler.kernel_symbol(cubins[KERNEL].replace(b".text.", b".tent."))
