"""Block masks of expressions: the same lists and results as of an array of all their elements."""

from __future__ import annotations

import os
import re
import tracemalloc

import array_api_strict
import emulator
import numpy as np
import pytest
from attention_cases import OPS, Problem, call, put, put_options
from conftest import SEED
from score_cases import Grammar, beside_garbage, some_arrays
from test_check import OtherDevice
from test_score_language import REFUSED

import cuattn
from cuattn import reference
from cuattn._attention import plan_mask


def masks(rng, batch, heads, queries, keys):
    """Texts, their arrays, and batch and heads where they have b and h."""
    documents = np.sort(rng.integers(0, 4, (batch, keys)), axis=1).astype(np.int32)
    reach = rng.integers(1, keys, heads)
    tree = rng.random((60, 50)) < 0.5
    of = {"batch": batch}, {"heads": heads}
    yield "(k <= q) & (doc[q] == doc[k])", {"doc": documents[0]}, {}
    yield "doc[b, q] == doc[b, k]", {"doc": beside_garbage(rng, documents)}, of[0]
    yield "(0 <= q - k < reach[h]) | (k < 20)", {"reach": reach.astype(np.int16)}, of[1]
    yield "(h % 2 == b) | (k // 7 % 3 == q % 3)", {}, of[0] | of[1]
    yield "tree[q - 90, k - 100]", {"tree": beside_garbage(rng, tree)}, {}
    weight = rng.standard_normal(keys).astype(np.float32)
    yield "w[q] < 0.1 * b < w[k] + inf * far", {"w": weight, "far": np.array(0.5)}, of[0]
    yield f"({keys - queries} <= q < {keys}) & (k < {keys})", {}, {}  # all that there are
    yield f"q < {keys - queries + 50}", {}, {}


def made(backend, text, args, lengths, **how):
    """A block mask on the backend, and its array by the reference."""
    like = None if args else backend.xp.zeros(1)
    got = cuattn.block_mask(text, *lengths, args=put_options(backend, args), like=like, **how)
    want = reference.block_mask(text, *lengths, args=args, **how)
    assert got.mask.shape == want.mask.shape and got.block == want.block
    for ours, theirs in zip(got[:3], want[:3], strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(backend.asnumpy(ours), theirs, text)
    return got, want.mask


def compare(backend, rng, problem, lists, mask):
    """Attention with it, against the formula, and bit for bit against that of the array."""
    options = dict(problem.options)
    del options["mask"]
    got = call(backend, problem.arrays, options, return_lse=True, block_mask=lists)
    problem.check(*got)
    of_array = cuattn.block_mask(put(backend, mask), block=lists.block)
    want = call(backend, problem.arrays, options, return_lse=True, block_mask=of_array)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("number", range(8))
def test_uses(backend, rng, number):
    """Documents, windows, trees; of sequences and heads; of lengths that no tile divides."""
    lengths = int(rng.integers(129, 180)), int(rng.integers(257, 300))
    text, args, of = [*masks(rng, 2, 2, *lengths)][number]
    lists, mask = made(backend, text, args, lengths, **of)
    problem = Problem(rng, "float32", 2, (2, 1), lengths, (32, 24), mask=mask)
    compare(backend, rng, problem, lists, mask)
    assert backend.ran()


@pytest.mark.parametrize("op", [op for op in OPS if op != "float32"])
def test_dtypes(backend, rng, op):
    """In tiles of one size; more queries than keys have places before the first of these."""
    text, args, of = [*masks(rng, 1, 2, 200, 150)][2]
    lists, mask = made(backend, text, args, (200, 150), **of)
    problem = Problem(rng, op, 1, (2, 1), (200, 150), (64, 64), mask=mask)
    compare(backend, rng, problem, lists, mask)


@pytest.mark.parametrize("block", [(256, 128), (128, 384)], ids=str)
def test_with_other_options(backend, rng, block):
    """Lengths and offsets of attention do not move its places; a score keeps its own."""
    lengths = 200, 400
    text, args, of = [*masks(rng, 2, 2, *lengths)][1]
    lists, mask = made(backend, text, args, lengths, block=block, **of)
    options = {
        "window": (150, 40),
        "q_offset": rng.integers(0, lengths[1], 2),
        "kv_lens": rng.integers(300, lengths[1] + 1, 2),
        "q_lens": rng.integers(100, lengths[0] + 1, 2),
        "score": "s - 0.01 * abs(q - k) + t[h]",
        "score_args": {"t": rng.standard_normal(2)},
        "sinks": rng.standard_normal(2).astype(np.float32),
    }
    problem = Problem(rng, "float16", 2, (2, 2), lengths, (64, 32), mask=mask, **options)
    compare(backend, rng, problem, lists, mask)


def test_random_expressions(backend, rng):
    """On NumPy many; with arrays of every dtype, floats of 64 bits, and indices of any value."""
    arrays = some_arrays(rng)
    grammar = Grammar(lambda *options: options[rng.integers(len(options))])
    for _ in range(25 if backend.name == "numpy" else 2):
        text = re.sub(r"\bs\b", "(0.7 * k - q)", grammar.bool(3))
        args = {n: array for n, array in arrays.items() if re.search(rf"\b{n}\b", text)}
        of = {name: 2 for name in ("batch", "heads") if re.search(rf"\b{name[0]}\b", text)}
        lengths = int(rng.integers(1, 200)), int(rng.integers(1, 200))
        lists, mask = made(backend, text, args, lengths, **of)
        problem = Problem(rng, "float32", 2, (2, 1), lengths, (16, 16), mask=mask)
        compare(backend, rng, problem, lists, mask)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (1, 1)], ids=str)
