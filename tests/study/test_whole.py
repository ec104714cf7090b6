"""A whole study: what it writes, that warm-ups are made once, that kills change nothing, and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_bliss.study.budget import Clock, Estimate
from megatron_bliss.study.description import read_study
from megatron_bliss.study.execution import launcher, run_all
from megatron_bliss.study.runs import StudyRun, study_runs
from megatron_bliss.study.table import format_study
from megatron_bliss.study.warmup import FREE, share_warmup
from tests.runs import ROOT, environment, metric_lines
from tests.study.studies import VARIANTS, run_tool, tool_command, write_study

FAILING_RUN = """
import os, pathlib, sys, time
print('rank', os.environ.get('RANK'), *sys.argv[1:], flush=True)
folder = pathlib.Path(__file__).parent
(folder / f"said_{os.environ.get('RANK')}").touch()
while len(list(folder.glob("said_*"))) < int(os.environ.get("WORLD_SIZE", 1)):  # one that fails ends the others
    time.sleep(0.01)
sys.exit(3)
"""
"""Says how it was started, and fails when all its processes have said so."""


def runs_of(study: Path, output: Path) -> list[StudyRun]:
    return study_runs(read_study(study), output)


def untimed(content: object) -> object:
    """All but what a clock or the system's count of memory said."""
    if isinstance(content, dict):
        return {name: untimed(value) for name, value in content.items() if not name.endswith(("seconds", "peak_bytes"))}
    return [untimed(value) for value in content] if isinstance(content, list) else content


def points_of(output: Path) -> dict:
    return untimed(json.loads((output / "study.json").read_text()))


def test_all_points_are_written(given: Path, finished: Path) -> None:
    study = json.loads((finished / "study.json").read_text())
    assert (study["control"], study["guided"], study["other"]) == ("hard/random", ["held"], ["held_other"])
    places = [(point["seed"], point["variant"], point["arm"]) for point in study["points"]]
    assert places == [(seed, variant, arm) for seed in (1, 2) for variant in VARIANTS for arm in ("random", "dsir")]
    for point in study["points"]:
        assert [tokens for tokens, _ in point["losses"]["held"]] == [step * 4 * 32 for step in (3, 4, 6, 9, 12)]
        assert list(point["losses"]) == ["held", "held_other"]
        summary = json.loads((finished / f"runs/seed_{point['seed']}/{point['variant']}/summary.json").read_text())
        own = [stage["flops"] for stage in summary["stages"] if stage["arm"] in (point["arm"], "shared")]
        assert "warmup proxy" not in {stage["stage"] for stage in summary["stages"]}  # none of these arms needs a model
        assert point["cost"]["flops"][-1][1] == pytest.approx(sum(own))
        assert 0 < point["peak_bytes"]["selection"] <= point["peak_bytes"]["all"]
    trained = [(one["flops"] > 0, one["tokens"]) for one in study["stages"] if one["stage"] == "pretrain"]
    assert trained == [(True, 8 * 4 * 32)] * len(places)
    page = (finished / "study.md").read_text()
    assert page.startswith(format_study(json.loads((finished / "study.json").read_text())).rstrip())
    assert all(f"## At {reading}" in page for reading in ("equal tokens", "equal total compute"))
    assert (finished / "pareto.png").stat().st_size > 10_000
    assert yaml.safe_load((finished / "study.yaml").read_text())["variants"]["soft"]["selection"]["policy"] == "gumbel"


def test_a_shared_warm_up_gives_what_one_of_its_own_gives(given: Path, finished: Path, tmp_path: Path) -> None:
    (shared,) = (one for one in runs_of(given, finished) if (one.seed, one.variant) == (1, "soft"))
    output = tmp_path / "alone"
    content = yaml.safe_load(given.read_text())
    alone = tmp_path / "alone.yaml"
    alone.write_text(
        yaml.safe_dump({**content, "seeds": [1], "variants": {"soft": content["variants"]["soft"]}, "agreement": False})
    )
    result = run_tool(alone, output)
    assert result.returncode == 0, result.stderr
    own = output / "runs/seed_1/soft"
    hard = shared.folder.parent / "hard"
    done = {
        path: (shared.folder / path).read_bytes()
        for path in (Path("shards/done.json"), Path("warmup/target/done.json"))
    }
    assert done == {path: (hard / path).read_bytes() for path in done}  # seconds too: it was made once
    assert json.loads((own / "warmup/target/done.json").read_text())["evaluations"]
    expected, found = (json.loads((folder / "summary.json").read_text()) for folder in (own, shared.folder))
    assert untimed(found["arms"]) == untimed(expected["arms"]) and found["domains"] == expected["domains"]
    for scores in own.glob("*/round_*/score/scores.npy"):
        assert scores.read_bytes() == (shared.folder / scores.relative_to(own)).read_bytes()
    key = lambda line: (line["arm"], line["round"], line["stage"], line["step"])  # noqa: E731
    assert sorted(metric_lines(shared.folder), key=key) == sorted(metric_lines(own), key=key)


