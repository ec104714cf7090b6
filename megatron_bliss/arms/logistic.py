"""Logistic regression on sparse features, to its optimum: Newton's method, each step by conjugate gradients.

    L(w, b) = mean_i log(1 + exp(-y_i f_i)) + l2/2 |w|^2,   f_i = <w, x_i> + b,   y_i = +1 or -1

x_i holds how often each feature occurs in sample i, as shares of all its occurrences. b is not regularised. L has one
optimum, so that it does not matter where the search starts or how it gets there. All is in fp64, and the same on every
call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

TOLERANCE = 1e-8
"""The gradient's norm at the end, as a share of that at w = 0, b = 0."""
MOST_STEPS = 200
"""Newton steps; a few tens are enough even where classes are all but separable."""


@dataclass(frozen=True)
class Occurrences:
    """Features of samples: every occurrence on its own, (sample, feature) int64 [k]."""

    samples: np.ndarray
    features: np.ndarray
    num_samples: int
    num_features: int

    def times(self, weights: np.ndarray) -> np.ndarray:
        """X w: float64 [samples]; 0 for samples without any feature."""
        sums = np.bincount(self.samples, weights=weights[self.features], minlength=self.num_samples)
        return sums / self._counts

    def transposed_times(self, values: np.ndarray) -> np.ndarray:
        """X' v: float64 [features]."""
        shares = (values / self._counts)[self.samples]
        return np.bincount(self.features, weights=shares, minlength=self.num_features)

    @cached_property
    def _counts(self) -> np.ndarray:
        """Occurrences per sample, 1 where there are none."""
        return np.maximum(np.bincount(self.samples, minlength=self.num_samples), 1)


@dataclass(frozen=True)
class Fit:
    """The optimum: w float64 [features], b, and L there."""

    weights: np.ndarray
    bias: float
    loss: float


class _Problem:
    """L of a vector [w, b], its gradient, and products of its Hessian."""

    def __init__(self, positive: Occurrences, negative: Occurrences, l2: float) -> None:
        self.parts, self.l2 = ((positive, 1.0), (negative, -1.0)), l2
        self.count = positive.num_samples + negative.num_samples

    def margins(self, point: np.ndarray) -> list[np.ndarray]:
        """y_i f_i of the samples of each class."""
        return [sign * (part.times(point[:-1]) + point[-1]) for part, sign in self.parts]

    def value(self, point: np.ndarray, margins: list[np.ndarray]) -> float:
        losses = sum(float(np.logaddexp(0.0, -margin).sum()) for margin in margins)
        return losses / self.count + self.l2 / 2 * float(point[:-1] @ point[:-1])

    def gradient(self, point: np.ndarray, margins: list[np.ndarray]) -> np.ndarray:
        slopes = [-sign * _sigmoid(-margin) for (_, sign), margin in zip(self.parts, margins, strict=True)]
        return self._back(slopes) + self.l2 * _without_bias(point)

    def hessian_times(self, margins: list[np.ndarray], direction: np.ndarray) -> np.ndarray:
        along = (part.times(direction[:-1]) + direction[-1] for part, _ in self.parts)
        curved = [_sigmoid(margin) * _sigmoid(-margin) * one for margin, one in zip(margins, along, strict=True)]
        return self._back(curved) + self.l2 * _without_bias(direction)

    def _back(self, slopes: list[np.ndarray]) -> np.ndarray:
        total = sum(part.transposed_times(slope) for (part, _), slope in zip(self.parts, slopes, strict=True))
        return np.append(total, sum(slope.sum() for slope in slopes)) / self.count


def fit(positive: Occurrences, negative: Occurrences, l2: float) -> Fit:
    """The optimum of L over two classes of samples; ValueError where it is not found, because l2 is too small."""
    problem = _Problem(positive, negative, l2)
    point = np.zeros(positive.num_features + 1)
    margins = problem.margins(point)
    value, gradient = problem.value(point, margins), problem.gradient(point, margins)
    goal = TOLERANCE * float(np.linalg.norm(gradient))
    for _ in range(MOST_STEPS):
        norm = float(np.linalg.norm(gradient))
        if norm <= goal:
            return Fit(point[:-1], float(point[-1]), value)
        step = _newton_step(problem, margins, gradient, min(0.1, (norm / max(goal, 1e-300)) ** -0.5) * norm)
        slope, size = float(gradient @ step), 1.0
        # What rounding adds to L is allowed for: near the optimum no step lowers it by more.
        while size > 1e-10 and _rises(problem, point + size * step, value + 1e-4 * size * slope + 1e-15 * abs(value)):
            size /= 2
        point = point + size * step
        margins = problem.margins(point)
        value, gradient = problem.value(point, margins), problem.gradient(point, margins)
    raise ValueError(
        f"found no optimum of the classifier after {MOST_STEPS} steps, expected one: raise baselines.classifier.l2"
    )


def _rises(problem: _Problem, point: np.ndarray, allowed: float) -> bool:
    return not problem.value(point, problem.margins(point)) <= allowed


def _newton_step(problem: _Problem, margins: list[np.ndarray], gradient: np.ndarray, tolerance: float) -> np.ndarray:
    """s with |H s + gradient| <= tolerance, by conjugate gradients from 0: every iterate is a way down."""
    step, residual = np.zeros_like(gradient), -gradient
    direction, square = residual, float(residual @ residual)
    for _ in range(2 * len(gradient)):
        if square**0.5 <= tolerance:
            break
        product = problem.hessian_times(margins, direction)
        size = square / float(direction @ product)
        step, residual = step + size * direction, residual - size * product
        before, square = square, float(residual @ residual)
        direction = residual + square / before * direction
    return step


def _without_bias(point: np.ndarray) -> np.ndarray:
    return np.append(point[:-1], 0.0)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0.0, -values))
