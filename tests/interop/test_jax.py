"""cuattn.jax: values, contract, `jit`, `vmap`, `scan`, several devices. Gradients have a file of
their own."""

# ruff: noqa: F401, F811  (fixtures)

from __future__ import annotations

import functools
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from cases import draw, ranking_stack, special_rows
from jax_cases import (
    ON_CPU,
    assert_near,
    assert_same,
    cj,
    cuattn,
    jax,
    jnp,
    plain_attention,
    ran,
    random_attention,
    x64,
)

DTYPES = ["float16", "bfloat16", "float32", "float64"]


def both(name, args, options, *more, wrap=jax.jit):
    """Results of cuattn.jax inside a compiled function with other JAX code, and of NumPy."""
    arrays = {n: a for n, a in options.items() if isinstance(a, np.ndarray)}
    static = {n: a for n, a in options.items() if n not in arrays}

    def program(args, arrays):
        args = [jnp.flip(jnp.flip(a, 0), 0) if a.ndim else a for a in args]
        results = getattr(cj, name)(*args, *more, **static, **arrays)
        return jax.tree.map(lambda a: a.ravel()[::-1][::-1].reshape(a.shape), results)

    return wrap(program)(args, arrays), getattr(cuattn, name)(*args, *more, **options)


# ---- Values ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_softmax_family(rng, x64, name, dtype):
    """Rows with NaN and infinities, empty arrays and rows, without dimensions; every option."""
    rows = np.stack([row for _, row in special_rows(rng, 33, dtype)])
    shapes = [(), (0,), (3, 0), (0, 3), (1, 1), (2, 3, 5, 7)]
    cases = [(rows, {"axis": 1}), *((draw(rng, shape, dtype), {}) for shape in shapes)]
    x = draw(rng, (2, 3, 4, 5), dtype)
    where = rng.random((3, 1, 5)) < 0.6
    cases += [(x, {"axis": axis}) for axis in (0, (1, -1), None, ())]
    cases += [(x, {"where": where}), (x, {"where": False}), (x, {"dtype": np.float32})]
    cases += [(rng.integers(-9, 9, (3, 5)), {})]
    if name == "logsumexp":
        b = draw(rng, (4, 1), "float32") * (rng.random((4, 1)) < 0.7)
        cases += [(x, {"b": b, "keepdims": True, "axis": (0, 2)}), (x, {"b": 2.5})]
    else:
        cases += [(x, {"scale": 0.7}), (x, {"scale": draw(rng, (3, 1, 1))})]
    if name == "softmax":
        cases += [(x, {"return_lse": True, "axis": (0, 2), "where": where})]
    for x, options in cases:
        assert_same(*both(name, (x,), options))


