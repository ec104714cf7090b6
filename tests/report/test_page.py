"""The report is one well-formed, self-contained page of any run folder, whatever text is in it."""

import json

import pytest

from megatron_bliss.report.page import build_report, write_report
from megatron_bliss.report.summary import build_summary
from tests.report.run_folders import check_page, write_config, write_metrics, write_stage


def test_page_of_a_whole_run_is_well_formed_and_loads_nothing(whole_run):
    path = write_report(whole_run)
    assert path == whole_run / "report.html"
    page = check_page(path.read_text(encoding="utf-8"))
    assert any(name == "content" and value.startswith("default-src 'none'") for name, value in page.attributes)
    for title in ("What selection was worth", "Pre-training", "Bilevel optimisation", "Scores", "What was selected",
                  "Sample documents", "Time, memory and work", "Configuration"):  # fmt: skip
        assert title in page.text
    assert "1.60×" in page.text and "at step 125 of 200: 1.60x fewer steps" in page.text
    assert "finished" in page.text and "Not on this page" not in page.text
    assert "1.80×" in page.text and "0.20×" in page.text  # shares of the selection over those of the pool


def test_hostile_text_is_shown_as_text(whole_run):
    source = build_report(whole_run)
    assert "<script" not in source and "<img" not in source
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in source
    assert not any(character in source for character in "\x07\x1b\u202e")
    page = check_page(source)
    assert "onerror=alert(1)" in page.text  # as text of the page, no attribute
    assert "whole & <b>hostile</b>" in page.text
    assert "more characters)" in page.text and "(text not at hand)" in page.text


def test_report_of_a_half_finished_run_says_what_is_missing(tmp_path):
    folder = tmp_path / "half"
    write_config(folder)
    write_metrics(folder, rounds=1)
    write_stage(folder, "warmup/target")
    write_stage(folder, "bliss/round_01/bilevel")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"time": 3')
    page = check_page(build_report(folder))
    assert "in progress" in page.text and "Not on this page" in page.text
    assert "summary.json is not there yet" in page.text
    assert "arm random: 0 of 2 rounds are evaluated" in page.text
    assert "Validation loss of the proxy" in page.text and "1.0 GiB" in page.text
    assert "What selection was worth" not in page.text and "Sample documents" not in page.text


def test_a_run_with_one_arm_and_one_evaluation_has_no_speed_up(tmp_path):
    text = write_config(tmp_path, arms="bliss", rounds=1)
    measured = {"bliss": [{"iteration": 50, "tokens": 100, "losses": {"lambada": 5.0}}]}
    summary = build_summary(measured, stages=[], domains_by_field={}, seed=7, config_text=text)
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = check_page(build_report(tmp_path))
    assert "No speed-up" in page.text and "5.0000" in page.text


def test_an_empty_folder_has_a_page_and_a_missing_one_an_error(tmp_path):
    page = check_page(build_report(tmp_path))
    assert "config.yaml is not there yet" in page.text and "metrics.jsonl is not there yet" in page.text
    with pytest.raises(ValueError, match="found no folder .*nowhere, expected a run folder"):
        build_report(tmp_path / "nowhere")


def test_damaged_pieces_are_named_and_the_rest_is_shown(tmp_path):
    write_config(tmp_path)
    write_stage(tmp_path, "bliss/round_01/bilevel")
    (tmp_path / "summary.json").write_text('{"arms": ')
    (tmp_path / "metrics.jsonl").write_text("oops\n{}\n")
    damaged = {"score/scores.npy": b"junk", "score/scores.json": b"[1]", "select/samples.json": b"[1]"}
    for name, content in damaged.items():
        path = tmp_path / "bliss/round_01" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    page = check_page(build_report(tmp_path))
    for name in (
        "summary.json",
        "metrics.jsonl",
        *(f"bliss/round_01/{name}" for name in damaged),
    ):
        assert f"{name}: could not be read" in page.text
    assert "1:02" in page.text  # the finished stage


def test_the_page_says_how_was_selected_and_why(whole_run):
    write_config(whole_run, selection={"policy": "soft", "fraction": 0.2, "softness": 2.0})
    text = check_page(build_report(whole_run)).text
    assert "Selected by soft (fraction 0.2, softness 2): a random draw by rank" in text
    assert "loses less on other text" in text
    for other in ({"policy": "soft", "softness": "<b>none</b>"}, {"policy": "of another version"}, "soft", None):
        write_config(whole_run, selection=other)
        text = check_page(build_report(whole_run)).text
        assert "Selected by" not in text and "Share of units in the pool" in text
