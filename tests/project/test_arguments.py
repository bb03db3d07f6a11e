"""What arguments may be beside arrays and numbers of Python, and what a call is told that has none
of ours: NumPy scalars, arrays without dimensions, flags, numbers past every type, others' names."""

from __future__ import annotations

import importlib
import inspect
import pickle
import warnings

import ml_dtypes
import numpy as np
import pytest
from cases import draw
from test_attention_check import DENSE, VARLEN, Attention
from test_check import FORWARD, TRANSFORMS, Refusing
from test_interchange import CALLS, each, leaves

import cuattn
from cuattn._arrays import keywords

HUGE = [2**63, 10**400, -(10**400), 10**5000]  # past int64, past float64, past what str() converts
PUBLIC = sorted(CALLS)


@pytest.fixture
def refusing(backend):
    return Refusing(backend)


@pytest.fixture
def at(backend):
    return Attention(backend)


# ---- NumPy scalars, and arrays without dimensions ----------------------------------------------


def same(got, want):
    for ours, theirs in zip(leaves(got), leaves(want), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.host("arrays of the host")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, ml_dtypes.bfloat16])
def test_numpy_scalar_for_x(backend, dtype):
    """As an array without dimensions."""
    number, array = dtype(3), np.array(3, dtype)
    calls = [
        lambda x: cuattn.softmax(x, return_lse=True),
        lambda x: cuattn.log_softmax(x),
        lambda x: cuattn.logsumexp(x),
        lambda x: cuattn.softmax_state(x),
        lambda x: cuattn.top_k(x, 1),
    ]
    if dtype is not np.int8:
        calls += [
            lambda x: cuattn.softmax_backward(x, x),
            lambda x: cuattn.softmax_topk(x, 1),
            lambda x: cuattn.softmax_topk_state(x, 2),
            lambda x: cuattn.sample(x, 2, seed=3, return_log_prob=True),
            lambda x: cuattn.sample_state(x, 2, seed=3),
        ]
    for call in calls:
        same(call(number), call(array))


@pytest.mark.parametrize("name", FORWARD)
def test_one_bool_for_where(backend, rng, name):
    """Of Python, of NumPy, or an array without dimensions: all take part, or nothing does."""
    function, x = getattr(cuattn, name), backend.asarray(draw(rng, (3, 33)))
    every = backend.xp.ones(x.shape, bool)
    want = backend.asnumpy(function(x, axis=-1, where=every))
    nothing = {"softmax": 0, "log_softmax": -np.inf, "logsumexp": -np.inf}[name]
    for true, false in ((True, False), (np.True_, np.False_), (np.array(True), np.array(False))):
        np.testing.assert_array_equal(backend.asnumpy(function(x, axis=-1, where=true)), want)
        got = backend.asnumpy(function(x, axis=-1, where=false))
        np.testing.assert_array_equal(got, np.full_like(want, nothing))


@pytest.mark.parametrize("axis", [-1, 0, None])
def test_one_bool_for_where_of_a_selection(backend, rng, axis):
    x = backend.asarray(draw(rng, (3, 33)))
    want = cuattn.softmax_topk(x, 2, axis=axis, where=backend.xp.ones(x.shape, bool))
    got = cuattn.softmax_topk(x, 2, axis=axis, where=np.True_)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(ours), backend.asnumpy(theirs))
    for false in (False, np.False_, np.array(False)):
        got = cuattn.softmax_topk(x, 2, axis=axis, where=false, return_lse=True)
        assert not backend.asnumpy(got.values).any()
        np.testing.assert_array_equal(backend.asnumpy(got.lse), -np.inf)


def test_one_number_for_an_array(backend, rng):
    x = backend.asarray(draw(rng, (3, 33)))
    want = backend.asnumpy(cuattn.softmax(x, scale=0.5))
    for scale in (np.float32(0.5), np.float64(0.5), np.array(0.5), ml_dtypes.bfloat16(0.5)):
        np.testing.assert_array_equal(backend.asnumpy(cuattn.softmax(x, scale=scale)), want)
    q = backend.asarray(draw(rng, (2, 2, 5, 16)))
    want = backend.asnumpy(cuattn.attention(q, q, q, q_offset=-1, is_causal=True))
    for offset in (np.int8(-1), np.array(-1)):
        got = cuattn.attention(q, q, q, q_offset=offset, is_causal=np.True_)
        np.testing.assert_array_equal(backend.asnumpy(got), want)


