"""Watch a bilevel stage for the known signs of failure, and say what to do about them.

Each sign is a pure function of what a step logs; a warning is given once per stage, when its sign has stood for
``PATIENCE`` observations. Replicas that differ between ranks are an error: nothing computed after that means anything.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_bliss.bilevel.domain_weights import DomainWeights
from megatron_bliss.bilevel.weights.weighting import GlobalBatch, Weighting, weight_metrics

PATIENCE = 5
"""Observations in a row after which a sign is believed: single batches are noisy."""
UNIFORM_ENTROPY = 0.9999
"""Share of log n, which is the entropy of equal weights: above it all samples weigh the same."""
SATURATED_DEVIATION = 0.47
"""Standard deviation of sigmoid scores whose values are nearly all 0 or 1 (0.5 if half of them are each)."""

RESIDUAL_LIMIT = 2.0
"""Times the norm of the right-hand side: z = 0 has residual 1."""
RECENT = 10
"""Observations whose mean stands for the validation loss at the end of a round."""

Values = dict[str, float]


@dataclass(frozen=True)
class Limits:
    """What a stage's values are held against: n, samples of a global batch, and the largest KL left without a word."""

    num_samples: int
    kl: float
    scores_end_at_1: bool = True
    """Whether scores lie between 0 and 1, where they can be saturated."""


def _kl_is_high(values: Values, limits: Limits) -> bool:
    return values["kl"] > limits.kl


def _weights_are_uniform(values: Values, limits: Limits) -> bool:
    return values["entropy"] > UNIFORM_ENTROPY * math.log(limits.num_samples)


def _scores_are_saturated(values: Values, limits: Limits) -> bool:
    return limits.scores_end_at_1 and values["score_std"] > SATURATED_DEVIATION


def _residual_is_high(values: Values, limits: Limits) -> bool:
    return values["residual"] > RESIDUAL_LIMIT


SIGNS: dict[str, tuple[Callable[[Values, Limits], bool], str]] = {
    "kl": (
        _kl_is_high,
        "KL between proxy and target stays above bilevel.kl_warning_threshold: what the proxy likes may not be what "
        "the target likes; raise bilevel.kl_weight, warm both up longer, or take a larger proxy",
    ),
    "uniform": (
        _weights_are_uniform,
        "the weights P are uniform: the score model does not tell samples apart; raise bilevel.score_optimizer.lr or "
        "bilevel.upper_iters",
    ),
    "saturated": (
        _scores_are_saturated,
        "nearly all scores are 0 or 1: the score model has stopped learning; lower bilevel.score_optimizer.lr, use a "
        "cosine schedule, or score.activation identity",
    ),
    "residual": (
        _residual_is_high,
        "the residual of the linear system stays above 2: z follows the noise of single batches; lower "
        "bilevel.solver_max_step_size, raise bilevel.damping or bilevel.validation_batch_size",
    ),
}
"""name -> (sign, advice)."""


def batch_metrics(
    weights: torch.Tensor,
    scores: torch.Tensor,
    losses: torch.Tensor,
    kl: float,
    batch: GlobalBatch,
    weighting: Weighting,
    domains: DomainWeights,
) -> Values:
    """What to log of a batch with P_i, s_i and l_i [b] on this rank, and a mean KL; in one small all-reduce.

    What ``domains`` have seen of their interval goes with it.
    """
    n, p, s, losses = batch.num_samples, weights.double(), scores.double(), losses.double()
    size = p.abs()
    logs = size.clamp(min=torch.finfo(size.dtype).tiny).log()  # 0 log 0 = 0
    of_weights = [-(size * logs).sum(), (p * p).sum(), size.sum(), p.sum()]
    sums = torch.stack([losses.sum() / n, s.sum() / n, (s * s).sum() / n, *of_weights])
    count, sums = len(of_weights), torch.cat((sums, domains.own_sums(sums.device)))
    if batch.group is not None:
        dist.all_reduce(sums, group=batch.group)
    train_loss, mean, second_moment, *rest = sums.tolist()
    domains.take(rest[count:])
    return {
        "train_loss": train_loss,
        "kl": kl,
        **weight_metrics(weighting, n, *rest[:count]),
        "score_mean": mean,
        "score_std": max(0.0, second_moment - mean * mean) ** 0.5,
        **domains.metrics(),
    }


