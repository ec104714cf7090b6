"""Steps of the published scheme: written out for one process, on several ranks, resumed, and counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_bliss.base import checkpoint
from megatron_bliss.base.parallel import World
from megatron_bliss.bilevel import published
from megatron_bliss.bilevel.hypergradient import score_batch
from megatron_bliss.bilevel.published import PublishedTrainer
from megatron_bliss.data.batches import Batch, rank_share
from tests.bilevel.trainers import ALONE, CONFIG, assert_same, flat, make_trainer
from tests.distributed import run_distributed

ONE = dataclasses.replace(CONFIG, lower_iters=1)
"""One lower step per upper step."""


def make(world: World = ALONE, dtype: torch.dtype = torch.float64) -> PublishedTrainer:
    return make_trainer(ONE, dtype, world, trainer=PublishedTrainer)


def rank_world(rank: int, world_size: int) -> World:
    return World(dist.group.WORLD, rank, world_size, torch.device("cpu"))


def weights_of(steps: PublishedTrainer) -> dict[str, np.ndarray]:
    return {"proxy": flat(steps.proxy), "score": flat(steps.score_model)}


def named(model: torch.nn.Module, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(dict(model.named_parameters()), tensors, strict=True))


def lower_loss(one: PublishedTrainer, batch: Batch, weights: torch.Tensor, teacher) -> torch.Tensor:
    """sum_i P_i l_i + gamma mean KL + lambda ||theta||²."""
    losses, kl = published.sample_losses(one.proxy, batch, teacher, ONE.kl_direction)
    squares = sum(parameter.square().sum() for parameter in one.proxy.parameters())
    return weights @ losses + ONE.kl_weight * kl.mean() + ONE.l2_weight * squares


def plain_step(one: PublishedTrainer, number: int, ranks: int = 1) -> None:
    """Step ``number`` written out for one process; z is the mean of solutions on the samples of each of ``ranks``."""
    parameters = list(one.proxy.parameters())
    batch, outer, validation = one.train.at(2 * number), one.train.at(2 * number + 1), one.validation.at(number)
    weights = torch.softmax(score_batch(one.score_model, batch), 0)
    loss = lower_loss(one, batch, weights, one.teacher(batch.tokens))
    one.proxy_optimizer.step(named(one.proxy, torch.autograd.grad(loss, parameters)))
    weights, teacher, solutions = torch.softmax(score_batch(one.score_model, outer), 0), one.teacher(outer.tokens), []
    for rank in range(ranks):
        start, stop = rank_share(len(outer), rank, ranks)
        part = outer.slice(start, stop), ranks * weights[start:stop], teacher.slice(start, stop)
        gradient = torch.autograd.grad(lower_loss(one, *part), parameters, create_graph=True)
        _, b = published.validation_gradient(one.proxy, validation.slice(*rank_share(len(validation), rank, ranks)))
        solutions.append(published.solve(gradient, parameters, b))
    z = [sum(parts) / ranks for parts in zip(*solutions, strict=True)]
    upper = published.clip_each(published.hypergradient(one.proxy, one.score_model, outer, z))
    one.score_optimizer.step(named(one.score_model, upper))


def after_plain_steps(count: int, dtype: torch.dtype = torch.float64, ranks: int = 1) -> dict[str, np.ndarray]:
    one = make(dtype=dtype)
    for number in range(count):
        plain_step(one, number, ranks)
    return weights_of(one)


def after_steps(steps: PublishedTrainer, count: int) -> dict[str, np.ndarray]:
    for _ in range(count):
        steps.watch(steps.step())
    return weights_of(steps)


def single_rank(rank: int, world_size: int) -> dict[str, np.ndarray]:
    return after_steps(make(rank_world(rank, world_size), torch.float32), 3)


def test_steps_of_one_rank_are_the_written_out_ones_to_the_last_bit() -> None:
    expected = after_plain_steps(3, torch.float32)
    for found in (after_steps(make(dtype=torch.float32), 3), run_distributed(single_rank, 1)[0]):
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


def on_ranks(rank: int, world_size: int) -> tuple[dict, dict]:
    steps = make(rank_world(rank, world_size))
    values = steps.step()
    scores = torch.arange(8.0, dtype=torch.float64).sin()[slice(*rank_share(8, rank, world_size))]
    return values, weights_of(steps) | {"P": published.weights_over_ranks(scores, dist.group.WORLD).numpy()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_all_but_the_system(world_size: int) -> None:
    """z is the mean of what every rank finds on its own samples, so results depend on the number of ranks."""
    results = run_distributed(on_ranks, world_size)
    alone = make()
    values, expected = alone.step(), after_plain_steps(1, ranks=world_size)
    for found_values, found in results:
        assert_same(found, expected, 1e-10, f"{world_size} ranks")
        for name in ("lower_loss", "train_loss", "kl", "entropy", "effective_samples", "score_mean", "score_std"):
            assert found_values[name] == pytest.approx(values[name], rel=1e-10)
        assert {name: found_values[name] for name in values if name != "residual"} == {
            name: results[0][0][name] for name in values if name != "residual"
        }
        np.testing.assert_array_equal(found["score"], results[0][1]["score"])
    assert_same(results[0][1], {"proxy": flat(alone.proxy)}, 1e-10, "the proxy's step")
    assert np.abs(results[0][1]["score"] - flat(alone.score_model)).max() > 1e-9
    weights = torch.softmax(torch.arange(8.0, dtype=torch.float64).sin(), 0).numpy()
    np.testing.assert_allclose(np.concatenate([found["P"] for _, found in results]), weights, rtol=1e-12)


def test_saved_and_loaded_steps_go_on_with_the_same_bits(tmp_path: Path) -> None:
    expected = after_steps(make(dtype=torch.float32), 3)
    stopped = make(dtype=torch.float32)
    after_steps(stopped, 1)
    checkpoint.save_state(tmp_path / "latest.pt", stopped.state_dict())
    resumed = make(dtype=torch.float32)
    resumed.load_state_dict(checkpoint.load_state(tmp_path / "latest.pt"))
    assert resumed.steps_done == 1 and len(resumed.monitors.validation_losses) == 1
    found = after_steps(resumed, 2)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
