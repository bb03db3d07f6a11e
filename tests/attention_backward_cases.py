"""What the tests of attention_backward share: a `Problem` with what its forward call has given.

grad, y, lse and grad_lse have poison in the rows of padding, too.
"""

from __future__ import annotations

import contextlib

import numpy as np
from attention_cases import INF, TF32, Problem, naive_scores, poison, put, put_options
from tolerance import assert_close, exact, lse_dtype

import cuattn
from cuattn import AttentionGradients, reference
from cuattn._attention import plan_backward_ds, run_backward
from cuattn._device import recent
from cuattn._device import runtime as device_runtime

OPTIONS = {"dbias": "bias", "dalibi_slopes": "alibi_slopes", "dsinks": "sinks"}


def unbroadcast(d, array):
    """The sum over all that an array is repeated for."""
    d = d.sum(axis=tuple(range(d.ndim - array.ndim)))
    return d.sum(axis=tuple(i for i, n in enumerate(array.shape) if n == 1), keepdims=True)


@np.errstate(all="ignore")
def naive_backward(grad, q, k, v, y, lse, grad_lse, seen, op, **options):
    """Plain gradients, and the sizes of what is added up, where nothing hidden holds NaN.

    Probabilities and gradients of scores are rounded to the dtype before they are multiplied.
    """
    dtype, acc = q.dtype, lse_dtype(q.dtype)
    batch, heads_kv, group = *k.shape[:2], q.shape[1] // max(1, k.shape[1])
    s, strayed, chain, own, distance, rounded = naive_scores(q, k, op, **options)
    scale = options.get("scale")
    scale = acc.type(max(1, q.shape[-1]) ** -0.5 if scale is None else scale)
    grad, q, k, v, y = (rounded(a.astype(acc)) for a in (grad, q, k, v, y))
    k, v = (np.repeat(a, group, axis=1) for a in (k, v))
    lse = np.where(np.isneginf(lse), INF, lse)[..., None]
    grad_lse = np.zeros_like(lse) if grad_lse is None else grad_lse[..., None]
    p = np.where(seen, np.exp(s - lse), acc.type(0))
    sinks = options.get("sinks")
    sink = np.exp((acc.type(-INF) if sinks is None else sinks.astype(acc)[:, None, None]) - lse)
    delta = np.where(lse == INF, 0, np.sum(grad * y, axis=-1, keepdims=True) - grad_lse)
    ds = own * p * (np.matmul(grad, v.swapaxes(-1, -2)) - delta)

    def gradients(p, ds, dx, sink, grad, q, k):
        def by_key(a):
            return a.reshape(batch, heads_kv, group, *a.shape[2:]).sum(axis=2)

        found = {
            "dq": np.matmul(dx, k) * abs(scale),
            "dk": by_key(np.matmul(dx.swapaxes(-1, -2), q)) * abs(scale),
            "dv": by_key(np.matmul(p.swapaxes(-1, -2), grad)),
        }
        whole = {"dbias": ds, "dalibi_slopes": (ds * distance).sum(axis=(2, 3)),
                 "dsinks": sink[..., 0].sum(axis=(0, 2))}  # fmt: skip
        for name, d in whole.items():
            option = options.get(OPTIONS[name])
            found[name] = None if option is None else unbroadcast(d, option)
        return AttentionGradients(**found)

    sign = np.sign(scale)
    plain = gradients(rounded(p), ds, sign * rounded(ds * chain), -sink * delta, grad, q, k)
    plain = plain._replace(dalibi_slopes=None if plain[4] is None else -plain[4])
    finite = np.where(lse == INF, 0, abs(lse))
    sized = np.where(p > 0, p * (1 + abs(s) + finite + strayed), 0)
    parts = np.sum(abs(grad * y), axis=-1, keepdims=True) + abs(grad_lse)
    sized_ds = abs(own) * sized * (np.matmul(abs(grad), abs(v).swapaxes(-1, -2)) + parts)
    sized_sink = np.where(sink > 0, sink * (2 + finite) * parts, 0)
    sizes = gradients(sized, sized_ds, sized_ds, sized_sink, abs(grad), abs(q), abs(k))
    narrow = [None if d is None else d.astype(dtype) for d in plain[:3]]
    return AttentionGradients(*narrow, *plain[3:]), sizes


