"""A whole run on a tiny corpus: what it writes, that kills change nothing, and that a wrong rerun is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_bliss.base.metrics import DOMAIN_WEIGHT
from megatron_bliss.config.stages import ROUND_STAGES
from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.manifest import read_manifest
from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.report.costs import read_stages
from megatron_bliss.run.checks import parse_arguments
from megatron_bliss.run.rounds import STAGE_WORK
from megatron_bliss.selection.policies.soft import SoftSettings, keep
from tests.runs import ROOT, command, environment, kill_when, metric_lines, run


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory) -> Path:
    run_folder = tmp_path_factory.mktemp("run") / "whole"
    result = run(corpus, run_folder)
    assert result.returncode == 0, result.stderr
    assert "report.html" in result.stdout
    return run_folder


def test_everything_promised_is_written(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["arms"]) == {"bliss", "random"}
    for arm in summary["arms"].values():
        tokens = [point[0] for point in arm["validation_loss"]]
        assert tokens == [step * 4 * 32 for step in (3, 4, 6, 9, 10, 12, 15, 16)]
        assert all(np.isfinite(point[1]) for point in arm["validation_loss"])
        assert list(arm["losses"]) == ["held", "held_other"]
        assert arm["losses"]["held_other"] != arm["losses"]["held"]
    warmup = {name: arm["validation_loss"][:2] for name, arm in summary["arms"].items()}
    assert warmup["bliss"] == warmup["random"]
    assert summary["domains"]["pool"].keys() == {"words", "digits"}
    assert sum(summary["domains"]["selected"].values()) == pytest.approx(1)
    assert summary["seed"] == 3 and "speedup" in summary and summary["stages"]
    last = {str(line["round"]): line for line in metric_lines(finished) if line["stage"] == "bilevel"}
    for number, weights in summary["arms"]["bliss"]["domain_weights"].items():
        assert {f"{DOMAIN_WEIGHT}{name}": value for name, value in weights.items()}.items() <= last[number].items()
        assert weights and set(weights) <= {"words", "digits"}
    assert set(last) == set(summary["arms"]["bliss"]["domain_weights"]) == {"1", "2"}
    assert "domain_weights" not in summary["arms"]["random"]
    assert "Weights of domains, bliss" in (finished / "report.html").read_text()
    assert (finished / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert yaml.safe_load((finished / "config.yaml").read_text())["bilevel"]["upper_iters"] == 8


def test_the_summary_counts_what_each_arm_cost_and_gained_on_every_set(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["sets"] == {"guide": ["held"], "other": ["held_other"]}
    work = {(one["arm"], one["round"], one["stage"]): one["flops"] for one in summary["stages"]}
    bliss, random = summary["arms"]["bliss"]["cost"], summary["arms"]["random"]["cost"]
    target = work["shared", 0, "warmup target"] + sum(work["random", number, "pretrain"] for number in (1, 2))
    selection = work["shared", 0, "warmup proxy"]
    selection += sum(work["bliss", number, stage] for number in (1, 2) for stage in ("bilevel", "score"))
    assert random["flops"][-1] == [2048, target] and random["selection_flops"][-1] == [2048, 0]
    assert bliss["flops"][-1] == [2048, pytest.approx(target + selection)] and bliss["selection_flops"][-1][1] > 0
    assert (
        bliss["flops"][0] == random["flops"][0] == [3 * 128, pytest.approx(work["shared", 0, "warmup target"] * 3 / 4)]
    )
    measured = {(one["arm"], one["round"]): one for one in summary["stages"] if one["stage"] == "pretrain"}
    assert all(0 < one["evaluation_seconds"] < one["seconds"] for one in measured.values())
    for arm, cost in (("bliss", bliss), ("random", random)):
        counted = [one for one in summary["stages"] if one["arm"] in (arm, "shared") and one["stage"] != "evaluate"]
        assert 0 < cost["selection_seconds"][-1][1] < cost["seconds"][-1][1] < sum(one["seconds"] for one in counted)
    assert summary["equal_compute"]["flops"]["budget"] == target
    for name, one in summary["gains"]["bliss"].items():
        ends = {arm: content["losses"][name][-1][1] for arm, content in summary["arms"].items()}
        assert one["gain"] == pytest.approx(ends["random"] - ends["bliss"])
        assert summary["equal_compute"]["flops"]["losses"]["random"][name] == ends["random"]
        lowest = min(loss for _, loss in summary["arms"]["bliss"]["losses"][name])
        assert summary["equal_compute"]["flops"]["losses"]["bliss"][name] >= lowest
    page = (finished / "report.html").read_text()
    assert "Gain and loss, and what they cost" in page and "held_other, by total FLOPs" in page


def test_a_plan_foretells_what_the_run_records(corpus: Path, finished: Path) -> None:
    """FLOPs of every stage to the last bit; what the selections hold and the folder weighs to a few per cent."""
    config = parse_arguments(command(corpus, finished)[2:])
    plan = make_plan(config, Machine(world_size=1))
    recorded = {(one["arm"], one["round"], one["stage"]): one["flops"] for one in read_stages(finished)}
    assert {(one["arm"], one["round"], one["stage"]): one["flops"] for one in plan["stages"]} == recorded
    assert sum(recorded.values()) == plan["total"]["flops"] > 0 and plan["not_ready"] == []
    shards = json.loads((finished / "shards/done.json").read_text())["prefixes"]
    for number, prefix in enumerate(shards):
        counts = read_manifest(str(finished / "shards" / prefix))["counts"]
        shard = plan["data"]["rounds"][number - 1] if number else plan["data"]["warmup"]
        assert (shard["units"], shard["tokens"]) == (counts["units"], counts["tokens"])
    for arm in ("bliss", "random"):
        for number in (1, 2):
            selected = json.loads((finished / f"{arm}/round_{number:02d}/select/done.json").read_text())
            foretold = plan["data"]["rounds"][number - 1]
            assert foretold["selected_tokens"] == pytest.approx(selected["tokens"], rel=0.05)
            warned = [text for text in plan["warnings"] if f"epoch_warning={config.selection.epoch_warning:g}" in text]
            assert bool(warned) == bool(selected["warnings"])
    checkpoints = list(finished.glob("**/step_*"))
    assert len(checkpoints) == plan["disk"]["checkpoints"]
    tensors = [sum(path.stat().st_size for path in folder.glob("*.distcp")) for folder in checkpoints]
    assert min(tensors) >= plan["disk"]["checkpoint"] > 0.8 * max(tensors)
    states = sum(path.stat().st_size for path in finished.glob("**/*.pt") if path.name in ("latest.pt", "final.pt"))
    assert plan["disk"]["parts"]["proxy and score model"] == pytest.approx(states, rel=0.25)


def test_tasks_are_evaluated_after_the_warm_up_and_each_round(corpus: Path, finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    places = {"bliss": ["warmup", "bliss/round_01", "bliss/round_02"], "random": ["warmup", "random/round_01"]}
    for arm, folders in places.items():
        curves = summary["arms"][arm]["tasks"]
        assert list(curves) == ["next", "last", "average"] and all(len(curve) == 3 for curve in curves.values())
        for number, folder in enumerate(folders):
            done = json.loads((finished / folder / "evaluate" / "done.json").read_text())
            assert done["tasks"] == json.loads((finished / folder / "evaluate" / "results.json").read_text())
            assert done["evaluation"]["tokens"] == (4 + 6 * number) * 4 * 32 == curves["average"][number][0]
            for name, task in done["tasks"]["tasks"].items():
                assert curves[name][number][1:] == [task["value"], task["stderr"]] and task["num_items"] == 10
            assert (
                (finished / folder / "evaluate" / "results.md").read_text().startswith("|  | next | last | average |")
            )
    assert summary["arms"]["bliss"]["tasks"]["next"][0] == summary["arms"]["random"]["tasks"]["next"][0]
    assert {len(curve) for curve in summary["arms"]["bliss"]["perplexities"].values()} == {3}
    assert summary["task_facts"]["tasks"]["next"]["num_items"] == 10 and "task_speedup" in summary
    logged = [line for line in metric_lines(finished) if line["stage"] == "evaluate"]
    assert [(line["arm"], line["round"], line["step"]) for line in logged] == [
        ("shared", 0, 4), ("bliss", 1, 10), ("random", 1, 10), ("bliss", 2, 16), ("random", 2, 16),
    ]  # fmt: skip
    assert logged[1]["tasks/next"] == summary["arms"]["bliss"]["tasks"]["next"][1][1] and "tasks/average" in logged[1]
    page = (finished / "report.html").read_text()
    assert "next" in page and "Tasks, zero-shot" in page


@pytest.mark.parametrize("place, options", [("bliss/round_02", ["2", "--arm", "bliss"]), ("warmup", ["0"])])
def test_an_evaluation_alone_gives_the_same_results(
    corpus: Path, finished: Path, tmp_path: Path, place: str, options: list
) -> None:
    copy = tmp_path / "whole"  # as deep as the run itself: its links are relative
    shutil.copytree(finished, copy, symlinks=True)
    folder = copy / place / "evaluate"
    before = {name: (folder / name).read_bytes() for name in ("results.json", "results.md")}
    (folder / "done.json").unlink()
    result = run(corpus, copy, "--stage", "evaluate", "--round", *options)
    assert result.returncode == 0, result.stderr
    assert (folder / "done.json").is_file() and before == {name: (folder / name).read_bytes() for name in before}


@pytest.mark.parametrize("sizes", ["in the options", "in the checkpoints alone"])
def test_a_checkpoint_alone_gives_what_the_round_gave(finished: Path, tmp_path: Path, sizes: str) -> None:
    (target,) = (finished / "bliss/round_02/pretrain").glob("step_*16")
    options = []
    if sizes != "in the options":  # as in a run whose models took them from pretrained ones, which are not here
        config = yaml.safe_load((finished / "config.yaml").read_text())
        for name in ("target", "proxy"):
            taken = dict.fromkeys(("architecture", "num_layers", "hidden_size", "num_attention_heads"))
            config[name] |= taken | {"pretrained_checkpoint": str(tmp_path / "elsewhere")}
        (tmp_path / "run").mkdir()
        (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / "run/shards").symlink_to(finished / "shards")
        options = ["--run", str(tmp_path / "run")]
    for kind, path in (("target", target), ("proxy", finished / "warmup/proxy/final.pt")):
        command = [sys.executable, str(ROOT / "tools/evaluate.py"), f"--{kind}", str(path), "--output", str(tmp_path)]
        done = subprocess.run([*command, *options], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout == (tmp_path / "results.md").read_text()
        if kind == "target":
            expected = finished / "bliss/round_02/evaluate/results.json"
            assert (tmp_path / "results.json").read_bytes() == expected.read_bytes()
    result = json.loads((tmp_path / "results.json").read_text())
    assert {task["num_items"] for task in result["tasks"].values()} == {10}


def test_rounds_use_disjoint_shards_and_keep_what_the_policy_draws(corpus: Path, finished: Path) -> None:
    units = []
    for number in (1, 2):
        folder = finished / "bliss" / f"round_{number:02d}"
        scores = np.load(folder / "score" / "scores.npy")
        (index,) = (folder / "select").glob("*.idx")
        chosen = np.load(str(index.with_suffix("")) + ".units.npy")
        shard = np.load(next((finished / "shards").glob(f"pool.shard{number}-*.units.npy")))
        assert len(scores) == len(shard)
        assert len(chosen) == round(0.2 * len(shard))
        record = read_manifest(index.with_suffix(""))["policy"]
        assert record["name"] == "soft" and record["fraction"] == 0.2
        settings = SoftSettings(fraction=record["fraction"], softness=record["softness"])
        np.testing.assert_array_equal(np.isin(shard, chosen).nonzero()[0], keep(scores, settings, seed=record["seed"]))
        units.append(chosen)
    assert not np.intersect1d(*units).size
    assert len(IndexedCorpus(str(corpus / "pool"))) > sum(map(len, units))


@pytest.mark.parametrize(
    "pattern",
    [
        "bliss/round_01/bilevel/latest.pt",  # inside a stage that trains the small models
        "random/round_01/pretrain/step_*/manifest.json",  # inside the target's training
        "bliss/round_02/score/done.json",  # between two stages
    ],
)
def test_a_killed_run_ends_with_the_same_numbers(corpus: Path, finished: Path, tmp_path: Path, pattern: str) -> None:
    run_folder = tmp_path / "killed"
    kill_when(corpus, run_folder, pattern)
    result = run(corpus, run_folder)
    assert result.returncode == 0, result.stderr
    expected = json.loads((finished / "summary.json").read_text())
    found = json.loads((run_folder / "summary.json").read_text())
    for summary in (found, expected):
        for arm in summary["arms"].values():
            del arm["cost"]["seconds"], arm["cost"]["selection_seconds"]
    assert found["arms"] == expected["arms"] and found["gains"] == expected["gains"]
    assert found["domains"] == expected["domains"]
    for scores in sorted(finished.glob("*/round_*/score/scores.npy")):
        assert scores.read_bytes() == (run_folder / scores.relative_to(finished)).read_bytes()
    assert metric_lines(run_folder) == metric_lines(finished)


def test_a_finished_run_is_not_run_again(corpus: Path, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("done.json")}
    result = run(corpus, finished)
    assert result.returncode == 0, result.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("done.json")} == before


def test_what_an_evaluation_lacks_is_said_before_anything_runs(corpus: Path, tmp_path: Path) -> None:
    result = run(corpus, tmp_path / "new", "--evaluation.tasks", "[next,gone]")
    assert result.returncode == 2 and "found no data file of task gone" in result.stderr
    assert "tools/prepare_evaluation.py" in result.stderr and not (tmp_path / "new").exists()


def test_other_options_in_an_old_run_folder_are_refused(corpus: Path, finished: Path) -> None:
    result = run(corpus, finished, "--bilevel.upper_iters", "9")
    assert result.returncode == 2
    assert "bilevel.upper_iters: 8 there, 9 now" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_stage_alone_needs_the_ones_before_it(corpus: Path, tmp_path: Path) -> None:
    result = run(corpus, tmp_path / "new", "--stage", "select", "--round", "1", "--arm", "bliss")
    assert result.returncode == 2
    assert "score/done.json, expected that stage to be finished before select" in result.stderr


def test_decay_branches_are_evaluated_and_leave_the_main_line_alone(corpus: Path, tmp_path: Path) -> None:
    folders = {}
    for iterations in (0, 3):
        folders[iterations] = tmp_path / f"branch{iterations}"
        options = ("--arms", "random", "--rounds", "2", "--pretraining.decay_branch_iters", str(iterations))
        result = run(corpus, folders[iterations], *options, "--pretraining.optimizer.min_lr", "1e-4")
        assert result.returncode == 0, result.stderr
        assert "kernels: layers TransformerLayer" in result.stderr and "optimizer torch AdamW (fused)" in result.stderr
    main_lines = [
        [line for line in metric_lines(folder) if line["stage"] in ("target", "pretrain")]
        for folder in folders.values()
    ]
    assert main_lines[0] == main_lines[1] and len(main_lines[0]) > 16
    rates = [line["lr"] for line in metric_lines(folders[3]) if line["stage"] == "decay_branch" and "lr" in line]
    assert len(rates) == 9 and rates[:3] == pytest.approx([1e-3, 7e-4, 4e-4])
    summary = json.loads((folders[3] / "summary.json").read_text())
    stages = {(record["round"], record["stage"]): record for record in summary["stages"]}
    assert {number for number, stage in stages if stage.endswith("decay_branch")} == {0, 1, 2}
    assert stages[1, "decay_branch"]["flops"] == stages[1, "pretrain"]["flops"] / 2  # 3 iterations beside 6
    points = summary["arms"]["random"]["validation_loss"]
    assert [tokens for tokens, _ in points] == [step * 4 * 32 for step in (4, 10, 16)]
    branch = json.loads((folders[3] / "random/round_02/decay_branch/done.json").read_text())
    evaluate = json.loads((folders[3] / "random/round_02/evaluate/done.json").read_text())
    assert evaluate["evaluation"] == branch["evaluation"] and points[-1][1] == evaluate["evaluation"]["losses"]["held"]


def test_every_stage_of_a_round_has_its_work() -> None:
    assert tuple(STAGE_WORK) == ROUND_STAGES
