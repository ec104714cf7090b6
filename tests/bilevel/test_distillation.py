"""A score model learns a table's scores: the gradient in fp64, ranks, micro-batches, resuming, units not seen."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_bliss.base.parallel import World
from megatron_bliss.bilevel.distillation import Distillation
from megatron_bliss.bilevel.execution import Execution
from megatron_bliss.bilevel.flops import distillation_flops
from megatron_bliss.bilevel.hypergradient import score_batch
from megatron_bliss.config.models import ScoreConfig
from megatron_bliss.config.training import OptimizerConfig
from megatron_bliss.data.batches import BatchSchedule, ChosenUnits
from megatron_bliss.data.ngrams import NgramBuckets
from megatron_bliss.models.presets import trunk_flops_per_token
from megatron_bliss.models.score import build_score_model
from megatron_bliss.models.transformer import build_lm
from tests.bilevel.trainers import ALONE, EOD, SIZES, VOCABULARY, RandomUnits, assert_resumes, assert_same, flat
from tests.distributed import run_distributed

OPTIMIZER = OptimizerConfig(lr=3e-3, adam_eps=1e-3)
CONFIG = ScoreConfig(
    init_from="counts",
    head_init_std=0.5,
    ngram_buckets=64,
    start_deviation=2.0,
    distil_iters=4,
    distil_batch_size=6,
    distil_optimizer=OPTIMIZER,
)


def make(
    config: ScoreConfig = CONFIG,
    dtype: torch.dtype = torch.float32,
    world: World = ALONE,
    *,
    source=None,
    micro_batch_size: int = 0,
    passes: torch.dtype = torch.float32,
) -> Distillation:
    """A trainer on random units, with a table of random numbers."""
    proxy = build_lm(SIZES, vocab_size=VOCABULARY, seed=1, dtype=dtype)
    options = {"eod": EOD, "dtype": dtype}
    model = build_score_model(config, proxy.architecture, seed=2, trunk_from=proxy, **options)
    table = build_score_model(replace(config, family="ngram"), proxy.architecture, seed=2, **options)
    numbers = torch.randn(config.ngram_buckets, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        table.ngrams.table.copy_(numbers / 8)
    place = {"rank": world.rank, "world_size": world.world_size}
    train = BatchSchedule(source or RandomUnits(40, 1), config.distil_batch_size, seed=5, **place)
    return Distillation(config, model, table, train, world, Execution(world.world_group, micro_batch_size), passes)


def test_a_step_goes_along_the_gradient_of_the_squared_error() -> None:
    """Against autograd through one unit after the other, with targets that are looked up one n-gram at a time."""
    trainer = make(dtype=torch.float64)
    model, batch, found = trainer.score_model, trainer.train.at(0), {}
    counter = NgramBuckets(CONFIG.ngram_buckets, CONFIG.ngram_max, EOD)
    numbers, errors = trainer.table.ngrams.table.detach().squeeze(1), []
    for row, length in zip(batch.tokens, batch.lengths.tolist(), strict=True):
        unit = row[:length]
        _, buckets = counter.of(unit.numpy(), np.zeros(length, int), np.arange(length))
        wanted = CONFIG.ngram_scale * numbers[buckets].mean()
        hidden = model.hidden_states(unit[None])[0].mean(0)
        errors.append(hidden @ model.head.weight[0] + model.head.bias[0] - wanted)
    loss = torch.stack(errors).square().mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    step = trainer.optimizer.step

    def observed(gradient):
        found.update({name: value.clone() for name, value in gradient.items()})
        return step(gradient)

    trainer.optimizer.step = observed
    values = trainer.step()
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert values["unexplained"] == pytest.approx(loss.item() / 4, rel=1e-12)  # the deviation asked for is 2
    for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def steps(world: World = ALONE, **options) -> dict[str, np.ndarray]:
    trainer = make(dtype=torch.float64, world=world, **options)
    values = [trainer.step() for _ in range(3)]
    assert trainer.watch(values[-1]) == []
    return {"score": flat(trainer.score_model), "values": np.array([list(one.values()) for one in values])}


SMALL = replace(CONFIG, distil_batch_size=3)  # one rank of four has no unit


def on_ranks(rank: int, world_size: int) -> list[dict[str, np.ndarray]]:
    world = World(dist.group.WORLD, rank, world_size, torch.device("cpu"))
    return [steps(world, config=config) for config in (CONFIG, SMALL)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_steps_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    expected = [steps(config=config) for config in (CONFIG, SMALL)]
    for rank, found in enumerate(run_distributed(on_ranks, world_size)):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, 1e-10, f"rank {rank}")


def test_steps_do_not_depend_on_micro_batches() -> None:
    assert_same(steps(micro_batch_size=4), steps(), 1e-10, "micro-batches")


def test_resumed_steps_equal_uninterrupted_ones(tmp_path: Path) -> None:
    whole = assert_resumes(partial(make, CONFIG), tmp_path / "state.pt")
    assert not np.array_equal(flat(whole.score_model), flat(make().score_model))


def test_passes_in_bf16_train_weights_in_fp32() -> None:
    exact, low = make(), make(passes=torch.bfloat16)
    before = flat(low.score_model)
    expected, found = exact.step(), low.step()
    assert {parameter.dtype for parameter in low.score_model.parameters()} == {torch.float32}
    assert 0 < abs(found["loss"] - expected["loss"]) < 0.02 * expected["loss"]
    moved, wanted = flat(low.score_model) - before, flat(exact.score_model) - before
    assert moved @ wanted > 0.99 * np.linalg.norm(moved) * np.linalg.norm(wanted)


def test_scores_of_counts_are_learnt_for_units_that_were_not_seen() -> None:
    optimizer = OptimizerConfig(lr=1e-2, lr_warmup_iters=10, lr_decay_style="cosine", weight_decay=0.0)
    config = replace(CONFIG, ngram_max=1, distil_iters=150, distil_batch_size=16, distil_optimizer=optimizer)
    units = RandomUnits(700, 1)
    trainer = make(config, source=ChosenUnits(units, np.arange(200, 700)))
    values = [trainer.step() for _ in range(150)]
    unseen = units.batch(np.arange(200))
    found, wanted = (score_batch(one, unseen, raw=True).numpy() for one in (trainer.score_model, trainer.table))
    ranks = [np.argsort(np.argsort(scores)) for scores in (found, wanted)]
    assert np.corrcoef(*ranks)[0, 1] > 0.95
    assert values[-1]["unexplained"] < 0.2 * values[0]["unexplained"]


def test_a_gradient_that_is_not_finite_stops_it() -> None:
    trainer = make()
    with torch.no_grad():
        trainer.table.ngrams.table.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="found gradient norm"):
        trainer.step()


def test_flops_are_those_of_the_passes_made() -> None:
    """Forward passes of both models and a gradient of one per step; forward passes over what is held back."""
    score = make().score_model.score_architecture
    trunk, table = trunk_flops_per_token(score.trunk, 9), 2 * CONFIG.ngram_max
    trained, held_back = 4 * 6 * 9, 10 * 9
    expected = trained * (4 * trunk + table) + held_back * (trunk + table)
    assert distillation_flops(CONFIG, score, 9, 10) == pytest.approx(expected, rel=1e-12)
