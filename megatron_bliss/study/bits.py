"""Losses of text sets in bits per byte, which compare across tokenizers and sizes of vocabulary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_bliss.config.config import Config
from megatron_bliss.data.batches import open_labelled
from megatron_bliss.data.manifest import read_manifest
from megatron_bliss.data.tokenizers import Tokenizer, load_recorded_tokenizer
from megatron_bliss.study.cells import compared_cell, table
from megatron_bliss.study.paired import results
from megatron_bliss.study.runs import StudyRun

NOTE = (
    "The losses at equal tokens in bits per byte of text: nats per labelled token x labelled tokens / their bytes in "
    "UTF-8 / ln 2. They compare with those of any other tokenizer."
)


def read_bytes_per_token(runs: Sequence[StudyRun]) -> dict[str, dict[str, float]]:
    """{variant: {test set: bytes of UTF-8 per labelled token}} of the samples that the variant's runs measure on.

    A set is left out where the corpus does not name its tokenizer or the tokenizer's file is not there.
    """
    found: dict[str, dict[str, float]] = {}
    known: dict[tuple, float | None] = {}
    for run in runs:
        config = run.config
        for prefix in (*config.data.test_prefixes, *config.data.other_prefixes):
            key = prefix, config.data.seq_length, config.evaluation.max_samples
            if key not in known:
                known[key] = _bytes_per_token(prefix, config)
            if known[key] is not None:
                found.setdefault(run.variant, {})[Path(prefix).name] = known[key]
    return found


def _bytes_per_token(prefix: str, config: Config) -> float | None:
    try:
        tokenizer = load_recorded_tokenizer(read_manifest(prefix).get("tokenizer"), config.evaluation.tokenizer_model)
    except (ValueError, FileNotFoundError):
        return None
    source = open_labelled(prefix, config.data.seq_length)
    count = min(config.evaluation.max_samples or len(source), len(source))
    tokens = size = 0
    for unit in range(count):
        batch = source.batch(np.arange(unit, unit + 1))
        ids, labels = batch.tokens[0].numpy(), batch.label_mask[0].numpy()
        tokens += int(labels.sum())
        size += labelled_bytes(tokenizer, ids, labels)
    return size / tokens if tokens and size else None


def labelled_bytes(tokenizer: Tokenizer, ids: np.ndarray, labels: np.ndarray) -> int:
    """Bytes of the text that the labelled tokens of a sample stand for; ids, labels: [tokens].

    What a run of labelled tokens adds to the text before it is counted, so that a space at its start belongs to it. The
    end of a document is no text. A character that is cut by the run's border counts as the replacement character.
    """
    borders = np.flatnonzero(np.diff(np.concatenate(([False], labels, [False])).astype(np.int8)))
    starts, ends = borders[::2], borders[1::2]

    def size(length: int) -> int:
        kept = [token for token in ids[:length].tolist() if token != tokenizer.eod]
        return len(tokenizer.decode(kept).encode("utf-8"))

    return sum(size(end) - size(start) for start, end in zip(starts.tolist(), ends.tolist(), strict=True))


def in_bits(study: Mapping) -> dict:
    """A study with its losses in bits per byte; sets whose bytes are not known in all variants are left out."""
    sizes = study.get("bytes_per_token", {})
    variants = {point["variant"] for point in study["points"]}
    names = [
        name
        for name in (*study["guided"], *study["other"])
        if all(name in sizes.get(variant, {}) for variant in variants)
    ]

    def scaled(point: Mapping) -> dict:
        factors = {name: 1 / (math.log(2) * sizes[point["variant"]][name]) for name in names}
        curves = {
            name: [[tokens, None if loss is None else loss * factors[name]] for tokens, loss in point["losses"][name]]
            for name in names
        }
        return {**point, "losses": curves}

    sides = {side: [name for name in study[side] if name in names] for side in ("guided", "other")}
    return {**study, **sides, "points": [scaled(point) for point in study["points"]] if names else []}


def bits_section(study: Mapping) -> list[str]:
    """Blocks of the page; none where no set's bytes are known."""
    found = in_bits(study)
    names = [*found["guided"], *found["other"]]
    if not names:
        return []
    lines = [["arm", *names]]
    for arm, row in results(found)["equal tokens"].items():
        lines.append([arm, *(compared_cell(row["sets"][name], arm == study["control"]) for name in names)])
    return ["## In bits per byte", NOTE, table(lines)]
