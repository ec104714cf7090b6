"""The data influence model of mates and mates_kl: a small model that learns measured influences from units' tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_bliss.arms.inputs import Inputs
from megatron_bliss.arms.reading import scores_of
from megatron_bliss.base import checkpoint
from megatron_bliss.base.parallel import broadcast_object, failing_together
from megatron_bliss.bilevel import vector
from megatron_bliss.config.training import OptimizerConfig
from megatron_bliss.data.batches import BatchSchedule, ChosenUnits
from megatron_bliss.models.optimizer import Optimizer
from megatron_bliss.models.score import ScoreModel


@dataclass(frozen=True)
class Regression:
    """How the model is trained."""

    arm: str
    """Whose options errors name."""
    iters: int
    batch_size: int
    """Units per step over all ranks."""
    lr: float
    """At the first step; it falls linearly to 0."""
    weight_decay: float
    held_out: float
    """Share of the measured units that training does not see."""


def learn_influences(
    settings: Regression, inputs: Inputs, units: np.ndarray, influences: np.ndarray
) -> tuple[ScoreModel, float]:
    """The trained data influence model and its rank correlation on the held-out probes, the same on every rank."""
    groups, path = inputs.groups, inputs.folder / "influence_model.pt"
    held_out = round(settings.held_out * len(units))  # the units are in random order
    mean, deviation = influences[held_out:].mean(), influences[held_out:].std()
    if not deviation > 0:
        raise ValueError(
            f"found the same influence {mean:g} for all probed units, expected different ones: raise "
            f"baselines.{settings.arm}.lr, or warm the target up longer"
        )
    model = inputs.new_score_model()
    if broadcast_object(path.is_file(), groups):
        state = checkpoint.load_state(path, groups.device)
        model.load_state_dict(state["model"])
        return model, state["correlation"]
    trainer = InfluenceRegression(settings, model, inputs, units[held_out:], (influences[held_out:] - mean) / deviation)
    inputs.train(trainer, settings.iters)
    correlation = _held_out_correlation(inputs, model, units[:held_out], influences[:held_out])
    with failing_together(groups):
        if groups.is_main:
            checkpoint.save_state(path, {"model": model.state_dict(), "correlation": correlation})
    return model, correlation


def _held_out_correlation(inputs: Inputs, model: ScoreModel, units: np.ndarray, influences: np.ndarray) -> float:
    mine = scores_of(model, inputs.source, units, inputs.groups, inputs.micro_batch_size)
    return spearman(mine, influences)


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Correlation of ranks, those of equal values averaged; 0 where one side is constant."""
    ranks = [_ranks(values) - (len(values) - 1) / 2 for values in (left, right)]
    norm = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / norm) if norm else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes + 1) / 2)[group]


class InfluenceRegression:
    """Trains a data influence model by mean squared error: a trainer for models/loop.py, data-parallel over the world.

    ``targets``: fp64 [n], of ``units``; the batches are the same for every number of ranks.
    """

    def __init__(
        self, settings: Regression, model: ScoreModel, inputs: Inputs, units: np.ndarray, targets: np.ndarray
    ) -> None:
        self.model, self.groups, self.micro_batch_size = model, inputs.groups, inputs.micro_batch_size
        source = ChosenUnits(inputs.source, units)
        self.batch_size, self.targets = settings.batch_size, torch.from_numpy(targets).float()
        self.batches = BatchSchedule(
            source,
            self.batch_size,
            seed=inputs.seed,
            rank=self.groups.rank,
            world_size=self.groups.world_size,
        )
        schedule = OptimizerConfig(lr=settings.lr, lr_decay_style="linear", weight_decay=settings.weight_decay)
        self.optimizer = Optimizer(model, schedule, settings.iters)
        self.steps_done = 0

    def step(self) -> dict[str, float]:
        """One AdamW step; returns what to log."""
        batch = self.batches.at(self.steps_done).to(self.groups.device)
        targets = self.targets.to(self.groups.device)[batch.unit_ids]
        gradient, loss = vector.zeros(self.model), torch.zeros((), dtype=torch.float64, device=self.groups.device)
        for rows, part in batch.micro_batches(self.micro_batch_size):
            errors = self.model(part.tokens, part.lengths) - targets[rows]
            part_loss = errors.square().sum() / self.batch_size
            found = torch.autograd.grad(part_loss, list(self.model.parameters()))
            for total, added in zip(gradient.values(), found, strict=True):
                total += added
            loss += part_loss.detach()
        dist.all_reduce(gradient.flat, group=self.groups.world_group)
        dist.all_reduce(loss, group=self.groups.world_group)
        norm, rate = self.optimizer.step(gradient)
        self.steps_done += 1
        return {"loss": loss.item(), "grad_norm": norm, "lr": rate}

    def watch(self, values: dict[str, float]) -> list[str]:
        """Nothing to warn of before the held-out probes are predicted."""
        return []

    def state_dict(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "steps_done": self.steps_done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state_dict()``."""
        self.steps_done = int(state["steps_done"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
