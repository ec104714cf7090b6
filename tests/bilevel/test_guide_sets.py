"""Φ over several sets: the weighted sum of their own losses and gradients, on any number of ranks and when resumed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_bliss.base.parallel import World
from megatron_bliss.bilevel import curvature
from megatron_bliss.bilevel.objective import validation_loss
from megatron_bliss.bilevel.train import BilevelTrainer
from megatron_bliss.data.guide import GuideSchedule, GuideSets
from tests.bilevel.trainers import ALONE, CONFIG, RandomUnits, assert_resumes, assert_same, make_trainer, run_steps
from tests.distributed import run_distributed

SIZES, WEIGHTS = (11, 6, 9), (3.0, 1.0, 2.0)


class GuidedTrainer(BilevelTrainer):
    """With a guide of three sets, of which one labels every token."""

    def __init__(self, config, proxy, score_model, teacher, train, validation, world) -> None:
        sets = [RandomUnits(size, size, last=None if size == 6 else 2) for size in SIZES]
        options = {"seed": 5, "rank": world.rank, "world_size": world.world_size}
        guide = GuideSchedule(GuideSets(sets, ["a", "b", "c"], WEIGHTS), config.validation_batch_size, **options)
        super().__init__(config, proxy, score_model, teacher, train, guide, world)


def trainer(world: World = ALONE, dtype: torch.dtype = torch.float64) -> GuidedTrainer:
    return make_trainer(CONFIG, dtype, world, trainer=GuidedTrainer)


def test_phi_and_its_gradient_are_the_weighted_sums_of_the_sets() -> None:
    made = trainer()
    batch = made.validation.at(0)
    found, by_set = made.upper.step(made.proxy, 0)
    phi, gradient = found.loss, found.gradient.flat
    expected, sums = 0.0, torch.zeros_like(gradient)
    for number, (name, weight) in enumerate(zip("abc", WEIGHTS, strict=True)):
        rows = slice(2 * number, 2 * number + 2)
        alone = curvature.gradient(made.proxy, validation_loss(batch.slice(rows.start, rows.stop), dtype=torch.float64))
        assert by_set[f"validation_loss_{name}"] == pytest.approx(float(alone.loss), rel=1e-6)
        expected += weight / 6 * float(alone.loss)
        sums += weight / 6 * alone.gradient.flat
    assert float(phi) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, sums, rtol=1e-5, atol=1e-7)


def on_ranks(rank: int, world_size: int) -> dict[str, np.ndarray]:
    world = World(dist.group.WORLD, rank, world_size, torch.device("cpu"))
    return run_steps(CONFIG, torch.float64, world, trainer=GuidedTrainer)


@pytest.mark.parametrize("world_size", [2, 4])
def test_steps_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    expected = run_steps(CONFIG, torch.float64, ALONE, trainer=GuidedTrainer)
    for rank, result in enumerate(run_distributed(on_ranks, world_size)):
        assert_same(result, expected, 1e-6, f"rank {rank}")  # v is fp32


def test_steps_do_not_depend_on_micro_batches() -> None:
    split = dataclasses.replace(CONFIG, micro_batch_size=3)
    whole = run_steps(CONFIG, torch.float64, ALONE, trainer=GuidedTrainer)
    assert_same(run_steps(split, torch.float64, ALONE, trainer=GuidedTrainer), whole, 1e-10, "split")


def test_resumed_steps_equal_uninterrupted_ones(tmp_path) -> None:
    assert_resumes(lambda: trainer(dtype=torch.float32), tmp_path / "state.pt")
