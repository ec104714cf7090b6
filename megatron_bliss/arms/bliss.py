"""BLISS (arXiv 2510.06048): the round's bilevel stage trains a score model, which then reads the shard once."""

from __future__ import annotations

from megatron_bliss.arms.arm import Arm, Shard
from megatron_bliss.arms.inputs import Inputs, Scores
from megatron_bliss.models.flops import score_flops


def scores(options: None, inputs: Inputs) -> Scores:
    """One forward pass of the round's score model."""
    from megatron_bliss.arms.reading import score_by_scorer, scorer_of

    model, settings = inputs.load_score_model()
    blocks = inputs.folder / settings["model_digest"][:12]  # blocks of another model are not taken for this one's
    scorer = scorer_of(model, inputs)
    values = score_by_scorer(scorer, inputs, blocks, "score")
    flops = score_flops(inputs.source.corpus.num_tokens, model.score_architecture, inputs.source.seq_length)
    return Scores(values, settings, flops, scorer=scorer)


def work(options: None, shard: Shard) -> tuple[int, float]:
    """Every token of the shard, once."""
    return shard.tokens, float(score_flops(shard.tokens, shard.score, shard.seq_length))


ARM = Arm("a score model trained by bilevel optimisation", scores, paper="2510.06048", stages=("bilevel",), work=work)
