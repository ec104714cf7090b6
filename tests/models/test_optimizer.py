"""The small models' optimizer: its schedule where it differs from the target's, and its clipping."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from megatron_bliss.config.training import OptimizerConfig
from megatron_bliss.models.optimizer import Optimizer, learning_rate


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "WSD"])
def test_the_first_step_moves_and_the_step_after_the_warm_up_has_the_whole_rate(style: str) -> None:
    config = OptimizerConfig(lr=1.0, lr_warmup_iters=4, lr_decay_style=style, lr_wsd_decay_iters=5)
    assert [learning_rate(config, step, 20) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(config, 19, 20) > 0  # the schedule ends after the last step, not with it


def test_a_decay_that_is_longer_than_the_run_begins_after_the_warm_up() -> None:
    config = OptimizerConfig(lr_decay_style="WSD", lr_wsd_decay_style="linear", lr_warmup_iters=4)
    fitting, longer = (
        [learning_rate(dataclasses.replace(config, lr_wsd_decay_iters=count), step, 20) for step in range(20)]
        for count in (16, 99)
    )
    assert fitting == longer and fitting[4] > fitting[5]


def test_a_run_that_ends_in_its_warm_up() -> None:
    config = OptimizerConfig(lr=1.0, lr_warmup_iters=8, lr_decay_style="cosine")
    assert [learning_rate(config, step, 3) for step in range(3)] == [0.125, 0.25, 0.375]


@pytest.mark.parametrize("clip_grad", [0.0, 0.5, 100.0])
def test_gradients_are_scaled_together_to_the_largest_norm(clip_grad: float) -> None:
    model = torch.nn.Linear(3, 2)
    gradient = {name: torch.full_like(p, 2.0) for name, p in model.named_parameters()}
    before = torch.cat([g.flatten() for g in gradient.values()]).clone()
    norm, _ = Optimizer(model, OptimizerConfig(clip_grad=clip_grad), 10).step(gradient)
    after = torch.cat([g.flatten() for g in gradient.values()])
    assert norm == pytest.approx(float(before.norm()))
    expected = before * (0.5 / float(before.norm())) if clip_grad == 0.5 else before
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=0)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    gradient = {name: torch.full_like(p, torch.nan) for name, p in model.named_parameters()}
    optimizer = Optimizer(model, OptimizerConfig(), 10)
    with pytest.raises(FloatingPointError, match="gradient norm nan at step 0"):
        optimizer.step(gradient)
    assert all(map(torch.equal, model.parameters(), before)) and optimizer.steps_done == 0


def test_a_rate_that_would_rise_is_refused() -> None:
    with pytest.raises(ValueError, match="found min_lr=0.1 and lr=0.01.*expected min_lr from 0 to lr"):
        Optimizer(torch.nn.Linear(3, 2), OptimizerConfig(lr=0.01, min_lr=0.1), 10)


def test_megatron_core_is_not_loaded_before_a_step() -> None:
    code = "import sys, megatron_bliss.bilevel.train; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
