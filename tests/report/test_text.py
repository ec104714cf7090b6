"""The table at the end of a run says all that the summary holds, and nothing that moves a cursor."""

from megatron_bliss.report.summary import build_summary
from megatron_bliss.report.text import format_table
from tests.report.summaries import evaluations, example


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


def test_an_empty_run_has_a_table_and_hostile_labels_stay_harmless():
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
