"""The Neumann series of the inverse, cut short: (C + delta)^-1 b = eta sum_k (I - eta (C + delta))^k b."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_bliss.bilevel.solvers.solver import LinearSystem, SolveInfo, Solver, SolverState, norm, ratio

if TYPE_CHECKING:
    from torch import Tensor


def neumann(
    system: LinearSystem, z: Tensor, state: SolverState, *, steps: int, max_step_size: float
) -> tuple[Tensor, SolveInfo]:
    """eta sum_{k <= steps} (I - eta (C + delta I))^k b with one eta for all terms; the first z is not used.

    eta is settled after the first product, by the largest eigenvalue seen so far: the series is one only for one eta.
    """
    term, total, eta = system.b.clone(), system.b.clone(), 0.0
    for index in range(steps):
        image = system.product(term)
        state = state.observe(norm(term), norm(image), decay=index == 0)
        if index == 0:
            eta = state.step_size(system.damping, max_step_size)
        term = term.mul(1.0 - eta * system.damping).sub_(image, alpha=eta)
        total.add_(term)
    eta = eta or state.step_size(system.damping, max_step_size)
    return total.mul_(eta), SolveInfo(state, steps, ratio(norm(term), norm(system.b)), eta)


SOLVER = Solver(
    help="the Neumann series of the inverse, anew in every upper step",
    solve=neumann,
    products=lambda steps: steps,
)
