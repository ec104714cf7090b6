"""The bilevel problem for a proxy that only counts n-grams, where both levels are solved exactly.

The proxy is a distribution q over m buckets of n-grams, and a unit with counts c_i, n_i = sum_j c_ij, has the loss
l_i(q) = - (1/n_i) sum_j c_ij log q_j. Units have weights 0 <= w_i <= 1 with sum_i w_i n_i = share * sum_i n_i: a soft
selection of this share of the n-grams. r is the distribution of all units, p that of the guide.

    lower level (3)   q_j(w) = (1 - prior) sum_i w_i c_ij / sum_i w_i n_i + prior r_j    (maximum likelihood, smoothed)
    upper level (4)   Phi(w) = - sum_j p_j log q_j(w)                                    (the guide's cross-entropy)
    influence   (6)   - dPhi/dw_i, up to a factor: sum_j c_ij p_j / q_j

Phi is convex in w, so Frank-Wolfe steps find its minimum. There a unit is kept where its influence per n-gram,
the mean of p_j / q_j over its n-grams, is above a threshold: a linear score over n-grams. Importance weights compare p
with r, the text that there is; these compare p with q, the text that is selected: what the selection has enough of
counts less. Cynical selection (Axelrod, arXiv 1709.02279) goes by the same loss, one unit after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Occurrences:
    """N-grams of units: (unit, bucket) of each, integers [e]."""

    units: np.ndarray
    buckets: np.ndarray
    num_units: int
    num_buckets: int

    def total(self, weights: np.ndarray | None = None) -> np.ndarray:
        """float64 [m]: sum_i w_i c_ij (None: every w_i is 1)."""
        each = None if weights is None else weights[self.units]
        return np.bincount(self.buckets, each, self.num_buckets).astype(np.float64)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """float64 [units]: sum_j c_ij v_j of values [m]."""
        return np.bincount(self.units, values[self.buckets], self.num_units)

    @property
    def sizes(self) -> np.ndarray:
        """int64 [units]: n_i."""
        return np.bincount(self.units, minlength=self.num_units)


@dataclass(frozen=True)
class CountSolution:
    """Where the Frank-Wolfe steps ended, and the best scores that they met."""

    ratios: np.ndarray
    """float64 [m]: p_j / q_j, 0 where q_j is 0, at the step whose scores gave the least ``kept_loss``. A unit's score
    is their mean over its n-grams."""
    weights: np.ndarray
    """float64 [units]: w, where the steps ended."""
    loss: float
    """Phi at w, in nats per n-gram."""
    kept_loss: float
    """Phi where the units of the best scores are kept whole, as a selection keeps them."""
    control_loss: float
    """Phi at q = r: of a selection at random."""
    gap: float
    """Phi at w is at most this above the minimum."""
    steps: int


def solve_counts(
    found: Occurrences, guide: np.ndarray, share: float, *, prior: float, steps: int, tolerance: float
) -> CountSolution:
    """The soft selection of ``share`` (above 0, at most 1) of the n-grams that is best for the guide.

    guide: p, float64 [m] with sum 1, 0 where no unit has the bucket. It stops after ``steps`` steps, or where the loss
    is within ``tolerance`` of the minimum. The same input gives the same bits.

    A selection keeps units whole, which w need not do, and where there are few units its scores at the minimum can keep
    worse ones than those of a step before. So the scores are those of the step whose kept units have the least Phi.
    """
    sizes, pool = found.sizes, found.total() / max(len(found.buckets), 1)
    budget, per_ngram = share * sizes.sum(), 1.0 / np.maximum(sizes, 1)

    def ratios(q: np.ndarray) -> np.ndarray:
        return np.divide(guide, q, out=np.zeros_like(q), where=pool > 0)

    def learned(w: np.ndarray) -> np.ndarray:
        total = found.total(w)
        return (1 - prior) * total / total.sum() + prior * pool

    def phi(q: np.ndarray) -> float:
        wanted = guide > 0
        return float(-(guide[wanted] * np.log(q[wanted])).sum())

    logs = np.log(ratios(pool), out=np.full(len(pool), np.log(1e-8)), where=guide > 0)
    weights = _best(found.sums(logs) * per_ngram, sizes, budget)  # the importance weights' choice is close already
    done, gap, kept_loss, scores = 0, np.inf, np.inf, np.zeros_like(pool)
    while True:
        q = learned(weights)
        found_ratios = ratios(q)
        influence = found.sums(found_ratios)
        best = _best(influence * per_ngram, sizes, budget)
        if (kept := phi(learned(best))) < kept_loss:
            kept_loss, scores = kept, found_ratios
        towards = best - weights
        gap = (1 - prior) / budget * float(towards @ influence)  # convex: Phi - min Phi <= -<grad, towards>
        if done == steps or gap <= tolerance:
            return CountSolution(scores, weights, phi(q), kept_loss, phi(pool), gap, done)
        weights = weights + towards * (2.0 / (done + 3))
        done += 1


def _best(scores: np.ndarray, sizes: np.ndarray, budget: float) -> np.ndarray:
    """w that takes the units of the best scores until ``budget`` n-grams are taken, the last one in part."""
    order = np.argsort(-scores, kind="stable")
    before = np.concatenate(([0], np.cumsum(sizes[order])[:-1]))
    weights = np.zeros(len(scores))
    weights[order] = np.clip((budget - before) / np.maximum(sizes[order], 1), 0.0, 1.0)
    return weights
