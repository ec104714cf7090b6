"""The report's first section: the targets' losses on the held-out sets, and what selection was worth."""

from __future__ import annotations

from megatron_bliss.base.text import format_loss
from megatron_bliss.report.curves import finite_points, first_reach
from megatron_bliss.report.parts import escape, figure, pairs, section, table
from megatron_bliss.report.plots import Line, Marks, line_chart
from megatron_bliss.report.run_data import RunData
from megatron_bliss.report.speedups import CHOSEN, CONTROL, other_speedups
from megatron_bliss.report.summary import final_losses


def loss_section(run: RunData) -> str:
    """The section, or "" for a run without evaluations."""
    arms = run.summary["arms"] if run.summary else {}
    names = list(dict.fromkeys(name for content in arms.values() for name in content["losses"]))
    wide = [_target_figure(run, name, is_wide=True) for name in names[:1]]
    rest = [_target_figure(run, name, is_wide=False) for name in names[1:]]
    note = "Mean loss of the target per labelled token, in nats, on the held-out sets, at equal target tokens."
    words = other_speedups(run.summary) if run.summary else []
    others = [f"<p>{escape(text[:1].upper() + text[1:])}</p>" for text in words]
    return section("What selection was worth", note, *wide, pairs(rest), _final_table(run), *others)


def _target_figure(run: RunData, name: str, *, is_wide: bool) -> str:
    arms = run.summary["arms"]
    lines = []
    for arm, content in arms.items():
        points = finite_points(content["losses"].get(name, []))
        lines.append(Line(arm, [x for x, _ in points], [loss for _, loss in points], run.color(arm), markers=True))
    control = finite_points(arms.get(CONTROL, {}).get("losses", {}).get(name, []))
    goal = control[-1][1] if control else None
    reached = first_reach(arms.get(CHOSEN, {}).get("losses", {}).get(name, []), goal) if control else None
    marks = Marks(run.round_tokens if is_wide else {}, goal, None if reached is None else (reached, goal))
    svg = line_chart(lines, title=f"target {name}", x_label="target tokens", marks=marks, skip_start=0.1, wide=is_wide)
    caption = f"Dashed: {CONTROL}'s final loss; ring: where {CHOSEN} first has it." if goal is not None else ""
    return figure(name, caption, svg, {line.label: line.color for line in lines})


def _final_table(run: RunData) -> str:
    finals = final_losses(run.summary) if run.summary else {}
    if not finals:
        return ""
    arms = list(run.summary["arms"])
    is_pair = CHOSEN in arms and CONTROL in arms
    rows = []
    for name, losses in finals.items():
        row = [name, *(format_loss(losses[arm]) for arm in arms)]
        if is_pair:
            both = [losses[CHOSEN], losses[CONTROL]]
            ratio = run.summary.get("speedups", {}).get(name)
            row.append("-" if None in both else f"{both[0] - both[1]:+.4f}".replace("-", "−"))
            row.append("-" if ratio is None else f"{ratio:.2f}×")
        rows.append(row)
    header = ["final loss", *arms, *([f"{CHOSEN} − {CONTROL}", f"{CHOSEN}'s speed-up"] if is_pair else [])]
    return table(header, rows)
