"""A run folder as one HTML page: what selection was worth, how the stages went, what was chosen, what it cost.

The page holds everything it shows and loads nothing. It can be made at any time of a run: what is not there yet is said
at its top. Text from outside (documents, addresses, labels, the config) goes through :func:`escape`, all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from megatron_bliss.base.files import atomic_file
from megatron_bliss.base.metrics import format_seconds
from megatron_bliss.report.parts import escape, figure, section, table
from megatron_bliss.report.plots import Line, color_variable, histogram_chart, line_chart, strip_chart
from megatron_bliss.report.run_data import RunData, joined, read_run
from megatron_bliss.report.summary import (
    CHOSEN,
    CONTROL,
    by_lift,
    final_losses,
    finite_points,
    first_reach,
    format_bytes,
    format_flops,
    other_speedups,
    speedup_sentence,
    stage_key,
)
from megatron_bliss.report.tasks import task_section

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser lets the page load: nothing."""
SAMPLE_CHARACTERS = 1500


def write_report(run_folder: Path | str) -> Path:
    """Write ``report.html`` into a run folder and return its path."""
    path = Path(run_folder) / "report.html"
    page = build_report(run_folder).encode("utf-8", errors="replace")
    with atomic_file(path) as file:
        file.write(page)
    return path


def build_report(run_folder: Path | str) -> str:
    """Return the page for a run folder. Raises ``ValueError`` where there is no such folder."""
    folder = Path(run_folder)
    if not folder.is_dir():
        raise ValueError(f"found no folder {folder}, expected a run folder; change the path")
    run = read_run(folder)
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    sections = (_head, _missing, _target_section, task_section, _pretraining_section, _bilevel_section, _score_section,
                _domain_section, _sample_section, _stage_section, _config_section)  # fmt: skip
    body = "\n".join(write(run) for write in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(run.name)} - BLISS run</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


# Head


def _head(run: RunData) -> str:
    state = "finished" if run.is_finished else "in progress"
    facts = [f"arms {', '.join(run.arms)}"] if run.arms else []
    facts += [f"{run.rounds} rounds"] if run.rounds else []
    if run.summary:
        facts += [f"seed {run.summary.get('seed')}", f"config {str(run.summary.get('config_digest'))[:12]}"]
        facts += [f"{name} {version}" for name, version in run.summary.get("versions", {}).items()]
    lead = speedup_sentence(run.summary) if run.summary else "No evaluation has been written yet."
    lead = lead if run.is_finished or not run.summary else f"So far: {lead}"
    return (
        f'<header>\n<h1>{escape(run.name)}<span class="pill{"" if run.is_finished else " open"}">{state}</span></h1>\n'
        f'<p class="meta">{escape(" · ".join(facts))}</p>\n</header>\n'
        f'<div class="tiles">{"".join(_tiles(run))}</div>\n<p class="lead">{escape(lead[:1].upper() + lead[1:])}</p>'
    )


def _tiles(run: RunData) -> list[str]:
    tiles = []
    if run.summary:
        ratio = run.summary.get("speedup")
        tiles.append(("–" if ratio is None else f"{ratio:.2f}×", f"speed-up to {CONTROL}'s final loss"))
        finals = next(iter(final_losses(run.summary).values()), {})
        tiles += [(_loss(finals[arm]), f"final validation loss, {arm}") for arm in (CHOSEN, CONTROL) if arm in finals]
    seconds = [record["seconds"] for record in run.stages if record.get("seconds") is not None]
    if seconds:
        tiles.append((format_seconds(sum(seconds)), f"in {len(run.stages)} finished stages"))
    return [f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in tiles]


def _missing(run: RunData) -> str:
    if not run.missing:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in run.missing)
    return f'<div class="missing"><b>Not on this page</b><ul>{items}</ul></div>'


# Curves


def _target_section(run: RunData) -> str:
    arms = run.summary["arms"] if run.summary else {}
    names = list(dict.fromkeys(name for content in arms.values() for name in content["losses"]))
    wide = [_target_figure(run, name, is_wide=True) for name in names[:1]]
    rest = [_target_figure(run, name, is_wide=False) for name in names[1:]]
    pairs = [f'<div class="pair">{"".join(rest)}</div>'] if rest else []
    note = "Mean loss of the target per labelled token, in nats, on the held-out sets, at equal target tokens."
    words = other_speedups(run.summary) if run.summary else []
    others = [f"<p>{escape(text[:1].upper() + text[1:])}</p>" for text in words]
    return section("What selection was worth", note, *wide, *pairs, _final_table(run), *others)


