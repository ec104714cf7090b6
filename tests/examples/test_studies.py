"""The studies of one round: variants are options that a run takes, at the paper's settings, and can be planned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_bliss.config.config import Config
from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.run.options import parse_options
from megatron_bliss.study.description import Study, read_study
from megatron_bliss.study.runs import variant_config

ROOT = Path(__file__).parents[2]
ROUND = ROOT / "examples/studies/single_round"


def configs(study: Study) -> dict[str, Config]:
    folder = "runs/planned"
    return {
        variant: dataclasses.replace(variant_config(study, variant), run_folder=folder) for variant in study.variants
    }


def stages(planned: dict, arm: str) -> dict[str, tuple[int, float]]:
    return {one["stage"]: (one["tokens"], one["flops"]) for one in planned["stages"] if one["arm"] == arm}


@pytest.mark.parametrize("name", ["paper", "study"])
def test_every_variant_is_a_run_that_can_be_planned(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no corpus lies
    study = read_study(ROUND / f"{name}.yaml")
    for variant, config in configs(study).items():
        planned = make_plan(config, Machine(world_size=study.processes))
        assert {one["arm"] for one in planned["stages"]} == {"shared", *study.arms_of(variant)}
        assert all(one["epochs"] == pytest.approx(1.0, rel=1e-3) for one in planned["data"]["rounds"])


def test_the_round_at_the_papers_scale_has_the_papers_settings(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = read_study(ROUND / "paper.yaml")
    (config,) = configs(study).values()
    files = [ROOT / "examples/pythia_410m_c4/config.yaml", ROOT / "examples/c4/paper.yaml"]
    given = [word for file in files for word in ("--config", str(file))] + ["--run_folder", "runs/planned"]
    changed = ["--rounds", "1", "--arms", "random,bliss", "--data.split", "2,0,3"]
    changed += ["--pretraining.decay_branch_iters", "0"]
    expected = parse_options([*given, *changed])
    assert config == dataclasses.replace(expected, seed=config.seed) and study.arms == ["random", "bliss"]
    machine = Machine(world_size=study.processes, device="h100", memory_gib=80.0)
    planned, whole = make_plan(config, machine), make_plan(parse_options(given), machine)
    assert planned["memory"]["fits"] and planned["warnings"] == []
    own, four = stages(planned, "bliss"), stages(whole, "bliss")  # of four rounds any: they are alike
    assert own == {stage: cost for stage, cost in four.items() if stage != "decay_branch"}
    assert own["pretrain"][0] == 10_000 * 512 * 1024 and own["bilevel"][0] == 3_000 * 64 * 1024
    assert planned["data"]["tokens"] == whole["data"]["tokens"]  # the same corpus serves both


def test_the_small_round_makes_a_hundred_upper_steps_with_a_tie_to_the_target() -> None:
    study = read_study(ROUND / "study.yaml")
    assert study.arms == ["random", "bliss"] and study.control == "base/random" and "random" in study.longer
    config = configs(study)["base"]
    assert (config.rounds, config.bilevel.upper_iters, config.score.family) == (1, 100, "transformer")
    assert config.bilevel.kl_weight > 0 and config.score.init_from == "proxy"
    others = configs(read_study(ROUND.parent / "scores_small/study.yaml"))["default"]
    assert config.data == others.data and config.target == others.target and config.proxy == others.proxy
