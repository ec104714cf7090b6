"""Tables that a score model starts with: against naive counts, on ranks, in a run; what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bliss.arms import score_starts
from megatron_bliss.bilevel.count_proxy import solve_counts
from megatron_bliss.config.models import ModelConfig, ScoreConfig
from megatron_bliss.config.training import OptimizerConfig
from megatron_bliss.data.batches import UnitDataset
from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.models.families import check_family
from megatron_bliss.models.presets import resolve_architecture
from megatron_bliss.models.score import build_score_model
from tests.arms.shards import EOD, LENGTH, VOCABULARY, write
from tests.distributed import run_distributed
from tests.targets import grouped, layout

CONFIG = ScoreConfig(
    family="ngram", activation="identity", init_from="importance", ngram_buckets=4096, ngram_max=1, count_smoothing=0.3
)
SIZES = ModelConfig(architecture="gpt_neox", num_layers=1, hidden_size=8, num_attention_heads=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A shard of 300 units and a guide of tokens below 10."""
    write(tmp_path / "shard", 300, seed=1)
    write(tmp_path / "reference", 60, seed=2, most=10)
    return tmp_path


def started(folder: Path, config: ScoreConfig = CONFIG, share: float = 0.2):
    """A score model with its table filled, on every rank alike."""
    shard, guide = (UnitDataset(str(folder / name), LENGTH) for name in ("shard", "reference"))
    model = build_score_model(config, resolve_architecture(SIZES, VOCABULARY), seed=0, eod=EOD, dtype=torch.float64)
    with grouped(layout()) as groups:
        score_starts.fill_table(model.ngrams, config, shard, guide, share, groups)
    return model


def scores(folder: Path, model) -> np.ndarray:
    source = UnitDataset(str(folder / "shard"), LENGTH)
    batch = source.batch(np.arange(len(source)))
    with torch.no_grad():
        return model.raw_scores(batch.tokens, batch.lengths).numpy()


def tokens(folder: Path, name: str) -> list[list[int]]:
    corpus = UnitDataset(str(folder / name), LENGTH).corpus
    return [[token for token in corpus[unit][:LENGTH].tolist() if token != EOD] for unit in range(len(corpus))]


def standardised(values: list[float], units: list[list[int]]) -> np.ndarray:
    """With mean 0 and deviation 1 over the units that have a token; 0 for those without."""
    has = np.array([len(unit) > 0 for unit in units])
    values = np.array(values)
    return np.where(has, (values - values[has].mean()) / values[has].std(), 0.0)


def test_importance_is_that_of_a_naive_count(folder: Path) -> None:
    units, guide = tokens(folder, "shard"), tokens(folder, "reference")
    q, p = (Counter(token for unit in part for token in unit) for part in (units, guide))
    blend = {token: 0.7 * p[token] / p.total() + 0.3 * q[token] / q.total() for token in q}
    ratio = {
        token: np.log(blend[token] / sum(blend.values()) + 1e-8) - np.log(q[token] / q.total() + 1e-8) for token in q
    }
    means = [sum(map(ratio.get, unit)) / max(len(unit), 1) for unit in units]
    np.testing.assert_allclose(scores(folder, started(folder)), standardised(means, units), atol=1e-6)


def test_counts_are_the_ratios_to_the_best_selection(folder: Path) -> None:
    units, guide = tokens(folder, "shard"), tokens(folder, "reference")
    q, p = (np.bincount([t for unit in part for t in unit], minlength=VOCABULARY) for part in (units, guide))
    p = np.where(q > 0, 0.7 * p / p.sum() + 0.3 * q / q.sum(), 0)
    found = score_starts.Occurrences(
        np.repeat(np.arange(300), [len(unit) for unit in units]), np.concatenate(units).astype(int), 300, VOCABULARY
    )
    ratios = solve_counts(found, p / p.sum(), 0.3, prior=0.05, steps=100, tolerance=1e-4).ratios
    means = [sum(ratios[token] for token in unit) / max(len(unit), 1) for unit in units]
    model = started(folder, replace(CONFIG, init_from="counts"), share=0.3)
    np.testing.assert_allclose(scores(folder, model), standardised(means, units), atol=1e-6)


def test_the_deviation_is_the_one_asked_for(folder: Path) -> None:
    one, three = (scores(folder, started(folder, replace(CONFIG, start_deviation=d))) for d in (1.0, 3.0))
    np.testing.assert_allclose(three, 3 * one, rtol=1e-9)


