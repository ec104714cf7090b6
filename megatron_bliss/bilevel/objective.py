"""The two objectives: (3), which the proxy minimises, and (4), which the score model minimises through the proxy.

(3) G(theta_p)   = sum_i P_i l_i + gamma (1/n) sum_i KL_i + lambda ||theta_p||²
(4) Phi(theta_p) = sum_i v_i l_i,  v_i = labelled tokens of sample i / labelled tokens of the whole validation batch;
    of several sets Phi = sum_k w_k Phi_k

l_i and KL_i are means over the labelled tokens of sample i: of the next-token cross-entropy, and of the KL between
proxy and frozen target. P and v do not depend on theta_p, so both objectives are plain sums over samples: they split
over micro-batches and ranks exactly. How they are differentiated is the business of curvature.py.

Shapes: b samples of this rank or of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bliss.bilevel.head import KL_DIRECTIONS, Teacher
from megatron_bliss.data.batches import Batch


@dataclass(frozen=True)
class Objective:
    """(3) G = sum_i P_i l_i + gamma (1/n) sum_i KL_i + lambda ||theta||²: all of it that is not data.

    Without its last two terms it has the form of (4). Raises ValueError for a direction that there is not, and for a
    KL term over an unknown number of samples.
    """

    kl_weight: float = 0.0
    """gamma; 0: no KL term."""
    kl_direction: str = "proxy_to_target"
    """proxy_to_target: KL(proxy || target); target_to_proxy: KL(target || proxy)."""
    l2_weight: float = 0.0
    """lambda"""
    num_samples: int = 0
    """n, samples of the global batch: of all micro-batches of all ranks. Needed for the KL term only."""

    def __post_init__(self) -> None:
        if self.kl_direction not in KL_DIRECTIONS:
            expected = " or ".join(KL_DIRECTIONS)
            raise ValueError(
                f"found kl_direction {self.kl_direction!r}, expected {expected}: change bilevel.kl_direction"
            )
        if self.kl_weight and self.num_samples < 1:
            raise ValueError(
                f"found num_samples {self.num_samples} with kl_weight {self.kl_weight}, expected the samples of the "
                "global batch: the KL term is a mean over all of them"
            )

    def cross_entropy_coefficients(self, weights: Tensor, token_share: Tensor) -> Tensor:
        """a = P_i / len_i [b]: what the cross-entropy of one labelled token of sample i counts in G.

        ``weights`` [b] are P_i, ``token_share`` [b] is 1 / len_i with len_i the labelled tokens of sample i.
        """
        return weights * token_share

    def kl_coefficients(self, token_share: Tensor) -> Tensor:
        """k = gamma / (n len_i) [b]: what the KL of one labelled token of sample i counts in G."""
        return token_share * (self.kl_weight / max(self.num_samples, 1))

    def mean_kl(self, sample_kl: Tensor) -> Tensor:
        """(1/n) sum_i KL_i over the samples given: the share of some ranks or micro-batches in the mean over all n."""
        return sample_kl.sum() / max(self.num_samples, 1)

    def data_terms(self, weights: Tensor, sample_losses: Tensor, mean_kl: Tensor) -> Tensor:
        """sum_i P_i l_i + gamma (1/n) sum_i KL_i: G without its L2 term."""
        return weights @ sample_losses + self.kl_weight * mean_kl

    def l2_term(self, parameter: Tensor) -> Tensor:
        """lambda ||theta||² of one parameter."""
        return self.l2_weight * parameter.pow(2).sum()

    @property
    def l2_curvature(self) -> float:
        """2 lambda: the L2 term's gradient is 2 lambda theta, and its Hessian 2 lambda I."""
        return 2 * self.l2_weight


@dataclass(frozen=True)
class Loss:
    """An objective on the samples of this rank: what a pass of curvature.py computes."""

    objective: Objective
    batch: Batch
    weights: Tensor
    """[b]: P_i in (3), v_i in (4)."""
    teacher: Teacher | None = None
    """The frozen target on the same samples; not looked at without a KL term."""

    def __post_init__(self) -> None:
        if self.weights.shape != (len(self.batch),):
            found = tuple(self.weights.shape)
            raise ValueError(f"found weights of shape {found}, expected ({len(self.batch)},): one a sample")
        if self.objective.kl_weight and self.teacher is None:
            raise ValueError(
                f"found kl_weight {self.objective.kl_weight} without a teacher, expected its hidden states: "
                "set kl_weight 0"
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError where the teacher's tokens are not the proxy's ``vocab_size``."""
        if self.objective.kl_weight and len(self.teacher.output_weight) != vocab_size:
            raise ValueError(
                f"found a teacher with {len(self.teacher.output_weight)} tokens, expected the proxy's {vocab_size}: "
                "cut padding rows off its output matrix"
            )

    def micro_batches(self, size: int) -> Iterator[Loss]:
        """The same objective on ``size`` samples after the other (0: on all at once)."""
        for rows, batch in self.batch.micro_batches(size):
            teacher = None if self.teacher is None else self.teacher.slice(rows.start, rows.stop)
            yield Loss(self.objective, batch, self.weights[rows], teacher)


@dataclass(frozen=True)
class GuideParts:
    """Which set of a guide each sample of a batch is of (int64 [b]), and what each set weighs (float64 [K], sum 1)."""

    sets: Tensor
    weights: Tensor

    def by_set(self, values: Tensor) -> Tensor:
        """float64 [K]: the sum of values [b] over the samples of each set."""
        return torch.zeros_like(self.weights).index_add(0, self.sets, values.to(torch.float64))


def validation_loss(
    batch: Batch,
    group: dist.ProcessGroup | None = None,
    dtype: torch.dtype = torch.float32,
    parts: GuideParts | None = None,
) -> Loss:
    """(4) Phi = mean cross-entropy over all labelled tokens of the group's validation batch, as sum_i v_i l_i.

    A mean over tokens, not over samples: LAMBADA labels one word a sample, other sets every token. With ``parts``,
    Phi = sum_k w_k Phi_k of such means over each set's samples: v_i = w_k labelled_i / labelled tokens of set k.
    Collective.
    """
    labelled = batch.label_mask[:, 1:].sum(1).to(torch.float64)  # [b]; counts in fp64 are exact
    total = labelled.sum() if parts is None else parts.by_set(labelled)
    if group is not None:
        dist.all_reduce(total, group=group)
    total = total.clamp(min=1.0)
    v = labelled / total if parts is None else labelled * (parts.weights / total)[parts.sets]
    return Loss(Objective(), batch, v.to(dtype))
