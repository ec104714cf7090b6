"""Bounds of an option stand on its field, and one walk over the options checks them all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

METADATA_KEY = "bounds"
_MISSING = dataclasses.MISSING


@dataclass(frozen=True)
class Bounds:
    """Values that an option may have: finite numbers between bounds that belong (minimum, maximum) or do not."""

    above: float | None = None
    minimum: float | None = None
    below: float | None = None
    maximum: float | None = None

    def accept(self, value: float) -> bool:
        """Whether a value is finite and inside; NaN never is."""
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.minimum is None or value >= self.minimum)
            and (self.below is None or value < self.below)
            and (self.maximum is None or value <= self.maximum)
        )

    def __str__(self) -> str:
        """Such as "1 or more", "0 to 1", "more than 0, at most 1"."""
        if self.minimum is not None and self.maximum is not None:
            return f"{self.minimum:,} to {self.maximum:,}"
        phrases = {
            "more than {:,}": self.above,
            "{:,} or more": self.minimum,
            "less than {:,}": self.below,
            "at most {:,}": self.maximum,
        }
        said = [phrase.format(bound) for phrase, bound in phrases.items() if bound is not None]
        return ", ".join(said) or "a finite number"


def bounded(
    default: Any = _MISSING,
    *,
    default_factory: Callable[[], Any] | Any = _MISSING,
    above: float | None = None,
    minimum: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field of a number with bounds: ``lr: float = bounded(1e-3, above=0)``.

    ``above`` and ``below`` do not belong to the values allowed, ``minimum`` and ``maximum`` do. Without any, every
    finite number is allowed. The bounds of a list or dict (``default_factory``) are those of each of its numbers; an
    option that is None has none to obey.
    """
    bounds = Bounds(above=above, minimum=minimum, below=below, maximum=maximum)
    metadata = {METADATA_KEY: bounds}
    if default_factory is not _MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def bounded_fields(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Bounds]]:
    """(Option's name, its value, its bounds) for each bounded field of a dataclass and of those inside it.

    Inside means: a field's value is a dataclass, or a mapping from names to dataclasses (the name is then one part of
    the option's: ``baselines.mates.lr``).
    """
    for field in dataclasses.fields(section):
        name, value = _join(prefix, field.name), getattr(section, field.name)
        if METADATA_KEY in field.metadata:
            yield name, value, field.metadata[METADATA_KEY]
        elif dataclasses.is_dataclass(value):
            yield from bounded_fields(value, name)
        elif isinstance(value, Mapping):
            for key, entry in value.items():
                if dataclasses.is_dataclass(entry):
                    yield from bounded_fields(entry, _join(name, key))


def check_bounds(section: Any, prefix: str = "") -> None:
    """Raise ValueError for the first number of a dataclass outside its bounds; ``prefix``: the section's name."""
    for name, value, bounds in bounded_fields(section, prefix):
        for one_name, number in _numbers(name, value):
            if not bounds.accept(number):
                raise ValueError(f"found {one_name} {number}, expected {_expected(bounds, number)}")


def _expected(bounds: Bounds, number: float) -> str:
    return str(bounds) if math.isfinite(number) else "a finite number"


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Each number of an option under its own name: ``data.blend_weights[0]``, ``selection.quotas.prose``."""
    if isinstance(value, Mapping):
        yield from ((_join(name, key), number) for key, number in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"{name}[{i}]", number) for i, number in enumerate(value))
    elif value is not None:
        yield name, value


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
