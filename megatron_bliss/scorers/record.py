"""Records from JSON that somebody else has written: every field known, of its type, none missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


def record_of(kind: type[Record], found: object) -> Record:
    """A frozen dataclass of plain fields from a JSON object; ValueError names what does not fit."""
    if not isinstance(found, Mapping):
        raise ValueError(f"found {found!r} for {kind.__name__}, expected a JSON object: export the scorer again")
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}
    wrong = sorted(found.keys() - known.keys())
    missing = [name for name, field in known.items() if name not in found and _is_required(field)]
    if wrong or missing:
        raise ValueError(
            f"found {wrong or 'nothing'} and no {missing or 'other'} in a scorer's {kind.__name__}, expected "
            f"{', '.join(known)}: export it again"
        )
    for name, value in found.items():
        if not _fits(value, hints[name]):
            raise ValueError(
                f"found {name} {value!r} in a scorer's {kind.__name__}, expected {known[name].type}: export it again"
            )
    return kind(**found)


def _is_required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_args(hint) and get_origin(hint) is not dict:  # a union, such as int | None
        return any(_fits(value, one) for one in get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)
