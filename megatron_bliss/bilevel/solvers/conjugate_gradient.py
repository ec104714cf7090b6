"""Conjugate gradients from the last z; they stop at a direction of negative curvature, where there is no minimum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_bliss.bilevel.solvers.solver import LinearSystem, SolveInfo, Solver, SolverState, norm, ratio

if TYPE_CHECKING:
    from torch import Tensor


def conjugate_gradient(
    system: LinearSystem, z: Tensor, state: SolverState, *, steps: int, max_step_size: float
) -> tuple[Tensor, SolveInfo]:
    """Conjugate gradients from z (one product of ``steps`` for its residual unless z is 0); no step size is set.

    At a direction p with pᵀ (C + delta) p <= 0 it stops with what it has, or with b if it has nothing yet.
    """
    from torch import finfo  # here, so that the options can read this module without torch

    b, damping = system.b, system.damping
    z, products = z.clone(), 0
    residual = b.clone()
    if bool(z.any()):
        residual = b - system.product(z) - damping * z
        products = 1
    direction, square, negative, alpha = residual.clone(), float(residual.dot(residual)), False, 0.0
    target = float(finfo(b.dtype).eps) ** 2 * float(b.dot(b))  # below it a residual is rounding
    while products < steps and square > target:
        image = system.product(direction)
        products += 1
        state = state.observe(norm(direction), norm(image), decay=products == 1)
        curvature = float(direction.dot(image)) + damping * float(direction.dot(direction))
        if curvature <= 0.0:
            negative = True
            break
        alpha = square / curvature
        z.add_(direction, alpha=alpha)
        residual.sub_(image, alpha=alpha).sub_(direction, alpha=alpha * damping)
        square, previous = float(residual.dot(residual)), square
        direction = residual + (square / previous) * direction
    if negative and not bool(z.any()):
        z = b.clone()
    return z, SolveInfo(state, products, ratio(norm(residual), norm(b)), alpha, negative)


SOLVER = Solver(
    help="conjugate gradients, warm-started: safe with curvature gauss_newton, stopped early by an indefinite hessian",
    solve=conjugate_gradient,
    products=lambda steps: steps,
)
