"""One level in place of two: score model and proxy move together, step by step, on alignment with the guide.

A step takes d_i = <grad l_i, grad Phi> at the proxy as it is, moves the score model by them, and the proxy along the
gradient of the weighted loss. No system is solved and no solution of a lower level is sought. That is the step of the
arm identity, but for what this arm leaves out: the KL term that ties the proxy to the target, and lower steps of the
proxy alone. In a run that has neither, both arms give the same scores.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_bliss.arms.arm import Arm
from megatron_bliss.arms.bliss import scores, work
from megatron_bliss.config.bilevel import BilevelConfig


def options(run: BilevelConfig) -> BilevelConfig:
    """The run's, without system, KL and lower steps of the proxy alone."""
    return replace(run, solver="identity", kl_weight=0.0, lower_iters=1)


ARM = Arm(
    "as identity, with one proxy step for each step of the score model and no KL to the target "
    "(bilevel.lower_iters 1, bilevel.kl_weight 0)",
    scores,
    stages=("bilevel",),
    bilevel_options=options,
    work=work,
)
