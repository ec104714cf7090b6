"""How much each domain's samples weigh while the score model learns, as the report draws it."""

from __future__ import annotations

from megatron_bliss.base.metrics import DOMAIN_WEIGHT
from megatron_bliss.report.parts import escape, figure
from megatron_bliss.report.plots import SERIES, Line, Marks, line_chart
from megatron_bliss.report.run_data import RunData, joined


def domain_weight_figures(run: RunData) -> list[str]:
    """A plot for each arm whose bilevel stage logged weights of domains."""
    return [one for one in (_figure(run, arm) for arm in run.arms) if one]


def _figure(run: RunData, arm: str) -> str:
    entries = [entry for entry in run.metrics if entry["arm"] == arm and entry["stage"] == "bilevel"]
    keys = dict.fromkeys(key for entry in entries for key in entry if key.startswith(DOMAIN_WEIGHT))
    curves = {key.removeprefix(DOMAIN_WEIGHT): joined(entries, key) for key in keys}
    last = {name: curve[max(curve)][1][-1] for name, curve in curves.items()}
    if not last:
        return ""
    told = sorted(sorted(last, key=lambda name: -abs(last[name] - 1))[: len(SERIES)], key=lambda name: -last[name])
    others = sorted((name for name in last if name not in told), key=lambda name: -last[name])
    lines, boundaries = [], {}
    for name in [*others, *told]:  # those told apart are drawn over the others
        for number, (x, y) in curves[name].items():
            color = told.index(name) if name in told else 0
            lines.append(Line(name, x, y, color, markers=True, faint=name in others))
            boundaries[f"round {number}"] = min(x[0], boundaries.get(f"round {number}", x[0]))
    marks = Marks(boundaries if len(boundaries) > 1 else {}, level=1.0)
    svg = line_chart(lines, title=f"domain weights {arm}", x_label="upper step", marks=marks, wide=True)
    labels = {name: f"{name} ({value:.2f})" for name, value in last.items()}
    caption = _caption([labels[name] for name in others])
    return figure(f"Weights of domains, {arm}", caption, svg, {labels[name]: told.index(name) for name in told})


def _caption(others: list[str]) -> str:
    text = (
        "Mean of n P over a domain's samples since the point before; dashed: 1, as much as an average sample. "
        "In brackets: the last value."
    )
    if others:
        text += f" Grey, as they end closer to 1: {', '.join(others)}."
    return escape(text)
