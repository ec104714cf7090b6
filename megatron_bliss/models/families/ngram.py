"""A linear model over hashed n-grams of tokens: a thousandth of a trunk's work."""

from megatron_bliss.models.families.family import (
    NGRAM_OPTIONS,
    START_OPTIONS,
    TABLE_STARTS,
    Family,
    ngram_architecture,
)
from megatron_bliss.models.score_architecture import ScoreArchitecture

FAMILY = Family(
    help="a linear model over hashed n-grams of tokens",
    architecture=lambda config, proxy: ScoreArchitecture(ngrams=ngram_architecture(config)),
    options=NGRAM_OPTIONS,
    starts=("proxy", *TABLE_STARTS),
    start_options=START_OPTIONS,
    has_trunk=False,
)
