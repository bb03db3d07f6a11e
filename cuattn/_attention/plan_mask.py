"""C++ of mask expressions, of their steps and nothing else."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from cuattn._arrays.expression import Expression
from cuattn._attention.plan_score import lines_of
from cuattn._attention.problem import Score
from cuattn._device.kernel import Kernel

THREADS, MAX_GRID = 128, 2**31 - 1
TEXT = """#include <attention/expression.cuh>
struct {name} {{
  using Acc = double;
  static __device__ __forceinline__ bool seen(long long b, long long h, long long q, long long k,
                                              const ScoreArrays& arrays) {{
{body}
  }}
}};
"""


@lru_cache(maxsize=1024)
def plan_mask(expression: Expression, dtypes: tuple[str, ...]) -> Score:
    """The struct of an expression whose arrays have these dtypes. Its floats are of 64 bits, as
    the lists of a block mask are for attention of any dtype."""
    lines = lines_of(expression.steps, dtypes)
    body = "\n".join([*lines, f"    return v{len(lines) - 1};"])
    name = f"Mask_{hashlib.sha256(body.encode()).hexdigest()[:16]}"
    return Score(name, TEXT.format(name=name, body=body), expression.text)


def plan_block_mask(mask: Score, tiles: int) -> Kernel:
    """The kernel that finds the kinds of so many tiles: a block has a key for each thread."""
    return Kernel(
        "attention_block_mask",
        {"kThreads": THREADS, "Mask": mask.name},
        min(tiles, MAX_GRID),
        THREADS,
        text=mask.text,
        expression=mask.expression,
    )
