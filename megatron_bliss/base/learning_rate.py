"""megatron-core's learning-rate schedule, for the target and for the small models alike."""

from __future__ import annotations

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_bliss.config.training import OptimizerConfig


class NoOptimizer:
    """What the scheduler asks of an optimizer, where only its rate is wanted."""

    param_groups: tuple = ()


def build_scheduler(optimizer, settings: OptimizerConfig, total_iterations: int) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then as ``lr_decay_style`` says, to ``min_lr`` after ``total_iterations``."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=max(total_iterations, settings.lr_warmup_iters + 1),
        lr_decay_style=settings.lr_decay_style,
        wsd_decay_steps=settings.lr_wsd_decay_iters,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def rate_after(settings: OptimizerConfig, iterations: int, total_iterations: int) -> float:
    """The rate of the schedule where ``iterations`` are done."""
    scheduler = build_scheduler(NoOptimizer(), settings, total_iterations)
    scheduler.num_steps = iterations
    return scheduler.get_lr({})
