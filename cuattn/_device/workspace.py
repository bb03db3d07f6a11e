"""Memory by which the blocks of a launch hand each other parts of results, kept between calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np

from cuattn._device.kernel import power_of_two

LEAST = 1 << 14, 1 << 23  # counters, bytes of parts


class Workspace(NamedTuple):
    """Of the launches of one stream, which come one after another."""

    counters: Any  # uint32; 0 before and after every launch
    parts: Any  # bytes


class Workspaces:
    """The workspaces of a runtime, by stream. Larger ones replace those that are too small, which
    live on: captured graphs may use them.

    Parameters
    ----------
    zeros, empty : callable
        What makes an array of a shape and dtype on the current stream.
    least : tuple of int, optional
        How many counters and bytes there are at least.
    """

    def __init__(
        self,
        zeros: Callable[..., Any],
        empty: Callable[..., Any],
        least: tuple[int, int] = LEAST,
    ) -> None:
        self._zeros, self._empty, self._least = zeros, empty, least
        self._latest: dict[Hashable, Workspace] = {}
        self.all: list[Workspace] = []
        self._lock = threading.Lock()

    def of(
        self,
        stream: Hashable,
        function: str,
        counters: int,
        part_bytes: int,
        is_capturing: Callable[[], bool],
    ) -> Workspace:
        """That of a stream, the current one, with so much room for a function.

        Raises
        ------
        RuntimeError
            There is none, and what the stream is asked to do is captured for later.
        """
        found = self._latest.get(stream)
        if found is None or found[0].size < counters or found[1].size < part_bytes:
            with self._lock:
                found = self._latest.get(stream)
                if found is None or found[0].size < counters or found[1].size < part_bytes:
                    if is_capturing():
                        raise RuntimeError(
                            f"{function} must run once on this stream before it is captured"
                        )
                    found = self._larger(found, counters, part_bytes)
                    self.all.append(found)
                    self._latest[stream] = found
        return found

    def _larger(self, found: Workspace | None, counters: int, part_bytes: int) -> Workspace:
        """With room for both; powers of two, so that all together are at most twice the last."""
        old_counters, old_parts = found or (None, None)
        if old_counters is None or old_counters.size < counters:
            size = power_of_two(max(counters, self._least[0]))
            old_counters = self._zeros((size,), np.dtype(np.uint32))
        if old_parts is None or old_parts.size < part_bytes:
            size = power_of_two(max(part_bytes, self._least[1]))
            old_parts = self._empty((size,), np.dtype(np.uint8))
        return Workspace(old_counters, old_parts)
