"""Samplers of the peers: each draws as often as is probable, among what the filters leave."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
from conftest import why_no_gpu
from test_peers import installed, run, stubs  # noqa: F401

from bench import peers
from bench.peers import Filters
from bench.peers._cupy import Cupy

P = np.array([0.4, 0.25, 0.2, 0.1, 0.05])  # of each row, turned by its number
DRAWS = 2000
FILTERS = [
    Filters(),
    Filters(top_k=3),
    Filters(top_p=0.8),  # three, as 0.65 are not enough
    Filters(min_p=0.3),
    Filters(top_k=4, top_p=0.6, min_p=0.5),  # of 0.95 two are enough
]
DRAWN = [5, 3, 3, 3, 2]  # elements that each leaves


def check_draws(contestant, filters, rng, stream=None, asarray=np.asarray):
    """The frequency of every element, in rows that differ in nothing but where it lies."""
    turns = rng.integers(0, len(P), DRAWS)
    place = (np.arange(len(P)) + turns[:, None]) % len(P)
    x = np.empty((DRAWS, len(P)), np.float32)
    np.put_along_axis(x, place, np.log(P).astype(np.float32)[None], -1)
    seeds = rng.integers(0, 1 << 62, (DRAWS, 1))
    got = run(contestant, [asarray(x), asarray(seeds)], stream)
    assert got.dtype.kind == "i" and got.shape in ((DRAWS,), (DRAWS, 1))
    found = np.bincount((got.reshape(-1) - turns) % len(P), minlength=len(P))
    left = DRAWN[FILTERS.index(filters)] if filters in FILTERS else 2
    p = np.where(np.arange(len(P)) < left, P, 0) / P[:left].sum()
    assert (abs(found - DRAWS * p) <= 5 * np.sqrt(DRAWS * p * (1 - p))).all(), (found, p)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("name", ["cupy", "torch", "jax"])
def test_samplers_draw_as_often_as_is_probable(name, filters, rng):
    library = Cupy(np, scipy.special) if name == "cupy" else installed(name)
    contestants = list(library.samplers(filters))
    assert len(contestants) == {"cupy": 2, "torch": 3, "jax": 1}[name]
    for contestant in contestants:
        if not contestant.name.startswith("torch.compile"):
            check_draws(contestant, filters, rng)


def test_a_sampler_that_draws_something_else_is_seen(rng):
    def uniform(x, seeds):
        return rng.integers(0, x.shape[1], len(x))

    for filters in (Filters(), Filters(top_k=3)):
        with pytest.raises(AssertionError):
            check_draws(peers.Contestant("", Cupy(np, scipy.special), uniform), filters, rng)


@pytest.mark.slow
@pytest.mark.parametrize("filters", FILTERS)
def test_torch_compiles_draws(filters, rng):
    (contestant,) = [
        one for one in installed("torch").samplers(filters) if one.name[:13] == "torch.compile"
    ]
    check_draws(contestant, filters, rng)


@pytest.mark.parametrize(
    ("filters", "kinds"),
    [
        (Filters(), ["logits", "probs"]),
        (Filters(top_k=3), ["logits", "probs"]),
        (Filters(top_k=3, top_p=0.6), ["logits"]),
        (Filters(top_p=0.6), ["probs"]),
        (Filters(min_p=0.3), ["probs"]),
        (Filters(top_k=3, min_p=0.3), []),
    ],
)
def test_flashinfer_draws_by_the_function_for_the_filters(stubs, filters, kinds, rng):  # noqa: F811
    contestants = list(stubs[4].samplers(filters))
    assert [one.name for one in contestants] == [f"flashinfer from {kind}" for kind in kinds]
    for contestant in contestants:
        check_draws(contestant, filters, rng)
    assert not [one for each in stubs if each is not stubs[4] for one in each.samplers(filters)]


@pytest.mark.gpu
@pytest.mark.parametrize("filters", FILTERS)
def test_all_samplers_on_the_gpu(filters, rng):
    if reason := why_no_gpu():
        pytest.skip(reason)
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    ran = []
    for contestant in peers.contestants("sample", **filters._asdict()):
        try:
            check_draws(contestant, filters, rng, stream, _on_device)
        except peers.Unsupported as error:
            if "the software device cannot run" not in str(error):
                continue
        ran.append(contestant.name)  # as far as it can
    assert "CuPy x + Gumbel noise" in ran


def _on_device(array):
    import cupy

    on_device = cupy.asarray(array)
    cupy.cuda.runtime.deviceSynchronize()
    return on_device
