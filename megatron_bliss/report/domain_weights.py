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
    others = [name for name in last if name not in told]
    lines, boundaries = [], {}
    for name in [*others, *told]:  # those told apart are drawn over the others
        for number, (x, y) in curves[name].items():
            color = told.index(name) if name in told else 0
            lines.append(Line(name, x, y, color, markers=True, faint=name in others))
            boundaries[f"round {number}"] = min(x[0], boundaries.get(f"round {number}", x[0]))
    marks = Marks(boundaries if len(boundaries) > 1 else {}, level=1.0)
    svg = line_chart(lines, title=f"domain weights {arm}", x_label="upper step", marks=marks, wide=True)
    legend = {f"{name} ({last[name]:.2f})": color for color, name in enumerate(told)}
    return figure(f"Weights of domains, {arm}", _caption(len(others)), svg, legend)


def _caption(num_others: int) -> str:
    text = (
        "Mean of n P over a domain's samples since the point before; dashed: 1, as much as an average sample. "
        "In brackets: the last value."
    )
    if num_others:
        text += f" Grey: {num_others} more domains that end closer to 1."
    return escape(text)