def _target_figure(run: RunData, name: str, *, is_wide: bool) -> str:
    arms = run.summary["arms"]
    lines = []
    for arm, content in arms.items():
        points = finite_points(content["losses"].get(name, []))
        lines.append(Line(arm, [x for x, _ in points], [loss for _, loss in points], run.color(arm), markers=True))
    control = finite_points(arms.get(CONTROL, {}).get("losses", {}).get(name, []))
    goal = control[-1][1] if control else None
    reached = first_reach(arms.get(CHOSEN, {}).get("losses", {}).get(name, []), goal) if control else None
    svg = line_chart(
        lines, title=f"target {name}", x_label="target tokens", boundaries=run.round_tokens if is_wide else None,
        level=goal, skip_start=0.1, point=None if reached is None else (reached, goal), wide=is_wide,
    )  # fmt: skip
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
        row = [name, *(_loss(losses[arm]) for arm in arms)]
        if is_pair:
            both = [losses[CHOSEN], losses[CONTROL]]
            ratio = run.summary.get("speedups", {}).get(name)
            row.append("-" if None in both else f"{both[0] - both[1]:+.4f}".replace("-", "−"))
            row.append("-" if ratio is None else f"{ratio:.2f}×")
        rows.append(row)
    header = ["final loss", *arms, *([f"{CHOSEN} − {CONTROL}", f"{CHOSEN}'s speed-up"] if is_pair else [])]
    return table(header, rows)


def _curve_figure(
    run: RunData, stage: str, arms: Sequence[str], keys: Mapping[str, str], title: str, caption: str, **options
) -> str:
    """One metric (or several on one axis) of a stage over the steps of all rounds; "" where nothing was logged."""
    lines, boundaries = [], {}
    for arm in arms:
        entries = [entry for entry in run.metrics if entry["arm"] == arm and entry["stage"] == stage]
        for index, (key, label) in enumerate(keys.items()):
            label, color = (arm, run.color(arm)) if len(keys) == 1 else (label, index)
            for number, (x, y) in joined(entries, key).items():
                lines.append(Line(label, x, y, color, smooth=True))
                boundaries.setdefault(f"round {number}", x[0])
    if not any(math.isfinite(value) for line in lines for value in line.y):
        return ""
    boundaries = boundaries if len(boundaries) > 1 else {}
    svg = line_chart(lines, title=f"{stage} {title}", x_label="step", boundaries=boundaries, **options)
    legend = {line.label: line.color for line in lines}
    return figure(title, caption, svg, legend if len(legend) > 1 else None)


def _pairs(figures: Iterable[str]) -> str:
    shown = [figure for figure in figures if figure]
    return f'<div class="pair">{"".join(shown)}</div>' if shown else ""


def _pretraining_section(run: RunData) -> str:
    """Training curves of the targets; the shared warm-up has its own steps."""
    figures = []
    for stage in dict.fromkeys(entry["stage"] for entry in run.metrics if entry["arm"] == "shared"):
        caption = "Training loss before the first round, shared by all arms."
        name = {"pretrain": "target", "decay_branch": "target: decay branch"}.get(stage, stage)
        title = f"Warm-up of the {name}"
        figures.append(_curve_figure(run, stage, ["shared"], {"loss": ""}, title, caption))
    for key, title, caption in (
        ("loss", "Target training loss", "On what each arm selected: not comparable between arms."),
        ("grad_norm", "Gradient norm", "Before clipping."),
        ("lr", "Learning rate", ""),
        ("tokens_per_second", "Tokens per second", ""),
        ("model_flops_utilisation", "Model FLOP/s utilisation", "Share of the devices' peak; not known for CPUs."),
    ):
        figures.append(_curve_figure(run, "pretrain", run.arms, {key: ""}, title, caption))
    note = "Pale: what was logged; line: its running mean. Thin verticals: rounds."
    return section("Pre-training", note, _pairs(figures))


