"""Selection methods to compare with: each gives a corpus scores as ``scoring.py`` does, so selection is the same."""

from megatron_bliss.baselines.random import random_scores

BASELINES = {"random": random_scores}
"""name -> function(num_units, seed) -> float32 scores, one per unit."""
