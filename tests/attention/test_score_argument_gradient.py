"""Gradients of the arrays of a score expression: which there are, and what they are."""

from __future__ import annotations

import re

import numpy as np
import pytest
from attention_backward_cases import Backward
from attention_cases import put, put_options
from score_cases import Case, Grammar, beside_garbage, case_of, some_arrays
from tolerance import dtype_of

import cuattn
from cuattn import reference
from cuattn.reference._score_arrays import ArraySums

SIZES = {"batch": 2, "heads": (4, 2), "lengths": (150, 217), "dims": (32, 32)}


class Sizes(ArraySums):
    """The sizes of what is added up."""

    @staticmethod
    def product(ds, d):
        return abs(ArraySums.product(ds, d))


def compare(got, ref, sizes, arrays, op="float32", digits=None):
    """Gradients by name: so many digits of what is added up, in the shapes and dtypes of arrays."""
    digits = digits or {"float64": 1e-12, "tf32": 4e-3}.get(op, 2e-5)
    assert got.keys() == ref.keys()
    for name, one in got.items():
        assert (one.shape, one.dtype) == (arrays[name].shape, arrays[name].dtype), name
        last = {"float16": 2**-10, "bfloat16": 2**-7}.get(one.dtype.name, 0)
        near = digits * (sizes[name] + sizes[name].max()) + last * abs(ref[name])
        off = abs(one.astype(np.float64) - ref[name])
        assert (off <= near).all(), (name, (off - near).max())


def differentiate(backend, given, how, names=True, function="attention_backward"):
    """Gradients of arrays on the backend, by the reference, and sizes of their terms."""
    arrays = [put(backend, a) for a in given]
    got = getattr(cuattn, function)(*arrays, **put_options(backend, how), return_dscore=names)
    got = {name: backend.asnumpy(one) for name, one in got.dscore.items()}
    plain = getattr(reference, function)
    ref = plain(*given, **how, return_dscore=names).dscore
    sizes = Sizes(how["score"], how["score_args"], names)
    if function == "attention_backward":
        plain(*given, **how, return_dscore=sizes.add)
        return got, ref, sizes.sums
    return got, ref, {name: 1 + abs(d) for name, d in ref.items()}


def verify(backend, rng, op="float32", names=True, **how):
    """Run one problem, with poison where nobody looks, and compare."""
    problem = Backward(rng, op, **how)
    found = differentiate(backend, problem.forward, problem.more, names)
    compare(*found, how["score_args"], op)
    return found[0]


# ---- What they are ----


def relative(rng):
    """Buckets of distances, as T5 has them."""
    distance = np.arange(300)
    bucket = np.where(distance < 8, distance, 8 + np.log2(np.maximum(distance, 8) / 8) * 2)
    return {
        "score": "s + table[h, bucket[abs(q - k)]]",
        "score_args": {
            "table": rng.standard_normal((4, 20)).astype(np.float16),
            "bucket": bucket.astype(np.int16),
        },
    }


def test_buckets_of_distances(backend, rng):
    """Of queries that see keys before them; keys and padding that nobody looks at are poison."""
    lens = {"q_lens": np.array([150, 71]), "kv_lens": np.array([200, 129])}
    verify(backend, rng, "float16", **SIZES, **lens, is_causal=True, **relative(rng))


def test_clamped_distances(backend, rng):
    """More elements than a block has, few of which are looked up, and offsets of sequences."""
    table = np.broadcast_to(rng.standard_normal((2, 1)), (2, 340))  # all of a row are one number
    how = {"score": "tanh(s) * table[h, q - k + 90]", "score_args": {"table": table}}
    how["q_offset"] = np.array([40, -11])
    sizes = {"batch": 2, "heads": (2, 1), "lengths": (100, 150), "dims": (31, 20)}
    verify(backend, rng, "float64", **sizes, **how, window=(100, None))


