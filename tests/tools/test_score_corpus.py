"""tools/export_scorer.py and tools/score_corpus.py: what a run has learned, applied to other text."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tests.runs import run
from tools import export_scorer, score_corpus

ARMS = ["bliss", "dsir", "classifier", "mates"]
MATES = ["--baselines.mates.probe_units", "24", "--baselines.mates.reference_samples", "4"]
MATES += ["--baselines.mates.regressor_iters", "3"]


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory) -> Path:
    """Two rounds of every arm that learns a scorer."""
    folder = tmp_path_factory.mktemp("scorers") / "run"
    options = ["--rounds", "2", "--evaluation.tasks", "[]", "--baselines.dsir.noise", "0", *MATES]
    result = run(corpus, folder, *options, "--arms", ",".join(["random", *ARMS]))
    assert result.returncode == 0, result.stderr
    return folder


def exported(finished: Path, tmp_path: Path, arm: str, *more: str) -> Path:
    output = tmp_path / f"{arm} scorer"
    assert export_scorer.main([str(finished), "--arm", arm, "--output", str(output), *more]) == 0
    return output


@pytest.mark.parametrize("arm", ARMS)
def test_a_scorer_gives_the_runs_own_scores(finished: Path, tmp_path: Path, arm: str) -> None:
    scorer = exported(finished, tmp_path, arm, "--round", "2", "--long-documents", "first")
    (shard,) = (finished / "shards").glob("pool.shard2-*.manifest.json")
    prefix = str(shard).removesuffix(".manifest.json")
    output, threads = str(tmp_path / "scored"), torch.get_num_threads()
    assert score_corpus.main(["--scorer", str(scorer), "--corpus", prefix, "--output", output, "--quiet"]) == 0
    found, expected = (
        np.load(path / "scores.npy") for path in (tmp_path / "scored", finished / arm / "round_02/score")
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert torch.get_num_threads() == threads
    if arm in ("dsir", "classifier"):
        assert np.array_equal(found, expected)


def test_a_round_says_how_far_its_scorer_has_moved(finished: Path) -> None:
    for arm in ARMS:
        first, second = (
            json.loads((finished / arm / f"round_{number:02d}" / "score" / "done.json").read_text())["drift"]
            for number in (1, 2)
        )
        assert first is None and -1 <= second["rank_correlation"] <= 1 and 0 <= second["overlap"] <= 1
    stages = json.loads((finished / "summary.json").read_text())["stages"]
    assert any(stage["drift"] for stage in stages)
    assert "Against the scorer of the round before" in (finished / "report.html").read_text()


def test_documents_of_raw_text_are_chosen(finished: Path, tmp_path: Path, capsys) -> None:
    scorer = exported(finished, tmp_path, "classifier")
    texts = [f"text number {number} " * (1 + number % 5) for number in range(50)]
    lines = "".join(json.dumps({"text": text, "url": f"u{number}"}) + "\n" for number, text in enumerate(texts))
    with gzip.open(tmp_path / "crawl.json.gz", "wt") as stream:
        stream.write(lines)
    arguments = ["--scorer", str(scorer), "--input", str(tmp_path / "*.json.gz"), "--output", str(tmp_path / "scored")]
    chosen = tmp_path / "chosen.jsonl"
    assert score_corpus.main([*arguments, "--quiet", "--export", str(chosen), "--fraction", "0.2"]) == 0
    rows = [json.loads(line) for line in chosen.read_text().splitlines()]
    scores = np.load(tmp_path / "scored" / "scores.npy")
    assert len(rows) == 10 and all(texts[row["line"] - 1] == row["text"] for row in rows)
    best = np.sort(scores)[-10:]
    assert sorted(np.float32(row["score"]) for row in rows) == pytest.approx(best.tolist())
    assert len(pq.read_table(tmp_path / "scored" / "provenance.parquet")) == len(scores) == 50
    assert "10 of 50 documents" in capsys.readouterr().out


def test_a_run_whose_corpus_is_not_in_sight_asks_for_the_tokenizer(finished: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "bliss", run / "bliss")
    config = yaml.safe_load((finished / "config.yaml").read_text())
    config["data"]["train_prefix"] = "elsewhere/pool"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    scorer = run / "bliss/round_01/score/scorer/scorer.json"
    scorer.write_text(scorer.read_text().replace('"kind": "bytes"', '"kind": "huggingface"'))
    assert export_scorer.main([str(run), "--round", "1", "--output", str(tmp_path / "scorer")]) == 1
    assert "found no corpus elsewhere/pool from here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--arm", "random"], "no finished scorer of arm random .*bliss: 1, 2"),
        (["--round", "7"], "in round 7"),
    ],
)
def test_what_cannot_be_exported_is_told(finished: Path, tmp_path: Path, capsys, change: list[str], message) -> None:
    import re

    assert export_scorer.main([str(finished), "--output", str(tmp_path / "x"), *change]) == 1
    assert re.search(message, capsys.readouterr().err) and not list(tmp_path.iterdir())


def test_what_cannot_be_scored_is_told_before_it_begins(finished: Path, tmp_path: Path, capsys) -> None:
    scorer = exported(finished, tmp_path, "dsir")
    arguments = ["--scorer", str(scorer), "--output", str(tmp_path / "out")]
    assert score_corpus.main([*arguments, "--corpus", "x", "--export", "a.jsonl"]) == 1
    assert "tools/subset_index.py" in capsys.readouterr().err
    assert score_corpus.main([*arguments, "--input", "x.jsonl", "--export", "a.xml", "--fraction", "0.1"]) == 1
    assert score_corpus.main([*arguments, "--input", "x.jsonl", "--shard", "3/2"]) == 1
    assert score_corpus.main([*arguments, "--input", "x.jsonl", "--memory-gib", "-1"]) == 1
    assert score_corpus.main([*arguments, "--input", "x.jsonl", "--max-bad-fraction", "2"]) == 1
    capsys.readouterr()
    assert score_corpus.main([*arguments, "--input", "x.jsonl", "--fraction", "0.1"]) == 1
    assert "found --fraction without --export" in capsys.readouterr().err
    (tmp_path / "folder.jsonl").mkdir()
    there = ["--fraction", "0.1", "--export", str(tmp_path / "folder.jsonl")]
    assert score_corpus.main([*arguments, "--input", "x.jsonl", *there]) == 1
    assert "found a folder" in capsys.readouterr().err
    there = ["--fraction", "0.1", "--export", str(tmp_path / "out" / "rejected.jsonl")]
    assert score_corpus.main([*arguments, "--input", "x.jsonl", *there]) == 1
    assert "a file of the scores themselves" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        score_corpus.main([*arguments, "--input", "x.jsonl", "--device", "gpu"])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("")
    assert score_corpus.main([*arguments, "--input", "x.jsonl"]) == 1
    assert "which is no folder" in capsys.readouterr().err
