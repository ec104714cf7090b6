"""The arm of docs/extending.md in a copy of the package: one file, one name, and a run trains on what it selects."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.arms import ARMS
from megatron_bliss.data.indexed import IndexedCorpus
from tests.extending import extended_copy, run_in


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The package and its commands with the arm length."""
    return extended_copy(tmp_path_factory.mktemp("copy"), "arms", list(ARMS)[-1])


def of_a_run(corpus: Path, folder: Path, *options: str) -> list[str]:
    small = ["--rounds", "1", "--arms", "[length]", "--evaluation.tasks", "[]", "--baselines.length.factor", "0.5"]
    return ["--config", str(corpus / "config.yaml"), "--run_folder", str(folder), *small, *options]


def test_the_help_shows_it(copy: Path) -> None:
    text = " ".join(run_in(copy, "pretrain_bliss.py", "--help").stdout.split())
    assert "length: the number of tokens." in text
    assert "--baselines.length.factor FACTOR Score of a unit per token. [more than 0]" in text


def test_bad_options_of_it_are_refused(copy: Path, corpus: Path, tmp_path: Path) -> None:
    bad = of_a_run(corpus, tmp_path / "run", "--baselines.length.factor", "0")
    done = run_in(copy, "pretrain_bliss.py", *bad)
    assert done.returncode == 2 and "found baselines.length.factor 0.0, expected more than 0" in done.stderr


def test_a_run_is_planned_and_trains_on_what_it_selects(copy: Path, corpus: Path, tmp_path: Path) -> None:
    options = of_a_run(corpus, tmp_path / "run")
    done = run_in(copy, "tools/plan.py", *options)
    assert done.returncode == 0 and re.search(r"^ +length +score +1 ", done.stdout, re.MULTILINE), done.stderr
    done = run_in(copy, "pretrain_bliss.py", *options)
    assert done.returncode == 0, done.stderr
    assert list(json.loads((tmp_path / "run" / "summary.json").read_text())["arms"]) == ["length"]
    round_folder = tmp_path / "run" / "length" / "round_01"
    shards = json.loads((tmp_path / "run" / "shards" / "done.json").read_text())["prefixes"]
    lengths = IndexedCorpus(tmp_path / "run" / "shards" / shards[1]).lengths
    np.testing.assert_array_equal(np.load(round_folder / "score" / "scores.npy"), np.float32(0.5) * lengths)
    selected = json.loads((round_folder / "select" / "done.json").read_text())
    kept = IndexedCorpus(round_folder / "select" / selected["prefix"]).lengths
    assert len(kept) == selected["units"] and sorted(kept) == sorted(lengths)[-len(kept) :] and min(lengths) < min(kept)
    assert "Scores, length" in (tmp_path / "run" / "report.html").read_text()
