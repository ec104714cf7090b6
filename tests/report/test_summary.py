"""The speed-up is interpolated, never invented; the table says the same as the JSON."""

import json
import math

import pytest

from megatron_bliss.report.summary import (
    build_summary,
    by_lift,
    config_digest,
    final_losses,
    first_reach,
    format_bytes,
    format_flops,
    format_table,
    loss_at,
    other_speedups,
    read_stages,
    shares,
    speedup,
    speedup_sentence,
)

RANDOM = [[100, 9.0], [200, 7.0], [300, 6.0], [400, 5.0]]


@pytest.mark.parametrize(
    "bliss, expected",
    [
        ([[100, 9.0], [200, 6.0], [300, 4.0], [400, 3.5]], 400 / 250),  # halfway between two evaluations
        ([[100, 9.0], [200, 5.0], [300, 4.0], [400, 3.0]], 400 / 200),  # exactly at an evaluation
        ([[100, 5.0], [200, 4.0]], 400 / 100),  # at the first point
        ([[100, 4.0], [200, 3.0]], 400 / 100),  # below it at the first point: no extrapolation
        ([[100, 9.0], [200, 4.0], [300, 6.0], [400, 5.5]], 400 / 180),  # the first time counts, not the last
        ([[100, 9.0], [400, 5.0]], 1.0),
        ([[100, 9.0], [400, 6.0], [800, 4.0]], 400 / 600),  # slower than random
        ([[100, 9.0], [400, 5.1]], None),  # never
        ([], None),
        ([[0, 4.0], [100, 3.0]], None),  # before its first step: no ratio
        ([[100, 9.0], [200, math.nan], [300, 4.0]], 400 / 260),  # an evaluation that failed is left out
        ([[100, 9.0], [200, None], [300, 4.0]], 400 / 260),  # as it comes back from JSON
    ],
)
def test_speedup(bliss, expected):
    assert speedup(RANDOM, bliss) == (None if expected is None else pytest.approx(expected, rel=1e-12))


def test_speedup_without_a_control():
    assert speedup([], RANDOM) is None
    assert speedup([[100, math.nan]], RANDOM) is None
    assert speedup(RANDOM, RANDOM) == 1.0


def test_speedup_is_unchanged_by_the_unit_of_the_axis():
    bliss = [[100, 9.0], [200, 6.0], [300, 4.0]]
    in_steps = [[x / 4096, loss] for x, loss in bliss], [[x / 4096, loss] for x, loss in RANDOM]
    assert speedup(in_steps[1], in_steps[0]) == pytest.approx(speedup(RANDOM, bliss), rel=1e-12)


def test_reading_a_curve_at_a_point_and_back():
    assert loss_at(RANDOM, 250) == pytest.approx(6.5)
    assert loss_at(RANDOM, 400) == 5.0
    assert loss_at(RANDOM, 401) is None and loss_at(RANDOM, 99) is None
    assert first_reach(RANDOM, loss_at(RANDOM, 333)) == pytest.approx(333)
    assert first_reach(RANDOM, 4.9) is None


def evaluations(losses, names=("lambada", "c4")):
    return [
        {"iteration": 50 * i, "tokens": 50 * i * 4096, "losses": {name: loss + k for k, name in enumerate(names)}}
        for i, loss in enumerate(losses, start=1)
    ]


STAGES = [
    {"arm": "shared", "round": 0, "stage": "warmup target", "seconds": 30.0, "peak_bytes": 2**30, "flops": 2e12},
    {"arm": "bliss", "round": 1, "stage": "bilevel", "seconds": 60.0, "peak_bytes": 3 * 2**29, "flops": 5e12},
    {"arm": "bliss", "round": 2, "stage": "bilevel", "seconds": 65.0, "peak_bytes": 2**30, "flops": 5e12},
    {"arm": "bliss", "round": 1, "stage": "select", "seconds": 0.2, "peak_bytes": None, "flops": None},
]
DOMAINS = {
    "domain": {
        "pool": {"prose": 0.2, "code": 0.5, "tables": 0.3},
        "selected": {"bliss": {"prose": 0.6, "code": 0.4}, "random": {"prose": 0.2, "code": 0.5, "tables": 0.3}},
    }
}


