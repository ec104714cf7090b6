"""Shards and reference sets for arms that need no run around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_bliss.arms import ARMS
from megatron_bliss.arms.inputs import Inputs, Scores
from megatron_bliss.data.batches import UnitDataset
from megatron_bliss.data.corpus_writer import CorpusWriter
from tests.targets import grouped, layout

EOD, VOCABULARY, LENGTH = 0, 40, 12
FILES = {"source": "shard", "reference": "reference"}


def write(path: Path, count: int, seed: int, most: int = VOCABULARY, fewest: int = 0) -> UnitDataset:
    """Units of 1 to 15 tokens from ``fewest`` on (0: the end of a document) and below ``most``."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 16, count)
    with CorpusWriter(str(path), VOCABULARY) as writer:
        writer.add(generator.integers(fewest, most, lengths.sum()), lengths)
    return UnitDataset(str(path), LENGTH)


def make_inputs(data: Path, groups, **changes) -> Inputs:
    """The round of the shard ``data/shard`` and the reference set ``data/reference``."""
    defaults = {
        **{name: UnitDataset(str(data / file), LENGTH) for name, file in FILES.items() if name not in changes},
        "train_prefix": "",
        "eod": EOD,
        "seed": 3,
        "folder": data / "parts",
        "groups": groups,
        "micro_batch_size": 4,
        "show_progress": False,
        "description": "round 1",
        "load_target": None,
        "load_moments": None,
        "target_architecture": None,
        "target_optimizer": None,
        "load_proxy": None,
        "load_score_model": None,
        "load_tied_proxy": None,
        "new_score_model": None,
        "train": None,
    }
    return Inputs(**defaults | changes)


def scored(name: str, options: object, data: Path, **changes) -> Scores:
    """What the arm ``name`` makes of it in a process of its own."""
    with grouped(layout()) as groups:
        return ARMS[name].scores(options, make_inputs(data, groups, **changes))
