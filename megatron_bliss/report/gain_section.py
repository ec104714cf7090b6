"""The report's section on gain and loss: every arm on every set, at equal tokens and at equal total cost."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_bliss.base.text import format_flops, format_loss, format_seconds
from megatron_bliss.report.arm_costs import loss_by_cost
from megatron_bliss.report.gain_table import gain_cells, set_kinds
from megatron_bliss.report.parts import Marked, escape, figure, pairs, section, table
from megatron_bliss.report.plots import Line, line_chart
from megatron_bliss.report.run_data import RunData
from megatron_bliss.report.savings import savings_sentences
from megatron_bliss.report.speedups import CONTROL

AXES = {"flops": "total FLOPs", "seconds": "total seconds"}


def alarm(run: RunData) -> str:
    """A box that says which arm is worse than the control on which set; "" where none is."""
    warnings = run.summary["warnings"] if run.summary else []
    items = "".join(f"<li>{escape(text)}</li>" for text in warnings)
    return f'<div class="alarm"><b>Worse than {CONTROL}</b><ul>{items}</ul></div>' if warnings else ""


def gain_section(run: RunData) -> str:
    """The section, or "" for a run without a control and without costs."""
    if not run.summary:
        return ""
    titles = {"tokens": "At equal target tokens"}
    for axis, said in (("flops", format_flops), ("seconds", format_seconds)):
        budget = run.summary["equal_compute"].get(axis, {}).get("budget")
        titles |= {axis: f"At equal {AXES[axis]}: {said(budget)}"} if budget else {}
    tables = [_table(run.summary, measure, title) for measure, title in titles.items()]
    costs = [f"<p>{escape(text)}</p>" for text in savings_sentences(run.summary)]
    figures = [_figure(run, name, axis) for name in set_kinds(run.summary) for axis in AXES]
    note = (
        f"Gain: {CONTROL}'s loss less the arm's, nats per labelled token; worse: a loss of more than "
        f"{run.summary['loss_margin']:g}. The guide does not speak for sets of the kind other. A total is what the "
        "target's warm-up and training and all selection for it took; evaluations count to nobody, and seconds are "
        "those of a stage's last attempt. Curves are flat while an arm selects."
    )
    return section("Gain and loss, and what they cost", escape(note), *tables, *costs, pairs(figures))


def _table(summary: Mapping, measure: str, title: str) -> str:
    cells, kinds = gain_cells(summary, measure), set_kinds(summary)
    if not cells:
        return ""
    arms = [arm for arm in next(iter(cells.values())) if arm != CONTROL]
    rows = []
    for name, by_arm in cells.items():
        row = [name, kinds[name], format_loss(by_arm[CONTROL].loss)]
        for arm in arms:
            mark = "worse" if by_arm[arm].is_worse else "up" if (by_arm[arm].gain or 0) > 0 else ""
            row += [format_loss(by_arm[arm].loss), Marked(by_arm[arm].gain_text, mark)]
        rows.append(row)
    header = ["set", "kind", CONTROL, *(text for arm in arms for text in (arm, "gain"))]
    return f"<h3>{escape(title)}</h3>{table(header, rows, left=2)}"


def _figure(run: RunData, name: str, axis: str) -> str:
    curves = {arm: loss_by_cost(content, name, axis) for arm, content in run.summary["arms"].items()}
    lines = [
        Line(arm, [cost for cost, _ in curve], [loss for _, loss in curve], run.color(arm))
        for arm, curve in curves.items()
        if curve
    ]
    if not lines:
        return ""
    svg = line_chart(lines, title=f"{axis} {name}", x_label=AXES[axis], skip_start=0.1)
    return figure(f"{name}, by {AXES[axis]}", "", svg, {line.label: line.color for line in lines})
