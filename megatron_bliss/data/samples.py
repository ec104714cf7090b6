"""Decoded samples of a scored corpus, for people to read."""

from __future__ import annotations

import numpy as np

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.manifest import read_manifest
from megatron_bliss.data.provenance import read_provenance
from megatron_bliss.data.tokenizers import load_recorded_tokenizer

MAX_TOKENS = 256


def best_and_worst(prefix: str, scores: np.ndarray, count: int = 12) -> dict[str, list[dict]]:
    """The ``count`` highest- and lowest-scored units of a corpus as text with score and source.

    Returns ``{"best": [{"text", "score", ...provenance}], "worst": [...]}``; texts are None where the tokenizer file
    that the manifest names is no longer there.
    """
    best, worst = extremes(scores, min(count, len(scores)))
    return {"best": _describe(prefix, best, scores), "worst": _describe(prefix, worst, scores)}


def extremes(scores: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` highest scores' units, highest first, and the lowest ones', lowest first; no sort of all scores."""
    bounds = np.partition(scores, [count - 1, len(scores) - count])
    low, high = np.flatnonzero(scores <= bounds[count - 1]), np.flatnonzero(scores >= bounds[len(scores) - count])
    best = high[np.argsort(scores[high], kind="stable")][::-1]
    return best[:count], low[np.argsort(scores[low], kind="stable")][:count]


def _describe(prefix: str, ids: np.ndarray, scores: np.ndarray) -> list[dict]:
    corpus = IndexedCorpus(prefix)
    sources = _sources(prefix, ids)
    try:
        decode = load_recorded_tokenizer(read_manifest(prefix)["tokenizer"]).decode
    except (ValueError, FileNotFoundError):  # scores and selection do not need the file, only this view of them does
        decode = None
    texts = [decode(corpus[int(unit)][:MAX_TOKENS].tolist()) if decode else None for unit in ids]
    rows = zip(ids, texts, sources, strict=True)
    return [{"text": text, "score": float(scores[unit]), **source} for unit, text, source in rows]


def _sources(prefix: str, ids: np.ndarray) -> list[dict]:
    try:
        return read_provenance(prefix, ids).to_pylist()
    except ValueError:  # a corpus made by other software has no provenance
        return [{} for _ in ids]
