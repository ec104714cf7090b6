"""A score model that reads windows in batches of like lengths: the model's own numbers, whatever the batches."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from megatron_bliss.models.presets import PRESETS, Architecture
from megatron_bliss.models.score import score_model_of
from megatron_bliss.models.score_architecture import NgramArchitecture, ScoreArchitecture
from megatron_bliss.scorers.models import ModelScorer, Reading, batch_tokens
from megatron_bliss.scorers.scorer import NotFinite, Scorer
from megatron_bliss.scorers.windows import cut
from tools.benchmarks.measure import measure_peak

CPU = torch.device("cpu")
VOCABULARY = 50
ARCHITECTURE = Architecture("gpt_neox", 2, 16, 32, 2, 2, VOCABULARY)


@pytest.fixture(params=[None, NgramArchitecture(2, 64, 3.0)], ids=["transformer", "both"])
def model(request) -> torch.nn.Module:
    found = score_model_of(ScoreArchitecture(ARCHITECTURE, request.param), "sigmoid", 3)
    torch.nn.init.normal_(found.head.weight, generator=torch.Generator().manual_seed(1))
    if request.param is not None:
        torch.nn.init.normal_(found.ngrams.table, generator=torch.Generator().manual_seed(2))
    return found


@pytest.fixture
def text() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    lengths = generator.integers(0, 30, 40)
    return generator.integers(0, VOCABULARY, lengths.sum()).astype(np.uint16), lengths


def test_scores_are_the_models_own_for_any_size_of_a_batch(model, text) -> None:
    tokens, lengths = text
    windows = cut(lengths, 12, "mean")
    expected = [
        model(torch.from_numpy(tokens[start : start + size].astype(np.int64))[None], torch.tensor([size])).item()
        if size
        else model(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0])).item()
        for start, size in zip(windows.starts, windows.sizes, strict=True)
    ]
    for places in (1, 24, 100, 10_000):
        scorer = ModelScorer(model, Reading(batch_tokens=places))
        np.testing.assert_allclose(scorer.score_windows(tokens, windows), expected, atol=1e-6)
        assert scorer.padding.tokens == lengths.sum() <= scorer.padding.places
        again = ModelScorer(model, Reading(batch_tokens=places))
        assert np.array_equal(again.score_windows(tokens, windows), scorer.score_windows(tokens, windows))


def test_sorting_leaves_little_padding(model) -> None:
    generator = np.random.default_rng(1)
    lengths = np.minimum(generator.lognormal(5.6, 1.0, 1000).astype(np.int64) + 1, 400)
    tokens = generator.integers(0, VOCABULARY, lengths.sum()).astype(np.uint16)
    scorer = ModelScorer(model, Reading(batch_tokens=4096))
    scorer.score_windows(tokens, cut(lengths, 400, "mean"))
    assert scorer.padding.waste < 0.05


def test_bf16_ranks_alike_and_leaves_the_weights_that_are_saved_as_they_are(model, text) -> None:
    windows, before = cut(text[1], 100, "mean"), ModelScorer(model).weights()
    exact = ModelScorer(model).score_windows(text[0], windows)
    scorer = ModelScorer(model, Reading(params_dtype="bf16"))
    low = scorer.score_windows(text[0], windows)
    assert 0 < np.abs(low - exact).max() < 0.05 and len(set(low.tolist())) > 35
    assert all(np.array_equal(array, before[name]) for name, array in scorer.weights().items())


def test_a_loaded_model_has_the_same_bits_and_another_is_refused(model, text) -> None:
    scorer = ModelScorer(model)
    described, weights = scorer.describe(), scorer.weights()
    windows = cut(text[1], 100, "mean")
    loaded = ModelScorer.load(described, weights)
    assert np.array_equal(loaded.score_windows(text[0], windows), scorer.score_windows(text[0], windows))
    larger = described | {"trunk": described["trunk"] | {"ffn_hidden_size": 10**12}}
    deeper = described | {"trunk": described["trunk"] | {"num_layers": 10**12}}
    for changed, fewer in ((larger, weights), (deeper, weights), (described, dict(list(weights.items())[1:]))):
        with pytest.raises(ValueError, match="export it again"):
            ModelScorer.load(changed, fewer)
    with pytest.raises(ValueError, match="num_layers '2'"):
        ModelScorer.load(described | {"trunk": described["trunk"] | {"num_layers": "2"}}, weights)


def test_scores_that_are_no_numbers_and_tokens_that_are_unknown_are_told(model, text) -> None:
    tokens, lengths = text
    with torch.no_grad():
        model.embedding.weight[int(tokens[0])] = float("nan")
    ends = np.cumsum(lengths)
    expected = [i for i in range(len(lengths)) if tokens[0] in tokens[ends[i] - lengths[i] : ends[i]]]
    with pytest.raises(NotFinite) as caught:
        Scorer(ModelScorer(model), 100).score(tokens, lengths)
    assert caught.value.places.tolist() == expected
    with pytest.raises(ValueError, match=f"found token ids 0 to {VOCABULARY}, expected 0 to {VOCABULARY - 1}"):
        Scorer(ModelScorer(model), 100).score(np.array([0, VOCABULARY]), np.array([2]))


def measured_peaks(preset: str, gib: float) -> list[float]:
    """Of the bound, what a batch takes of short windows and of long ones."""
    model = score_model_of(ScoreArchitecture(PRESETS[preset]), "identity", None).requires_grad_(False)
    places, found = batch_tokens(model, "fp32", gib), []
    scorer = ModelScorer(model, Reading(batch_tokens=places))
    for window in (64, 1024):
        lengths = np.full(places // window, window)
        tokens = np.zeros(lengths.sum(), np.uint16)
        scorer.score_windows(tokens[: 2 * window], cut(lengths[:2], window, "mean"))
        windows = cut(lengths, window, "mean")
        peak = measure_peak(lambda windows=windows, tokens=tokens: scorer.score_windows(tokens, windows), CPU)
        found.append(peak.peak / 2**30 / gib)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks of resident memory are measured on Linux")
@pytest.mark.parametrize("preset", ["pythia-14m", "pythia-31m"])
def test_a_batch_takes_no_more_memory_than_its_bound(preset: str) -> None:
    """Measured, in a process of its own: a run that was made in this one keeps what it frees."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert all(0.5 < share < 1.03 for share in pool.submit(measured_peaks, preset, 0.25).result())


def test_more_memory_means_larger_batches(model) -> None:
    assert batch_tokens(model, "fp32", 0.25) < batch_tokens(model, "bf16", 0.25) < batch_tokens(model, "bf16", 1.0)
