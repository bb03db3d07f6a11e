"""A mask that is an expression: in a call of `block_mask`, and among the arguments of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cuattn._arrays import scalars
from cuattn._arrays.checks import misaligned, shown
from cuattn._arrays.expression import Expression
from cuattn._arrays.inputs import as_arrays
from cuattn._arrays.results import MaskExpression
from cuattn._arrays.syntax import MASK
from cuattn._attention import checks, request_score
from cuattn._attention.views import Shape, Sizes
from cuattn._device.runtime import runtime_of

OF_BLOCK_MASK = MASK._replace(name="block_mask.mask.text", args="block_mask.mask.args")


class Predicate(NamedTuple):
    """What a call of attention depends on of a mask expression, but for its arrays."""

    expression: Expression
    shape: Shape  # (..., S_q, S_k)

    @property
    def names(self) -> set[str]:
        """Which of b, h, q and k it has."""
        return {step.value for step in self.expression.steps if step.operation == "name"}


class Call(NamedTuple):
    """A call of `block_mask` that fits."""

    runtime: Any  # None: NumPy computes it
    owner: Any  # an array on its device
    mask: MaskExpression
    predicate: Predicate
    block: tuple[int, int]


def given(
    text: str,
    q_len: Any,
    k_len: Any,
    args: Any,
    batch: Any,
    heads: Any,
    like: Any,
    block: Any,
) -> Call:
    """Arguments of `block_mask`, checked."""
    named = request_score.named(text, args, MASK)
    arrays = as_arrays(named if like is None else {**named, "like": like})
    first, owner = next(iter(arrays.items()), ("like", None))
    arrays.pop("like", None)
    expression = request_score.steps_of(text, arrays, MASK)
    shape = _shape(expression, q_len, k_len, batch, heads)
    tile = checks.block("block", block)
    runtime = None if owner is None else runtime_of(owner)
    if runtime is not None:
        checks.capability(first, runtime.limits(runtime.device(owner)).compute_capability)
        for name, array in arrays.items():
            if runtime.address(array) % array.itemsize:
                raise misaligned(name, array)
    by_name = {name.split("'")[1]: array for name, array in arrays.items()}
    mask = MaskExpression(str(text), by_name, shape)
    return Call(runtime, owner, mask, Predicate(expression, shape), tile)


def _shape(expression: Expression, q_len: Any, k_len: Any, batch: Any, heads: Any) -> Shape:
    """(..., S_q, S_k), with what leading axes it has to have."""
    names, shape = Predicate(expression, ()).names, []
    for argument, value, name in (
        ("batch", batch, "b"),
        ("heads", heads, "h"),
        ("q_len", q_len, ""),
        ("k_len", k_len, ""),
    ):
        size = 1 if value is None else scalars.count(argument, value, checks.MAX_SIZE)
        needed = not name or name in names
        if needed and value is None:
            why = f"with an expression that has {name}" if name else "with an expression"
            raise ValueError(f"{argument} must be given {why}, but it is None")
        shape.append(size if needed else 1)
    return tuple(shape[0 if "b" in names else 1 if "h" in names else 2 :])


def no_expression(**options: Any) -> None:
    """ValueError if an array comes with what only expressions have."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None beside a mask that is an array, but it was given"
            )


# ---- Among the arguments of attention ----


def arrays_of(mask: MaskExpression) -> dict[str, Any]:
    """Its arrays by the names that errors give them."""
    if not isinstance(mask.text, str):
        raise TypeError(f"{OF_BLOCK_MASK.name} must be a str, but it is {shown(mask.text)}")
    return request_score.named(mask.text, mask.args, OF_BLOCK_MASK)


def predicate_of(mask: MaskExpression, arrays: Mapping[str, Any]) -> Predicate:
    """An expression of these arrays."""
    expression = request_score.steps_of(mask.text, arrays, OF_BLOCK_MASK)
    name, shape = "block_mask.mask.shape", mask.shape
    if not isinstance(shape, tuple) or not 2 <= len(shape) <= 4:
        raise TypeError(f"{name} must be a tuple of 2 to 4 integers, but it is {shown(shape)}")
    sizes = [scalars.count(f"{name}[{i}]", size, checks.MAX_SIZE) for i, size in enumerate(shape)]
    return Predicate(expression, tuple(sizes))


def check(predicate: Predicate, sizes: Sizes, ndim: int) -> None:
    """Check that an expression is one of these sequences and heads."""
    name, shape = "block_mask.mask", predicate.shape
    checks.mask_shape(name, shape, sizes[4 - ndim :])
    own = (1,) * (4 - len(shape)) + shape
    for i, what in enumerate(("batch", "heads")):
        if what[0] in predicate.names and own[i] != sizes[i]:
            raise ValueError(
                f"{name} must be made with {what}={sizes[i]}, as it has {what[0]}, "
                f"but its shape is {shape}"
            )
