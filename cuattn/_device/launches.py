"""What is left of a call once it is planned: allocate its results, pack addresses, launch."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from cuattn._device.host import Computed
from cuattn._device.kernel import Kernel
from cuattn._device.params import Params
from cuattn._device.tensor_map import Boxes


class Made(NamedTuple):
    """An array that a call allocates, C-contiguous but for the order of its axes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    order: tuple[int, ...] | None = None  # axes, slowest first; None: C order


# Parameters of a kernel, piece by piece: bytes, or a struct, which may have some of its fields. The
# others are those of a call: addresses and numbers, by name; an array that it does not have is 0.
Block = Sequence[bytes | Params | tuple[Params, Mapping[str, Any]]]

# Of arrays that are made the last ones, which kernels also read.
WORKSPACES = "partial", "images", "sums", "totals"
SHARED = "counters", "parts"  # the arrays of a `workspace.Workspace`


class Launches:
    """Kernels of a call with all of their parameters but addresses and numbers.

    Parameters
    ----------
    reads, writes : sequence of str
        Arrays that come in, by the names of their fields; `writes` are results.
    made : mapping of str to Made
        Arrays that are allocated.
    returned : sequence of str
        Which of all these a call returns.
    kernels : sequence of (Kernel, Block)
        In the order of their launches.
    numbers : sequence of str, optional
        Fields that are given with each call, as addresses are.
    boxes : sequence of sequences of (str, Boxes), optional
        Of each kernel the arrays whose tensor maps come first among its parameters.
    derived : (sequence of str, callable), optional
        Fields that are computed from the addresses of `reads`, `writes` and `made`.
    in_place : bool, optional
        Whether a result may be an array that is read, as the same view.
    updates : sequence of str, optional
        More arrays that come in, behind `reads`: read, and written in place.
    shared : (str, int, int), optional
        The function, and how many counters and bytes of parts, as fields called so, it has in the
        workspace of the stream.
    """

    def __init__(
        self,
        reads: Sequence[str],
        writes: Sequence[str],
        made: Mapping[str, Made],
        returned: Sequence[str],
        kernels: Sequence[tuple[Kernel, Block]],
        *,
        numbers: Sequence[str] = (),
        boxes: Sequence[Sequence[tuple[str, Boxes]]] = (),
        derived: tuple[Sequence[str], Callable[[list[int]], Sequence[int]] | None] = ((), None),
        in_place: bool = False,
        updates: Sequence[str] = (),
        shared: tuple[str, int, int] | None = None,
    ) -> None:
        self.given, self.in_place = (*reads, *updates, *writes), in_place
        arrays, (more, self._derived) = [*self.given, *made], derived
        self.reads, self._made = len(reads) + len(updates), tuple(made.values())
        self.allocates = bool(made)
        self.written, self._shared = len(reads), shared  # the first array that is written
        self._workspace = len(arrays) - sum(name in made for name in WORKSPACES)
        arrays += SHARED if shared else ()
        self._returned = [arrays.index(name) for name in returned]
        self._boxes = [[(arrays.index(name), box) for name, box in some] for some in boxes]
        self._mapped = sorted({i for some in self._boxes for i, _ in some})
        self._places = {name: i for i, name in enumerate((*numbers, *arrays, *more))}
        self._constants: list[bytes] = []  # behind them
        self.kernels = [(kernel, *self._packer(block)) for kernel, block in kernels]

    def _packer(self, block: Block) -> tuple[Callable[..., bytes], Callable[[list[Any]], Any]]:
        """What packs a block, and what picks its fields out of those of a call. What is known
        between two of these is packed here: a constant."""
        fields: list[tuple[str, Any]] = []  # code, and name or value
        for piece in block:
            if isinstance(piece, bytes):
                fields.append((f"{len(piece)}s", piece))
                continue
            params, known = piece if isinstance(piece, tuple) else (piece, {})
            for name, code in params.codes.items():
                value = known.get(name, name if name in self._places else 0)
                values = value if isinstance(value, tuple) else (value,)
                fields += [(code[-1], one) for one in values]
        layout, places = "=", []
        for of_call, run in groupby(fields, lambda field: isinstance(field[1], str)):
            if of_call:
                for code, name in run:
                    layout += code
                    places.append(self._places[name])
            else:
                constant = b"".join(struct.pack(f"={code}", value) for code, value in run)
                layout += f"{len(constant)}s"
                places.append(len(self._places) + len(self._constants))
                self._constants.append(constant)
        return struct.Struct(layout).pack, itemgetter(*places)

    def run(self, runtime: Any, arrays: list[Any], numbers: tuple[Any, ...] = ()) -> list[Any]:
        """Launch on the device of the arrays, which are those `given`; what is returned."""
        arrays = [*arrays]
        with runtime.on(runtime.device(arrays[0])):
            shared = runtime.workspace(*self._shared) if self._shared else ()
            for shape, dtype, order in self._made:
                arrays.append(
                    runtime.empty(shape, dtype)
                    if order is None
                    else _ordered(runtime, shape, dtype, order)
                )
            arrays += shared
            at = [*map(runtime.address, arrays)]
            maps = self._tensor_maps(runtime, at) if self._boxes else [b""] * len(self.kernels)
            more = self._derived(at) if self._derived else ()
            fields = [*numbers, *at, *more, *self._constants]
            reads = arrays[: self.reads] + arrays[self._workspace :]
            writes = arrays[self.written :]
            for (kernel, pack, pick), own in zip(self.kernels, maps):  # noqa: B905
                runtime.launch(kernel, own + pack(*pick(fields)), reads, writes)
        return [*map(arrays.__getitem__, self._returned)]

    def _tensor_maps(self, runtime: Any, at: list[int]) -> list[bytes]:
        """Those of `boxes`; the driver takes its time to encode one."""
        key = (self, *[at[i] for i in self._mapped])
        maps = runtime.recent.get(key)
        if maps is None:
            maps = [
                b"".join([runtime.tensor_map(at[i], *box) for i, box in some])
                for some in self._boxes
            ]
            runtime.recent.put(key, maps)
        return maps


def _ordered(runtime: Any, shape: tuple[int, ...], dtype: np.dtype, order: tuple[int, ...]) -> Any:
    packed = runtime.empty(tuple(shape[d] for d in order), dtype)
    return packed.transpose(tuple(order.index(d) for d in range(len(order))))


class Prepared(NamedTuple):
    """A call that has nothing left but its launches."""

    runtime: Any
    launches: Launches | Computed
    arrays: Mapping[str, Any]  # by the names of their fields
    numbers: tuple[Any, ...]
    kind: Callable[..., Any]  # of what the function returns, made of the results
    names: Mapping[str, str]  # what errors call the arrays; "": not to be looked up
    unread: Sequence[str] = ()  # arrays among the arguments that change nothing

    def results(self) -> list[Any]:
        arrays = [self.arrays[name] for name in self.launches.given]
        return self.launches.run(self.runtime, arrays, self.numbers)

    def launch(self) -> Any:
        return self.kind(*self.results())


def one_or_all(*results: Any) -> Any:
    """A result by itself, several as a tuple."""
    return results if len(results) > 1 else results[0]
