"""What each domain of a shard weighs: the mean of n P_i over a domain's samples, 1 for as much as an average sample.

The mean is over all batches of the lower level since the last line of metrics, as one batch has a sample or two of a
domain. Sums over ranks travel in the all-reduce that a step makes for its other numbers, so that between steps every
rank holds the same totals: any number of ranks can go on from a state.

Shapes: b samples of this rank, D domains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_bliss.base.metrics import DOMAIN_WEIGHT
from megatron_bliss.data.unit_groups import UnitGroups


class DomainWeights:
    """Sums of n P_i and counts of samples per domain, over an interval of steps; without domains there are none."""

    def __init__(self, domains: UnitGroups | None = None) -> None:
        """``domains``: of the units of the shard; none are told apart without them."""
        self.names = domains.names if domains is not None else ()
        self._codes = torch.from_numpy(domains.codes) if domains is not None else None
        self._own = self._nothing()  # of this rank alone, in the step that is being made
        self._totals = self._nothing()  # of all ranks, in the interval
        self.last: dict[str, float] = {}
        """{domain: mean} of the last whole interval."""

    def see(self, unit_ids: Tensor, weights: Tensor, num_samples: int) -> None:
        """Take in P_i [b] of this rank's units [b] in a global batch of ``num_samples``; not collective."""
        if self._codes is None:
            return
        codes = self._codes[unit_ids.cpu()].to(weights.device)  # [b]
        is_member = codes == torch.arange(len(self.names), device=weights.device)[:, None]  # [D, b]
        relative = torch.where(is_member, num_samples * weights.detach().double(), 0.0)
        self._own = self._own.to(weights.device) + torch.stack((relative.sum(1), is_member.sum(1)))

    def own_sums(self, device: torch.device) -> Tensor:
        """What this rank has seen since the last :meth:`take`, to be added over ranks: float64 [2 D]."""
        return self._own.to(device).flatten()

    def take(self, sums: list[float]) -> None:
        """Add the sums of all ranks, [2 D], to the interval."""
        self._totals += torch.tensor(sums, dtype=torch.float64).view(2, -1) if sums else 0.0
        self._own = self._nothing()

    def metrics(self) -> dict[str, float]:
        """What to log of the interval so far; a domain without a sample in it has no number."""
        return {f"{DOMAIN_WEIGHT}{name}": mean for name, mean in self._means().items()}

    def begin_interval(self) -> None:
        """Start anew: what was seen so far has been logged."""
        self.last = self._means()
        self._totals = self._nothing()

    def state_dict(self) -> dict:
        """What a resumed stage needs to log as an uninterrupted one would."""
        return {"names": list(self.names), "totals": self._totals}

    def load_state_dict(self, state: dict | None) -> None:
        """Continue from ``state_dict()``; None, or one with other domains: the interval starts anew."""
        if state is not None and tuple(state["names"]) == self.names:
            self._totals = state["totals"].cpu()

    def _nothing(self) -> Tensor:
        return torch.zeros(2, len(self.names), dtype=torch.float64)

    def _means(self) -> dict[str, float]:
        relative, counts = self._totals.tolist()
        return {name: r / c for name, r, c in zip(self.names, relative, counts, strict=True) if c}
