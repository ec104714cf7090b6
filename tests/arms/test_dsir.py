"""Importance weights against a naive count of n-grams; ranks, noise, and what is refused."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from megatron_bliss.arms import ARMS, ngrams
from megatron_bliss.arms.dsir import DsirConfig
from megatron_bliss.arms.inputs import Inputs
from megatron_bliss.data.batches import UnitDataset
from megatron_bliss.data.indexed import CorpusWriter
from megatron_bliss.selection import score_pass
from tests.distributed import run_distributed
from tests.targets import grouped, layout

EOD, VOCABULARY, LENGTH = 0, 40, 12
OPTIONS = DsirConfig(buckets=2**31, max_ngram=3, noise=0.0)  # so many buckets that no two n-grams share one


def write(path: Path, count: int, seed: int, most: int = VOCABULARY) -> UnitDataset:
    """Units of 1 to 15 tokens below ``most``, the end of a document among them."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 16, count)
    with CorpusWriter(str(path), VOCABULARY) as writer:
        writer.add(generator.integers(0, most, lengths.sum()), lengths)
    return UnitDataset(str(path), LENGTH)


def inputs(folder: Path, groups, **changes) -> Inputs:
    """A shard of 50 units and a reference set of tokens below 10."""
    defaults = {
        "source": UnitDataset(str(folder / "shard"), LENGTH),
        "reference": UnitDataset(str(folder / "reference"), LENGTH),
        "train_prefix": "",
        "eod": EOD,
        "seed": 3,
        "folder": folder / "parts",
        "groups": groups,
        "micro_batch_size": 4,
        "show_progress": False,
        "description": "round 1",
        "load_target": None,
        "load_moments": None,
        "target_architecture": None,
        "target_optimizer": None,
        "load_proxy": None,
        "load_score_model": None,
        "new_score_model": None,
        "train": None,
    }
    return Inputs(**defaults | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "shard", 50, seed=1)
    write(tmp_path / "reference", 20, seed=2, most=10)
    return tmp_path


def scores(folder: Path, options: DsirConfig = OPTIONS, **changes) -> np.ndarray:
    with grouped(layout()) as groups:
        found = ARMS["dsir"].scores(options, inputs(folder, groups, **changes))
    assert found.values.dtype == np.float32 and found.settings["buckets"] == options.buckets
    return found.values


def grams_of(tokens: list[int]) -> list[tuple]:
    found = [tuple(tokens[i : i + n]) for n in (1, 2, 3) for i in range(len(tokens) - n + 1)]
    return [ngram for ngram in found if EOD not in ngram]


def test_weights_are_those_of_a_naive_count(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(ngrams, "NgramBuckets", SmallBuckets)
    shard, reference = (UnitDataset(str(folder / name), LENGTH).corpus for name in ("shard", "reference"))
    units = [shard[i][:LENGTH].tolist() for i in range(len(shard))]
    p = Counter(ngram for i in range(len(reference)) for ngram in grams_of(reference[i][:LENGTH].tolist()))
    q = Counter(ngram for unit in units for ngram in grams_of(unit))
    expected = [
        sum(np.log(p[g] / p.total() + 1e-8) - np.log(q[g] / q.total() + 1e-8) for g in grams_of(unit)) for unit in units
    ]
    np.testing.assert_allclose(scores(folder), expected, rtol=1e-5, atol=1e-4)


class SmallBuckets(ngrams.NgramBuckets):
    """One bucket per n-gram of this test, numbered as they come: a hash without collisions and without 2^31 counts."""

    numbers: dict = {}

    def __init__(self, *options) -> None:
        super().__init__(*options)
        self.wide, self.buckets = self.buckets, 20_000

    def of(self, tokens, rows, columns):
        narrow, self.buckets = self.buckets, self.wide
        found_rows, found = super().of(tokens, rows, columns)
        self.buckets = narrow
        return found_rows, np.array([self.numbers.setdefault(int(g), len(self.numbers)) for g in found], dtype=np.int64)


def test_units_like_the_reference_weigh_more(folder: Path) -> None:
    with CorpusWriter(str(folder / "mixed"), VOCABULARY) as writer:
        generator = np.random.default_rng(5)
        for most in (10, VOCABULARY) * 30:
            writer.add(generator.integers(1, most, LENGTH), [LENGTH])
    found = scores(folder, DsirConfig(noise=0.0), source=UnitDataset(str(folder / "mixed"), LENGTH))
    assert found[::2].min() > found[1::2].max()


def of_rank(rank: int, world_size: int, folder: Path) -> np.ndarray | None:
    score_pass.BLOCK_UNITS = ngrams.BLOCK_UNITS = 8
    with grouped(layout()) as groups:
        assert dist.get_world_size(groups.world_group) == world_size
        return ARMS["dsir"].scores(DsirConfig(buckets=500), inputs(folder, groups)).values


def test_ranks_change_nothing(folder: Path) -> None:
    main, other = run_distributed(of_rank, 2, folder)
    shutil.rmtree(folder / "parts")
    alone = scores(folder, DsirConfig(buckets=500))
    assert np.array_equal(main, alone) and other is None


def test_noise_has_the_rounds_seed(folder: Path) -> None:
    plain, options = scores(folder, DsirConfig(buckets=500, noise=0.0)), DsirConfig(buckets=500)
    first, again, other = (scores(folder, options, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    noise = np.random.Generator(np.random.PCG64(3)).gumbel(size=len(plain))
    np.testing.assert_allclose(first, plain + noise, rtol=1e-5)


def test_a_reference_without_text_is_refused(folder: Path) -> None:
    with CorpusWriter(str(folder / "empty"), VOCABULARY) as writer:
        writer.add([EOD, EOD], [2])
    with pytest.raises(ValueError, match="found no n-gram in the reference set, expected text"):
        scores(folder, DsirConfig(), reference=UnitDataset(str(folder / "empty"), LENGTH))
