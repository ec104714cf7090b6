"""What a plan says follows from the options alone; that it comes true is tested in run/test_rounds.py and
target/test_memory.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bliss.base.platform import DTYPES
from megatron_bliss.bilevel.flops import bilevel_flops, distillation_flops
from megatron_bliss.bilevel.memory import GIB, StepShape, step_bytes
from megatron_bliss.bilevel.published_costs import published_flops
from megatron_bliss.config.config import Config
from megatron_bliss.config.models import ModelConfig
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.models.families import FAMILIES
from megatron_bliss.models.presets import resolve_architecture, trunk_flops_per_token
from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.plan.text import format_plan
from megatron_bliss.run.options import parse_options
from megatron_bliss.selection.select import repetition_warnings
from megatron_bliss.target.throughput import PEAK_TFLOPS
from tests.data.corpora import documents, write_lines
from tools import plan as tool

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.parent.name for path in (ROOT / "examples").glob("*/config.yaml"))
PROXY = ModelConfig(preset="pythia-31m")
RANKS = {"quickstart": 2, "web_text": 2, "llama_70b_c4": 32}


def options(name: str, *others: str) -> list[str]:
    return ["--config", str(ROOT / "examples" / name / "config.yaml"), "--run_folder", "runs/planned", *others]


def config(name: str, *others: str) -> Config:
    """With the paper's bilevel stage, which has most to plan."""
    paper = ["--config", str(ROOT / "examples/c4/paper.yaml")] if name.endswith("_c4") else []
    return parse_options(options(name, *paper, *others))


def plan(name: str, *others: str, **machine) -> dict:
    return make_plan(config(name, *others), Machine(**{"world_size": 8, **machine}))


