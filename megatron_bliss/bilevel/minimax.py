"""Weights of a guide's sets that are learnt: no set worse than the control, then the best mean.

    min over theta_s of  sum_k a_k Phi_k   such that  Phi_k - Phi_k(control) <= slack   for every set k      (4)

a_k are the guide's weights, 0 for the sets of data.reference_prefix, which are constraints alone. With multipliers
u_k >= 0 the problem's Lagrangian is, but for what theta_s does not change, (1 + sum_j u_j) sum_k w_k Phi_k with

    w_k = (a_k + u_k) / (1 + sum_j u_j)

An upper step is a step down in theta_s and one up in u, an exponentiated gradient:

    regret_k = Phi_k(proxy) - Phi_k(control)    on the step's validation batch, before either model moves
    u_k <- clip(u_k exp(rate (regret_k - slack)), U_MIN, U_MAX)

The step's own Phi has the weights of before, so that one forward pass of the control is all that a step adds beside the
control's gradients. Where theta_s and u stand still, every set obeys its constraint, and only those that reach it have
a multiplier above U_MIN: the optimum of the problem. A constraint that cannot be met drives its u_k to U_MAX.

The regret of one batch is not smoothed. log u_k is the sum of all regrets, in which the noise of a batch has a share of
``rate``; a mean over steps before it would add a delay, and a delay makes weights and proxy swing around the optimum.
Both models see the same samples, too, so most of a batch's noise is in both losses and falls out of the regret.

Shapes: b samples of this rank, K sets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_bliss.bilevel import curvature
from megatron_bliss.bilevel.control import Control
from megatron_bliss.bilevel.objective import Loss
from megatron_bliss.bilevel.upper_level import UpperLevel
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.data.batches import BatchSchedule
from megatron_bliss.models.transformer import LanguageModel

U_START = 0.1
"""Sum of the multipliers at the start: small beside the guide's own weights, whose sum is 1."""
U_MIN, U_MAX = 1e-3, 1e2
"""Bounds of a multiplier. At the lower one a set has its a_k but for a thousandth, at the upper one the mean has a
hundredth; a set whose regret changes its sign is back at 1 after log(1000) or log(100) / (rate x regret) steps."""


def minimax_weights(shares: Tensor, multipliers: Tensor) -> Tensor:
    """w_k = (a_k + u_k) / (1 + sum_j u_j), float64 [K] of sum 1, from a (sum 1) and u, float64 [K] each."""
    return (shares + multipliers) / (1 + multipliers.sum())


def moved_multipliers(multipliers: Tensor, regrets: Tensor, *, rate: float, slack: float) -> Tensor:
    """u_k exp(rate (regret_k - slack)) between U_MIN and U_MAX, float64 [K]; regrets [K] and slack in nats."""
    return (multipliers * torch.exp(rate * (regrets - slack))).clamp(U_MIN, U_MAX)


class MinimaxLevel(UpperLevel):
    """Phi with multipliers, and the control that they are learnt against.

    ``validation_loss`` is logged as sum_k a_k Phi_k, which steps and rounds can be compared by: Phi's weights move. Of
    each set: its loss, ``regret_NAME`` in nats and ``guide_weight_NAME``, w_k of this step.
    """

    def __init__(self, config: BilevelConfig, proxy: LanguageModel, validation: BatchSchedule, *others: Any) -> None:
        """As ``UpperLevel``; ValueError where the samples are not those of ``GuideSets``, which may be one set."""
        super().__init__(config, proxy, validation, *others)
        if self.sets is None:
            raise ValueError(
                f"found a {type(validation.source).__name__} as the guide of minimax, expected GuideSets: wrap the set"
            )
        self.multipliers = torch.full((len(self.sets.names),), U_START / len(self.sets.names), dtype=torch.float64)
        self.control = Control(config, proxy, self.execution)

    @property
    def weights(self) -> Tensor:
        """w (float64 [K], sum 1) of the next step; none is 0."""
        return minimax_weights(torch.from_numpy(self.sets.weights), self.multipliers)

    def step(self, proxy: LanguageModel, number: int) -> tuple[curvature.Gradient, dict[str, float]]:
        """Phi and its gradient at w, and what to log; then u moves along the regrets. Collective."""
        phi, parts = self._phi(number)
        found = curvature.gradient(proxy, phi, self.execution)
        losses = self._by_set(phi, parts, found.sample_losses).cpu()
        regrets = losses - self._by_set(phi, parts, self.control.sample_losses(phi)).cpu()
        values = {"validation_loss": float(torch.from_numpy(self.sets.weights) @ losses)}
        for what, of_sets in (("validation_loss", losses), ("regret", regrets), ("guide_weight", self.weights)):
            values |= self._named(what, of_sets)
        rate, slack = self.config.minimax_rate, self.config.minimax_slack
        self.multipliers = moved_multipliers(self.multipliers, regrets, rate=rate, slack=slack)
        return found, values

    def follow(self, loss: Loss) -> None:
        """The control makes the lower step that the proxy has made, with equal weights."""
        self.control.step(loss)

    def replicas(self) -> dict[str, Tensor]:
        """Of the control and of u."""
        control = torch.nn.utils.parameters_to_vector(self.control.model.parameters()).detach()
        return {"control": control, "guide multipliers": self.multipliers.to(control.device)}

    def learned(self) -> dict[str, Any]:
        """The control; u starts anew in every round, as the solver does."""
        return {"control": self.control.model.state_dict()}

    def carry_on(self, learned: dict[str, Any]) -> None:
        """Start from the last round's control, where the proxy starts from the last round's proxy."""
        self.control.model.load_state_dict(learned["control"])

    def state_dict(self) -> dict:
        """Control and u."""
        return {"multipliers": self.multipliers, "control": self.control.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state_dict()``."""
        self.multipliers = state["multipliers"].cpu()
        self.control.load_state_dict(state["control"])