def _bilevel_section(run: RunData) -> str:
    size = run.option("bilevel", "global_batch_size")
    most = {"level": math.log(size)} if size else {}
    charts: list[tuple[dict, str, str, dict]] = [
        ({"validation_loss": ""}, "Validation loss of the proxy", "Φ, eq. (4), nats per labelled token.", {}),
        ({"train_loss": "plain mean", "lower_loss": "lower level G"}, "Proxy training loss",
         "On the batch; G as in eq. (3).", {}),
        ({"kl": ""}, "KL between proxy and target", "Nats per token.", {}),
        ({"entropy": ""}, "Entropy of P", "Eq. (2), in nats; dashed: log n, all samples weigh the same.", most),
        ({"effective_samples": ""}, "Effective sample size", "1 / Σ P²; dashed: n, all samples weigh the same.",
         {"level": float(size)} if size else {}),
        ({"score_mean": "mean", "score_std": "standard deviation"}, "Scores in the batch", "Eq. (1).", {}),
        ({"residual": ""}, "Residual of the linear system", "Eq. (5), relative to its right-hand side.",
         {"log_y": True}),
        ({"largest_eigenvalue": ""}, "Largest eigenvalue seen", "Of the curvature in eq. (5).", {"log_y": True}),
        ({"hypergradient_norm": ""}, "Norm of the hypergradient", "Eq. (7), before clipping.", {"log_y": True}),
        ({"lr": ""}, "Learning rate of the score model", "", {}),
    ]  # fmt: skip
    arms = [arm for arm in run.arms if any(e["arm"] == arm and e["stage"] == "bilevel" for e in run.metrics)]
    figures = [_curve_figure(run, "bilevel", arms, *chart[:3], **chart[3]) for chart in charts]
    note = "How the score model learnt. Pale: what was logged; line: its running mean. Thin verticals: rounds."
    return section("Bilevel optimisation", note, _pairs(figures))


# What was chosen


def _score_section(run: RunData) -> str:
    figures = []
    for arm, rounds in run.scores.items():
        groups = {f"round {number}": scores for number, scores in rounds.items()}
        svg = histogram_chart(groups, title=f"scores {arm}", x_label="score")
        keys = {label: index for index, label in enumerate(groups)}
        caption = f"Share of the shard's units.{_held_out(run.correlations.get(arm, {}))}"
        figures.append(figure(f"Scores, {arm}", caption, svg, keys))
    for (arm, name), groups in run.scores_by_field.items():
        svg = strip_chart(groups, title=f"scores by {name} {arm}", x_label="score")
        caption = "Last scored round. Dot: median; thick: middle half; thin: 5 to 95 %; in brackets: units."
        figures.append(figure(f"Scores by {name}, {arm}", caption, svg))
    return section("Scores", "", *figures)


def _held_out(correlations: Mapping[int, float]) -> str:
    """How well scores rank what they predict, for methods that measure it."""
    rounds = ", ".join(f"{value:.2f} in round {number}" for number, value in sorted(correlations.items()))
    return f" Rank correlation with what was measured, on held-out units: {rounds}." if rounds else ""


def _domain_section(run: RunData) -> str:
    fields = (run.summary or {}).get("domains_by_field", {})
    parts = [_share_table(run, field, content) for field, content in fields.items()]
    return section("What was selected", "Share of units in the pool and in the selection, over all rounds.", *parts)


