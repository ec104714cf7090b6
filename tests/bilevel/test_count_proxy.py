"""The best selection for a proxy that counts n-grams: against all selections, finite differences and its own bound."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from megatron_bliss.bilevel.count_proxy import CountSolution, Occurrences, solve_counts

PRIOR = 0.1
LIMITS = {"prior": PRIOR, "steps": 4000, "tolerance": 1e-4}


def problem(units: int, buckets: int, size: int | None, seed: int) -> tuple[Occurrences, np.ndarray]:
    """Units of ``size`` n-grams (None: 1 to 9) over buckets of unequal shares, and a guide that prefers some."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 10, units) if size is None else np.full(units, size)
    shares = generator.dirichlet(np.full(buckets, 0.5), units)
    drawn = [generator.choice(buckets, count, p=p) for count, p in zip(sizes, shares, strict=True)]
    found = Occurrences(np.repeat(np.arange(units), sizes), np.concatenate(drawn), units, buckets)
    guide = generator.dirichlet(np.full(buckets, 0.3)) * (found.total() > 0)
    return found, guide / guide.sum()


def naive_loss(found: Occurrences, guide: np.ndarray, weights: np.ndarray) -> float:
    """Phi(w), n-gram by n-gram."""
    learned, pool = np.zeros(found.num_buckets), np.zeros(found.num_buckets)
    for unit, bucket in zip(found.units, found.buckets, strict=True):
        learned[bucket] += weights[unit]
        pool[bucket] += 1
    q = (1 - PRIOR) * learned / learned.sum() + PRIOR * pool / pool.sum()
    return -sum(p * np.log(q[bucket]) for bucket, p in enumerate(guide) if p)


def solved(found: Occurrences, guide: np.ndarray, share: float, **changes) -> CountSolution:
    return solve_counts(found, guide, share, **LIMITS | changes)


@pytest.mark.parametrize("seed", range(5))
def test_no_selection_is_better(seed: int) -> None:
    found, guide = problem(9, 12, 6, seed)
    solution = solved(found, guide, 3 / 9)
    assert solution.weights.min() >= 0 and solution.weights.max() <= 1
    assert solution.weights.sum() == pytest.approx(3)
    assert solution.loss == pytest.approx(naive_loss(found, guide, solution.weights))
    assert solution.control_loss == pytest.approx(naive_loss(found, guide, np.ones(9)))
    losses = [naive_loss(found, guide, np.isin(np.arange(9), ids)) for ids in combinations(range(9), 3)]
    assert solution.gap <= 1e-4 and solution.loss <= min(losses) + solution.gap
    assert solution.loss < solution.control_loss < max(losses)
    kept = np.isin(np.arange(9), np.argsort(-found.sums(solution.ratios), kind="stable")[:3])
    assert solution.kept_loss == pytest.approx(naive_loss(found, guide, kept)) and solution.kept_loss >= min(losses)


@pytest.mark.parametrize("seed", range(3))
def test_no_move_from_one_unit_to_another_makes_it_better(seed: int) -> None:
    found, guide = problem(40, 30, None, seed)
    solution = solved(found, guide, 0.25)
    sizes, weights = found.sizes, solution.weights
    assert weights @ sizes == pytest.approx(0.25 * sizes.sum())
    generator = np.random.default_rng(seed)
    for _ in range(200):
        giver, taker = generator.choice(40, 2, replace=False)
        ngrams = min(weights[giver] * sizes[giver], (1 - weights[taker]) * sizes[taker]) * generator.uniform()
        moved = weights.copy()
        moved[giver] -= ngrams / sizes[giver]
        moved[taker] += ngrams / sizes[taker]
        assert naive_loss(found, guide, moved) >= solution.loss - solution.gap


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_whose_units_are_best_kept_whole(seed: int) -> None:
    """Few units: the scores at the minimum keep worse ones than the scores of a step before."""
    found, guide = problem(12, 40, None, seed)
    kept = [solved(found, guide, 0.25, steps=steps, tolerance=0.0).kept_loss for steps in range(30)]
    assert all(after <= before for before, after in zip(kept, kept[1:], strict=False))
    last = solved(found, guide, 0.25, steps=29, tolerance=0.0)
    means = found.sums(last.ratios) / np.maximum(found.sizes, 1)
    left, weights = 0.25 * found.sizes.sum(), np.zeros(12)
    for unit in np.argsort(-means, kind="stable"):
        weights[unit] = min(1.0, left / found.sizes[unit])
        left -= weights[unit] * found.sizes[unit]
    assert naive_loss(found, guide, weights) == pytest.approx(last.kept_loss) == pytest.approx(kept[-1])


def test_scores_are_the_derivatives_of_the_loss() -> None:
    found, guide = problem(12, 15, 8, seed=7)
    solution = solved(found, guide, 0.5, steps=0)
    influence = found.sums(solution.ratios)
    for unit in range(12):
        step = np.zeros(12)
        step[unit], other = 1e-6, (unit + 1) % 12
        step[other] = -1e-6  # the n-grams stay as many
        slope = (
            naive_loss(found, guide, solution.weights + step) - naive_loss(found, guide, solution.weights - step)
        ) / 2e-6
        total = solution.weights @ found.sizes
        assert -slope * total / (1 - PRIOR) == pytest.approx(influence[unit] - influence[other], rel=1e-5, abs=1e-6)


def test_the_bound_holds_after_every_step() -> None:
    found, guide = problem(30, 20, None, seed=1)
    least = solved(found, guide, 0.3).loss
    for steps in range(8):
        early = solved(found, guide, 0.3, steps=steps, tolerance=0.0)
        assert early.steps == steps and least - 1e-9 <= early.loss <= least + early.gap + 1e-12


def test_what_is_there_often_enough_counts_less_than_in_importance_weights() -> None:
    """Ten units have the n-gram 0, which is half of the guide, and two the n-gram 1, the other half."""
    buckets = np.repeat([0] * 10 + [1] * 2 + [2] * 28, 4)
    found = Occurrences(np.repeat(np.arange(40), 4), buckets, 40, 3)
    solution = solved(found, np.array([0.5, 0.5, 0.0]), 0.1)
    assert solution.weights[10:12] == pytest.approx(1, abs=0.02)
    assert solution.weights[:10].sum() == pytest.approx(2, abs=0.05)
    assert solution.weights[12:].sum() == pytest.approx(0, abs=0.02)


def test_all_of_the_units_is_no_choice() -> None:
    found, guide = problem(10, 8, None, seed=3)
    solution = solved(found, guide, 1.0)
    assert solution.weights == pytest.approx(1) and solution.loss == pytest.approx(solution.control_loss)