@pytest.mark.parametrize("dtype", [*DTYPES, "int32", "uint8"])
def test_selections(rng, x64, dtype):
    """Ties, NaN and infinities, k of 0 and of all; every option."""
    x = ranking_stack(rng, 33, 5, dtype)
    cases = [
        ("top_k", x, k, {"mode": mode}) for k in (0, 5, 33) for mode in ("largest", "smallest")
    ]
    cube = draw(rng, (3, 4, 5), dtype)
    cases += [("top_k", cube, 3, {"axis": axis}) for axis in (0, -2, None)]
    cases += [("top_k", np.asarray(cube[0, 0, 0]), 1, {}), ("top_k", cube[:0], 2, {})]
    if np.dtype(x.dtype).kind not in "iu":
        where = rng.random((4, 5)) < 0.5
        cases += [
            ("softmax_topk", x, 5, {"output": output, "renormalize": renormalize})
            for output in ("prob", "log_prob", "logit")
            for renormalize in (False, True)
        ]
        cases += [
            ("softmax_topk", cube, 2, {"axis": 1, "where": where, "return_lse": True}),
            ("softmax_topk", cube, 9, {"axis": None, "where": where, "scale": -0.5}),
            ("softmax_topk", cube, 2, {"axis": 0, "scale": draw(rng, (1, 4, 5))}),
            ("softmax_topk", cube, 2, {"where": False}),
        ]
    for name, x, k, options in cases:
        got, want = both(name, (x,), options, k)
        assert type(got).__name__ == type(want).__name__
        assert_same(got, want)


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(rng, x64, dtype, layout):
    """Every option at once; queries that see nothing; NaN where nobody looks; fewer dimensions."""
    arrays, options = random_attention(rng, dtype)
    q, k, v = arrays
    if layout == "BSHD":
        arrays = q, k, v = tuple(a.swapaxes(1, 2) for a in arrays)
    options["return_lse"] = True
    assert_same(*both("attention", arrays, {**options, "layout": layout}))
    hidden = {"kv_lens": np.array([0, 4]), "layout": layout, "return_lse": True}
    late = np.arange(7) >= np.array([0, 4])[:, None]
    at = late[:, None, :, None] if layout == "BHSD" else late[:, :, None, None]
    poisoned = q, np.where(at, np.nan, k).astype(dtype), np.where(at, np.nan, v).astype(dtype)
    assert_same(*both("attention", poisoned, hidden))
    three = tuple(a[0] for a in arrays)
    options = {"layout": layout, "alibi_slopes": np.ones(4, np.float32), "mask": options["mask"][0]}
    assert_same(*both("attention", three, {**options, "return_lse": True}))
    two = tuple(a[0] if layout == "BHSD" else a[:, 0] for a in three)
    options = {"layout": layout, "bias": draw(rng, (5, 7)), "sinks": np.float32(0.5).reshape(1)}
    assert_same(*both("attention", two, options))
    none = q, *(a[:, :, :0] if layout == "BHSD" else a[:, :0] for a in (k, v))
    assert_same(*both("attention", none, {"layout": layout, "return_lse": True}))
    if q.itemsize == 2:
        assert_same(*both("attention", arrays, {"layout": layout, "dtype": np.float32}))


def test_the_plain_expression_is_attention(rng, x64):
    """What gradients and `vmap` are compared with."""
    arrays, options = random_attention(rng, "float64")
    want = cuattn.attention(*arrays, **options, return_lse=True)
    assert_near(jax.jit(lambda: plain_attention(*arrays, **options))(), want)


def test_without_64_bits(rng):
    """What would be float64 is float32, and int64 int32, with the same values."""
    x = draw(rng, (3, 40), "float32")
    values, indices = jax.jit(lambda x: cj.top_k(x, 7))(x)
    want = cuattn.top_k(x, 7)
    assert_same((values, indices), (want.values, want.indices.astype(np.int32)))
    found = cj.softmax_topk(x, 3, axis=None, return_lse=True)
    assert found.indices.dtype == np.int32
    np.testing.assert_array_equal(found.indices, cuattn.softmax_topk(x, 3, axis=None).indices)
    whole = rng.integers(-9, 9, (3, 5))
    for function in (cj.softmax, cj.log_softmax, cj.logsumexp):
        want = getattr(cuattn, function.__name__)(whole.astype(np.int32), dtype=np.float32)
        assert_same(function(whole), want)
        assert_same(function(whole, dtype=np.float64), want)
    assert_same(cj.softmax(whole.astype(np.float64)), cuattn.softmax(whole.astype(np.float32)))


def test_eagerly(rng):
    """Outside of `jit`, and of NumPy's arrays, scalars and numbers."""
    x = draw(rng, (3, 5))
    assert_same(cj.softmax(x), cuattn.softmax(x))
    assert_same(cj.softmax(jnp.asarray(x), scale=np.float32(2)), cuattn.softmax(x, scale=2.0))
    assert_same(cj.softmax(np.float32(3)), cuattn.softmax(np.float32(3)))
    assert_same(cj.logsumexp(x, b=np.array(2.0)), cuattn.logsumexp(x, b=2.0))
    assert_same(cj.top_k(x, np.int64(2)).values, cuattn.top_k(x, 2).values)
    strict = pytest.importorskip("array_api_strict")
    assert_same(cj.softmax(strict.asarray(x)), cuattn.softmax(x))
    weak = jnp.asarray(2.0) * jnp.arange(3)
    assert cj.softmax(weak).dtype == np.float32