def test_next_to_nothing(backend, rng, lengths):
    """No queries, no keys, and one of each; nothing is seen, or all."""
    for text in ("True", "False", "(q == 0) & (k == 0)"):
        lists, mask = made(backend, text, {}, lengths)
        problem = Problem(rng, "float32", 1, (1, 1), lengths, (8, 8), mask=mask)
        compare(backend, rng, problem, lists, mask)


def test_more_tiles_than_blocks(backend, rng, monkeypatch):
    monkeypatch.setattr(plan_mask, "MAX_GRID", 3)
    made(backend, "q % h < k", {}, (int(rng.integers(129, 256)), 257), heads=3)


def test_arrays_of_other_libraries(backend):
    """Taken without a copy, those of the device's library by it."""
    doc = np.arange(150) // 60
    given = doc if backend.on_device else array_api_strict.asarray(doc)
    lists, _ = made(backend, "doc[q] == doc[k]", {"doc": given}, (150, 150))
    held = lists.mask.args["doc"]
    assert isinstance(held, backend.xp.ndarray)
    assert backend.on_device or np.shares_memory(held, doc)


def test_other_contents_of_its_arrays(backend, rng):
    """Calls of one signature have nothing in common but that."""
    q, k, v = (rng.standard_normal((n, 32)).astype(np.float32) for n in (150, 200, 200))
    for _ in range(3):
        args = {"doc": np.sort(rng.integers(0, 3, 200))}
        lists, mask = made(backend, "doc[q] == doc[k]", args, (150, 200))
        got = call(backend, (q, k, v), {}, block_mask=lists)
        want = reference.attention(q, k, v, mask=mask)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_its_arrays_are_not_copied(backend, rng):
    """Attention reads them in tiles that are neither empty nor full, and in no others."""
    doc = np.arange(384) // 128
    doc[200] = 7
    lists, mask = made(backend, "doc[q] == doc[k]", {"doc": doc}, (384, 384))
    assert backend.asnumpy(lists.full).sum() == 2
    held = lists.mask.args["doc"]
    x = rng.standard_normal((384, 32)).astype(np.float32)
    if backend.name != "numpy":  # where it is evaluated in every tile that is listed
        held[:128] = 99 + backend.xp.arange(128)
        held[256:] = 999 + backend.xp.arange(128)
    got = call(backend, (x, x, x), {}, block_mask=lists)
    np.testing.assert_allclose(got, reference.attention(x, x, x, mask=mask), rtol=1e-4, atol=1e-5)


# ---- what it costs ------------------------------------------------------------------------------


