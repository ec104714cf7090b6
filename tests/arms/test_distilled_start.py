"""Units that are held back from a distillation, and what their scores say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bliss.arms import distilled_start
from megatron_bliss.config.models import ModelConfig, ScoreConfig
from megatron_bliss.models.presets import resolve_architecture
from megatron_bliss.models.score import build_score_model
from tests.arms.shards import EOD, VOCABULARY, write
from tests.distributed import run_distributed
from tests.targets import grouped, layout


def test_units_are_held_back_from_training() -> None:
    held_back, units = distilled_start.split_units(300, 10_000, seed=1)
    assert len(held_back) == 30 and sorted([*held_back, *units]) == list(range(300))
    again, fewer = distilled_start.split_units(300, 100, seed=1)
    assert np.array_equal(again, held_back) and np.array_equal(fewer, units[:100])
    assert not np.array_equal(distilled_start.split_units(300, 100, seed=2)[0], held_back)
    assert distilled_start.held_back_units(10**8) == 1024


def test_a_shard_of_a_few_units_is_refused() -> None:
    with pytest.raises(ValueError, match="found 19 units in the shard, expected 20 or more .* use fewer rounds"):
        distilled_start.split_units(19, 100, seed=1)
    assert len(distilled_start.split_units(20, 100, seed=1)[0]) == 2


def test_a_low_correlation_is_warned_of() -> None:
    assert distilled_start.distillation_warnings(0.8) == []
    (text,) = distilled_start.distillation_warnings(0.7994)
    assert "rank correlation of 0.799" in text and "raise score.distil_iters" in text


def correlation(folder: Path, deviation: float = 1.0) -> float:
    """Of a random transformer's scores with those of a random table."""
    source = write(folder / "shard", 60, seed=1)
    proxy = resolve_architecture(
        ModelConfig(architecture="gpt_neox", num_layers=1, hidden_size=8, num_attention_heads=2), VOCABULARY
    )
    model = build_score_model(ScoreConfig(head_init_std=deviation), proxy, seed=4)
    table = build_score_model(ScoreConfig(family="ngram", ngram_buckets=64), proxy, seed=4, eod=EOD)
    with torch.no_grad():
        table.ngrams.table.copy_(torch.randn(64, 1, generator=torch.Generator().manual_seed(1)))
    with grouped(layout()) as groups:
        return distilled_start.rank_correlation(model, table, source, np.arange(3, 60, 2), groups, 5)


def on_ranks(rank: int, world_size: int, folder: Path) -> float:
    return correlation(folder / str(rank))


def test_the_correlation_is_the_same_on_every_number_of_ranks(tmp_path: Path) -> None:
    for rank in range(4):
        (tmp_path / str(rank)).mkdir()
    expected = correlation(tmp_path)
    assert 0.01 < abs(expected) < 1
    assert run_distributed(on_ranks, 4, tmp_path) == pytest.approx([expected] * 4, abs=1e-12)
    assert correlation(tmp_path, deviation=0.0) == 0.0  # equal scores rank nothing
