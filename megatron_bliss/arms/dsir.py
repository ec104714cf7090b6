"""Data selection by importance resampling (DSIR, arXiv 2302.03169), on hashed n-grams of tokens.

Two bags of n-grams, hashed into m buckets, are counted: q over the round's shard, p over the reference set. A unit with
bucket counts c has the importance log-weight sum_j c_j log(p_j / q_j). Adding independent standard Gumbel noise makes
the k best units a sample of k without replacement, with probabilities in proportion to the weights.

The paper's n-grams are of words. These are of the corpus's own tokens, so that no text is needed. Its code leaves out
texts of fewer than 100 words (``min_example_length``) before it draws; ``min_tokens`` does so by tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

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
    min_tokens: int = bounded(0, minimum=0)
    """Units with fewer tokens are scored last (the paper's code leaves out texts of fewer than 100 words)."""
    per_token: bool = False
    """Mean log-ratio of a unit's n-grams in place of their sum, so that length does not count; lower the noise, too."""
    smoothing: float = bounded(0.0, minimum=0)
    """N-grams per bucket, spread over the buckets as the shard's own are, that are added to the guide's counts: n-grams
    that a small guide lacks weigh less."""


def scores(options: DsirConfig, inputs: Inputs) -> Scores:
    """Importance log-weights with Gumbel noise; each rank counts and scores its part of the shard."""
    import torch
    import torch.distributed as dist

    from megatron_bliss.arms import ngrams
    from megatron_bliss.arms.reading import score_by_scorer
    from megatron_bliss.base.parallel import failing_together
    from megatron_bliss.scorers.ngrams import NgramForm, NgramScorer

    groups, source = inputs.groups, inputs.source
    counter = ngrams.NgramBuckets(options.buckets, options.max_ngram, inputs.eod)
    with failing_together(groups):
        pool = ngrams.count_shard(counter, source, groups.rank, groups.world_size)
        reference = ngrams.count_reference(counter, inputs.reference)
    pool = torch.from_numpy(pool).to(groups.device)
    dist.all_reduce(pool, group=groups.world_group)
    log_ratio = ngrams.log_ratios(reference, pool.cpu().numpy(), options.smoothing)
    reduce = "mean" if options.per_token else "sum"
    scorer = NgramScorer(NgramForm(options.max_ngram, inputs.vocab_size, inputs.eod, reduce), log_ratio)
    weights = score_by_scorer(scorer, inputs, inputs.folder / "blocks", "dsir")
    values = None
    with failing_together(groups):
        if weights is not None:
            noise = np.random.Generator(np.random.PCG64(inputs.seed)).gumbel(size=len(weights))
            values = (weights + noise * options.noise).astype(np.float32)
            values = short_last(values, source.corpus.lengths, options.min_tokens)
    return Scores(values, {"method": "dsir", **asdict(options)}, scorer=scorer)


def short_last(values: np.ndarray, lengths: np.ndarray, min_tokens: int) -> np.ndarray:
    """The scores float32 [n] with units of fewer than ``min_tokens`` tokens below all others."""
    short = lengths < min_tokens
    if not short.any():
        return values
    if short.all():
        raise ValueError(
            f"found no unit of {min_tokens} tokens or more in the shard, expected some: lower baselines.dsir.min_tokens"
        )
    lowest = values[~short].min()
    return np.where(short, np.nextafter(lowest, np.float32(-np.inf)), values)


ARM = Arm("importance weights of hashed n-grams, guide against shard", scores, paper="2302.03169", settings=DsirConfig)
