"""Families of score models: n-grams against a loop over them, the sum of two, what a file says, what is refused."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from megatron_bliss.config.models import ScoreConfig
from megatron_bliss.data.ngrams import NgramBuckets
from megatron_bliss.models.families import FAMILIES, check_family
from megatron_bliss.models.score import ACTIVATIONS, build_score_model, describe, saved_score_model
from tests.bilevel.problems import architecture, language_model, random_batch

EOD = 3
CONFIG = ScoreConfig(family="ngram", activation="identity", ngram_max=3, ngram_buckets=101, ngram_scale=5.0)


def built(config: ScoreConfig = CONFIG, *, dtype=torch.float64, trunk_from=None):
    """A model whose table and linear unit are random."""
    model = build_score_model(config, architecture(), seed=1, trunk_from=trunk_from, eod=EOD, dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("head.", "ngrams.")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def naive_buckets(row: list[int]) -> list[int]:
    """The bucket of every n-gram of a row that has no end of a document in it, one n-gram at a time."""
    found = []
    for length in (1, 2, 3):
        for start in range(len(row) - length + 1):
            ngram = np.array(row[start : start + length])
            if EOD not in ngram:
                _, buckets = NgramBuckets(CONFIG.ngram_buckets, 3, EOD).of(
                    ngram, np.zeros_like(ngram), np.arange(length)
                )
                found.append(int(buckets[-1]))  # the longest comes last
    return found


def test_a_raw_score_is_the_scaled_mean_over_the_ngrams() -> None:
    model, batch = built(), random_batch(6, 11)
    batch.tokens[0, 4] = EOD
    scores, table = model(batch.tokens, batch.lengths), model.ngrams.table.detach().squeeze(1)
    for i, (row, length) in enumerate(zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)):
        buckets = naive_buckets(row[:length])
        assert scores[i].item() == pytest.approx(5.0 * table[buckets].mean().item(), rel=1e-12)
        (slope,) = torch.autograd.grad(scores[i], model.ngrams.table, retain_graph=True)
        counts = np.bincount(buckets, minlength=CONFIG.ngram_buckets)
        np.testing.assert_allclose(slope.squeeze(1).numpy(), 5.0 * counts / len(buckets), rtol=1e-12)


def test_padding_and_rows_beside_it_change_no_score() -> None:
    model, batch = built(), random_batch(4, 10)
    scores = model(batch.tokens, batch.lengths)
    padding = torch.arange(16) >= batch.lengths[:, None]
    for filler in (0, 7):
        padded = torch.cat([batch.tokens, torch.zeros(4, 6, dtype=torch.int64)], 1).masked_fill(padding, filler)
        torch.testing.assert_close(model(padded, batch.lengths), scores, atol=1e-14, rtol=0)
    alone = [model(row[None, :n], n[None]) for row, n in zip(batch.tokens, batch.lengths, strict=True)]
    torch.testing.assert_close(torch.cat(alone), scores, atol=1e-14, rtol=0)


def test_a_unit_without_ngrams_has_raw_score_0() -> None:
    model = built()
    tokens = torch.tensor([[EOD, EOD, 5], [5, 6, 7]])
    assert model(tokens, torch.tensor([2, 0])).tolist() == [0.0, 0.0]
    assert model(tokens[:, :1], torch.tensor([1, 1]))[1] != 0  # one token has no longer n-gram


@pytest.mark.parametrize("activation, start", [("sigmoid", 0.5), ("identity", 0.0)])
def test_a_new_table_starts_from_equal_scores_but_learns(activation: str, start: float) -> None:
    model = build_score_model(replace(CONFIG, activation=activation), architecture(), seed=1, eod=EOD)
    batch = random_batch(4, 9)
    scores = model(batch.tokens, batch.lengths)
    assert scores.tolist() == [start] * 4
    scores[0].backward()
    assert model.ngrams.table.grad.abs().max() > 0


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_both_is_the_sum_of_raw_scores_before_the_activation(activation: str) -> None:
    lm, batch = language_model(), random_batch(5, 9)
    config = replace(CONFIG, family="both", activation=activation)
    both = built(config, trunk_from=lm)
    trunk = built(ScoreConfig(activation=activation), trunk_from=lm)
    trunk.head.load_state_dict(both.head.state_dict())
    table = built()
    table.ngrams.load_state_dict(both.ngrams.state_dict())
    raw = trunk.raw_scores(batch.tokens, batch.lengths) + table.raw_scores(batch.tokens, batch.lengths)
    torch.testing.assert_close(both(batch.tokens, batch.lengths), ACTIVATIONS[activation](raw))
    assert torch.equal(both.hidden_states(batch.tokens), lm.hidden_states(batch.tokens))


def test_a_table_keeps_its_precision() -> None:
    config = replace(CONFIG, family="both")
    exact, low = built(config, dtype=torch.float32), built(config, dtype=torch.float32).to(torch.bfloat16)
    assert low.embedding.weight.dtype == torch.bfloat16 and low.ngrams.table.dtype == torch.float32
    assert torch.equal(low.ngrams.table, exact.ngrams.table)
    batch = random_batch(5, 9)
    assert low(batch.tokens, batch.lengths).dtype == torch.float32


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_file_says_what_its_model_is(family: str) -> None:
    config = ScoreConfig(family=family, activation="identity")
    if family != "transformer":
        config = replace(CONFIG, family=family)
    model = built(config, dtype=torch.float32)
    state = {"score": describe(config, EOD), "architecture": asdict(architecture()), "score_model": model.state_dict()}
    again, batch = saved_score_model(state), random_batch(5, 9)
    batch.tokens[0, 4] = EOD
    assert torch.equal(again(batch.tokens, batch.lengths), model(batch.tokens, batch.lengths))
    parts = FAMILIES[family].architecture(config, architecture())
    assert again.score_architecture == parts
    assert parts.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"ngram_scale": 1.0},
        {"family": "ngram", "init_from": "fresh"},
        {"family": "ngram", "head_init_std": 0.5},
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options: dict) -> None:
    name = list(options)[-1]
    with pytest.raises(ValueError, match=f"found score.{name} {options[name]} with score.family"):
        check_family(ScoreConfig(**options))
    check_family(ScoreConfig(**options | {"family": "both"}))


def test_work_is_counted_by_part() -> None:
    trunk, table, both = (FAMILIES[name].architecture(CONFIG, architecture()) for name in FAMILIES)
    assert table.flops_per_token(9) == 3 * 2 and table.gradient_flops_per_token(9) == 2 * 3 * 2
    assert both.flops_per_token(9) == trunk.flops_per_token(9) + 6
    assert both.gradient_flops_per_token(9) == 3 * trunk.flops_per_token(9) + 12
    assert both.parameters == trunk.parameters + 101
