"""Statistics of a study against numbers made by hand, and the page that is made from them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron_bliss.study.headline import headline
from megatron_bliss.study.paired import Spread, compare, results, spread
from megatron_bliss.study.peaks import peaks
from megatron_bliss.study.plot import pareto_front
from megatron_bliss.study.table import PEAKS, SELECTION, format_study
from megatron_bliss.study.whole import write_page


def point(seed: int, arm: str, losses: tuple, selection: float) -> dict:
    """An arm of one round: 10 steps of warm-up, 30 on the selection, 1 FLOP a step; a curve falls by equal steps."""
    guided, other = losses
    curves = {"near": [[10, 6.0], [40, guided]], "far": [[10, 6.0], [40, other]]}
    cost = {"flops": [[10, 10.0], [40, 40.0 + selection]], "selection_flops": [[10, 0.0], [40, selection]]}
    cost |= {"seconds": [[10, 1.0], [40, 4.0]], "selection_seconds": [[10, 0.0], [40, 2 * selection]]}
    return {"seed": seed, "variant": "hard", "arm": arm, "losses": curves, "cost": cost}


@pytest.fixture
def study() -> dict:
    """Two seeds; the arm chosen pays 15 of 40 FLOPs for a gain of 0.6 and 1.2, and 0.2 and -0.1 elsewhere."""
    points = [
        point(1, "random", (5.4, 5.0), 0.0),
        point(1, "chosen", (4.8, 5.2), 15.0),
        point(2, "random", (5.7, 5.1), 0.0),
        point(2, "chosen", (4.5, 5.0), 15.0),
    ]
    return {
        "control": "hard/random",
        "seeds": [1, 2],
        "guided": ["near"],
        "other": ["far"],
        "longer": {},
        "points": points,
    }


def test_standard_error_is_that_of_the_mean() -> None:
    assert spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7 / 3)))
    assert spread([2.0]) == (2.0, None)
    assert spread([]) == spread([1.0, None]) == Spread(None, None)


def test_differences_are_paired_by_seed() -> None:
    """The spread over seeds is large, that of the differences small: this is what pairing is for."""
    found = compare({1: 1.0, 2: 5.0, 3: 9.0}, {3: 9.5, 1: 1.4, 2: 5.6})
    assert found.value == (5.0, pytest.approx(4 / math.sqrt(3)))
    assert found.difference == (pytest.approx(-0.5), pytest.approx(0.1 / math.sqrt(3)))
    assert (found.wins, found.pairs) == (3, 3)
    found = compare({1: 1.0, 2: None, 3: 3.0}, {1: 1.0, 2: 2.0, 3: 4.0})
    assert found.value == found.difference == Spread(None, None) and (found.wins, found.pairs) == (1, 2)


def test_results_by_hand(study: dict) -> None:
    found = results(study)
    chosen = found["equal tokens"]["hard/chosen"]
    assert chosen["guided"].value == (pytest.approx(4.65), pytest.approx(0.15))
    assert chosen["guided"].difference == (pytest.approx(-0.9), pytest.approx(0.3)) and chosen["guided"].wins == 2
    assert chosen["other"].difference == (pytest.approx(0.05), pytest.approx(0.15)) and chosen["other"].wins == 1
    assert chosen["sets"] == {"near": chosen["guided"], "far": chosen["other"]}
    # With 40 FLOPs in all, 15 for the selection, it has made 15 of its 30 steps: half of the way from 6.0.
    chosen = found["equal total compute"]["hard/chosen"]
    assert chosen["guided"].value.mean == pytest.approx((5.4 + 5.25) / 2)
    assert chosen["guided"].difference.mean == pytest.approx((0.0 - 0.45) / 2)
    assert chosen["other"].value.mean == pytest.approx((5.6 + 5.5) / 2)
    random = [found[reading]["hard/random"] for reading in found]
    assert random[0] == random[1] and random[0]["guided"].difference.mean == 0.0


def test_the_mean_of_several_sets_is_theirs_in_each_seed(study: dict) -> None:
    found = results({**study, "guided": ["near", "far"], "other": []})["equal tokens"]["hard/chosen"]
    assert found["guided"].value == (pytest.approx((5.0 + 4.75) / 2), pytest.approx(0.125))
    assert found["other"].value == Spread(None, None)


def test_a_loss_that_is_not_finite_gives_no_mean(study: dict) -> None:
    study["points"][1]["losses"]["near"][1][1] = None
    chosen = results(study)["equal tokens"]["hard/chosen"]
    assert chosen["guided"].value == Spread(None, None) and chosen["guided"].pairs == 1
    assert chosen["other"].value.mean == pytest.approx(5.1)


def test_arms_are_read_where_the_shortest_ends(study: dict) -> None:
    """An arm that trains on is read at the tokens, and at the FLOPs, of the others."""
    for one in study["points"]:
        if one["arm"] == "chosen":
            one["cost"]["flops"].append([100, 115.0])
            one["cost"]["selection_flops"].append([100, 15.0])
            for curve in one["losses"].values():
                curve.append([100, 1.0])
    before = results(study)
    assert before["equal tokens"]["hard/chosen"]["guided"].value.mean == pytest.approx(4.65)
    assert before["equal total compute"]["hard/chosen"]["guided"].value.mean == pytest.approx((5.4 + 5.25) / 2)


def test_arms_are_held_against_cheap_ones_that_train_on_for_the_same_flops(study: dict) -> None:
    """From 6.0, a longer run falls by 0.03 a step on the near set, by 0.02 on the far one: 45 steps at 55 FLOPs."""
    for seed in (1, 2):
        for arm, selection in (("random", 0.0), ("dsir", 5.0)):
            one = point(seed, arm, (6.0 - 0.9, 6.0 - 0.6), selection) | {"variant": f"longer-{arm}"}
            one["losses"]["near"].append([70, 6.0 - 1.8])
            one["losses"]["far"].append([70, 6.0 - 1.2])
            one["cost"]["flops"].append([70, 70.0 + selection])
            one["cost"]["selection_flops"].append([70, selection])
            study["points"].append(one)
    study["longer"] = {"dsir": "longer-dsir/dsir", "random": "longer-random/random"}
    found = results(study)
    assert list(found["equal tokens"]) == list(found["equal total compute"]) == ["hard/random", "hard/chosen"]
    assert found["equal tokens"]["hard/chosen"]["guided"].difference.mean == pytest.approx(-0.9)
    chosen = found["equal total compute"]["hard/chosen"]
    assert chosen["guided"].value.mean == pytest.approx(4.65)  # at its end, where it has spent 55
    assert chosen["guided"].difference == (pytest.approx(4.65 - 4.65), pytest.approx(0.15))
    assert chosen["other"].difference.mean == pytest.approx(5.1 - 5.1)
    assert list(chosen["rivals"]) == ["dsir"]
    assert chosen["rivals"]["dsir"].difference.mean == pytest.approx(4.65 - (6.0 - 40 * 0.03))
    rows = [line for line in format_study(study).splitlines() if line.startswith("| hard/chosen")]
    assert rows[1].endswith("| -0.150 ± 0.150; 1/2 |")
    study["points"][1]["cost"]["flops"][-1][1] = 80.0  # beyond the longer runs of its seed
    assert results(study)["equal total compute"]["hard/chosen"]["guided"].pairs == 1


def test_the_front_holds_what_nothing_beats() -> None:
    places = [(0.0, 0.0), (0.3, 0.1), (0.2, 0.1), (0.3, 0.2), (0.5, 0.4), (-0.1, -0.1), (0.3, 0.1)]
    assert sorted(set(pareto_front(places))) == [(-0.1, -0.1), (0.0, 0.0), (0.3, 0.1), (0.5, 0.4)]


def test_the_page_follows_from_the_json_alone(study: dict, tmp_path: Path) -> None:
    study["points"][1]["peak_bytes"] = {"selection": 2**31, "all": 2**31}
    study["points"][3]["peak_bytes"] = {"selection": None, "all": 3 * 2**30}
    (tmp_path / "study.json").write_text(json.dumps(study))
    page = write_page(tmp_path)
    plots = {"pareto.png": "Gain on the guide against loss elsewhere", "curves.png": page.split("![")[2].split("]")[0]}
    assert page == format_study(study, plots) == (tmp_path / "study.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert rows[0] == ["arm", *SELECTION, *PEAKS, "guided", "far"] and len(rows) == 8
    assert rows[2] == ["hard/random", "0:00", "-", "-", "-", "5.550 ± 0.150", "5.050 ± 0.050"]
    losses = ["4.650 ± 0.150 (-0.900 ± 0.300; 2/2)", "5.100 ± 0.100 (**+0.050 ± 0.150**; 1/2)"]
    assert rows[3] == ["hard/chosen", "0:30", "0.0 MFLOP", "2.0 GiB", "3.0 GiB", *losses]
    assert "![Gain on the guide against loss elsewhere](pareto.png)" in page
    assert imread(tmp_path / "pareto.png").shape[1] > 1000
    (tmp_path / "study.json").write_text(json.dumps({**study, "other": []}))
    (tmp_path / "pareto.png").unlink()
    assert "pareto.png" not in write_page(tmp_path) and not (tmp_path / "pareto.png").exists()


def test_the_headline_is_every_seeds_own_numbers(study: dict, tmp_path: Path) -> None:
    again = [{**one, "variant": "soft"} for one in study["points"] if one["arm"] == "chosen"]
    longer = [{**one, "variant": "longer random"} for one in study["points"] if one["arm"] == "random"]
    study = study | {"points": [*study["points"], *again, *longer], "longer": {"random": "longer random/random"}}
    found = headline(study)
    assert found["seeds"] == [1, 2] and list(found["arms"]) == ["random", "chosen", "soft/chosen"]
    assert found["arms"]["random"] == {
        "guided_mean": [5.4, 5.7],
        "other_mean": [5.0, 5.1],
        "total_flops": [40.0, 40.0],
        "seconds": [4.0, 4.0],
    }
    assert found["arms"]["soft/chosen"]["total_flops"] == [55.0, 55.0]
    (tmp_path / "study.json").write_text(json.dumps(study))
    write_page(tmp_path)
    assert json.loads((tmp_path / "headline.json").read_text()) == found


def test_peak_memory_is_that_of_the_largest_stage() -> None:
    def stage(arm: str, name: str, peak: int | None, *needs: str) -> dict:
        return {"arm": arm, "stage": name, "peak_bytes": peak, "needs": list(needs)}

    stages = [
        stage("shared", "warmup target", 70),
        stage("shared", "warmup proxy", 40),
        stage("bliss", "bilevel", 30, "shards", "warmup/proxy"),
        stage("bliss", "score", 20),
        stage("bliss", "pretrain", 50, "warmup/target", "bliss/round_01/select"),
        stage("dsir", "score", 10),
        stage("dsir", "pretrain", 90),
        stage("other", "pretrain", None),
    ]
    assert peaks(stages, "bliss") == {"selection": 40, "all": 70}
    assert peaks(stages, "dsir") == {"selection": 10, "all": 90}
    assert peaks(stages, "other") == {"selection": None, "all": None}
