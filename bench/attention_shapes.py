"""Shapes of attention, for the tables of bench/grids.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

TRANSFORMERS = {  # layers, batch, heads of 64, sequence length, causal
    "BERT-large": (24, 16, 16, 512, 0),
    "GPT-2 medium": (24, 8, 16, 1024, 1),
    "GPT-2 XL": (48, 4, 25, 1024, 1),
}


def attention_shape(batch, heads, kv_heads, seqlen, head_dim, causal) -> dict[str, int]:
    return {
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "seqlen_q": seqlen,
        "seqlen_k": seqlen,
        "head_dim": head_dim,
        "causal": causal,
    }


def flash_attention_shapes() -> Iterator[dict[str, int]]:
    for head_dim in (64, 128, 256):
        heads = 2048 // head_dim
        for causal in (0, 1):
            for exponent in range(9, 15):
                batch = 16_384 >> exponent
                yield attention_shape(batch, heads, heads, 1 << exponent, head_dim, causal)


def llama_shapes() -> Iterator[dict[str, int]]:
    for causal in (0, 1):
        for exponent in range(11, 16):
            yield attention_shape(1, 64, 8, 1 << exponent, 128, causal)


def pattern_attention_shapes(causal, *names) -> Callable[[], Iterable[dict[str, int]]]:
    """16 K tokens and hidden size 2048, as in FlashAttention's table."""
    shapes = [
        attention_shape(16_384 // seqlen, 2048 // dim, 2048 // dim, seqlen, dim, causal)
        for dim in (64, 128)
        for seqlen in (2048, 8192)
    ]
    return lambda: ({**shape, name: 1} for name in names for shape in shapes)


def small_attention_shapes() -> Iterator[dict[str, int]]:
    for batch, heads, seqlen, head_dim in ((1, 12, 128, 64), (1, 16, 512, 64), (8, 12, 77, 64)):
        yield attention_shape(batch, heads, heads, seqlen, head_dim, 0)


def transformer_shapes() -> Iterator[dict[str, int]]:
    for layers, batch, heads, seqlen, causal in TRANSFORMERS.values():
        yield {"layers": layers, **attention_shape(batch, heads, heads, seqlen, 64, causal)}


def one_layer_shapes() -> Iterator[dict[str, int]]:
    for shape in transformer_shapes():
        yield {name: size for name, size in shape.items() if name != "layers"}


def neighbour_shapes() -> Iterator[dict[str, int]]:
    for queries in (1, 64, 4096):
        for k in (10, 100):
            yield {"seqlen_q": queries, "seqlen_k": 1 << 20, "head_dim": 128, "k": k}


def cache_shape(batch, heads, kv_heads, seqlen_k, page_size, seqlen_q=1, **more) -> dict[str, int]:
    """Pages of `seqlen_k` keys: a dense cache."""
    lengths = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "page_size": page_size}
    heads = {"batch": batch, "heads": heads, "kv_heads": kv_heads}
    return {**heads, **lengths, "head_dim": 128, **more}


def decode_shapes() -> Iterator[dict[str, int]]:
    """Half a GB, that many bytes in other arrangements, and few."""
    for page_size in (16, 64, 1, 4096):
        yield cache_shape(32, 32, 8, 4096, page_size)
    for page_size in (16, 4096):
        yield cache_shape(1, 32, 8, 4096, page_size)
    yield cache_shape(1, 32, 4, 1024, 16)
    yield cache_shape(32, 32, 8, 4096, 16, e4m3=1)
    yield cache_shape(64, 32, 8, 8192, 16, spread=1)
    yield cache_shape(32, 32, 8, 100_000, 16, one_long=1)
    yield cache_shape(16, 32, 32, 4096, 8)
    yield cache_shape(32, 32, 8, 4096, 16, seqlen_q=4)


def latent_shapes() -> Iterator[dict[str, int]]:
    for heads in (16, 128):
        shape = cache_shape(128, heads, 1, 4096, 64, value_dim=512)
        yield {**shape, "head_dim": 576}
