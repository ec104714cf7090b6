"""Curves of a run, [target tokens, value], read between their points; what a method saves is read off two of them.

Values fall (losses) or, where a function says so, rise (accuracies). Points without a finite value are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Curve = Sequence[Sequence[float]]


def finite_points(curve: Curve) -> list[tuple[float, float]]:
    """Return the points of a curve whose loss is a finite number."""
    return [(x, loss) for x, loss in curve if loss is not None and math.isfinite(loss)]


def first_reach(curve: Curve, loss: float) -> float | None:
    """Return where a curve first comes down to ``loss``, linear between its points; None if it never does."""
    points = finite_points(curve)
    if not points:
        return None
    if points[0][1] <= loss:
        return points[0][0]
    for (x0, loss0), (x1, loss1) in zip(points, points[1:], strict=False):
        if loss1 <= loss:
            return x0 + (x1 - x0) * (loss0 - loss) / (loss0 - loss1)
    return None


def loss_at(curve: Curve, x: float) -> float | None:
    """Return the loss of a curve at ``x``, linear between its points; None outside them."""
    points = finite_points(curve)
    for x0, loss0 in points:
        if x0 == x:
            return loss0
    for (x0, loss0), (x1, loss1) in zip(points, points[1:], strict=False):
        if x0 < x < x1:
            return loss0 + (loss1 - loss0) * (x - x0) / (x1 - x0)
    return None


def speedup(random_curve: Curve, bliss_curve: Curve) -> float | None:
    """Return target steps at which random ends / steps at which bliss first has the loss that random ends with.

    Both arms take the same tokens a step, so a ratio of tokens is one of steps. None where bliss never reaches that
    loss, where a curve is empty, and where bliss has it before its first step, which is no ratio.
    """
    control = finite_points(random_curve)
    if not control:
        return None
    end, final_loss = control[-1]
    reached = first_reach(bliss_curve, final_loss)
    return end / reached if reached else None


def rise_speedup(control: Curve, chosen: Curve) -> float | None:
    """Return :func:`speedup` for curves that rise: steps control takes / steps chosen takes to its end."""
    return speedup(fallen(control), fallen(chosen))


def rise_reach(curve: Curve, value: float) -> float | None:
    """Return where a curve first comes up to ``value``, linear between its points; None if it never does."""
    return first_reach(fallen(curve), -value)


def fallen(curve: Curve) -> list[tuple[float, float]]:
    """Return a rising curve upside down, errors after the value left off."""
    return [(x, -value) for x, value in finite_points([point[:2] for point in curve])]
