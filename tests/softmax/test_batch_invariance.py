"""The bits of a row depend on that row alone: not on how many there are, nor on the device's size.

A row is computed among others and alone, on devices of one multiprocessor and of many: plans then
give it a warp, a block, a cluster or many blocks.
"""

from __future__ import annotations

import emulator
import numpy as np
import pytest
from tolerance import FLOATS, dtype_of

import cuattn

pytestmark = pytest.mark.drawn

ARCHITECTURES = ("sm_80", "sm_90a")

# Row lengths at which another kernel takes over, for float32 and narrower types.
BORDERS = (8, 128, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


def softmax_backward(x, axis):
    return cuattn.softmax_backward(x, np.exp(-abs(x.astype(np.float32))).astype(x.dtype), axis)


def log_softmax_backward(x, axis, **options):
    return cuattn.log_softmax_backward(x, -abs(x), axis, **options)


def weighted_logsumexp(x, axis):
    return cuattn.logsumexp(x, axis, b=np.abs(x.astype(np.float32)).astype(x.dtype), keepdims=True)


def softmax_topk(x, axis, **options):
    found = cuattn.softmax_topk(x, min(5, x.shape[axis]), axis=axis, return_lse=True, **options)
    return found.values, np.expand_dims(found.lse, axis)


def labels_of(x, axis):
    """Of each row one of its own elements."""
    return np.argmin(abs(x.astype(np.float32) - 1), axis)


def cross_entropy(x, axis):
    labels = labels_of(x, axis)
    made = cuattn.cross_entropy(x, labels, axis=axis, return_lse=True)
    dx = cuattn.cross_entropy_backward(made[0], x, labels, made[1], axis=axis)
    return *(np.expand_dims(part, axis) for part in made), dx


def logits_state(x, axis):
    state = cuattn.logits_state(x, labels_of(x, axis), axis=axis)
    return [np.expand_dims(part, axis) for part in state]


def softmax_topk_state(x, axis):
    state = cuattn.softmax_topk_state(x, 40, axis=axis)
    values = np.moveaxis(state.values, -1, axis)
    return np.expand_dims(state.m, axis), np.expand_dims(state.l, axis), values


def sample(x, axis):
    """With a seed of each row: the row's number would count as well."""
    seed = np.expand_dims(np.full(np.delete(x.shape, axis), 7), axis)
    found = cuattn.sample(x, 5, seed=seed, axis=axis, top_k=40, return_log_prob=True)
    return found.indices, found.log_prob


OPERATIONS = {
    "softmax": lambda x, axis: cuattn.softmax(x, axis, scale=0.7),
    "softmax with lse": lambda x, axis: [
        part if part.ndim == x.ndim and part.shape == x.shape else np.expand_dims(part, axis)
        for part in cuattn.softmax(x, axis, return_lse=True)
    ],
    "masked softmax": lambda x, axis: cuattn.softmax(x, axis, where=x > -1),
    "log_softmax": lambda x, axis: cuattn.log_softmax(x, axis),
    "logsumexp": lambda x, axis: cuattn.logsumexp(x, axis, keepdims=True),
    "weighted logsumexp": weighted_logsumexp,
    "softmax_state": lambda x, axis: [
        np.expand_dims(part, axis) for part in cuattn.softmax_state(x, axis)
    ],
    "softmax_backward": softmax_backward,
    "log_softmax_backward": log_softmax_backward,
    "masked log_softmax_backward": lambda x, axis: log_softmax_backward(x, axis, where=x > -1),
    "cross_entropy": cross_entropy,
    "entropy": lambda x, axis: cuattn.entropy(x, axis, keepdims=True),
    "masked entropy": lambda x, axis: cuattn.entropy(x, axis, where=x > -1, keepdims=True),
    "logits_state": logits_state,
    "softmax_topk": softmax_topk,
    "renormalized softmax_topk": lambda x, axis: softmax_topk(x, axis, renormalize=True),
    "softmax_topk_state": softmax_topk_state,
    "sample": sample,
}


def results(operation, x, axis, arch, num_sms):
    with emulator.activate(arch=arch, num_sms=num_sms) as runtime:
        made = OPERATIONS[operation](x, axis)
        configurations = tuple((kernel.name, kernel.grid) for kernel in runtime.kernels)
    return list(made) if isinstance(made, (tuple, list)) else [made], configurations


def assert_invariant(operation, x, axis, arch):
    """Each row of x alone, and all of them, on small and large devices. How many launches differed.

    Rows lie along the other axis of x.
    """
    expected, first = results(operation, x, axis, arch, 132)
    seen = {first}
    for num_sms, rows in ((1, slice(None)), (1, slice(1, 2)), (132, slice(0, 1)), (4, slice(1, 3))):
        part = x[rows] if axis == 1 else x[:, rows]
        got, configurations = results(operation, part, axis, arch, num_sms)
        seen.add(configurations)
        for one, whole in zip(got, expected, strict=True):
            whole = whole[rows] if axis == 1 else whole[:, rows]
            np.testing.assert_array_equal(
                one.view(f"u{one.itemsize}"), whole.view(f"u{one.itemsize}")
            )
    return len(seen)


def random_rows(rng, shape, dtype):
    return (3 * rng.standard_normal(shape)).astype(dtype_of(dtype))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows(rng, operation, arch):
    lengths = [b + int(rng.integers(-2, 4)) for b in rng.choice(BORDERS, 2, replace=False)]
    for n in (*lengths, 20_000):
        x = random_rows(rng, (3, n + int(rng.integers(2))), str(rng.choice(FLOATS)))[:, :n]
        assert_invariant(operation, x, 1, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_columns(rng, operation, arch):
    sizes = (int(rng.integers(2, 70)), 33), (int(rng.integers(200, 900)), 5), (5000, 100)
    for shape in sizes:
        x = random_rows(rng, shape, str(rng.choice(FLOATS)))
        assert_invariant(operation, x, 0, arch)
    # Sums next to 1, added up again; the lse is what they have beyond it: what 15 elements of the
    # thread of the maximum add.
    x = np.full(shape, -60, np.float32)
    x[4:256:16] = -8 - abs(random_rows(rng, (16, shape[1]), "float32"))
    x[20] = 0
    assert_invariant(operation, x, 0, arch)


@pytest.mark.parametrize("operation", ["softmax", "logsumexp", "softmax_backward", "softmax_topk"])
def test_the_launches_do_differ(rng, operation):
    """Or the tests above would look at nothing."""
    assert assert_invariant(operation, random_rows(rng, (3, 40_000), "float32"), 1, "sm_90a") > 1
    if operation != "softmax_topk":  # which leaves columns to a few lanes each
        x = random_rows(rng, (3000, 100), "float32")
        assert assert_invariant(operation, x, 0, "sm_80") > 1


@pytest.mark.parametrize("n", [1024, 4096, 16_384])
@pytest.mark.parametrize("operation", ["softmax", "log_softmax", "logsumexp", "softmax_topk"])
def test_company_of_unaligned_rows(rng, operation, n):
    """Rows of a padded matrix start anywhere: of a copy of the first one, a fragment less."""
    x = random_rows(rng, (2, n + 1), "float32")
    x = np.concatenate([np.zeros(-x.ctypes.data % 16 // 4, np.float32), x.reshape(-1)])
    x = x[-2 * (n + 1) :].reshape(2, n + 1)[:, :n]
    shift = -x.ctypes.data % 16 // 4
    memory = np.zeros(2 * (n + 1) + 8, np.float32)
    start = -memory.ctypes.data % 16 // 4
    aligned = memory[start : start + 2 * (n + 1)].reshape(2, n + 1)[:, :n]
    aligned[...] = x
    assert aligned.ctypes.data % 16 == 0 and shift >= 0
    for arch in ARCHITECTURES:
        among, _ = results(operation, aligned, 1, arch, 132)
        alone, _ = results(operation, aligned[0][None], 1, arch, 132)
        for one, whole in zip(alone, among, strict=True):
            np.testing.assert_array_equal(one[0], whole[0])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [None, 1, 3, 40])
@pytest.mark.parametrize("name", ["segment_softmax", "segment_softmax_backward"])
def test_segments(rng, arch, dtype, width, name):
    """The company decides how many warps a segment gets."""
    lengths = [int(n) for n in rng.permutation([0, 3, 100, 257, 1000, 2500])]
    tail = () if width is None else (width,)
    own = [random_rows(rng, (n, *tail), dtype) for n in lengths]

    def of_company(others):
        rows = [*own, *others]
        ends, x = np.cumsum([0, *map(len, rows)]), np.concatenate(rows)
        with emulator.activate(arch=arch) as runtime:
            y = getattr(cuattn, name)(*[x] * (1 + name.endswith("_backward")), ends)
            blocks = {kernel.block for kernel in runtime.kernels}
        return [y[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)][: len(own)], blocks

    short = [random_rows(rng, (1, *tail), dtype)] * (2000 if width == 40 else 300)
    seen, expected = set(), None
    for others in (
        [],
        short,
        [random_rows(rng, (20_000 if width is None else 4000, *tail), dtype)],
    ):
        made, blocks = of_company(others)
        seen |= blocks
        expected = expected or made
        for one, first in zip(made, expected, strict=True):
            np.testing.assert_array_equal(
                one.view(f"u{one.itemsize}"), first.view(f"u{one.itemsize}")
            )
    assert len(seen) > 1
