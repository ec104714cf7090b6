"""Model FLOPs of the stages: what a stage records when it is done, and what a plan says before it runs.

A multiply-add is two operations; a backward pass costs twice the forward pass F. Recomputation that only saves memory
is not counted, as in a model-FLOPs utilisation; that of a walk is part of the method and is.
"""

from __future__ import annotations

from megatron_bliss.config.config import BilevelConfig, PretrainingConfig, ProxyConfig
from megatron_bliss.models.presets import Architecture, flops_per_token, trunk_flops_per_token

BACKWARD_TO_FORWARD = 2
"""A backward pass costs twice the forward pass."""


def training_flops(config: PretrainingConfig, target: Architecture, seq_length: int) -> float:
    """One iteration of the target; a segment or decay branch of n iterations has n times as many."""
    forward = flops_per_token(target, seq_length)
    return (1 + BACKWARD_TO_FORWARD) * forward * (config.global_batch_size * seq_length)


def proxy_warmup_flops(config: ProxyConfig, proxy: Architecture, seq_length: int) -> float:
    """The proxy's whole warm-up."""
    tokens = config.warmup_iters * config.warmup_batch_size * seq_length
    return (1 + BACKWARD_TO_FORWARD) * tokens * flops_per_token(proxy, seq_length)


def bilevel_flops(config: BilevelConfig, proxy: Architecture, target: Architecture, seq_length: int) -> float:
    """The bilevel stage of one round, counted in forward passes F over a batch.

    A lower gradient is 3 F; a walk with recomputation 8 F (Gauss-Newton) or 12 F (Hessian); the score model's two
    forward passes and one backward 4 F; the validation gradient 3 F; the target's forward pass once per lower step.
    """
    tokens = config.global_batch_size * seq_length
    walk = {"gauss_newton": 8, "hessian": 12}[config.curvature]
    walks = config.solver_steps if config.solver == "sgd" else config.solver_steps + 1
    lower = config.lower_iters - 1
    forward = flops_per_token(proxy, seq_length)
    score = trunk_flops_per_token(proxy, seq_length)
    teacher = flops_per_token(target, seq_length) if config.kl_weight > 0 else 0.0
    validation = 3 * config.validation_batch_size * seq_length * forward
    passes = (walks * walk + 3 * lower) * forward + (4 + lower) * score + config.lower_iters * teacher
    step = tokens * passes + validation
    return config.upper_iters * step


def score_flops(tokens: int, proxy: Architecture, seq_length: int) -> float:
    """One forward pass of the score model over a shard of ``tokens`` tokens."""
    return tokens * trunk_flops_per_token(proxy, seq_length)
