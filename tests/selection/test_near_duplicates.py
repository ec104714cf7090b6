"""Near-duplicates of better units, against Jaccard similarities counted out from the sets themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.config.selection import SelectionConfig
from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.manifest import adopt_manifest
from megatron_bliss.selection import near_duplicates
from megatron_bliss.selection.near_duplicates import MISSED, PLACES, bands, shingle_hashes, without_near_duplicates
from megatron_bliss.selection.select import apply_policy, check_selection, selection_lines

VOCABULARY = 500


def write(prefix: Path, units: list[np.ndarray]) -> str:
    with CorpusWriter(prefix, VOCABULARY) as writer:
        writer.add(np.concatenate(units), [len(unit) for unit in units])
    adopt_manifest(prefix, None)
    return str(prefix)


def edited(unit: np.ndarray, places: int, generator: np.random.Generator) -> np.ndarray:
    """A copy with other tokens in so many places that stand apart."""
    copy = unit.copy()
    copy[np.linspace(3, len(unit) - 4, places).astype(int)] = generator.integers(0, VOCABULARY, places)
    return copy


def shingles(unit: np.ndarray) -> set[tuple]:
    return {tuple(unit[start : start + 5].tolist()) for start in range(max(1, len(unit) - 4))}


def exact_similarities(units: list[np.ndarray]) -> np.ndarray:
    sets = [shingles(unit) for unit in units]
    return np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])


def walk_down(similarities: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """Units that stay, by comparing every pair."""
    kept: list[int] = []
    for unit in np.argsort(-scores):
        if not kept or similarities[unit, kept].max() < threshold:
            kept.append(int(unit))
    return sorted(kept)


@pytest.fixture
def units() -> list[np.ndarray]:
    """40 texts, each with copies: the same, one with few edits (about 0.9), one with many (about 0.3)."""
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, VOCABULARY, generator.integers(150, 300)) for _ in range(40)]
    copies = [[text, text, edited(text, 2, generator), edited(text, 20, generator)] for text in texts]
    return [unit for group in copies for unit in group]


@pytest.mark.parametrize("threshold", [0.65, 1.0])
def test_what_stays_is_what_exact_similarities_say(units: list[np.ndarray], threshold: float, tmp_path: Path) -> None:
    similarities = exact_similarities(units)
    assert not ((similarities > 0.5) & (similarities < 0.8)).any()  # three standard deviations from 0.65
    corpus = IndexedCorpus(write(tmp_path / "X", units))
    for seed in range(3):
        scores = np.random.default_rng(seed).permutation(len(units)).astype(np.float32)
        stays = without_near_duplicates(corpus, np.arange(len(units)), scores, threshold, seed=seed)
        assert np.flatnonzero(stays).tolist() == walk_down(similarities, scores, threshold)
        part = np.arange(0, len(units), 3)
        stays = without_near_duplicates(corpus, part, scores[part], threshold, seed=seed)
        assert np.flatnonzero(stays).tolist() == walk_down(similarities[np.ix_(part, part)], scores[part], threshold)


def test_a_unit_is_compared_with_those_that_stay_only(tmp_path: Path) -> None:
    """A is like B and B like C, but not A like C: without B, C stays."""
    text = np.random.default_rng(1).integers(0, VOCABULARY, 320)
    units = [text[:260], text[30:290], text[60:]]
    similarities = exact_similarities(units)
    assert similarities[0, 1] > 0.78 and similarities[1, 2] > 0.78 and similarities[0, 2] < 0.63
    corpus = IndexedCorpus(write(tmp_path / "X", units))
    for scores, expected in (([3, 2, 1], [True, False, True]), ([2, 3, 1], [False, True, False])):
        kept = without_near_duplicates(corpus, np.arange(3), np.array(scores, np.float32), 0.7, seed=0)
        assert kept.tolist() == expected


def test_which_of_equal_units_with_equal_scores_stays_is_drawn_by_seed(tmp_path: Path) -> None:
    corpus, ids, scores = IndexedCorpus(write(tmp_path / "X", [np.arange(9)] * 4)), np.arange(4), np.zeros(4)
    kept = [without_near_duplicates(corpus, ids, scores, 0.9, seed=seed).tolist() for seed in range(40)]
    assert {tuple(one) for one in kept} == {tuple(row) for row in np.eye(4, dtype=bool).tolist()}
    assert kept[5] == without_near_duplicates(corpus, ids, scores, 0.9, seed=5).tolist()


def test_hashes_are_equal_where_ngrams_are() -> None:
    generator = np.random.default_rng(0)
    multipliers = generator.integers(1 << 64, size=5, dtype=np.uint64)
    short = [np.array(unit, dtype=np.uint16) for unit in ([], [0], [0, 0], [0, 0, 0, 0], [1, 0], [0, 1], [0] * 5)]
    texts = [generator.integers(0, 3, 60).astype(np.uint16) for _ in range(20)]  # with many n-grams in common
    hashes = {}
    for unit in [*short, *texts]:
        found = shingle_hashes(unit, multipliers)
        assert len(found) == max(1, len(unit) - 4) and found.dtype == np.uint32
        for start, value in enumerate(found.tolist()):
            ngram = tuple(unit[start : start + 5].tolist())
            assert hashes.setdefault(ngram, value) == value
    assert len(set(hashes.values())) == len(hashes) > 200


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
def test_bands_are_as_long_as_they_may_be(threshold: float) -> None:
    def missed(rows: int) -> float:
        return (1 - threshold**rows) ** (PLACES // rows)

    number, rows = bands(threshold)
    assert number == PLACES // rows >= 2 and missed(rows) <= MISSED
    assert rows == PLACES // 2 or missed(rows + 1) > MISSED


@pytest.mark.parametrize("policy", ["top_fraction", "soft", "gumbel", "mixed", "threshold", "token_budget"])
def test_the_next_best_fill_up_under_any_policy(policy: str, units: list[np.ndarray], tmp_path: Path) -> None:
    prefix, scores = write(tmp_path / "X", units), np.random.default_rng(3).permutation(160).astype(np.float32)
    settings = {"fraction": 0.2, "threshold": 80.0, "tokens": 4000, "temperature": 1.0}
    selection = SelectionConfig(policy, near_duplicates=0.65, settings=settings)
    check_selection(selection)
    excluded = np.array([0, 1])
    ids, record, _ = apply_policy(prefix, scores, selection, seed=1, excluded=excluded)
    similarities = exact_similarities(units)
    among_kept = similarities[np.ix_(ids, ids)] - np.eye(len(ids))
    assert among_kept.max() < 0.65 and not np.isin(ids, excluded).any()
    staying = [unit + 2 for unit in walk_down(similarities[2:, 2:], scores[2:], 0.65)]
    by_score = np.array(sorted(staying, key=lambda unit: -scores[unit]))
    if policy in ("soft", "gumbel", "mixed"):
        assert len(ids) == 32 and set(ids.tolist()) <= set(staying)
    elif policy == "token_budget":
        fits = np.cumsum(IndexedCorpus(prefix).lengths[by_score]) <= 4000
        np.testing.assert_array_equal(ids, np.sort(by_score[fits]))
    else:
        expected = by_score[:32] if policy == "top_fraction" else by_score[scores[by_score] >= 80]
        np.testing.assert_array_equal(ids, np.sort(expected))
    assert record["near_duplicates"] == 0.65 and record["near_duplicates_left_out"] == 158 - len(staying)
    assert record.get("fraction", 0.2) == 0.2
    assert f"left out: {158 - len(staying)} near-duplicates of units with a better score" in selection_lines(record)


def test_off_is_as_before_and_a_missing_library_is_named(units: list[np.ndarray], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(near_duplicates, "find_spec", lambda name: None)
    prefix, scores = write(tmp_path / "X", units), np.arange(160.0)
    _, record, _ = apply_policy(prefix, scores, SelectionConfig("top_fraction"), seed=1)
    assert record == {"name": "top_fraction", "fraction": 0.2, "seed": 1, "threshold": 128.0}
    with pytest.raises(ValueError, match=r"no package datasketch, .* pip install '.\[duplicates\]'"):
        apply_policy(prefix, scores, SelectionConfig(near_duplicates=0.8), seed=1)