def test_a_killed_study_goes_on_to_the_same_points(given: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    shutil.copytree(finished, output, symlinks=True)
    last = output / "runs/seed_2/soft"
    shutil.rmtree(last)
    (output / "study.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("done.json")}
    log = tmp_path / "killed.log"
    with open(log, "w") as said:
        process = subprocess.Popen(
            tool_command(given, output), env=environment(), stdout=said, stderr=said, start_new_session=True
        )
    try:
        while not list(last.glob("random/round_01/pretrain/step_*/manifest.json")):
            assert process.poll() is None, log.read_text()
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (last / "dsir").exists() and not (output / "study.json").exists()
    result = run_tool(given, output)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished before") == 3 and "[4/4] seed 2, soft: arms random, dsir; log" in result.stdout
    assert points_of(output) == points_of(finished)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_options_in_a_finished_study_are_refused(corpus: Path, finished: Path, tmp_path: Path) -> None:
    variants = {"hard": {"selection.fraction": 0.5}, "soft": VARIANTS["soft"]}
    result = run_tool(write_study(tmp_path, corpus, variants=variants), finished)
    assert result.returncode == 1 and "selection.fraction: 0.2 there, 0.5 now" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failed_run_ends_the_study_and_says_where(given: Path, tmp_path: Path, processes: int) -> None:
    """A stand-in for the run says how it was started, and fails."""
    entry, output = tmp_path / "entry.py", tmp_path / "failed"
    entry.write_text(FAILING_RUN)
    with pytest.raises(ValueError, match=f"found status .* of seed 1, hard, expected a finished run: mend .*{output}"):
        runs = runs_of(given, output)
        run_all(runs, launcher(entry, processes), Clock(Estimate(read_study(given), runs), None))
    said = (output / "runs/seed_1/hard.log").read_text()
    for rank in range(processes) if processes > 1 else [None]:
        assert f"rank {rank} --config {output}/runs/seed_1/hard.yaml\n" in said
    assert yaml.safe_load((output / "runs/seed_1/hard.yaml").read_text())["arms"] == ["random", "dsir"]
    assert not (output / "runs/seed_1/soft.log").exists()


@pytest.mark.parametrize("free", [True, False])
def test_only_runs_with_one_warm_up_share_it(corpus: Path, finished: Path, tmp_path: Path, free: bool) -> None:
    """Every section but those named as free, and so an option that comes to be later, has to agree."""
    change = {"selection.fraction": 0.5} if free else {"pretraining.train_iters": 9}
    study = write_study(tmp_path, corpus, variants={"hard": {}, "new": change})
    output = tmp_path / "whole"
    shutil.copytree(finished, output, symlinks=True)
    hard, new = runs_of(study, output)[:2]
    assert share_warmup(new, [hard]) is (hard if free else None)
    assert new.folder.exists() is free
    if free:
        units = [np.load(next(one.folder.glob("shards/pool.shard1-*.units.npy"))) for one in (hard, new)]
        assert np.array_equal(*units) and not list(new.folder.glob("random"))
        assert all(path.exists() for path in new.folder.rglob("*"))  # links to the corpus, too
        assert not new.beside(".begun").exists() and not new.is_finished()
        assert share_warmup(new, [hard]) is None  # it has begun
    else:
        assert "pretraining" not in FREE
        (hard.folder / "warmup/target/done.json").unlink()
        other = next(one for one in runs_of(study, tmp_path / "fresh") if one.variant == "hard")
        assert share_warmup(other, [hard]) is None  # its warm-up is not finished


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"variants": {"a": {"selection.polcy": "x"}}}, "variant a has options that a run refuses: .*polcy"),
        ({"variants": {"a": {"selection.fraction": 2}}}, "seed 1, a: found selection.fraction 2"),
        ({"arms": ["random", "oracle"]}, "found arms .*oracle"),
        ({"variants": {"a": {}, "b": {"data.other_prefixes": []}}}, "found test sets .*expected the same in all runs"),
        (
            {"variants": {"a": {"data.test_prefixes": [], "data.split": "8,1,1"}}},
            "found no test set of the guide's kind",
        ),
    ],
)
def test_options_that_a_run_refuses_are_refused_before_the_first(
    corpus: Path, tmp_path: Path, keys: dict, message: str
):
    from megatron_bliss.study.whole import Limits, run_study

    study = read_study(write_study(tmp_path, corpus, **keys))
    with pytest.raises(ValueError, match=message):
        run_study(study, tmp_path / "never", ROOT / "pretrain_bliss.py", Limits())
    assert not (tmp_path / "never").exists()


def test_some_arms_run_beside_the_control_and_those_that_have_begun(corpus: Path, tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, corpus, arms=["random", "dsir", "mates", "bliss"]))

    def arms(*only: str) -> dict[tuple[int, str], list[str]]:
        return {(run.seed, run.variant): run.config.arms for run in study_runs(study, tmp_path, only)}

    first = {(seed, variant): ["random", "mates"][variant == "soft" :] for seed in (1, 2) for variant in VARIANTS}
    assert arms("mates") == first
    (tmp_path / "runs/seed_2/soft/bliss").mkdir(parents=True)
    assert arms("mates") == first | {(2, "soft"): ["mates", "bliss"]}
    assert set(map(tuple, arms().values())) == {("random", "dsir", "mates", "bliss")}
    longer = {"random": {"pretraining.train_iters": 9}, "dsir": {"pretraining.train_iters": 9}}
    study = read_study(write_study(tmp_path, corpus, seeds=[3], longer=longer))
    assert arms() == {(3, "hard"): ["random", "dsir"], (3, "soft"): ["random", "dsir"]} | {
        (3, f"longer-{arm}"): [arm] for arm in longer
    }
    assert arms("dsir")[3, "longer-random"] == ["random"] and "mates" not in study.arms
    assert (3, "longer-dsir") not in {(run.seed, run.variant) for run in study_runs(study, tmp_path, ["random"])}


def test_only_unknown_arms_are_refused(given: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found --only mates, expected arms of the study"):
        study_runs(read_study(given), tmp_path, only=["mates"])


def test_a_seed_at_work_is_left_alone(given: Path, tmp_path: Path) -> None:
    """Other seeds of the same folder can be run meanwhile, on machines of their own."""
    folder = tmp_path / "runs" / f"seed_{read_study(given).seeds[-1]}"
    folder.mkdir(parents=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run_tool(given, tmp_path)
    assert result.returncode == 1 and f"found {folder} at work" in result.stderr
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"lock"}