def example(**changes):
    content = {"bliss": evaluations([8, 6, 4, 3]), "random": evaluations([8, 7, 6, 5])} | changes
    return build_summary(content, stages=STAGES, domains_by_field=DOMAINS, seed=7, config_text="seed: 7\n")


def test_summary_has_the_promised_keys_and_is_json():
    summary = example()
    assert summary == json.loads(json.dumps(summary, allow_nan=False))
    assert summary["arms"]["bliss"]["validation_loss"] == [[204800, 8], [409600, 6], [614400, 4], [819200, 3]]
    assert summary["arms"]["random"]["losses"]["c4"][-1] == [819200, 6]
    assert summary["arms"]["random"]["iterations"] == [50, 100, 150, 200]
    assert summary["speedup"] == pytest.approx(200 / 125) == summary["speedups"]["lambada"]
    assert summary["domains"] == {"pool": DOMAINS["domain"]["pool"], "selected": DOMAINS["domain"]["selected"]["bliss"]}
    assert summary["domains_by_field"] == DOMAINS
    assert summary["stages"] == STAGES and summary["seed"] == 7
    assert summary["config_digest"] == config_digest("seed: 7\n") != config_digest("seed: 8\n")
    assert {"python", "torch", "megatron-core", "megatron_bliss"} <= set(summary["versions"])


def test_summary_of_a_diverged_run_is_still_json():
    summary = example(bliss=evaluations([8, math.nan, math.inf, 5.5]))
    assert json.loads(json.dumps(summary, allow_nan=False))["arms"]["bliss"]["validation_loss"][1] == [409600, None]
    assert summary["speedup"] is None
    assert "never reached random's final loss 5 (its best: 5.5)" in speedup_sentence(summary)
    assert final_losses(summary)["lambada"] == {"bliss": 5.5, "random": 5}


def test_speedup_is_null_without_one_of_the_arms():
    for arm, other in (("bliss", "random"), ("random", "bliss")):
        content = {arm: evaluations([8, 5])}
        summary = build_summary(content, stages=[], domains_by_field={}, seed=1, config_text="")
        assert summary["speedup"] is None
        assert f"those of {other} are missing" in speedup_sentence(summary)


@pytest.mark.parametrize(
    "bliss, sentence",
    [
        ([8, 6, 4, 3], "bliss reached random's final loss 5 at step 125 of 200: 1.60x fewer steps."),
        ([8, 7, 6.5, 6, 5, 4], "bliss reached random's final loss 5 at step 250 of 200: 1.25x more steps."),
    ],
)
def test_speedup_is_said_plainly(bliss, sentence):
    assert speedup_sentence(example(bliss=evaluations(bliss))) == sentence


def test_every_other_arm_has_its_own_sentence():
    summary = example(dsir=evaluations([8, 5, 4, 3]), mates=evaluations([8, 7, 6, 6]))
    dsir, mates = other_speedups(summary)
    assert dsir == "dsir reached random's final loss 5 at step 100 of 200: 2.00x fewer steps."
    assert mates == "No speed-up: mates never reached random's final loss 5 (its best: 6)."
    assert dsir in format_table(summary) and mates in format_table(summary)
    alone = {"mates": evaluations([8, 5])}
    assert other_speedups(build_summary(alone, stages=[], domains_by_field={}, seed=1, config_text="")) == []


def test_table_says_it_all_in_a_hundred_columns():
    table = format_table(example())
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert max(map(len, table.splitlines())) <= 100
    assert "819,200 3.0000 5.0000 -2.0000" in lines
    assert "c4 4.0000 6.0000 -2.0000 1.60x" in lines
    assert "prose 20.0% 60.0% 3.00x 20.0% 1.00x" in lines
    assert "tables 30.0% 0.0% 0.00x 30.0% 1.00x" in lines
    assert "bliss bilevel 2 2:05 1.5 GiB 10.0 TFLOP" in lines
    assert "total 4 2:35 1.5 GiB 12.0 TFLOP" in lines
    assert "bliss reached random's final loss 5 at step 125 of 200: 1.60x fewer steps." in lines