@pytest.mark.parametrize(
    "value", [np.array(2.0, object), np.array(True), np.array(1j), np.str_("2")]
)
def test_objects_hide_no_number(refusing, value):
    """One number as an object is not a number, as little as an array of objects is of numbers."""
    x = refusing.x
    refusing.refuses(TypeError, "b", "logsumexp", x, b=value)
    refusing.refuses(TypeError, "scale", "softmax", x, scale=value)
    refusing.refuses(TypeError, "scale", "attention", x, x, x, scale=value)
    refusing.refuses(TypeError, "where", "softmax", x, where=np.array(2, object))


# ---- numbers past every type -------------------------------------------------------------------


@pytest.mark.parametrize("huge", HUGE, ids=lambda n: f"{n.bit_length()} bits")
def test_huge_numbers(refusing, huge):
    x = refusing.x
    if abs(huge) > 2**1024:
        words = f"fit into float64, but it is an integer of {huge.bit_length()} bits"
        refusing.refuses(ValueError, "scale", "softmax", x, scale=huge, words=words)
        refusing.refuses(ValueError, "b", "logsumexp", x, b=huge, words="fit into float64")
        refusing.refuses(ValueError, "scale", "attention", x, x, x, scale=huge)
        refusing.refuses(ValueError, "softcap", "attention", x, x, x, softcap=huge)
    refusing.refuses(ValueError, "k", "top_k", x, huge)
    refusing.refuses(ValueError, "k", "softmax_topk", x, huge)
    refusing.refuses(ValueError, "k", "softmax_topk_state", x, huge)
    refusing.refuses(ValueError, "index_offset", "softmax_topk_state", x, 2, index_offset=huge)
    refusing.refuses(ValueError, "num", "sample", x, huge, seed=1)
    refusing.refuses(ValueError, "seed", "sample", x, seed=2 * huge)  # of 64 bits it may be
    refusing.refuses(ValueError, "offset", "sample", x, seed=1, offset=huge)
    refusing.refuses(ValueError, "index_offset", "sample_state", x, seed=1, index_offset=huge)
    refusing.refuses(ValueError, "q_offset", "attention", x, x, x, q_offset=huge)
    refusing.refuses(TypeError, "dtype", "softmax", x, dtype=huge)
    refusing.refuses((ValueError, np.exceptions.AxisError), "axis", "softmax", x, huge)
    if huge < 0:
        refusing.refuses(ValueError, "window", "attention", x, x, x, window=(huge, None))
    else:
        np.testing.assert_array_equal(
            refusing.backend.asnumpy(cuattn.attention(x, x, x, window=(huge, huge))),
            refusing.backend.asnumpy(cuattn.attention(x, x, x)),
        )


def test_largest_numbers(backend):
    """What is one less than too large is right."""
    x = backend.asarray(np.arange(5, dtype=np.float32))
    largest = 2**63 - 1 - 5
    found = cuattn.softmax_topk_state(x, 2, index_offset=largest)
    assert backend.asnumpy(found.indices).tolist() == [largest + 4, largest + 3]
    with pytest.raises(ValueError, match=rf"^index_offset must be from 0 to {largest}, .+, but"):
        cuattn.softmax_topk_state(x, 2, index_offset=largest + 1)


@pytest.mark.host("device arrays are trusted")
def test_offsets_that_no_place_has(at):
    """Only where they lie on the host: reading a device array would wait for it."""
    for values in ([2**40, 0], [0, -(2**39) - 1]):
        at.bad(ValueError, "q_offset", DENSE, "2**39", q_offset=np.array(values))
    at.bad(ValueError, "q_offset", VARLEN, "2**39", q_offset=np.array([2**63, 0], np.uint64))


