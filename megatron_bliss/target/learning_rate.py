"""The target's learning rate as a function of the iteration, over all segments of a run together.

Linear warm-up from 0, then constant, linear, cosine or warm-up-stable-decay (WSD), computed by megatron-core's
``OptimizerParamScheduler``. Iterations whose update was left out count, too: the rate depends on nothing else.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_bliss.base import learning_rate
from megatron_bliss.config.training import OptimizerConfig


def build_scheduler(optimizer, settings: OptimizerConfig, total_iterations: int) -> OptimizerParamScheduler:
    """megatron-core's scheduler of an optimizer; ValueError where the options contradict each other."""
    _check(settings, total_iterations)
    return learning_rate.build_scheduler(optimizer, settings, total_iterations)


def set_iteration(scheduler: OptimizerParamScheduler, settings: OptimizerConfig, iteration: int) -> None:
    """Put the optimizer at ``iteration`` of *this* schedule: a loaded one brings bounds of the schedule it was saved
    with, and these are the main line's where a decay branch starts."""
    for group in scheduler.optimizer.param_groups:
        group.update(max_lr=settings.lr, min_lr=settings.min_lr)
    scheduler.num_steps = iteration
    scheduler.step(0)


def learning_rate_at(settings: OptimizerConfig, iteration: int, total_iterations: int) -> float:
    """The rate of the update that follows ``iteration`` finished ones."""
    _check(settings, total_iterations)
    return learning_rate.rate_after(settings, iteration, total_iterations)


def branch_settings(
    settings: OptimizerConfig, style: str, first_iteration: int, iterations: int, total_iterations: int
) -> OptimizerConfig:
    """Options of a decay branch that leaves the main line after ``first_iteration`` iterations.

    Its rate starts from the main line's there, lr_0, and update k = 0, 1, ... of n has min_lr + (lr_0 - min_lr) c(k/n)
    with c(x) = 1 - x (linear) or 1 - sqrt(x) (minus_sqrt).
    """
    start = learning_rate_at(settings, first_iteration, total_iterations)
    return replace(
        settings,
        lr=start,
        min_lr=min(settings.min_lr, start),
        lr_warmup_iters=0,
        lr_decay_style="WSD",
        lr_wsd_decay_iters=iterations,
        lr_wsd_decay_style=style,
    )


def _check(settings: OptimizerConfig, total_iterations: int) -> None:
    option = "pretraining.optimizer."
    if settings.lr_decay_style != "constant" and settings.lr_warmup_iters >= total_iterations:
        raise ValueError(
            f"found {option}lr_warmup_iters={settings.lr_warmup_iters}, expected less than the run's "
            f"{total_iterations} iterations: lower it, or set {option}lr_decay_style=constant"
        )
    if settings.min_lr > settings.lr:
        raise ValueError(f"found {option}min_lr={settings.min_lr}, expected at most lr={settings.lr}: lower it")
    room = total_iterations - settings.lr_warmup_iters
    if settings.lr_decay_style == "WSD" and not 0 < settings.lr_wsd_decay_iters <= room:
        raise ValueError(
            f"found {option}lr_wsd_decay_iters={settings.lr_wsd_decay_iters} with lr_decay_style=WSD, expected 1 to "
            f"{room} (the run's iterations after warm-up): change it"
        )