class Monitors:
    """Counts signs over a stage; ``observe`` returns the warnings that have just become due."""

    def __init__(self, limits: Limits, signs: Collection[str] = tuple(SIGNS)) -> None:
        """``signs``: names of those in SIGNS that the stage logs values for."""
        self.limits = limits
        self.warnings: list[str] = []
        self.validation_losses: deque[float] = deque(maxlen=RECENT)
        self._seen = {name: deque(maxlen=PATIENCE) for name in signs}
        self._warned: set[str] = set()

    def observe(self, step: int, values: Values) -> list[str]:
        """Take in what step ``step`` logged; texts of new warnings.

        Raises ``FloatingPointError`` when a number is not finite.
        """
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        # an unsolved system (solver identity) has no residual: NaN there says "not measured"
        broken = [name for name in broken if name != "residual"]
        if broken:
            found = ", ".join(f"{name} {values[name]}" for name in broken)
            raise FloatingPointError(
                f"found {found} at step {step}, expected finite numbers: lower bilevel.proxy_optimizer.lr or "
                "bilevel.score_optimizer.lr; the state before it is in the last checkpoint"
            )
        self.validation_losses.append(values["validation_loss"])
        new = [f"step {step}: {SIGNS[name][1]}" for name in self._seen if self._is_due(name, values)]
        self.warnings += new
        return new

    @property
    def validation_loss(self) -> float | None:
        """Mean of the last observations; None before any."""
        if not self.validation_losses:
            return None
        return sum(self.validation_losses) / len(self.validation_losses)

    def state_dict(self) -> dict:
        """What a resumed stage needs to warn as an uninterrupted one would."""
        seen = {name: list(values) for name, values in self._seen.items()}
        losses = list(self.validation_losses)
        return {"warnings": self.warnings, "warned": sorted(self._warned), "seen": seen, "validation_losses": losses}

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state_dict()``."""
        self.warnings, self._warned = list(state["warnings"]), set(state["warned"])
        self._seen = {name: deque(values, maxlen=PATIENCE) for name, values in state["seen"].items()}
        self.validation_losses = deque(state["validation_losses"], maxlen=RECENT)

    def _is_due(self, name: str, values: Values) -> bool:
        seen = self._seen[name]
        seen.append(SIGNS[name][0](values, self.limits))
        due = name not in self._warned and len(seen) == PATIENCE and all(seen)
        if due:
            self._warned.add(name)
        return due


def validation_advice(last_losses: list[float]) -> str | None:
    """Advice when the validation loss at the end of the rounds so far rises past round 2; None when it does not."""
    if len(last_losses) > 2 and last_losses[-1] > last_losses[-2]:
        return (
            f"the proxy's validation loss rose from {last_losses[-2]:.4f} to {last_losses[-1]:.4f} in round "
            f"{len(last_losses)}: the score model may be overfitting the validation set; lower bilevel.upper_iters or "
            "bilevel.score_optimizer.lr, or use a larger validation set"
        )
    return None


def check_replicas(tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Raise the same ``RuntimeError`` on every rank when a tensor that must be replicated differs between ranks.

    Compares two sums per tensor, in fp64; collective over ``group``.
    """
    if group is None:
        return
    # sums, not elements: a device that computes wrongly is found for one small all-reduce
    sums = [s for tensor in tensors.values() for s in (tensor.double().sum(), tensor.double().square().sum())]
    found = torch.stack(sums)
    extremes = torch.cat((found, -found))  # one maximum gives the largest and minus the smallest
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    spread = (extremes[: len(sums)] + extremes[len(sums) :]).view(-1, 2).abs().amax(1)
    wrong = [name for name, difference in zip(tensors, spread.tolist(), strict=True) if difference != 0.0]
    if wrong:
        raise RuntimeError(
            f"found {', '.join(wrong)} to differ between ranks, expected identical copies: a device computes wrongly; "
            "look at its hardware errors, then run the same command again; it goes on from the last checkpoint"
        )
