"""A scorer with all that has to be known to apply it: from tokens of units to their scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_bliss.scorers.windows import LongDocuments, Windows, cut


class WindowScorer(Protocol):
    """What scores windows: n-grams (ngrams.py) or a model (models.py)."""

    kind: str
    vocab_size: int

    def describe(self) -> dict: ...

    def weights(self) -> dict[str, np.ndarray]: ...

    @classmethod
    def load(cls, described: Mapping, weights: Mapping[str, np.ndarray]) -> WindowScorer: ...

    def score_windows(self, tokens: np.ndarray, windows: Windows) -> np.ndarray: ...


class NotFinite(FloatingPointError):
    """Scores that are no numbers; ``places``: int64, those of their units among the units given."""

    def __init__(self, places: np.ndarray) -> None:
        super().__init__(f"found {len(places)} scores that are not finite, the first at place {places[0]}")
        self.places = places


@dataclass(frozen=True)
class Scorer:
    """Scores units."""

    windows: WindowScorer
    window: int
    """Tokens that are read at once."""
    long_documents: LongDocuments = "first"
    unit: str = "document"
    """What it was trained on: documents, or windows of joined documents."""
    ends_documents: bool = False
    """Whether documents there end with the token that says so; those of raw text are then given one."""
    trained_on: dict = field(default_factory=dict)
    """For the reader: corpus, arm, round, ..."""

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Scores float32 [n] of units that follow each other in ``tokens`` [t], integers; lengths: int64 [n].

        Raises ValueError for a token outside the vocabulary, and NotFinite.
        """
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.windows.vocab_size:
            raise ValueError(
                f"found token ids {tokens.min()} to {tokens.max()}, expected 0 to {self.windows.vocab_size - 1}: the "
                "text was made with another tokenizer than the scorer's, or is damaged"
            )
        windows = cut(lengths, self.window, self.long_documents)
        scores = windows.joined(self.windows.score_windows(tokens, windows), self.long_documents)
        if not np.isfinite(scores).all():
            raise NotFinite(np.flatnonzero(~np.isfinite(scores)))
        return scores
