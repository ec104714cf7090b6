"""The report's sections on what the stages logged: pre-training of the targets and bilevel optimisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron_bliss.report.domain_weights import domain_weight_figures
from megatron_bliss.report.parts import figure, pairs, section
from megatron_bliss.report.plots import Line, Marks, line_chart
from megatron_bliss.report.run_data import RunData, joined


class Chart(NamedTuple):
    """Metrics of a stage on one axis, {key: label} (a single one takes its label from the arm), and its words."""

    metrics: Mapping[str, str]
    title: str
    caption: str = ""
    level: float | None = None
    log_y: bool = False


PRETRAINING = (
    Chart({"loss": ""}, "Target training loss", "On what each arm selected: not comparable between arms."),
    Chart({"grad_norm": ""}, "Gradient norm", "Before clipping."),
    Chart({"lr": ""}, "Learning rate"),
    Chart({"tokens_per_second": ""}, "Tokens per second"),
    Chart({"model_flops_utilisation": ""}, "Model FLOP/s utilisation",
          "Share of the devices' peak; not known for CPUs."),
)  # fmt: skip


def pretraining_section(run: RunData) -> str:
    """Training curves of the targets; the shared warm-up has its own steps."""
    figures = []
    for stage in dict.fromkeys(entry["stage"] for entry in run.metrics if entry["arm"] == "shared"):
        name = {"pretrain": "target", "decay_branch": "target: decay branch"}.get(stage, stage)
        caption = "Training loss before the first round, shared by all arms."
        figures.append(_curve_figure(run, stage, ["shared"], Chart({"loss": ""}, f"Warm-up of the {name}", caption)))
    figures += [_curve_figure(run, "pretrain", run.arms, chart) for chart in PRETRAINING]
    note = "Pale: what was logged; line: its running mean. Thin verticals: rounds."
    return section("Pre-training", note, pairs(figures))


def bilevel_section(run: RunData) -> str:
    """How the score model learnt, for the arms that have the stage."""
    arms = [arm for arm in run.arms if any(e["arm"] == arm and e["stage"] == "bilevel" for e in run.metrics)]
    charts = _bilevel_charts(run.option("bilevel", "global_batch_size"))
    figures = [_curve_figure(run, "bilevel", arms, chart) for chart in charts]
    note = "How the score model learnt. Pale: what was logged; line: its running mean. Thin verticals: rounds."
    return section("Bilevel optimisation", note, pairs(figures), *domain_weight_figures(run))


def _bilevel_charts(batch_size: int | None) -> list[Chart]:
    """The charts of a stage with n = ``batch_size`` samples a step, None where the config does not say."""
    most_entropy, most_samples = (math.log(batch_size), float(batch_size)) if batch_size else (None, None)
    return [
        Chart({"validation_loss": ""}, "Validation loss of the proxy", "Φ, eq. (4), nats per labelled token."),
        Chart({"train_loss": "plain mean", "lower_loss": "lower level G"}, "Proxy training loss",
              "On the batch; G as in eq. (3)."),
        Chart({"kl": ""}, "KL between proxy and target", "Nats per token."),
        Chart({"entropy": ""}, "Entropy of P", "Eq. (2), in nats; dashed: log n, all samples weigh the same.",
              most_entropy),
        Chart({"effective_samples": ""}, "Effective sample size", "1 / Σ P²; dashed: n, all samples weigh the same.",
              most_samples),
        Chart({"score_mean": "mean", "score_std": "standard deviation"}, "Scores in the batch", "Eq. (1)."),
        Chart({"residual": ""}, "Residual of the linear system", "Eq. (5), relative to its right-hand side.",
              log_y=True),
        Chart({"largest_eigenvalue": ""}, "Largest eigenvalue seen", "Of the curvature in eq. (5).", log_y=True),
        Chart({"hypergradient_norm": ""}, "Norm of the hypergradient", "Eq. (7), before clipping.", log_y=True),
        Chart({"lr": ""}, "Learning rate of the score model"),
    ]  # fmt: skip


def _curve_figure(run: RunData, stage: str, arms: Sequence[str], chart: Chart) -> str:
    """A chart of a stage over the steps of all rounds; "" where nothing was logged."""
    lines, boundaries = [], {}
    for arm in arms:
        entries = [entry for entry in run.metrics if entry["arm"] == arm and entry["stage"] == stage]
        for index, (key, name) in enumerate(chart.metrics.items()):
            label, color = (arm, run.color(arm)) if len(chart.metrics) == 1 else (name, index)
            for number, (x, y) in joined(entries, key).items():
                lines.append(Line(label, x, y, color, smooth=True))
                boundaries.setdefault(f"round {number}", x[0])
    if not any(math.isfinite(value) for line in lines for value in line.y):
        return ""
    marks = Marks(boundaries if len(boundaries) > 1 else {}, chart.level)
    svg = line_chart(lines, title=f"{stage} {chart.title}", x_label="step", marks=marks, log_y=chart.log_y)
    legend = {line.label: line.color for line in lines}
    return figure(chart.title, chart.caption, svg, legend if len(legend) > 1 else None)
