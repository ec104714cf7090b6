"""The page and the table show every arm on every set, and a loss in plain sight."""

import json

import pytest

from megatron_bliss.report.gain_table import gain_cells, gain_rows
from megatron_bliss.report.gains import HeldOut
from megatron_bliss.report.page import build_report
from megatron_bliss.report.summary import build_summary
from megatron_bliss.report.text import format_table
from tests.report.costs import STAGES, evaluations
from tests.report.run_folders import HOSTILE, check_page, write_config


def summary(other="c4", arms=("bliss", "random"), config_text=""):
    names, losses = ("lambada", other), {"bliss": ([8, 6, 5, 4, 3], 4.0), "random": ([8, 7, 6.5, 6, 5.5], 1.0)}
    measured = {arm: evaluations(losses[arm][0], names, (0.0, losses[arm][1])) for arm in arms}
    held_out = HeldOut(["lambada"], [other])
    return build_summary(
        measured, stages=STAGES, domains_by_field={}, held_out=held_out, seed=7, config_text=config_text, versions={}
    )


@pytest.fixture
def page(tmp_path):
    text = write_config(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(summary(HOSTILE, config_text=text)))
    return check_page(build_report(tmp_path))


def test_cells_hold_losses_and_gains_at_equal_tokens_and_at_equal_cost():
    cells = gain_cells(summary(), "tokens")
    assert list(cells) == ["lambada", "c4"] and list(cells["c4"]) == ["random", "bliss"]
    assert cells["c4"]["random"] == (6.5, None, False) and cells["c4"]["bliss"] == (7, -0.5, True)
    at_equal_flops = gain_cells(summary(), "flops")
    assert at_equal_flops["lambada"]["bliss"].loss == pytest.approx(4.07)
    assert at_equal_flops["lambada"]["bliss"].gain == pytest.approx(5.5 - 4.07)
    assert at_equal_flops["c4"]["bliss"].is_worse
    (guide, other) = gain_rows(summary())
    assert guide[:3] == ("lambada", "guide", "bliss") and other[:3] == ("c4", "other", "bliss")
    assert [cell.text for cell in other[3]] == ["7.000 -0.500 worse", "8.070 -1.570 worse", "9.700 -3.200 worse"]


def test_the_page_says_worse_in_words_and_in_a_box_at_its_top(page):
    assert "Gain and loss, and what they cost" in page.text
    for title in ("At equal target tokens", "At equal total FLOPs", "At equal total seconds: 0:52"):
        assert title in page.text
    assert "-0.500 worse" in page.text and "+2.500" in page.text
    assert ("class", "number worse") in page.attributes and ("class", "number up") in page.attributes
    assert ("class", "alarm") in page.attributes
    assert page.text.index("Worse than random") < page.text.index("What selection was worth")
    assert "bliss: selection cost" in page.text
    assert "lambada, by total FLOPs" in page.text and "lambada, by total seconds" in page.text


def test_a_hostile_name_of_a_set_stays_text(page):
    assert "<script>alert('x')</script>" in page.text and "by 0.500" in page.text


def test_the_terminal_shows_gains_costs_and_warnings_in_a_hundred_columns():
    table = format_table(summary())
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert "set kind arm at equal tokens at equal FLOPs at equal seconds" in lines
    assert "c4 other bliss 7.000 -0.500 worse 8.070 -1.570 worse 9.700 -3.200 worse" in lines
    assert lines[-1] == "warning: bliss is worse than random on c4 by 0.500"
    block = next(block for block in table.split("\n\n") if block.startswith("Loss, and gain"))
    assert max(map(len, block.splitlines())) <= 100
    assert any(line.startswith("bliss: selection cost") for line in lines)


def test_a_run_of_one_arm_has_costs_and_no_gains(tmp_path):
    alone = summary(arms=("bliss",))
    assert "Loss, and gain" not in format_table(alone) and "Cost of selection" in format_table(alone)
    (tmp_path / "summary.json").write_text(json.dumps(alone))
    page = check_page(build_report(tmp_path))
    assert "lambada, by total FLOPs" in page.text and "At equal" not in page.text


def test_a_summary_of_an_older_run_has_a_page(tmp_path):
    found = summary()
    for name in ("sets", "gains", "equal_compute", "warnings", "loss_margin"):
        del found[name]
    for arm in found["arms"].values():
        del arm["cost"]
    (tmp_path / "summary.json").write_text(json.dumps(found))
    page = check_page(build_report(tmp_path))
    assert "What selection was worth" in page.text and "Gain and loss" not in page.text