def memory(planned: dict) -> dict[str, dict]:
    return {entry["stage"]: entry for entry in planned["memory"]["stages"]}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_planned_without_its_corpus(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no corpus lies
    machine = Machine(world_size=RANKS.get(name, 8), device="h100", memory_gib=80.0)
    planned = make_plan(parse_options(options(name)), machine)
    assert planned["memory"]["fits"] and planned["memory"]["advice"] == []
    assert json.loads(json.dumps(planned, allow_nan=False)) == planned
    assert any(text.startswith("found data.train_prefix") for text in planned["not_ready"])
    assert all(one["epochs"] == pytest.approx(1.0, rel=1e-3) for one in planned["data"]["rounds"])
    assert all(entry["total"] > 0 for entry in planned["memory"]["stages"])
    text = format_plan(planned)
    parts = ("Work", "Memory of the rank", "Traffic: what the rank", "Data: a corpus of", "Disk", "not ready:")
    for part in (*parts, "assumed:", "estimated"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 112


def test_time_is_work_over_what_the_devices_reach() -> None:
    planned = plan("pythia_1b_c4", device="h100", mfu=0.5, proxy_mfu=0.25)
    stages = {(one["arm"], one["round"], one["stage"]): one for one in planned["stages"]}
    bf16, fp32 = (PEAK_TFLOPS["H100"][dtype] * 1e12 for dtype in ("bf16", "fp32"))
    others = "--scoring.params_dtype", "fp32", "--arms", "bliss,random,mates"
    exact = plan("pythia_1b_c4", *others, device="h100", mfu=0.5, proxy_mfu=0.25)
    for one in exact["stages"]:
        if one["stage"] == "score" and one["arm"] != "random":  # probes of mates are fp32 always
            assert one["seconds"] == pytest.approx(one["flops"] / (8 * fp32 * 0.25)) and one["seconds"] > 0
    pretrain, score = stages["bliss", 2, "pretrain"], stages["bliss", 2, "score"]
    assert pretrain["seconds"] == pytest.approx(pretrain["flops"] / (8 * bf16 * 0.5))
    assert score["seconds"] == pytest.approx(score["flops"] / (8 * bf16 * 0.25))
    hours = sum(one["seconds"] for one in planned["stages"]) * 8 / 3600
    assert planned["total"]["device_hours"] == pytest.approx(hours)
    assert plan("pythia_1b_c4")["total"]["seconds"] is None
    alike = {one["stage"]: one for one in plan("pythia_1b_c4", peak_tflops=100.0)["stages"]}
    assert alike["score"]["seconds"] == pytest.approx(alike["score"]["flops"] / (8 * 100e12 * 0.4))


def test_the_frozen_target_keeps_its_own_precision_and_utilisation() -> None:
    others = ("--bilevel.params_dtype", "fp32")
    settings = config("pythia_1b_c4", *others)
    planned = plan("pythia_1b_c4", *others, device="a100", mfu=0.4, proxy_mfu=0.1)
    found = next(one for one in planned["stages"] if one["stage"] == "bilevel")
    proxy, target = (resolve_architecture(ModelConfig(preset=name), 50304) for name in ("pythia-31m", "pythia-1b"))
    alone = bilevel_flops(config("pythia_1b_c4", "--bilevel.kl_weight", "0").bilevel, proxy, target, 1024)
    assert found["flops"] == bilevel_flops(settings.bilevel, proxy, target, 1024) > alone
    expected = (found["flops"] - alone) / (312e12 * 0.4) + alone / (19.5e12 * 0.1)
    assert found["seconds"] == pytest.approx(expected / 8)


def test_ranks_without_a_sample_take_as_long_as_those_with_one() -> None:
    """32 samples a step: 64 ranks are no faster than 32, and the plan says which batch would make use of them."""
    few, many = (plan("pythia_1b_c4", world_size=ranks, device="h100") for ranks in (32, 64))
    stages = [next(one for one in planned["stages"] if one["stage"] == "bilevel") for planned in (few, many)]
    assert stages[0]["flops"] == stages[1]["flops"]
    assert stages[1]["seconds"] == pytest.approx(stages[0]["seconds"])
    assert any("bilevel.global_batch_size 32 on 64 ranks" in text for text in many["warnings"])
    larger = ("--bilevel.global_batch_size", "64", "--bilevel.validation_batch_size", "64", "--bilevel.upper_iters")
    halved = plan("pythia_1b_c4", *larger, "1500", world_size=64, device="h100")
    assert next(one for one in halved["stages"] if one["stage"] == "bilevel")["seconds"] == pytest.approx(
        stages[0]["seconds"] / 2
    )


def test_traffic_grows_with_the_layout() -> None:
    def sent(planned: dict, stage: str) -> dict[str, int]:
        entry = next(one for one in planned["traffic"] if one["stage"] == stage)
        assert entry["total"] == sum(flow["bytes"] for flow in entry["flows"] if flow["among"] != "host")
        return {flow["what"]: flow["bytes"] for flow in entry["flows"]}

    replicas = sent(plan("pythia_1b_c4"), "target training")
    assert set(replicas) == {"gradients, scattered", "weights, gathered"}
    assert replicas["gradients, scattered"] == 2 * replicas["weights, gathered"]
    assert replicas["gradients, scattered"] == pytest.approx(4 * 1_011_781_632 * 7 / 8, rel=1e-3)
    upper = sent(plan("pythia_1b_c4"), "bilevel")
    proxy = plan("pythia_1b_c4")["models"]["proxy"]["parameters"]
    assert upper["vectors of the proxy"] == 3 * 4 * proxy * 2 * 7 // 8
    large = sent(plan("llama_70b_c4", world_size=64), "target training")
    assert set(large) - set(replicas) == {"activations and adjoints of layers", "gradients of norms", "between stages"}
    upper, moved = (
        sent(plan("llama_70b_c4", "--bilevel.offload_target", one, world_size=64), "bilevel")
        for one in ("false", "true")
    )
    weights = memory(plan("llama_70b_c4", world_size=64))["evaluate"]["parameters"]
    assert moved.items() - upper.items() == {("frozen target: weights in and out", 2 * weights)}
    alone = plan("pythia_1b_c4", world_size=1)
    assert all(entry["flows"] == [] for entry in alone["traffic"]) and "Traffic" not in format_plan(alone)


def test_scores_of_counts_make_selection_a_small_part_of_the_time() -> None:
    """At a tenth of the peak for small models: what examples/pythia_*_c4 cost, and the paper's bilevel stage there."""
    machine = Machine(world_size=8, device="h100", mfu=0.4, proxy_mfu=0.1)
    for name, share in (("pythia_410m_c4", 0.05), ("pythia_1b_c4", 0.02)):
        shipped = make_plan(parse_options(options(name)), machine)["overhead"]["seconds"]
        ngram = make_plan(config(name, "--score.family", "ngram"), machine)["overhead"]["seconds"]
        paper = make_plan(config(name), machine)["overhead"]["seconds"]
        assert 0 <= shipped < 0.001 < ngram <= share < paper


def test_what_bliss_costs_is_what_a_control_arm_does_not_do() -> None:
    planned = plan("pythia_410m_c4", "--scoring.params_dtype", "fp32", device="h200")
    control = plan("pythia_410m_c4", "--arms", "random", device="h200")
    assert "warmup proxy" not in {one["stage"] for one in control["stages"]}
    alone = control["total"]["flops"]
    bliss = planned["arms"]["shared"]["flops"] + planned["arms"]["bliss"]["flops"]
    assert planned["overhead"]["flops"] == pytest.approx(bliss / alone - 1)
    assert planned["overhead"]["seconds"] > planned["overhead"]["flops"]  # scoring runs in fp32
    assert control["overhead"] is None


def test_what_does_not_fit_is_named_with_what_to_change() -> None:
    planned = plan("pythia_2p8b_c4", "--target.recompute_granularity", "none", memory_gib=16.0)
    found = planned["memory"]
    assert found["fits"] is False and found["largest"] == "target training"
    advice = "\n".join(found["advice"])
    assert "target training:" in advice and "target.recompute_granularity" in advice
    assert "not every stage fits in 16 GiB" in format_plan(planned)
    assert plan("pythia_2p8b_c4")["memory"]["fits"] is None


def test_offloading_and_a_limit_make_the_bilevel_stage_smaller() -> None:
    whole = memory(plan("pythia_1b_c4"))["bilevel"]
    offloaded = memory(plan("pythia_1b_c4", "--bilevel.offload_target", "true"))["bilevel"]
    assert offloaded["parameters"] == whole["parameters"] - memory(plan("pythia_1b_c4"))["evaluate"]["parameters"]
    untied = memory(plan("pythia_1b_c4", "--bilevel.kl_weight", "0", memory_gib=80.0))["bilevel"]
    proxy = resolve_architecture(ModelConfig(preset="pythia-31m"), 50304)
    assert untied["working"] == step_bytes(StepShape(proxy, 1024, 2, "cuda"), 4, recompute=False)
    limit = ("--bilevel.memory_limit_gib", "0.9", "--bilevel.global_batch_size", "512")
    limited = memory(plan("pythia_1b_c4", "--bilevel.kl_weight", "0", *limit))["bilevel"]
    assert 1 <= limited["micro_batch_size"] < 64 and limited["working"] <= 0.9 * GIB
    with pytest.raises(ValueError, match="found bilevel.memory_limit_gib 0.01, expected at least"):
        plan("pythia_1b_c4", "--bilevel.memory_limit_gib", "0.01")


def test_a_control_is_planned_with_weights_moments_and_copy() -> None:
    plain, held = (plan("pythia_1b_c4", "--bilevel.guide_weighting", one) for one in ("fixed", "minimax"))
    count = plain["models"]["proxy"]["parameters"]
    before, after = memory(plain)["bilevel"], memory(held)["bilevel"]
    copy = DTYPES[config("pythia_1b_c4").bilevel.params_dtype].itemsize % 4  # fp32 passes run on the weights themselves
    assert after["parameters"] - before["parameters"] == (4 + copy) * count
    assert after["optimizer"] - before["optimizer"] == 8 * count
    assert after["working"] == before["working"]
    parts = [planned["disk"]["parts"]["proxy and score model"] for planned in (plain, held)]
    assert parts[1] - parts[0] == (4 + 8 + 4) * count * config("pythia_1b_c4").rounds
    assert of_stage(held, "bilevel")["flops"] > of_stage(plain, "bilevel")["flops"]


def test_arms_with_a_bilevel_stage_of_their_own_are_planned() -> None:
    arms = ("--arms", "bliss,identity,single_level,published")
    planned = plan("pythia_1b_c4", *arms, device="h100", memory_gib=40.0)
    sizes, whole = memory(planned), memory(planned)["bilevel"]
    assert sizes["identity bilevel"] == whole | {"stage": "identity bilevel"}
    untied = memory(plan("pythia_1b_c4", "--bilevel.kl_weight", "0", memory_gib=40.0))["bilevel"]
    assert sizes["single_level bilevel"] == untied | {"stage": "single_level bilevel"}
    assert sizes["published bilevel"]["working"] > 10 * whole["working"]
    assert "micro_batch_size" in sizes["published bilevel"] and sizes["published bilevel"]["micro_batch_size"] == 4
    stages = {one["arm"]: one for one in planned["stages"] if one["stage"] == "bilevel"}
    tokens = {arm: one["tokens"] / (3000 * 32 * 1024) for arm, one in stages.items()}
    assert tokens == {"bliss": 2, "identity": 2, "single_level": 2, "published": 3}
    settings = config("pythia_1b_c4")
    proxy, target = (resolve_architecture(ModelConfig(preset=name), 50304) for name in ("pythia-31m", "pythia-1b"))
    untied = published_flops(replace(settings.bilevel, kl_weight=0.0), proxy, target, 1024)
    whole = published_flops(settings.bilevel, proxy, target, 1024)
    assert stages["published"]["flops"] == whole > untied
    bf16, fp32 = (PEAK_TFLOPS["H100"][dtype] * 1e12 for dtype in ("bf16", "fp32"))
    expected = (whole - untied) / bf16 + untied / fp32
    assert stages["published"]["seconds"] == pytest.approx(expected / (8 * 0.4))
    tight = plan("pythia_1b_c4", *arms, memory_gib=8.0)
    (advice,) = [text for text in tight["memory"]["advice"] if text.startswith("published bilevel:")]
    assert "bilevel.offload_target" in advice and "leave out the arm published" in advice
    assert "identity on top of a control arm alone" in format_plan(plan("pythia_1b_c4", "--arms", "identity"))


def of_stage(planned: dict, stage: str) -> dict:
    return next(one for one in planned["stages"] if one["stage"] == stage)


def test_a_score_model_of_ngrams_costs_next_to_nothing() -> None:
    family = "--score.family"
    trunk, table, both = (plan("pythia_1b_c4", family, name) for name in ("transformer", "ngram", "both"))
    counts = [planned["models"]["score model"]["parameters"] for planned in (trunk, table, both)]
    assert counts[1] == 2**19 and counts[2] == counts[0] + counts[1] and counts[0] > 10**7
    assert "score model 524,288" in format_plan(table)
    scored, tokens = of_stage(table, "score")["flops"], of_stage(table, "score")["tokens"]
    assert scored == 4.0 * tokens < 1e-3 * of_stage(trunk, "score")["flops"]
    longer = plan("pythia_1b_c4", family, "ngram", "--score.ngram_max", "3")
    assert of_stage(longer, "score")["flops"] == 6.0 * tokens
    settings, models = config("pythia_1b_c4").bilevel, ("pythia-31m", "pythia-1b")
    models = [resolve_architecture(ModelConfig(preset=name), 50304) for name in models]
    batches = settings.upper_iters * settings.global_batch_size * 1024
    steps = [of_stage(planned, "bilevel")["flops"] for planned in (trunk, table, both)]
    read = batches * trunk_flops_per_token(models[0], 1024)  # forward once, then a gradient: 1 + 3; of n-grams 1 + 2
    assert steps[0] == bilevel_flops(settings, *models, 1024)
    assert steps[0] - steps[1] == pytest.approx(4 * read - 3 * 4 * batches, rel=1e-9)
    assert steps[2] - steps[0] == pytest.approx(3 * 4 * batches, rel=1e-3)
    held = [memory(planned)["bilevel"] for planned in (trunk, table, both)]
    assert held[0]["optimizer"] - held[1]["optimizer"] == 8 * (counts[0] - 2**19)
    assert held[2]["parameters"] - held[0]["parameters"] == 8 * 2**19  # passes are bf16: a copy, the table's in fp32
    assert memory(table)["score"]["parameters"] == 4 * 2**19
    assert memory(table)["score"]["working"] < 0.2 * memory(trunk)["score"]["working"]
    disk = [planned["disk"]["parts"]["proxy and score model"] for planned in (trunk, table)]
    assert disk[0] - disk[1] == 4 * 16 * (counts[0] - 2**19)  # in 4 rounds, with moments and once more in final.pt


def test_teaching_a_transformer_what_counts_say_is_planned() -> None:
    start = ("--score.init_from", "counts", "--score.distil_iters", "500", "--score.distil_batch_size", "64")
    given, plain = plan("pythia_1b_c4", *start, device="h100"), plan("pythia_1b_c4", device="h100")
    rounds = [[one for one in planned["stages"] if one["stage"] == "bilevel"] for planned in (given, plain)]
    more = [
        {key: one[key] - other[key] for key in ("tokens", "flops", "seconds")}
        for one, other in zip(*rounds, strict=True)
    ]
    settings = config("pythia_1b_c4", *start)
    score = FAMILIES["transformer"].architecture(settings.score, resolve_architecture(PROXY, 50304))
    assert more[0]["tokens"] == (500 * 64 + 1024) * 1024
    flops = distillation_flops(settings.score, score, 1024, 1024)
    assert more[0]["flops"] == pytest.approx(flops, rel=1e-6)
    peak = PEAK_TFLOPS["H100"][settings.bilevel.params_dtype] * 1e12
    assert more[0]["seconds"] == pytest.approx(flops / (8 * peak * 0.4), rel=1e-6)  # none of it is the target's work
    assert more[1:] == [{"tokens": 0, "flops": 0, "seconds": 0}] * 3  # the last round's score model goes on
    anew = plan("pythia_1b_c4", *start, "--score.carry_over", "false")
    assert len({one["flops"] for one in anew["stages"] if one["stage"] == "bilevel"}) == 1
    whole = memory(plan("pythia_1b_c4", *start))["distillation"]
    assert whole["optimizer"] == 8 * score.parameters and "distillation" not in memory(plain)
    split = memory(plan("pythia_1b_c4", *start, "--bilevel.micro_batch_size", "2"))["distillation"]
    assert split["working"] < 0.5 * whole["working"] and split["parameters"] == whole["parameters"]
    tight = plan("pythia_1b_c4", *start, "--score.distil_batch_size", "4096", memory_gib=20.0)
    assert any("lower score.distil_batch_size" in text for text in tight["memory"]["advice"])
    few = plan("pythia_1b_c4", *start, "--score.distil_batch_size", "4")["warnings"]
    assert any("score.distil_batch_size 4 on 8 ranks leaves 4 of them" in text for text in few)


@pytest.mark.parametrize("family", ["ngram", "both"])
def test_a_table_that_starts_from_counts_costs_no_step(family: str) -> None:
    options = "--score.family", family, "--bilevel.score_optimizer.lr", "1e-3"
    given, plain = (plan("pythia_1b_c4", *options, *more) for more in (("--score.init_from", "counts"), ()))
    assert given["stages"] == plain["stages"] and given["memory"] == plain["memory"]


def test_training_memory_is_near_the_measured() -> None:
    """docs/benchmarks/pretrain_cpu.md: 2,027 MiB, of which 1,114 are held between steps."""
    sizes = ("--target.preset", "pythia-70m", "--data.seq_length", "512", "--platform.params_dtype", "fp32")
    batch = ("--pretraining.micro_batch_size", "4", "--pretraining.global_batch_size", "4")
    others = (*sizes, *batch, "--evaluation.micro_batch_size", "1")
    entry = memory(plan("pythia_1b_c4", *others, world_size=1, device="cpu"))["target training"]
    assert entry["total"] / 2**20 == pytest.approx(2027, rel=0.1)
    assert (entry["total"] - entry["working"]) / 2**20 == pytest.approx(1114, rel=0.05)


def test_a_corpus_that_is_there_is_counted(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "text.jsonl", documents(200))
    prefix = str(tmp_path / "pool")
    preprocess(PreprocessSettings(inputs=[source], output_prefix=prefix, tokenizer_type="bytes"), progress="none")
    data = ("--data.train_prefix", prefix, "--data.validation_prefix", prefix, "--data.test_prefixes", f"[{prefix}]")
    planned = plan("pythia_1b_c4", *data)
    assert planned["not_ready"] == [] and planned["models"]["target"]["vocab_size"] < 300
    found = planned["data"]
    shards = [found["warmup"], *found["rounds"]]
    assert found["is_there"] and sum(shard["tokens"] for shard in shards) == found["tokens"]
    needed = 10000 * 512 * 1024
    selected = round(0.2 * found["rounds"][0]["tokens"])
    assert repetition_warnings(needed, selected, config("pythia_1b_c4").selection)[0] in planned["warnings"]
    with pytest.raises(ValueError, match="found 200 units to choose from"):
        plan("pythia_1b_c4", *data, "--rounds", "300")


def test_a_corpus_may_be_given_by_its_tokens() -> None:
    given = make_plan(config("pythia_1b_c4"), Machine(world_size=8), corpus_tokens=50_000_000, vocab_size=1000)
    assert given["data"]["rounds"][0]["tokens"] == 10_000_000 and given["models"]["proxy"]["vocab_size"] == 1000
    assert "raise selection.fraction" in given["warnings"][-1]
    assert given["data"]["rounds"][0]["epochs"] == pytest.approx(5_242_880_000 / 2_000_000)
    threshold = plan("pythia_1b_c4", "--selection.policy", "threshold")["data"]["rounds"][0]
    assert threshold["selected_tokens"] is None and threshold["epochs"] is None
    assert threshold["tokens"] == 5 * threshold["needed_tokens"]  # the share that a fraction keeps by default
    budget = plan("pythia_1b_c4", "--selection.policy", "token_budget")["data"]["rounds"][0]
    assert budget["selected_tokens"] == budget["needed_tokens"] and budget["tokens"] == 5 * budget["needed_tokens"]


def test_a_schedule_of_fractions_is_planned_round_by_round() -> None:
    fractions = [0.4, 0.3, 0.2, 0.1]
    options = ("--selection.fraction_schedule", str(fractions))
    given = make_plan(config("pythia_1b_c4", *options), Machine(world_size=8), corpus_tokens=50_000_000)
    assert [one["selected_tokens"] for one in given["data"]["rounds"]] == [4_000_000, 3_000_000, 2_000_000, 1_000_000]
    assert sum("raise selection.fraction_schedule" in warning for warning in given["warnings"]) == 4
    same = make_plan(config("pythia_1b_c4"), Machine(world_size=8), corpus_tokens=50_000_000)
    parts = given["disk"]["parts"]["subsets"], same["disk"]["parts"]["subsets"]
    assert parts[0] / parts[1] == pytest.approx(sum(fractions) / 0.8, rel=1e-3)
    assumed = plan("pythia_1b_c4", *options)
    epochs = [one["epochs"] for one in assumed["data"]["rounds"]]
    assert epochs == pytest.approx([0.25, 1 / 3, 0.5, 1.0], rel=1e-3)
    assert any("the smallest selection is trained on once" in text for text in assumed["assumptions"])


@pytest.mark.parametrize(
    "others, machine, message",
    [
        ((), {"world_size": 6, "device": "h100"}, "found pretraining.global_batch_size 512, expected a multiple of"),
        (("--target.tensor_model_parallel_size", "3"), {}, "found 8 processes, expected a multiple of 3"),
        (("--target.pipeline_model_parallel_size", "8", "--target.num_layers", "20"), {}, "target.num_layers=20"),
        (("--selection.fraction_schedule", "[0.5]"), {}, "for 4 rounds, expected one fraction for each"),
        (
            ("--bilevel.upper_iters", "0"),
            {},
            "found bilevel.upper_iters 0 with score.init_from proxy",
        ),
        (("--pretraining.use_distributed_optimizer", "false"), {}, "found pretraining.overlap_param_gather without"),
        (("--pretraining.optimizer.min_lr", "1"), {}, "found pretraining.optimizer.min_lr=1.0, expected at most"),
        (("--arms", "published"), {"world_size": 64}, "32 on 64 ranks, expected a sample of both for every rank"),
        ((), {"mfu": 40.0}, "found --mfu 40.0, expected a share"),
        ((), {"device": "h1000"}, "found --device 'h1000', expected cpu or one of"),
    ],
)
def test_what_a_run_would_refuse_is_refused(others: tuple, machine: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan("pythia_1b_c4", *others, **machine)


def test_the_tool_prints_and_writes_a_plan(tmp_path: Path, capsys) -> None:
    own = ["--world-size", "8", "--device", "h100 pcie", "--json", str(tmp_path / "plans" / "plan.json")]
    assert tool.main([*own, *options("llama_0p5b_c4", "--rounds", "2")]) == 0
    assert "8 ranks of h100 pcie: tensor 1 x pipeline 1 x data 8" in capsys.readouterr().out
    written = json.loads((tmp_path / "plans" / "plan.json").read_text())
    assert {one["round"] for one in written["stages"]} == {0, 1, 2}


def test_a_wrong_option_ends_it_as_it_would_end_the_run(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(options("pythia_1b_c4", "--bilevel.upper_iterations", "3"))
    planned = capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_options(options("pythia_1b_c4", "--bilevel.upper_iterations", "3"))
    assert ended.value.code == 2 and planned == capsys.readouterr().err != ""
    command = [sys.executable, str(ROOT / "tools/plan.py"), *options("pythia_1b_c4", "--rounds", "0")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and done.stderr == "plan.py: error: found rounds 0, expected 1 or more\n"


CUDA_BUILD_ON_A_LOGIN_NODE = """
import importlib, sys
import torch
import tools.plan
print(tools.plan.main(sys.argv[1:]), 'torch.utils.cpp_extension' in sys.modules)
import torch.utils.cpp_extension as builder
torch.version.cuda = '13.0'
torch.cuda._is_compiled, torch.cuda.is_available = lambda: True, lambda: False
importlib.reload(builder)
print(builder.CUDA_HOME)
"""


def test_a_toolkit_without_a_gpu_is_not_spoken_of(tmp_path: Path) -> None:
    """Where ``nvcc`` is on the path but no GPU, torch's extension builder warns at its import."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", CUDA_BUILD_ON_A_LOGIN_NODE, *options("pythia_1b_c4", "--rounds", "0")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.stdout.splitlines() == ["2 False", str(tmp_path)]
    assert done.returncode == 0 and done.stderr == "plan.py: error: found rounds 0, expected 1 or more\n"
