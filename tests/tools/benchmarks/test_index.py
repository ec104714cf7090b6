"""The benchmark of subsets and verification, at a size that shows only that it measures what it says."""

import numpy as np
import pytest

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.verify import verify_corpus
from tools.benchmarks.index import (
    deal_seconds_per_million,
    order_seconds_per_million,
    sequences_seconds_per_million,
    subset_seconds_per_million,
    synthetic_corpus,
    verify_seconds_per_million,
)


def test_synthetic_units_are_a_corpus(tmp_path):
    prefix = synthetic_corpus(70_000, tmp_path)
    assert verify_corpus(prefix)["contiguous"] and len(IndexedCorpus(prefix)) == 70_000
    scores = np.load(f"{prefix}.scores.npy")
    assert scores.dtype == np.float32 and len(np.unique(scores)) > 60_000
    assert synthetic_corpus(70_000, tmp_path) == prefix


def test_a_runs_orders_take_what_their_arrays_do(tmp_path):
    dealt, order = (measure(300_000, tmp_path) for measure in (deal_seconds_per_million, order_seconds_per_million))
    assert 8 <= order["peak_bytes_per_unit"] < 8 + 32  # int64, each unit once; pages of a small index lie mapped
    assert 16 <= dealt["peak_bytes_per_unit"] < 16 + 44  # a permutation, and each shard's sorted part of it
    assert 16 <= sequences_seconds_per_million(300_000, tmp_path)["peak_bytes_per_unit"] < 100


def test_figures_per_million_follow_from_what_was_measured(tmp_path):
    for measure in (subset_seconds_per_million, verify_seconds_per_million):
        found = measure(5000, tmp_path)
        assert found["units"] == 5000 and found["seconds"] > 0 and found["peak_bytes"] >= 0
        assert found["seconds_per_million"] == pytest.approx(found["seconds"] * 200)
        assert found["peak_bytes_per_unit"] == pytest.approx(found["peak_bytes"] / 5000)
    assert not list(tmp_path.glob("subset-*"))
    (tmp_path / "synthetic-5000.manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="found a failure of the case"):
        verify_seconds_per_million(5000, tmp_path)
