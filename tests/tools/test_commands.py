"""What every tool has in common: how it ends."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = sorted((ROOT / "tools").glob("*.py"))


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_every_tool_ends_as_a_command(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    decorators = [node.func.id for node in main.decorator_list if isinstance(node, ast.Call)]
    assert decorators == ["command"]
    assert ast.unparse(tree.body[-1]).startswith("if __name__ == '__main__':\n    sys.exit(main(")


def test_a_plan_whose_reader_is_gone_ends_quietly() -> None:
    config = ROOT / "examples" / "pythia_1b_c4" / "config.yaml"
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), "--config", str(config), "--corpus-tokens", "1e11"]
    tool = subprocess.Popen(
        [*command, "--vocab-size", "50304"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert tool.stdout is not None
    tool.stdout.close()
    tool.stdout = None
    assert tool.communicate() == (None, "")
    assert tool.returncode == 141
