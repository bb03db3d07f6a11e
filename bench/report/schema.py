"""RESULT.json, the result of one checkup: its schema, reading and writing it."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).with_name("schema.json")


def validate(result: Any) -> bool:
    """True for a result that follows ``schema.json``; False, with a warning, without jsonschema.

    Raises
    ------
    ValueError
        With the path of the first fault. A number that is not finite is found without jsonschema.
    """
    for path in _not_finite(result, ()):
        raise ValueError(f"{_dotted(path)}: a number that is not finite")
    try:
        import jsonschema
    except ImportError:
        warnings.warn("jsonschema is not installed: the result is not validated", stacklevel=2)
        return False
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    for error in validator.iter_errors(result):
        raise ValueError(f"{_dotted(error.absolute_path)}: {error.message}")
    return True


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The result in a file, validated."""
    result = json.loads(Path(path).read_text(encoding="utf-8"))
    validate(result)
    return result


def save(result: dict[str, Any], path: str | os.PathLike[str]) -> bool:
    """Write a result, all of it or nothing, and return what `validate` does.

    Keys are sorted, numbers have all their digits, and a list of numbers is one line.
    """
    validated = validate(result)
    text = json.dumps(result, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    numbers = re.compile(r"\[\n([-+.,\s\deE]+)\n *\]")  # strings hold no line breaks
    text = numbers.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return validated


def file_name(result: dict[str, Any]) -> str:
    """``<gpu>-<date>-<commit>.json``, in lower case, and "dirty" with what is not committed."""
    environment = result["environment"]
    gpu = environment["gpu"]["name"] if environment["gpu"] else "no GPU"
    commit = (environment["commit"] or "unknown")[:7]
    parts = [gpu, environment["date"][:10], commit, *["dirty"] * bool(environment["dirty"])]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-") + ".json"


def _not_finite(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """Paths of the numbers that JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_finite(item, (*path, index))


def _dotted(path: Any) -> str:
    """A path as ``cells[0].shape``."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.lstrip(".") or "the result"
