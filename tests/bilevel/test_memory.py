"""The split under a memory limit: monotone, as large as fits, and without effect on the numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_bliss.bilevel.memory import GIB, plan_step, step_bytes
from megatron_bliss.config import ModelConfig
from megatron_bliss.models.presets import resolve_architecture
from tests.bilevel.test_train import ALONE, CONFIG, assert_same, make_trainer, run_steps

PYTHIA = resolve_architecture(ModelConfig(preset="pythia-31m"), 50304)


def test_larger_steps_are_estimated_larger() -> None:
    base = step_bytes(PYTHIA, 4, 1024, recompute=True)
    assert base < step_bytes(PYTHIA, 8, 1024, recompute=True)
    assert base < step_bytes(PYTHIA, 4, 2048, recompute=True)
    assert base < step_bytes(PYTHIA, 4, 1024, recompute=False)


@pytest.mark.parametrize("limit", [0.5, 0.6, 1.0, 4.0, 64.0])
def test_the_plan_is_the_largest_that_fits(limit: float) -> None:
    plan = plan_step(PYTHIA, 16, 1024, limit_gib=limit)
    assert plan.estimated_bytes <= limit * GIB
    if plan.micro_batch_size < 16:
        assert step_bytes(PYTHIA, plan.micro_batch_size + 1, 1024, recompute=True) > limit * GIB
    if limit == 64.0:
        assert plan.micro_batch_size == 16 and plan.recompute is None


def test_a_limit_below_one_sample_says_what_would_do() -> None:
    with pytest.raises(ValueError, match="expected at least 0.*for one sample of 1024 tokens"):
        plan_step(PYTHIA, 4, 1024, limit_gib=0.01)


def test_a_limit_changes_the_split_but_no_number() -> None:
    architecture = make_trainer(CONFIG, torch.float64, ALONE).proxy.architecture
    limit = step_bytes(architecture, 3, 9, recompute=True) / GIB
    limited = dataclasses.replace(CONFIG, memory_limit_gib=limit)
    trainer = make_trainer(limited, torch.float64, ALONE)
    assert trainer.micro_batch_size in (3, 4) and trainer.recompute is True
    expected = run_steps(CONFIG, torch.float64, ALONE)
    assert_same(run_steps(limited, torch.float64, ALONE), expected, 1e-10, "memory limit")