def test_numbers(backend, rng):
    """An array without dimensions, to which every score adds that is not hidden."""
    mask = rng.random((2, 1, 140, 150)) < 0.6
    mask[..., 5::9] = False
    how = {"score": "s * a + a", "score_args": {"a": np.array(0.7)}, "mask": mask, "softcap": 3.0}
    how["bias"] = rng.standard_normal((2, 140, 150)).astype(np.float32)
    sizes = SIZES | {"heads": (2, 1), "lengths": (140, 150)}
    verify(backend, rng, "float16", **sizes, **how)


def test_several_references(backend, rng):
    """An array that is looked into in four ways, with odd strides."""
    t = beside_garbage(rng, rng.standard_normal((4, 5)).astype(dtype_of("bfloat16")))
    how = {
        "score": "s + t[b, h] * t[h, q - k] + abs(t[3, 1] - s) - t[b, (k - q) // 9]",
        "score_args": {"t": t},
    }
    verify(backend, rng, **SIZES | {"lengths": (9, 30)}, **how)


def test_varlen(backend, rng):
    """b, q and k count in each sequence; one has no queries, one a single key."""
    ends_q, ends_k = np.array([0, 17, 17, 160, 161]), np.array([0, 40, 47, 190, 191])
    x = [rng.standard_normal((n, h, 32)) for n, h in ((161, 4), (161, 4), (191, 2), (191, 2))]
    grad, *arrays = (a.astype(np.float32) for a in x)
    arrays_of = {"t": rng.standard_normal((4, 60)), "u": rng.standard_normal((4, 3))}
    how = {"score": "s * u[b, h - 1] + t[h, q - k] + t[0, k - q + 3]", "score_args": arrays_of}
    how |= {"kv_lens": np.array([33, 7, 120, 1]), "window": (70, None)}
    y, lse = reference.attention_varlen(*arrays, ends_q, ends_k, **how, return_lse=True)
    given = grad, *arrays, y.astype(np.float32), lse.astype(np.float32), ends_q, ends_k
    found = differentiate(backend, given, how, ("u", "t"), "attention_backward_varlen")
    assert [*found[0]] == ["u", "t"]
    compare(*found, arrays_of)


class Near(Grammar):
    """Indices of distances, sequences and heads."""

    def int(self, depth):
        if depth <= 0:
            return self.choose("b", "h", "(q - k)", "(k - q)", "(2 * q - k * 2)", "3", "17")
        text = super().int(depth)
        return self.int(depth) if "where" in text else text  # which may depend on s

    def float(self, depth):
        if depth <= 0:
            return self.choose("s", "s", "2.5", "f[q - k]", "n", "g[h, k - q]", "f[b]")
        return super().float(depth).replace("f[q]", "f[h]")

    def bool(self, depth):
        return super().bool(depth) if depth > 0 else self.choose("(0 <= q - k)", "(s > 0)", "True")


def test_random_expressions(backend, rng):
    """In float64, where they are numbers of a moderate size."""
    grammar, arrays = Near(lambda *options: options[rng.integers(len(options))]), some_arrays(rng)
    arrays = {
        name: a if a.dtype.kind in "iub" else a.astype(np.float64) for name, a in arrays.items()
    }
    checked = 0
    while checked < (40 if backend.name == "numpy" else 1):
        case = case_of(grammar.score(3), arrays)
        names = [name for name in case.arrays if name in "fgn"]
        if not any(step.value == "s" for step in case.expression.steps) or not names:
            continue
        how = {"score": case.text, "score_args": case.arrays}
        problem = Backward(
            rng, "float64", batch=2, heads=(2, 1), lengths=(9, 20), dims=(32, 32), **how
        )
        with np.errstate(all="ignore"):
            ref = reference.attention_backward(
                *problem.forward, **problem.more, return_dscore=names
            )
        if not all(np.isfinite(d).all() and (abs(d) < 1e3).all() for d in ref.dscore.values()):
            continue
        if not any(d.any() for d in ref.dscore.values()):
            continue
        if abs(problem.given["lse"]).max() > 1e4:
            continue
        found = differentiate(backend, problem.forward, problem.more, names)
        compare(*found, arrays, digits=1e-9)
        checked += 1


