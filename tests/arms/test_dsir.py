"""Importance weights against a naive count of n-grams; ranks, noise, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from megatron_bliss.arms import ARMS, ngrams
from megatron_bliss.arms.dsir import DsirConfig
from megatron_bliss.data.batches import UnitDataset
from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.data.guide import GuideSets
from megatron_bliss.selection import score_pass
from tests.arms.shards import EOD, LENGTH, VOCABULARY, make_inputs, scored, write
from tests.distributed import run_distributed
from tests.targets import grouped, layout

BUCKETS = 2**22
OPTIONS = DsirConfig(buckets=BUCKETS, max_ngram=3, noise=0.0)  # so many buckets that no two n-grams share one


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A shard of 50 units and a reference set of tokens below 10."""
    write(tmp_path / "shard", 50, seed=1)
    write(tmp_path / "reference", 20, seed=2, most=10)
    return tmp_path


def scores(data: Path, options: DsirConfig = OPTIONS, **changes) -> np.ndarray:
    found = scored("dsir", options, data, **changes)
    assert found.values.dtype == np.float32 and found.settings["buckets"] == options.buckets
    return found.values


def grams_of(tokens: list[int]) -> list[tuple]:
    found = [tuple(tokens[i : i + n]) for n in (1, 2, 3) for i in range(len(tokens) - n + 1)]
    return [ngram for ngram in found if EOD not in ngram]


def test_weights_are_those_of_a_naive_count(folder: Path, monkeypatch) -> None:
    shard, reference = (UnitDataset(str(folder / name), LENGTH).corpus for name in ("shard", "reference"))
    units = [shard[i][:LENGTH].tolist() for i in range(len(shard))]
    p = Counter(ngram for i in range(len(reference)) for ngram in grams_of(reference[i][:LENGTH].tolist()))
    q = Counter(ngram for unit in units for ngram in grams_of(unit))
    expected = [
        sum(np.log(p[g] / p.total() + 1e-8) - np.log(q[g] / q.total() + 1e-8) for g in grams_of(unit)) for unit in units
    ]
    np.testing.assert_allclose(scores(folder), expected, rtol=1e-5, atol=1e-4)


def parts(folder: Path) -> tuple[list[list[tuple]], Counter, Counter]:
    """N-grams of each unit of the shard, and all those of the reference set and of the shard."""
    shard, reference = (UnitDataset(str(folder / name), LENGTH).corpus for name in ("shard", "reference"))
    units = [grams_of(shard[i][:LENGTH].tolist()) for i in range(len(shard))]
    wanted = Counter(ngram for i in range(len(reference)) for ngram in grams_of(reference[i][:LENGTH].tolist()))
    return units, wanted, Counter(ngram for unit in units for ngram in unit)


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_means_and_smoothing_by_a_naive_count(folder: Path, monkeypatch, smoothing: float) -> None:
    units, wanted, pool = parts(folder)
    added = {gram: smoothing * BUCKETS * count / pool.total() for gram, count in pool.items()}
    total = wanted.total() + sum(added.values())
    ratio = {
        gram: np.log((wanted[gram] + added[gram]) / total + 1e-8) - np.log(count / pool.total() + 1e-8)
        for gram, count in pool.items()
    }
    expected = [sum(map(ratio.get, unit)) for unit in units]
    options = replace(OPTIONS, smoothing=smoothing)
    np.testing.assert_allclose(scores(folder, options), expected, rtol=1e-5, atol=1e-4)
    means = [total / max(len(unit), 1) for total, unit in zip(expected, units, strict=True)]
    found = scores(folder, replace(options, per_token=True), folder=folder / "means")
    np.testing.assert_allclose(found, means, rtol=1e-5, atol=1e-5)


def test_a_unit_without_ngrams_has_a_mean_of_zero(folder: Path) -> None:
    with CorpusWriter(str(folder / "blank"), VOCABULARY) as writer:
        writer.add([EOD, 1, 2], [1, 2])
    options = DsirConfig(noise=0.0, per_token=True)
    blank, other = scores(folder, options, source=UnitDataset(str(folder / "blank"), LENGTH))
    assert blank == 0 and np.isfinite(other) and other != 0


