"""A picture of what the tokens of the sample attend to, in one head of a real transformer.

    python -m bench.attention_map --out FILE [--head H]

The map is `cuattn.softmax` over the scores of the sample (cuattn/data/README.md), on a GPU where
there is one, else on NumPy. Exit code 1 if `cuattn.attention` is not the map times v.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cuattn
from bench.report import figures
from bench.timing import environment

SAMPLE = Path(cuattn.__file__).parent / "data" / "minilm.npz"
TOLERANCE = 1e-5  # of float32 values that are sums of a hundred


def load(path: Path = SAMPLE) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in ("q", "k", "v", "tokens")}


def attention_map(q: Any, k: Any) -> Any:
    """Weights of all keys (columns) for each query (row), (heads, queries, keys)."""
    return cuattn.softmax(q @ k.swapaxes(-1, -2), scale=q.shape[-1] ** -0.5)


def error(q: Any, k: Any, v: Any) -> float:
    """How far attention is from the map times v, in all heads."""
    difference = cuattn.attention(q, k, v) - attention_map(q, k) @ v
    return float(abs(difference).max())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.attention_map", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="such as map.svg")
    parser.add_argument("--head", type=int, default=4)
    given = parser.parse_args(arguments)
    sample = load()
    if not 0 <= given.head < len(sample["q"]):
        parser.error(f"--head must be below {len(sample['q'])}")
    xp: Any = np
    if environment.gpu():
        import cupy as xp
    q, k, v = (xp.asarray(sample[name]) for name in ("q", "k", "v"))
    weights = attention_map(q, k)[given.head]
    found = error(q, k, v)
    print(f"largest difference of attention(q, k, v) and map @ v: {found:.1e}")
    title = f"What each token attends to: head {given.head} of the last layer"
    subtitle = "all-MiniLM-L6-v2, softmax(q k^T / √d) by cuattn; rows are queries, columns keys"
    host = weights if xp is np else xp.asnumpy(weights)
    with figures.style():
        figures.save(figures.token_map(host, sample["tokens"], (title, subtitle)), given.out)
    return 0 if found <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
