"""What an arm's selection cost against what it saved, in a line."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_bliss.base.text import format_flops, format_seconds
from megatron_bliss.report.curves import finite_points, first_reach, loss_at
from megatron_bliss.report.speedups import CONTROL


def savings_sentences(summary: Mapping) -> list[str]:
    """One sentence for every arm but the control whose cost is known, on the first set of the guide's kind."""
    test_set = next(iter(summary.get("sets", {}).get("guide", [])), "")
    arms = summary["arms"]
    return [
        f"{arm}: {_cost(content['cost'])}{_saving(content, arms.get(CONTROL), test_set)}."
        for arm, content in arms.items()
        if arm != CONTROL and _ends(content.get("cost", {}))
    ]


def _ends(cost: Mapping) -> bool:
    return bool(cost.get("flops") and cost.get("seconds"))


def _cost(cost: Mapping) -> str:
    selection, training = {}, {}
    for axis in ("flops", "seconds"):
        selection[axis] = cost[f"selection_{axis}"][-1][1]
        training[axis] = cost[axis][-1][1] - selection[axis]
    share = {axis: f"{100 * selection[axis] / training[axis]:.3g} %" if training[axis] else "-" for axis in training}
    return (
        f"selection cost {_flops(selection['flops'])} ({share['flops']} of its target's training) "
        f"and {format_seconds(selection['seconds'])} ({share['seconds']})"
    )


def _saving(arm: Mapping, control: Mapping | None, test_set: str) -> str:
    """What came of it, where there is a control to compare with."""
    goal = finite_points(control["losses"].get(test_set, [])) if control else []
    if not goal or not _ends(control.get("cost", {})):
        return ""
    end, loss = goal[-1]
    reached = first_reach(arm["losses"].get(test_set, []), loss)
    if reached is None or reached >= end:
        return f"; it did not reach {CONTROL}'s final loss on {test_set} in fewer steps: nothing was saved"
    spared = {axis: _spared(arm["cost"], control["cost"], axis, reached, end) for axis in ("flops", "seconds")}
    if None in spared.values():
        return ""
    flops, seconds = (max(0.0, value) for value in spared.values())
    return (
        f"; it reached {CONTROL}'s final loss on {test_set} after {100 * reached / end:.0f} % of the steps, which "
        f"saved {_flops(flops)} and {format_seconds(seconds)} of training"
    )


def _spared(arm: Mapping, control: Mapping, axis: str, reached: float, end: float) -> float | None:
    """Training that the control needed and the arm did not; None where the points in between have no cost."""
    own, other = loss_at(_training(arm, axis), reached), loss_at(_training(control, axis), end)
    return None if own is None or other is None else other - own


def _training(cost: Mapping, axis: str) -> list[list[float]]:
    """[[tokens, cost of the target's training alone]]."""
    selection = dict(map(tuple, cost[f"selection_{axis}"]))
    return [[tokens, total - selection[tokens]] for tokens, total in cost[axis]]


def _flops(count: float) -> str:
    return format_flops(count) if count else "no FLOPs"
