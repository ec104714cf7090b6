"""What work and memory of a score model follow from: the parts whose raw scores it adds up.

No module that options are read from imports torch before it computes; this one and families/ are such modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bliss.models.presets import Architecture, trunk_count, trunk_flops_per_token

TRUNK_GRADIENT = 3
"""Forward passes that a gradient of a trunk costs: its own, and a backward pass at twice that."""
NGRAM_FLOPS = 2
"""Of an n-gram: a multiply-add with its entry of the table, forward and again backward."""
NGRAM_BYTES = 48
"""Of an n-gram in a pass, estimated: its hash and the numbers on the way to it, its bucket, its entry, and masks."""


@dataclass(frozen=True)
class NgramArchitecture:
    """A linear model over hashed n-grams: f = scale x mean over the unit's n-grams of table[bucket]."""

    max_ngram: int
    """Longest n-gram, in tokens; all shorter ones count, too."""
    buckets: int
    """Rows of the table, one number each."""
    scale: float


@dataclass(frozen=True)
class ScoreArchitecture:
    """A trunk with a linear unit, a table of n-grams, or both."""

    trunk: Architecture | None = None
    ngrams: NgramArchitecture | None = None

    @property
    def trunk_parameters(self) -> int:
        """Of the trunk and its linear unit; passes over them may run in lower precision."""
        return 0 if self.trunk is None else trunk_count(self.trunk) + self.trunk.hidden_size + 1

    @property
    def table_parameters(self) -> int:
        """Of the table, which stays in fp32."""
        return 0 if self.ngrams is None else self.ngrams.buckets

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.trunk_parameters + self.table_parameters

    def flops_per_token(self, seq_length: int) -> float:
        """Of a forward pass over sequences of ``seq_length`` tokens."""
        trunk = 0.0 if self.trunk is None else trunk_flops_per_token(self.trunk, seq_length)
        return trunk + self._ngram_flops

    def gradient_flops_per_token(self, seq_length: int) -> float:
        """Of a forward and a backward pass."""
        trunk = 0.0 if self.trunk is None else trunk_flops_per_token(self.trunk, seq_length)
        return TRUNK_GRADIENT * trunk + 2 * self._ngram_flops

    def table_pass_bytes(self, tokens: int) -> int:
        """Estimated memory that a pass takes for the n-grams of so many tokens."""
        return 0 if self.ngrams is None else NGRAM_BYTES * self.ngrams.max_ngram * tokens

    @property
    def _ngram_flops(self) -> float:
        """Per token, at which n-grams of each length begin."""
        return 0.0 if self.ngrams is None else float(NGRAM_FLOPS * self.ngrams.max_ngram)
