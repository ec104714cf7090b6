"""Bilevel steps with n-grams in the score model: ranks, micro-batches and resuming change nothing."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_bliss.base.parallel import World
from megatron_bliss.bilevel.precision import ComputeCopy
from megatron_bliss.config.models import ScoreConfig
from tests.bilevel.trainers import ALONE, CONFIG, assert_resumes, assert_same, flat, make_trainer, run_steps
from tests.distributed import run_distributed

FAMILIES = {
    "ngram": ScoreConfig(family="ngram", activation="identity", ngram_buckets=97, ngram_max=3),
    "both": ScoreConfig(family="both", head_init_std=0.5, ngram_buckets=128),
}


def on_ranks(rank: int, world_size: int) -> dict[str, dict[str, np.ndarray]]:
    world = World(dist.group.WORLD, rank, world_size, torch.device("cpu"))
    return {name: run_steps(CONFIG, torch.float64, world, score=score) for name, score in FAMILIES.items()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_steps_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    for rank, result in enumerate(run_distributed(on_ranks, world_size)):
        for name, score in FAMILIES.items():
            expected = run_steps(CONFIG, torch.float64, ALONE, score=score)
            assert_same(result[name], expected, 1e-10, f"{name}, rank {rank}")


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_do_not_depend_on_micro_batches(family: str) -> None:
    whole = run_steps(CONFIG, torch.float64, ALONE, score=FAMILIES[family])
    split = dataclasses.replace(CONFIG, micro_batch_size=3)
    assert_same(run_steps(split, torch.float64, ALONE, score=FAMILIES[family]), whole, 1e-10, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_resumed_steps_equal_uninterrupted_ones(family: str, tmp_path) -> None:
    make = partial(make_trainer, CONFIG, torch.float32, ALONE, score=FAMILIES[family])
    whole = assert_resumes(make, tmp_path / "state.pt")
    assert not np.array_equal(flat(whole.score_model), flat(make().score_model))


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_in_bf16_leave_the_table_as_it_is(family: str) -> None:
    model = make_trainer(CONFIG, torch.float32, ALONE, score=FAMILIES[family]).score_model
    passes = ComputeCopy(model, torch.bfloat16).refresh()
    assert passes.ngrams.table.dtype == torch.float32
    assert (passes is model) == (family == "ngram")  # nothing of it would be lower


@pytest.mark.parametrize("activation, warned", [("sigmoid", True), ("identity", False)])
def test_only_scores_between_0_and_1_can_be_saturated(activation: str, warned: bool) -> None:
    score = dataclasses.replace(FAMILIES["ngram"], activation=activation)
    trainer = make_trainer(CONFIG, torch.float32, ALONE, score=score)
    values = {"kl": 0.0, "entropy": 1.0, "score_std": 0.49, "residual": 0.5, "validation_loss": 1.0}
    texts = [text for step in range(9) for text in trainer.monitors.observe(step, values)]
    assert any("nearly all scores are 0 or 1" in text for text in texts) == warned
