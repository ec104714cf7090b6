"""docs/how_it_works.md names files and functions that exist, for each of the equations (1) to (7)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\|(?P<what>.*)\| `(?P<file>[\w/]+\.py)` \| `(?P<name>[\w.]+)` \|$", re.MULTILINE)
ROWS = [(row["what"].strip(), row["file"], row["name"]) for row in ROW.finditer(PAGE)]


def defines(body: list[ast.stmt], name: str) -> bool:
    """Whether statements define ``name``, a dotted one inside the class before the dot."""
    first, _, rest = name.partition(".")
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == first:
            return not rest or defines(node.body, rest)
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return True
    return False


def test_every_line_of_the_tables_is_read() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and ".py" in line]
    assert len(lines) == len(ROWS) > 7


def test_each_equation_has_its_line() -> None:
    found = {equation for what, _, _ in ROWS for equation in re.findall(r"^\((\d)\)", what)}
    assert found == set("1234567")


@pytest.mark.parametrize(("file", "name"), [row[1:] for row in ROWS], ids=[row[2] for row in ROWS])
def test_the_file_defines_the_name(file: str, name: str) -> None:
    assert defines(ast.parse((ROOT / file).read_text(encoding="utf-8")).body, name)


def test_what_is_not_defined_is_found_missing() -> None:
    body = ast.parse("class A:\n    def f(self): ...\nB: int = 1").body
    assert defines(body, "A.f") and defines(body, "B") and not defines(body, "A.g") and not defines(body, "f")
