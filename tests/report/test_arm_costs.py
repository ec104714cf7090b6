"""An arm's cost is the sum of what its target and its selection took, counted by hand."""

import pytest

from megatron_bliss.report.arm_costs import cost_curves, equal_compute, loss_by_cost
from megatron_bliss.report.curves import loss_at
from tests.report.costs import STAGES, evaluations

BLISS, RANDOM = evaluations([8, 6, 5, 4, 3]), evaluations([8, 7, 6.5, 6, 5.5])


def arm(name, measured, stages=STAGES):
    losses = {key: [[one["tokens"], one["losses"][key]] for one in measured] for key in ("lambada", "c4")}
    return {"losses": losses, "cost": cost_curves(measured, stages, name)}


def test_costs_add_up_the_target_and_what_its_selection_needed():
    tokens = [1000, 2000, 3000, 4000, 5000]
    cost = cost_curves(BLISS, STAGES, "bliss")
    # warm-up 100; proxy 7 and the first round's 50; half a segment of 200; then the next round's 50
    assert cost["flops"] == [list(pair) for pair in zip(tokens, [100, 257, 357, 507, 607], strict=True)]
    assert cost["selection_flops"] == [list(pair) for pair in zip(tokens, [0, 57, 57, 107, 107], strict=True)]
    # without the 2 and 4 seconds that measuring took: 10, then 3 + 26 and 20 a segment
    assert cost["seconds"] == [list(pair) for pair in zip(tokens, [10, 49, 59, 95, 105], strict=True)]
    assert cost["selection_seconds"] == [list(pair) for pair in zip(tokens, [0, 29, 29, 55, 55], strict=True)]


def test_the_proxy_costs_nothing_to_an_arm_whose_stages_did_not_need_it():
    cost = cost_curves(RANDOM, STAGES, "random")
    assert [total for _, total in cost["flops"]] == [100, 200, 300, 400, 500]
    assert [total for _, total in cost["seconds"]] == [10, 21, 31, 42, 52]
    late = [one | {"needs": ["warmup/proxy"]} if (one["arm"], one["stage"], one["round"]) == ("random", "score", 2)
            else one for one in STAGES]  # fmt: skip
    assert [total for _, total in cost_curves(RANDOM, late, "random")["flops"]] == [100, 200, 300, 407, 507]


def test_points_without_a_known_cost_are_left_out():
    part = [one for one in STAGES if (one["arm"], one["round"], one["stage"]) != ("bliss", 2, "pretrain")]
    assert len(cost_curves(BLISS, part, "bliss")["flops"]) == 3
    unknown = [one | {"flops": None} if one["stage"] == "select" else one for one in STAGES]
    cost = cost_curves(BLISS, unknown, "bliss")
    assert len(cost["flops"]) == 1 and len(cost["seconds"]) == 5
    without_rounds = [{key: one[key] for key in ("iteration", "tokens", "losses")} for one in BLISS]
    assert not any(cost_curves(without_rounds, STAGES, "bliss").values())


def test_a_curve_over_cost_is_flat_while_an_arm_selects():
    curve = loss_by_cost(arm("bliss", BLISS), "lambada", "flops")
    assert curve == [(100, 8), (157, 8), (257, 6), (357, 5), (407, 5), (507, 4), (607, 3)]
    assert loss_by_cost(arm("random", RANDOM), "c4", "flops") == [(100, 9), (200, 8), (300, 7.5), (400, 7), (500, 6.5)]


def test_at_equal_cost_the_dearer_arm_is_read_earlier():
    found = equal_compute({"bliss": arm("bliss", BLISS), "random": arm("random", RANDOM)})
    assert found["flops"]["budget"] == 500 and found["seconds"]["budget"] == 52
    assert found["flops"]["losses"]["random"] == {"lambada": 5.5, "c4": 6.5}
    assert found["flops"]["losses"]["bliss"]["lambada"] == pytest.approx(5 + (4 - 5) * 93 / 100)
    # 52 seconds: 49 at the middle of the first segment, 59 at its end
    assert found["seconds"]["losses"]["bliss"]["c4"] == pytest.approx(1 + 6 - 3 / 10)


def test_equal_cost_agrees_with_a_run_taken_in_tiny_steps():
    """Brute force: an arm that spends a unit at a time and learns only while it trains."""
    spent, loss, losses = 100.0, 8.0, [8.0]
    plan = [(0, 57), (-2, 100), (-1, 100), (0, 50), (-1, 100), (-1, 100)]
    steps = [(fall / cost, 1.0) for fall, cost in plan for _ in range(cost)]
    curve = loss_by_cost(arm("bliss", BLISS), "lambada", "flops")
    for change, cost in steps:
        spent, loss = spent + cost, loss + change
        losses.append(loss)
        assert loss_at(curve, spent) == pytest.approx(loss)
    assert spent == 607 and losses[-1] == pytest.approx(3)


def test_a_run_without_costs_has_no_budget():
    assert equal_compute({})["flops"] == {"budget": None, "losses": {}}
    found = equal_compute({"random": arm("random", RANDOM, []), "bliss": arm("bliss", BLISS)})
    assert found["flops"]["budget"] == 607 and list(found["flops"]["losses"]) == ["bliss"]