def test_table_columns_are_aligned():
    block = next(block for block in format_table(example()).split("\n\n") if block.startswith("Share"))
    _, header, _, *rows = block.splitlines()
    assert len({len(line) for line in [header, *rows]}) == 1


def test_arms_are_compared_at_equal_tokens_also_where_they_were_measured_at_others():
    other = [{"iteration": 75, "tokens": 75 * 4096, "losses": {"lambada": 7.5}}, evaluations([8, 7, 6, 5])[-1]]
    lines = [" ".join(line.split()) for line in format_table(example(random=other)).splitlines()]
    assert f"{75 * 4096:,} 7.0000 7.5000 -0.5000" in lines
    assert "204,800 8.0000 - -" in lines


def test_table_of_an_empty_run_and_hostile_labels():
    empty = build_summary({}, stages=[], domains_by_field={}, seed=1, config_text="")
    assert "no evaluation has finished" in format_table(empty)
    hostile = {"domain": {"pool": {"\x1b[2Jclear" + "x" * 99: 1.0}, "selected": {"bliss": {}}}}
    table = format_table(build_summary({}, stages=[], domains_by_field=hostile, seed=1, config_text=""))
    assert "\x1b" not in table and max(map(len, table.splitlines())) <= 100


def test_long_tables_of_shares_keep_both_ends():
    pool = {f"d{i:02d}": 0.01 for i in range(100)}
    chosen = {f"d{i:02d}": i / 4950 for i in range(100)}
    fields = {"domain": {"pool": pool, "selected": {"bliss": chosen}}}
    table = format_table(build_summary({}, stages=[], domains_by_field=fields, seed=1, config_text=""))
    assert "d99" in table and "d00" in table and "d50" not in table and "(84 more in summary.json)" in table


def test_shares_and_lift():
    assert shares(["a", "b", "a", None]) == {"a": 0.5, "(none)": 0.25, "b": 0.25}
    assert shares([]) == {}
    rows = by_lift({"a": 0.5, "b": 0.5}, {"a": 0.1, "b": 0.8, "new": 0.1})
    assert [(row[0], row[3]) for row in rows] == [("b", 1.6), ("a", 0.2), ("new", None)]


def test_stage_records_come_from_done_files_in_order_of_work(tmp_path):
    for place, seconds in (
        ("random/round_01/select", 1), ("bliss/round_02/bilevel", 2), ("bliss/round_01/pretrain", 3),
        ("bliss/round_01/bilevel", 4), ("warmup/target", 5), ("warmup/proxy", 6),
    ):  # fmt: skip
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "done.json").write_text(json.dumps({"seconds": seconds, "peak_bytes": 10, "other": 1}))
    (tmp_path / "bliss/round_02/score").mkdir()  # begun, not finished
    records = read_stages(tmp_path)
    assert [record["seconds"] for record in records] == [5, 6, 4, 3, 2, 1]
    assert records[2] == {"arm": "bliss", "round": 1, "stage": "bilevel", "seconds": 4, "peak_bytes": 10, "flops": None}
    assert records[0]["stage"] == "warmup target" and records[0]["arm"] == "shared"


def test_a_damaged_done_file_is_named(tmp_path):
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup/done.json").write_text("{")
    with pytest.raises(ValueError, match=r"warmup/done.json.*not (valid )?JSON.*remove it"):
        read_stages(tmp_path)


def test_sizes():
    assert [format_bytes(b) for b in (None, 700 * 2**20, 3 * 2**29)] == ["-", "700 MiB", "1.5 GiB"]
    assert [format_flops(f) for f in (None, 0, 5e6, 1.5e15)] == ["-", "-", "5.0 MFLOP", "1.5 PFLOP"]
