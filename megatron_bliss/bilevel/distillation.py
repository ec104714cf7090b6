"""A score model learns the raw scores of a table of n-grams: a start from counts for a model without a table.

A step on the n samples of a global batch, with y_i the table's raw score of unit i (arms/score_starts.py):

    theta_s <- AdamW with the gradient of (1/n) sum_i (f_i - y_i)^2, which is sum_i c_i grad f_i
    c_i = 2 (f_i - y_i) / n

The gradient is that of (7) with other coefficients (hypergradient.py). The table is hashed on the way, so no target is
stored.

Shapes: b samples of this rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megatron_bliss.bilevel.execution import Execution
from megatron_bliss.bilevel.hypergradient import hypergradient, score_batch
from megatron_bliss.bilevel.monitors import check_replicas
from megatron_bliss.bilevel.precision import ComputeCopy
from megatron_bliss.config.models import ScoreConfig
from megatron_bliss.data.batches import BatchSchedule
from megatron_bliss.models.optimizer import Optimizer
from megatron_bliss.models.score import ScoreModel

if TYPE_CHECKING:
    from megatron_bliss.base.parallel import World


class Distillation:
    """A trainer for models/loop.py, data-parallel over the world; the batches are the same for every number of ranks.

    The activation plays no part: raw scores are matched. Passes over ``model`` run in ``dtype``; its weights, the sums
    and the optimiser's state keep the model's precision.
    """

    def __init__(
        self,
        config: ScoreConfig,
        model: ScoreModel,
        table: ScoreModel,
        train: BatchSchedule,
        world: World,
        execution: Execution,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``table``: whose raw scores are learnt, with the deviation ``config.start_deviation``."""
        self.score_model, self.table, self.train, self.world = model, table, train, world
        self.execution, self.variance = execution, config.start_deviation**2
        self.optimizer = Optimizer(model, config.distil_optimizer, config.distil_iters)
        self._passes = ComputeCopy(model, dtype)
        self.steps_done = 0

    def step(self) -> dict[str, float]:
        """One AdamW step; returns what to log, the same on every rank.

        ``loss``: the mean squared error of the batch before the step; ``unexplained``: the same as a share of the
        targets' variance. Raises ``FloatingPointError`` where the gradient is not finite.
        """
        batch = self.train.at(self.steps_done).to(self.world.device)
        model, size, n = self._passes.refresh(), self.execution.micro_batch_size, self.train.global_batch_size
        found, wanted = (score_batch(one, batch, micro_batch_size=size, raw=True) for one in (model, self.table))
        errors = found - wanted  # [b]
        loss = errors.double().square().sum() / n
        self.execution.add_over_ranks(loss)
        gradient = hypergradient(model, batch, 2 / n * errors, self.execution, raw=True)
        norm, rate = self.optimizer.step(gradient)
        self.steps_done += 1
        return {"loss": loss.item(), "unexplained": loss.item() / self.variance, "grad_norm": norm, "lr": rate}

    def watch(self, values: dict[str, float]) -> list[str]:
        """No warnings before units that were held back are scored; raises where replicas differ. Collective."""
        weights = torch.nn.utils.parameters_to_vector(self.score_model.parameters()).detach()
        check_replicas({"score model": weights}, self.world.world_group)
        return []

    def state_dict(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "steps_done": self.steps_done,
            "score_model": self.score_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state_dict()``."""
        self.steps_done = int(state["steps_done"])
        self.score_model.load_state_dict(state["score_model"])
        self.optimizer.load_state_dict(state["optimizer"])