def test_overflow_warns_nobody():
    """What does not fit into the dtype of a result is inf, in silence, as on a device."""
    x = np.array([[1, 2, 4]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lse = cuattn.softmax(x, scale=1e300, return_lse=True)[1]
        state = cuattn.softmax_state(x, scale=1e300)
        selected = cuattn.softmax_topk(x, 2, scale=1e300, output="logit", return_lse=True)
        part = cuattn.softmax_topk_state(x, 2, scale=1e300)
        grad, y = np.array([[3e38, 0], [0.5, 0.5]], np.float32)[:, None]
        dx = cuattn.softmax_backward(grad, y, scale=100)
    for inf in (lse, state.m, selected.values, selected.lse, part.values, part.m, abs(dx[:, 0])):
        np.testing.assert_array_equal(inf, np.inf)


# ---- flags -------------------------------------------------------------------------------------

FLAGS = [
    ("softmax", "return_lse"),
    ("logsumexp", "keepdims"),
    ("entropy", "keepdims"),
    ("cross_entropy", "return_lse"),
    ("softmax_topk", "return_lse"),
    ("softmax_topk", "renormalize"),
    ("top_k", "sorted"),
    ("sample", "return_log_prob"),
    ("attention", "is_causal"),
    ("attention", "return_lse"),
    ("attention_backward", "is_causal"),
    ("attention_backward", "return_dbias"),
    ("attention_backward_varlen", "is_causal"),
    ("attention_backward_varlen", "return_dbias"),
    ("attention_cascade", "is_causal"),
    ("attention_column_sums", "is_causal"),
    ("attention_cascade", "return_lse"),
    ("attention_kvcache", "is_causal"),
    ("attention_kvcache", "return_lse"),
    ("attention_topk", "is_causal"),
    ("attention_varlen", "is_causal"),
    ("attention_varlen", "return_lse"),
]


@pytest.mark.parametrize(("name", "option"), FLAGS)
def test_flags(refusing, name, option):
    args, named = CALLS[name]
    args = each(refusing.array, args)
    more = {"bias": refusing.array(named["bias"])} if option == "return_dbias" else {}
    needed = {"seed": 1} if name == "sample" else {}
    for value in (
        None,
        0,
        1,
        2.0,
        "no",
        "",
        [],
        [1],
        np.array([True, False]),
        np.int8(1),
        object(),
    ):
        given = {option: value, **needed}
        refusing.refuses(TypeError, option, name, *args, words="True or False", **given)
    for value in (True, False):
        got, want = (
            getattr(cuattn, name)(*args, **more, **needed, **{option: flag})
            for flag in (np.bool_(value), value)
        )
        assert len(leaves(got)) == len(leaves(want))
        for ours, theirs in zip(leaves(got), leaves(want), strict=True):
            np.testing.assert_array_equal(*map(refusing.backend.asnumpy, (ours, theirs)))


def test_every_flag_is_tested():
    flags = {
        (name, p.name)
        for name in PUBLIC
        for p in inspect.signature(getattr(cuattn, name)).parameters.values()
        if isinstance(p.default, bool)
    }
    flags -= {(name, "return_dscore") for name in PUBLIC}  # which may also be names
    assert flags == set(FLAGS)


# ---- corners of axis and out -------------------------------------------------------------------


def test_axis_names_the_dimension_of_a_number_once(refusing):
    x = refusing.array(np.array(1.0, np.float32))
    for axis in ((0, 0), (0, -1)):
        refusing.refuses(ValueError, "axis", "softmax", x, axis, words="once")
    for axis in ((0,), (-1,), ()):
        assert float(cuattn.softmax(x, axis)) == 1
    refusing.backend.runtime and refusing.backend.runtime.clear()
    for axis in (True, np.True_, (False,)):
        refusing.refuses(TypeError, "axis", "softmax", refusing.x, axis)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_out_without_elements(backend, name):
    """NumPy gives arrays without elements strides of 0."""
    for shape in ((0, 3), (3, 0), (2, 0, 4)):
        x, out = (backend.asarray(np.zeros(shape, np.float32)) for _ in range(2))
        assert getattr(cuattn, name)(x, out=out) is out
    q = backend.asarray(np.zeros((2, 2, 0, 8), np.float32))
    out = backend.asarray(np.zeros((2, 2, 0, 8), np.float32))
    assert cuattn.attention(q, q, q, out=out) is out


@pytest.mark.host("CuPy has no swapped bytes")
def test_swapped_bytes(refusing):
    """Of offsets and states too, which kernels read as they are."""
    x, ends = refusing.x, np.array([0, 1, 3], ">i8")
    refusing.refuses(TypeError, "cu_seqlens", "segment_softmax", x, ends)
    state = cuattn.SoftmaxState(np.zeros(3, ">f4"), np.ones(3, ">f4"))
    refusing.refuses(TypeError, "a", "merge", state, state)
    refusing.refuses(TypeError, "dtype", "softmax", x, dtype=">f4")


# ---- masks of a common shape -------------------------------------------------------------------


@pytest.mark.parametrize("option", ["mask", "bias"])
def test_padding_masks(at, option):
    dtype = bool if option == "mask" else np.float32
    for shape, words in (
        ((2, 5), rf"{option}[:, None, None, :], or kv_lens"),
        ((2, 3, 5), rf"{option}[:, None]"),
    ):
        given = at.xp.ones(shape, dtype)
        message = at.bad(ValueError, option, DENSE, words, **{option: given})
        shown = message.split("pass ")[1].split(",  or")[0].split(", or")[0]
        fixed = eval(shown, {option: given})  # what the message says works
        at.call(DENSE, *at.args(DENSE), **{option: fixed})
        at.clear()


# ---- names -------------------------------------------------------------------------------------

X = np.ones((3, 4), np.float32)
OTHERS = [  # the call, our name in what it is told, and what else that says
    (lambda: cuattn.softmax(X, dim=1), "axis", "dim"),
    (lambda: cuattn.logsumexp(X, dim=1, keepdim=True), "axis", "dim"),
    (lambda: cuattn.logsumexp(X, keepdim=True), "keepdims", "keepdim"),
    (lambda: cuattn.softmax(X, temperature=0.7), "scale", "1 / temperature"),
    (lambda: cuattn.softmax(X, mask=X > 0), "where", "mask"),
    (lambda: cuattn.softmax(input=X), "x", "position"),
    (lambda: cuattn.top_k(X, 2, dim=1), "axis", "dim"),
    (lambda: cuattn.top_k(X, 2, largest=False), "mode", 'mode="smallest"'),
    (lambda: cuattn.top_k(X, k=2), "k", "position"),
    (lambda: cuattn.softmax_topk(X, topk=2), "k", "position"),
    (lambda: cuattn.sample(X, num_samples=2, seed=1), "num", "position"),
    (lambda: cuattn.sample(X, seed=1, temperature=2), "scale", "1 / temperature"),
    (lambda: cuattn.sample(X, generator=None), "seed", "an int"),
    (lambda: cuattn.sample(X, key=3), "seed", "an int"),
    (lambda: cuattn.sample(X, seed=1, topk=3), "top_k", "topk"),
    (lambda: cuattn.sample(X, 2, seed=1, replacement=False), "replacement", "offset"),
    (lambda: cuattn.sample(X), "seed", "seed=..."),
    (lambda: cuattn.softmax_topk(X, 2, norm_topk_prob=True), "renormalize", "norm_topk_prob"),
    (lambda: cuattn.cross_entropy(X, target=X), "labels", "target"),
    (lambda: cuattn.cross_entropy(X, X, ignored_index=0), "ignore_index", "ignored_index"),
    (lambda: cuattn.cross_entropy(X, X, weight=X), "weight", "multiply losses by weight[labels]"),
    (lambda: cuattn.cross_entropy(X, X, reduction="mean"), "reduction", "sum or mean"),
    (lambda: cuattn.cross_entropy_backward(X, X, X, X, z_loss=1), "z_loss", "lse**2"),
    (lambda: cuattn.cross_entropy_backward(X, logits=X), "x", "position"),
    (lambda: cuattn.attention(X, X, X, causal=True), "is_causal", "causal"),
    (lambda: cuattn.attention(X, X, X, softmax_scale=1.0), "scale", "softmax_scale"),
    (lambda: cuattn.attention(X, X, X, attn_mask=None), "mask", "bias"),
    (lambda: cuattn.attention(X, X, X, window_size=(1, -1)), "window", "None"),
    (lambda: cuattn.attention(X, X, X, dropout_p=0.1), "dropout_p", "left out"),
    (lambda: cuattn.attention(X, X, X, enable_gqa=True), "enable_gqa", "shared"),
    (lambda: cuattn.attention(X, X, X, return_softmax_lse=True), "return_lse", "softmax_lse"),
    (lambda: cuattn.attention(X, X, X, deterministic=True), "deterministic", "same bits"),
    (lambda: cuattn.attention(query=X, key=X, value=X), "q", "position"),
    (lambda: cuattn.attention(X, X, X, None), "q, k, v", "4 arguments"),
    (lambda: cuattn.attention(X, X), "v", "given"),
    (lambda: cuattn.attention_varlen(X, X, X, cu_seqlens_q=X), "cu_seqlens_q", "position"),
    (lambda: cuattn.attention_kvcache(X, X, X, bias=X), "bias", "attention has it"),
    (lambda: cuattn.attention_cascade(X, X, X, X, bias=X), "bias", "attention has it"),
    (lambda: cuattn.attention_cascade(X, X, X, X, score="s"), "score", "attention has it"),
    (lambda: cuattn.attention(X, X, X, score_mod=max), "score", "an expression"),
    (lambda: cuattn.attention_topk(X, X, 1, sinks=X), "sinks", "attention has it"),
    (lambda: cuattn.attention_kvcache(X, X, X, cache_seqlens=X), "kv_lens", "cache_seqlens"),
    (lambda: cuattn.attention_kvcache(X, X, X, block_table=X), "page_table", "block_table"),
    (lambda: cuattn.attention_kvcache(X, X, X, rotary_cos=X), "rotary_cos", "rotate q"),
    (lambda: cuattn.kv_append(X, X, X, X), "kv_lens", "kv_append(k_cache, v_cache"),
    (lambda: cuattn.softmax(X, sclae=2), "sclae", "is it scale?"),
    (lambda: cuattn.softmax(X, no_such_option=2), "no_such_option", "return_lse"),
    (lambda: cuattn.softmax(X, 1, axis=1), "axis", "once"),
    (lambda: cuattn.softmax(X, 1, 2.0), "x, axis", "3 arguments"),
    (lambda: cuattn.softmax(), "x", "given"),
    (lambda: cuattn.merge(X, X, axis=0), "axis", "none of them"),
]


@pytest.mark.parametrize("i", range(len(OTHERS)))
def test_names_of_others(i):
    call, ours, words = OTHERS[i]
    with pytest.raises(TypeError, match=rf"^{ours} must .+, but .+") as caught:
        call()
    assert words in str(caught.value) and caught.value.__context__ is None


def test_only_names_of_ours_are_recommended():
    known = {n for name in PUBLIC for n in inspect.signature(getattr(cuattn, name)).parameters}
    renamed = (*keywords.RENAMED.values(), *keywords.OTHERWISE.values())
    assert {ours for ours, _ in renamed} <= known
    assert not known & set(keywords.ABSENT)


def test_errors_inside_are_left_as_they_are():
    """Also one that reads as if arguments did not fit."""

    @keywords.explained
    def outer(x):
        return inner(x, y=1)

    def inner(x):
        return x

    with pytest.raises(TypeError, match=r"inner\(\) got an unexpected keyword argument 'y'"):
        outer(1)


@pytest.mark.parametrize("name", PUBLIC)
def test_functions_look_as_they_are_written(name):
    """To inspect, help and pickle."""
    function = getattr(cuattn, name)
    module = importlib.import_module(function.__module__)
    assert getattr(module, name) is function and function.__doc__ == function.__wrapped__.__doc__
    kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("topk", "top_k"),
        ("multinomial", "sample"),
        ("categorical", "sample"),
        ("nll_loss", "cross_entropy"),
        ("softmax_cross_entropy", "cross_entropy"),
        ("scaled_dot_product_attention", "attention"),
        ("flash_attn_func", "attention"),
        ("flash_attn_varlen_func", "attention_varlen"),
        ("flash_attn_with_kvcache", "attention_kvcache"),
        ("append_paged_kv_cache", "kv_append"),
        ("segment_sum", None),
    ],
)
def test_functions_of_others(theirs, ours):
    words = rf"it is cuattn\.{ours}" if ours else "has no attribute"
    with pytest.raises(AttributeError, match=words):
        getattr(cuattn, theirs)
    assert not hasattr(cuattn, theirs)
