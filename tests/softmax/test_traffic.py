"""Global traffic, bank conflicts and exponentials of every regime, as the emulator counts them."""

from __future__ import annotations

import emulator
import numpy as np
import pytest

import cuattn

pytestmark = pytest.mark.drawn

# Regime, architecture, multiprocessors, rows, columns, threads of a block, blocks of a cluster,
# and reads of the data: the table of cuda_src/README.md. 50257 is GPT-2's vocabulary.
ROWS = [
    ("part of a warp", "sm_80", 1, 33, 100, 128, 1, 1),
    ("a warp", "sm_80", 1, 16, 1000, 128, 1, 1),
    ("a block", "sm_80", 1, 33, 4001, 128, 1, 1),
    ("a block of 512 threads", "sm_80", 1, 20, 16_001, 512, 1, 1),
    ("a block of 64 words a thread", "sm_80", 1, 20, 30_001, 512, 1, 1),
    ("a cluster of 2", "sm_90", 1, 20, 30_001, 512, 2, 1),
    ("a cluster of 4", "sm_90", 1, 20, 50_257, 512, 4, 1),
    ("a cluster of 8", "sm_90", 1, 9, 100_003, 512, 8, 1),
    ("a cluster of 8 and 64 words a thread", "sm_90", 1, 3, 250_007, 512, 8, 1),
    ("a cluster because rows are few", "sm_90", 132, 2, 16_001, 128, 4, 1),
    ("split without clusters", "sm_80", 132, 20, 50_257, 256, 1, 2),
    ("split beyond clusters", "sm_90", 132, 2, 400_009, 256, 1, 2),
]


