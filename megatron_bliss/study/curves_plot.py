"""Loss curves of a study's arms against what they have spent, selection included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_bliss.report.arm_costs import loss_by_cost
from megatron_bliss.report.curves import loss_at
from megatron_bliss.study.paired import Spread, label, spread
from megatron_bliss.study.plot import COLORS, legend_below, panels_beside, save

SIDES = {"guided": "mean loss on the guide's kind, nats", "other": "mean loss elsewhere, nats"}
STYLES = ("-", "--", ":", "-.")
"""One per round of colours."""


def write_curves(study: Mapping, path: Path) -> None:
    """A PNG with a panel per side of the test sets: a line per arm over total FLOPs, a band of one standard error.

    A line is level while its arm selects. Arms that train on are drawn thin.
    """
    sides = [side for side in SIDES if study[side]]
    figure, panels = panels_beside(len(sides))
    arms = list(dict.fromkeys(map(label, study["points"])))
    for axes, side in zip(panels, sides, strict=True):
        for number, arm in enumerate(arms):
            curve = mean_curve([point for point in study["points"] if label(point) == arm], study[side])
            if not curve:
                continue
            color, style = COLORS[number % len(COLORS)], STYLES[number // len(COLORS) % len(STYLES)]
            x, y = [flops for flops, _ in curve], [one.mean for _, one in curve]
            error = [one.error or 0.0 for _, one in curve]
            width = 0.8 if arm in study["longer"].values() else 1.6
            axes.plot(x, y, color=color, linestyle=style, linewidth=width, label=arm)
            low, high = ([value + sign * e for value, e in zip(y, error, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_xlabel("FLOPs in all: warm-up, selection, target's training")
        axes.set_ylabel(SIDES[side])
    legend_below(figure, panels[0])
    save(figure, path)


def mean_curve(points: Sequence[Mapping], names: Sequence[str]) -> list[tuple[float, Spread]]:
    """[(total FLOPs, mean over the seeds of the mean loss on some sets)] of one arm; points: one per seed.

    FLOPs are the first seed's: those of the others differ by a shard's size at most. Seeds with other evaluations are
    read between theirs. Where a seed has no finite loss there is no point.
    """
    means = [{**point, "losses": {"mean": _mean_losses(point, names)}} for point in points]
    curves = [loss_by_cost(point, "mean", "flops") for point in means]
    if not all(curves):
        return []
    found = []
    for index, (flops, loss) in enumerate(curves[0]):
        same = all(len(curve) == len(curves[0]) for curve in curves)
        losses = [curve[index][1] if same else loss_at(curve, flops) for curve in curves[1:]]
        if None not in losses:
            found.append((flops, spread([loss, *losses])))
    return found


def _mean_losses(point: Mapping, names: Sequence[str]) -> list[list]:
    """[[tokens, mean loss over the sets]]; None where one has none."""
    by_set = [dict(map(tuple, point["losses"].get(name, []))) for name in names]
    return [[tokens, spread([losses.get(tokens) for losses in by_set]).mean] for tokens in by_set[0]]
