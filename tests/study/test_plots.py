"""Curves over FLOPs and losses over an option by hand; a real sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron_bliss.study.curves_plot import mean_curve
from megatron_bliss.study.description import read_study
from megatron_bliss.study.plots import write_plots
from megatron_bliss.study.runs import study_runs
from megatron_bliss.study.sweep import read_sweep
from megatron_bliss.study.sweep_plot import is_logarithmic, sweep_lines
from tests.study.studies import run_tool, write_study


def point(seed: int, variant: str, arm: str, loss: float, selection: float = 0.0) -> dict:
    """10 steps of warm-up, 30 on the selection, 1 FLOP a step."""
    curves = {"near": [[10, 6.0], [40, loss]], "far": [[10, 8.0], [40, loss + 2]]}
    cost = {"flops": [[10, 10.0], [40, 40.0 + selection]], "selection_flops": [[10, 0.0], [40, selection]]}
    return {"seed": seed, "variant": variant, "arm": arm, "losses": curves, "cost": cost}


def study(points: list[dict], **keys: object) -> dict:
    sides = {"guided": ["near"], "other": ["far"]}
    return {"control": "v1/random", "longer": {}, "seeds": [1, 2], **sides, "points": points, **keys}


def test_a_curve_is_the_mean_over_seeds_and_level_while_the_arm_selects() -> None:
    found = mean_curve([point(1, "a", "bliss", 4.0, 15.0), point(2, "a", "bliss", 5.0, 15.0)], ["near", "far"])
    assert [flops for flops, _ in found] == [10.0, 25.0, 55.0]
    assert [loss.mean for _, loss in found] == [7.0, 7.0, 5.5]
    assert [loss.error for _, loss in found] == [0.0, 0.0, pytest.approx(0.5)]
    dense = point(2, "a", "bliss", 5.0)  # evaluated once more than the first seed
    for key in ("near", "far"):
        dense["losses"][key].insert(1, [25, 5.9])
    for key, value in (("flops", 25.0), ("selection_flops", 0.0)):
        dense["cost"][key].insert(1, [25, value])
    found = mean_curve([point(1, "a", "bliss", 4.0), dense], ["near"])
    assert [(flops, loss.mean) for flops, loss in found] == [(10.0, 6.0), (40.0, 4.5)]
    unknown = point(1, "a", "bliss", 4.0)
    unknown["losses"]["near"][1][1] = None
    assert [flops for flops, _ in mean_curve([unknown], ["near"])] == [10.0]


def test_a_sweep_has_a_line_per_arm_and_series(tmp_path: Path) -> None:
    places = [
        ("v1", "random", 5.0),
        ("v3", "bliss", 4.4),
        ("v1", "bliss", 4.6),
        ("v2", "bliss", 4.5),
        ("x", "bliss", 1.0),
    ]
    points = [point(seed, variant, arm, loss + seed / 10) for variant, arm, loss in places for seed in (1, 2)]
    values = {"v1": ["", 1], "v2": ["", 5], "v3": ["", 10]}
    made = study(points, sweep={"option": "bilevel.upper_iters", "points": values})
    lines = sweep_lines(made, "guided")
    assert [value for value, _ in lines["bliss"]] == [1, 5, 10] and list(lines) == ["random", "bliss"]
    assert lines["bliss"][2][1] == (pytest.approx(4.55), pytest.approx(0.05))
    assert is_logarithmic([1, 5, 10]) and not is_logarithmic([2, 19]) and not is_logarithmic([0, 10])
    made["sweep"]["points"] |= {"v2": ["soft", 5]}
    assert list(sweep_lines(made, "other")) == ["random", "bliss", "soft/bliss"]
    plots = write_plots(made, tmp_path)
    assert list(plots) == ["pareto.png", "curves.png", "sweep.png"]
    assert all(imread(tmp_path / name).std() > 0.02 for name in plots)
    assert list(write_plots({**made, "sweep": None, "other": []}, tmp_path / ".")) == ["curves.png"]


@pytest.mark.parametrize(
    "variants, expected",
    [
        (
            {"a": {}, "b": {"selection.fraction": 0.4}, "c": {"selection": {"fraction": 0.6}, "arms": ["dsir"]}},
            {"a": ["", 0.2], "b": ["", 0.4], "c": ["", 0.6]},
        ),
        (
            {  # others are left out
                "a": {},
                "b": {"selection.fraction": 0.4},
                "c": {"selection.fraction": 0.6},
                "d": {"selection.policy": "gumbel"},
                "e": {"selection.policy": "gumbel", "selection.fraction": 0.8},
            },
            {"a": ["", 0.2], "b": ["", 0.4], "c": ["", 0.6]},
        ),
        ({"a": {}, "b": {"selection.fraction": 0.4}}, None),
        ({"a": {"selection.fraction": 0.2}, "b": {"selection.fraction": 0.4}, "c": {}}, None),  # two values
        ({"a": {}, "b": {"selection.policy": "gumbel"}, "c": {"selection.policy": "top_fraction"}}, None),
    ],
)
def test_an_option_that_variants_change_alone_is_found(
    corpus: Path, tmp_path: Path, variants: dict, expected: dict | None
) -> None:
    given = read_study(write_study(tmp_path, corpus, variants=variants))
    found = read_sweep(given.variants, study_runs(given, tmp_path / "out"), given.sweep)
    assert found == (None if expected is None else {"option": "selection.fraction", "points": expected})


def test_a_study_sweeps_an_option(corpus: Path, tmp_path: Path) -> None:
    keys = {"variants": None, "seeds": [1], "agreement": True, "arms": ["random", "bliss"]}
    given = write_study(tmp_path, corpus, sweep={"bilevel.upper_iters": [1, 2, 20]}, **keys)
    output = tmp_path / "out"
    result = run_tool(given, output)
    assert result.returncode == 0, result.stderr
    assert "[3/3] seed 1, upper_iters_20: arms bliss, warm-up of upper_iters_1; log" in result.stdout
    found = json.loads((output / "study.json").read_text())
    points = {f"upper_iters_{value}": ["", value] for value in (1, 2, 20)}
    assert found["sweep"] == {"option": "bilevel.upper_iters", "points": points}
    assert list(sweep_lines(found, "guided")) == ["random", "bliss"]
    assert len(sweep_lines(found, "guided")["bliss"]) == 3 and len(found["agreement"]) == 3
    assert (output / "sweep.png").stat().st_size > 10_000
    assert "![Loss at equal tokens against bilevel.upper_iters; bars: standard errors](sweep.png)" in result.stdout
    assert (output / "study.html").read_text().count("data:image/png;base64,") == 3
