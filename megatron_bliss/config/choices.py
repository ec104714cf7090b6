"""Tables of choices: records by name, each in a module of its own.

Adding one (an arm, a policy, a solver) takes its file and its name in one table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TypeVar

Record = TypeVar("Record")


class Choices(Mapping[str, Record]):
    """The records of a package: choice NAME is the value ``attribute`` of the module ``package.NAME``.

    Names are known without importing anything; a module is imported when its record is first looked up.
    """

    def __init__(self, package: str, attribute: str, names: tuple[str, ...]) -> None:
        self.package, self.attribute, self.names = package, attribute, names

    def __getitem__(self, name: str) -> Record:
        if name not in self.names:
            raise KeyError(name)
        return getattr(import_module(f"{self.package}.{name}"), self.attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
