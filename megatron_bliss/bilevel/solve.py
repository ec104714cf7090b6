"""Solvers for eq. (5), (C + delta I) z = b with b = grad Phi: choices in one dict.

Every solver is ``solver(matvec, b, z0, *, steps, damping, max_step_size, state) -> (z, SolveInfo)`` on flat tensors;
``matvec(z)`` gives C z without the damping. The eigenvalue estimate in :class:`SolverState` lives as long as the caller
keeps it, over batches and upper-level steps.

sgd                 z + eta (b - (C + delta) z), warm-started; eta = min(max_step_size, 0.5 / (eigenvalue + delta))
conjugate_gradient  conjugate gradients from z0; stops at a direction of negative curvature, where the quadratic has no
                    minimum
neumann             the Neumann series eta sum_k (I - eta (C + delta))^k b, cut after ``steps`` products
identity            z = b: first-order alignment of gradients, an ablation

``sgd_step`` is one step of sgd from a product that is already there: the pass over a batch that gives C z gives the
influences at z and the lower gradient too, so an upper step costs one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

EIGENVALUE_DECAY = 0.995
SAFETY = 0.5
"""Share of 1 / (largest eigenvalue) that a step may take: the estimate is of another batch and from below."""

MatVec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SolverState:
    """What a solver remembers: a running maximum of ||C z|| / ||z||, a lower bound of C's largest |eigenvalue|."""

    eigenvalue: float = 0.0

    def state_dict(self) -> dict[str, float]:
        """Plain numbers for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, float]) -> SolverState:
        """The inverse of ``state_dict``."""
        return cls(**state)

    def observe(self, z_norm: float, product_norm: float, *, decay: bool = True) -> SolverState:
        """The state after a product C z was seen; the maximum decays when C is new, not over products with one C."""
        decayed = EIGENVALUE_DECAY * self.eigenvalue if decay else self.eigenvalue
        return SolverState(max(decayed, product_norm / z_norm) if z_norm > 0 else self.eigenvalue)

    def step_size(self, damping: float, max_step_size: float) -> float:
        """eta = min(max_step_size, 0.5 / (eigenvalue + delta))."""
        bound = self.eigenvalue + damping
        return min(max_step_size, SAFETY / bound) if bound > 0 else max_step_size


@dataclass(frozen=True)
class SolveInfo:
    """How a solve went: its next state, products used, and ||b - (C + delta) z|| / ||b|| before the last step."""

    state: SolverState
    products: int
    relative_residual: float
    step_size: float
    negative_curvature: bool = False


def solve(
    matvec: MatVec,
    b: Tensor,
    z0: Tensor,
    *,
    solver: str = "sgd",
    steps: int = 1,
    damping: float = 0.05,
    max_step_size: float = 1.0,
    state: SolverState | None = None,
) -> tuple[Tensor, SolveInfo]:
    """z with (C + damping I) z ≈ b, from z0 by ``steps`` products with C; b and z0 are flat tensors of one shape.

    Raises ValueError for an unknown solver, and FloatingPointError when z is no longer finite.
    """
    if solver not in SOLVERS:
        raise ValueError(f"found solver {solver!r}, expected one of {', '.join(SOLVERS)}: change bilevel.solver")
    options = {"steps": steps, "damping": damping, "max_step_size": max_step_size}
    z, info = SOLVERS[solver](matvec, b, z0, state=state or SolverState(), **options)
    if not bool(torch.isfinite(z).all()):
        raise FloatingPointError(
            f"found a non-finite z after {info.products} products of solver {solver}, expected finite numbers: lower"
            " bilevel.solver_max_step_size, raise bilevel.damping, or use bilevel.curvature gauss_newton"
        )
    return z, info


def sgd_step(
    z: Tensor,
    product: Tensor,
    b: Tensor,
    state: SolverState,
    damping: float,
    max_step_size: float,
    *,
    decay: bool = True,
) -> tuple[Tensor, SolveInfo]:
    """z + eta (b - C z - delta z) given ``product`` = C z; pure. The info's residual is that of z, before the step.

    ``decay`` says that C is not the one of the step before.
    """
    z = z.clone()
    return z, sgd_step_(z, product, b.clone(), state, damping, max_step_size, decay=decay)


def sgd_step_(
    z: Tensor,
    product: Tensor,
    b: Tensor,
    state: SolverState,
    damping: float,
    max_step_size: float,
    *,
    decay: bool = True,
) -> SolveInfo:
    """``sgd_step`` in place: z is updated and b is used up, so that no further vector of the model's size is made."""
    state = state.observe(_norm(z), _norm(product), decay=decay)
    eta, b_norm = state.step_size(damping, max_step_size), _norm(b)
    residual = b.sub_(product).sub_(z, alpha=damping)
    info = SolveInfo(state, 1, _ratio(_norm(residual), b_norm), eta)
    z.add_(residual.mul_(eta))
    return info


