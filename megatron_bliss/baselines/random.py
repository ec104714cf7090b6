"""Random selection: the control every method has to beat."""

from __future__ import annotations

import numpy as np


def random_scores(num_units: int, seed: int) -> np.ndarray:
    """Independent uniform scores (float32 [num_units]): the units with the highest ones are a uniform random subset."""
    return np.random.Generator(np.random.PCG64(seed)).random(num_units, dtype=np.float32)