def on_ranks(rank: int, world_size: int, folder: Path) -> np.ndarray:
    config = replace(CONFIG, init_from="counts", ngram_max=2)
    return started(folder, config).ngrams.table.detach().numpy()


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_number_of_ranks_starts_with_the_same_table(folder: Path, world_size: int) -> None:
    expected = started(folder, replace(CONFIG, init_from="counts", ngram_max=2)).ngrams.table.detach().numpy()
    assert expected.any()
    for found in run_distributed(on_ranks, world_size, folder):
        assert np.array_equal(found, expected)


def test_a_large_shard_is_counted_in_part(folder: Path, monkeypatch) -> None:
    source = UnitDataset(str(folder / "shard"), LENGTH)
    assert np.array_equal(score_starts.counted_units(source), np.arange(300))
    monkeypatch.setattr(score_starts, "BLOCK_UNITS", 10)
    monkeypatch.setattr(score_starts, "COUNTED_TOKENS", 600)
    ids = score_starts.counted_units(source)
    assert ids[0] == 0 and ids[-1] == 299 and len(np.unique(ids)) == len(ids) == len(np.unique(ids // 10)) * 10
    assert 300 < np.minimum(source.corpus.lengths[ids], LENGTH).sum() <= 700
    assert started(folder).ngrams.table.abs().sum() > 0


@pytest.mark.parametrize("init_from", ["importance", "counts"])
def test_text_without_ngrams_is_refused(folder: Path, init_from: str) -> None:
    with CorpusWriter(str(folder / "reference"), VOCABULARY) as writer:
        writer.add([EOD, EOD], [1, 1])
    with pytest.raises(ValueError, match="found no n-gram in the reference set, expected text"):
        started(folder, replace(CONFIG, init_from=init_from))


def test_units_that_are_all_alike_are_refused(folder: Path) -> None:
    with CorpusWriter(str(folder / "shard"), VOCABULARY) as writer:
        writer.add([3, 4] * 5, [2] * 5)
    with pytest.raises(ValueError, match="found the same score for all units of the shard"):
        started(folder)


@pytest.mark.parametrize("init_from", ["importance", "counts"])
@pytest.mark.parametrize("smoothing", [0.0, 0.9])
def test_a_guide_of_other_ngrams_is_refused(folder: Path, init_from: str, smoothing: float) -> None:
    with CorpusWriter(str(folder / "shard"), VOCABULARY) as writer:
        writer.add([30, 31, 32, 31], [2, 2])
    config = replace(CONFIG, init_from=init_from, count_smoothing=smoothing)
    with pytest.raises(ValueError, match="found no n-gram that the guide and the shard have in common"):
        started(folder, config)


def test_a_choice_no_better_than_a_random_one_is_warned_of(folder: Path) -> None:
    """Smoothing drowns the guide: its distribution is the shard's, and scores rank units by rounding."""
    config = replace(CONFIG, init_from="counts")
    assert warnings(folder, config) == []
    (text,) = warnings(folder, replace(config, count_smoothing=0.99999999))
    assert "suit the guide no better than a random choice" in text and "lower score.count_smoothing" in text


def warnings(folder: Path, config: ScoreConfig) -> list[str]:
    shard, guide = (UnitDataset(str(folder / name), LENGTH) for name in ("shard", "reference"))
    model = build_score_model(config, resolve_architecture(SIZES, VOCABULARY), seed=0, eod=EOD)
    with grouped(layout()) as groups:
        return score_starts.fill_table(model.ngrams, config, shard, guide, 0.2, groups)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ngram_max": 3}, "found score.ngram_max 3 with score.init_from proxy"),
        ({"ngram_buckets": 5}, "found score.ngram_buckets 5 with score.init_from proxy"),
        ({"init_from": "counts", "ngram_scale": 2.0}, "found score.ngram_scale 2.0 with score.family transformer"),
        ({"distil_iters": 5}, "found score.distil_iters 5 with score.init_from proxy"),
        (
            {"family": "both", "init_from": "counts", "distil_optimizer": OptimizerConfig(lr=0.5)},
            "found score.distil_optimizer .* with score.family both",
        ),
        ({"family": "ngram", "start_deviation": 2.0}, "found score.start_deviation 2.0 with score.init_from proxy"),
        (
            {"family": "ngram", "init_from": "importance", "count_prior": 0.5},
            "found score.count_prior 0.5 with score.init_from importance",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_family(ScoreConfig(**options))
