"""What an arm's target cost by the time it was measured, selection included; losses at equal total cost.

To an arm count: the target's warm-up, the target's training in its rounds, every stage of its rounds before that
training, and the proxy's warm-up if one of its stages began from it. What only measures a target (evaluations, decay
branches) counts to no arm. Seconds are those of a stage's last attempt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_bliss.config.stages import SELECTION_STAGES
from megatron_bliss.report.curves import finite_points, loss_at

AXES = ("flops", "seconds")
"""What a cost is counted in."""
SHARED = "shared"
"""In the place of an arm: the warm-up."""


def cost_curves(measured: Sequence[Mapping], stages: Sequence[Mapping], arm: str) -> dict[str, list[list[float]]]:
    """Return {"flops": [[target tokens, cost so far]], "selection_flops": [[.., of which selection]], and in seconds}.

    measured: the arm's evaluations in order, {"iteration", "tokens", "round"}; the last of a round stands at its end.
    stages: records as ``read_stages`` returns them. A segment's cost grows evenly over its iterations. A point is left
    out where a stage did not note what it took.
    """
    curves: dict[str, list[list[float]]] = {name: [] for axis in AXES for name in (axis, f"selection_{axis}")}
    ends = {one["round"]: one["iteration"] for one in measured if "round" in one}
    for axis in AXES:
        for one in (one for one in measured if "round" in one):
            number = one["round"]
            begin = ends.get(number - 1, 0)
            share = (one["iteration"] - begin) / (ends[number] - begin)
            before = [_training(stages, arm, earlier, axis) for earlier in range(number)]
            now = _training(stages, arm, number, axis)
            selection = _selection(stages, arm, number, axis)
            if None not in (*before, now, selection):
                curves[axis].append([one["tokens"], sum(before) + share * now + selection])
                curves[f"selection_{axis}"].append([one["tokens"], selection])
    return curves


def _training(stages: Sequence[Mapping], arm: str, number: int, axis: str) -> float | None:
    """Cost of the target's training in a round (0: the warm-up), without what measuring took."""
    wanted = (arm, number, "pretrain") if number else (SHARED, 0, "warmup target")
    for one in stages:
        if (one["arm"], one["round"], one["stage"]) == wanted and one.get(axis) is not None:
            return one[axis] - (one.get("evaluation_seconds") or 0.0 if axis == "seconds" else 0.0)
    return None


def _selection(stages: Sequence[Mapping], arm: str, last_round: int, axis: str) -> float | None:
    """Cost of all selections of an arm up to a round."""
    own = [one for one in stages if one["arm"] == arm and one["round"] <= last_round]
    needed = {name.replace("/", " ") for one in own for name in one.get("needs") or ()} - {"warmup target"}
    counted = [one for one in own if one["stage"] in SELECTION_STAGES]
    counted += [
        one for one in stages if one["arm"] == SHARED and one["stage"] in needed and not _measures(one["stage"])
    ]
    costs = [one.get(axis) for one in counted]
    return None if None in costs else float(sum(costs))


def _measures(shared_stage: str) -> bool:
    """Whether a stage of the warm-up only measures the target."""
    return shared_stage in ("warmup decay_branch", "warmup evaluate")


def loss_by_cost(arm: Mapping, test_set: str, axis: str) -> list[tuple[float, float]]:
    """Return the curve [(total cost, loss)] of an arm of a summary on a set: flat while it selects.

    The target learns nothing meanwhile, so a selection moves the curve to the right at the loss that it began with.
    """
    losses = dict(finite_points(arm["losses"].get(test_set, [])))
    cost = arm.get("cost", {})
    selection = dict(map(tuple, cost.get(f"selection_{axis}", [])))
    curve, spent = [], 0.0
    for tokens, total in cost.get(axis, []):
        if tokens not in losses:
            continue
        if curve and selection[tokens] > spent:
            curve.append((curve[-1][0] + selection[tokens] - spent, curve[-1][1]))
        curve.append((total, losses[tokens]))
        spent = selection[tokens]
    return curve


def equal_compute(arms: Mapping[str, Mapping]) -> dict[str, dict]:
    """Return {axis: {"budget": the least that an arm of a summary cost in all, "losses": {arm: {set: loss there}}}}.

    An arm that cost more is read earlier on its own curve, linear between its points; None where it has no loss there.
    """
    found = {}
    for axis in AXES:
        totals = {arm: content["cost"][axis][-1][1] for arm, content in arms.items() if content["cost"][axis]}
        budget = min(totals.values(), default=None)
        losses = {
            arm: {name: loss_at(loss_by_cost(arms[arm], name, axis), budget) for name in arms[arm]["losses"]}
            for arm in totals
        }
        found[axis] = {"budget": budget, "losses": losses}
    return found