def _share_table(run: RunData, field: str, content: Mapping) -> str:
    pool, selected = content["pool"], content["selected"]
    if not pool or not selected:
        return ""
    first = CHOSEN if CHOSEN in selected else next(iter(selected))
    arms = [first, *(arm for arm in selected if arm != first)]
    top = max([*pool.values(), *(share for arm in arms for share in selected[arm].values())])
    rows = []
    drawn = [arm for arm in arms if arm == first or arm != CONTROL]  # the control's bars would be the pool's again
    for label, share, chosen, factor in by_lift(pool, selected[first]):
        bars = _bar(share / top, "var(--series-6)")
        for arm in drawn:
            bars += _bar(selected[arm].get(label, 0.0) / top, color_variable(run.color(arm)))
        rest = "".join(f'<td class="number">{selected[arm].get(label, 0.0):.1%}</td>' for arm in arms[1:])
        rows.append(
            f'<tr><td class="label" title="{escape(label)}">{escape(label)}</td><td class="bars">{bars}</td>'
            f'<td class="number">{share:.1%}</td><td class="number">{chosen:.1%}</td>'
            f'<td class="number {"up" if (factor or 0) >= 1 else "down"}">{"-" if factor is None else f"{factor:.2f}×"}'
            f"</td>{rest}</tr>"
        )
    heads = "".join(f'<th class="number">{escape(text)}</th>' for text in ["pool", first, "ratio", *arms[1:]])
    keys = {"pool": "var(--series-6)"} | {arm: color_variable(run.color(arm)) for arm in drawn}
    legend = "".join(
        f'<span class="key"><i style="background:{color}"></i>{escape(text)}</span>' for text, color in keys.items()
    )
    return (
        f'<div class="scroll"><table>\n<thead><tr><th>{escape(field)}</th><th>{legend}</th>{heads}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )


def _bar(share: float, color: str) -> str:
    return f'<i style="width:{100 * share:.1f}%;background:{color}"></i>'


def _sample_section(run: RunData) -> str:
    parts = []
    for (arm, number), samples in sorted(run.samples.items(), key=lambda item: (item[0][0], -item[0][1])):
        columns = "".join(
            f"<div><h3>{title}</h3>{''.join(map(_sample, samples.get(kind, [])))}</div>"
            for kind, title in (("best", "Highest scores"), ("worst", "Lowest scores"))
        )
        is_open = "" if parts else " open"
        parts.append(
            f"<details{is_open}><summary>{escape(arm)}, round {number}</summary>\n"
            f'<div class="samples">{columns}</div></details>'
        )
    return section("Sample documents", "The units with the highest and the lowest scores of a shard.", *parts)


def _sample(sample: Mapping) -> str:
    text = "(text not at hand)" if sample.get("text") is None else str(sample["text"])
    more = f" … ({len(text) - SAMPLE_CHARACTERS:,} more characters)" if len(text) > SAMPLE_CHARACTERS else ""
    score = sample.get("score")
    shown = f"{score:.4f}" if isinstance(score, int | float) else "-"
    source = " · ".join(str(sample[key]) for key in ("domain", "url") if sample.get(key))
    return (
        f'<div class="sample"><header><b>{shown}</b><bdi>{escape(source)}</bdi></header>'
        f"<pre>{escape(text[:SAMPLE_CHARACTERS])}{more}</pre></div>"
    )


# What it cost


def _stage_section(run: RunData) -> str:
    records = sorted(run.stages, key=stage_key)
    if not records:
        return ""
    rows = [
        [record["arm"], str(record["round"] or "–"), record["stage"], *_cost(_sum([record]))] for record in records
    ]  # fmt: skip
    rows.append(["total", "", "", *_cost(_sum(records))])
    header = ["arm", "round", "stage", "time", "peak memory", "work", "work per second"]
    note = "Peak memory is that of the largest process; work counts the operations of all ranks."
    return section("Time, memory and work", note, table(header, rows, left=3, total=True))


def _sum(records: Sequence[Mapping]) -> tuple[float | None, float | None, float | None]:
    """Seconds (sum), peak bytes (largest) and FLOPs (sum) of some stages; None where no stage noted it."""

    def over(key: str, function: Callable) -> float | None:
        values = [record[key] for record in records if record.get(key) is not None]
        return function(values) if values else None

    return over("seconds", sum), over("peak_bytes", max), over("flops", sum)


def _cost(cost: tuple[float | None, float | None, float | None]) -> list[str]:
    seconds, peak, flops = cost
    speed = f"{format_flops(flops / seconds)}/s" if flops and seconds else "-"
    return ["-" if seconds is None else format_seconds(seconds), format_bytes(peak), format_flops(flops), speed]


def _config_section(run: RunData) -> str:
    if not run.config_text:
        return ""
    text = f'<details><summary>config.yaml</summary><pre class="config">{escape(run.config_text)}</pre></details>'
    return section("Configuration", "Every option as it was resolved, the first thing the run wrote.", text)
