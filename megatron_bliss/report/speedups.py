"""What a method saves over the control, read off two curves of a summary and said in one sentence."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_bliss.report.curves import Curve, finite_points, first_reach, loss_at, speedup

CHOSEN, CONTROL = "bliss", "random"
"""The arms that the speed-up compares."""


def speedup_sentence(summary: Mapping, test_set: str | None = None, chosen: str = CHOSEN) -> str:
    """Say an arm's speed-up on a test set (default: the first) in one plain sentence, also where there is none."""
    arms = summary["arms"]
    for arm in (CONTROL, chosen):
        if arm not in arms or not finite_points(_curve(arms[arm], test_set)):
            return f"No speed-up: it needs losses of the arms {chosen} and {CONTROL}; those of {arm} are missing."
    control, curve = _curve(arms[CONTROL], test_set), _curve(arms[chosen], test_set)
    end, goal = finite_points(control)[-1]
    reached = first_reach(curve, goal)
    if reached is None:
        best = min(loss for _, loss in finite_points(curve))
        return f"No speed-up: {chosen} never reached {CONTROL}'s final loss {goal:.4g} (its best: {best:.4g})."
    step, last = _step(arms[chosen], reached), _step(arms[CONTROL], end)
    place = f"at {reached:,.0f} of {end:,.0f} tokens" if None in (step, last) else f"at step {step:,.0f} of {last:,.0f}"
    ratio = speedup(control, curve)
    if ratio is None:
        return f"No speed-up: {chosen} had {CONTROL}'s final loss {goal:.4g} before its first step."
    change = f"{ratio:.2f}x fewer steps" if ratio >= 1 else f"{1 / ratio:.2f}x more steps"
    return f"{chosen} reached {CONTROL}'s final loss {goal:.4g} {place}: {change}."


def other_speedups(summary: Mapping) -> list[str]:
    """The same for every other arm of a run with a control."""
    others = [arm for arm in summary["arms"] if arm not in (CHOSEN, CONTROL)]
    return [speedup_sentence(summary, chosen=arm) for arm in others if CONTROL in summary["arms"]]


def _curve(arm: Mapping, test_set: str | None) -> Curve:
    return arm["validation_loss"] if test_set is None else arm["losses"].get(test_set, [])


def _step(arm: Mapping, tokens: float) -> float | None:
    """Target step of an arm at which it had seen ``tokens``, between its evaluations."""
    curve = arm["validation_loss"]
    if len(curve) != len(arm["iterations"]):
        return None
    return loss_at([[x, step] for (x, _), step in zip(curve, arm["iterations"], strict=True)], tokens)
