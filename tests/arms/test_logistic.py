"""The optimum against scikit-learn's, its first-order condition, and hard cases."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_bliss.arms import logistic
from megatron_bliss.arms.logistic import Occurrences, fit

FEATURES = 30


def classes(seed: int, sizes: tuple[int, int] = (40, 60), shift: float = 1.0) -> list[Occurrences]:
    """Two classes of samples of 1 to 20 features, which differ in how often each occurs; the last sample has none."""
    generator = np.random.default_rng(seed)
    found = []
    for size, tilt in zip(sizes, (shift, -shift), strict=True):
        chances = np.exp(tilt * np.linspace(-1, 1, FEATURES))
        counts = np.append(generator.integers(1, 21, size - 1), 0)
        features = generator.choice(FEATURES, counts.sum(), p=chances / chances.sum())
        found.append(Occurrences(np.repeat(np.arange(size), counts), features, size, FEATURES))
    return found


def dense(part: Occurrences) -> np.ndarray:
    """Shares of each feature, [samples, features]."""
    counts = np.zeros((part.num_samples, FEATURES))
    np.add.at(counts, (part.samples, part.features), 1)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def test_products_are_those_of_the_dense_matrix() -> None:
    part, generator = classes(0)[0], np.random.default_rng(1)
    w, v = generator.normal(size=FEATURES), generator.normal(size=part.num_samples)
    np.testing.assert_allclose(part.times(w), dense(part) @ w, atol=1e-12)
    np.testing.assert_allclose(part.transposed_times(v), dense(part).T @ v, atol=1e-12)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4, 1e-6])
def test_the_optimum_is_scikit_learns(l2: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn comes with the extra eval")
    positive, negative = classes(2)
    found = fit(positive, negative, l2)
    x, y = np.concatenate([dense(positive), dense(negative)]), np.repeat([1, -1], [40, 60])
    other = linear_model.LogisticRegression(C=1 / (l2 * len(y)), tol=1e-12, max_iter=10_000, solver="newton-cholesky")
    other.fit(x, y)
    np.testing.assert_allclose(found.weights, other.coef_[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(x @ found.weights + found.bias, other.decision_function(x), rtol=1e-4, atol=1e-4)
    margins = y * other.decision_function(x)
    assert found.loss == pytest.approx(np.log1p(np.exp(-margins)).mean() + l2 / 2 * (other.coef_**2).sum(), rel=1e-8)


def test_the_gradient_vanishes_where_classes_are_separable() -> None:
    positive, negative = classes(3, shift=20.0)
    found = fit(positive, negative, 1e-9)
    x, y = np.concatenate([dense(positive), dense(negative)]), np.repeat([1.0, -1.0], [40, 60])
    margins = y * (x @ found.weights + found.bias)
    slopes = -y / (1 + np.exp(margins)) / len(y)
    scale = np.linalg.norm(x.T @ (y / 2 / len(y)))
    assert np.linalg.norm(x.T @ slopes + 1e-9 * found.weights) < 1e-7 * scale and abs(slopes.sum()) < 1e-7 * scale
    assert (np.delete(margins, [39, 99]) > 0).all()  # those two have no feature to be told by


def test_the_same_numbers_every_time() -> None:
    first, again = (fit(*classes(4), 1e-3) for _ in range(2))
    assert np.array_equal(first.weights, again.weights) and (first.bias, first.loss) == (again.bias, again.loss)


def test_a_search_that_does_not_end_says_what_to_change(monkeypatch) -> None:
    monkeypatch.setattr(logistic, "MOST_STEPS", 1)
    with pytest.raises(
        ValueError, match="no optimum of the classifier after 1 steps, .* raise baselines.classifier.l2"
    ):
        fit(*classes(5), 1e-6)
