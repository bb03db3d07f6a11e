"""The calls of attention_column_sums on a device: plan, and cast what no kernel can read."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from cuattn._arrays.row_layout import ArraySpec, packed, spec_of
from cuattn._attention.request import Expected, Options
from cuattn._attention.request_column_sums import ColumnSumsCall
from cuattn._attention.run import INTEGERS
from cuattn._attention.run_problem import problem_of, tail_of
from cuattn._attention.run_score import score_arrays_of
from cuattn._attention.views import (
    Arrays,
    canonical_lse,
    canonical_specs,
    is_vector,
    specs_of,
    strides_of,
)
from cuattn._device.kernel import Limits
from cuattn._device.launches import Launches, Made, Prepared, one_or_all
from cuattn._device.params import ATTENTION_COLUMN_SUMS, ATTENTION_POINTERS

NAMES = {name: name for name in (*Arrays._fields, "lse")} | {"sums": "out"}


def prepare(call: ColumnSumsCall) -> Any:
    """A call with its launch; of NumPy arrays its result."""
    runtime, out = call.runtime, call.out
    if runtime is None:
        from cuattn._attention.numpy_column_sums import run_numpy

        return run_numpy(call)
    device = runtime.device(call.arrays.q)
    with runtime.on(device):
        arrays, lse = call.cast(runtime.xp)
    launches = _planned(
        specs_of(arrays),
        spec_of(lse),
        None if out is None else spec_of(out),
        call.expected,
        call.layout,
        call.options,
        not any(runtime.address(array) % 16 for array in (arrays.q, arrays.k)),
        runtime.limits(device),
    )
    given = {**arrays._asdict(), "lse": lse, "sums": out}
    names = NAMES
    if runtime.xp is np:  # the values of integers are checked at every call
        names = names | dict.fromkeys(INTEGERS, "")
    return Prepared(runtime, launches, given, (), one_or_all, names)


@lru_cache(maxsize=4096)
def _planned(
    given: Arrays,
    lse: ArraySpec,
    out: ArraySpec | None,
    expected: Expected,
    layout: str,
    options: Options,
    aligned: bool,
    limits: Limits,
) -> Launches:
    """The launch of a call, if there is anything to compute.

    `aligned`: q and k start on 16-byte boundaries.
    """
    from cuattn._attention.plan_column_sums import plan_column_sums

    sizes = expected.sizes
    x = canonical_specs(given, (given.q, lse), sizes, layout)
    reads = [n for n, spec in given._asdict().items() if spec is not None and n != "v"]
    writes, made = ["sums"], dict[str, Made]()
    if out is None:
        shape = (*expected.lse_shape[:-1], sizes.seqlen_k)
        writes, made = [], {"sums": Made(shape, expected.acc)}
        out = ArraySpec(shape, packed(shape, None, expected.acc.itemsize), expected.acc)
    kernels = []
    if sizes.batch * sizes.heads * sizes.seqlen_k:
        vector = aligned and is_vector(x.q) and is_vector(x.k)
        problem = problem_of(x, options, sizes.batch, False, vector, False)
        launch, of_blocks = plan_column_sums(problem, limits.num_sms)
        tail = tail_of(x, options, of_blocks, launch.row_blocks, launch.heads_in_l2, False)
        fields: dict[str, Any] = {"group": problem.heads // problem.kv_heads}
        fields["sums_stride"] = strides_of(canonical_lse(out), 3)
        kernels.append(
            (
                launch.kernel,
                (ATTENTION_POINTERS, tail, score_arrays_of({}), (ATTENTION_COLUMN_SUMS, fields)),
            )
        )
    return Launches([*reads, "lse"], writes, made, ["sums"], kernels)
