"""The laws of the house, from the sources themselves: who may import whom, and how large a file or function may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_bliss"
ROOMS = [
    "config",
    "base",
    "data",
    "models",
    "target",
    "bilevel",
    "selection",
    "scorers",
    "arms",
    "evaluation",
    "report",
    "run",
    "plan",
    "study",
]
"""From the ground up: a room imports only from rooms before it."""
LARGEST_FILE, LARGEST_FUNCTION, MOST_PARAMETERS = 350, 60, 8


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imports(name: str) -> set[str]:
    """Modules of the package that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return {one for one in found if one in MODULES and one not in (PACKAGE, name)}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def room(name: str) -> str:
    return name.split(".")[1]


def test_the_package_root_holds_rooms_only() -> None:
    kept = {path.name for path in (ROOT / PACKAGE).iterdir()} - {"__pycache__"}
    assert kept == {"__init__.py", *ROOMS}


@pytest.mark.parametrize("name", [name for name in MODULES if name != PACKAGE])
def test_a_room_imports_only_from_rooms_below(name: str) -> None:
    above = [one for one in imports(name) if ROOMS.index(room(one)) > ROOMS.index(room(name))]
    assert not above, f"{name} imports {above}, which stand above it"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Modules without imports are taken away until none is left: what stays is a circle."""
    left = {name: imports(name) for name in MODULES}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"circles among {sorted(left)}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_stay_small(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= LARGEST_FILE
    for function in functions(MODULES[module_name(path)]):
        lines = (function.end_lineno or 0) - function.lineno + 1
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        parameters = [one for one in arguments if one.arg not in ("self", "cls")]
        assert lines <= LARGEST_FUNCTION, f"{function.name} has {lines} lines"
        assert len(parameters) <= MOST_PARAMETERS, f"{function.name} has {len(parameters)} parameters"


def test_what_tests_share_stands_in_no_test_file() -> None:
    """A test file can be split, renamed or taken out without a look at the others."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found = [name for name in names if name.startswith("tests.") and ".test_" in name]
            assert not found, f"{path.relative_to(ROOT)} imports {found}: move what both need to a file beside them"


def test_the_tests_have_the_same_tree() -> None:
    """Every folder of tests of the package is a room, or a part of one."""
    own = {"tools", "examples"}
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    for folder in folders:
        if folder.parts and folder.parts[0] not in own:
            assert (ROOT / PACKAGE / folder).is_dir(), f"tests/{folder} mirrors no room"
