"""What is remembered of earlier calls."""

from __future__ import annotations

import threading
from typing import Any


class Recent:
    """The latest entries of a dict, for any number of threads."""

    def __init__(self, most: int = 4096) -> None:
        self._entries: dict[Any, Any] = {}
        self._most, self._lock = most, threading.Lock()
        self.get = self._entries.get

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: Any, value: Any) -> None:
        """Remember, and forget the oldest entry where there are too many."""
        with self._lock:
            self._entries[key] = value
            if len(self._entries) > self._most:
                del self._entries[next(iter(self._entries))]
