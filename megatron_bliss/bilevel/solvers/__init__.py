"""Ways to solve (5), (C + delta I) z = b with b = grad Phi: one module a solver, by name in one table.

A solver is its module ``NAME.py`` with a record ``SOLVER`` (solver.py says what one is), and its name in ``SOLVERS``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_bliss.bilevel.solvers.solver import LinearSystem, SolveInfo, Solver, SolverState, norm
from megatron_bliss.config.choices import Choices

if TYPE_CHECKING:
    from torch import Tensor

SOLVERS: Choices[Solver] = Choices(
    "megatron_bliss.bilevel.solvers", "SOLVER", ("sgd", "conjugate_gradient", "neumann", "identity")
)
"""Name -> record; the first is the default."""


def solve(
    name: str, system: LinearSystem, z: Tensor, state: SolverState, *, steps: int, max_step_size: float
) -> tuple[Tensor, SolveInfo]:
    """(5) z with (C + delta I) z ≈ b by the solver ``name``, from ``z`` and about ``steps`` products with C.

    ``z`` and ``system.b`` are flat tensors of one shape; both may be overwritten. Raises ValueError for an unknown
    solver, and FloatingPointError when z is no longer finite.
    """
    if name not in SOLVERS:
        raise ValueError(f"found solver {name!r}, expected one of {', '.join(SOLVERS)}: change bilevel.solver")
    z, info = SOLVERS[name].solve(system, z, state, steps=steps, max_step_size=max_step_size)
    if not math.isfinite(norm(z)):
        raise FloatingPointError(
            f"found a non-finite z after {info.products} products of solver {name}, expected finite numbers: lower"
            " bilevel.solver_max_step_size, raise bilevel.damping, or use bilevel.curvature gauss_newton"
        )
    return z, info