def test_numpy_never_has_all_elements():
    length = 8192
    args = {"doc": np.arange(length) // 1000}
    x = np.ones((length, 8), np.float32)
    tracemalloc.start()
    lists = cuattn.block_mask("(doc[q] == doc[k]) & (k <= q)", length, length, args=args)
    cuattn.attention(x[:2048], x, x, block_mask=lists._replace(
        counts=lists.counts[:16], indices=lists.indices[:16], full=lists.full[:16],
        mask=lists.mask._replace(shape=(2048, length))))  # fmt: skip
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < length * length / 4


def test_kernels_never_have_all_elements(rng, monkeypatch):
    """Nothing is allocated but the kinds of tiles, and results; partial tiles alone read arrays."""
    length, dim = 512, 128  # of one tile with both
    documents = np.arange(length) // 128
    arrays = [rng.standard_normal((1, 1, length, dim)).astype(np.float16) * 0.1 for _ in range(3)]
    full = documents[:, None] == documents
    with emulator.activate(arch="sm_90a", seed=int(os.environ[SEED])) as runtime:
        sizes, empty = [], runtime.empty
        monkeypatch.setattr(
            runtime,
            "empty",
            lambda shape, dtype: sizes.append(np.prod(shape)) or empty(shape, dtype),
        )
        lists = cuattn.block_mask("doc[q] == doc[k]", length, length, args={"doc": documents})
        assert sizes == [16] and lists.full.sum() == 4
        cuattn.attention(*arrays, block_mask=lists)
        assert sizes == [16, length * dim]
        cuattn.attention(*arrays, block_mask=cuattn.block_mask(full))
        of_expression, of_array = runtime.counters[1:]
        assert of_expression.global_bytes_read == of_array.global_bytes_read
        assert of_expression.mma == of_array.mma and of_expression.exps == of_array.exps


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_what_is_no_score_is_no_mask():
    """Some are masks, of fewer arrays."""
    args = {"flag": np.array(True), "one": np.ones(3), "two": np.ones((2, 3), np.int32)}
    for text in REFUSED:
        with pytest.raises(ValueError, match=r"^mask must [^\n]+, but [^\n]+") as caught:
            cuattn.block_mask(text, 3, 4, args=args, batch=1, heads=1)
        assert len(str(caught.value)) < 500 and "score" not in str(caught.value).split(", but ")[0]


@pytest.mark.parametrize(
    ("error", "words", "args", "how"),
    [
        (ValueError, "mask must be a bool, but 'q - k' is an integer at column 1", ("q - k", 3, 3),
         {}),
        (ValueError, "mask must have no other names than b, h, q, k, inf, but there is s at .* "
         "pass an array of that name in args", ("s > 0", 3, 3), {}),
        (ValueError, "mask must use every array, but t is not", ("k < q", 3, 3),
         {"args": {"t": np.ones(3)}}),
        (ValueError, "q_len must be given with an expression, but it is None", ("k < q",), {}),
        (ValueError, "k_len must be given with an expression, but", ("k < q", 3), {}),
        (ValueError, "batch must be given with an expression that has b", ("b < q", 3, 3), {}),
        (ValueError, "heads must be given with an expression that has h", ("b < h", 3, 3),
         {"batch": 3}),
        (ValueError, "q_len must be from 0", ("k < q", -1, 3), {}),
        (TypeError, "heads must be an integer", ("k < q", 3, 3), {"heads": 1.5}),
        (TypeError, "args must be a dict of arrays", ("k < q", 3, 3), {"args": [np.ones(3)]}),
        (ValueError, "args must have keys beside s, b", ("k < q", 3, 3), {"args": {"q": 3}}),
        (TypeError, r"args\['t'\] must be one of", ("k < t[q]", 3, 3),
         {"args": {"t": np.ones(3, np.uint64)}}),
        (TypeError, r"args\['t'\] must be a cupy.ndarray", ("k < t", 3, 3), {"args": {"t": 1}}),
        (TypeError, "like must be a cupy.ndarray", ("k < q", 3, 3), {"like": 1}),
        (ValueError, r"block\[0\] must be a multiple of 128", ("k < q", 3, 3), {"block": (1, 128)}),
        (ValueError, "args must be None beside a mask that is an array", (np.ones((2, 2), bool),),
         {"args": {}}),
        (ValueError, "like must be None beside a mask that", (np.ones((2, 2), bool),),
         {"like": np.ones(3)}),
    ],
)  # fmt: skip
def test_what_no_block_mask_is_made_of(error, words, args, how):
    with pytest.raises(error, match=f"^{words}"):
        cuattn.block_mask(*args, **how)


def test_what_attention_refuses(backend):
    x = put(backend, np.ones((2, 3, 200, 32), np.float32))
    args = put_options(backend, {"doc": np.ones(200, int)})
    good = cuattn.block_mask("doc[q] == doc[k]", 200, 200, args=args)
    like = backend.xp.zeros(1)
    other = {"doc": OtherDevice()}

    def of(text, *lengths, **how):
        return cuattn.block_mask(text, *lengths, like=like, **how)

    for error, words, bad in (
        (ValueError, "block_mask.mask must have 200 queries", of("k < q", 199, 200)),
        (ValueError, "block_mask.mask must broadcast", of("k < h", 200, 200, heads=2)),
        (ValueError, "block_mask.mask must be made with batch=2", of("k < b", 200, 200, batch=1)),
        (ValueError, "block_mask.mask must be made with heads=3", of("k < h", 200, 200, heads=1)),
        (ValueError, "block_mask.counts must have shape", good._replace(counts=good.counts[:1])),
        *(
            (error, f"block_mask.mask.{words}", good._replace(mask=good.mask._replace(**changed)))
            for error, words, changed in (
                (TypeError, "text must be a str", {"text": None}),
                (ValueError, "text must be a bool", {"text": "doc[q] + 1"}),
                (TypeError, "args must be a dict", {"args": [1]}),
                (TypeError, r"args\['doc'\] must be a ", {"args": {"doc": 1}}),
                (TypeError, r"args\['doc'\] must", {"args": other}),
                (TypeError, "shape must be a tuple", {"shape": 3}),
                (TypeError, r"shape\[0\] must be an integer", {"shape": ("a", 200)}),
            )
        ),
    ):
        with pytest.raises(error, match=f"^{words}"):
            cuattn.attention(x, x, x, block_mask=bad)
    with pytest.raises(TypeError, match="^mask must be a cupy.ndarray"):
        cuattn.attention(x, x, x, mask=good.mask)
    with pytest.raises(ValueError, match=r"^out must be block_mask.mask.args\['doc'\] itself or"):
        memory = backend.xp.zeros(4 * x.size, np.uint8)
        overlapping = memory[: 8 * 200].view(np.int64)
        mask = good.mask._replace(args={"doc": overlapping})
        out = memory.view(np.float32).reshape(x.shape)
        cuattn.attention(x, x, x, block_mask=good._replace(mask=mask), out=out)