class Backward(Problem):
    """Gradients of `lse` come in where `grad_lse`."""

    def __init__(self, rng, op="float16", grad_lse=True, **how):
        super().__init__(rng, op, **how)
        out, lse = self.expected()
        acc = lse_dtype(self.q.dtype)
        draw = {"y": out, "grad": rng.standard_normal(out.shape), "lse": lse}
        draw["grad_lse"] = rng.standard_normal(lse.shape) if grad_lse else None
        padding = self.hidden[0]
        for name, a in draw.items():
            if a is not None:
                a = a.astype(acc if "lse" in name else self.q.dtype)
                rows = a[..., None] if "lse" in name else a
                draw[name] = poison(rng, rows, padding).reshape(a.shape)
        self.given = draw

    @property
    def forward(self):
        """grad, q, k, v, y and lse."""
        given = self.given
        return given["grad"], *self.arrays, given["y"], given["lse"]

    @property
    def more(self):
        """Keywords of a call for all gradients."""
        more = {**self.options, "grad_lse": self.given["grad_lse"]}
        return more | {"return_dbias": True} if "bias" in self.options else more

    def expected_gradients(self):
        """By the formula, in float64, or wider for float64."""
        wide = exact if self.op == "float64" else lambda a: a
        more = {n: wide(a) if n in ("bias", "grad_lse") and a is not None else a
                for n, a in self.more.items()}  # fmt: skip
        return reference.attention_backward(*map(wide, self.forward), **more)

    def check_gradients(self, got):
        """Canonical results against the formula."""
        (q_hidden, *hidden), ref = self.hidden, self.expected_gradients()
        clean = {n: a if a is None else
                 np.where(q_hidden if "lse" in n else q_hidden[..., None], 0, a).astype(a.dtype)
                 for n, a in self.given.items()}  # fmt: skip
        clean["lse"] = np.where(q_hidden, -INF, self.given["lse"])
        q, k, v = (np.where(h[..., None], 0, x).astype(x.dtype) for x, h in
                   zip(self.clean, self.hidden, strict=True))  # fmt: skip
        plain, sizes = naive_backward(
            clean["grad"], q, k, v, clean["y"], clean["lse"], clean["grad_lse"], self.seen,
            self.op, **self.options,
        )  # fmt: skip
        for name, one, want, naive, size in zip(got._fields, got, ref, plain, sizes, strict=True):
            if want is None:
                assert one is None, name
                continue
            small = name in ("dalibi_slopes", "dsinks")
            acc, dtype = lse_dtype(q.dtype), q.dtype
            dtype = self.options["bias"].dtype if name == "dbias" else acc if small else dtype
            assert one.dtype == dtype, name
            one = one.astype(acc) if one.dtype.itemsize > acc.itemsize else one  # not more digits
            terms = size if one.dtype.itemsize > 2 else None
            if self.op == "tf32":  # as `attention_cases.compare`; small ones are sums that cancel
                terms = TF32 * (size / 16 if small else abs(want))
            assert_close(one, want, naive, terms=terms)
        for one, unseen in zip(got[:3], (q_hidden, *hidden), strict=True):
            assert not one[unseen].any()


def backward(backend, arrays, options, function=cuattn.attention_backward):
    """`attention_backward` on the backend; all results on the host."""
    got = function(*(put(backend, a) for a in arrays), **put_options(backend, options))
    assert all(one is None or isinstance(one, backend.xp.ndarray) for one in got)
    return AttentionGradients(*(None if one is None else backend.asnumpy(one) for one in got))


@contextlib.contextmanager
def storing(most=None):
    """Kernels of Hopper store dS, whatever the sizes are; of so many bytes at most at a time."""
    own = {"LEAST_ROWS": 1, "LEAST_BLOCKS": 1}
    own |= {} if most is None else {"WORKSPACE_BYTES": most}
    before = {name: getattr(plan_backward_ds, name) for name in own}

    def plan_with(values):  # and forget what has been planned
        vars(plan_backward_ds).update(values)
        plan_backward_ds.plan_ds.cache_clear()
        run_backward._planned.cache_clear()
        if runtime := device_runtime.current():
            runtime.recent = recent.Recent()

    plan_with(own)
    try:
        yield
    finally:
        plan_with(before)


def verify(backend, rng, op="float16", **how):
    """Run one problem and compare."""
    problem = Backward(rng, op, **how)
    before = [a.tobytes() for a in problem.forward]
    got = backward(backend, problem.forward, problem.more)
    problem.check_gradients(got)
    assert [a.tobytes() for a in problem.forward] == before
    return problem, got


def with_other_fills(problem):
    """grad, q, k, v, y and lse with zeros, NaN, infinities or anything where nobody sees them."""
    hidden = dict(zip("qkv", problem.hidden, strict=True))
    for fill in (0, np.nan, np.inf, None):
        arrays = []
        for name, a in zip(("q", "q", "k", "v", "q", "lse"), problem.forward, strict=True):
            unseen = hidden["q"] if name == "lse" else hidden[name][..., None]
            arrays.append(a if fill is None else np.where(unseen, fill, a).astype(a.dtype))
        yield arrays
