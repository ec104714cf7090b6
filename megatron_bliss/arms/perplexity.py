"""Selection by perplexity, the exponential of a language model's mean next-token loss on a unit, from one forward pass.

The model is the run's warmed-up proxy, so that no outside judge is used. Units of low loss are clean and easy, those of
high loss are rare or noise; which help is not known beforehand, and so an option. The paper cited found the middle best
on a web crawl.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_bliss.arms.arm import Arm, Memory, Shard, Sizes
from megatron_bliss.arms.inputs import Inputs, Scores
from megatron_bliss.models.presets import Architecture, flops_per_token, parameter_count


@dataclass(frozen=True)
class PerplexityConfig:
    """The arm perplexity: the warmed-up proxy's loss on each unit."""

    keep: Literal["low", "middle", "high"] = "middle"
    """Which units score high: those of low loss, those whose loss is near the shard's median, or those of high loss."""


def scores(options: PerplexityConfig, inputs: Inputs) -> Scores:
    """One forward pass of the proxy over the shard."""
    from megatron_bliss.arms.losses import preferred, shard_losses
    from megatron_bliss.base.parallel import failing_together

    proxy, settings = inputs.load_proxy()
    losses = shard_losses(proxy, inputs, "perplexity")
    with failing_together(inputs.groups):
        values = None if losses is None else preferred(losses, options.keep)
    described = {"method": "perplexity", "keep": options.keep, **settings}
    flops = perplexity_flops(inputs.source.corpus.num_tokens, proxy.architecture, inputs.source.seq_length)
    return Scores(values, described, flops)


def perplexity_flops(tokens: int, proxy: Architecture, seq_length: int) -> float:
    """One forward pass of the proxy over a shard of ``tokens`` tokens, output matrix included."""
    return float(tokens * flops_per_token(proxy, seq_length))


def work(options: PerplexityConfig, shard: Shard) -> tuple[int, float]:
    """Every token of the shard, once."""
    return shard.tokens, perplexity_flops(shard.tokens, shard.proxy, shard.seq_length)


def memory(options: PerplexityConfig, sizes: Sizes) -> Memory:
    """The proxy with its output matrix, and a forward pass that makes logits."""
    from megatron_bliss.arms.losses import working_bytes
    from megatron_bliss.base.platform import DTYPES

    element_size = DTYPES[sizes.scoring.params_dtype].itemsize
    tokens = sizes.scoring.micro_batch_size * sizes.seq_length
    working = working_bytes(sizes.proxy, tokens, element_size, sizes.device)
    parameters = element_size * parameter_count(sizes.proxy)
    return Memory("perplexity", parameters, 0, 0, working, "lower scoring.micro_batch_size")


ARM = Arm(
    "the warmed-up proxy's loss on a unit: low, near the median or high",
    scores,
    paper="2309.04564",
    settings=PerplexityConfig,
    reads_proxy=True,
    work=work,
    memory=memory,
)
