"""cuattn.dask.sample: the draws of the whole array, however it is chunked."""

from __future__ import annotations

import numpy as np
import pytest
from cases import INF, NAN, draw
from sample_cases import clear_rows
from tolerance import FLOATS

import cuattn

pytest.importorskip("dask")

import dask.array as da
from test_dask import any_chunking, any_width, chunked, compute, threads

import cuattn.dask as cd

__all__ = ["threads"]  # a fixture, for all tests here

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 20},
    {"top_p": 0.8},
    {"top_k": 30, "top_p": 0.6},
    {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


def check(rng, x, num, chunking, **options):
    want = cuattn.sample(x, num, return_log_prob=True, **options)
    lazy = cd.sample(
        chunked(rng, x, chunking), num, return_log_prob=True, **options, split_every=any_width(rng)
    )
    assert isinstance(lazy, cuattn.Sample)
    indices, log_prob = compute(tuple(lazy))
    np.testing.assert_array_equal(indices, want.indices)
    np.testing.assert_allclose(log_prob, want.log_prob, 1e-5, 1e-5)


@any_chunking
@pytest.mark.parametrize("filters", FILTERS)
def test_draws_are_exactly_those(rng, chunking, filters):
    x = clear_rows(rng, (9, 60), **filters)
    x[0, 5], x[1, 7], x[2], x[3, 1:] = NAN, INF, -INF, -INF
    x[4] = rng.integers(-1, 2, 60) * (1 + 9 * ("top_p" in filters))
    check(rng, x, int(rng.choice([1, 4, 70])), chunking, seed=3, offset=2**40, **filters)


@pytest.mark.drawn
@any_chunking
def test_axes_scales_and_masks(rng, chunking):
    x = draw(rng, (4, 5, 12))
    for axis in (0, 1, -1, None):
        rows = np.sum(x, axis, keepdims=True).shape
        scale = np.float32(rng.integers(1, 9, rows) / 4)
        seeds = rng.integers(2**63, size=rows)
        for options in (
            {"seed": 5},
            {"seed": seeds, "offset": seeds >> 1, "scale": scale},
            {"seed": 5, "scale": scale, "where": rng.random(x.shape) < 0.6},
            {"seed": 7, "where": rng.random(12) < 0.6, "top_k": 3},
        ):
            check(rng, x, 3, chunking, axis=axis, **options)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(rng, dtype):
    for filters in ({}, {"top_k": 5}):
        check(rng, draw(rng, (4, 30), dtype), 7, "uneven", seed=3, scale=0.7, **filters)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (3, 0, 4)])
def test_arrays_without_elements(rng, shape):
    for options in ({}, {"top_p": 0.5, "min_p": 0.1}, {"top_k": 3}):
        check(rng, np.ones(shape, np.float32), 2, "whole rows", seed=3, **options)


def test_seeds_of_dask(rng):
    """Also one without dimensions, which counts as a number."""
    x, seeds = draw(rng, (6, 20)), np.arange(6)[:, None]
    lazy = chunked(rng, x)
    for seed in (seeds, np.array(5)):
        got = cd.sample(lazy, 3, seed=da.from_array(seed, chunks=2), offset=da.from_array(seed))
        np.testing.assert_array_equal(compute(got), cuattn.sample(x, 3, seed=seed, offset=seed))


@pytest.mark.parametrize(
    "options",
    [
        {"seed": -1},
        {"seed": 1.0},
        {"seed": 1, "offset": 2**63},
        {"seed": np.ones(5, int)},
        {"seed": 1, "top_k": 0},
        {"seed": 1, "top_p": 2},
        {"seed": 1, "min_p": -1},
        {"seed": 1, "axis": 2},
        {"seed": 1, "where": np.ones((5, 6), bool)},
        {"generator": 1},
        {},
    ],
)
def test_errors_are_those_of_arrays(options):
    x = np.ones((4, 6), np.float32)
    with pytest.raises((TypeError, ValueError)) as expected:
        cuattn.sample(x, **options)
    with pytest.raises(type(expected.value)) as error:
        cd.sample(da.from_array(x), **options)
    given, told = (str(one.value).partition("; call ")[0] for one in (error, expected))
    assert given == told
