"""BLISS by the steps of its released code (arXiv 2510.06048): bilevel/published.py says what they are.

Three faults of that code are not repeated: attention is causal, weights are normalised by the scores of the batch at
hand, and the terms of the lower level keep their proportions on any number of ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_bliss.arms.arm import Arm
from megatron_bliss.arms.bliss import scores, work
from megatron_bliss.bilevel.scheme import Scheme
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.models.presets import Architecture
from megatron_bliss.models.score_architecture import ScoreArchitecture

if TYPE_CHECKING:
    from megatron_bliss.bilevel.memory import StepShape


def options(run: BilevelConfig) -> BilevelConfig:
    """The run's, without what changes only how the engine executes a step; it has a solver, a damping and a softmax of
    its own."""
    fixed = {"params_dtype": "fp32", "micro_batch_size": 0, "memory_limit_gib": 0.0, "compile": False}
    return replace(run, weights="softmax", **fixed)


def _trainer(*arguments: Any) -> Any:
    from megatron_bliss.bilevel.published import PublishedTrainer

    return PublishedTrainer(*arguments)


def _flops(
    config: BilevelConfig, proxy: Architecture, target: Architecture, seq_length: int, score: ScoreArchitecture
) -> float:
    from megatron_bliss.bilevel.published_costs import published_flops

    return published_flops(config, proxy, target, seq_length, score)


def _working(config: BilevelConfig, shape: StepShape, samples: int, kept: int) -> tuple[int, int]:
    from megatron_bliss.bilevel.published_costs import published_bytes

    return samples, published_bytes(shape, samples)


ARM = Arm(
    "as bliss, by the steps of its released code; each rank solves a system of its own: results depend on their number",
    scores,
    paper="2510.06048",
    stages=("bilevel",),
    bilevel_options=options,
    scheme=Scheme(
        trainer=_trainer,
        flops=_flops,
        batches=lambda config: config.lower_iters + 1,
        working=_working,
        held_vectors=0,
        summed_vectors=lambda config: config.lower_iters + 1,  # gradients, and z
        to_shrink="lower bilevel.global_batch_size or data.seq_length, use more ranks, or leave out the arm published",
        weighs_guide_sets=False,
        every_rank_draws=True,
    ),
    work=work,
)
