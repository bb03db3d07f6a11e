"""Gradients of cuattn.jax in float64, against those of plain expressions by JAX itself and against
differences of values; which calls they make, and what they refuse."""

# ruff: noqa: F401, F811  (fixtures)

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import pytest
from cases import draw
from jax_cases import (
    assert_near,
    cj,
    cuattn,
    jax,
    jnp,
    plain_attention,
    ran,
    random_attention,
    x64,
)


def plain_softmax(x, axis=-1, *, scale=None, where=None, return_lse=False):
    """(y, lse), and with `where` 0 elsewhere."""
    s = x if scale is None else scale * x
    s = s if where is None else jnp.where(where, s, -jnp.inf)
    lse = jax.nn.logsumexp(s, axis)
    y = jnp.exp(s - jax.nn.logsumexp(s, axis, keepdims=True))
    return (y, lse) if return_lse else y


def plain_log_softmax(x, axis=-1, *, scale=None, where=None):
    s = x if scale is None else scale * x
    part = s if where is None else jnp.where(where, s, -jnp.inf)
    y = s - jax.nn.logsumexp(part, axis, keepdims=True)
    return y if where is None else jnp.where(where, y, 0)  # of -inf nothing is added up


def plain_topk(
    x, k, *, axis=-1, scale=None, where=None, renormalize=False, output="prob", return_lse=False
):
    s = x if scale is None else scale * x
    s = s if where is None else jnp.where(where, s, -jnp.inf)
    lse = jax.nn.logsumexp(s, axis)
    values = jnp.moveaxis(jax.lax.top_k(jnp.moveaxis(s, axis, -1), k)[0], -1, axis)
    if output != "logit":
        total = jax.nn.logsumexp(values, axis) if renormalize else lse
        values = values - jnp.expand_dims(total, axis)
        values = jnp.exp(values) if output == "prob" else values
    return (values, lse) if return_lse else values


def weighted(rng, results):
    """A function of results to a number; infinite ones do not count."""
    weights = [rng.standard_normal(a.shape) for a in jax.tree.leaves(results)]

    def loss(results):
        pairs = zip(weights, jax.tree.leaves(results), strict=True)
        return sum((w * jnp.where(jnp.isfinite(a), a, 0)).sum() for w, a in pairs)

    return loss


