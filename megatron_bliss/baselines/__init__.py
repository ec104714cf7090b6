"""Selection methods to compare with: each gives a corpus scores like ``scoring.py`` does, so that selection is the same."""

from megatron_bliss.baselines.random import random_scores

BASELINES = {"random": random_scores}
"""name -> function(num_units, seed) -> float32 scores, one per unit."""
