"""z = b, as if C + delta I were I: first-order alignment of gradients, an ablation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_bliss.bilevel.solvers.solver import LinearSystem, SolveInfo, Solver, SolverState

if TYPE_CHECKING:
    from torch import Tensor


def identity(
    system: LinearSystem, z: Tensor, state: SolverState, *, steps: int, max_step_size: float
) -> tuple[Tensor, SolveInfo]:
    """z = b, without a product: nothing is known of a residual, so it is NaN."""
    return system.b.clone(), SolveInfo(state, 0, float("nan"), 1.0)


SOLVER = Solver(
    help="z = grad Phi, without a product (an ablation)",
    solve=identity,
    products=lambda steps: 0,
)