def check(rng, ours, plain, *arrays, differences=True):
    """Gradients with respect to all of the arrays, in a compiled function with other JAX code."""
    loss, wanted = weighted(rng, jax.eval_shape(plain, *arrays)), tuple(range(len(arrays)))
    value = lambda *a: loss(ours(*(2 * b / 2 for b in a)))  # noqa: E731
    way = [rng.standard_normal(a.shape) for a in arrays]

    @jax.jit
    def program(*a):
        both = [jax.grad(f, wanted)(*a) for f in (value, lambda *a: loss(plain(*a)))]
        far, near = ([x + sign * 1e-5 * d for x, d in zip(a, way, strict=True)] for sign in (1, -1))
        return *both, (value(*far) - value(*near)) / 2e-5 if differences else 0

    got, want, slope = program(*arrays)
    assert [a.dtype for a in got] == [a.dtype for a in arrays]
    assert_near(got, want, roundings=4000)
    if differences:
        along = sum((d * g).sum() for d, g in zip(way, got, strict=True))
        np.testing.assert_allclose(along, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learned", [False, True], ids=["number", "array"])
@pytest.mark.parametrize("axis", [-1, (0, 2), None])
def test_softmax(rng, x64, axis, learned):
    """An array of scales has a gradient of its own; what does not take part has none."""
    x, where = rng.standard_normal((2, 3, 5)), rng.random((2, 3, 5)) < 0.7
    where[:, :, 0] = where[:, 0] = True  # no row is left without an element
    how = {"axis": axis} | ({} if learned else {"where": where})
    for name, plain in (("softmax", plain_softmax), ("log_softmax", plain_log_softmax)):
        more = how | ({"return_lse": True} if name == "softmax" else {})

        def finite(f, *a, more=more):
            scale = a[1] if learned else 0.7
            found = f(a[0], **more, scale=scale)
            return jax.tree.map(lambda y: jnp.where(y == -jnp.inf, 0, y), found)

        calls = (functools.partial(finite, f) for f in (getattr(cj, name), plain))
        check(rng, *calls, x, *([np.sum(x, axis, keepdims=True)] if learned else []))


@pytest.mark.parametrize("axis", [-1, (0, 1), None])
def test_logsumexp(rng, x64, axis):
    x, where = rng.standard_normal((2, 3, 5)), rng.random((3, 1)) < 0.7
    where[0] = True
    for how in ({"keepdims": True}, {"where": where}):
        calls = [functools.partial(f.logsumexp, axis=axis, **how) for f in (cj, jax.nn)]
        b = abs(rng.standard_normal((2, 1, 5))) * (rng.random((2, 1, 5)) < 0.7)
        b[0] = b[..., 0] = 1  # no row is left without a weight
        check(rng, *(lambda x, b, f=f: f(x, b=b) for f in calls), x, b, differences=False)
    calls = [functools.partial(f.logsumexp, axis=axis, b=2.5) for f in (cj, jax.nn)]
    check(rng, *calls, x)


@pytest.mark.parametrize("mode", ["largest", "smallest"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_top_k(rng, x64, axis, mode):
    x, sign = rng.standard_normal((3, 7, 6)), 1 if mode == "largest" else -1

    def plain(x):
        values = jax.lax.top_k(sign * jnp.moveaxis(x, axis, -1), 4)[0]
        return sign * jnp.moveaxis(values, -1, axis)

    check(rng, lambda x: cj.top_k(x, 4, axis=axis, mode=mode).values, plain, x)
    whole = lambda x: cj.top_k(x, 4, axis=None, mode=mode).values  # noqa: E731
    check(
        rng,
        whole,
        lambda x: plain(x.reshape(1, -1)[:, :, None] if axis == 1 else x.ravel()).ravel(),
        x,
    )


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("output", ["prob", "log_prob", "logit"])
def test_softmax_topk(rng, x64, output, renormalize):
    x, where = rng.standard_normal((3, 7, 6)), rng.random((7, 1)) < 0.8
    where[:4] = True
    scale = 0.5 + rng.random((3, 1, 6))
    how = {"axis": 1, "output": output, "renormalize": renormalize}
    how |= {"return_lse": True, "where": where}

    def ours(x, scale):
        return cj.softmax_topk(x, 3, **how, scale=scale)[::2]  # all but the indices

    check(rng, ours, lambda x, s: plain_topk(x, 3, **how, scale=s), x, scale)


FLOATS = "q", "k", "v", "bias", "alibi_slopes", "sinks"


@pytest.mark.parametrize(
    ("few", "layout"),
    [("every option", "BHSD"), ("one head", "BSHD"), ("(H, S, D)", "BSHD"), ("(S, D)", "BHSD")],
)
def test_attention(rng, x64, few, layout):
    size = {"heads": 1, "shared": 1} if few == "(S, D)" else {}
    arrays, options = random_attention(
        rng, "float64", batch=2 if few == "every option" else 1, **size
    )
    given = dict(zip("qkv", arrays, strict=True)) | {n: options.pop(n) for n in FLOATS[3:]}
    if few == "one head":  # what is broadcast has the sum
        given["bias"] = given["bias"][:1, :, :1]
        given["alibi_slopes"] = np.stack([given["alibi_slopes"]])
    if layout == "BSHD":
        given |= {name: given[name].swapaxes(1, 2) for name in "qkv"}
    names, four = tuple(given), dict(given)
    if few in ("(H, S, D)", "(S, D)"):
        given |= {name: given[name][0] for name in "qkv"}
        options["mask"] = options["mask"][0]
        options["q_lens"], options["q_offset"] = options["q_lens"][0], int(options["q_offset"][0])
    if few == "(S, D)":
        given |= {name: given[name][0] for name in ("q", "k", "v", "bias", "alibi_slopes", "sinks")}
        given["sinks"], options["mask"] = given["sinks"].reshape(1), options["mask"][0]
    if "q_lens" in options and np.ndim(options["q_lens"]) == 0:
        options["q_lens"] = options["q_lens"].reshape(1)

    def call(f, *arrays):
        named = dict(zip(names, arrays, strict=True))
        qkv = [named.pop(name) for name in "qkv"]
        return f(*qkv, **named, **options, layout=layout)

    def plain(*arrays):
        shaped = [jnp.reshape(a, four[name].shape) for name, a in zip(names, arrays, strict=True)]
        y, lse = call(plain_attention, *shaped)
        batch, heads, rows = lse.shape
        lse_shape = {4: lse.shape, 3: lse.shape[1:], 2: lse.shape[2:]}[arrays[0].ndim]
        return y.reshape(*arrays[0].shape[:-1], y.shape[-1]), lse.reshape(lse_shape)

    ours = functools.partial(call, functools.partial(cj.attention, return_lse=True))
    check(rng, ours, plain, *given.values())
    if few == "(H, S, D)":  # nothing of lse
        alone = functools.partial(call, cj.attention)
        check(rng, alone, lambda *a: plain(*a)[0], *given.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_narrow_types(rng, dtype):
    """Each gradient has the dtype of its array; results may be wider."""
    x = jnp.clip(draw(rng, (3, 5, 8), dtype, spread=1.0), -2, 2)  # scores with most of their digits
    w = rng.standard_normal(x.shape).astype(np.float32)
    for ours, plain, gradients in (  # these of attention are rounded before they are added
        (cj.softmax, jax.nn.softmax, 1),
        (functools.partial(cj.softmax, dtype=np.float32), jax.nn.softmax, 1),
        (cj.log_softmax, jax.nn.log_softmax, 1),
        (lambda x: cj.softmax_topk(x, 8, scale=1.0).values, lambda x: plain_topk(x, 8), 1),
        (lambda x: cj.attention(x, x, x, dtype=np.float32),
         lambda x: plain_attention(x[None], x[None], x[None])[0][0], 3),
    ):  # fmt: skip
        got = jax.jit(jax.grad(lambda x, f=ours: (w * f(x)).sum()))(x)
        want = jax.jit(jax.grad(lambda x, f=plain: (w * f(x)).sum()))(x.astype(np.float32))
        assert got.dtype == x.dtype
        assert_near(got, want, roundings=40 if dtype == "float32" else 4 * gradients)


def test_rows_that_are_not_finite(rng, x64):
    """As those of cuattn's backward passes; what does not take part has none and spoils none."""
    x = rng.standard_normal((4, 6))
    x[0, 1], x[1, 2], x[2] = np.nan, np.inf, -np.inf
    g = rng.standard_normal(x.shape)
    y, vjp = jax.vjp(cj.softmax, x)
    np.testing.assert_array_equal(vjp(g)[0], cuattn.softmax_backward(g, np.asarray(y)))
    where = np.isfinite(x)
    for function in (cj.softmax, lambda x, where: cj.softmax_topk(x, 2, where=where)[0]):
        dx = jax.grad(lambda x, f=function: (f(x, where=where) ** 2).sum())(x)
        assert np.isfinite(dx).all() and (dx[~where] == 0).all() and (dx[0] != 0).any()
    (dx,) = jax.vjp(functools.partial(cj.log_softmax, where=where), x)[1](g)
    assert np.isfinite(dx).all() and (dx[~where] == 0).all()
    ours = lambda x: cj.logsumexp(x, -1, where=where, b=1.0 * where)  # noqa: E731
    dx = np.asarray(jax.grad(lambda x: (jnp.array([1, 1, 0, 1]) * ours(x)).sum())(x))
    np.testing.assert_allclose(dx[[0, 1, 3]].sum(1), 1)
    assert not dx[2].any()


def test_integers_have_none(rng):
    whole = rng.integers(-9, 9, (3, 5))
    got = jax.grad(lambda x: cj.softmax(x)[0, 0], allow_int=True)(whole)
    assert got.dtype == jax.dtypes.float0
    q, slopes = draw(rng, (2, 3, 4)), np.array([1, 2])
    loss = lambda q, s: cj.attention(q, q, q, alibi_slopes=s).sum()  # noqa: E731
    assert jax.grad(loss)(q, slopes).shape == q.shape


def test_which_calls_are_made(rng, ran):
    """One backward pass, of a bias only where it is asked for; nothing of a result without use."""
    q, bias = draw(rng, (2, 4, 3)), draw(rng, (4, 4))
    loss = lambda q, bias: cj.attention(q, q, q, bias=bias).sum()  # noqa: E731
    jax.block_until_ready(jax.jit(jax.grad(loss))(q, bias))
    assert [name for name, _ in ran] == ["attention", "attention_backward"]
    assert ran[1][1]["return_dbias"] is False
    ran.clear()
    jax.block_until_ready(jax.jit(jax.grad(loss, 1))(q, bias))
    assert ran[1][1]["return_dbias"] is True
    ran.clear()
    jax.block_until_ready(jax.grad(lambda q: cj.softmax(q, return_lse=True)[1].sum())(q))
    assert [name for name, _ in ran] == ["softmax"]
    ran.clear()
    for output, renormalize, calls in (("prob", False, 2), ("prob", True, 1), ("logit", False, 1)):
        how = {"output": output, "renormalize": renormalize}
        jax.block_until_ready(
            jax.jit(jax.grad(lambda q, how=how: cj.softmax_topk(q, 2, **how)[0].sum()))(q)
        )
        assert len(ran) == calls
        ran.clear()


OWN = "bias", "alibi_slopes", "sinks"


@pytest.mark.parametrize(
    ("order", "shared"),
    [
        ("grad of vmap", ("k", "v")),
        ("grad of vmap", OWN),
        ("vmap of grad", ()),
        ("vmap of grad", OWN),
    ],
)
def test_attention_in_vmap(rng, x64, ran, order, shared):
    """What all share has the sum of gradients; with `vmap` outside each has its own."""
    draws = [random_attention(rng, "float64") for _ in range(3)]
    _, options = draws[0]
    lens = np.stack([one["q_lens"] for _, one in draws])
    each = [dict(zip("qkv", a, strict=True)) | {n: o[n] for n in FLOATS[3:]} for a, o in draws]
    given = {n: each[0][n] if n in shared else np.stack([e[n] for e in each]) for n in FLOATS}
    axes = {n: None if n in shared else 0 for n in FLOATS}
    static = {
        n: options[n]
        for n in ("is_causal", "window", "scale", "softcap", "mask", "kv_lens", "q_offset")
    }
    w = rng.standard_normal((3, 2, 4, 5, 4))

    def one(f, given, lens, w):
        arrays = [given[name] for name in "qkv"]
        rest = {name: given[name] for name in FLOATS[3:]}
        y, lse = f(*arrays, **rest, **static, q_lens=lens)
        return (w * y).sum() + jnp.where(jnp.isfinite(lse), w[..., 0] * lse, 0).sum()

    def program(f):
        loss = functools.partial(one, f)
        if order == "vmap of grad":
            return jax.vmap(jax.grad(loss), (axes, 0, 0))(given, lens, w)
        return jax.grad(lambda g: jax.vmap(loss, (axes, 0, 0))(g, lens, w).sum())(given)

    got = jax.jit(program, static_argnums=0)(functools.partial(cj.attention, return_lse=True))
    assert [name for name, _ in ran] == ["attention", "attention_backward"]
    assert_near(got, jax.jit(program, static_argnums=0)(plain_attention), roundings=4000)


def test_rows_in_vmap(rng, x64, ran):
    x, scale = rng.standard_normal((3, 4, 5)), rng.random((3, 4, 1))
    for name, plain in (("softmax", plain_softmax), ("log_softmax", plain_log_softmax)):
        ours = getattr(cj, name)
        program = lambda f: jax.jit(jax.vmap(jax.jit(jax.vmap(jax.grad(  # noqa: E731
            lambda x, s: (f(x, scale=s) * jnp.arange(5)).sum(), (0, 1))))))(x, scale)  # fmt: skip
        ran.clear()
        got = program(ours)
        assert [found for found, _ in ran] == [name, f"{name}_backward"]
        assert_near(got, program(plain), roundings=400)
        shared = lambda f, name=name: jax.grad(lambda s: jax.vmap(  # noqa: E731
            lambda x: (f(x, scale=s) ** 2).sum())(x).sum())(scale[0])  # fmt: skip
        assert_near(shared(ours), shared(plain), roundings=400)


def test_scan_of_steps(rng, x64):
    """Gradient descent inside of a scan, and a gradient through one."""
    x = rng.standard_normal((3, 7))

    def program(f):
        step = lambda x, _: (x - 0.1 * jax.grad(lambda x: (f(x) ** 2).sum())(x), f(x)[0, 0])  # noqa: E731
        steps = jax.lax.scan(step, x, None, length=3)
        through = lambda x: jax.lax.scan(lambda x, _: (f(3 * x), None), x, None, length=3)[0][0, 0]  # noqa: E731
        return steps, jax.grad(through)(x), jax.grad(jax.checkpoint(lambda x: f(x)[0, 0]))(x)

    got = jax.jit(program, static_argnums=0)(cj.softmax)
    assert_near(got, jax.jit(program, static_argnums=0)(jax.nn.softmax), roundings=400)


def test_what_is_refused(rng):
    x = draw(rng, (3, 5))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(cj.softmax, (x,), (x,))
    with pytest.raises(ValueError, match="do not support JVP"):
        jax.grad(lambda x: jax.grad(lambda x: (cj.softmax(x) ** 2).sum())(x).sum())(x)
