"""The calls of attention_backward on a device: plan, and cast what no kernel can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from cuattn._arrays.results import AttentionGradients
from cuattn._arrays.row_layout import ArraySpec, packed, spec_of
from cuattn._attention import run_dscore
from cuattn._attention.request import Options, expect
from cuattn._attention.request_backward import BackwardArrays, Call
from cuattn._attention.request_dscore import gradients
from cuattn._attention.run import INTEGERS
from cuattn._attention.run_problem import problem_of, tail_of
from cuattn._attention.run_score import score_arrays_of
from cuattn._attention.views import (
    Shape,
    canonical_lse,
    canonical_spec,
    canonical_specs,
    cast,
    is_vector,
    strides_of,
    whole_elements,
)
from cuattn._device.kernel import Kernel, Limits
from cuattn._device.launches import Block, Launches, Made, Prepared
from cuattn._device.params import (
    ATTENTION_BACKWARD,
    ATTENTION_BACKWARD_BIAS,
    ATTENTION_BACKWARD_DS,
    ATTENTION_BACKWARD_SM90,
    ATTENTION_BACKWARD_SUMS,
    ATTENTION_POINTERS,
    SCORE_GRADIENTS,
)
from cuattn._device.tensor_map import Boxes

LARGE = ("dq", "dk", "dv", "dbias")  # what `out` has
READ = ("q", "k", "v", "grad", "y")  # 16 bytes at a time, if they can be
BOXED = READ[:4]  # by TMA, if they can be
NAMES = {name: name for name in BackwardArrays._fields} | {
    name: f"out[{i}]" for i, name in enumerate(LARGE)
}
Result = tuple[str, Shape, np.dtype]


def prepare(call: Call) -> Any:
    """A call with its launches; of NumPy arrays its results."""
    runtime, expected, outs = call.runtime, call.expected, call.outs or ()
    if runtime is None:
        from cuattn._attention.numpy_backward import run_numpy

        return run_numpy(call)
    device = runtime.device(call.arrays.q)
    with runtime.on(device):
        arrays = cast(call.arrays, expected.acc, call.fractional, runtime.xp)
        indexed = {n: whole_elements(runtime.xp, array) for n, array in call.score_args.items()}
    given = {**arrays._asdict(), **indexed, **dict(zip(LARGE, outs, strict=False))}
    aligned = frozenset(
        name
        for name in (*READ, *LARGE[:3])
        if given.get(name) is None or not runtime.address(given[name]) % 16
    )
    launches = _planned(
        BackwardArrays(*map(spec_of, arrays)),
        tuple(map(spec_of, outs)),
        tuple(call.results),
        call.layout,
        call.options,
        aligned,
        runtime.limits(device),
        tuple((name, spec_of(array)) for name, array in indexed.items()),
        tuple(call.indexed),
    )
    names = NAMES | {name: name for name in indexed}
    if runtime.xp is np:  # the values of integers are checked at every call
        names = names | dict.fromkeys(INTEGERS, "")
    found = tuple(name for name, *_ in call.results)
    first = found == AttentionGradients._fields[: len(found)]
    kind = AttentionGradients if first else partial(_gradients, found)
    return Prepared(runtime, launches, given, (), kind, names)


def _gradients(names: tuple[str, ...], *results: Any) -> AttentionGradients:
    return gradients(dict(zip(names, results, strict=True)))


@lru_cache(maxsize=4096)
def _planned(
    given: BackwardArrays,
    outs: tuple[ArraySpec, ...],
    results: tuple[Result, ...],
    layout: str,
    options: Options,
    aligned: frozenset[str],
    limits: Limits,
    indexed: tuple[tuple[str, ArraySpec], ...],
    differentiated: tuple[str, ...],
) -> Launches:
    """Launches of a call.

    `outs` may be empty. `aligned`: arrays that start on 16-byte boundaries, as new memory does.
    `indexed`: arrays of a score expression, by the names of their fields; `differentiated`: those
    whose gradients are returned.
    """
    from cuattn._attention import plan_backward as plan
    from cuattn._attention.plan_backward_ds import IMAGE, plan_ds
    from cuattn._attention.plan_backward_sm90 import Sm90Launch, plan_kv_sm90, plan_q_sm90
    from cuattn._attention.plan_sm90 import box_of, is_tma

    expected, forward = expect(given.forward, layout), given.forward
    acc, capability = expected.acc, limits.compute_capability
    x = canonical_specs(forward, (given.y, given.lse), expected.sizes, layout)
    x = x._replace(score_args=tuple(spec for _, spec in indexed))
    reads = [name for name, spec in given._asdict().items() if spec is not None]
    reads += [name for name, _ in indexed]
    names = [name for name, *_ in results]
    made = {name: Made(shape, dtype) for name, shape, dtype in results[len(outs) :]}
    specs = dict(zip(names, outs, strict=False))
    for name, one in made.items():
        specs[name] = ArraySpec(one.shape, packed(one.shape, None, one.dtype.itemsize), one.dtype)
    grad, dq, dk, dv = (
        canonical_spec(spec, layout) for spec in (given.grad, *map(specs.get, LARGE[:3]))
    )
    vectors = {"q": x.q, "k": x.k, "v": x.v, "grad": grad, "y": x.out, "dq": dq, "dk": dk, "dv": dv}
    vector = {name for name, spec in vectors.items() if name in aligned and is_vector(spec)}
    problem = problem_of(
        x,
        options,
        expected.sizes.batch,
        forward.cu_seqlens_q is not None,
        vector >= {"q", "k", "v", "grad"},
        aligned >= {"q", "k", "v", "grad"}
        and all(is_tma(vectors[name].shape, vectors[name].strides) for name in BOXED),
        chain=True,
    )
    if not problem.heads:  # dk and dv are zeros, as if there were heads without queries
        heads, keys = max(1, problem.kv_heads), problem.k_rows * bool(problem.kv_heads)
        problem = replace(problem, heads=heads, kv_heads=heads, q_rows=0, k_rows=keys)
    rows = plan.stat_rows(problem)
    stats = (1 if problem.ragged else problem.batch) * problem.heads * rows
    has_slopes = "dalibi_slopes" in names
    made["partial"] = Made(((2 + has_slopes) * stats,), acc)
    backward = (
        ATTENTION_BACKWARD,
        {
            "stats": "partial",
            "has_slopes": has_slopes,
            **{f"{name}_is_vector": name in vector for name in LARGE[:3]},
            "stat_rows": rows,
            "grad_stride": strides_of(grad, 4),
            "dq_stride": strides_of(dq, 4),
            "dk_stride": strides_of(dk, 4),
            "dv_stride": strides_of(dv, 4),
            "grad_lse_stride": strides_of(given.grad_lse and canonical_lse(given.grad_lse), 3),
        },
    )

    score_arrays = score_arrays_of(dict(indexed))
    kernels: list[tuple[Kernel, Block]] = []
    boxes: list[list[tuple[str, Boxes]]] = []

    def add(launch: plan.Launch, *end: Any, maps: Sequence[tuple[str, Boxes]] = ()) -> None:
        tail = tail_of(x, options, problem, launch.row_blocks, launch.heads_in_l2, False)
        if launch.schedule:
            end = *end[:-1], end[-1].pack(**launch.schedule._asdict())
        block = (ATTENTION_POINTERS, {"out": "y"}), tail, score_arrays, backward, *end
        if launch.kernel.grid:
            kernels.append((launch.kernel, block))
            boxes.append([*maps])

    dtype = x.q.dtype.name

    def boxes_of(launch: Sm90Launch, names: Sequence[str]) -> list[tuple[str, Boxes]]:
        maps = []
        for name in names:
            spec = vectors[name]
            size = spec.shape, spec.strides, launch.rows[name], 1, launch.panels[name]
            maps.append((name, box_of(dtype, *size)))
        return maps

    def add_sm90(launch: Sm90Launch) -> None:
        maps = boxes_of(launch, BOXED)
        add(launch.launch, (SCORE_GRADIENTS, {}), ATTENTION_BACKWARD_SM90, maps=maps)

    add(plan.plan_rows(problem, vector >= {"grad", "y"}))
    if of_ds := plan_ds(problem, *limits):
        rows, row_bytes = of_ds.images * IMAGE, IMAGE * x.q.dtype.itemsize
        made["images"] = Made((rows, IMAGE), np.dtype(np.uint16))
        strides = rows * row_bytes, rows * row_bytes, row_bytes, x.q.dtype.itemsize
        image = "images", box_of(dtype, (1, 1, rows, IMAGE), strides, IMAGE, 1, IMAGE)
        for part in of_ds.rounds:
            tiles = {"q_tiles": of_ds.q_tiles, "k_tiles": of_ds.k_tiles}
            end = SCORE_GRADIENTS, {"units": part.units, "unit": part.unit, **tiles}
            add(part.kv, end, ATTENTION_BACKWARD_SM90, maps=boxes_of(of_ds.kv, BOXED))
            maps = [*boxes_of(of_ds.kv, ("k",)), image]
            add(part.ds, end, ATTENTION_BACKWARD_DS, maps=maps)
    else:
        if of_q := plan_q_sm90(problem, *limits):
            add_sm90(of_q)
        else:
            add(plan.plan_q(problem, capability))
        if of_kv := plan_kv_sm90(problem, *limits):
            add_sm90(of_kv)
        else:
            for launch in plan.plan_kv(problem, capability):
                add(launch)
    if "dbias" in names:
        shape = (1,) * (4 - len(specs["dbias"].shape)) + specs["dbias"].shape
        sizes = plan.BiasSizes(*shape)
        launch = plan.plan_bias(problem, sizes, capability)
        fields: dict[str, Any] = {**asdict(sizes), "row_blocks": launch.row_blocks}
        fields["col_blocks"] = launch.heads_in_l2
        fields["dbias_stride"] = strides_of(canonical_spec(specs["dbias"], "BHSD"), 4)
        add(launch, (ATTENTION_BACKWARD_BIAS, fields))
    if differentiated:
        assert options.score is not None
        wanted = {name: f"d{name}" for name in differentiated}
        aligned_distances = not problem.ragged and given.q_offset is None
        more = options.score, dict(indexed), wanted, problem, aligned_distances, acc, capability
        of_arrays, workspace = run_dscore.of_arrays(*more)
        made |= workspace
        for kernel, end in of_arrays:
            add(plan.Launch(kernel, 0, 0), end)
    single = ("dalibi_slopes", "dsinks")
    sums = {name: int(np.prod(specs[name].shape)) for name in single if name in names}
    if sums:
        slopes = specs.get("dalibi_slopes")
        fields = {
            "dsinks": "dsinks" if "dsinks" in sums else 0,
            "dslopes": "dalibi_slopes" if has_slopes else 0,
            "slope_batches": slopes.shape[0] if slopes and len(slopes.shape) == 2 else 1,
        }
        total = plan.Launch(plan.plan_sums(acc.name, sum(sums.values())), 0, 0)
        add(total, (ATTENTION_BACKWARD_SUMS, fields))
    return Launches(reads, names[: len(outs)], made, names, kernels, boxes=boxes)
