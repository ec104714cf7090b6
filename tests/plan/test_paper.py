"""The paper's table of FLOPs: its arithmetic by hand, ours as make_plan says it, and what does not fit said as such."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from megatron_bliss.models.presets import PRESETS, parameter_count, trunk_count
from megatron_bliss.plan.paper import (
    DERIVATIONS,
    EXAMPLES,
    REPORTED,
    SCHEDULE,
    STAGES,
    UNIT,
    full_attention_flops,
    gives_digits,
    implied_parameters,
    paper_table,
    six_n_d,
)
from megatron_bliss.plan.paper_text import format_paper_table
from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.run.options import parse_options
from tools import plan as tool

ROOT = Path(__file__).parents[2]


@cache
def planned(size: str, arms: str = "bliss,published") -> dict:
    files = [ROOT / "examples" / EXAMPLES[size] / "config.yaml", ROOT / "examples/c4/paper.yaml"]
    given = [argument for file in files for argument in ("--config", str(file))]
    return make_plan(parse_options([*given, "--arms", arms]), Machine(world_size=1), vocab_size=50304)


@cache
def table() -> dict:
    return paper_table({size: planned(size) for size in EXAMPLES})


def derived(stage: str) -> dict[str, dict]:
    return {one["way"]: one for one in table()["derivations"] if one["stage"] == stage}


@pytest.mark.parametrize("size", EXAMPLES)
def test_the_papers_numbers_add_up_to_its_total(size: str) -> None:
    assert gives_digits(REPORTED[size]["total"], sum(float(REPORTED[size][stage]) for stage in STAGES) * UNIT)
    share = float(REPORTED["410M"]["scoring"]) / float(REPORTED["410M"]["total"])
    assert f"{share:.0%}" == "19%"  # as the paper says of 410M


def test_the_schedule_is_the_papers_and_that_of_the_examples() -> None:
    assert SCHEDULE.target_tokens == 26_214_400_000 and SCHEDULE.scored_tokens == 4 * 5 * 10_000 * 512 * 1024
    assert SCHEDULE.bilevel_tokens == 4 * 3_000 * 32 * 1024
    tokens: dict = {}
    for one in planned("1B")["stages"]:
        tokens[one["arm"], one["stage"]] = tokens.get((one["arm"], one["stage"]), 0) + one["tokens"]
    assert tokens["shared", "warmup target"] + tokens["bliss", "pretrain"] == SCHEDULE.target_tokens
    assert tokens["bliss", "score"] == SCHEDULE.scored_tokens
    assert tokens["bliss", "bilevel"] == 2 * SCHEDULE.bilevel_tokens  # with as many samples of the guide


@pytest.mark.parametrize("size, parameters", [("410M", 403.9e6), ("1B", 1124.0e6)])
def test_six_n_d_gives_the_papers_pretraining_with_no_pythia_of_the_name(size: str, parameters: float) -> None:
    """26.2e9 tokens: N follows from the number, and is neither all parameters nor those without an embedding."""
    tokens = 26.2e9
    assert implied_parameters(size, tokens) == pytest.approx(parameters, abs=0.1e6)
    assert gives_digits(REPORTED[size]["pretraining"], six_n_d(round(implied_parameters(size, tokens)), tokens))
    arch = PRESETS[f"pythia-{size.lower()}"]
    for count in (parameter_count(arch), trunk_count(arch), trunk_count(arch) - arch.vocab_size * arch.hidden_size):
        assert not gives_digits(REPORTED[size]["pretraining"], six_n_d(count, tokens))


def test_no_sum_of_a_targets_parts_gives_both_pretrainings() -> None:
    ratios = table()["ratios"]
    least = (17.67 - 0.005) / (6.35 + 0.005)
    assert ratios["blocks"] == pytest.approx(8 / 3, rel=1e-3) and ratios["embeddings"] == 2
    assert max(ratio for name, ratio in ratios.items() if name != "paper") < least < ratios["paper"]


def test_attention_to_the_whole_sequence_is_counted_by_hand() -> None:
    arch = PRESETS["pythia-410m"]
    matrices = 24 * 12 * 1024**2 + 50304 * 1024
    attention = 24 * 2 * 1024 * 1024  # scores, and values, of every token with 1,024
    assert full_attention_flops(arch, 7) == 7 * 3 * 2 * (matrices + attention)


@pytest.mark.parametrize("size", EXAMPLES)
def test_our_numbers_are_those_of_the_plan(size: str) -> None:
    """That of a run without the arm ``published``."""
    plain = planned(size, "bliss,random")
    rows = {row["stage"]: row for row in table()["sizes"][size]["rows"]}
    arms, branches = plain["arms"], rows["decay branches"]["plan"]
    assert branches > 0 and rows["decay branches"]["paper"] is None
    assert rows["total"]["plan"] + branches == pytest.approx(arms["shared"]["flops"] + arms["bliss"]["flops"])
    for stage, name in (("bilevel", "bilevel"), ("scoring", "score")):
        found = [one["flops"] for one in plain["stages"] if (one["arm"], one["stage"]) == ("bliss", name)]
        assert len(found) == 4 and rows[stage]["plan"] == sum(found) > 0
        assert rows[stage]["ratio"] == rows[stage]["plan"] / (float(REPORTED[size][stage]) * 1e19)
    for key in ("n_d", "plan"):
        assert rows["total"][key] == pytest.approx(sum(rows[stage][key] for stage in STAGES))
    target = PRESETS[f"pythia-{size.lower()}"]
    assert rows["pretraining"]["n_d"] == 6 * parameter_count(target) * 26_214_400_000
    assert rows["scoring"]["n_d"] == 2 * (trunk_count(PRESETS["pythia-31m"]) + 257) * SCHEDULE.scored_tokens


def test_a_derivation_says_whether_it_gives_the_papers_digits() -> None:
    assert {one.stage for one in DERIVATIONS} == set(STAGES)
    for one in table()["derivations"]:
        for size, flops in one["flops"].items():
            digits = REPORTED[size][one["stage"]]
            half = 0.5 * 10 ** -len(digits.partition(".")[2])
            assert one["gives_digits"][size] == (abs(flops / UNIT - float(digits)) < half)
    found = {stage: [set(one["gives_digits"].items()) for one in derived(stage).values()] for stage in STAGES}
    both, none, small = (
        {("410M", True), ("1B", True)},
        {("410M", False), ("1B", False)},
        {("410M", True), ("1B", False)},
    )
    assert found["pretraining"] == [none, none, small]
    assert found["proxy warm-up"] == [none, both]
    assert found["bilevel"] == [none, both, none] and found["scoring"] == [none, none, both]


def test_what_the_sizes_differ_by_in_the_bilevel_stage_is_the_target_at_six_n_d() -> None:
    flops = next(iter(derived("bilevel").values()))["flops"]
    assert f"{(flops['1B'] - flops['410M']) / UNIT:.3f}" == f"{0.261 - 0.13:.3f}"
    published = derived("bilevel")["the released code's step, as the arm published counts it"]["flops"]
    own = [one["flops"] for one in planned("1B")["stages"] if (one["arm"], one["stage"]) == ("published", "bilevel")]
    assert published["1B"] == sum(own)


def test_the_tool_prints_and_writes_it(tmp_path: Path, capsys) -> None:
    assert tool.main(["--paper-table", "--json", str(tmp_path / "made" / "table.json")]) == 0
    text = capsys.readouterr().out
    assert json.loads((tmp_path / "made" / "table.json").read_text()) == json.loads(json.dumps(table()))
    assert text == format_paper_table(table()) + "\n" and max(map(len, text.splitlines())) <= 112
    words = [line.split() for line in text.splitlines()]
    assert ["scoring", "1.53", "0.369", "0.132", "0.09"] in words and [
        "bilevel",
        "0.261",
        "0.091",
        "0.093",
        "0.35",
    ] in words
    assert "N = 1,123.4M for 1B, where Pythia has 1,011.8M" in " ".join(text.split())


def test_options_of_a_run_are_refused_beside_it(capsys) -> None:
    assert tool.main(["--paper-table", "--rounds", "3"]) == 2
    assert "found --rounds 3 beside --paper-table, expected no options of a run" in capsys.readouterr().err
