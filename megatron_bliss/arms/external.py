"""Scores from a file, made by anything: one number per unit of the corpus, of which each round takes its shard's.

A ``.npy`` file holds float [units]; of ``.parquet``, ``.csv`` and ``.jsonl`` files (the last two also ``.gz`` and
``.zst``) a column is taken. Nothing is unpickled. Where a ``.json`` of the same name lies beside the file
(``scores.json`` beside ``scores.npy``, as a run leaves them) and has a ``corpus_digest``, that has to be the corpus's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from megatron_bliss.arms.arm import Arm
from megatron_bliss.arms.inputs import Inputs, Scores


@dataclass(frozen=True)
class ExternalConfig:
    """The arm external: scores from a file."""

    scores: str = ""
    """File of one score per unit of data.train_prefix, in its order, higher is better: .npy, .parquet, .csv, .jsonl."""
    column: str = ""
    """Column of a table, or key of JSON lines, that holds the scores (not needed where there is only one)."""


def scores(options: ExternalConfig, inputs: Inputs) -> Scores:
    """Those of the shard's units."""
    from megatron_bliss.base.files import sha256_file
    from megatron_bliss.base.parallel import failing_together
    from megatron_bliss.data.subset import units_within

    found = Scores(None)
    with failing_together(inputs.groups):
        if inputs.groups.is_main:
            units = units_within(inputs.source.corpus.prefix, inputs.train_prefix)
            values = read_scores(options, inputs.train_prefix)[units]
            found = Scores(values, {"method": "external", **asdict(options), "sha256": sha256_file(options.scores)})
    return found


def read_scores(options: ExternalConfig, train_prefix: str) -> np.ndarray:
    """The file's scores, float32, one finite number per unit of the corpus; ValueError for anything else."""
    from megatron_bliss.data.manifest import read_manifest
    from megatron_bliss.selection.score_files import Options, check_belongs, read_scores_column

    names = Options("baselines.external.scores", "baselines.external.column")
    units = read_manifest(train_prefix)["counts"]["units"]
    check_belongs(options.scores, train_prefix, names)
    return read_scores_column(options.scores, options.column, units, of=train_prefix, options=names)


def check(options: ExternalConfig, train_prefix: str) -> None:
    """Refuse a file that a round could not use."""
    read_scores(options, train_prefix)


ARM = Arm("numbers from a file, made by whatever you like", scores, settings=ExternalConfig, check=check)
