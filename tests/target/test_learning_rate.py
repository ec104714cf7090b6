"""The schedules' formulas, for the target (megatron-core's) and for the small models alike; the decay branch's."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from megatron_bliss.config.training import OptimizerConfig
from megatron_bliss.models.optimizer import learning_rate
from megatron_bliss.target.learning_rate import branch_settings, build_scheduler, learning_rate_at, set_iteration

LR, MIN_LR = 1.0, 0.1
SHARE_LEFT = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "exponential": lambda x: 2 * 0.5**x - 1,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}


def settings(style: str, wsd_style: str = "linear", warmup: int = 4) -> OptimizerConfig:
    return OptimizerConfig(
        lr=LR, min_lr=MIN_LR, lr_decay_style=style, lr_warmup_iters=warmup, lr_wsd_decay_iters=6,
        lr_wsd_decay_style=wsd_style,
    )  # fmt: skip


def decayed(style: str, share: float) -> float:
    return MIN_LR + (LR - MIN_LR) * SHARE_LEFT[style](share)


@pytest.mark.parametrize("rate", [learning_rate_at, learning_rate], ids=["target", "small models"])
def test_every_style_is_its_formula(rate):
    for style in ("linear", "cosine"):
        for step in range(5, 21):
            assert rate(settings(style), step, 20) == pytest.approx(decayed(style, (step - 4) / 16))
    for style in SHARE_LEFT:
        stable = [rate(settings("WSD", style), step, 20) for step in range(5, 15)]
        assert stable == pytest.approx([LR] * 10)
        for step in range(14, 21):
            assert rate(settings("WSD", style), step, 20) == pytest.approx(decayed(style, (step - 14) / 6))
    assert [rate(settings("constant"), step, 20) for step in (5, 20)] == [LR, LR]


def test_warm_up_rises_from_zero():
    assert [learning_rate_at(settings("WSD"), step, 20) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("style", ["linear", "minus_sqrt"])
@pytest.mark.parametrize("main, first", [("constant", 10), ("cosine", 10), ("constant", 2)])
def test_a_branch_falls_from_the_main_lines_rate(style, main, first):
    start = learning_rate_at(settings(main), first, 20)
    branch = branch_settings(settings(main), style, first, 5, 20)
    for k in range(6):
        expected = MIN_LR + (start - MIN_LR) * SHARE_LEFT[style](k / 5)
        assert learning_rate_at(branch, first + k, first + 5) == pytest.approx(expected)


def test_a_branch_never_rises():
    branch = branch_settings(settings("constant"), "linear", 0, 5, 20)  # the main line still stands at 0
    assert [learning_rate_at(branch, k, 5) for k in range(6)] == [0.0] * 6


def test_loaded_groups_take_the_bounds_of_the_schedule_they_go_on_with():
    """A checkpoint's groups carry the main line's bounds, which megatron-core would prefer to the branch's."""
    optimizer = SimpleNamespace(param_groups=[{"max_lr": LR, "min_lr": 0.0, "wd_mult": wd} for wd in (0.0, 1.0)])
    branch = branch_settings(settings("cosine"), "linear", 12, 4, 20)
    scheduler = build_scheduler(optimizer, branch, 16)
    set_iteration(scheduler, branch, 14)
    for group, weight_decay in zip(optimizer.param_groups, (0.0, branch.weight_decay), strict=True):
        assert group["lr"] == scheduler.get_lr({}) == pytest.approx((branch.lr + MIN_LR) / 2)
        assert group["weight_decay"] == weight_decay
    assert branch.lr == pytest.approx(decayed("cosine", 0.5))
