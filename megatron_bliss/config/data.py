"""What a run chooses from and measures on: the section ``data``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Union

from megatron_bliss.config.bounds import bounded

ShardBy = Literal["random", "range", "file"]


@dataclass(frozen=True)
class DataConfig:
    """The corpus to choose from and the sets to measure on."""

    train_prefix: str = ""
    """Corpus to choose from: path without .bin/.idx, made by tools/preprocess_data.py."""
    validation_prefix: Union[list[str], str] = ""
    """The guide, validation set of the upper level: path without .bin/.idx, made by tools/prepare_validation.py. A list
    of paths: a guide of several sets, whose losses are weighted by guide_weights."""
    guide_weights: list[float] = bounded(default_factory=list, above=0)
    """Weight of each set of validation_prefix, of any sum (empty: equal ones)."""
    reference_prefix: Union[list[str], str] = ""
    """Sets to hold against drift, labelled as the guide's, a path or a list of paths: with bilevel.guide_weighting
    minimax the proxy is not to be worse on them than the control; they have no part in the guide's mean."""
    test_prefixes: list[str] = field(default_factory=list)
    """Held-out sets of the guide's kind on which every arm is measured; the first gives summary.json its
    validation_loss."""
    other_prefixes: list[str] = field(default_factory=list)
    """Held-out sets that the guide does not speak for: what a selection may cost shows on them."""
    split: str = "1,0,0"
    """Shares of the corpus in index order, as Megatron's --split: what is chosen from, the guide where
    validation_prefix is empty, the held-out set where test_prefixes is empty; such as 949,50,1."""
    blend_prefixes: list[str] = field(default_factory=list)
    """Other corpora that the target trains on beside the warm-up's shard and every selection."""
    blend_weights: list[float] = bounded(default_factory=list, above=0, below=1)
    """Share of the target's sequences from each of blend_prefixes; the selection has the rest."""
    seq_length: int = bounded(1024, minimum=1)
    """Tokens per sample of the target; longer units are cut for the proxy and the score model."""
    shard_by: ShardBy = "random"
    """How units are dealt to the disjoint shards of warm-up and rounds: at random (seeded), in index order, or by
    source file, all units of a file together (needs the corpus's provenance)."""
    num_workers: int = bounded(0, minimum=0)
    """Loader processes per rank for the target's data (0: in the training process)."""

    @property
    def guide_prefixes(self) -> list[str]:
        """The sets of the guide; none: the corpus's own part."""
        return _listed(self.validation_prefix)

    @property
    def reference_prefixes(self) -> list[str]:
        """The sets that are held against drift."""
        return _listed(self.reference_prefix)


def _listed(prefix: list[str] | str) -> list[str]:
    if isinstance(prefix, str):
        return [prefix] if prefix else []
    return prefix
