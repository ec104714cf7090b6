"""How a bilevel stage is carried out: all that a run and its plan take from one way to do it.

Arms' files name their scheme, and are imported to read options: torch is imported inside the functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_bliss.bilevel.flops import bilevel_flops
from megatron_bliss.bilevel.guide_weightings import GUIDE_WEIGHTINGS
from megatron_bliss.bilevel.solvers import SOLVERS
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.models.presets import Architecture
from megatron_bliss.models.score_architecture import ScoreArchitecture

if TYPE_CHECKING:
    from megatron_bliss.bilevel.memory import StepShape


@dataclass(frozen=True)
class Scheme:
    """One way to carry out a bilevel stage."""

    trainer: Callable[..., Any]
    """The arguments of ``BilevelTrainer`` -> a trainer with its methods, monitors, and what it has learned; no domains
    where no score model gives weights."""
    flops: Callable[[BilevelConfig, Architecture, Architecture, int, ScoreArchitecture], float]
    """(options, proxy, target, sequence length, score model) -> model FLOPs of the stage in one round."""
    batches: Callable[[BilevelConfig], int]
    """Batches of the shard that an upper step draws."""
    working: Callable[[BilevelConfig, StepShape, int, int], tuple[int, int]]
    """(options, shape of a step, samples of a rank, largest graphs kept unasked in bytes) -> (samples at once, bytes
    that a step makes and drops)."""
    held_vectors: int
    """Vectors as large as the proxy that are kept between steps, beside weights and moments."""
    summed_vectors: Callable[[BilevelConfig], int]
    """Vectors as large as the proxy, in fp32, that an upper step adds up over all ranks."""
    to_shrink: str
    """What to change where a step takes too much memory; {room}: GiB that are free for it."""
    learns_scores: bool = True
    """Whether it trains a score model; without one, the trainer is given None."""
    weighs_guide_sets: bool = True
    """Whether its upper level is a weighted mean over the sets of a guide of several."""
    every_rank_draws: bool = False
    """Whether it needs a sample of each batch on every rank."""


def _engine_trainer(*arguments: Any) -> Any:
    from megatron_bliss.bilevel.train import BilevelTrainer

    return BilevelTrainer(*arguments)


def _engine_working(config: BilevelConfig, shape: StepShape, samples: int, kept: int) -> tuple[int, int]:
    from megatron_bliss.bilevel.memory import graph_bytes, planned_gradient_bytes, step_bytes
    from megatron_bliss.bilevel.train import split_batch

    at_once, recompute = split_batch(
        config, shape.arch, samples, shape.seq_length, device=shape.device, score=shape.score
    )
    at_once = min(at_once or samples, samples)
    large = graph_bytes(shape.arch, at_once * shape.seq_length, shape.element_size, dual=True) > kept
    step = step_bytes(shape, at_once, recompute=large if recompute is None else recompute)
    return at_once, max(step, planned_gradient_bytes(shape, at_once, recompute, kept))


def _engine_summed_vectors(config: BilevelConfig) -> int:
    """Gradient and product of each walk, and a gradient for each lower step but the last, for the validation batch and
    for each step of a control."""
    walks = SOLVERS[config.solver].walks(config.solver_steps)
    control = GUIDE_WEIGHTINGS[config.guide_weighting].against_control
    return 2 * walks + config.lower_iters - 1 + 1 + control * config.lower_iters


ENGINE = Scheme(
    trainer=_engine_trainer,
    flops=bilevel_flops,
    batches=lambda config: config.lower_iters,
    working=_engine_working,
    held_vectors=1,  # z
    summed_vectors=_engine_summed_vectors,
    to_shrink="set bilevel.memory_limit_gib to less than {room:.1f}, or lower micro_batch_size",
)
"""The arm bliss: bilevel/train.py."""
