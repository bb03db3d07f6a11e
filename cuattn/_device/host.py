"""Calls on NumPy arrays in the terms of those on a device, for `signatures`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cuattn._device.recent import Recent


class Host:
    """What signatures need of a runtime. A call with `out` is not remembered: addresses count."""

    xp = np

    def __init__(self) -> None:
        self.recent = Recent()

    def signature(self, array: np.ndarray) -> tuple[Any, ...]:
        """All that a call may depend on of an array, except for its contents."""
        return array.shape, array.strides, array.dtype


HOST = Host()


class Computed:
    """In the place of `Launches`: what is left of a checked call is a function.

    Parameters
    ----------
    given : sequence of str
        Arrays that come in, by the names of their fields.
    run : callable
        Of the runtime, the arrays and the numbers of a call; it returns the results.
    """

    in_place = allocates = False

    def __init__(self, given: Sequence[str], run: Callable[..., list[Any]]) -> None:
        self.given, self.run = given, run
        self.reads = self.written = len(given)
