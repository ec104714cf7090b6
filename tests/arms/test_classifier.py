"""Log-odds against a naive count of n-grams and scikit-learn; what it can tell; ranks and kills."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.arms import ARMS, logistic, ngrams
from megatron_bliss.arms.classifier import ClassifierConfig, drawn
from megatron_bliss.data.batches import UnitDataset
from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.selection import score_pass
from tests.arms.shards import EOD, LENGTH, VOCABULARY, make_inputs, scored, write
from tests.distributed import run_distributed
from tests.targets import grouped, layout

OPTIONS = ClassifierConfig(buckets=500, samples=30, l2=1e-3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A shard of 50 units and a reference set of 20 with tokens below 10."""
    write(tmp_path / "shard", 50, seed=1)
    write(tmp_path / "reference", 20, seed=2, most=10)
    return tmp_path


def shares(dataset: UnitDataset, buckets: int) -> np.ndarray:
    """Features of every unit, by one unit and one n-gram at a time: [units, m]."""
    counter, found = ngrams.NgramBuckets(buckets, 1, EOD), np.zeros((len(dataset), buckets))
    for unit in range(len(dataset)):
        tokens = dataset.corpus[unit][:LENGTH]
        for gram in [tokens[i : i + n] for n in (1, 2) for i in range(len(tokens) - n + 1)]:
            if EOD not in gram:
                counter.max_ngram = len(gram)
                rows, places = counter.of(np.array(gram), np.zeros(len(gram), np.int64), np.arange(len(gram)))
                found[unit, places[-1]] += 1  # the longest comes last
        found[unit] /= max(found[unit].sum(), 1)
    return found


def test_log_odds_are_those_of_scikit_learn_on_a_naive_count(folder: Path) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn comes with the extra eval")
    found = scored("classifier", OPTIONS, folder)
    with grouped(layout()) as groups:
        guide, units = drawn(OPTIONS, make_inputs(folder, groups))
    assert sorted(guide) == list(range(20)) and len(set(units)) == 20
    shard, reference = (shares(UnitDataset(str(folder / name), LENGTH), 500) for name in ("shard", "reference"))
    x, y = np.concatenate([reference[guide], shard[units]]), np.repeat([1, -1], 20)
    model = linear_model.LogisticRegression(C=1 / (OPTIONS.l2 * 40), tol=1e-10, max_iter=10_000).fit(x, y)
    np.testing.assert_allclose(found.values, model.decision_function(shard), atol=1e-4)
    assert found.values.dtype == np.float32 and found.flops == 0
    expected = {"method": "classifier", "buckets": 500, "l2": 1e-3, "guide_samples": 20, "shard_units": 20}
    assert expected.items() <= found.settings.items() and 0 < found.settings["training_loss"] < np.log(2)


def test_units_like_the_guide_score_higher(folder: Path) -> None:
    with CorpusWriter(str(folder / "mixed"), VOCABULARY) as writer:
        generator = np.random.default_rng(5)
        for most in (10, VOCABULARY) * 30:
            writer.add(generator.integers(1, most, LENGTH), [LENGTH])
    found = scored("classifier", ClassifierConfig(), folder, source=UnitDataset(str(folder / "mixed"), LENGTH)).values
    assert np.mean(found[::2, None] > found[None, 1::2]) > 0.95


def of_rank(rank: int, world_size: int, folder: Path) -> np.ndarray | None:
    score_pass.BLOCK_UNITS = 8
    with grouped(layout()) as groups:
        return ARMS["classifier"].scores(OPTIONS, make_inputs(folder, groups)).values


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_change_nothing(folder: Path, ranks: int) -> None:
    main, *others = run_distributed(of_rank, ranks, folder)
    shutil.rmtree(folder / "parts")
    assert np.array_equal(main, scored("classifier", OPTIONS, folder).values) and others == [None] * (ranks - 1)


def test_a_killed_stage_learns_once_and_ends_with_the_same_scores(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(score_pass, "BLOCK_UNITS", 8)
    whole = scored("classifier", OPTIONS, folder, folder=folder / "whole").values
    save, saved = score_pass.save_array, []

    def mortal(path, array):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, array)

    with monkeypatch.context() as patch:
        patch.setattr(score_pass, "save_array", mortal)
        with pytest.raises(KeyboardInterrupt):
            scored("classifier", OPTIONS, folder)
    monkeypatch.setattr(logistic, "fit", None)  # it is not learned again
    assert np.array_equal(scored("classifier", OPTIONS, folder).values, whole)


def test_each_rounds_seed_draws_other_units(folder: Path) -> None:
    with grouped(layout()) as groups:
        first, again, other = (drawn(OPTIONS, make_inputs(folder, groups, seed=seed))[1] for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("name", ["guide", "shard"])
def test_a_class_without_text_is_refused(folder: Path, name: str) -> None:
    with CorpusWriter(str(folder / "empty"), VOCABULARY) as writer:
        writer.add([EOD, EOD], [2])
    changes = {"reference" if name == "guide" else "source": UnitDataset(str(folder / "empty"), LENGTH)}
    with pytest.raises(ValueError, match=f"found no n-gram in the {name}, expected text"):
        scored("classifier", OPTIONS, folder, **changes)
