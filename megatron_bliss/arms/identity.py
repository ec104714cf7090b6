"""BLISS without its linear system: a sample counts by how well its gradient is aligned with the guide's.

Of equation (5), (C + delta I) z = grad Phi, only the right-hand side is left: z = grad Phi, d_i = <grad l_i, grad Phi>.
All else is the bilevel stage of the arm bliss: the same batches, weights, lower level and hypergradient.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_bliss.arms.arm import Arm
from megatron_bliss.arms.bliss import scores, work
from megatron_bliss.config.bilevel import BilevelConfig


def options(run: BilevelConfig) -> BilevelConfig:
    """The run's, with the solver that makes no product."""
    return replace(run, solver="identity")


ARM = Arm(
    "as bliss, with z = grad Phi: first-order alignment with the guide (bilevel.solver identity)",
    scores,
    stages=("bilevel",),
    bilevel_options=options,
    work=work,
)
