"""How a pass over a batch is executed, as opposed to what it computes (objective.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Execution:
    """Ranks, micro-batches, memory and kernels of a pass: they change time, memory and rounding, nothing else."""

    group: dist.ProcessGroup | None = None
    """Ranks that hold a share of the global batch each; none: this rank alone."""
    micro_batch_size: int = 0
    """Samples that are worked on at once; 0: all of the rank's."""
    recompute: bool | None = None
    """Recompute each block on the way back (True), keep graphs (False), or keep them while they are small (None)."""
    compiled: bool = False
    """Element-wise work by torch.compile (kernels.py)."""

    def add_over_ranks(self, tensor: Tensor) -> None:
        """Make ``tensor`` its sum over the group, in place; collective."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)


ALONE = Execution()
"""On this rank alone, all samples at once."""
