"""The weights of domains over the upper steps: drawn where a stage logged them, told apart by where they end."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_bliss.base.metrics import DOMAIN_WEIGHT, MetricsLogger
from megatron_bliss.report.domain_weights import domain_weight_figures
from megatron_bliss.report.page import build_report
from megatron_bliss.report.run_data import read_run
from megatron_bliss.report.summary import build_summary
from tests.report.run_folders import HOSTILE, Page, check_page, write_config, write_metrics


def write(folder: Path, ends: dict[str, float], arms: tuple[str, ...] = ("bliss",), rounds: int = 2) -> None:
    """A run whose domains' weights move from 1 to ``ends`` in each round."""
    write_config(folder, arms=[*arms, "random"])
    logger = MetricsLogger(folder, is_writer=True, tensorboard=False)
    for arm in arms:
        for number in range(1, rounds + 1):
            for step in range(10, 50, 10):
                values = {f"{DOMAIN_WEIGHT}{name}": 1 + (end - 1) * step / 40 for name, end in ends.items()}
                logger.log(step, {"validation_loss": 5.0, **values}, arm=arm, round=number, stage="bilevel")
    logger.close()


def test_each_bilevel_arm_has_a_plot_with_rounds_one_after_the_other(tmp_path: Path) -> None:
    write(tmp_path, {"prose": 1.5, HOSTILE: 0.25}, arms=("bliss", "identity"))
    source = build_report(tmp_path)
    page = check_page(source)  # no tag of a domain's name is one of the page
    assert "Weights of domains, bliss" in page.text and "Weights of domains, identity" in page.text
    assert "prose (1.50)" in page.text and "(0.25)" in page.text and "onerror=alert(1)" in page.text
    assert "Grey" not in page.text and "upper step" in page.text
    drawing = domain_weight_figures(read_run(tmp_path))[0]
    assert "round 1" in drawing and "round 2" in drawing and ">80<" in drawing.replace("\n", "")


def test_of_many_domains_those_that_end_far_from_1_are_told_apart(tmp_path: Path) -> None:
    near = {f"near {number}": 1 + number / 1000 for number in range(19)}
    far = {"f": 0.1, "e": 0.2, "d": 0.4, "c": 1.7, "b": 1.8, "a": 1.9}
    write(tmp_path, {**near, **far}, rounds=1)
    (drawing,) = domain_weight_figures(read_run(tmp_path))
    page = Page(drawing)
    for name, color in zip("abcdef", range(1, 7), strict=True):
        assert f'background:var(--series-{color})"></i>{name} (' in drawing
    assert "Grey, as they end closer to 1: near 18 (1.02), near 17 (1.02)" in page.text and "round 1" not in page.text
    assert drawing.count("</i>") == 6 and "near 0 (1.00)." in page.text


def test_a_domain_that_is_in_some_lines_alone_is_drawn_where_it_is(tmp_path: Path) -> None:
    write(tmp_path, {"prose": 1.5, "rare": 0.5}, rounds=1)
    path = tmp_path / "metrics.jsonl"
    first, *rest = path.read_text().splitlines()
    entry = json.loads(first)
    del entry[f"{DOMAIN_WEIGHT}rare"]
    path.write_text("\n".join([json.dumps(entry), *rest]) + "\n")
    (drawing,) = domain_weight_figures(read_run(tmp_path))
    assert "rare (0.50)" in Page(drawing).text and "nan" not in drawing.lower()


def test_nothing_is_drawn_of_a_corpus_without_domains(tmp_path: Path) -> None:
    write_config(tmp_path)
    write_metrics(tmp_path, rounds=1)
    assert domain_weight_figures(read_run(tmp_path)) == []
    assert "Weights of domains" not in build_report(tmp_path)


def test_the_summary_has_the_last_weights_of_each_arm_and_round() -> None:
    stages = [
        {"arm": "bliss", "round": 1, "stage": "bilevel", "seconds": 2, "domain_weights": {"prose": 1.5, HOSTILE: 0.25}},
        {"arm": "bliss", "round": 2, "stage": "bilevel", "seconds": 2, "domain_weights": {"prose": 1.25}},
        {"arm": "bliss", "round": 2, "stage": "score", "seconds": 2, "domain_weights": None},
        {"arm": "random", "round": 1, "stage": "score", "seconds": 1, "domain_weights": None},
        {"arm": "identity", "round": 1, "stage": "bilevel", "seconds": 2, "domain_weights": {"prose": 2.0}},  # left out
    ]
    measured = [{"iteration": 1, "tokens": 5, "losses": {"held": 3.0}}]
    evaluations = {"bliss": measured, "random": measured}
    summary = build_summary(evaluations, stages=stages, domains_by_field={}, seed=7, config_text="")
    expected = {"1": {"prose": 1.5, HOSTILE: 0.25}, "2": {"prose": 1.25}}
    assert summary["arms"]["bliss"]["domain_weights"] == expected
    assert "domain_weights" not in summary["arms"]["random"] and "identity" not in summary["arms"]
    assert "domain_weights" not in summary["stages"][0]
