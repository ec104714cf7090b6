"""FLOPs of the published step are those that torch counts, and its estimated memory follows the shapes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_bliss.bilevel.memory import StepShape
from megatron_bliss.bilevel.published import PublishedTrainer
from megatron_bliss.bilevel.published_costs import published_bytes, published_flops
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.models import ModelConfig
from megatron_bliss.models.presets import flops_per_token, resolve_architecture
from tests.bilevel.trainers import ALONE, CONFIG, LENGTH, make_trainer

SMALL = {"num_layers": 2, "hidden_size": 96, "num_attention_heads": 4}
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


def test_a_teacher_takes_more_copies_of_the_logits() -> None:
    """505 MiB measured with ``--teacher pythia-14m``."""
    shape = StepShape(resolve_architecture(ModelConfig(preset="pythia-31m", **SMALL), 16384), 64, teacher=True)
    assert published_bytes(shape, 8) / 2**20 == pytest.approx(505, rel=0.12)


@pytest.mark.parametrize(
    "sizes, vocabulary, seq_length, samples, measured",
    [
        ({}, 50304, 1024, 4, 11880),  # docs/benchmarks/bilevel_cpu.md
        (SMALL, 2048, 64, 32, 236),  # docs/benchmarks/bilevel_quickstart_cpu.md
        (SMALL, 16384, 64, 8, 348),
        (SMALL, 256, 512, 2, 179),
        ({"num_layers": 4, "hidden_size": 128, "num_attention_heads": 1}, 256, 128, 8, 140),
        ({"num_layers": 1, "hidden_size": 512, "num_attention_heads": 8}, 4096, 16, 1, 216),
    ],
)
def test_the_estimated_peak_is_near_the_measured(sizes, vocabulary, seq_length, samples, measured) -> None:
    """MiB of ``tools/benchmark.py bilevel --cases published_step``."""
    shape = StepShape(resolve_architecture(ModelConfig(preset="pythia-31m", **sizes), vocabulary), seq_length)
    assert published_bytes(shape, samples) / 2**20 == pytest.approx(measured, rel=0.12)
