"""The schedules' formulas, for the target (megatron-core's) and for the small models alike; the decay branch's."""

from __future__ import annotations

import math

import pytest

from megatron_bliss.bilevel.optimizer import learning_rate
from megatron_bliss.config import OptimizerConfig
from megatron_bliss.learning_rate import branch_settings, learning_rate_at

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
