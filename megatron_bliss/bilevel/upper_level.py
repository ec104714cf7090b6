"""The upper level (4) of a trainer: Phi and its gradient on a validation batch, and the weights of a guide's sets.

    Phi = sum_k w_k Phi_k,  Phi_k the mean cross-entropy over the labelled tokens of set k

Here w_k = a_k, the guide's own weights; minimax.py has weights that move. A guide that is one plain set has no parts.

Shapes: b samples of this rank, K sets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bliss.bilevel import curvature
from megatron_bliss.bilevel.execution import Execution
from megatron_bliss.bilevel.objective import GuideParts, Loss, validation_loss
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.data.batches import Batch, BatchSchedule
from megatron_bliss.data.guide import GuideSets
from megatron_bliss.models.transformer import LanguageModel

if TYPE_CHECKING:
    from megatron_bliss.base.parallel import World


class UpperLevel:
    """Phi with fixed weights."""

    def __init__(
        self,
        config: BilevelConfig,
        proxy: LanguageModel,
        validation: BatchSchedule,
        world: World,
        execution: Execution,
    ) -> None:
        """``proxy``: as the stage starts with it; ``execution``: of all passes."""
        self.config, self.validation, self.world, self.execution = config, validation, world, execution
        self.sets = validation.source if isinstance(validation.source, GuideSets) else None

    @property
    def weights(self) -> Tensor:
        """w (float64 [K], sum 1) of the next step, of a guide of several sets."""
        return torch.from_numpy(self.sets.weights)

    def step(self, proxy: LanguageModel, number: int) -> tuple[curvature.Gradient, dict[str, float]]:
        """Phi and its gradient on the validation batch of upper step ``number`` (from 0), and what to log; collective.

        Weights that move do so afterwards: Phi has those of before.
        """
        phi, parts = self._phi(number)
        found = curvature.gradient(proxy, phi, self.execution)
        if parts is None:
            return found, {}
        return found, self._named("validation_loss", self._by_set(phi, parts, found.sample_losses))

    def follow(self, loss: Loss) -> None:
        """Take part in a lower step that the proxy has made on ``loss``."""

    def replicas(self) -> dict[str, Tensor]:
        """What must be the same on all ranks."""
        return {}

    def learned(self) -> dict[str, Any]:
        """What the next round may go on from."""
        return {}

    def carry_on(self, learned: dict[str, Any]) -> None:
        """Start from what the last round ``learned()``, as its proxy does."""

    def state_dict(self) -> dict:
        """Everything that the next step depends on."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state_dict()``."""

    def _phi(self, number: int) -> tuple[Loss, GuideParts | None]:
        """Phi of this rank's share of a validation batch, and its parts: None for a guide of one set."""
        batch = self.validation.at(number)
        parts, batch = self._parts(batch), batch.to(self.world.device)
        return validation_loss(batch, self.world.world_group, parts=parts), parts

    def _parts(self, batch: Batch) -> GuideParts | None:
        """The sets of a batch that is still on the host."""
        if self.sets is None:
            return None
        sets = torch.from_numpy(self.sets.set_of(batch.unit_ids.numpy()))
        return GuideParts(*(part.to(self.world.device) for part in (sets, self.weights)))

    def _by_set(self, phi: Loss, parts: GuideParts, sample_losses: Tensor) -> Tensor:
        """Phi_k (float64 [K]) from l_i [b] of this rank; collective. No weight may be 0."""
        losses = parts.by_set(phi.weights * sample_losses)
        if self.world.world_group is not None:
            dist.all_reduce(losses, group=self.world.world_group)
        return losses / parts.weights

    def _named(self, what: str, values: Tensor) -> dict[str, float]:
        """Values [K] to log by the names of the sets."""
        return {f"{what}_{name}": value for name, value in zip(self.sets.names, values.tolist(), strict=True)}
