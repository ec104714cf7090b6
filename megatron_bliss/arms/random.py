"""Random selection: the control that every arm has to beat."""

from __future__ import annotations

import numpy as np

from megatron_bliss.arms.arm import Arm
from megatron_bliss.arms.inputs import Inputs, Scores


def scores(options: None, inputs: Inputs) -> Scores:
    """Independent uniform scores: the units with the highest ones are a uniform random subset."""
    generator = np.random.Generator(np.random.PCG64(inputs.seed))
    return Scores(generator.random(len(inputs.source), dtype=np.float32))


ARM = Arm("uniform noise: the control", scores)
