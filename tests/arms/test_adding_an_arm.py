"""The arm of docs/extending.md in a copy of the package: one file, one name, and a run trains on what it selects."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.data.indexed import IndexedCorpus
from tests.run.test_rounds import ROOT, corpus  # noqa: F401 - a fixture

TABLE = '"mates"))'


def code_of(section: str) -> str:
    """The block of code in a section of docs/extending.md."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    return re.search(rf"^## {section}$.*?^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE).group(1)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The program with one arm more."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("megatron_bliss", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pretrain_bliss.py", folder)
    arms = folder / "megatron_bliss" / "arms"
    (arms / "length.py").write_text(code_of("An arm"), encoding="utf-8")
    table = (arms / "__init__.py").read_text(encoding="utf-8")
    assert table.count(TABLE) == 1
    (arms / "__init__.py").write_text(table.replace(TABLE, '"mates", "length"))'), encoding="utf-8")
    return folder


def start(tree: Path, script: str, *options: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree), "COLUMNS": "200"}
    command = [sys.executable, str(tree / script), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=tree, env=environment)


def of_a_run(corpus: Path, folder: Path, *options: str) -> list[str]:  # noqa: F811
    small = ["--rounds", "1", "--arms", "[length]", "--evaluation.tasks", "[]", "--baselines.length.factor", "0.5"]
    return ["--config", str(corpus / "config.yaml"), "--run_folder", str(folder), *small, *options]


def test_the_help_shows_it(tree: Path) -> None:
    text = " ".join(start(tree, "pretrain_bliss.py", "--help").stdout.split())
    assert "length: the number of tokens." in text
    assert "--baselines.length.factor FACTOR Score of a unit per token. [more than 0]" in text


def test_bad_options_of_it_are_refused(tree: Path, corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    bad = of_a_run(corpus, tmp_path / "run", "--baselines.length.factor", "0")
    done = start(tree, "pretrain_bliss.py", *bad)
    assert done.returncode == 2 and "found baselines.length.factor 0.0, expected more than 0" in done.stderr


def test_a_run_is_planned_and_trains_on_what_it_selects(tree: Path, corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    options = of_a_run(corpus, tmp_path / "run")
    done = start(tree, "tools/plan.py", *options)
    assert done.returncode == 0 and re.search(r"^ +length +score +1 ", done.stdout, re.MULTILINE), done.stderr
    done = start(tree, "pretrain_bliss.py", *options)
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
