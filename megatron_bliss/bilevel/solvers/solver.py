"""What a solver of (5) is given, what it gives back, and what is said of it.

No module of solvers imports torch before it computes: the options read their names and help lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

EIGENVALUE_DECAY = 0.995
"""Of the running maximum per upper step: C changes slowly, and a batch with a large eigenvalue is forgotten in time."""
SAFETY = 0.5
"""Share of 1 / (largest eigenvalue) that a step may take: the estimate is of another batch and from below."""


@dataclass(frozen=True)
class LinearSystem:
    """(5) (C + delta I) z = b: ``product(z)`` gives C z without the damping delta; b may be overwritten."""

    product: Callable[[Tensor], Tensor]
    b: Tensor
    damping: float


@dataclass(frozen=True)
class SolverState:
    """What a solver remembers over batches and upper steps: a running maximum of ||C z|| / ||z||.

    It is a lower bound of C's largest |eigenvalue|.
    """

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
    """How a solve went: its next state, products made, and ||b - (C + delta) z|| / ||b|| before the last step."""

    state: SolverState
    products: int
    relative_residual: float
    step_size: float
    negative_curvature: bool = False


class Solve(Protocol):
    """(z, how it went) from a system and a first z [parameters], by ``steps`` products; z and b may be overwritten."""

    def __call__(
        self, system: LinearSystem, z: Tensor, state: SolverState, *, steps: int, max_step_size: float
    ) -> tuple[Tensor, SolveInfo]: ...


@dataclass(frozen=True)
class Solver:
    """One way to solve (5)."""

    settings: ClassVar[None] = None
    """All solvers have the same: ``bilevel.damping``, ``solver_steps`` and ``solver_max_step_size``."""
    help: str
    """One line for the command line."""
    solve: Solve
    products: Callable[[int], int]
    """bilevel.solver_steps -> products of C in an upper step, at most."""
    last_product_gives_influences: bool = False
    """The influences d_i (6) are those of the walk that makes the last product; else one more walk makes them at the
    solution."""

    def walks(self, steps: int) -> int:
        """Walks over the proxy in an upper step: one for each product, and one more where that must give d_i."""
        return self.products(steps) + (not self.last_product_gives_influences)


def norm(x: Tensor) -> float:
    """||x||"""
    return float(x.norm())


def ratio(numerator: float, denominator: float) -> float:
    """0 where the denominator is."""
    return numerator / denominator if denominator > 0 else 0.0
