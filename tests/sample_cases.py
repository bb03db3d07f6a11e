"""What the tests of `sample` share: calls against the reference, and data whose cuts are clear."""

from __future__ import annotations

import numpy as np
from cases import draw
from tolerance import NAIVE, assert_close, exact, lse_dtype

import cuattn
from cuattn import reference

MARGIN = 1e-5  # of a sum of probabilities, to where top_p cuts; and of a score to that of min_p


def put(backend, value):
    return backend.asarray(value) if isinstance(value, np.ndarray) else value


def scores(x, scale=None, where=None):
    """Scores as they are compared, in the type in which they are added up."""
    s = x.astype(lse_dtype(x.dtype))
    s = s if scale is None else s * np.asarray(scale).astype(s.dtype)
    return s if where is None else np.where(where, s, np.asarray(-np.inf, s.dtype))


def flat(x, axis):
    """Rows of x, whatever its shape."""
    if axis is None or not x.ndim:
        return x.reshape(1, -1)
    rows = np.moveaxis(x, axis, -1)
    return rows.reshape(int(np.prod(rows.shape[:-1])), rows.shape[-1])


@np.errstate(all="ignore")
def compare_log_prob(got, indices, s, axis, masked):
    """Log-probabilities by the rule of `log_softmax`; -inf and NaN where nothing was drawn."""
    got, indices = flat(got, axis), flat(indices, axis)
    for found, places, row in zip(got, indices, flat(s, axis), strict=True):
        drawn = places >= 0
        m = row.max(initial=-np.inf)
        lost = not m < np.inf or (m == -np.inf and not masked and row.size > 0)
        assert np.isnan(found).all() if lost else (found[~drawn] == -np.inf).all()
        if drawn.any():  # in their places of the whole row
            ref = reference.log_softmax(exact(row))
            whole = ref.astype(found.dtype)
            whole[places[drawn]] = found[drawn]
            assert_close(whole, ref, NAIVE["log_softmax"](row))


@np.errstate(all="ignore")  # NaN may be signalling
def verify(backend, x, num=1, *, seed, axis=-1, scale=None, where=None, **options):
    """Draws against the reference, exactly, and their log-probabilities; x stays as it was."""
    before, how = x.tobytes(), {"axis": axis, "return_log_prob": True}
    arrays = {"seed": seed, "scale": scale, "where": where, **options}
    device_x = backend.asarray(x)
    given = {name: put(backend, value) for name, value in arrays.items()}
    got = cuattn.sample(device_x, num, **how, **given)
    assert backend.ran() or x.size == 0 or num == 0
    assert type(got) is cuattn.Sample
    assert all(isinstance(part, backend.xp.ndarray) for part in got)
    want = reference.sample(x, num, axis=axis, **arrays)
    indices, log_prob = map(backend.asnumpy, got)
    assert indices.dtype == np.int64 and log_prob.dtype == lse_dtype(x.dtype)
    assert indices.shape == log_prob.shape == want.shape
    np.testing.assert_array_equal(indices, want)
    compare_log_prob(log_prob, indices, scores(x, scale, where), axis, where is not None)
    alone = cuattn.sample(device_x, num, axis=axis, **given)
    np.testing.assert_array_equal(backend.asnumpy(alone), want)
    assert backend.asnumpy(device_x).tobytes() == before
    return got


def is_clear(row, top_k=None, top_p=None, min_p=None):
    """Whether no rounding moves what top_p and min_p cut off a row of scores."""
    t = np.sort(exact(row))[::-1][:top_k]
    if top_p is not None and top_p < 1:
        p = np.exp(t - t[0])
        if abs(np.cumsum(p) / p.sum() - top_p).min() < MARGIN:
            return False
    below = t[t < t[0]] - t[0]  # equals of the largest always stay
    return not min_p or (abs(below - np.log(min_p)) > MARGIN * (1 + abs(t[0]))).all()


def clear_rows(rng, shape, dtype="float32", spread=3.0, **filters):
    """Random rows that are all clear."""
    x = draw(rng, shape, dtype, spread)
    for i in range(len(x)):
        while not is_clear(x[i], **filters):
            x[i] = draw(rng, shape[1:], dtype, spread)
    return x
