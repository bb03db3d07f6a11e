"""The calls of `sample` and `sample_state`: whether their arguments fit, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import checks, scalars
from cuattn._arrays.inputs import Owner, as_array, as_integers, as_scale, as_where, placed
from cuattn._arrays.outputs import as_outputs
from cuattn._arrays.row_layout import FLOAT32, FLOAT64, ArraySpec, spec_of
from cuattn._device.runtime import runtime_of
from cuattn._topk.request import INT64, NONE, one_axis

MAX_COLUMNS = 1 << 34  # four words of noise for each of 2^32 counters
MAX_SEED, MAX_OFFSET = 2**64 - 1, 2**63 - 1


class Operands(NamedTuple):
    """Arrays of one call, of one library and on one device; all but x broadcast to it, and all but
    `where` have one number per row."""

    x: Any
    where: Any = None
    scale: Any = None
    seed: Any = None
    offset: Any = None
    rows: Any = None  # numbers of rows; None: as they are counted


class Request(NamedTuple):
    """One call without its data: what its plan depends on."""

    result: str  # "indices", "log_prob" (with indices) or "state"
    axis: int  # not negative
    num: int
    x: ArraySpec
    where: ArraySpec | None = None
    scale: ArraySpec | None = None
    seed: ArraySpec | None = None
    offset: ArraySpec | None = None
    rows: ArraySpec | None = None
    top_k: int | None = None  # less than the row has; None: all
    top_p: bool = False  # whether there is one; which, Options say
    min_p: bool = False

    @property
    def counts_rows(self) -> bool:
        """Whether rows have numbers: else the noise of each is that of row 0."""
        return self.rows is not None or self.seed is None or not self.seed.shape


class Options(NamedTuple):
    """What changes nothing but numbers that the kernels are given."""

    scale: float = 1.0  # these three where operands have none
    seed: int = 0
    offset: int = 0
    index_offset: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Expected(NamedTuple):
    """Dtypes and shapes of what a call returns: indices and their like, and one number per row."""

    acc: np.dtype
    shape: tuple[int, ...]
    stat_shape: tuple[int, ...]


class Call(NamedTuple):
    """One call whose arguments have been taken in."""

    runtime: Any  # None: x is a NumPy array
    request: Request
    expected: Expected
    operands: Operands
    options: Options
    outs: Mapping[str, Any] = NONE  # what was given of the fields of results

    @property
    def fields(self) -> tuple[str, ...]:
        """What it returns, in this order."""
        return fields(self.request.result)

    @property
    def factor(self) -> Any:
        """The scale of either kind."""
        return self.options.scale if self.operands.scale is None else self.operands.scale


# ---- The functions ----


def sample(
    x: Any,
    num: Any,
    seed: Any,
    offset: Any,
    axis: Any,
    scale: Any,
    where: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    return_log_prob: Any,
    out: Any,
) -> Call:
    """A call of `sample`."""
    result = "log_prob" if scalars.flag("return_log_prob", return_log_prob) else "indices"
    x = as_array("x", x)
    call, inputs = _checked(result, x, num, axis, 0, seed, offset, scale, where=where)
    request, options = call.request, call.options
    if top_k is not None:
        least = scalars.at_least("top_k", top_k, 1)
        request = request._replace(top_k=least if least < request.x.shape[request.axis] else None)
    if top_p is not None:
        p = scalars.probability("top_p", top_p, zero=False)
        request, options = request._replace(top_p=p < 1), options._replace(top_p=p)
    if min_p is not None:
        p = scalars.probability("min_p", min_p)
        request, options = request._replace(min_p=p > 0), options._replace(min_p=p)
    return _with_outs(call._replace(request=request, options=options), inputs, out)


def sample_state(
    x: Any,
    num: Any,
    seed: Any,
    offset: Any,
    axis: Any,
    scale: Any,
    rows: Any,
    index_offset: Any,
    out: Any,
) -> Call:
    """A call of `sample_state`."""
    x = as_array("x", x)
    call, inputs = _checked("state", x, num, axis, index_offset, seed, offset, scale, rows=rows)
    return _with_outs(call, inputs, out)


def _checked(
    result: str,
    x: Any,
    num: Any,
    axis: Any,
    index_offset: Any,
    seed: Any,
    offset: Any,
    scale: Any,
    where: Any = None,
    rows: Any = None,
) -> tuple[Call, list[Owner]]:
    """What the two have in common, without filters and results; and the arrays as they came."""
    owner, runtime = ("x", x), runtime_of(x)
    factors, factor = as_scale(scale, owner)
    where = as_where(where, owner)
    seeds, seed = as_integers("seed", seed, MAX_SEED, owner)
    offsets, offset = as_integers("offset", offset, MAX_OFFSET, owner)
    if rows is not None:
        rows = as_array("rows", rows, owner)
        checks.integers("rows", rows.dtype)
    inputs = [owner, ("where", where), ("scale", factors), ("seed", seeds)]
    inputs += [("offset", offsets), ("rows", rows)]
    x, axis, where, *per_row = one_axis(runtime, x, axis, where, factors, seeds, offsets, rows)
    operands = Operands(x, where, *per_row)
    n = x.shape[axis]
    count = max(x.size // max(n, 1), 1)
    why = ", so that the result can be addressed"
    num = scalars.count("num", num, scalars.MAX_INDEX // (8 * count), why)
    if n > MAX_COLUMNS:
        raise checks.too_long("x", n, MAX_COLUMNS)
    why = ", so that every element has noise of its own"
    begin = scalars.count("index_offset", index_offset, MAX_COLUMNS - n, why)
    request = Request(result, axis, num, *map(spec_of, operands))
    expected = expect(request)
    if runtime is not None and operands.where is not None and not operands.where.ndim:
        operands = operands._replace(where=placed(operands.where, runtime, x))
    options = Options(factor, seed, offset, begin)
    return Call(runtime, request, expected, operands, options), inputs


def _with_outs(call: Call, inputs: list[Owner], out: Any) -> Call:
    """The call with the arrays of `out` by their fields."""
    if out is None:
        return call
    expected = call.expected
    stat, scores = (expected.stat_shape, expected.acc), (expected.shape, expected.acc)
    specs = {
        "indices": (expected.shape, INT64),
        "log_prob": scores,
        "m": stat,
        "l": stat,
        "values": (expected.shape, FLOAT64),
        "logits": scores,
    }
    wanted = [specs[name] for name in call.fields]
    arrays = as_outputs(out, wanted, inputs, in_place=False)
    return call._replace(outs=dict(zip(call.fields, arrays, strict=True)))


# ---- What comes out ----


def fields(result: str) -> tuple[str, ...]:
    """What a call returns."""
    if result == "state":
        return "m", "l", "values", "logits", "indices"
    return ("indices", "log_prob")[: 1 + (result == "log_prob")]


@lru_cache(maxsize=4096)
def expect(request: Request) -> Expected:
    """Check specs, and say what comes out."""
    x, axis = request.x, request.axis
    checks.floating("x", x.dtype)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    for name in ("scale", "seed", "offset", "rows"):
        given = getattr(request, name)
        if given is not None:
            checks.broadcastable(name, given.shape, (*before, 1, *after), "one value per row")
    if request.where is not None:
        checks.bool_dtype("where", request.where.dtype, "compare with 0")
        checks.broadcastable("where", request.where.shape, x.shape, "the shape of x")
    acc = FLOAT64 if x.dtype == FLOAT64 else FLOAT32
    if request.result == "state":  # the elements that are drawn lie on the last axis
        return Expected(acc, (*before, *after, request.num), before + after)
    return Expected(acc, (*before, request.num, *after), before + after)
