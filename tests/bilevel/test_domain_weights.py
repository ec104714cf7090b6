"""What the domains of a shard weigh: the mean of n P_i by domain over an interval, on any number of ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_bliss.base import checkpoint
from megatron_bliss.base.metrics import DOMAIN_WEIGHT
from megatron_bliss.base.parallel import World
from megatron_bliss.bilevel.domain_weights import DomainWeights
from megatron_bliss.bilevel.published import PublishedTrainer
from megatron_bliss.bilevel.train import BilevelTrainer
from megatron_bliss.data.unit_groups import UnitGroups
from tests.bilevel.trainers import ALONE, CONFIG, flat, make_trainer
from tests.distributed import run_distributed

NAMES = ("prose", "lists & <b>", "never drawn", "rare")
CODES = np.array([0, 1, 0, 1, 1] * 7 + [0, 0, 0, 0, 3], dtype=np.int8)
"""Of the 40 units of the trainers' shard."""
DOMAINS = UnitGroups(NAMES, CODES)
LEARNING = dataclasses.replace(CONFIG.score_optimizer, lr=0.1)
FAST = dataclasses.replace(CONFIG, score_optimizer=LEARNING)
"""Weights of samples are far from equal after a step or two."""
CASES = {
    "two lower steps": (FAST, BilevelTrainer),
    "identity": (dataclasses.replace(FAST, solver="identity"), BilevelTrainer),
    "single level": (dataclasses.replace(FAST, solver="identity", lower_iters=1, kl_weight=0.0), BilevelTrainer),
    "micro-batches": (dataclasses.replace(FAST, micro_batch_size=3), BilevelTrainer),
    "weights that do not sum to 1": (dataclasses.replace(FAST, weights="sigmoid"), BilevelTrainer),
    "fewer samples than ranks": (dataclasses.replace(FAST, global_batch_size=3), BilevelTrainer),
    "published": (dataclasses.replace(FAST, global_batch_size=8), PublishedTrainer),
}


def make(case: str, world: World = ALONE, dtype: torch.dtype = torch.float64):
    config, kind = CASES[case]
    return make_trainer(config, dtype, world, trainer=kind, domains=DomainWeights(DOMAINS))


def weights_in(values: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix(DOMAIN_WEIGHT): value for name, value in values.items() if name.startswith(DOMAIN_WEIGHT)}


def logged(trainer, intervals: tuple[int, ...]) -> list[dict[str, float]]:
    """What is logged of intervals of so many steps, as the loop around a trainer would do it."""
    lines = []
    for steps in intervals:
        values = [trainer.step() for _ in range(steps)][-1]
        trainer.watch(values)
        lines.append(weights_in(values))
    return lines


def sample_by_sample(case: str, intervals: tuple[int, ...]) -> list[dict[str, float]]:
    """The same from the score model itself, a sample at a time; the trainer only moves the models."""
    config, kind = CASES[case]
    trainer = make(case)
    drawn = config.lower_iters + (kind is PublishedTrainer)  # its last batch is of the upper level
    lines = []
    for steps in intervals:
        seen: dict[str, list[float]] = {}
        for _ in range(steps):
            for lower in range(config.lower_iters):
                batch = trainer.train.at(trainer.steps_done * drawn + lower)
                with torch.no_grad():
                    raw = trainer.score_model.raw_scores(batch.tokens, batch.lengths).numpy()
                scores = 1 / (1 + np.exp(-raw))
                exponentials = np.exp(scores)
                weights = scores / len(raw) if config.weights == "sigmoid" else exponentials / exponentials.sum()
                for unit, weight in zip(batch.unit_ids.tolist(), weights, strict=True):
                    seen.setdefault(NAMES[CODES[unit]], []).append(len(raw) * weight)
            trainer.step()
        lines.append({name: sum(values) / len(values) for name, values in seen.items()})
    return lines


ON_RANKS = {"two lower steps": (2, 3), "fewer samples than ranks": (2, 3), "published": (1,)}
"""Case -> intervals; published has score models that depend on the number of ranks once they have moved."""


def on_ranks(rank: int, world_size: int) -> dict[str, list[dict[str, float]]]:
    world = World(dist.group.WORLD, rank, world_size, torch.device("cpu"))
    return {case: logged(make(case, world), intervals) for case, intervals in ON_RANKS.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_line_has_the_mean_over_every_sample_of_its_interval(case: str) -> None:
    found, expected = logged(make(case), (2, 3)), sample_by_sample(case, (2, 3))
    assert max(abs(value - 1) for line in expected for value in line.values()) > 1e-3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12) and set(ours) == set(theirs)
    assert not any("never drawn" in line for line in found)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_log_what_one_process_logs(world_size: int) -> None:
    results = run_distributed(on_ranks, world_size)
    assert all(found == results[0] for found in results)  # to the last bit, as any rank's state may be saved
    for case, intervals in ON_RANKS.items():
        for ours, theirs in zip(results[0][case], sample_by_sample(case, intervals), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-10) and set(ours) == set(theirs)


@pytest.mark.parametrize("case", ["two lower steps", "published"])
def test_an_interval_that_a_restart_falls_into_is_logged_whole(case: str, tmp_path: Path) -> None:
    whole, first, second = (make(case, dtype=torch.float32) for _ in range(3))
    expected = logged(whole, (1, 4))
    logged(first, (1,)), first.step(), first.step()
    checkpoint.save_state(tmp_path / "state.pt", first.state_dict())
    second.load_state_dict(checkpoint.load_state(tmp_path / "state.pt"))
    assert logged(second, (2,)) == expected[1:]
    assert second.domains.last == whole.domains.last == expected[1]


def test_a_state_without_domains_begins_an_interval() -> None:
    saved, trainer = make("two lower steps"), make("two lower steps")
    saved.step()
    state = saved.state_dict()
    del state["domains"]
    trainer.load_state_dict(state)
    other = make_trainer(FAST, torch.float64, ALONE)  # a state of a run that told none apart
    other.step()
    again = make("two lower steps")
    again.load_state_dict(other.state_dict())
    assert logged(trainer, (2,)) == logged(again, (2,)) != logged(saved, (2,))


def test_steps_are_the_same_bits_with_domains_and_without() -> None:
    with_domains, without = make("two lower steps"), make_trainer(FAST, torch.float64, ALONE)
    for _ in range(3):
        values, plain = with_domains.step(), without.step()
    assert {name: values[name] for name in plain} == plain and not weights_in(plain)
    assert np.array_equal(flat(with_domains.score_model), flat(without.score_model))
    assert np.array_equal(flat(with_domains.proxy), flat(without.proxy))