@pytest.mark.skipif(not ON_CPU, reason="the emulator runs arrays of the CPU")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_kernels(rng, arch):
    """The kernels themselves, on the emulator, as a compiled program calls them."""
    import emulator

    x = draw(rng, (3, 65))
    # No outliers: |k| times the rounding of y, which may go either way, is in the gradient.
    q = rng.standard_normal((1, 2, 5, 8)).astype(np.float16)

    def loss(q):
        y = cj.attention(q, q, q)
        return y.astype(jnp.float32).sum(), y

    @jax.jit
    def program(x, q):
        dq, y = jax.grad(loss, has_aux=True)(q)
        return cj.softmax(x), cj.top_k(x, 3), y, dq

    want = jax.block_until_ready(program(x, q))
    with emulator.activate(arch=arch) as runtime:
        got = jax.block_until_ready(program(x, q))
        assert len(runtime.counters) >= 4
    assert_near(got[0], want[0])
    assert_same(got[1], want[1])
    assert_near(got[2:], want[2:])


# ---- Contract ----

X = np.zeros((2, 3), np.float32)
WRONG = [
    (lambda: cj.softmax(X, axis=2), np.exceptions.AxisError, "axis must be in"),
    (lambda: cj.softmax(X, axis=(0, 0)), ValueError, "axis must name each dimension once"),
    (lambda: cj.softmax(X > 0), TypeError, "x must be float16"),
    (lambda: cj.softmax([1.0, 2.0]), TypeError, "x must be"),
    (lambda: cj.softmax(np.ma.array(X)), TypeError, "x must be a plain"),
    (lambda: cj.softmax(X, where=X), TypeError, "where must be a bool array"),
    (lambda: cj.softmax(X, where=np.ones((3, 3), bool)), ValueError, "where must broadcast"),
    (lambda: cj.softmax(X, scale=np.ones((2, 3))), ValueError, "scale must broadcast"),
    (lambda: cj.softmax(X, dtype=np.int32), TypeError, "dtype must be one of"),
    (lambda: cj.softmax(X, return_lse=1), TypeError, "return_lse must be"),
    (lambda: cj.softmax(X, dim=0), TypeError, "axis must be given by this name"),
    (lambda: cj.log_softmax(X, out=X), TypeError, "out must be an option of log_softmax"),
    (lambda: cj.logsumexp(X, b=np.ones(4)), ValueError, "b must broadcast"),
    (lambda: cj.top_k(X, 4), ValueError, "k must be from 0 to 3"),
    (lambda: cj.top_k(X, 1, mode="best"), ValueError, "mode must be one of"),
    (lambda: cj.top_k(X, 1, sorted=None), TypeError, "sorted must be"),
    (lambda: cj.softmax_topk(X.astype(int), 1), TypeError, "x must be one of"),
    (lambda: cj.softmax_topk(X, 1, output="probs"), ValueError, "output must be one of"),
    (lambda: cj.attention(X, X, X.T), ValueError, "v must have"),
    (lambda: cj.attention(X, X, X, scale=jnp.ones(())), TypeError, "scale must be a real number"),
    (lambda: cj.attention(X, X, X, q_offset=jnp.ones(())), TypeError, "q_offset must be an int"),
    (lambda: cj.attention(X, X, X, softcap=-1), ValueError, "softcap must be"),
    (lambda: cj.attention(X, X, X, layout="SD"), ValueError, "layout must be"),
]


@pytest.mark.parametrize("case", WRONG, ids=[message for *_, message in WRONG])
def test_errors_of_the_trace(ran, case):
    call, error, message = case
    with pytest.raises(error, match=message):
        jax.jit(call).lower()
    assert not ran


def test_options_must_be_static():
    with pytest.raises(TypeError, match="k must be an integer"):
        jax.jit(lambda k: cj.top_k(X, k))(2)


def test_lengths_are_checked_when_it_runs():
    if not ON_CPU:
        pytest.skip("a device trusts them")
    with pytest.raises(Exception, match="kv_lens must be from 0 to 2"):
        jax.block_until_ready(
            cj.attention(X[None, None], X[None, None], X[None, None], kv_lens=np.array([3]))
        )


