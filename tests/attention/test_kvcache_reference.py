"""reference.attention_kvcache and kv_append: those of `reference.attention` on the keys themselves,
exactly, and what is written by the letter of the docstring."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from attention_cases import NAN

from cuattn import reference

B, H, HKV, S, D, DV = 3, 4, 2, 3, 8, 6
LENS = np.array([7, 0, 13])


@pytest.fixture
def dense(rng):
    """q, and caches of 15 keys each, with NaN behind `LENS`."""
    q = rng.standard_normal((B, H, S, D))
    k, v = rng.standard_normal((B, HKV, 15, D)), rng.standard_normal((B, HKV, 15, DV))
    for b, n in enumerate(LENS):
        k[b, :, n:] = v[b, :, n:] = NAN
    return q, k, v


def paged(rng, *caches, size=3, lens=LENS):
    """The same keys in pages all over a pool, NaN elsewhere, and their table."""
    count = caches[0].shape[2] // size
    pages = rng.permutation(B * count + 2)[: B * count]
    pools = []
    for a in caches:
        pool = np.full((B * count + 2, HKV, size, a.shape[3]), NAN)
        pool[pages] = a.reshape(B, HKV, count, size, -1).swapaxes(1, 2).reshape(-1, *pool.shape[1:])
        pools.append(pool)
    table = pages.reshape(B, count).astype(np.int32)
    for b, n in enumerate(lens):
        table[b, -(-n // size) :] = 2147480000
    return *pools, table


def same(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"window": (4, 0), "q_offset": np.array([3, 0, 20]), "scale": 0.3},
        {"softcap": 2.0, "q_lens": np.array([3, 1, 0]), "is_causal": True},
        {"alibi_slopes": np.arange(12).reshape(3, 4) / 9, "sinks": np.arange(4.0)},
    ],
    ids=str,
)
def test_paged_is_dense_is_attention(dense, rng, options):
    want = reference.attention(*dense, kv_lens=LENS, return_lse=True, **options)
    q, k, v = dense
    how = {"kv_lens": LENS, "return_lse": True, **options}
    same(reference.attention_kvcache(q, k, v, **how), want)
    pool_k, pool_v, table = paged(rng, k, v)
    same(reference.attention_kvcache(q, pool_k, pool_v, page_table=table, **how), want)
    swapped = (a.swapaxes(1, 2) for a in (q, pool_k, pool_v))
    out, lse = reference.attention_kvcache(*swapped, page_table=table, layout="BSHD", **how)
    same((out.swapaxes(1, 2), lse), want)


def test_three_dimensions(dense):
    q, k, v = (a[0] for a in dense)
    want = reference.attention(q, k, v, kv_lens=LENS[:1], is_causal=True)
    same([reference.attention_kvcache(q, k, v, kv_lens=7, is_causal=True)], [want])


def test_pages_that_are_not_there(dense, rng):
    """As keys that a mask hides, the places of the others as they were."""
    q, k, v = dense
    pool_k, pool_v, table = paged(rng, k, v)
    table[0, 0], table[2, 1], table[2, 3] = -1, len(pool_k), -(2**31)
    mask = np.ones((B, 1, 1, 15), bool)
    mask[0, ..., :3] = mask[2, ..., 3:6] = mask[2, ..., 9:12] = False
    how = {"kv_lens": LENS, "return_lse": True, "window": (6, 0)}
    want = reference.attention(q, k, v, mask=mask, **how)
    same(reference.attention_kvcache(q, pool_k, pool_v, page_table=table, **how), want)


@pytest.mark.parametrize("width", [1, 4, 40])
def test_masks_are_of_the_last_keys(dense, rng, width):
    q, k, v = dense
    tree = rng.random((1, H, S, width)) < 0.5
    mask = np.ones((B, H, S, 15), bool)
    for b, n in enumerate(LENS):
        for j in range(max(0, n - width), n):
            mask[b, ..., j] = tree[0, ..., width - n + j]
    want = reference.attention(q, k, v, mask=mask, kv_lens=LENS, return_lse=True)
    same(reference.attention_kvcache(q, k, v, mask=tree, kv_lens=LENS, return_lse=True), want)


def test_tree_of_one_branch_is_causal(dense):
    how = {"kv_lens": np.array([7, 3, 13]), "return_lse": True}
    q, k, v = (np.nan_to_num(a) for a in dense)
    tree = reference.attention_kvcache(q, k, v, mask=np.tri(S, dtype=bool), **how)
    same(tree, reference.attention_kvcache(q, k, v, is_causal=True, **how))


def test_new_keys(dense, rng):
    """Written behind the others, as many as there are queries, and seen."""
    q, k, v = dense
    new = rng.standard_normal((B, HKV, 2, D)), rng.standard_normal((B, HKV, 2, DV))
    for q_lens, counts in ((None, [2, 2, 2]), (np.array([3, 1, 0]), [2, 1, 0])):
        full = k.copy(), v.copy()
        for a, x in zip(full, new, strict=True):
            for b, n in enumerate(LENS):
                a[b, :, n : n + counts[b]] = x[b, :, : counts[b]]
        how = {"q_lens": q_lens, "is_causal": True, "return_lse": True}
        want = reference.attention(q, *full, kv_lens=LENS + counts, **how)
        caches = k.copy(), v.copy()
        got = reference.attention_kvcache(
            q, *caches, kv_lens=LENS, k_new=new[0], v_new=new[1], **how
        )
        same(got, want)
        same(caches, full)


def test_new_keys_in_pages(dense, rng):
    """As in a dense cache; one without a page, and those beyond the last one, are dropped."""
    _, k, v = dense
    new, lens = rng.standard_normal((B, HKV, 4, D)), np.array([7, 1, 13])
    pool, table = paged(rng, k, lens=lens + 4)
    table[0, 3] = -1
    before, full = pool.copy(), np.concatenate([k, np.full((B, HKV, 2, D), NAN)], axis=2)
    for b, n in enumerate(lens):
        full[b, :, n : n + 4] = new[b]
    reference.kv_append(pool, None, new, None, kv_lens=lens, page_table=table)
    for b, j in np.ndindex(table.shape[0], 15):
        if 0 <= (page := table[b, j // 3]) < len(pool):
            np.testing.assert_array_equal(pool[page, :, j % 3], full[b, :, j])
            before[page, :, j % 3] = full[b, :, j]
    same([pool], [before])
    cache = k.copy()
    reference.kv_append(cache, None, new, None, kv_lens=lens)
    same([cache], [full[:, :, :15]])


def test_values_of_keys(dense):
    q, k, _ = dense
    want = reference.attention(q, k, k[..., :5], kv_lens=LENS)
    same([reference.attention_kvcache(q, k, None, value_dim=5, kv_lens=LENS)], [want])


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.int8])
def test_eight_bits(rng, dtype):
    """Codes times scales are the keys; numbers over scales, the nearest codes."""
    q = rng.standard_normal((B, H, S, D))
    codes = [rng.integers(-100, 100, (B, HKV, 15, n)).astype(dtype) for n in (D, DV)]
    for scales in ((0.5, 0.25), (np.full(HKV, 0.5, "f4"), np.array([0.25, 4], "f4")),
                   (rng.random((2, B, HKV, 15)).astype("f4"))):  # fmt: skip
        wide = []
        for a, scale in zip(codes, scales, strict=True):
            scale = np.asarray(scale, np.float64)
            shaped = scale[:, None, None] if scale.ndim == 1 else scale[..., None]
            wide.append(a.astype(np.float64) * shaped)
        want = reference.attention(q, *wide, kv_lens=LENS, return_lse=True)
        how = {"kv_lens": LENS, "return_lse": True, "k_scale": scales[0], "v_scale": scales[1]}
        same(reference.attention_kvcache(q, *codes, **how), want)
    cache, x = np.zeros((1, 1, 4, 4), dtype), np.array([[[[1.0, -500, 0.25, 1e9]]]])
    reference.kv_append(cache, None, x, None, kv_lens=np.array([2]), k_scale=2.0)
    codes = [0, -128, 0, 127] if dtype is np.int8 else [0.5, -256, 0.125, 448]
    assert cache.astype(float).tolist() == [[[[0] * 4, [0] * 4, codes, [0] * 4]]]
    scale = np.full((1, 1, 4), NAN, np.float32)
    tokens = np.array([[[[0, -8.0, 4.0, 2.0], [0, 0, 0, 0]]]])
    reference.kv_append(cache, None, tokens, None, kv_lens=np.array([0]), k_scale=scale)
    most = 127 if dtype is np.int8 else 448
    assert scale[0, 0, :2].tolist() == [np.float32(8 / most), 0] and np.isnan(scale[0, 0, 2:]).all()
    assert cache[0, 0, :2].astype(float).tolist() == [
        [0, -most, 64 if dtype is np.int8 else 224, 32 if dtype is np.int8 else 112], [0] * 4
    ]  # fmt: skip
