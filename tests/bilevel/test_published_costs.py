"""FLOPs of the published step are those that torch counts, and its estimated memory follows the shapes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_bliss.bilevel.published import PublishedTrainer
from megatron_bliss.bilevel.published_costs import published_flops
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.models import ModelConfig
from megatron_bliss.models.presets import flops_per_token, resolve_architecture
from tests.bilevel.trainers import ALONE, CONFIG, LENGTH, make_trainer

PYTHIA = resolve_architecture(ModelConfig(preset="pythia-31m"), 50304)


@pytest.mark.parametrize("lower_iters", [1, 3])
def test_a_step_takes_the_work_that_is_counted(lower_iters: int) -> None:
    config = dataclasses.replace(CONFIG, lower_iters=lower_iters, upper_iters=1)
    steps = make_trainer(config, torch.float32, ALONE, trainer=PublishedTrainer)
    target = dataclasses.replace(steps.proxy.architecture, hidden_size=24, ffn_hidden_size=96)
    with FlopCounterMode(display=False) as counted:
        steps.step()
    expected = published_flops(config, steps.proxy.architecture, target, LENGTH)
    # causal attention counts as half of the products that are made, the last token's logits are not
    assert counted.get_total_flops() == pytest.approx(expected, rel=0.1)


def test_a_step_is_about_thirty_forward_passes() -> None:
    config = BilevelConfig(kl_weight=0.0, upper_iters=1)
    forward = config.global_batch_size * 1024 * flops_per_token(PYTHIA, 1024)
    assert 30 <= published_flops(config, PYTHIA, PYTHIA, 1024) / forward < 32  # and five of the score model
