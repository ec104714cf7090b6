"""What every arm's record promises, and that README.md says the same."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from megatron_bliss.arms import ARMS
from megatron_bliss.arms.arm import Arm
from megatron_bliss.config.stages import ROUND_STAGES
from megatron_bliss.run.options import parse_options
from megatron_bliss.run.order import OWN_STAGES, round_stages

ROOT = Path(__file__).parents[2]
ORDINARY_WORDS = {"random", "perplexity", "identity", "full"}
"""Names of arms that mean other things elsewhere: a draw, a metric of tasks, an activation, a way to recompute."""


def row(name: str, arm: Arm) -> str:
    """The arm's line in README.md."""
    paper = f"[{arm.paper}](https://arxiv.org/abs/{arm.paper}) " if arm.paper else ""
    return f"| `{name}` | {arm.help} | {paper}|"


def test_the_table_in_the_readme_is_that_of_the_records() -> None:
    section = re.search(r"^## Arms$(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE).group(1)
    rows = [line for line in section.splitlines() if line.startswith("| `") and "--arms" not in line]
    assert rows == [row(name, arm) for name, arm in ARMS.items()]


@pytest.mark.parametrize("name", ARMS)
def test_options_are_frozen_and_each_has_a_default(name: str) -> None:
    settings = ARMS[name].settings
    if settings is not None:
        assert settings() == parse_options([]).baselines[name]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings(), dataclasses.fields(settings)[0].name, 1)


def test_an_arm_has_only_the_stages_it_asks_for() -> None:
    config = parse_options(["--pretraining.decay_branch_iters", "5"])
    assert round_stages(config, "bliss") == list(ROUND_STAGES)
    assert round_stages(config, "random") == [stage for stage in ROUND_STAGES if stage not in OWN_STAGES]
    assert "decay_branch" not in round_stages(parse_options([]), "bliss")
    assert all(set(arm.stages) <= set(OWN_STAGES) for arm in ARMS.values())


def named(tree: ast.Module) -> set[str]:
    """Strings that a module compares with, looks up or maps from."""
    found: list[ast.expr | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            found += [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            found += node.keys
        elif isinstance(node, ast.Subscript):
            found.append(node.slice)
    return {one.value for one in found if isinstance(one, ast.Constant) and isinstance(one.value, str)}


@pytest.mark.parametrize("name", [name for name in ARMS if name not in ORDINARY_WORDS])
def test_an_arm_is_not_asked_for_by_name_outside_its_own_file(name: str) -> None:
    for path in [*(ROOT / "megatron_bliss").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        if path.relative_to(ROOT) != Path("megatron_bliss", "arms", f"{name}.py"):
            assert name not in named(ast.parse(path.read_text(encoding="utf-8"))), path
