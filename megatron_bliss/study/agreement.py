"""How far the scores of a study's arms agree: on the same units of the same shards, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from megatron_bliss.base.files import read_json
from megatron_bliss.run.scorers import BEST_SHARE, agreement
from megatron_bliss.study.cells import format_spread, names_in_code, table
from megatron_bliss.study.description import Study
from megatron_bliss.study.paired import Spread, spread
from megatron_bliss.study.runs import StudyRun

MOST_IN_MATRIX = 10
"""With more points, each is compared with the first alone."""
MEASURES = {"rank_correlation": "Rank correlation (Spearman)", "overlap": f"Overlap of the best {BEST_SHARE:.0%}"}
NOTE = (
    "Scores of the same units of the same shards, mean ± standard error over the seeds; with several rounds, the mean "
    "over them. Overlap: the share of the best {share:.0%} by one that is in the best {share:.0%} by the other; scores "
    "that know nothing of each other have {share:.0%}."
)


def read_agreement(study: Study, runs: Sequence[StudyRun]) -> list[dict]:
    """{"seed", "first", "second", "rank_correlation", "overlap"} of every pair of VARIANT/ARM and seed with a shard in
    common; [] where the study does not ask for it."""
    found = []
    for seed in study.seeds:
        folders = {
            f"{run.variant}/{arm}": run.folder / arm for run in runs if run.seed == seed for arm in run.config.arms
        }
        for first, second in pairs([place for place in study.agreement if place in folders]):
            rounds = _rounds(folders[first], folders[second])
            if rounds:
                means = {key: float(np.mean([one[key] for one in rounds])) for key in MEASURES}
                found.append({"seed": seed, "first": first, "second": second, **means})
    return found


def pairs(places: Sequence[str]) -> list[tuple[str, str]]:
    """Which are compared: all with each other, or, where they are many, each with the first."""
    if len(places) <= MOST_IN_MATRIX:
        return list(combinations(places, 2))
    return [(places[0], place) for place in places[1:]]


def _rounds(first: Path, second: Path) -> list[dict[str, float]]:
    """The agreement of two arms in each round whose shard is the same for both."""
    found = []
    for path in sorted(first.glob("round_*/score/scores.npy")):
        other = second / path.relative_to(first)
        if other.is_file() and _shard(path) == _shard(other):
            values = np.load(path, allow_pickle=False), np.load(other, allow_pickle=False)
            known = np.isfinite(values[0]) & np.isfinite(values[1])
            if known.sum() > 1:
                found.append(agreement(values[0][known], values[1][known]))
    return found


def _shard(scores: Path) -> str:
    return read_json(scores.with_suffix(".json"))["corpus_digest"]


def agreement_section(study: Mapping) -> list[str]:
    """Blocks of the page: a matrix per measure, or, for many arms, a row per arm; none without a comparison."""
    records = study.get("agreement")
    if not records:
        return []
    places = list(dict.fromkeys(one[side] for one in records for side in ("first", "second")))
    note = NOTE.format(share=BEST_SHARE)
    values = {key: _values(records, key) for key in MEASURES}
    if len({one["first"] for one in records}) == 1 and len(places) > 2:
        rows = [
            [place, *(format_spread(values[key][places[0], place], digits=2) for key in MEASURES)]
            for place in places[1:]
        ]
        note += f" Each arm against {names_in_code([places[0]])}."
        return ["## Agreement of scores", note, table([["arm", *MEASURES.values()], *rows])]
    blocks = ["## Agreement of scores", note]
    for key, title in MEASURES.items():
        rows = [[first, *(_cell(values[key], first, second) for second in places)] for first in places]
        blocks += [f"### {title}", table([["", *places], *rows])]
    return blocks


def _values(records: Sequence[Mapping], key: str) -> dict[tuple[str, str], Spread]:
    found: dict[tuple[str, str], list[float]] = {}
    for one in records:
        found.setdefault((one["first"], one["second"]), []).append(one[key])
    return {pair: spread(values) for pair, values in found.items()}


def _cell(values: Mapping[tuple[str, str], Spread], first: str, second: str) -> str:
    """Both measures are the same either way."""
    if first == second:
        return "1"
    found = values.get((first, second)) or values.get((second, first))
    return "-" if found is None else format_spread(found, digits=2)
