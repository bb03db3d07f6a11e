"""RAPIDS: exact nearest neighbours by cuVS, and the selection of RAFT behind CuPy's product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.peers._base import Call, Contestant, refusing, require_dtype, require_products
from bench.peers._cupy import Cupy


class Rapids(Cupy):
    """CuPy arrays; work goes to the stream of the package's resources, which nobody waits for."""

    make: Any  # resources of a stream
    call: Any  # made for so many keys: a function of q and k
    title: str

    def __init__(self, *cupy: Any) -> None:
        super().__init__(*cupy)
        self._stream: Any = None
        self.resources: Any = None

    def contestants(self, operation: str, k: int | None, causal: bool) -> Iterator[Contestant]:
        """None: neighbours are all that it has."""
        yield from ()

    def samplers(self, filters: Any) -> Iterator[Contestant]:
        """None."""
        yield from ()

    def variants(self, operation: str, **options: Any) -> Iterator[Contestant]:
        """Neighbours by inner product."""
        if operation == "attention_topk":
            call: Call = self.call(self, **options)
            yield Contestant(self.title, self, refusing(call, TypeError, ValueError))

    def on_stream(self, stream: Any) -> Any:
        """CuPy's stream, and that of the resources."""
        if self.resources is None or self._stream is not stream:
            self._stream, self.resources = stream, self.make(stream=getattr(stream, "ptr", None))
        return super().on_stream(stream)

    def results(self, q: Any, num: int) -> tuple[Any, Any]:
        """Memory for values and indices."""
        values, indices = (self.xp.empty((len(q), num), d) for d in (np.float32, np.int64))
        return values, indices


class BruteForce:
    """cuVS's search. The index of all vectors is built in the first call with them."""

    __name__ = "brute_force"

    def __init__(self, library: Cuvs, num: int) -> None:
        self._library, self._num = library, num
        self._built: dict[int, tuple[Any, Any]] = {}  # with the vectors, which have to live as long

    def __call__(self, q: Any, k: Any) -> tuple[Any, Any]:
        """The best first."""
        library = self._library
        require_dtype(q, "float16", "float32")
        if id(k) not in self._built:
            how = {"metric": "inner_product", "resources": library.resources}
            self._built[id(k)] = k, library.package.build(k, **how)
        values, indices = library.results(q, self._num)
        into = {"neighbors": indices, "distances": values, "resources": library.resources}
        library.package.search(self._built[id(k)][1], q, self._num, **into)
        return values, indices


class SelectK:
    """RAFT's selection from all products, in float32; the order of what it selects is open."""

    __name__ = "select_k"

    def __init__(self, library: Raft, num: int) -> None:
        self._library, self._num = library, num

    def __call__(self, q: Any, k: Any) -> tuple[Any, Any]:
        """The best first."""
        library = self._library
        require_dtype(q, "float32")
        require_products(q, k)
        values, indices = library.results(q, self._num)
        into = {"distances": values, "indices": indices, "handle": library.resources}
        library.select_k(q @ k.T, select_min=False, **into)
        order = library.xp.argsort(-values, axis=-1)
        take = library.xp.take_along_axis
        return take(values, order, -1), take(indices, order, -1)


class Cuvs(Rapids):
    """docs.nvidia.com/cuvs/api-reference/python-api-neighbors-brute-force."""

    name, title, call = "cuvs", "cuVS brute_force", BruteForce

    def __init__(self, *cupy: Any) -> None:
        import cuvs
        from cuvs.common import Resources
        from cuvs.neighbors import brute_force

        super().__init__(*cupy)
        self.version, self.make, self.package = cuvs.__version__, Resources, brute_force


class Raft(Rapids):
    """docs.rapids.ai/api/raft/stable/pylibraft_api/matrix."""

    name, title, call = "raft", "CuPy matmul, RAFT select_k", SelectK

    def __init__(self, *cupy: Any) -> None:
        import pylibraft
        from pylibraft.common import DeviceResources
        from pylibraft.matrix import select_k

        super().__init__(*cupy)
        self.version, self.make, self.select_k = pylibraft.__version__, DeviceResources, select_k
