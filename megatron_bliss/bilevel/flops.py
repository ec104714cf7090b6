"""Model FLOPs of the bilevel stage: what it records when it is done, and what a plan says before it runs."""

from __future__ import annotations

from megatron_bliss.bilevel.guide_weightings import GUIDE_WEIGHTINGS
from megatron_bliss.bilevel.solvers import SOLVERS
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.models import ScoreConfig
from megatron_bliss.models.families.family import ngram_architecture
from megatron_bliss.models.presets import Architecture, flops_per_token
from megatron_bliss.models.score_architecture import ScoreArchitecture

GRADIENT_PASSES = 3
"""Forward passes F that a gradient costs: its own, and a backward pass at twice that."""
WALK_PASSES = {"gauss_newton": 8, "hessian": 12}
"""The same of a walk that gives C z, gradient and influences at once; its recomputation is part of the method."""


def bilevel_flops(
    config: BilevelConfig,
    proxy: Architecture,
    target: Architecture,
    seq_length: int,
    score: ScoreArchitecture | None = None,
) -> float:
    """The bilevel stage of one round, counted in forward passes F over a batch.

    An upper step is as many walks as its solver says; a gradient for each lower step but the last, whose gradient a
    walk gives; the validation gradient; of the score model a forward pass per lower step, and a gradient; the target's
    forward pass once per lower step. A control costs a gradient per lower step, and a forward pass over the validation
    batch. ``score``: the score model's parts; None: the proxy's trunk.
    """
    score = score or ScoreArchitecture(trunk=proxy)
    tokens = config.global_batch_size * seq_length
    walks = SOLVERS[config.solver].walks(config.solver_steps)
    lower = config.lower_iters - 1
    forward = flops_per_token(proxy, seq_length)
    teacher = flops_per_token(target, seq_length) if config.kl_weight > 0 else 0.0
    control = GUIDE_WEIGHTINGS[config.guide_weighting].against_control
    validation = (GRADIENT_PASSES + control) * config.validation_batch_size * seq_length * forward
    passes = (walks * WALK_PASSES[config.curvature] + GRADIENT_PASSES * lower) * forward
    passes += control * config.lower_iters * GRADIENT_PASSES * forward
    passes += (1 + lower) * score.flops_per_token(seq_length) + score.gradient_flops_per_token(seq_length)
    passes += config.lower_iters * teacher
    return config.upper_iters * (tokens * passes + validation)


def distillation_tokens(config: ScoreConfig, seq_length: int, held_back: int) -> int:
    """Tokens of all steps' batches and of the units that are held back, as if each were ``seq_length`` long."""
    return (config.distil_iters * config.distil_batch_size + held_back) * seq_length


def distillation_flops(config: ScoreConfig, score: ScoreArchitecture, seq_length: int, held_back: int) -> float:
    """A score model without a table learns a table's scores (distillation.py), and is held against it.

    A step is a forward pass and a gradient of the score model, and a forward pass of the table; ``held_back`` units are
    read by both once. ``score``: the score model's parts.
    """
    table = ScoreArchitecture(ngrams=ngram_architecture(config))
    forward = score.flops_per_token(seq_length) + table.flops_per_token(seq_length)
    trained = config.distil_iters * config.distil_batch_size * seq_length
    read = distillation_tokens(config, seq_length, held_back)
    return read * forward + trained * score.gradient_flops_per_token(seq_length)