def test_the_reference_by_central_differences(rng):
    """Of the forward's own formula."""
    x = {
        "t": rng.standard_normal((3, 5)),
        "a": rng.standard_normal(()),
        "w": rng.standard_normal(2),
    }
    how = {"score": "s * a + t[h, q - k] * tanh(s * w[b]) + t[1, (k - q) % 5] * t[b, h]"}
    q, k, v, grad = (rng.standard_normal((2, h, n, 3)) for h, n in ((2, 5), (1, 7), (1, 7), (2, 5)))

    def forward(arrays):
        return reference.attention(
            q, k, v, **how, score_args=arrays, is_causal=True, softcap=4.0, return_lse=True
        )

    y, lse = forward(x)
    found = reference.attention_backward(
        grad, q, k, v, y, lse, **how, score_args=x, is_causal=True, softcap=4.0, return_dscore=True
    ).dscore
    for name, d in found.items():
        direction = rng.standard_normal(d.shape)
        sums = [
            np.sum(forward(x | {name: x[name] + e * direction})[0] * grad) for e in (1e-5, -1e-5)
        ]
        slope = (sums[0] - sums[1]) / 2e-5
        assert abs(slope - np.sum(d * direction)) < 1e-6 * (1 + abs(slope)), name


# ---- What they depend on ----


def test_what_does_not_count_is_nothing(backend, rng):
    """Where a probability is 0 an infinite derivative is no NaN; elements that nobody looks up are
    0, whatever they hold."""
    w = np.where(np.arange(50) < 40, 1e-30, np.nan).astype(np.float32)
    how = {"score": "s - w[q - k] * 1e38 * 1e5 * (q - k)", "score_args": {"w": w}}
    got = verify(backend, rng, lengths=(37, 37), is_causal=True, **how)
    assert not got["w"].any()
    how = {"score": "where(q == k, s, -inf) + w[q - k]", "score_args": {"w": w}}
    problem = Backward(rng, "float32", lengths=(37, 37), **how)
    got, *_ = differentiate(backend, problem.forward, problem.more)
    assert not got["w"][1:].any()


def test_sequences_alone(backend, rng):
    """Of an index with b, the bits of a sequence's elements are those that it has beside others."""
    t = rng.standard_normal((2, 99)).astype(np.float32)
    how = {"score": "s + t[b, q - k]", "score_args": {"t": t}}
    problem = Backward(rng, "float32", **SIZES | {"lengths": (31, 140)}, **how)
    given, rows = [*problem.forward], []
    for fill in (None, np.nan):
        if fill is not None:
            given = [np.concatenate([a[:1], np.full_like(a[1:], fill)]) for a in given]
        arrays = [put(backend, a) for a in given]
        more = put_options(backend, how)
        found = cuattn.attention_backward(*arrays, **more, return_dscore=("t",)).dscore["t"]
        rows.append(backend.asnumpy(found))
    assert rows[0][0].tobytes() == rows[1][0].tobytes()
    assert np.isnan(rows[1][1]).any()


def test_calls(backend, rng):
    """Warm calls read their own arrays; without keys or queries there is nothing to add up."""
    grad, x, k, v = (rng.standard_normal((1, 2, 3, 32)).astype(np.float32) for _ in range(4))
    for _ in range(3):
        t = rng.standard_normal(3).astype(np.float32)
        how = {"score": "s + t[q - k] * s", "score_args": {"t": t}}
        y, lse = reference.attention(x, k, v, **how, return_lse=True)
        given = grad, x, k, v, y.astype(np.float32), lse.astype(np.float32)
        compare(*differentiate(backend, given, how, ("t",)), {"t": t}, digits=1e-3)
    for rows, keys in ((0, 3), (3, 0), (0, 0)):
        few = x[:, :, :rows], x[:, :, :rows], x[:, :, :keys], x[:, :, :keys]
        lse = np.full((1, 2, rows), -np.inf, np.float32)
        given = [put(backend, a) for a in (*few, x[:, :, :rows] * 0, lse)]
        got = cuattn.attention_backward(*given, **put_options(backend, how), return_dscore=["t"])
        assert backend.asnumpy(got.dscore["t"]).tolist() == [0, 0, 0]
    none = cuattn.attention_backward(*given, **put_options(backend, how), return_dscore=[])
    assert none.dscore is None


