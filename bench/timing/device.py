"""What the harness needs of a GPU: a clock on its stream, a cold cache, a head start for the host.

The tests drive the same harness with a device that only counts
(tests/benchmarks/test_bench_harness.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

# Busy-waits, so that the host can enqueue what is timed before the device reaches it.
DELAY = """
extern "C" __global__ void delay(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}
"""
CLOCK_HZ = 3e9  # above the SM clock of any device so far (RTX 4090: 2.5 GHz): never too short
LONGEST_DELAY = 0.05  # seconds


class CudaDevice:
    """The current CUDA device through CuPy; all work goes to one stream of its own."""

    def __init__(self) -> None:
        import cupy

        self.xp = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        l2_bytes = properties["l2CacheSize"]
        self._evict = cupy.zeros(max(4 * l2_bytes, 1 << 28) // 4, cupy.float32)
        self._delay = cupy.RawKernel(DELAY, "delay")
        cupy.cuda.Device().synchronize()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the stream CuPy's current one."""
        with self.stream:
            yield

    def flush(self) -> None:
        """Evict everything from L2 by reading four times its size.

        Reading leaves clean lines: a memset would leave dirty ones, whose write-back falls into
        the time of what follows.
        """
        self._evict.max()

    def delay(self, seconds: float) -> None:
        """Keep the stream busy for at least this long."""
        cycles = int(min(seconds, LONGEST_DELAY) * CLOCK_HZ)
        self._delay((1,), (1,), (self.xp.int64(cycles),))

    def mark(self) -> Any:
        """An event on the stream."""
        event = self.xp.cuda.Event()
        event.record(self.stream)
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Device time between two events; waits for the second one."""
        end.synchronize()
        return 1e-3 * self.xp.cuda.get_elapsed_time(start, end)

    def synchronize(self) -> None:
        """Wait for all work of the device, whoever enqueued it."""
        self.xp.cuda.Device().synchronize()

    def free_bytes(self) -> int:
        """Device memory that an allocation could still get."""
        self.xp.get_default_memory_pool().free_all_blocks()
        return self.xp.cuda.runtime.memGetInfo()[0]
