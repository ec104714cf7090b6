"""Model FLOPs of the stages: what a stage records when it is done, and what a plan says before it runs.

A multiply-add is two operations; a backward pass costs twice the forward pass F. Recomputation that only saves memory
is not counted, as in a model-FLOPs utilisation. The bilevel stage's are in bilevel/flops.py.
"""

from __future__ import annotations

from megatron_bliss.config.models import ProxyConfig
from megatron_bliss.config.training import PretrainingConfig
from megatron_bliss.models.presets import Architecture, flops_per_token
from megatron_bliss.models.score_architecture import ScoreArchitecture

BACKWARD_TO_FORWARD = 2
"""A backward pass costs twice the forward pass."""


def training_flops(config: PretrainingConfig, target: Architecture, seq_length: int) -> float:
    """One iteration of the target; a segment or decay branch of n iterations has n times as many."""
    forward = flops_per_token(target, seq_length)
    return (1 + BACKWARD_TO_FORWARD) * forward * (config.global_batch_size * seq_length)


def proxy_warmup_flops(config: ProxyConfig, proxy: Architecture, seq_length: int) -> float:
    """The proxy's whole warm-up."""
    tokens = config.warmup_iters * config.warmup_batch_size * seq_length
    return (1 + BACKWARD_TO_FORWARD) * tokens * flops_per_token(proxy, seq_length)


def score_flops(tokens: int, score: ScoreArchitecture, seq_length: int) -> float:
    """One forward pass of the score model over a shard of ``tokens`` tokens."""
    return tokens * score.flops_per_token(seq_length)