def test_nothing_runs_that_nobody_needs(ran):
    jax.jit(lambda x: (cj.softmax(x), x + 1)[1])(X).block_until_ready()
    assert not ran


def test_inputs_stay_and_may_be_donated(rng):
    x = jnp.asarray(draw(rng, (5, 7)))
    before = np.array(x)
    want = jax.block_until_ready(jax.jit(cj.softmax)(x))
    np.testing.assert_array_equal(x, before)
    got = jax.jit(lambda x: cj.softmax(x) + 0 * x, donate_argnums=0)(x)
    np.testing.assert_array_equal(got, want)


# ---- vmap: one call ----


@pytest.mark.parametrize("in_axes", [0, 1, -1])
def test_rows_of_vmap(rng, ran, in_axes):
    x = draw(rng, (4, 4, 4))
    moved = np.moveaxis(x, in_axes, 0)
    for name, call in {
        "softmax": lambda f, x: f.softmax(x, axis=0, scale=0.5, return_lse=True),
        "log_softmax": lambda f, x: f.log_softmax(x, axis=(0, 1)),
        "logsumexp": lambda f, x: f.logsumexp(x, axis=0, b=np.arange(4.0, dtype=np.float32)),
        "top_k": lambda f, x: f.top_k(x, 3, axis=None).values,
        "softmax_topk": lambda f, x: f.softmax_topk(x, 2, axis=0, return_lse=True).values,
    }.items():
        ran.clear()
        got = jax.jit(jax.vmap(functools.partial(call, cj), in_axes))(x)
        assert_same(
            got, jax.tree.map(lambda *a: np.stack(a), *(call(cuattn, row) for row in moved))
        )
        assert [found for found, _ in ran] == [name]


def test_options_of_rows_in_vmap(rng, ran):
    """Arrays that are an option alone may have the axis, and x not."""
    x, scale = draw(rng, (5, 7)), draw(rng, (3, 5, 1))
    where = rng.random((3, 7)) < 0.6
    calls = lambda f: lambda scale, where: f.softmax(x, scale=scale, where=where)  # noqa: E731
    got = jax.vmap(calls(cj))(scale, where)
    assert len(ran) == 1
    assert_same(got, np.stack([calls(cuattn)(scale[i], where[i]) for i in range(3)]))
    got = jax.vmap(jax.vmap(calls(cj), (None, 0)), (0, None))(scale, where)
    assert len(ran) == 2
    assert_same(got, np.stack([[calls(cuattn)(s, w) for w in where] for s in scale]))
    scalar = jax.vmap(lambda x: cj.softmax(x))(x[0])
    assert_same(scalar, np.ones(7, np.float32))


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize(
    "which", ["all", "q", "k v", "mask kv_lens", "sinks q_lens", "bias alibi_slopes"]
)
def test_attention_in_vmap(rng, x64, ran, which, layout):
    """Any of the arrays may have the axis."""
    arrays, options = random_attention(rng, "float64")
    draws = [random_attention(rng, "float64") for _ in range(3)]
    static = {n: options.pop(n) for n in ("is_causal", "window", "scale", "softcap")}
    given = {"q": arrays[0], "k": arrays[1], "v": arrays[2], **options}
    all_of = [{"q": a[0], "k": a[1], "v": a[2], **o} for a, o in draws]
    names = list(given) if which == "all" else which.split()
    for name in names:
        given[name] = np.stack([one[name] for one in all_of])
    axes = {name: 0 if name in names else None for name in given}

    def call(f, given):
        turn = lambda a: a.swapaxes(1, 2) if layout == "BSHD" else a  # noqa: E731
        arrays = [turn(given[name]) for name in ("q", "k", "v")]
        rest = {name: a for name, a in given.items() if name not in ("q", "k", "v")}
        return f(*arrays, **rest, **static, layout=layout)

    ours, numpys = (functools.partial(f.attention, return_lse=True) for f in (cj, cuattn))
    got = jax.jit(jax.vmap(functools.partial(call, ours), (axes,)))(given)
    assert len(ran) == 1
    each = [{n: a[i] if n in names else a for n, a in given.items()} for i in range(3)]
    assert_near(got, tuple(map(np.stack, zip(*(call(numpys, one) for one in each), strict=True))))


