"""Kernels of calls that do not run: compiled ahead for a device that need not be there."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from cuattn._arrays import scalars
from cuattn._arrays.checks import kind, shown
from cuattn._device import runtime as device_runtime
from cuattn._device.kernel import Kernel, Limits
from cuattn._device.recent import Recent
from cuattn._device.workspace import Workspace

# Multiprocessors by compute capability: those of
NUM_SMS = {
    75: 40,  # T4
    80: 108,  # A100
    86: 84,  # A40
    87: 16,  # Jetson AGX Orin
    89: 142,  # L40S
    90: 132,  # H100 SXM, H200, GH200
    100: 148,  # B200
    103: 148,  # B300
    110: 20,  # Jetson AGX Thor
    120: 188,  # RTX PRO 6000
    121: 48,  # GB10
}


class Recorder:
    """The runtime of a device that is not there. NumPy arrays stand for arrays of it, their owners
    aligned as its allocator aligns; results are zeros, and memory that nobody touches.
    """

    xp = np

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.recent = Recent()
        self.kernels: dict[tuple[str, str], Kernel] = {}  # by name and suffix

    def device(self, array: Any) -> int:
        return 0

    def address(self, array: Any) -> int:
        """With owners as far apart as their addresses are, times 256, so that they are aligned."""
        low = at = array.__array_interface__["data"][0]
        base = array.base
        while isinstance(base, np.ndarray):
            low, base = base.__array_interface__["data"][0], base.base
        return int(256 * low + at - low)

    def signature(self, array: Any) -> tuple[Any, ...]:
        """As that of `runtime.Cuda`."""
        return array.shape, array.strides, array.dtype, self.address(array) % 16

    def limits(self, device: int) -> Limits:
        return self._limits

    def on(self, device: int) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return np.zeros(shape, dtype)

    def workspace(self, function: str, counters: int, part_bytes: int) -> Workspace:
        return Workspace(np.zeros(counters, np.uint32), np.zeros(part_bytes, np.uint8))

    def tensor_map(self, *array: Any) -> bytes:
        return bytes(128)

    def launch(
        self, kernel: Kernel, params: bytes, reads: tuple[Any, ...], writes: tuple[Any, ...]
    ) -> None:
        self.kernels[kernel.name, kernel.suffix] = kernel


@contextlib.contextmanager
def recording(limits: Limits) -> Iterator[Recorder]:
    """A block in which calls of this thread on NumPy arrays go through a `Recorder`."""
    thread, recorder = threading.get_ident(), Recorder(limits)
    before = device_runtime.recorders.get(thread)
    device_runtime.recorders[thread] = recorder
    try:
        yield recorder
    finally:
        if before is None:
            del device_runtime.recorders[thread]
        else:
            device_runtime.recorders[thread] = before


@contextlib.contextmanager
def compile(*, arch: int | str, num_sms: int | None = None) -> Iterator[list[str]]:
    """Compile the kernels of the calls in a block into the cache, for a GPU that need not be here.

    Within the block calls of this thread on NumPy arrays are checked and planned as those on CuPy
    arrays of the same shapes, strides and dtypes are, on a GPU of that architecture. They compute
    nothing: results are zeros, and `out` is not written. At the end of the block all kernels that
    they would launch and that the cache does not have are compiled, whatever ``CUATTN_COMPILE`` is.
    That needs CuPy, NVRTC and its headers, but no GPU and no driver. ``python -m cuattn compile``
    does it for common shapes.

    Which kernel a call needs depends on dtypes, sizes, strides and options, and never on what is in
    an array; but arrays of lengths, offsets and pages must hold valid numbers, as NumPy arrays
    always must. As on a GPU, arrays of their own are aligned, and slices may not be.

    Parameters
    ----------
    arch : int or str
        Compute capability: 90 or ``"sm_90"``.
    num_sms : int, optional
        Multiprocessors of the GPU, on which the kernels of small calls depend. By default those of
        a common one: 108 for 80 (A100), 132 for 90 (H100, H200), 148 for 100 (B200).

    Yields
    ------
    kernels : list of str
        Empty within the block; behind it, what the calls need, whether it was compiled now or
        before.

    Raises
    ------
    TypeError, ValueError
        If `arch` or `num_sms` is not valid, or there is no default `num_sms` for `arch`.
    RuntimeError
        At the end of the block, if a kernel cannot be compiled.

    See Also
    --------
    show_config : Says where the cache is.

    Examples
    --------
    >>> x = numpy.zeros((16, 50257), numpy.float16)
    >>> with cuattn.compile(arch=90) as kernels:
    ...     best = cuattn.softmax_topk(x, 50)
    >>> best.values.shape
    (16, 50)
    >>> len(kernels)
    1
    """
    limits = limits_of(arch, num_sms)
    names: list[str] = []
    with recording(limits) as recorder:
        yield names
    for kernel in recorder.kernels.values():
        load(kernel, limits.compute_capability)
        names.append(kernel.name)


def load(kernel: Kernel, compute_capability: int) -> Any:
    """Compile a kernel, if the cache does not have it: its file and cubin."""
    from cuattn._device import cache, compiler

    target = compiler.architecture(compute_capability) + kernel.suffix
    return cache.load_or_compile(kernel.header, kernel.name, target, kernel.text, always=True)


def limits_of(arch: int | str, num_sms: int | None) -> Limits:
    """What plans depend on, of a GPU that is not there."""
    words = f"arch must be a compute capability such as 90 or 'sm_90', but it is {shown(arch)}"
    if isinstance(arch, str):
        found = re.fullmatch(r"(?:sm_)?(\d{2,3})a?", arch)
        if found is None:
            raise ValueError(words)
        capability = int(found[1])
    elif isinstance(arch, bool) or not isinstance(arch, (int, np.integer)):
        raise TypeError(f"{words} ({kind(arch)})")
    else:
        capability = int(arch)
    if capability < min(NUM_SMS):
        raise ValueError(words)
    if num_sms is None:
        if capability not in NUM_SMS:
            raise ValueError(f"num_sms must be given for arch {capability}, but it is None")
        return Limits(capability, NUM_SMS[capability])
    if scalars.count("num_sms", num_sms) == 0:
        raise ValueError("num_sms must be at least 1, but it is 0")
    return Limits(capability, int(num_sms))
