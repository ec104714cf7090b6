"""Selection methods to compare with: each gives the units of a shard scores."""

from megatron_bliss.arms.dsir import dsir_scores
from megatron_bliss.arms.inputs import Inputs, Scores
from megatron_bliss.arms.mates import mates_scores
from megatron_bliss.arms.random import random_scores

BASELINES = {"random": random_scores, "dsir": dsir_scores, "mates": mates_scores}
"""name -> function(BaselinesConfig, Inputs) -> Scores, called on every rank."""

__all__ = ["BASELINES", "Inputs", "Scores"]
