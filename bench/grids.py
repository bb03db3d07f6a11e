"""Every shape that is benchmarked, of all operations, in one table.

A *cell* is one operation on one shape and dtype. `GRIDS` holds the tables by name, each with the
source of its shapes. A cell's priority says when it is measured if time is short: 1 first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bench import attention_shapes as shapes


@dataclass(frozen=True)
class Cell:
    """One operation on one shape and dtype; sizes in elements, those of `FLAGS` 0 or 1."""

    operation: str
    grid: str
    dtype: str
    sizes: tuple[tuple[str, int], ...]
    priority: int

    @property
    def shape(self) -> dict[str, int]:
        """Name to size."""
        return dict(self.sizes)

    @property
    def key(self) -> str:
        """The cell's name, unique among all cells, in whatever order its sizes were stored."""
        sizes = "-".join(f"{name}{size}" for name, size in sorted(self.sizes))
        return f"{self.operation}/{self.grid}/{sizes}/{self.dtype}"


class Grid(NamedTuple):
    """A table of shapes: who published it, the operations and dtypes it is for."""

    source: str
    operations: dict[str, int]  # name to priority
    dtypes: tuple[str, ...]
    shapes: Callable[[], Iterable[dict[str, int]]]


BOTH = ("bfloat16", "float32")
HALF = ("float16", "bfloat16")  # CuPy, the baseline, multiplies not every dtype
SINGLE = ("float32",)
FAST = ("float16", "float32")  # with a matrix product in CuPy
PATTERNS = ("ascending", "quantised", "tied", "border")  # of a row, bench/bench_top_k.py
FLAGS = ("causal", "transposed", "spread", "one_long", "e4m3", "flat", *PATTERNS)
FLAGS += ("t5", "documents", "cap", "prefix", "random")  # bench/patterns.py
VOCABULARIES = (32_000, 50_257, 128_256, 151_936, 201_088)


