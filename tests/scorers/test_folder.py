"""A scorer's folder: what was saved is what is loaded, and nothing else is believed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.scorers.folder import DESCRIPTION, WEIGHTS, load_scorer, save_scorer
from megatron_bliss.scorers.ngrams import NgramForm, NgramScorer
from megatron_bliss.scorers.scorer import Scorer

TOKENIZER = {"kind": "bytes", "sha256": "0" * 64, "vocab_size": 257, "eod": 256, "file": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    table = np.random.default_rng(1).normal(size=64)
    scorer = Scorer(NgramScorer(NgramForm(2, 257, 256), table), 16, "mean", "document", True, {"arm": "dsir"})
    save_scorer(tmp_path / "scorer", scorer, TOKENIZER)
    return tmp_path / "scorer"


def test_a_folder_is_loaded_as_it_was_saved(folder: Path) -> None:
    found = load_scorer(folder)
    scorer = found.scorer
    assert (scorer.window, scorer.long_documents, scorer.unit, scorer.ends_documents) == (16, "mean", "document", True)
    assert found.tokenizer == TOKENIZER and scorer.trained_on == {"arm": "dsir"}
    tokens, lengths = np.arange(100) % 50, np.array([60, 0, 40])
    expected = NgramScorer(NgramForm(2, 257, 256), np.random.default_rng(1).normal(size=64))
    assert np.array_equal(scorer.score(tokens, lengths), Scorer(expected, 16, "mean").score(tokens, lengths))


def test_the_digest_follows_all_that_decides_a_score(folder: Path) -> None:
    found = load_scorer(folder)
    assert found.digest == load_scorer(folder).digest != found.with_long_documents("max").digest


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format_version", 2),
        ("kind", "pickle"),
        ("window", 0),
        ("window", "16"),
        ("long_documents", "median"),
        ("weights_sha256", "1" * 64),
        ("model", []),
        ("model", {"max_ngram": 2, "vocab_size": -1, "eod": 256}),
        ("model", {"max_ngram": 2, "vocab_size": 10**15, "eod": 256}),
        ("unknown", 1),
    ],
)
def test_a_description_that_was_changed_is_refused(folder: Path, name: str, value: object) -> None:
    path = folder / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match="expected|no usable scorer"):
        load_scorer(folder)


def test_weights_that_were_changed_are_refused(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match="copy the folder as a whole"):
        load_scorer(folder)
    with pytest.raises(FileNotFoundError, match="export_scorer"):
        load_scorer(folder.parent)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    save_scorer(tmp_path, Scorer(NgramScorer(NgramForm(1, 9, None), np.full(4, np.nan)), 16), None)
    with pytest.raises(ValueError, match="no finite numbers"):
        load_scorer(tmp_path)