def test_short_units_come_last(folder: Path) -> None:
    lengths, options = UnitDataset(str(folder / "shard"), LENGTH).corpus.lengths, DsirConfig(buckets=500)
    plain, found = scores(folder, options), scores(folder, replace(options, min_tokens=14))
    long = lengths >= 14  # longer than what is read of them
    assert np.array_equal(found[long], plain[long]) and 0 < long.sum() < 50
    assert (found[~long] < plain[long].min()).all() and np.isfinite(found).all()
    with pytest.raises(
        ValueError, match="found no unit of 16 tokens or more in the shard, .*lower baselines.dsir.min_"
    ):
        scores(folder, replace(options, min_tokens=16))


def test_the_published_code_gives_the_same_weights(tmp_path: Path, monkeypatch) -> None:
    published = pytest.importorskip("data_selection", reason="pip install data-selection==1.0.3 to compare with it")
    for name, count, seed, most in (("shard", 50, 1, VOCABULARY), ("reference", 20, 2, 10)):
        corpus = write(tmp_path / name, count, seed, most, fewest=1).corpus
        words = [" ".join(f"w{token}" for token in corpus[unit][:LENGTH]) for unit in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    files, many = [[str(tmp_path / f"{name}.jsonl")] for name in ("shard", "reference")], 1 << 20
    tool = published.HashedNgramDSIR(
        *files, str(tmp_path / "cache"), num_proc=1, num_buckets=many, min_example_length=9
    )
    tool.fit_importance_estimator(num_tokens_to_fit="all")
    tool.compute_importance_weights()
    (weights,) = (np.load(path).ravel() for path in (tmp_path / "cache" / "log_importance_weights").glob("*.npy"))
    (counted,) = (np.load(path) for path in (tmp_path / "cache" / "perexample_metadata").glob("*.npy"))
    options = DsirConfig(buckets=BUCKETS, max_ngram=2, noise=0.0)
    np.testing.assert_allclose(scores(tmp_path, options), weights, rtol=1e-5, atol=1e-4)
    left_out = ~tool.perexample_metadata_filter(counted)
    found = scores(tmp_path, replace(options, min_tokens=9))
    assert 0 < left_out.sum() < 50 and (found[left_out] < weights[~left_out].min()).all()
    np.testing.assert_allclose(found[~left_out], weights[~left_out], rtol=1e-5, atol=1e-4)


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
        return ARMS["dsir"].scores(DsirConfig(buckets=500), make_inputs(folder, groups)).values


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


def test_sets_of_a_guide_count_by_their_weights(folder: Path) -> None:
    """One set ten times over weighs as much as once: its distribution counts, not its size."""
    small, large = write(folder / "small", 6, seed=4, most=10), write(folder / "large", 60, seed=5)
    counter = ngrams.NgramBuckets(5000, 2, EOD)
    p, q = (ngrams.count_reference(counter, one) for one in (small, large))
    found = ngrams.count_reference(counter, GuideSets([small, large], ["small", "large"], [3.0, 1.0]))
    assert found.sum() == pytest.approx(p.sum() + q.sum())
    np.testing.assert_allclose(found / found.sum(), 0.75 * p / p.sum() + 0.25 * q / q.sum(), atol=1e-12)
    again = ngrams.count_reference(counter, GuideSets([small, small, large], ["a", "b", "c"], [1.5, 1.5, 1.0]))
    np.testing.assert_allclose(again / again.sum(), found / found.sum(), atol=1e-12)


def test_a_set_without_ngrams_is_named(folder: Path) -> None:
    with CorpusWriter(str(folder / "blank"), VOCABULARY) as writer:
        writer.add([EOD, EOD], [1, 1])
    sets = [UnitDataset(str(folder / name), LENGTH) for name in ("reference", "blank")]
    with pytest.raises(ValueError, match="found no n-gram in the set b of the guide"):
        ngrams.count_reference(ngrams.NgramBuckets(500, 2, EOD), GuideSets(sets, ["a", "b"], []))
