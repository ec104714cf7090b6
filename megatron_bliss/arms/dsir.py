"""Data selection by importance resampling (DSIR, arXiv 2302.03169), on hashed n-grams of tokens.

Two bags of n-grams, hashed into m buckets, are counted: q over the round's shard, p over the reference set. A unit with
bucket counts c has the importance log-weight sum_j c_j log(p_j / q_j). Adding independent standard Gumbel noise makes
the k best units a sample of k without replacement, with probabilities in proportion to the weights.

The paper's n-grams are of words. These are of the corpus's own tokens, so that no text is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bliss.arms.arm import Arm
from megatron_bliss.arms.inputs import Inputs, Scores
from megatron_bliss.config.bounds import bounded


@dataclass(frozen=True)
class DsirConfig:
    """The arm dsir: importance resampling on hashed n-grams (arXiv 2302.03169), of tokens."""

    buckets: int = bounded(10_000, minimum=1)
    """m, buckets that n-grams are hashed into."""
    max_ngram: int = bounded(2, minimum=1)
    """Longest n-gram counted, in tokens; all shorter ones are, too."""
    noise: float = bounded(1.0, minimum=0)
    """Scale of the Gumbel noise on the log-weights: 1 samples units by weight, 0 takes the heaviest."""


def scores(options: DsirConfig, inputs: Inputs) -> Scores:
    """Importance log-weights with Gumbel noise; each rank counts and scores its part of the shard."""
    import torch
    import torch.distributed as dist

    from megatron_bliss.arms import ngrams, reading
    from megatron_bliss.base.parallel import barrier, failing_together
    from megatron_bliss.selection.score_pass import gather_scores, score_blocks

    groups, source = inputs.groups, inputs.source
    counter = ngrams.NgramBuckets(options.buckets, options.max_ngram, inputs.eod)
    with failing_together(groups):
        pool = ngrams.count_shard(counter, source, groups.rank, groups.world_size)
        reference = ngrams.count_reference(counter, inputs.reference)
    pool = torch.from_numpy(pool).to(groups.device)
    dist.all_reduce(pool, group=groups.world_group)
    log_ratio = ngrams.log_ratios(reference, pool.cpu().numpy())
    blocks = inputs.folder / "blocks"
    with failing_together(groups):
        how = reading.shard_pass(inputs, "dsir")
        score_blocks(lambda ids: ngrams.log_weights(counter, source, ids, log_ratio), len(source), blocks, how)
    barrier(groups)
    if not groups.is_main:
        return Scores(None)
    weights = gather_scores(blocks, len(source))
    noise = np.random.Generator(np.random.PCG64(inputs.seed)).gumbel(size=len(weights))
    settings = {"method": "dsir", "buckets": options.buckets, "max_ngram": options.max_ngram, "noise": options.noise}
    return Scores((weights + noise * options.noise).astype(np.float32), settings)


ARM = Arm("importance weights of hashed n-grams, guide against shard", scores, paper="2302.03169", settings=DsirConfig)
