"""The control: the proxy as it would be without a selection, trained beside it on the same batches.

    theta_c <- AdamW with the gradient of G (3) at P_i = 1 / n

Samples, KL, L2 and optimiser are the proxy's. So what differs between the two is what the weights P have done.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from megatron_bliss.base.platform import DTYPES
from megatron_bliss.bilevel import curvature
from megatron_bliss.bilevel.execution import Execution
from megatron_bliss.bilevel.objective import Loss
from megatron_bliss.bilevel.precision import ComputeCopy
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.models.optimizer import Optimizer
from megatron_bliss.models.transformer import LanguageModel


class Control:
    """A copy of the proxy with an optimiser of its own."""

    def __init__(self, config: BilevelConfig, proxy: LanguageModel, execution: Execution) -> None:
        self.model, self.execution, self.num_samples = copy.deepcopy(proxy), execution, config.global_batch_size
        lower_steps = config.upper_iters * config.lower_iters
        self.optimizer = Optimizer(self.model, config.proxy_optimizer, lower_steps)
        self._passes = ComputeCopy(self.model, DTYPES[config.params_dtype])

    def sample_losses(self, loss: Loss) -> Tensor:
        """l_i [b] of this rank's samples."""
        return curvature.sample_losses(self._passes.refresh(), loss, self.execution)

    def step(self, loss: Loss) -> None:
        """One AdamW step on G (3) with equal weights in the place of those of ``loss``; collective.

        ``FloatingPointError`` where the gradient is not finite.
        """
        equal = replace(loss, weights=torch.full_like(loss.weights, 1 / self.num_samples))
        self.optimizer.step(curvature.gradient(self._passes.refresh(), equal, self.execution).gradient)

    def state_dict(self) -> dict:
        """Everything that the next step depends on."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state_dict()``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
