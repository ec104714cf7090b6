"""Agreement of scores by hand, from files, and as a matrix or a column."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.run.scorers import agreement
from megatron_bliss.study.agreement import agreement_section, pairs, read_agreement
from megatron_bliss.study.description import read_study
from megatron_bliss.study.runs import study_runs


def test_agreement_by_hand() -> None:
    first = np.arange(10.0)
    second = first.copy()
    second[[8, 0]] = second[[0, 8]]
    found = agreement(first, second)
    assert found["overlap"] == 0.5  # the best two are 8 and 9, and 0 and 9
    assert found["rank_correlation"] == pytest.approx(1 - 6 * (8**2 + 8**2) / (10 * 99))
    assert agreement(first, -first) == {"rank_correlation": -1.0, "overlap": 0.0}
    assert agreement(first, first**3) == {"rank_correlation": pytest.approx(1.0), "overlap": 1.0}


def test_scores_of_a_studys_runs(given: Path, finished: Path) -> None:
    """A policy has no part in scores; the control's are others."""
    records = json.loads((finished / "study.json").read_text())["agreement"]
    assert [(one["seed"], one["first"], one["second"]) for one in records[:3]] == [
        (1, "hard/dsir", "soft/dsir"),
        (1, "hard/dsir", "hard/random"),
        (1, "soft/dsir", "hard/random"),
    ]
    assert len(records) == 6
    for one in records:
        folders = [finished / f"runs/seed_{one['seed']}" / one[side] for side in ("first", "second")]
        scores = [np.load(folder / "round_01/score/scores.npy") for folder in folders]
        assert {key: one[key] for key in ("rank_correlation", "overlap")} == agreement(*scores)
        assert (one["rank_correlation"] == pytest.approx(1.0)) is (one["second"] == "soft/dsir")
    page = (finished / "study.md").read_text()
    assert "| hard/dsir | 1 | 1.00 ± 0.00 | " in page and "### Overlap of the best 20%" in page
    study = replace(read_study(given), agreement=[])
    assert read_agreement(study, study_runs(study, finished)) == []


def test_scores_of_other_shards_are_not_compared(given: Path, finished: Path, tmp_path: Path) -> None:
    study = read_study(given)
    for run in study_runs(study, finished):
        for arm in run.config.arms:
            folder = tmp_path / f"runs/seed_{run.seed}" / run.variant / arm / "round_01/score"
            folder.mkdir(parents=True)
            (folder / "scores.json").write_text(json.dumps({"corpus_digest": run.variant}))
            np.save(folder / "scores.npy", np.array([1.0, np.nan, 2.0, 3.0, 0.5]))
    found = read_agreement(study, study_runs(study, tmp_path))
    assert [(one["seed"], one["first"], one["second"]) for one in found] == [
        (seed, "hard/dsir", "hard/random") for seed in (1, 2)
    ]
    assert found[0]["rank_correlation"] == pytest.approx(1.0)  # the unit without a score is left out


def test_many_arms_are_held_against_the_first() -> None:
    names = [f"v{number}/bliss" for number in range(11)]
    assert len(pairs(names[:10])) == 45 and pairs(names) == [(names[0], name) for name in names[1:]]
    records = [
        {"seed": seed, "first": first, "second": second, "rank_correlation": 0.5 + seed / 10, "overlap": 0.25}
        for seed in (1, 2)
        for first, second in pairs(names)
    ]
    _, note, rows = agreement_section({"agreement": records})
    assert "Each arm against `v0/bliss`." in note and "have 20%" in note
    assert rows.splitlines()[2] == "| v1/bliss | 0.65 ± 0.05 | 0.25 ± 0.00 |" and len(rows.splitlines()) == 12
    assert agreement_section({"agreement": []}) == agreement_section({}) == []
