"""The numpy n-gram model: the torch table's numbers, a plain count's, and a window's whatever is beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_bliss.data.ngrams import NgramBuckets
from megatron_bliss.models.score import ACTIVATIONS, NgramTable
from megatron_bliss.models.score_architecture import NgramArchitecture
from megatron_bliss.scorers import ngrams
from megatron_bliss.scorers.ngrams import NgramForm, NgramScorer
from megatron_bliss.scorers.windows import cut

VOCABULARY, EOD = 40, 3


@pytest.fixture
def text() -> tuple[np.ndarray, np.ndarray]:
    """Tokens of 60 units, some empty, with the token that ends documents among them."""
    generator = np.random.default_rng(5)
    lengths = generator.integers(0, 30, 60)
    return generator.integers(0, VOCABULARY, lengths.sum()).astype(np.uint16), lengths


@pytest.mark.parametrize("eod", [EOD, None])
@pytest.mark.parametrize("activation", ["identity", "sigmoid"])
@pytest.mark.parametrize(("max_ngram", "buckets"), [(1, 64), (2, 256), (3, 100), (3, 2**12)])
def test_means_are_those_of_the_torch_table(text, max_ngram: int, buckets: int, activation: str, eod) -> None:
    tokens, lengths = text
    table = NgramTable(NgramArchitecture(max_ngram, buckets, 2.0), eod, torch.float64, "cpu")
    torch.nn.init.normal_(table.table, generator=torch.Generator().manual_seed(1))
    padded, ends = np.zeros((len(lengths), lengths.max()), np.int64), np.cumsum(lengths)
    for row, end, length in zip(padded, ends, lengths, strict=True):
        row[:length] = tokens[end - length : end]
    expected = ACTIVATIONS[activation](table(torch.from_numpy(padded), torch.from_numpy(lengths)))
    form = NgramForm(max_ngram, VOCABULARY, eod, activation=activation)
    scorer = NgramScorer(form, 2 * table.table.detach().numpy()[:, 0])
    found = scorer.score_windows(tokens, cut(lengths, 1000, "mean"))
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-14)


def test_sums_and_bias_are_those_of_a_plain_count(text) -> None:
    tokens, lengths = text
    table = np.random.default_rng(2).normal(size=128)
    counter = NgramBuckets(128, 3, EOD)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    columns = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    units, buckets = counter.of(tokens, rows, columns)
    expected = np.bincount(units, weights=table[buckets], minlength=len(lengths)) + 0.5
    found = NgramScorer(NgramForm(3, VOCABULARY, EOD, "sum", 0.5), table)
    np.testing.assert_allclose(found.score_windows(tokens, cut(lengths, 1000, "mean")), expected, atol=1e-12)


@pytest.mark.parametrize("how", ["mean", "first"])
def test_a_window_has_the_same_bits_whatever_is_beside_it(text, monkeypatch, how: str) -> None:
    tokens, lengths = text
    scorer = NgramScorer(NgramForm(3, VOCABULARY, EOD), np.random.default_rng(2).normal(size=128).astype(np.float32))
    windows = cut(lengths, 7, how)
    whole = scorer.score_windows(tokens, windows)
    monkeypatch.setattr(ngrams, "BLOCK_TOKENS", 9)
    assert np.array_equal(scorer.score_windows(tokens, windows), whole)
    alone = [
        scorer.score_windows(tokens[start : start + size], cut(np.array([size]), 7, how))[0]
        for start, size in zip(windows.starts, windows.sizes, strict=True)
    ]
    assert np.array_equal(alone, whole)


@pytest.mark.parametrize(
    "change",
    [{"max_ngram": 0}, {"max_ngram": 2.5}, {"reduce": "median"}, {"activation": "exp"}, {"bias": float("nan")}],
)
def test_a_form_that_cannot_be_is_refused(change: dict) -> None:
    scorer = NgramScorer(NgramForm(2, VOCABULARY, EOD), np.zeros(8))
    with pytest.raises(ValueError, match="found .*expected"):
        NgramScorer.load(scorer.describe() | change, scorer.weights())
    with pytest.raises(ValueError, match="no table"):
        NgramScorer.load(scorer.describe(), {"table": np.zeros((2, 2))})
