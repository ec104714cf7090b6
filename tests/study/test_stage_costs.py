"""What stages took: rows made by hand from a study's records, and records of a run with tokens of its plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_bliss.base.files import write_json
from megatron_bliss.plan.plan import Machine, make_plan, planned_stages
from megatron_bliss.run.options import parse_options
from megatron_bliss.study.runs import StudyRun
from megatron_bliss.study.stage_costs import read_stage_costs, stage_costs_section
from megatron_bliss.study.table import format_study
from megatron_bliss.study.whole import write_page

MIB, GIB = 2**20, 2**30


def record(place: tuple, seconds: float, peak: int | None, flops: float | None, tokens: int | None) -> dict:
    names = ("seed", "variant", "arm", "round", "stage")
    return dict(zip(names, place, strict=True)) | {
        "seconds": seconds,
        "peak_bytes": peak,
        "flops": flops,
        "tokens": tokens,
    }


def records() -> list[dict]:
    """Two seeds and two variants with one warm-up; two rounds of an arm that learns, in the first variant alone."""
    found = []
    for seed in (1, 2):
        for variant in ("hard", "soft"):
            found.append(record((seed, variant, "shared", 0, "warmup target"), 10.0 * seed, 600 * MIB, 2e12, 4000))
            for number in (1, 2) if variant == "hard" else ():
                found.append(record((seed, variant, "bliss", number, "bilevel"), 30.0, number * GIB, 5e12, 1500))
                found.append(record((seed, variant, "bliss", number, "select"), 1.0, None, 0.0, 0))
                found.append(record((seed, variant, "bliss", number, "pretrain"), 60.0 * seed, GIB // 2, 8e12, 2000))
            found.append(record((seed, variant, "random", 1, "pretrain"), 61.0, GIB // 2, 8e12, None))
    return found


def lines(section: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section[-1].splitlines()[2:]]


def test_a_row_sums_rounds_in_a_seed_and_means_over_seeds() -> None:
    found = {(arm, stage): cells for arm, stage, *cells in lines(stage_costs_section({"stages": records()}))}
    assert found["hard/bliss", "bilevel"] == ["1:00", "2.0 GiB", "10.0 TFLOP", "3,000"]
    assert found["hard/bliss", "pretrain"] == ["3:00", "512 MiB", "16.0 TFLOP", "4,000"]  # 2 and 4 minutes
    assert found["hard/bliss", "select"] == ["0:02", "-", "-", "-"]
    assert found["hard/bliss", "all"] == ["4:02", "2.0 GiB", "26.0 TFLOP", "-"]
    assert found["soft/random", "pretrain"] == ["1:01", "512 MiB", "8.0 TFLOP", "-"]


def test_a_shared_warm_up_is_listed_once_and_another_one_too() -> None:
    names = [(arm, stage) for arm, stage, *_ in lines(stage_costs_section({"stages": records()}))]
    assert names[0] == ("hard, all arms", "warmup target") and "soft, all arms" not in dict(names)
    assert [stage for arm, stage in names if arm == "hard/bliss"] == ["bilevel", "select", "pretrain", "all"]
    other = [one | {"seconds": 11.0} if one["variant"] == "soft" else one for one in records()]
    assert ["soft, all arms", "warmup target"] in [line[:2] for line in lines(stage_costs_section({"stages": other}))]


def test_the_note_says_over_how_many_seeds() -> None:
    one_seed = [one for one in records() if one["seed"] == 1]
    assert "means over 2 seeds" in stage_costs_section({"stages": records()})[1]
    assert "means" not in stage_costs_section({"stages": one_seed})[1]


def test_a_study_without_records_has_no_section() -> None:
    assert stage_costs_section({}) == [] == stage_costs_section({"stages": []})


def study() -> dict:
    cost = {"flops": [[10, 10.0], [40, 40.0]], "selection_flops": [[10, 0.0], [40, 0.0]]}
    cost |= {"seconds": [[10, 1.0], [40, 4.0]], "selection_seconds": [[10, 0.0], [40, 0.0]]}
    point = {"seed": 1, "variant": "hard", "arm": "random", "losses": {"near": [[10, 6.0], [40, 5.0]]}, "cost": cost}
    sides = {"guided": ["near"], "other": []}
    return {"control": "hard/random", "seeds": [1], "longer": {}, **sides, "points": [point], "stages": records()}


def test_the_page_is_made_from_study_json_alone(tmp_path: Path) -> None:
    write_json(tmp_path / "study.json", study())
    page = write_page(tmp_path)
    written = json.loads((tmp_path / "study.json").read_text())
    assert page == (tmp_path / "study.md").read_text() and page.startswith(format_study(written).rstrip())
    assert "## What the stages took" in page and "| hard/bliss | bilevel | 1:00 | 2.0 GiB |" in page


@pytest.fixture
def run(corpus: Path, tmp_path: Path) -> StudyRun:
    """A run of two arms whose stages have noted what its plan says, and of another arm that is not of the study."""
    options = ["--config", str(corpus / "config.yaml"), "--arms", "bliss,random", "--run_folder", str(tmp_path / "run")]
    config = parse_options([*options, "--rounds", "1", "--evaluation.tasks", "[]"])
    noted = [one | {"seconds": 2.0, "peak_bytes": MIB} for one in planned_stages(config)]
    noted.append({"arm": "dsir", "round": 1, "stage": "score", "seconds": 1.0, "peak_bytes": MIB, "flops": 3.0})
    for one in noted:
        one.pop("tokens", None)
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "summary.json", {"stages": noted})
    return StudyRun(7, "hard", config)


def test_records_of_a_run_have_the_tokens_of_its_plan(run: StudyRun) -> None:
    found = {(one["arm"], one["stage"]): one for one in read_stage_costs([run])}
    config, training = run.config, run.config.pretraining
    assert {arm for arm, _ in found} == {"shared", "bliss", "random"}
    assert all((one["seed"], one["variant"], one["seconds"]) == (7, "hard", 2.0) for one in found.values())
    batch = training.global_batch_size * config.data.seq_length
    assert found["random", "pretrain"]["tokens"] == training.train_iters * batch > 0
    assert found["shared", "warmup target"]["tokens"] == training.warmup_iters * batch
    assert found["bliss", "score"]["tokens"] > 0 == found["random", "score"]["tokens"]
    assert found["bliss", "score"]["round"] == 1 and found["bliss", "bilevel"]["flops"] > 0


def test_stages_are_those_of_the_whole_plan(run: StudyRun) -> None:
    whole = make_plan(run.config, Machine(world_size=1))["stages"]
    assert planned_stages(run.config) == [{key: one[key] for key in one if key != "seconds"} for one in whole]
