"""A user's program: every public function, option and field of a result, as type checkers see them.

`mypy --strict` checks it in .ci/run, and tests/project/test_typing.py runs it, so that what the
types say is true. What must be an error to mypy is marked as one (it warns of marks without an
error), and has to raise.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args, get_origin

import numpy as np
from numpy.typing import NDArray

import cuattn
from cuattn import (
    AttentionGradients,
    BlockMask,
    LogitsState,
    MaskExpression,
    Sample,
    SampleState,
    SoftmaxState,
    SoftmaxTopK,
    SoftmaxTopKLse,
    SoftmaxTopKState,
    TopK,
)

Array = NDArray[Any]
Pair = tuple[Array, Array]

if TYPE_CHECKING:
    from typing_extensions import assert_type
else:

    def assert_type(value, kind):
        """`value`, which must be of this kind now."""
        origin, arguments = get_origin(kind) or kind, get_args(kind)
        if origin is np.ndarray:
            (scalar,) = get_args(arguments[1])
            assert isinstance(value, np.ndarray) and scalar in (Any, value.dtype.type), value
        elif origin is tuple:
            assert len(value) == len(arguments)
            for one, argument in zip(value, arguments, strict=True):
                assert_type(one, argument)
        else:
            assert kind is Any or type(value) is origin, value
        return value


def refused(call: Callable[[], object]) -> None:
    """What a type checker refuses raises, too."""
    try:
        call()
    except (TypeError, ValueError, AttributeError):
        return
    raise AssertionError("this must raise")


class Device(enum.IntEnum):
    CUDA = 2


class Tensor:
    """An array of another library that has types."""

    def __dlpack_device__(self) -> tuple[Device, int]:
        return Device.CUDA, 0


x = np.arange(12, dtype=np.float32).reshape(3, 4)
anything: Any = x  # what a type checker makes of a CuPy array


def softmaxes() -> None:
    part, lse = np.ones((3, 4), bool), np.empty(3, np.float32)
    assert_type(cuattn.softmax(x), Array)
    assert_type(cuattn.softmax(x, 0, return_lse=False), Array)
    assert_type(cuattn.softmax(x, (0, 1), scale=np.float64(2), where=True, dtype="f8"), Array)
    assert_type(cuattn.softmax(x, scale=np.ones((3, 1)), where=part, out=np.empty_like(x)), Array)
    assert_type(cuattn.softmax(x, return_lse=True), Pair)
    assert_type(cuattn.softmax(x, out=(np.empty_like(x), lse), return_lse=True), Pair)
    assert_type(cuattn.softmax(anything), Any)
    y = assert_type(cuattn.log_softmax(x, np.int64(1), scale=2, where=part, dtype=None), Array)
    assert_type(cuattn.log_softmax(x, None, out=np.empty_like(x)), Array)
    total = cuattn.logsumexp(x, axis=1, b=0.5, where=part, keepdims=True, dtype=np.float64)
    assert_type(total, Array)
    assert_type(cuattn.logsumexp(x, -1, b=x, out=lse), Array)
    dx = np.empty_like(x)
    assert_type(cuattn.softmax_backward(x, y, -1, scale=2.0, where=part, out=dx), Array)
    assert_type(cuattn.log_softmax_backward(x, y, -1, scale=2.0, where=part, out=dx), Array)
    ends = np.array([0, 1, 3])
    assert_type(cuattn.segment_softmax(x, ends, scale=2.0, out=np.empty_like(x)), Array)
    assert_type(cuattn.segment_softmax_backward(x, y, ends, scale=2.0, out=dx), Array)

    refused(lambda: cuattn.softmax([1.0, 2.0]))  # type: ignore[call-overload]
    refused(lambda: cuattn.softmax(x, scale="2"))  # type: ignore[call-overload]
    refused(lambda: cuattn.softmax(x, scael=2.0))  # type: ignore[call-overload]
    refused(lambda: cuattn.softmax(x, out=(x, lse)))  # type: ignore[call-overload]
    refused(lambda: cuattn.softmax(x, out=x, return_lse=True))  # type: ignore[call-overload]
    refused(lambda: cuattn.logsumexp(x, axis=0.5))  # type: ignore[call-overload]


def losses() -> None:
    labels, lse, dx = np.array([0, 3, -1], np.int32), np.empty(3, np.float32), np.empty_like(x)
    assert_type(cuattn.cross_entropy(x, labels, ignore_index=-1), Array)
    assert_type(cuattn.cross_entropy(x, labels, axis=-1, ignore_index=-1, out=lse), Array)
    assert_type(cuattn.cross_entropy(x, np.array(3), axis=None, scale=2), Array)
    assert_type(cuattn.cross_entropy(x, np.int64(3), axis=None, return_lse=False), Array)
    pair = cuattn.cross_entropy(x, labels, scale=0.5, ignore_index=np.int8(-1), return_lse=True)
    loss, lse = assert_type(pair, Pair)
    out = (np.empty(3, np.float32), np.empty(3, np.float32))
    kept = cuattn.cross_entropy(x, labels, ignore_index=-1, return_lse=True, out=out)
    assert_type(kept, Pair)
    one = cuattn.cross_entropy_backward(1 / 3, x, labels, lse, scale=0.5, ignore_index=-1)
    assert_type(one, Array)
    one = cuattn.cross_entropy_backward(loss, x, labels, lse, axis=1, ignore_index=-1, out=dx)
    one = cuattn.cross_entropy_backward(1.0, x, labels, lse, index_offset=0)
    assert_type(one, Array)
    assert_type(cuattn.entropy(x, (0, 1), scale=np.float32(2), where=x > 0), Array)
    assert_type(cuattn.entropy(x, keepdims=True, out=np.empty((3, 1), np.float32)), Array)
    assert_type(cuattn.entropy(anything), Any)

    refused(lambda: cuattn.cross_entropy(x))  # type: ignore[call-overload]
    refused(lambda: cuattn.cross_entropy(x, [0, 1, 2]))  # type: ignore[call-overload]
    refused(lambda: cuattn.cross_entropy(x, labels, axis=(0, 1)))  # type: ignore[call-overload]
    refused(lambda: cuattn.cross_entropy(x, labels, out=out))  # type: ignore[call-overload]
    refused(lambda: cuattn.cross_entropy_backward("1", x, labels, lse))  # type: ignore[call-overload]
    refused(lambda: cuattn.entropy(x, axis=0.5))  # type: ignore[call-overload]


def selections() -> None:
    best = assert_type(cuattn.top_k(x, 2, axis=0, mode="smallest", sorted=False), TopK)
    assert_type(best.values, Array)
    assert_type(best.indices, NDArray[np.int64])
    likely = cuattn.softmax_topk(x, np.int32(2), axis=1, scale=2, where=x > 0, renormalize=True)
    assert_type(likely, SoftmaxTopK)
    assert_type(likely.values, Array)
    assert_type(likely.indices, NDArray[np.int64])
    full = assert_type(cuattn.softmax_topk(x, 2, output="logit", return_lse=True), SoftmaxTopKLse)
    pair = (np.empty((3, 2), np.float32), np.empty((3, 2), np.int64))
    assert_type(cuattn.top_k(x, 2, out=pair), TopK)
    assert_type(cuattn.softmax_topk(x, 2, out=SoftmaxTopK(*pair)), SoftmaxTopK)
    three = (*pair, np.empty(3, np.float32))
    assert_type(cuattn.softmax_topk(x, 2, out=three, return_lse=True), SoftmaxTopKLse)
    values, indices, lse = full
    assert_type(values, Array)
    assert_type(full.values, Array)
    assert_type(indices, NDArray[np.int64])
    assert_type(full.indices, NDArray[np.int64])
    assert_type(lse, Array)
    assert_type(full.lse, Array)
    assert_type(cuattn.top_k(anything, 2), Any)

    refused(lambda: cuattn.top_k(x, 1.5))  # type: ignore[call-overload]
    refused(lambda: cuattn.top_k(x, 2, out=pair[0]))  # type: ignore[call-overload]
    refused(lambda: cuattn.softmax_topk(x, 2, out=three))  # type: ignore[arg-type]
    refused(lambda: cuattn.top_k(x, 1, mode="least"))  # type: ignore[call-overload]
    refused(lambda: cuattn.softmax_topk(x, 1, output="probs"))  # type: ignore[call-overload]
    refused(lambda: cuattn.softmax_topk(x, 1).lse)  # type: ignore[attr-defined]


def states() -> None:
    a, b = cuattn.softmax_state(x[:, :2], 1, scale=0.5), cuattn.softmax_state(x[:, 2:], scale=0.5)
    state = assert_type(cuattn.merge(a, b), SoftmaxState)
    assert_type(state.m, Array)
    assert_type(state.l, Array)
    assert_type(state.lse, Array)
    assert_type(cuattn.softmax_state(x, None).lse, Array)
    pair = (np.empty(3, np.float32), np.empty(3, np.float32))
    assert_type(cuattn.softmax_state(x, out=pair), SoftmaxState)
    assert_type(cuattn.softmax_state(x, out=SoftmaxState(*pair)), SoftmaxState)
    parts = [cuattn.softmax_topk_state(x, 2, axis=1, scale=2, index_offset=n) for n in (0, 4)]
    best = assert_type(cuattn.merge(parts[0], parts[1]), SoftmaxTopKState)
    assert_type(cuattn.softmax_topk_state(x, 2, out=parts[0]), SoftmaxTopKState)
    assert_type(cuattn.softmax(x, state=state), Array)
    assert_type(cuattn.softmax(x, -1, state=state, return_lse=True), Pair)
    assert_type(cuattn.softmax(best.values, state=best), Array)
    assert_type(cuattn.log_softmax(x, state=best), Array)
    assert_type(cuattn.log_softmax(x, state=None), Array)
    assert_type(cuattn.softmax(anything, state=state), Any)
    refused(lambda: cuattn.softmax(x, state=pair))  # type: ignore[call-overload]
    refused(lambda: cuattn.log_softmax(x, state=x))  # type: ignore[call-overload]
    assert_type(best.m, Array)
    assert_type(best.l, Array)
    assert_type(best.lse, Array)
    assert_type(best.values, Array)
    assert_type(best.indices, NDArray[np.int64])
    assert_type(cuattn.merge(SoftmaxState(state.m, state.l), a), SoftmaxState)
    labels = np.array([0, 3, 9])
    shards = [cuattn.logits_state(x, labels, axis=1, scale=2, index_offset=n) for n in (0, 4)]
    whole = assert_type(cuattn.merge(shards[0], shards[1]), LogitsState)
    assert_type(whole.t, Array)
    assert_type(whole.logit, Array)
    for number in (whole.lse, whole.entropy, whole.log_prob, whole.cross_entropy):
        assert_type(number, Array)
    assert_type(cuattn.softmax(x, state=whole), Array)
    assert_type(cuattn.merge(shards[0], shards[1], out=whole), LogitsState)
    four = tuple(np.empty_like(m) for m in (whole.m, whole.l, whole.t, whole.logit))
    assert_type(cuattn.logits_state(x, labels, out=LogitsState(*four)), LogitsState)

    assert_type(cuattn.merge(a, b, out=a), SoftmaxState)
    assert_type(cuattn.merge(parts[0], parts[1], out=tuple(best)), SoftmaxTopKState)

    refused(lambda: cuattn.merge(a, best))  # type: ignore[type-var]
    refused(lambda: cuattn.merge(a, whole))  # type: ignore[type-var]
    refused(lambda: cuattn.logits_state(x, labels, out=pair))  # type: ignore[arg-type]
    refused(lambda: cuattn.merge(a, b, out=a.m))  # type: ignore[arg-type]
    refused(lambda: cuattn.softmax_state([x]))  # type: ignore[call-overload]
    refused(lambda: cuattn.softmax_state(x, out=pair[0]))  # type: ignore[call-overload]
    refused(lambda: cuattn.softmax_topk_state(x, 2, out=pair))  # type: ignore[arg-type]


def samples() -> None:
    seeds = np.arange(3)[:, None]
    indices = cuattn.sample(x, 2, seed=1, offset=np.int64(3), axis=0, scale=2, where=x > 0)
    assert_type(indices, NDArray[np.int64])
    kept = cuattn.sample(x, seed=seeds, offset=seeds, top_k=3, top_p=0.9, min_p=np.float32(0.1))
    assert_type(kept, NDArray[np.int64])
    assert_type(cuattn.sample(x, seed=1, return_log_prob=False, out=kept), NDArray[np.int64])
    both = assert_type(cuattn.sample(x, 2, seed=1, return_log_prob=True), Sample)
    assert_type(cuattn.sample(x, 2, seed=1, return_log_prob=True, out=both), Sample)
    assert_type(both.indices, NDArray[np.int64])
    assert_type(both.log_prob, Array)
    parts = [
        cuattn.sample_state(x, seed=1, axis=1, scale=0.5, offset=3, rows=seeds, index_offset=4 * i)
        for i in range(2)
    ]
    state = assert_type(cuattn.merge(parts[0], parts[1]), SampleState)
    assert_type(cuattn.sample_state(x, seed=1, out=parts[0]), SampleState)
    assert_type(state.lse, Array)
    assert_type(state.log_prob, Array)
    assert_type(state.logits, Array)
    assert_type(state.values, NDArray[np.float64])
    assert_type(cuattn.sample(anything, seed=1), Any)

    refused(lambda: cuattn.sample(x))  # type: ignore[call-overload]
    refused(lambda: cuattn.sample(x, seed=1.5))  # type: ignore[call-overload]
    refused(lambda: cuattn.sample(x, seed=1, return_log_prob=True, out=kept))  # type: ignore[call-overload]
    refused(lambda: cuattn.sample_state(x, seed=1, top_k=3))  # type: ignore[call-overload]
    refused(lambda: cuattn.merge(state, cuattn.softmax_state(x)))  # type: ignore[type-var]


def attentions() -> None:
    rng = np.random.default_rng(0)
    q = k = v = rng.standard_normal((2, 3, 5, 8))
    lse = np.empty((2, 3, 5))
    assert_type(cuattn.attention(q, k, v, layout="BHSD", precision="ieee", dtype="f8"), Array)
    out = cuattn.attention(
        q, k, v, is_causal=True, q_offset=np.array([0, 1]), window=(3, None), scale=0.3, softcap=9,
        mask=rng.random((5, 5)) < 0.9, bias=q[0, 0, :, :5], alibi_slopes=np.ones(3), sinks=None,
        q_lens=np.array([5, 4]), kv_lens=np.array([3, 5]), out=np.empty_like(q),
    )  # fmt: skip
    assert_type(out, Array)
    both = cuattn.attention(q, k, v, sinks=np.ones(3), out=(out, lse), return_lse=True)
    both = cuattn.attention(q, k, v, score="s", score_args={}, out=(out, lse), return_lse=True)
    assert_type(both, Pair)
    assert_type(cuattn.attention(anything, anything, anything, return_lse=True), Any)
    tiles = cuattn.block_mask(rng.random((1, 5)) < 0.9, 5, None, block=(128, 256))
    assert_type(tiles, BlockMask)
    assert_type(tiles.counts, NDArray[np.int32])
    assert_type(tiles.indices, NDArray[np.int32])
    assert_type(tiles.full, NDArray[np.bool_])
    assert isinstance(tiles.mask, np.ndarray)
    assert_type(tiles.mask, NDArray[np.bool_])
    assert_type(tiles.block, tuple[int, int])
    assert_type(cuattn.attention(q, k, v, block_mask=tiles), Array)
    of = {"t": np.ones(3)}
    tiles = cuattn.block_mask("t[b] < h", 1, 5, args=of, batch=2, heads=np.int8(5), like=q)
    assert_type(tiles, BlockMask)
    assert isinstance(tiles.mask, MaskExpression)
    assert_type(tiles.mask.text, str)
    assert_type(tiles.mask.args["t"], Array)
    assert_type(tiles.mask.shape[0], int)
    flat: Array = q[0]
    ends = np.array([0, 1, 3])
    out = cuattn.attention_varlen(
        flat, flat, flat, ends, ends, max_seqlen_q=3, max_seqlen_k=3, is_causal=True, q_offset=0,
        window=(1, 1), scale=np.float32(0.3), softcap=None, mask=np.ones((2, 2), bool),
        bias=np.zeros((2, 2)), alibi_slopes=np.ones(5), sinks=np.ones(5), q_lens=np.array([1, 1]),
        kv_lens=np.array([1, 2]), precision=None, dtype=None, out=np.empty_like(flat),
    )  # fmt: skip
    assert_type(out, Array)
    lse = np.empty((5, 3))
    of = {"t": np.ones(3)}
    assert_type(
        cuattn.attention_varlen(flat, flat, flat, ends, ends, score="t[k]", score_args=of), Array
    )
    both = cuattn.attention_varlen(flat, flat, flat, ends, ends, out=(out, lse), return_lse=True)
    assert_type(both, Pair)
    out, lse = cuattn.attention(flat, flat, flat, layout="BSHD", return_lse=True)
    made = np.empty_like(out), np.empty_like(lse)
    assert_type(cuattn.merge_attention(out, lse, out, lse, layout="BSHD", out=made), Pair)
    outs, lses = np.stack([out, out]), np.stack([lse, lse])
    states = cuattn.merge_attention_states(outs, lses, axis=0, layout="BSHD", out=made)
    assert_type(states, Pair)

    refused(lambda: cuattn.attention(q, k, v, layout="HSD"))  # type: ignore[call-overload]
    refused(lambda: cuattn.attention(q, k, v, precision="fp16"))  # type: ignore[call-overload]
    refused(lambda: cuattn.attention(q, k, v, out=made))  # type: ignore[call-overload]
    refused(lambda: cuattn.attention(q, k, v, window=3))  # type: ignore[call-overload]
    refused(lambda: cuattn.attention(q, k, v, score=3))  # type: ignore[call-overload]
    refused(lambda: cuattn.attention(q, k, v, block_mask=q > 0))  # type: ignore[call-overload]
    refused(lambda: cuattn.block_mask(q > 0, block=128))  # type: ignore[call-overload]
    refused(lambda: cuattn.block_mask(q > 0, args={}))  # type: ignore[call-overload]
    refused(lambda: cuattn.block_mask("k < q"))  # type: ignore[call-overload]
    refused(lambda: cuattn.merge_attention(out, lse, out, lse, out=out))  # type: ignore[call-overload]


def gradients() -> None:
    rng = np.random.default_rng(0)
    q, grad = rng.standard_normal((2, 3, 5, 8)), np.ones((2, 3, 5, 8))
    bias, ones = np.zeros((5, 5)), np.ones(3)
    y, lse = cuattn.attention(q, q, q, return_lse=True)
    found = cuattn.attention_backward(
        grad, q, q, q, y, lse, grad_lse=lse, is_causal=True, q_offset=0, window=(3, None),
        scale=0.3, softcap=9, mask=bias == 0, bias=bias, alibi_slopes=ones, sinks=ones,
        q_lens=np.array([5, 4]), kv_lens=np.array([3, 5]), layout="BHSD", precision="ieee",
        return_dbias=True, out=None, score="s * t[h]", score_args={"t": ones}, return_dscore=True,
    )  # fmt: skip
    assert_type(found, AttentionGradients)
    assert_type(found.dq, Array)
    assert_type(found.dk, Array)
    assert_type(found.dv, Array)
    for optional in (found.dbias, found.dalibi_slopes, found.dsinks):
        assert optional is not None
        assert_type(optional, Array)
    assert found.dscore is not None
    assert_type(found.dscore["t"], Array)
    outs = np.empty_like(q), np.empty_like(q), np.empty_like(q)
    dq, dk, dv, *_ = cuattn.attention_backward(grad, q, q, q, y, lse, out=outs)
    flat: Array = q[0]
    ends = np.array([0, 1, 3])
    y, lse = cuattn.attention_varlen(flat, flat, flat, ends, ends, return_lse=True)
    found = cuattn.attention_backward_varlen(
        y, flat, flat, flat, y, lse, ends, ends, max_seqlen_q=2, max_seqlen_k=2, grad_lse=None,
        is_causal=True, q_offset=np.array([0, 0]), window=(1, 1), scale=np.float32(0.3),
        softcap=None, mask=np.ones((2, 2), bool), bias=None, alibi_slopes=np.ones(5),
        sinks=np.ones(5), q_lens=ends[:2], kv_lens=ends[:2], precision=None, return_dbias=False,
        out=(np.empty_like(flat), np.empty_like(flat), np.empty_like(flat)), score="s + t[b]",
        score_args={"t": ones}, return_dscore=["t"],
    )  # fmt: skip
    assert_type(found, AttentionGradients)
    loose: Any = flat
    sums: Any = lse
    more = cuattn.attention_backward(loose, loose, loose, loose, loose, sums, layout="BSHD")
    assert_type(more, Any)

    refused(lambda: cuattn.attention_backward(grad, q, q, q, y, out=q))  # type: ignore[call-overload]

    sums_of_keys = cuattn.attention_column_sums(
        flat, flat, lse, is_causal=True, q_offset=0, window=(3, None), scale=0.3, softcap=9,
        mask=np.ones((3, 3), bool), bias=ones, alibi_slopes=np.ones(5), q_lens=ends[:1],
        kv_lens=ends[1:2], layout="BSHD", precision="ieee", out=None,
    )  # fmt: skip
    assert_type(sums_of_keys, Array)
    refused(lambda: cuattn.attention_column_sums(flat, flat, lse, sinks=ones))  # type: ignore[call-overload]


def caches() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 3, 2, 8))
    k, v, new = rng.standard_normal((3, 2, 3, 9, 8))
    lens, out, lse = np.array([3, 5]), np.empty_like(q), np.empty((2, 3, 2))
    found = cuattn.attention_kvcache(
        q, k, v, kv_lens=lens, page_table=None, k_new=new[:, :, :2], v_new=new[:, :, :2],
        value_dim=None, k_scale=None, v_scale=None, split_size="auto", is_causal=True,
        q_offset=np.array([0, 1]), window=(3, None), scale=0.3, softcap=9, sinks=np.ones(3),
        mask=rng.random((2, 2)) < 0.9, alibi_slopes=np.ones(3), q_lens=np.array([2, 1]), out=out,
    )  # fmt: skip
    assert_type(found, Array)
    assert_type(cuattn.attention_kvcache(q, k, None, value_dim=4, split_size=256), Array)
    of = {"t": np.ones(9)}
    assert_type(cuattn.attention_kvcache(q, k, v, score="s + t[k]", score_args=of), Array)
    both = cuattn.attention_kvcache(q, k, v, layout="BHSD", out=(out, lse), return_lse=True)
    assert_type(both, Pair)
    loose: Any = q
    assert_type(cuattn.attention_kvcache(loose, loose, loose, precision="ieee", dtype=float), Any)
    prefixes = [(k[0], v[0]), (k[1], v[1])]
    found = cuattn.attention_cascade(
        q, prefixes, k, v, kv_lens=lens, page_table=None, k_new=new[:, :, :2], v_new=new[:, :, :2],
        k_scale=None, v_scale=None, split_size=None, is_causal=True, q_offset=9, window=(3, None),
        scale=0.3, softcap=9, mask=None, alibi_slopes=np.ones(3), sinks=np.ones(3),
        q_lens=np.array([2, 1]), layout="BHSD", precision="ieee", out=out,
    )  # fmt: skip
    assert_type(found, Array)
    both = cuattn.attention_cascade(
        q, [(k[0], None)], k, None, value_dim=4, dtype=q.dtype, return_lse=True
    )
    assert_type(both, Pair)
    assert_type(cuattn.attention_cascade(loose, [(loose[0], loose[0])], loose, loose), Any)
    best = cuattn.attention_topk(
        q, k, 2, is_causal=True, q_offset=np.array([0, 1]), window=(3, None), scale=0.3, softcap=9,
        mask=None, bias=None, alibi_slopes=np.ones(3), q_lens=np.array([2, 1]), kv_lens=lens,
        layout="BHSD", precision="ieee", index_offset=7, output="logit", out=None,
    )  # fmt: skip
    assert_type(best, cuattn.SoftmaxTopK)
    assert_type(cuattn.attention_topk(q, k, 2), cuattn.SoftmaxTopK)
    state = cuattn.attention_topk(q, k, 2, output="state")
    assert_type(cuattn.merge(state, state), cuattn.SoftmaxTopKState)
    codes, scale = k.astype(np.int8), np.ones((2, 3, 9), np.float32)
    cuattn.kv_append(
        codes, codes.copy(), new[:, :, :2], new[:, :, :2], kv_lens=lens, new_lens=lens - 3,
        k_scale=scale, v_scale=0.5, page_table=None, layout="BHSD",
    )  # fmt: skip
    cuattn.kv_append(codes, None, new[:, :, :2], None, kv_lens=lens, k_scale=scale)

    refused(lambda: cuattn.attention_kvcache(q, k, v, split_size="none"))  # type: ignore[call-overload]
    refused(lambda: cuattn.attention_kvcache(q, k, v, bias=q))  # type: ignore[call-overload]
    refused(lambda: cuattn.attention_topk(q, k, 2, output="score"))  # type: ignore[call-overload]
    refused(lambda: cuattn.attention_cascade(q, [q], k, v))  # type: ignore[list-item]
    refused(lambda: cuattn.kv_append(k, v, new, new))  # type: ignore[call-arg]


def oracle() -> None:
    """The references are for any array-like."""
    best = cuattn.reference.softmax_topk([[1.0, 2.0]], 1, return_lse=True)
    assert_type(np.asarray(best.lse), Array)
    assert_type(np.asarray(cuattn.reference.softmax([1, 2])), Array)


def config() -> None:
    assert_type(cuattn.show_config("dicts"), dict[str, Any])
    cuattn.show_config(mode="stdout")
    with cuattn.compile(arch=90, num_sms=78) as kernels:  # of no calls
        assert_type(kernels, list[str])

    refused(lambda: cuattn.show_config("dict"))  # type: ignore[call-overload]
    refused(lambda: cuattn.compile(arch=None).__enter__())  # type: ignore[arg-type]


def others(x: Tensor) -> None:
    """Not run: there may be no GPU."""
    assert_type(cuattn.softmax(x, return_lse=True), Any)
    assert_type(cuattn.log_softmax(x), Any)
    assert_type(cuattn.logsumexp(x), Any)
    assert_type(cuattn.softmax_backward(x, x, out=x), Any)
    assert_type(cuattn.log_softmax_backward(x, x), Any)
    assert_type(cuattn.segment_softmax(x, x, scale=x), Any)
    assert_type(cuattn.segment_softmax_backward(x, x, x, scale=x), Any)
    assert_type(cuattn.cross_entropy(x, x, return_lse=True, out=(x, x)), Any)
    assert_type(cuattn.cross_entropy_backward(x, x, x, x, out=x), Any)
    assert_type(cuattn.cross_entropy_backward(0.5, x, x, x), Any)
    assert_type(cuattn.entropy(x, where=x), Any)
    assert_type(cuattn.logits_state(x, x, out=(x, x, x, x)), Any)
    assert_type(cuattn.top_k(x, 2, out=(x, x)), Any)
    assert_type(cuattn.softmax_topk(x, 2, where=x, out=(x, x, x), return_lse=True), Any)
    assert_type(cuattn.softmax_state(x, out=(x, x)), Any)
    assert_type(cuattn.softmax_topk_state(x, 2, out=(x, x, x, x)), Any)
    assert_type(cuattn.sample(x, seed=x, offset=x, return_log_prob=True, out=(x, x)), Any)
    assert_type(cuattn.sample_state(x, seed=x, rows=x, out=(x, x, x, x, x)), Any)
    assert_type(cuattn.attention(x, x, x, mask=x, q_offset=x, q_lens=x), Any)
    assert_type(cuattn.block_mask(x), Any)
    assert_type(cuattn.block_mask("k < t[q]", 3, 3, args={"t": x}), Any)
    assert_type(cuattn.block_mask("k < q", 3, 3, like=x), Any)
    assert_type(cuattn.attention_varlen(x, x, x, x, x, return_lse=True), Any)
    assert_type(cuattn.attention_backward(x, x, x, x, x, x, grad_lse=x, return_dbias=True), Any)
    assert_type(cuattn.attention_backward_varlen(x, x, x, x, x, x, x, x, out=(x, x, x)), Any)
    assert_type(cuattn.attention_column_sums(x, x, x, mask=x, q_lens=x, out=x), Any)
    assert_type(cuattn.attention_kvcache(x, x, x, kv_lens=x, page_table=x), Any)
    assert_type(cuattn.attention_cascade(x, [(x, x)], x, x, kv_lens=x), Any)
    assert_type(cuattn.attention_topk(x, x, 2, bias=x, output="state", out=(x, x, x, x)), Any)
    cuattn.kv_append(x, x, x, x, kv_lens=x, k_scale=x)
    assert_type(cuattn.merge_attention(x, x, x, x), tuple[Any, Any])
    assert_type(cuattn.merge_attention_states(x, x), tuple[Any, Any])


def main() -> None:
    softmaxes()
    losses()
    selections()
    states()
    samples()
    attentions()
    gradients()
    caches()
    oracle()
    config()


if __name__ == "__main__":
    main()
