"""Φ over several sets: the weighted sum of their own losses and gradients, on any number of ranks and when resumed."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_bliss.base.parallel import World
from megatron_bliss.bilevel import curvature
from megatron_bliss.bilevel.objective import validation_loss
from tests.bilevel.guided import WEIGHTS, GuidedTrainer, MinimaxTrainer
from tests.bilevel.trainers import ALONE, CONFIG, assert_resumes, assert_same, flat, make_trainer, run_steps
from tests.distributed import run_distributed

MINIMAX = dataclasses.replace(CONFIG, guide_weighting="minimax", minimax_rate=2.0)
WAYS = {"fixed": (CONFIG, GuidedTrainer), "minimax": (MINIMAX, MinimaxTrainer)}


def test_phi_and_its_gradient_are_the_weighted_sums_of_the_sets() -> None:
    made = make_trainer(CONFIG, torch.float64, ALONE, trainer=GuidedTrainer)
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


def steps(way: str, world: World = ALONE, **options) -> dict[str, np.ndarray]:
    """What three steps leave behind, the metrics of every set included."""
    config, trainer = WAYS[way]
    return run_steps(dataclasses.replace(config, **options), torch.float64, world, trainer=trainer)


def on_ranks(rank: int, world_size: int) -> dict[str, dict[str, np.ndarray]]:
    world = World(dist.group.WORLD, rank, world_size, torch.device("cpu"))
    found = {way: steps(way, world) for way in WAYS}
    trainer = make_trainer(MINIMAX, torch.float64, world, trainer=MinimaxTrainer)
    trainer.watch(trainer.step())
    assert trainer.upper.multipliers.std() > 0
    trainer.upper.multipliers *= 1 + rank
    with pytest.raises(RuntimeError, match="found guide multipliers to differ between ranks"):
        trainer.watch({})
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_steps_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    expected = {way: steps(way) for way in WAYS}
    for rank, result in enumerate(run_distributed(on_ranks, world_size)):
        for way in WAYS:
            assert_same(result[way], expected[way], 1e-6, f"{way}, rank {rank}")  # v is fp32


@pytest.mark.parametrize("way", WAYS)
def test_steps_do_not_depend_on_micro_batches(way: str) -> None:
    assert_same(steps(way, micro_batch_size=3), steps(way), 1e-10, "split")


@pytest.mark.parametrize("way", WAYS)
def test_resumed_steps_equal_uninterrupted_ones(way: str, tmp_path) -> None:
    config, trainer = WAYS[way]
    made = []

    def make() -> GuidedTrainer:
        made.append(make_trainer(config, torch.float32, ALONE, trainer=trainer))
        return made[-1]

    assert_resumes(make, tmp_path / "state.pt")
    whole, _, resumed = made
    assert np.array_equal(flat(whole.proxy), flat(resumed.proxy))
    assert torch.equal(whole.upper.weights, resumed.upper.weights)
    for name, tensor in whole.upper.replicas().items():
        assert torch.equal(tensor, resumed.upper.replicas()[name]), name
    assert len(whole.upper.replicas()) == (2 if way == "minimax" else 0)


def test_a_state_of_before_weights_could_move_is_taken_up() -> None:
    whole, resumed = (make_trainer(CONFIG, torch.float32, ALONE, trainer=GuidedTrainer) for _ in range(2))
    whole.step()
    state = copy.deepcopy(whole.state_dict())
    assert state.pop("upper") == {}
    resumed.load_state_dict(state)
    assert resumed.step() == whole.step()
    assert np.array_equal(flat(whole.proxy), flat(resumed.proxy))