def test_nested_vmap_of_attention(rng, ran):
    q, k = draw(rng, (2, 3, 4, 5, 8)), draw(rng, (2, 4, 6, 8))
    sinks = draw(rng, (3, 4))
    call = lambda f: lambda q, k, s: f(q, k, k, sinks=s, is_causal=True)  # noqa: E731
    got = jax.vmap(jax.vmap(call(cj.attention), (0, None, 0)), (0, 0, None))(q, k, sinks)
    assert len(ran) == 1
    want = [[call(cuattn.attention)(q[i, j], k[i], sinks[j]) for j in range(3)] for i in range(2)]
    assert_near(got, np.array(want))


# ---- scan, loops, several devices ----


def test_scan(rng, ran):
    """A carry; and a query for each step over keys up to it, whose place is the counter."""
    x = draw(rng, (3, 9))
    step = lambda f: lambda x, _: (f(3 * x), x.sum())  # noqa: E731
    got = jax.jit(lambda x: jax.lax.scan(step(cj.softmax), x, None, length=4))(x)
    assert len(ran) == 4
    assert_near(got, jax.lax.scan(step(jax.nn.softmax), jnp.asarray(x), None, length=4))
    q, k = draw(rng, (2, 6, 8)), draw(rng, (2, 6, 8))

    def decode(place, query):
        return place + 1, cj.attention(query[:, None], k, k, is_causal=True, q_offset=place)[:, 0]

    _, y = jax.jit(lambda q: jax.lax.scan(decode, jnp.int32(0), q.swapaxes(0, 1)))(q)
    assert_near(y.swapaxes(0, 1), cuattn.attention(q, k, k, is_causal=True))


def test_branches_and_loops(rng):
    x = draw(rng, (3, 9))
    program = jax.jit(lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: cj.softmax(x), x))
    assert_same(program(2, x), cuattn.softmax(cuattn.softmax(x)))
    choose = jax.jit(lambda p, x: jax.lax.cond(p, cj.softmax, cj.log_softmax, x))
    assert_same(choose(True, x), cuattn.softmax(x))
    assert_same(choose(False, x), cuattn.log_softmax(x))
    assert_same(jax.jit(jax.checkpoint(cj.softmax))(x), cuattn.softmax(x))


DEVICES = """
import jax, numpy as np, cuattn.jax
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2,), ("d",))
rng = np.random.default_rng(SEED)
x, w, s = (jax.numpy.asarray(rng.standard_normal(n), "float32") for n in ((4, 10), 10, (1, 1)))
split = jax.device_put(x, NamedSharding(mesh, P("d")))
whole = jax.jit(cuattn.jax.softmax)(split)
np.testing.assert_allclose(whole, jax.nn.softmax(x), rtol=1e-5)
for check in (True, False):
    loss = lambda x, w, s: jax.lax.psum((cuattn.jax.softmax(x, scale=s) * w).sum(), "d")
    specs = dict(mesh=mesh, in_specs=(P("d"), P(), P()), check_vma=check)
    sharded = jax.shard_map(loss, **specs, out_specs=P())
    got = jax.jit(jax.value_and_grad(sharded, (0, 1, 2)))(split, w, s)
    plain = lambda x, w, s: (jax.nn.softmax(s * x) * w).sum()
    want = jax.value_and_grad(plain, (0, 1, 2))(x, w, s)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    rows = jax.shard_map(lambda x, w, s: cuattn.jax.softmax(x), **specs, out_specs=P("d"))
    assert jax.jit(rows)(split, w, s).sharding.spec[0] == "d"
print("done")
"""


@pytest.mark.skipif(not ON_CPU, reason="makes two devices of one CPU")
def test_several_devices():
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    script = DEVICES.replace("SEED", os.environ["CUATTN_TEST_SEED"])
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **flags, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert result.stdout.strip() == "done", result.stderr
