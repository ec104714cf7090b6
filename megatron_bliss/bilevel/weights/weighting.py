"""What a way to make weights is: P of the scores of a global batch (2), and how P moves with them (7).

(7) grad Phi = - sum_k d_k grad P_k = sum_i c_i grad x_i,  c_i = - sum_k d_k dP_k/dx_i,  x_i the score P is made of.

No module of weights imports torch before it computes: the options read their names and help lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class GlobalBatch:
    """What stands beside the scores [b] of this rank."""

    num_samples: int
    """n, samples of all ranks."""
    group: ProcessGroup | None = None
    """The ranks; none: this one alone."""
    unit_ids: Tensor | None = None
    """[b], for messages."""
    micro_batch_size: int = 0
    """Samples at once, for messages (0: all)."""


@dataclass(frozen=True)
class Weighting:
    """One way to make weights."""

    settings: ClassVar[None] = None
    """None has any."""
    help: str
    """One line for the command line."""
    weights: Callable[[Tensor, GlobalBatch], Tensor]
    """x [b] -> P [b], in the dtype of x; collective, ValueError on every rank where one is not finite on any."""
    coefficients: Callable[[Tensor, Tensor, Tensor, GlobalBatch], Tensor]
    """(x, P, d), [b] each -> c of (7), fp64 [b]; collective."""
    of_raw_scores: bool = True
    """Whether x is the raw score f, or the score s = a(f)."""
    sums_to_one: bool = False
    """Whether the weights of a global batch add up to 1 and none is negative."""


def weight_metrics(
    weighting: Weighting, n: int, entropy: float, square: float, total: float, signed: float
) -> dict[str, float]:
    """Entropy and effective samples of |P_i| / sum_j |P_j|, which is P where P adds up to 1 over the n samples.

    From sums over the global batch: of - |P| log |P|, P², |P| and P. Effective samples are 1 / sum P², the number of
    equal weights that are as uneven. Weights that are all 0 count as equal.
    """
    if weighting.sums_to_one:
        return {"entropy": entropy, "effective_samples": 1 / square}
    sizes = {"entropy": math.log(n), "effective_samples": float(n)}
    if total > 0:
        sizes = {"entropy": entropy / total + math.log(total), "effective_samples": total * total / square}
    return sizes | {"weight_sum": signed}


def require_finite(scores: Tensor, batch: GlobalBatch) -> None:
    """ValueError on every rank where a score of any rank is not finite."""
    from megatron_bliss.bilevel.finite_scores import largest_score

    largest_score(scores, batch.group, unit_ids=batch.unit_ids, micro_batch_size=batch.micro_batch_size)
