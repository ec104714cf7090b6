"""One whole bilevel step on any number of ranks and in any micro-batches gives the same numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_bliss.base import checkpoint
from megatron_bliss.base.parallel import World
from megatron_bliss.bilevel.train import ProxyWarmup
from megatron_bliss.config.models import ProxyConfig
from megatron_bliss.config.training import OptimizerConfig
from megatron_bliss.data.batches import BatchSchedule
from megatron_bliss.models.transformer import build_lm
from tests.bilevel.trainers import (
    ALONE,
    CONFIG,
    OPTIMIZER,
    SIZES,
    VOCABULARY,
    RandomUnits,
    assert_same,
    flat,
    make_trainer,
    run_steps,
)
from tests.distributed import run_distributed

VARIANTS = {
    "default": CONFIG,
    "micro-batches of 1": dataclasses.replace(CONFIG, micro_batch_size=1),
    "micro-batches of 3": dataclasses.replace(CONFIG, micro_batch_size=3),
    "hessian": dataclasses.replace(CONFIG, curvature="hessian"),
    "two steps of sgd": dataclasses.replace(CONFIG, solver_steps=2),
    "conjugate gradient": dataclasses.replace(CONFIG, solver="conjugate_gradient", solver_steps=3),
    "fewer samples than ranks": dataclasses.replace(CONFIG, global_batch_size=3, validation_batch_size=1),
}


def on_ranks(rank: int, world_size: int) -> dict[str, dict[str, np.ndarray]]:
    """Every variant on this rank, in both precisions."""
    world = World(dist.group.WORLD, rank, world_size, torch.device("cpu"))
    return {
        f"{name} {dtype}": run_steps(config, dtype, world)
        for name, config in VARIANTS.items()
        for dtype in (torch.float64, torch.float32)
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_steps_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    results = run_distributed(on_ranks, world_size)
    for name, config in VARIANTS.items():
        expected = run_steps(config, torch.float64, ALONE)
        for rank, result in enumerate(results):
            assert_same(result[f"{name} {torch.float64}"], expected, 1e-10, f"{name}, fp64, rank {rank}")
        single = run_steps(config, torch.float32, ALONE)
        for rank, result in enumerate(results):
            assert_same(result[f"{name} {torch.float32}"], single, 1e-5, f"{name}, fp32, rank {rank}")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_steps_do_not_depend_on_micro_batches(size: int) -> None:
    expected = run_steps(CONFIG, torch.float64, ALONE)
    split = dataclasses.replace(CONFIG, micro_batch_size=size)
    assert_same(run_steps(split, torch.float64, ALONE), expected, 1e-10, f"micro-batches of {size}")


def test_a_step_moves_scores_and_proxy() -> None:
    trainer = make_trainer(CONFIG, torch.float64, ALONE)
    proxy, score = flat(trainer.proxy), flat(trainer.score_model)
    trainer.step()
    assert np.abs(trainer.z.numpy()).max() > 0
    assert np.abs(flat(trainer.proxy) - proxy).max() > 0
    trainer.step()  # z was 0 in the first step, so its influences were too
    assert np.abs(flat(trainer.score_model) - score).max() > 0


def test_resumed_steps_equal_uninterrupted_ones(tmp_path) -> None:
    whole = make_trainer(CONFIG, torch.float32, ALONE)
    for _ in range(4):
        last = whole.step()
    first = make_trainer(CONFIG, torch.float32, ALONE)
    for _ in range(2):
        first.step()
    checkpoint.save_state(tmp_path / "state.pt", first.state_dict())
    second = make_trainer(CONFIG, torch.float32, ALONE)
    second.load_state_dict(checkpoint.load_state(tmp_path / "state.pt"))
    for _ in range(2):
        resumed = second.step()
    assert resumed == last
    assert np.array_equal(flat(whole.score_model), flat(second.score_model))
    assert np.array_equal(flat(whole.proxy), flat(second.proxy))
    assert torch.equal(whole.z, second.z)


def warm_up(dtype: torch.dtype = torch.float64, **options) -> np.ndarray:
    """The proxy's weights after three steps."""
    proxy = build_lm(SIZES, vocab_size=VOCABULARY, seed=1, dtype=dtype)
    config = ProxyConfig(warmup_optimizer=OPTIMIZER, warmup_iters=3, **options)
    trainer = ProxyWarmup(config, proxy, BatchSchedule(RandomUnits(9, 1), 5, seed=1, rank=0, world_size=1), ALONE)
    for _ in range(3):
        trainer.step()
    return flat(proxy)


def test_proxy_warm_up_in_micro_batches_and_in_bf16() -> None:
    whole = warm_up()
    np.testing.assert_allclose(warm_up(warmup_micro_batch_size=2), whole, atol=1e-12)
    low, start = (
        warm_up(torch.float32, warmup_params_dtype="bf16"),
        flat(build_lm(SIZES, vocab_size=VOCABULARY, seed=1)),
    )
    assert 0 < np.linalg.norm(low - whole) < 0.1 * np.linalg.norm(whole - start)


def test_proxy_warm_up_lowers_the_loss() -> None:
    proxy = build_lm(SIZES, vocab_size=VOCABULARY, seed=1)
    config = ProxyConfig(warmup_optimizer=OptimizerConfig(lr=1e-2), warmup_iters=40)
    schedule = BatchSchedule(
        RandomUnits(4, 1), 4, seed=1, rank=0, world_size=1
    )  # four units: they can be learnt by heart
    trainer = ProxyWarmup(config, proxy, schedule, ALONE)
    losses = [trainer.step()["loss"] for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
