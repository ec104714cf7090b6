"""The solver of docs/extending.md, put into a copy of the package as the page says: one file, one name in a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.extending import extended_copy, run_in


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The package and its commands with the solver restarted."""
    return extended_copy(tmp_path_factory.mktemp("copy"), "bilevel/solvers", "identity")


def test_the_help_and_the_flops_follow_from_it(copy: Path) -> None:
    text = " ".join(run_in(copy, "pretrain_bliss.py", "--help").stdout.split())
    assert "restarted: gradient descent from 0 in every upper step." in text
    assert "--bilevel.solver {sgd,conjugate_gradient,neumann,identity,restarted}" in text
    code = """
from megatron_bliss.bilevel.solvers import SOLVERS
print(SOLVERS["restarted"].walks(3), SOLVERS["sgd"].walks(3), SOLVERS["identity"].walks(3))
"""
    assert run_in(copy, "-c", code).stdout == "3 3 1\n"


def test_a_run_trains_with_it(copy: Path, corpus: Path, tmp_path: Path) -> None:
    small = ["--rounds", "1", "--arms", "[bliss]", "--evaluation.tasks", "[]", "--bilevel.solver_steps", "3"]
    run = ["--config", str(corpus / "config.yaml"), "--run_folder", str(tmp_path / "run"), *small]
    done = run_in(copy, "pretrain_bliss.py", *run, "--bilevel.solver", "restarted")
    assert done.returncode == 0, done.stderr
    assert "solver: restarted" in (tmp_path / "run/config.yaml").read_text()
    assert (tmp_path / "run/report.html").is_file()


def test_its_solution_is_that_of_gradient_descent(copy: Path) -> None:
    code = """
import torch
from megatron_bliss.bilevel.solvers import solve
from megatron_bliss.bilevel.solvers.solver import LinearSystem, SolverState
C, b = torch.diag(torch.tensor([1.0, 2.0, 4.0])).double(), torch.tensor([1.0, 1.0, 1.0]).double()
system = LinearSystem(lambda z: C @ z, b.clone(), 0.5)
z, info = solve("restarted", system, torch.ones(3).double(), SolverState(4.0), steps=2000, max_step_size=1.0)
print(info.products, torch.allclose(z, torch.linalg.solve(C + 0.5 * torch.eye(3).double(), b)))
"""
    assert run_in(copy, "-c", code).stdout == "1999 True\n"
