"""The report is one well-formed, self-contained page of any run folder, whatever text is in it."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_bliss.base.metrics import MetricsLogger
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.subset import write_subset
from megatron_bliss.report.page import build_report, escape, write_report
from megatron_bliss.report.plots import Line, histogram_chart, line_chart, running_mean, short_number, strip_chart
from megatron_bliss.report.run_data import joined, read_run
from megatron_bliss.report.summary import build_summary, read_stages

HOSTILE = (
    "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)> \"' & \x07\x1b\u202e </pre></details>"
)
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that every tag is closed in order, and keeps tags, attributes and text for the tests."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open_tags, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open_tags, f"never closed: {self.open_tags}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open_tags and self.open_tags[-1] == tag, f"</{tag}> closes {self.open_tags[-3:]}"
        self.open_tags.pop()

    def handle_data(self, data):
        self.text += data


def check_page(text: str) -> Page:
    """Well-formed, without scripts, and nothing in it makes a browser fetch anything."""
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>") and text.count("</html>") == 1
    assert not {"script", "img", "link", "iframe", "object", "embed", "a", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on"), f"an event handler: {name}"
        if name in ("href", "src", "xlink:href", "data", "action", "srcset", "poster"):
            assert value.startswith("#"), f"{name} points outside the page: {value}"
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert "@import" not in style and not re.search(r"url\((?!#)", text)
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    targets = {value[1:] for name, value in page.attributes if name == "xlink:href"}
    assert targets <= set(identifiers)
    return page


def write_config(folder: Path, **changes) -> str:
    config = {
        "arms": ["bliss", "random"], "rounds": 2, "seed": 7,
        "data": {"train_prefix": str(folder / "pool"), "seq_length": 64},
        "pretraining": {"warmup_iters": 50, "train_iters": 100, "global_batch_size": 4},
        "bilevel": {"global_batch_size": 8},
    }  # fmt: skip
    text = yaml.safe_dump(config | changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text)
    return text


def write_metrics(folder: Path, rounds: int) -> None:
    logger = MetricsLogger(folder, is_writer=True, tensorboard=False)
    for step in range(1, 6):
        logger.log(step, {"loss": 9.0 / step, "lr": 1e-3}, arm="shared", round=0, stage="target")
    for number in range(1, rounds + 1):
        for step in range(1, 41):
            values = {"validation_loss": 5.0 + 1 / step, "kl": math.nan if step == 7 else 0.1, "residual": 10.0**-step}
            values |= {"entropy": 2.0, "effective_samples": math.exp(2.0), "score_mean": 0.5, "score_std": 0.1}
            logger.log(step, values, arm="bliss", round=number, stage="bilevel")
        for arm in ("bliss", "random"):
            logger.log(number * 10, {"loss": 5.0, "grad_norm": 1.0}, arm=arm, round=number, stage="pretrain")
    logger.close()


def write_stage(folder: Path, place: str) -> Path:
    (folder / place).mkdir(parents=True)
    (folder / place / "done.json").write_text(json.dumps({"seconds": 61.5, "peak_bytes": 2**30, "flops": 3e12}))
    return folder / place


def write_shards(folder: Path, units: int) -> None:
    lines = [json.dumps({"text": f"unit {i}", "domain": ("prose", HOSTILE)[i % 2]}) for i in range(3 * units)]
    (folder / "pool.jsonl").write_text("\n".join(lines) + "\n")
    preprocess(PreprocessSettings([str(folder / "pool.jsonl")], str(folder / "pool"), tokenizer_type="bytes"))
    prefixes = [
        write_subset(folder / "pool", np.arange(k * units, (k + 1) * units), folder / "shards", label=f"shard{k}")
        for k in range(3)
    ]
    (folder / "shards/done.json").write_text(json.dumps({"prefixes": [Path(prefix).name for prefix in prefixes]}))


def write_summary(folder: Path, config_text: str) -> None:
    def measured(losses):
        return [
            {"iteration": 50 * i, "tokens": 12800 * i, "losses": {"lambada": loss, HOSTILE: loss + 1}}
            for i, loss in enumerate(losses, start=1)
        ]

    shares = {"pool": {"prose": 0.5, HOSTILE: 0.5}, "selected": {"bliss": {"prose": 0.9, HOSTILE: 0.1}}}
    summary = build_summary(
        {"bliss": measured([8, 6, 4, 3]), "random": measured([8, 7, 6, 5])},
        stages=read_stages(folder), domains_by_field={"domain": shares}, seed=7, config_text=config_text,
    )  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole & <b>hostile</b>"
    text = write_config(folder, note=HOSTILE)
    write_metrics(folder, rounds=2)
    write_shards(folder, units=100)
    write_stage(folder, "warmup/target")
    for number in (1, 2):
        for arm in ("bliss", "random"):
            scores = write_stage(folder, f"{arm}/round_{number:02d}/score")
            np.save(scores / "scores.npy", np.linspace(0, 1, 100, dtype=np.float32))
            select = write_stage(folder, f"{arm}/round_{number:02d}/select")
            sample = {"text": HOSTILE + "long " * 1000, "score": 0.75, "domain": HOSTILE, "url": f"http://e/{HOSTILE}"}
            samples = {"best": [sample], "worst": [{"text": None, "score": 0.25}]}
            (select / "samples.json").write_text(json.dumps(samples))
            write_stage(folder, f"{arm}/round_{number:02d}/evaluate")
    write_summary(folder, text)
    return folder


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


def test_report_shows_scores_of_the_arms_that_choose(whole_run):
    run = read_run(whole_run)
    assert run.missing == []
    assert list(run.scores) == ["bliss"] and list(run.scores["bliss"]) == [1, 2]
    groups = run.scores_by_field["bliss", "domain"]
    assert {label: len(values) for label, values in groups.items()} == {"prose": 50, HOSTILE: 50}
    assert np.median(groups["prose"]) == pytest.approx(49 / 99)  # every second of 0, 1/99, ... 1
    assert run.round_tokens == {"round 1": 50 * 4 * 64, "round 2": 150 * 4 * 64}


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


def test_report_of_a_run_with_one_arm_and_one_evaluation(tmp_path):
    text = write_config(tmp_path, arms="bliss", rounds=1)
    measured = {"bliss": [{"iteration": 50, "tokens": 100, "losses": {"lambada": 5.0}}]}
    summary = build_summary(measured, stages=[], domains_by_field={}, seed=7, config_text=text)
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = check_page(build_report(tmp_path))
    assert "No speed-up" in page.text and "5.0000" in page.text


def test_report_of_an_empty_folder_and_of_none(tmp_path):
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


def test_command_writes_the_page_and_refuses_a_wrong_folder(tmp_path):
    write_config(tmp_path)
    root = Path(__file__).parents[2]
    command, environment = [sys.executable, str(root / "tools/report.py")], os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str(tmp_path / "report.html")
    check_page((tmp_path / "report.html").read_text())
    command += [str(tmp_path / "nowhere")]
    wrong = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: found no folder")


@pytest.mark.parametrize("second", [[1, 2], [3, 4]])
def test_rounds_follow_one_another_whether_or_not_steps_restart(second):
    entries = [{"round": 1, "step": s, "loss": 1.0} for s in (1, 2)]
    entries += [{"round": 2, "step": s, "loss": 2.0} for s in second] + [{"round": 2, "step": 9}]
    assert joined(entries, "loss") == {1: ([1, 2], [1.0, 1.0]), 2: ([3, 4], [2.0, 2.0])}


def test_running_mean_leaves_gaps_out():
    assert running_mean([1, 1, 1, 1], 3).tolist() == [1, 1, 1, 1]
    assert running_mean([0, 3, math.nan, 3, 6], 3).tolist() == [1.5, 1.5, 3, 4.5, 4.5]
    assert np.isnan(running_mean([math.nan] * 3, 3)).all()


def test_plots_take_their_colours_from_the_page():
    svg = line_chart([Line("a", [1, 2], [3.0, 4.0], color=1)], title="t", x_label="step", level=3.5, point=(1.5, 3.5))
    assert "var(--series-2)" in svg and "var(--ink-soft)" in svg and not re.search(r"#0[123]0", svg)
    assert "<style" not in svg and "font-family" not in svg and "<metadata" not in svg


@pytest.mark.parametrize("values", [np.zeros(5), np.array([1.0]), np.linspace(-3, 3, 999)])
def test_plots_of_degenerate_scores(values):
    histogram = histogram_chart({"round 1": values}, title="h", x_label="score")
    strip = strip_chart({"$a_b$ \\ \ud800 <i>": values, "b": values}, title="s", x_label="score")
    for svg in (histogram, strip):
        Page(svg)
        assert svg.count("<svg") == svg.count("</svg>") == 1 and "<i>" not in svg


def test_short_numbers():
    assert [short_number(x) for x in (0, 999, 1500, 2.5e6, 3e9, 0.25)] == ["0", "999", "1.5k", "2.5M", "3B", "0.25"]


def test_escape_makes_attributes_safe():
    assert escape("\"'<>&\x00\n") == "&quot;&#x27;&lt;&gt;&amp; \n"