# ---- What is refused ----

BY = "name arrays whose indices are made of numbers, b, h and q - k, but index"
ARRAYS = {"t": np.ones(3), "u": np.ones((3, 3)), "i": np.ones(3, np.int32), "m": np.ones(3, bool)}
REFUSED = [
    ("s + t[k]", True, ValueError, f"{BY} 0 of t changes with k"),
    ("s + t[q]", True, ValueError, f"{BY} 0 of t changes with k"),
    ("s + u[h, q + k]", ["u"], ValueError, f"{BY} 1 of u changes with k"),
    ("s + t[q // 2 - k // 2]", True, ValueError, f"{BY} 0 of t changes with k"),
    ("s + t[h * q - h * k]", True, ValueError, f"{BY} 0 of t changes with k"),
    ("s + t[abs(q) - k]", True, ValueError, f"{BY} 0 of t changes with k"),
    ("s + t[i[k]]", True, ValueError, f"{BY} 0 of t changes with k"),
    ("s + t[i[q - k]] * t[k % 2]", True, ValueError, f"{BY} 0 of t changes with k"),
    ("s + t[where(s > 0, 1, 0)]", True, ValueError, f"{BY} 0 of t changes with s"),
    ("s + t[where(m[q - k] & m[k], 1, 0)]", True, ValueError, f"{BY} 0 of t changes with k"),
    ("s + t[i[q - k]]", ["i"], TypeError, "name floating arrays, but i is none"),
    ("where(m[q - k], s, t[1])", ("t", "m"), TypeError, "name floating arrays, but m is none"),
    ("s + t[1]", ["s"], ValueError, "name arrays of score_args, but 's' is none"),
    ("s + t[1]", ["x" * 1000], ValueError, "name arrays of score_args, but 'xxx"),
    ("s + t[1]", ["t", "t"], ValueError, "have each name once, but t comes 2 times"),
    ("s + t[1]", [1], TypeError, "have names, but one is int"),
    ("s + t[1]", "t", TypeError, "be a bool or a list of names, but it is a str"),
    ("s + t[1]", 1, TypeError, "be True or False, but it is 1"),
    (
        "s + i[1]",
        True,
        ValueError,
        "be False without floating arrays in score_args, but it is True",
    ),
    (None, True, ValueError, "be False without floating arrays in score_args, but it is True"),
]


@pytest.mark.parametrize(("text", "names", "error", "what"), REFUSED)
def test_refused(text, names, error, what):
    words = {*re.findall(r"[a-z]+", text or "")}
    arrays = {name: array for name, array in ARRAYS.items() if name in words}
    x, lse = np.ones((1, 1, 2, 4)), np.ones((1, 1, 2))
    with pytest.raises(error, match=rf"^return_dscore must {re.escape(what)}") as refused:
        cuattn.attention_backward(
            x, x, x, x, x, lse, score=text, score_args=arrays, return_dscore=names
        )
    assert len(str(refused.value)) < 500


def test_indices_of_distances():
    """What looks like q or k by itself, and is none: integers wrap."""
    for index in (
        "3 * q - k * 3",
        "-k + q",
        "q - (k + h)",
        "q - k - (k - q)",
        "k - k",
        "-2 * k + (q + q)",
        "k * 9223372036854775807 * 2 + 2 * q",
    ):
        case = Case(f"s + t[{index}]", {"t": np.ones(3)})
        x, lse = np.ones((1, 1, 2, 4)), np.ones((1, 1, 2))
        how = {"score": case.text, "score_args": case.arrays, "return_dscore": True}
        got, ref = (
            one.attention_backward(x, x, x, x, x, lse, **how).dscore["t"]
            for one in (cuattn, reference)
        )
        np.testing.assert_allclose(got, ref, atol=1e-12, err_msg=index)