def aligned(rng, rows, cols):
    return rng.standard_normal((rows, -(-cols // 8) * 8), np.float32)


def odd(rng, rows, cols):
    """Rows start at any element."""
    return rng.standard_normal((rows, cols), np.float32)


def sliced(rng, rows, cols):
    """The result is aligned otherwise than the rows of x."""
    return rng.standard_normal((rows, cols + 6), np.float32)[:, 3:-3]


def counters_of(arch, call, num_sms=132):
    """What `call` costs, what it returns, and the kernels that it launched."""
    with emulator.activate(arch=arch, num_sms=num_sms) as runtime:
        result = call()
        return runtime.total(), result, runtime.kernels


@pytest.mark.parametrize("make", [aligned, odd, sliced])
@pytest.mark.parametrize(
    ("arch", "num_sms", "rows", "cols", "block", "cluster", "reads"),
    [row[1:] for row in ROWS],
    ids=[row[0].replace(" ", "-") for row in ROWS],
)
def test_softmax(rng, arch, num_sms, rows, cols, block, cluster, reads, make):
    x = make(rng, rows, cols)
    total, y, kernels = counters_of(arch, lambda: cuattn.softmax(x), num_sms)
    np.testing.assert_allclose(y, cuattn.reference.softmax(x), rtol=1e-5, atol=1e-7)
    assert [(k.block, k.cluster) for k in kernels] == [(block, cluster)] * reads
    assert total.global_bytes_read == pytest.approx(reads * x.nbytes, rel=0.01)
    assert total.global_bytes_written == pytest.approx(x.nbytes, rel=0.01)
    assert total.shared_wavefronts == total.shared_wavefronts_ideal
    # One exponential an element and read, and one or two a thread and row to merge states.
    assert reads * x.size <= total.exps <= reads * x.size * 1.15 + 64 * x.shape[0]
    # Vectors: but for the ends of rows and of warps, every access moves 16 bytes.
    assert total.loads_by_size[16] * 512 >= 0.9 * reads * x.nbytes
    if cols > 128 or make is not sliced:  # lanes exchange elements within whole warps only
        assert total.stores_by_size[16] * 512 >= 0.9 * x.nbytes


@pytest.mark.parametrize("make", [aligned, odd, sliced])
@pytest.mark.parametrize("name", ["logsumexp", "softmax_state"])
@pytest.mark.parametrize(("rows", "cols"), [(33, 100), (33, 4001), (2, 50_257), (2, 300_001)])
def test_reductions_read_once(rng, name, rows, cols, make):
    x = make(rng, rows, cols)
    total, _, _ = counters_of("sm_90", lambda: getattr(cuattn, name)(x, axis=-1))
    assert total.global_bytes_read == pytest.approx(x.nbytes, rel=0.01)
    results = rows * 4 * (2 if name == "softmax_state" else 1)
    assert results <= total.global_bytes_written <= results + 0.01 * x.nbytes
    assert total.shared_wavefronts == total.shared_wavefronts_ideal
    assert x.size <= total.exps <= x.size * 1.15 + 600 * rows


@pytest.mark.parametrize("make", [aligned, odd, sliced])
@pytest.mark.parametrize("name", ["entropy", "cross_entropy", "logits_state"])
@pytest.mark.parametrize(("rows", "cols"), [(33, 100), (33, 4001), (2, 50_257), (2, 300_001)])
def test_rows_of_logits_read_once(rng, name, rows, cols, make):
    """And of a label one number, and one element."""
    x = make(rng, rows, cols)
    labels = () if name == "entropy" else (rng.integers(0, cols, rows),)
    total, _, kernels = counters_of("sm_90", lambda: getattr(cuattn, name)(x, *labels))
    of_labels = len(labels) * 8 * sum(kernel.grid * kernel.block for kernel in kernels)
    assert total.global_bytes_read - of_labels <= x.nbytes * 1.01
    assert x.nbytes <= total.global_bytes_read
    assert total.global_sectors_read * 32 <= 1.4 * x.nbytes + of_labels / 8 + 64 * rows
    results = rows * 4 * (4 if name == "logits_state" else 1)
    assert results <= total.global_bytes_written <= results + 0.01 * x.nbytes
    assert total.shared_wavefronts == total.shared_wavefronts_ideal
    assert x.size <= total.exps <= x.size * 1.15 + 600 * rows


@pytest.mark.parametrize("make", [aligned, odd, sliced])
@pytest.mark.parametrize(("rows", "cols"), [(33, 100), (33, 4001), (2, 70_001)])
def test_loss_gradient_reads_once(rng, rows, cols, make):
    """One read, one write, one exponential an element; of a row that is ignored one write."""
    x = make(rng, rows, cols)
    labels, lse = rng.integers(0, cols, rows), cuattn.logsumexp(x, axis=-1)
    for ignored in (0, 1, rows):
        labels[:ignored] = -100
        total, y, (kernel,) = counters_of(
            "sm_90", lambda: cuattn.cross_entropy_backward(0.1, x, labels, lse)
        )
        want = cuattn.reference.cross_entropy_backward(0.1, x, labels, lse)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-7)
        threads = kernel.grid * kernel.block
        read = x[ignored:].nbytes
        assert total.global_bytes_read - read == 12 * threads  # each reads a label and an lse
        assert total.global_sectors_read * 32 <= 1.4 * read + 96 * threads / 32
        assert total.global_bytes_written == x.nbytes
        assert total.shared_wavefronts == 0
        assert x.size <= total.exps <= x.size + 6 * rows
        assert total.loads_by_size[16] * 512 >= 0.9 * read


@pytest.mark.parametrize("make", [aligned, odd])
@pytest.mark.parametrize("name", ["softmax_backward", "log_softmax_backward"])
@pytest.mark.parametrize(("rows", "cols"), [(33, 100), (33, 4001), (3, 50_257)])
def test_backward_reads_both_once(rng, name, rows, cols, make):
    grad, y = make(rng, rows, cols), make(rng, rows, cols)
    total, _, _ = counters_of("sm_90", lambda: getattr(cuattn, name)(grad, y))
    assert total.global_bytes_read == pytest.approx(2 * y.nbytes, rel=0.01)
    assert total.global_bytes_written == pytest.approx(y.nbytes, rel=0.01)
    assert total.shared_wavefronts == total.shared_wavefronts_ideal
    most = y.size * 1.15 + 64 * rows if name == "log_softmax_backward" else 0
    assert total.exps <= most


@pytest.mark.parametrize("make", [aligned, odd, sliced])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize(("rows", "cols"), [(33, 100), (33, 4001), (2, 70_001)])
def test_state_reads_once(rng, name, rows, cols, make):
    """Elements of rows whose states are known are read once and written once, and nothing else."""
    x = make(rng, rows, cols)
    state = cuattn.softmax_state(x)
    total, y, (kernel,) = counters_of("sm_90", lambda: getattr(cuattn, name)(x, state=state))
    np.testing.assert_allclose(y, getattr(cuattn.reference, name)(x), rtol=1e-5, atol=1e-7)
    threads = kernel.grid * kernel.block
    assert total.global_bytes_read - x.nbytes == 8 * threads  # each reads m and l of its row
    assert total.global_sectors_read * 32 <= 1.4 * x.nbytes + 64 * threads / 32
    assert total.global_bytes_written == x.nbytes
    assert total.shared_wavefronts == 0
    # One exponential an element, those of a fragment's that lie outside the row too, and a thread.
    exps = x.size + threads if name == "softmax" else 0
    assert exps <= total.exps <= (exps and exps + 6 * rows)
    assert total.loads_by_size[16] * 512 >= 0.9 * x.nbytes
    if cols > 128 or make is not sliced:  # lanes exchange elements within whole warps only
        assert total.stores_by_size[16] * 512 >= 0.9 * x.nbytes


@pytest.mark.parametrize(("cols", "beside"), [(7, 200), (250, 128), (3000, 128)])
def test_state_of_columns_reads_once(rng, cols, beside):
    x = rng.standard_normal((cols, beside), np.float32)
    state = cuattn.softmax_state(x, 0)
    total, y, (kernel,) = counters_of("sm_90", lambda: cuattn.softmax(x, 0, state=state))
    np.testing.assert_allclose(y, cuattn.reference.softmax(x, axis=0), rtol=1e-5, atol=1e-7)
    numbers = total.global_bytes_read - x.nbytes
    assert numbers == 8 * kernel.grid * kernel.block
    assert total.global_bytes_written == x.nbytes
    assert total.global_sectors_read * 32 <= 1.15 * x.nbytes + numbers
    assert total.global_sectors_written * 32 <= 1.15 * x.nbytes


# Length of the reduced axis, columns beside it, reads: what a thread block holds is read once.
@pytest.mark.parametrize(
    ("cols", "beside", "reads"), [(7, 200, 1), (60, 200, 1), (250, 128, 1), (1000, 128, 1.744)]
)
def test_reduced_axis_not_last(rng, cols, beside, reads):
    x = rng.standard_normal((cols, beside), np.float32)
    # One multiprocessor: more would share the columns of a narrow array, and read them twice.
    total, y, _ = counters_of("sm_90", lambda: cuattn.softmax(x, axis=0), num_sms=1)
    np.testing.assert_allclose(y, cuattn.reference.softmax(x, axis=0), rtol=1e-5, atol=1e-7)
    assert total.global_bytes_read == pytest.approx(reads * x.nbytes, rel=0.01)
    assert total.global_bytes_written == pytest.approx(x.nbytes, rel=0.01)
    assert total.shared_wavefronts == total.shared_wavefronts_ideal
    # Coalesced: hardly more 32-byte sectors than the data has.
    assert total.global_sectors_read * 32 <= 1.15 * reads * x.nbytes
    assert total.global_sectors_written * 32 <= 1.15 * x.nbytes


def test_short_ragged_rows_are_read_once(rng):
    lengths = rng.integers(0, 200, 100)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    x = rng.standard_normal(offsets[-1], np.float32)
    total, y, _ = counters_of("sm_90", lambda: cuattn.segment_softmax(x, offsets))
    expected = cuattn.reference.segment_softmax(x, offsets)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-7)
    offsets_read = total.global_bytes_read - x.nbytes
    assert 0 < offsets_read <= 16 * 32 * 4 * len(lengths)  # by every thread
    assert total.global_bytes_written == x.nbytes


def test_a_mask_costs_its_own_bytes(rng):
    x = rng.standard_normal((33, 1000), np.float32)
    mask = rng.random(x.shape) < 0.5
    total, _, _ = counters_of("sm_90", lambda: cuattn.softmax(x, where=mask))
    assert total.global_bytes_read == pytest.approx(x.nbytes + mask.nbytes, rel=0.01)
    assert total.global_bytes_written == pytest.approx(x.nbytes, rel=0.01)
