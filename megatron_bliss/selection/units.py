"""What policies ask about the units they choose from, whatever those are: a corpus, or text that has no index yet."""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.provenance import provenance_codes
from megatron_bliss.selection.policy import Domains


class Units(Protocol):
    """n units that were scored. Nothing is read before it is asked for."""

    @property
    def name(self) -> str:
        """Of the corpus or folder, for messages."""

    def lengths(self) -> np.ndarray:
        """int[n] tokens."""

    def domains(self, field: str) -> Domains:
        """By the provenance's column ``field``; ValueError when no unit has a value there."""

    def corpus(self) -> IndexedCorpus:
        """Tokens of the units; ValueError that says what to do where there are none."""


class CorpusUnits:
    """The units of an indexed corpus or subset."""

    def __init__(self, prefix: str | os.PathLike) -> None:
        self.name = str(prefix)

    def lengths(self) -> np.ndarray:
        """int32[n] tokens."""
        return self.corpus().lengths.copy()

    def domains(self, field: str) -> Domains:
        """By a column of the root corpus's provenance."""
        return Domains(*provenance_codes(self.name, field))

    def corpus(self) -> IndexedCorpus:
        """Index and tokens."""
        return IndexedCorpus(self.name)
