"""The score model: padding changes no score, causality, initial scores, the trunk's copy."""

import pytest
import torch

from megatron_bliss.config.models import ScoreConfig
from megatron_bliss.models.score import TrunkScoreModel, build_score_model
from tests.bilevel.problems import architecture, language_model, random_batch, score_model


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_padding_changes_no_score(family):
    model, batch = score_model(family), random_batch(4, 10)
    scores = model(batch.tokens, batch.lengths)
    tokens = torch.cat([batch.tokens, torch.zeros(4, 6, dtype=torch.int64)], 1)
    padding = torch.arange(16) >= batch.lengths[:, None]
    for filler in (0, 7):
        torch.testing.assert_close(
            model(tokens.masked_fill(padding, filler), batch.lengths), scores, atol=1e-13, rtol=0
        )
    alone = torch.cat([model(t[None, :n], n[None]) for t, n in zip(batch.tokens, batch.lengths, strict=True)])
    torch.testing.assert_close(alone, scores, atol=1e-13, rtol=0)


def test_score_is_the_activation_of_a_masked_mean():
    batch = random_batch(3, 9)
    sigmoid, identity = (score_model(activation=name) for name in ("sigmoid", "identity"))
    raw = identity(batch.tokens, batch.lengths)
    torch.testing.assert_close(sigmoid(batch.tokens, batch.lengths), torch.sigmoid(raw))
    hidden = identity.hidden_states(batch.tokens)
    means = torch.stack([h[:n].mean(0) for h, n in zip(hidden, batch.lengths, strict=True)])
    torch.testing.assert_close(raw, identity.head(means).squeeze(-1))
    assert float(raw.detach().std()) > 1e-3


def test_every_real_token_counts():
    model, batch = score_model(), random_batch(1, 9)
    score = model(batch.tokens, batch.lengths)
    for position in range(9):
        changed = batch.tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % 23
        assert abs((model(changed, batch.lengths) - score).item()) > 1e-8


def test_zero_head_starts_from_equal_scores_but_learns():
    model, batch = TrunkScoreModel(architecture(), "sigmoid", 0.0, 3), random_batch(4, 9)
    scores = model(batch.tokens, batch.lengths)
    assert scores.tolist() == [0.5] * 4
    scores[0].backward()
    assert model.head.weight.grad.abs().max() > 0


def test_trunk_is_copied_not_shared():
    lm = language_model(dtype=torch.float32)
    model = build_score_model(ScoreConfig(), lm.architecture, seed=0, trunk_from=lm)
    tokens = random_batch(2, 9).tokens
    assert torch.equal(model.hidden_states(tokens), lm.hidden_states(tokens))
    before = lm.hidden_states(tokens)
    with torch.no_grad():
        model.embedding.weight.add_(1.0)
    assert torch.equal(lm.hidden_states(tokens), before)
    with pytest.raises(ValueError, match="set score.init_from to fresh"):
        build_score_model(ScoreConfig(), architecture(layers=1), seed=0, trunk_from=lm)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="change score.activation"):
        TrunkScoreModel(architecture(), "tanh", 0.0, 0)
