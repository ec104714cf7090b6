"""Random selection: the control every method has to beat."""

from __future__ import annotations

import numpy as np

from megatron_bliss.arms.inputs import Inputs, Scores
from megatron_bliss.config.baselines import BaselinesConfig


def random_scores(config: BaselinesConfig, inputs: Inputs) -> Scores:
    """Independent uniform scores: the units with the highest ones are a uniform random subset."""
    generator = np.random.Generator(np.random.PCG64(inputs.seed))
    return Scores(generator.random(len(inputs.source), dtype=np.float32))
