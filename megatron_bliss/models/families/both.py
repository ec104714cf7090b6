"""The sum of a transformer's and an n-gram model's raw scores, with one hypergradient over both."""

from megatron_bliss.models.families.family import (
    NGRAM_OPTIONS,
    START_OPTIONS,
    TABLE_STARTS,
    TRUNK_OPTIONS,
    TRUNK_STARTS,
    Family,
    ngram_architecture,
)
from megatron_bliss.models.score_architecture import ScoreArchitecture

FAMILY = Family(
    help="the sum of the two",
    architecture=lambda config, proxy: ScoreArchitecture(trunk=proxy, ngrams=ngram_architecture(config)),
    options=(*TRUNK_OPTIONS, *NGRAM_OPTIONS),
    starts=(*TRUNK_STARTS, *TABLE_STARTS),
    start_options=START_OPTIONS,
)
