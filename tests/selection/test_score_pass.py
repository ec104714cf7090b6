"""Scores: one per unit, the same for any number of ranks and after a kill, never one that is not finite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bliss.arms.reading import shard_scores
from megatron_bliss.config.models import ModelConfig, ScoreConfig
from megatron_bliss.data.batches import UnitDataset
from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.models.presets import resolve_architecture
from megatron_bliss.models.score import ScoreModel, build_score_model
from megatron_bliss.scorers.models import ModelScorer, Reading
from megatron_bliss.selection import score_pass
from megatron_bliss.selection.score_pass import ScorePass, gather_scores, score_blocks

SIZES = ModelConfig(architecture="llama", num_layers=1, hidden_size=16, num_attention_heads=2)
COUNT = 37


@pytest.fixture
def source(tmp_path: Path, monkeypatch) -> UnitDataset:
    monkeypatch.setattr(score_pass, "BLOCK_UNITS", 8)
    generator = np.random.default_rng(1)
    lengths = generator.integers(2, 12, COUNT)
    with CorpusWriter(str(tmp_path / "corpus"), 50) as writer:
        writer.add(generator.integers(0, 50, lengths.sum()), lengths)
    return UnitDataset(str(tmp_path / "corpus"), 12)


@pytest.fixture
def model() -> ScoreModel:
    return build_score_model(ScoreConfig(head_init_std=1.0), resolve_architecture(SIZES, 50), seed=1)


def score(
    model: ScoreModel, source: UnitDataset, folder: Path, world_size: int, params_dtype: str = "fp32"
) -> np.ndarray:
    scorer = ModelScorer(model, Reading(batch_tokens=30, params_dtype=params_dtype))
    by_ids = shard_scores(scorer, source.corpus, source.seq_length, "bliss")
    for rank in range(world_size):
        score_blocks(by_ids, len(source), folder, ScorePass(rank, world_size))
    return gather_scores(folder, len(source))


def test_one_score_per_unit_for_any_number_of_ranks(model, source, tmp_path: Path) -> None:
    alone = score(model, source, tmp_path / "1", 1)
    assert alone.dtype == np.float32 and alone.shape == (COUNT,)
    assert np.array_equal(score(model, source, tmp_path / "3", 3), alone)
    batch = source.batch(np.array([20]))
    assert alone[20] == pytest.approx(model(batch.tokens, batch.lengths).item(), abs=1e-6)


def test_units_are_scored_by_a_sum(source, tmp_path: Path) -> None:
    config = ScoreConfig(family="both", activation="identity", ngram_buckets=64)
    model = build_score_model(config, resolve_architecture(SIZES, 50), seed=1, eod=0)
    with torch.no_grad():
        model.ngrams.table.copy_(torch.randn(64, 1, generator=torch.Generator().manual_seed(1)))
    alone = score(model, source, tmp_path / "1", 1)
    assert np.array_equal(score(model, source, tmp_path / "3", 3), alone) and len(set(alone.tolist())) > COUNT // 2
    batch = source.batch(np.array([20]))
    assert alone[20] == pytest.approx(model(batch.tokens, batch.lengths).item(), abs=1e-5)


def test_scores_of_a_trunk_in_bf16_rank_alike_and_have_no_ties(model, source, tmp_path: Path) -> None:
    exact = score(model, source, tmp_path / "fp32", 1)
    low = score(model, source, tmp_path / "bf16", 1, "bf16")
    assert low.dtype == np.float32 and len(set(low.tolist())) == COUNT
    assert 0 < np.abs(low - exact).max() < 0.05
    assert np.corrcoef(low.argsort().argsort(), exact.argsort().argsort())[0, 1] > 0.98


def test_finished_blocks_are_kept_and_missing_ones_made(model, source, tmp_path: Path) -> None:
    whole = score(model, source, tmp_path / "blocks", 1)
    blocks = sorted((tmp_path / "blocks").glob("*.npy"))
    stamps = [block.stat().st_mtime_ns for block in blocks]
    blocks[2].unlink()
    with pytest.raises(FileNotFoundError):
        gather_scores(tmp_path / "blocks", COUNT)
    assert np.array_equal(score(model, source, tmp_path / "blocks", 2), whole)
    again = [block.stat().st_mtime_ns for block in blocks]
    assert again[:2] + again[3:] == stamps[:2] + stamps[3:]


def test_a_score_that_is_not_finite_names_its_units(model, source, tmp_path: Path) -> None:
    poisoned = int(source.batch(np.array([11])).tokens[0, 0])
    with torch.no_grad():
        model.embedding.weight[poisoned] = float("nan")
    with pytest.raises(FloatingPointError, match=r"units \[.*\]"):
        score(model, source, tmp_path / "blocks", 1)
