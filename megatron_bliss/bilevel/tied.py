"""A proxy that is tied to the target, without a score model: the lower level of (3) with equal weights.

    G(theta_p) = (1/n) sum_i l_i + gamma (1/n) sum_i KL_i + lambda ||theta_p||²

The batches, the optimiser and the number of steps are those of the bilevel stage's lower level, so that this proxy and
that one have been trained for as long. What stands in for theta_s is nothing: all samples count the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bliss.base.platform import DTYPES
from megatron_bliss.bilevel import curvature
from megatron_bliss.bilevel.execution import Execution
from megatron_bliss.bilevel.flops import GRADIENT_PASSES
from megatron_bliss.bilevel.head import Teacher
from megatron_bliss.bilevel.losses import total_loss
from megatron_bliss.bilevel.memory import StepShape, planned_gradient_bytes
from megatron_bliss.bilevel.monitors import Limits, Monitors, check_replicas
from megatron_bliss.bilevel.objective import Loss, Objective
from megatron_bliss.bilevel.precision import ComputeCopy
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.data.batches import Batch, BatchSchedule
from megatron_bliss.models.optimizer import Optimizer
from megatron_bliss.models.presets import Architecture, flops_per_token
from megatron_bliss.models.score_architecture import ScoreArchitecture
from megatron_bliss.models.transformer import LanguageModel

if TYPE_CHECKING:
    from megatron_bliss.base.parallel import World


class TiedProxyTrainer:
    """Trains the proxy with the interface of ``BilevelTrainer``; ``step()`` is as many steps as a lower level has."""

    def __init__(
        self,
        config: BilevelConfig,
        proxy: LanguageModel,
        score_model: None,
        teacher: Callable[[Tensor], Teacher] | None,
        train: BatchSchedule,
        validation: BatchSchedule,
        world: World,
    ) -> None:
        self.config, self.proxy, self.teacher = config, proxy, teacher
        self.train, self.validation, self.world = train, validation, world
        self.optimizer = Optimizer(proxy, config.proxy_optimizer, config.upper_iters * config.lower_iters)
        self.objective = Objective(config.kl_weight, config.kl_direction, config.l2_weight, config.global_batch_size)
        self.execution = Execution(world.world_group, config.micro_batch_size, compiled=config.compile)
        self._passes = ComputeCopy(proxy, DTYPES[config.params_dtype])
        self.monitors = Monitors(Limits(config.global_batch_size, config.kl_warning_threshold), signs=("kl",))
        self.steps_done = 0

    def step(self) -> dict[str, float]:
        """T steps of the proxy; what to log, the same on every rank."""
        validation_loss = self._validation_loss()
        first = self.steps_done * self.config.lower_iters
        for number in range(first, first + self.config.lower_iters):
            values = self._lower_step(self.train.at(number).to(self.world.device))
        self.steps_done += 1
        return {"validation_loss": validation_loss, **values}

    def check_precision(self) -> list[str]:
        """Nothing to warn of: no product of second order is made."""
        return []

    def watch(self, values: dict[str, float]) -> list[str]:
        """Warnings that have become due with what the last step logged; collective.

        Raises where a number is not finite or replicas differ.
        """
        flat = torch.nn.utils.parameters_to_vector(self.proxy.parameters()).detach()
        check_replicas({"proxy": flat}, self.world.world_group)
        return self.monitors.observe(self.steps_done, values)

    def learned(self) -> dict[str, Any]:
        """The proxy, and with it what its next step would be made of: Adam's moments by name, after so many steps."""
        config, states = self.config.proxy_optimizer, self.optimizer.adamw.state
        moments = {
            name: (states[weight]["exp_avg"], states[weight]["exp_avg_sq"])
            for name, weight in self.optimizer.parameters.items()
        }
        constants = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
        adam = {"step": self.optimizer.steps_done, "moments": moments, **constants}
        return {"proxy": self.proxy.state_dict(), "adam": adam}

    def state_dict(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "steps_done": self.steps_done,
            "proxy": self.proxy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "monitors": self.monitors.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state_dict()``."""
        self.steps_done = int(state["steps_done"])
        self.proxy.load_state_dict(state["proxy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.monitors.load_state_dict(state["monitors"])

    def _lower_step(self, batch: Batch) -> dict[str, float]:
        """One AdamW step on G; what to log of its batch."""
        weights = torch.full((len(batch),), 1 / self.config.global_batch_size, device=self.world.device)  # [b]
        loss = Loss(self.objective, batch, weights, self.teacher(batch.tokens) if self.teacher else None)
        found = curvature.gradient(self._passes.refresh(), loss, self.execution)
        norm, rate = self.optimizer.step(found.gradient)
        return {"lower_loss": float(found.loss), "kl": float(found.kl), "lr": rate, "grad_norm": norm}

    def _validation_loss(self) -> float:
        """Phi (eq. 4) on this step's validation batch, by a forward pass."""
        sums = total_loss(self._passes.refresh(), self.validation.at(self.steps_done).to(self.world.device))
        if self.world.world_group is not None:
            dist.all_reduce(sums, group=self.world.world_group)
        return float(sums[0] / sums[1].clamp(min=1.0))


def tied_flops(
    config: BilevelConfig,
    proxy: Architecture,
    target: Architecture,
    seq_length: int,
    score: ScoreArchitecture | None = None,
) -> float:
    """One round: per lower step a gradient of the proxy and the target's forward pass, per upper step a forward pass
    on the validation batch."""
    tokens, forward = config.global_batch_size * seq_length, flops_per_token(proxy, seq_length)
    teacher = flops_per_token(target, seq_length) if config.kl_weight > 0 else 0.0
    lower = config.lower_iters * tokens * (GRADIENT_PASSES * forward + teacher)
    return config.upper_iters * (lower + config.validation_batch_size * seq_length * forward)


def tied_bytes(config: BilevelConfig, shape: StepShape, samples: int, kept: int) -> tuple[int, int]:
    """(samples at once, bytes that a step makes and drops)."""
    at_once = min(config.micro_batch_size or samples, samples)
    return at_once, planned_gradient_bytes(shape, at_once, None, kept)