def gradient_descent(
    matvec: MatVec, b: Tensor, z0: Tensor, *, steps: int, damping: float, max_step_size: float, state: SolverState
) -> tuple[Tensor, SolveInfo]:
    """``steps`` of ``sgd_step`` from z0."""
    z, info = z0, SolveInfo(state, 0, float("nan"), 0.0)
    for index in range(steps):
        z, info = sgd_step(z, matvec(z), b, info.state, damping, max_step_size, decay=index == 0)
    return z, SolveInfo(info.state, steps, info.relative_residual, info.step_size)


def conjugate_gradient(
    matvec: MatVec, b: Tensor, z0: Tensor, *, steps: int, damping: float, max_step_size: float, state: SolverState
) -> tuple[Tensor, SolveInfo]:
    """Conjugate gradients from z0 (one product of ``steps`` for its residual unless z0 is 0).

    At a direction p with pᵀ (C + delta) p <= 0 it stops with what it has, or with b if it has nothing yet.
    """
    z, products = z0.clone(), 0
    residual = b.clone()
    if bool(z.any()):
        residual = b - matvec(z) - damping * z
        products = 1
    direction, square, negative, alpha = residual.clone(), float(residual.dot(residual)), False, 0.0
    target = float(torch.finfo(b.dtype).eps) ** 2 * float(b.dot(b))
    while products < steps and square > target:
        image = matvec(direction)
        products += 1
        state = state.observe(_norm(direction), _norm(image), decay=products == 1)
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
    return z, SolveInfo(state, products, _ratio(_norm(residual), _norm(b)), alpha, negative)


def neumann(
    matvec: MatVec, b: Tensor, z0: Tensor, *, steps: int, damping: float, max_step_size: float, state: SolverState
) -> tuple[Tensor, SolveInfo]:
    """eta sum_{k <= steps} (I - eta (C + delta I))^k b with one eta for all terms; z0 is not used.

    eta comes from the state when it has seen this C, else from the first product.
    """
    term, total, eta = b.clone(), b.clone(), 0.0
    for index in range(steps):
        image = matvec(term)
        state = state.observe(_norm(term), _norm(image), decay=index == 0)
        if index == 0:
            eta = state.step_size(damping, max_step_size)
        term = term.mul(1.0 - eta * damping).sub_(image, alpha=eta)
        total.add_(term)
    eta = eta or state.step_size(damping, max_step_size)
    return total.mul_(eta), SolveInfo(state, steps, _ratio(_norm(term), _norm(b)), eta)


def identity(
    matvec: MatVec, b: Tensor, z0: Tensor, *, steps: int, damping: float, max_step_size: float, state: SolverState
) -> tuple[Tensor, SolveInfo]:
    """z = b, without a product."""
    return b.clone(), SolveInfo(state, 0, float("nan"), 1.0)


SOLVERS = {
    "sgd": gradient_descent,
    "conjugate_gradient": conjugate_gradient,
    "neumann": neumann,
    "identity": identity,
}


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else 0.0
