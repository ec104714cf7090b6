"""What a round's score stage leaves for others: its scorer, and how far that is from the round before's."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_bliss.arms.influence_model import spearman
from megatron_bliss.data.batches import UnitDataset
from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.manifest import corpus_digest, read_manifest
from megatron_bliss.run.session import Round, Session
from megatron_bliss.scorers.folder import load_scorer, save_scorer
from megatron_bliss.scorers.scorer import Scorer, WindowScorer
from megatron_bliss.scorers.units import flat_units

SCORER = "scorer"
"""Its folder in that of the score stage."""
COMPARED_UNITS = 4096
"""Of a shard, at most, on which two rounds' scorers are compared."""
BEST_SHARE = 0.2
"""Of these, whose overlap is told."""


def keep_scorer(this: Round, scorer: WindowScorer, folder: Path) -> None:
    """Write what the arm has learned to the score stage's folder; on the main rank.

    It reads as far as the target does, as it did in the run. The tokenizer's file is added when it is exported.
    """
    session, data = this.session, this.session.config.data
    manifest = read_manifest(data.train_prefix)
    tokenizer = manifest["tokenizer"] | {"file": None}
    trained_on = {**this.labels, "corpus_digest": corpus_digest(data.train_prefix), "seed": session.config.seed}
    kept = Scorer(scorer, data.seq_length, "first", manifest["unit"], _ends_documents(session), trained_on)
    save_scorer(folder / SCORER, kept, tokenizer)


def _ends_documents(session: Session) -> bool:
    """Whether documents of the corpus end with EOD: as its manifest says, or as its first unit shows."""
    prefix = session.config.data.train_prefix
    settings = read_manifest(prefix).get("settings")
    if isinstance(settings, dict) and "append_eod" in settings:
        return bool(settings["append_eod"])
    first = IndexedCorpus(prefix)[0]
    return bool(len(first) and first[-1] == session.eod)


def drift(this: Round, source: UnitDataset, values: np.ndarray) -> dict | None:
    """How this round's scores [units] of some units differ from those that the last round's scorer gives them.

    ``units``, and their :func:`agreement`. None in the first round, and of an arm that learns no scorer. On the main
    rank.
    """
    before = this.before.folder("score") / SCORER if this.number > 1 else None
    if before is None or not before.is_dir():
        return None
    scorer = load_scorer(before).scorer
    step = max(1, -(-len(source) // COMPARED_UNITS))
    units = np.arange(0, len(source), step)
    parts = [flat_units(source.corpus, unit, unit + 1, source.seq_length) for unit in units.tolist()]
    tokens, lengths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    earlier, now = scorer.score(tokens, lengths), values[units]
    return {"units": len(units), **agreement(earlier, now)}


def agreement(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """How alike two scores [units] of the same units are.

    ``rank_correlation`` (Spearman), and ``overlap``: the share of the best fifth by one that is in the best fifth by
    the other.
    """
    best = max(1, round(BEST_SHARE * len(first)))
    kept = [set(np.argsort(-one, kind="stable")[:best].tolist()) for one in (first, second)]
    return {"rank_correlation": spearman(first, second), "overlap": len(kept[0] & kept[1]) / best}
