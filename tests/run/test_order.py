"""Which runs need the proxy's warm-up."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.config import Config
from megatron_bliss.config.models import ScoreConfig
from megatron_bliss.run.order import needs_proxy

COUNTS = ScoreConfig(family="ngram", init_from="counts")


@pytest.mark.parametrize(
    ("arms", "score", "upper_iters", "needed"),
    [
        (["random", "dsir", "classifier", "full"], ScoreConfig(), 100, False),
        (["random", "bliss"], COUNTS, 0, False),
        (["random", "bliss"], COUNTS, 1, True),
        (["bliss"], dataclasses.replace(COUNTS, family="transformer"), 0, True),
        (["bliss"], dataclasses.replace(COUNTS, family="both"), 0, True),
        (["bliss", "perplexity"], COUNTS, 0, True),
        (["mates"], COUNTS, 0, True),
        (["mates_kl"], COUNTS, 0, True),
    ],
)
def test_a_proxy_is_warmed_up_where_an_arm_looks_at_it(arms, score, upper_iters, needed) -> None:
    config = Config(arms=arms, score=score, bilevel=BilevelConfig(upper_iters=upper_iters))
    assert needs_proxy(config) is needed
