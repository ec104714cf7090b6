"""A bilevel problem whose lower level is solved exactly: ridge regression on groups of samples with weights p [3].

Two sets of the guide are like the first group, a third one is like the last: the mean of the first two is best where
the third one is hurt.
"""

from __future__ import annotations

import numpy as np

L2, SAMPLES = 1e-2, 40
TRUTH = np.array([[1.0, 0.0, 0.0, 0.5], [0.0, 1.0, 0.0, -0.5], [0.0, 0.0, 1.0, 0.0]])
"""theta of each group [3, 4]."""
SETS = np.array([[0.8, 0.2, 0.0], [0.9, 0.0, 0.1], [0.0, 0.0, 1.0]]) @ TRUTH


class Ridge:
    """theta(p) = argmin sum_g p_g mean (x theta - y)² + L2 ||theta||²; Phi_k: mean squared error on set k."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.groups = [self._moments(generator, theta) for theta in TRUTH]
        self.sets = [self._moments(generator, theta) for theta in SETS]

    def losses(self, p: np.ndarray) -> np.ndarray:
        """Phi [..., 3] of p [..., 3]."""
        theta = self._solution(p)
        parts = [np.einsum("...i,ij,...j", theta, a, theta) - 2 * theta @ c + s for a, c, s in self.sets]
        return np.stack(parts, -1)

    def gradient(self, p: np.ndarray, w: np.ndarray) -> np.ndarray:
        """sum_k w_k grad Phi_k [3] by implicit differentiation: the pattern of (5) to (7)."""
        theta = self._solution(p)
        upper = sum(weight * 2 * (a @ theta - c) for weight, (a, c, _) in zip(w, self.sets, strict=True))
        z = np.linalg.solve(self._matrix(p), upper)
        return -np.array([z @ (a @ theta - c) for a, c, _ in self.groups])

    def _matrix(self, p: np.ndarray) -> np.ndarray:
        matrices = np.stack([a for a, _, _ in self.groups])
        return np.tensordot(p, matrices, 1) + L2 * np.eye(matrices.shape[-1])

    def _solution(self, p: np.ndarray) -> np.ndarray:
        right = np.tensordot(p, np.stack([c for _, c, _ in self.groups]), 1)
        return np.linalg.solve(self._matrix(p), right[..., None])[..., 0]

    @staticmethod
    def _moments(generator: np.random.Generator, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """mean x xᵀ, mean x y, mean y² of samples."""
        x = generator.normal(size=(SAMPLES, len(theta)))
        y = x @ theta + 0.1 * generator.normal(size=SAMPLES)
        return x.T @ x / SAMPLES, x.T @ y / SAMPLES, float(y @ y / SAMPLES)
