"""Gradient descent on 1/2 zᵀ (C + delta) z - bᵀ z, warm-started across upper steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_bliss.bilevel.solvers.solver import LinearSystem, SolveInfo, Solver, SolverState, norm, ratio

if TYPE_CHECKING:
    from torch import Tensor


def descend(
    system: LinearSystem, z: Tensor, state: SolverState, *, steps: int, max_step_size: float
) -> tuple[Tensor, SolveInfo]:
    """``steps`` times z <- z + eta (b - C z - delta z), eta = min(max_step_size, 0.5 / (largest eigenvalue + delta)).

    In place, and the last step uses b up, so that no further vector of the model's size is made. The residual is that
    of the last z before its step: it costs nothing there.
    """
    residual_norm, eta, b_norm = float("nan"), 0.0, norm(system.b)
    for index in range(steps):
        product = system.product(z)
        state = state.observe(norm(z), norm(product), decay=index == 0)
        eta = state.step_size(system.damping, max_step_size)
        residual = system.b if index == steps - 1 else system.b.clone()
        residual.sub_(product).sub_(z, alpha=system.damping)
        residual_norm = norm(residual)
        del product  # the walk behind it is freed before the next one
        z.add_(residual.mul_(eta))
    return z, SolveInfo(state, steps, ratio(residual_norm, b_norm), eta)


SOLVER = Solver(
    help="gradient descent, warm-started: one step for each product",
    solve=descend,
    products=lambda steps: steps,
    last_product_gives_influences=True,
)
