"""Every way to make weights: against autograd through naive code in fp64, on any number of ranks; what is logged."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_bliss.base.parallel import World
from megatron_bliss.bilevel import curvature, hypergradient
from megatron_bliss.bilevel.execution import Execution
from megatron_bliss.bilevel.weights import WEIGHTINGS
from megatron_bliss.bilevel.weights.weighting import GlobalBatch, weight_metrics
from megatron_bliss.config.models import ScoreConfig
from tests.bilevel import reference
from tests.bilevel.problems import (
    language_model,
    lower_loss,
    random_batch,
    random_vector,
    relative_error,
    score_model,
)
from tests.bilevel.trainers import ALONE, CONFIG, assert_same, make_trainer, run_steps
from tests.distributed import run_distributed

SAMPLES = 7
SPLITS = {1: [(0, 7)], 2: [(0, 3), (3, 7)], 4: [(0, 1), (1, 1), (1, 5), (5, 7)]}  # one rank of four owns nothing


@pytest.mark.parametrize("micro", [0, 2])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_hypergradient_is_that_of_naive_weights(name: str, micro: int) -> None:
    model, scorer, batch = language_model(), score_model("llama", seed=3), random_batch(SAMPLES, 9)
    z, way, shared = random_vector(model), WEIGHTINGS[name], GlobalBatch(SAMPLES)
    scores = hypergradient.score_batch(scorer, batch, micro_batch_size=micro, raw=way.of_raw_scores)
    weights = way.weights(scores, shared)
    expected = reference.WEIGHTS[name](scorer, batch)
    torch.testing.assert_close(weights, expected.detach(), rtol=1e-13, atol=0)
    assert not way.sums_to_one or float(weights.sum()) == pytest.approx(1.0)
    d = curvature.curvature_product(model, lower_loss(batch, weights), z).influence
    c, execution = way.coefficients(scores, weights, d, shared), Execution(micro_batch_size=micro)
    found = hypergradient.hypergradient(scorer, batch, c, execution, raw=way.of_raw_scores)
    change = -(expected @ reference.influences(model, batch, z))
    slope = torch.autograd.grad(change, list(scorer.parameters()))
    assert relative_error(found.flat, reference.flat(slope)) < 1e-9


def scores_of(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    places = torch.arange(SAMPLES, dtype=torch.float64)[start:stop]
    return 3 * places.sin(), places.cos()


def made(start: int, stop: int, group) -> dict[str, np.ndarray]:
    scores, influence = scores_of(start, stop)
    shared, found = GlobalBatch(SAMPLES, group), {}
    for name, way in WEIGHTINGS.items():
        weights = way.weights(scores, shared)
        found[name] = torch.stack([weights, way.coefficients(scores, weights, influence, shared)]).numpy()
    return found


def error_texts(rank: int, group) -> list[str]:
    texts, scores = [], torch.zeros(2)
    if rank == 1:
        scores[1] = float("inf")
    for way in WEIGHTINGS.values():
        with pytest.raises(ValueError) as error:
            way.weights(scores, GlobalBatch(4, group, 10 * rank + torch.arange(2), 1))
        texts.append(str(error.value))
    return texts


def steps_of(name: str, world: World) -> dict[str, np.ndarray]:
    return run_steps(dataclasses.replace(CONFIG, weights=name), torch.float64, world)


def on_rank(rank: int, world_size: int):
    world = World(dist.group.WORLD, rank, world_size, torch.device("cpu"))
    steps = {name: steps_of(name, world) for name in WEIGHTINGS}
    return made(*SPLITS[world_size][rank], dist.group.WORLD), error_texts(rank, dist.group.WORLD), steps


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_change_nothing(world_size: int) -> None:
    ranks, alone = run_distributed(on_rank, world_size), made(0, SAMPLES, None)
    for name, expected in alone.items():
        found = np.concatenate([result[name] for result, _, _ in ranks], 1)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
        single = steps_of(name, ALONE)
        for rank, (_, _, steps) in enumerate(ranks):
            assert_same(steps[name], single, 1e-10, f"{name}, rank {rank}")
    texts = {tuple(found) for _, found, _ in ranks}
    assert len(texts) == 1 and all("rank 1 micro-batch 1 position 0 unit 11: inf" in text for text in texts.pop())


def test_the_sigmoid_of_a_large_score_still_has_a_slope() -> None:
    way, shared, d = WEIGHTINGS["sigmoid"], GlobalBatch(1), torch.ones(1)
    scores = torch.tensor([30.0])
    weights = way.weights(scores, shared)
    assert weights.item() == 1.0 and way.coefficients(scores, weights, d, shared).item() == pytest.approx(
        -math.exp(-30)
    )


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_what_is_logged_is_of_sizes_that_add_up_to_1(name: str) -> None:
    way, (scores, _) = WEIGHTINGS[name], scores_of(0, SAMPLES)
    weights = way.weights(scores, GlobalBatch(SAMPLES))
    sizes, q = weights.abs(), weights.abs() / weights.abs().sum()
    sums = -(sizes * sizes.log())[sizes > 0].sum(), (weights**2).sum(), sizes.sum(), weights.sum()
    found = weight_metrics(way, SAMPLES, *(float(value) for value in sums))
    assert found["entropy"] == pytest.approx(-float((q * q.log())[q > 0].sum()), rel=1e-9)
    assert found["effective_samples"] == pytest.approx(1 / float((q**2).sum()), rel=1e-9)
    assert found.get("weight_sum", 1.0) == pytest.approx(float(weights.sum()))


def test_raw_scores_of_0_weigh_nothing_and_are_left_behind() -> None:
    """A new table of n-grams: the lower level is KL and L2 alone, and the first hypergradients move the scores."""
    config, score = dataclasses.replace(CONFIG, weights="raw"), ScoreConfig(family="ngram", ngram_buckets=97)
    trainer = make_trainer(config, torch.float64, ALONE, score=score)
    values = trainer.step()
    assert values["entropy"] == math.log(8) and values["effective_samples"] == 8 and values["weight_sum"] == 0
    values = [trainer.step() for _ in range(3)][-1]
    assert all(math.isfinite(value) for value in values.values())
    assert values["weight_sum"] != 0 and values["effective_samples"] < 8