def quack_shapes() -> Iterator[dict[str, int]]:
    for exponent in range(8, 19):
        cols = 1 << exponent
        yield {"rows": min(32_768, (1 << 31) // cols), "cols": cols}


def paper_shapes() -> Iterator[dict[str, int]]:
    for rows in (4000, 10):
        for exponent in range(12):
            yield {"rows": rows, "cols": 63 << exponent}


def vocabulary_shapes() -> Iterator[dict[str, int]]:
    for cols in VOCABULARIES:
        for rows in (1, 8, 64, 512):
            yield {"rows": rows, "cols": cols}


def token_shapes() -> Iterator[dict[str, int]]:
    for cols in VOCABULARIES:
        for rows in (64, 4096):
            yield {"rows": rows, "cols": cols}


def filter_shapes() -> Iterator[dict[str, int]]:
    options = [{"top_k": 50}, {"top_p_percent": 90}, {"min_p_percent": 5}]
    options += [{"top_k": 50, "top_p_percent": 90}, {"top_p_percent": 90, "flat": 1}]
    for cols in (32_000, 128_256):
        for rows in (1, 64, 512):
            yield from ({"rows": rows, "cols": cols, **option} for option in options)


def small_shapes() -> Iterator[dict[str, int]]:
    for rows, cols in ((1, 10), (1, 1000), (32, 128), (128, 1000), (1024, 64), (1024, 1024)):
        yield {"rows": rows, "cols": cols}


def column_shapes() -> Iterator[dict[str, int]]:
    for rows, cols in ((1 << 20, 64), (65_536, 1000), (16_384, 16_384)):
        yield {"rows": rows, "cols": cols, "transposed": 1}


def ragged_shapes() -> Iterator[dict[str, int]]:
    for segments, cols in ((1 << 20, 30), (65_536, 500), (1024, 30_000)):
        yield {"segments": segments, "cols": cols}


def with_k(shapes: Callable[[], Iterable[dict[str, int]]], *ks: int):
    """The same shapes for each number of selected elements."""
    return lambda: ({**shape, "k": k} for k in ks for shape in shapes() if shape["cols"] >= k)


def router_shapes() -> Iterator[dict[str, int]]:
    for cols, k in ((8, 2), (64, 6), (128, 8), (256, 8)):
        yield {"rows": 65_536, "cols": cols, "k": k}


def pattern_shapes() -> Iterator[dict[str, int]]:
    for pattern in PATTERNS:
        yield {"rows": 64, "cols": 128_256, pattern: 1}


TRANSFORMS = {"softmax": 1, "logsumexp": 2, "softmax_backward": 2}
TRANSFORMS |= {"log_softmax": 3, "log_softmax_backward": 3}
FORWARD = {"softmax": 1, "logsumexp": 2, "log_softmax": 3}
LOSSES = {"cross_entropy": 1, "cross_entropy_backward": 2, "entropy": 3}
SMALL = {**TRANSFORMS, "cross_entropy": 3, "sample": 3}

GRIDS = {
    "quack": Grid("QuACK, benchmarks/benchmark_softmax.py", TRANSFORMS, BOTH, quack_shapes),
    "vocabulary": Grid(
        "vocabularies of Llama 2, GPT-2, Llama 3, Qwen 2.5 and gpt-oss; batch 1 to 512",
        FORWARD,
        BOTH,
        vocabulary_shapes,
    ),
    "quack-loss": Grid("QuACK, benchmarks/benchmark_cross_entropy.py", LOSSES, BOTH, quack_shapes),
    "vocabulary-loss": Grid("tokens of a step of training", LOSSES, BOTH, token_shapes),
    "sampling": Grid("a token for each request of a batch", {"sample": 1}, BOTH, vocabulary_shapes),
    "sampling-filters": Grid(
        "as FlashInfer, benchmarks/bench_sampling.py", {"sample": 2}, BOTH, filter_shapes
    ),
    "small": Grid("calls that Python and the launch rule", SMALL, SINGLE, small_shapes),
    "paper": Grid(
        "Milakov & Gimelshein, arXiv:1805.02867, section 5: batch 4000 and 10",
        {"softmax": 2},
        SINGLE,
        paper_shapes,
    ),
    "columns": Grid("the reduced axis is not the last", {"softmax": 3}, SINGLE, column_shapes),
    "ragged": Grid("rows of mean length `cols`", {"segment_softmax": 3}, SINGLE, ragged_shapes),
    "paper-topk": Grid(
        "Milakov & Gimelshein, arXiv:1805.02867, section 5: K = 5",
        {"softmax_topk": 1},
        SINGLE,
        with_k(paper_shapes, 5),
    ),
    "vocabulary-topk": Grid(
        "sampling and beam search over the same vocabularies",
        {"softmax_topk": 1, "top_k": 2},
        BOTH,
        with_k(vocabulary_shapes, 5, 50, 256),
    ),
    "router": Grid(
        "mixture-of-experts routers", {"softmax_topk": 2, "top_k": 3}, BOTH, router_shapes
    ),
    "topk-patterns": Grid(
        "FlashInfer, benchmarks/bench_topk.py: quantised rows and ties; and rows that rise",
        {"top_k": 3},
        BOTH,
        with_k(pattern_shapes, 5, 256),
    ),
    "flash-attention": Grid(
        "FlashAttention-2 and -3: 16 K tokens, hidden size 2048",
        {"attention": 1, "attention_backward": 1},
        HALF,
        shapes.flash_attention_shapes,
    ),
    "llama": Grid(
        "cuDNN's published table: Llama 3.1, 64 query and 8 key heads",
        {"attention": 1, "attention_backward": 2, "attention_column_sums": 3},
        HALF,
        shapes.llama_shapes,
    ),
    "small-attention": Grid(
        "calls that Python and the launch rule",
        {"attention": 2, "attention_backward": 3},
        HALF,
        shapes.small_attention_shapes,
    ),
    "score": Grid(
        "FlexAttention's examples: T5's table, documents, a soft cap and distances",
        {"attention_score": 2},
        HALF,
        shapes.pattern_attention_shapes(1, "t5", "documents", "cap"),
    ),
    "block-mask": Grid(
        "causal documents, a window beside a prefix (Longformer), random blocks (BigBird)",
        {"attention_block_mask": 2},
        HALF,
        shapes.pattern_attention_shapes(0, "documents", "prefix", "random"),
    ),
    "neighbours": Grid(
        "as many as SIFT1M has", {"attention_topk": 2}, FAST, shapes.neighbour_shapes
    ),
    "decode": Grid(
        "issues of TileOPs, FlashAttention and FlashInfer: batch 32 and 1, pages of 1 to 64",
        {"attention_kvcache": 1},
        HALF[1:],
        shapes.decode_shapes,
    ),
    "latent-decode": Grid(
        "FlashMLA, README: multi-head latent attention, batch 128",
        {"attention_kvcache": 2},
        HALF[1:],
        shapes.latent_shapes,
    ),
    "transformer": Grid(
        "FlashAttention, arXiv:2205.14135, section 4.1: BERT-large, GPT-2 medium; and GPT-2 XL",
        {"transformer": 1},
        HALF[:1],
        shapes.transformer_shapes,
    ),
    "transformer-attention": Grid(
        "the attention of one layer of these", {"attention": 1}, HALF[:1], shapes.one_layer_shapes
    ),
}


def cells(operations: Iterable[str]) -> list[Cell]:
    """All cells of these operations, the most important first."""
    wanted = set(operations)
    found = [
        Cell(operation, name, dtype, tuple(shape.items()), priority)
        for name, grid in GRIDS.items()
        for operation, priority in grid.operations.items()
        if operation in wanted
        for dtype in grid.dtypes
        for shape in grid.shapes()
    ]
    return sorted(found, key=lambda cell: cell.priority)  # stable: tables stay together
