"""Of which arrays of a score expression a call of attention_backward returns gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cuattn._arrays import scalars
from cuattn._arrays.checks import FLOATS, kind, shown
from cuattn._arrays.expression import Expression
from cuattn._arrays.references import references
from cuattn._arrays.results import AttentionGradients


def asked(
    return_dscore: Any, expression: Expression | None, arrays: Mapping[str, Any]
) -> tuple[str, ...]:
    """The names of these arrays, once it is sure that they have gradients; `arrays` by the names
    that errors give them."""
    floating = {name.split("'")[1]: array.dtype.name in FLOATS for name, array in arrays.items()}
    if not isinstance(return_dscore, (list, tuple)):
        if isinstance(return_dscore, str):
            raise TypeError(
                f"return_dscore must be a bool or a list of names, but it is a str; write "
                f"[{shown(return_dscore)}]"
            )
        names = [name for name, has in floating.items() if has]
        if not scalars.flag("return_dscore", return_dscore):
            return ()
        if not names:
            raise ValueError(
                "return_dscore must be False without floating arrays in score_args, but it is True"
            )
    else:
        names = [_name(name, floating) for name in return_dscore]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            what = f"{min(twice)} comes {names.count(min(twice))} times"
            raise ValueError(f"return_dscore must have each name once, but {what}")
    assert expression is not None or not names
    for name in names:
        references(expression, [*floating].index(name), name)
    return tuple(names)


def gradients(found: Mapping[str, Any]) -> AttentionGradients:
    """What is returned, of results by their names, which those of `asked` have behind a "d"."""
    arrays = {name.split("'")[1]: d for name, d in found.items() if "[" in name}
    rest = {name: d for name, d in found.items() if "[" not in name}
    return AttentionGradients(**rest, dscore=arrays or None)


def _name(name: Any, floating: Mapping[str, bool]) -> str:
    if not isinstance(name, str):
        raise TypeError(f"return_dscore must have names, but one is {kind(name)}")
    if name not in floating:
        raise ValueError(
            f"return_dscore must name arrays of score_args, but {shown(name)} is none of them"
        )
    if not floating[name]:
        raise TypeError(f"return_dscore must name floating arrays, but {name} is none")
    return str(name)
