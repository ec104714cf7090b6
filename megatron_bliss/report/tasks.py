"""The report's section on tasks: results per round and arm side by side, and the average over pre-training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_bliss.evaluation.results import AVERAGE, Cell, best, columns, measure
from megatron_bliss.report.curves import finite_points, rise_reach
from megatron_bliss.report.parts import escape, figure, pairs, section, table
from megatron_bliss.report.plots import Line, Marks, line_chart
from megatron_bliss.report.run_data import RunData
from megatron_bliss.report.speedups import CHOSEN, CONTROL
from megatron_bliss.report.task_summary import bits_rows, bits_text, task_rows, task_speedup_sentence

MOST_FIGURES = 12
"""Tasks with a plot of their own."""


def task_section(run: RunData) -> str:
    """The section, or "" for a run without tasks."""
    arms = {arm: content for arm, content in (run.summary or {}).get("arms", {}).items() if content.get("tasks")}
    if not arms:
        return ""
    names = columns(content["tasks"] for content in arms.values())
    others = [arm for arm in run.summary["task_speedups"] if arm in arms]
    sentences = [task_speedup_sentence(arms, CHOSEN, arm) for arm in others]
    words = "".join(f"<p>{escape(text[:1].upper() + text[1:])}</p>" for text in sentences if text)
    figures = [_figure(run, arms, AVERAGE, is_wide=True)] if AVERAGE in names else []
    single = [name for name in names if name != AVERAGE][:MOST_FIGURES]
    small = [_figure(run, arms, name, is_wide=False) for name in single if len(single) > 1]
    small += [_perplexity_figure(run, arms, name) for name in columns(_perplexities(c) for c in arms.values())]
    return section(
        "Tasks, zero-shot", _note(run), words, _table(run, arms, names), _bits(run, arms), *figures, pairs(small)
    )


def _perplexities(arm: Mapping) -> Mapping:
    return arm.get("perplexities", {})


def _note(run: RunData) -> str:
    """What was measured, in words: items, metric, chance, version."""
    facts = run.summary["task_facts"]
    parts = [f"{name}: {measure(task)}" for name, task in facts.get("tasks", {}).items()]
    text = (
        f"Percent ± standard error of the target after its warm-up and after each round. {'; '.join(parts)}. "
        f"lm-eval {facts.get('lm_eval_version', 'unknown')}. Differences of a standard error or two may be chance."
    )
    return escape(text)


def _place(run: RunData, tokens: float, arm: str) -> list[str]:
    """When and who: ["round 1", "bliss", "200"]; tokens where the config does not say how many a step takes."""
    size, warmup = run.tokens_per_step, run.option("pretraining", "warmup_iters")
    train = run.option("pretraining", "train_iters")
    if not size or warmup is None or not train:
        return ["", arm or "all arms", f"{tokens:,.0f} tokens"]
    number = round((tokens / size - warmup) / train)
    return [f"round {number}" if number else "warm-up", arm or "all arms", f"{tokens / size:,.0f}"]


def _table(run: RunData, arms: Mapping[str, Mapping], names: Sequence[str]) -> str:
    """A row per checkpoint; among the arms of a round the best value of each task is bold."""
    rows = task_rows(arms)
    marked = set().union(*(best(_at(rows, tokens)) for tokens, _ in rows)) if rows else set()
    perplexities = columns(_perplexities(content) for content in arms.values())
    lines, last = [], None
    for (tokens, arm), row in rows.items():
        when, who, step = _place(run, tokens, arm)
        cells = "".join(_cell(row.get(name, Cell()).text, ((tokens, arm), name) in marked) for name in names)
        cells += "".join(_cell(_perplexity(arms, arm, name, tokens), False) for name in perplexities)
        shown = "" if when and when == last else when
        lines.append(
            f'<tr><td class="label">{escape(shown)}</td><td class="label">{escape(who)}</td>{_cell(step)}{cells}</tr>'
        )
        last = when
    heads = ["step", *names, *(f"{name} perplexity" for name in perplexities)]
    head = "<th></th><th></th>" + "".join(f'<th class="number">{escape(text)}</th>' for text in heads)
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _bits(run: RunData, arms: Mapping[str, Mapping]) -> str:
    """A row per checkpoint: how likely the right answers are, which tells where accuracies are noise; "" without."""
    rows = bits_rows(arms)
    names = columns(rows.values())
    if not names:
        return ""
    lines = [
        [*_place(run, tokens, arm), *(bits_text(row.get(name, Cell())) for name in names)]
        for (tokens, arm), row in rows.items()
    ]
    words = (
        "Bits per byte of the right answer, lower is better: -log2 of its probability by its bytes in UTF-8, mean ± "
        "standard error over the items."
    )
    return f"<p>{escape(words)}</p>\n{table(['', '', 'step', *names], lines, left=2)}"


def _at(rows: Mapping[tuple[float, str], Mapping], tokens: float) -> dict:
    return {key: row for key, row in rows.items() if key[0] == tokens}


def _cell(text: str, is_best: bool = False) -> str:
    shown = f"<b>{escape(text)}</b>" if is_best else escape(text)
    return f'<td class="number">{shown}</td>'


def _perplexity(arms: Mapping[str, Mapping], arm: str, name: str, tokens: float) -> str:
    """Of an arm, or, for the warm-up, of any."""
    curves = [_perplexities(arms[a]).get(name, []) for a in ([arm] if arm else arms)]
    found = [value for curve in curves for x, value in curve if x == tokens and value is not None]
    return f"{found[0]:,.4g}" if found else "-"


def _figure(run: RunData, arms: Mapping[str, Mapping], name: str, *, is_wide: bool) -> str:
    """A task's curves in percent over steps; for the average also where bliss has what random ends with."""
    unit, label = (run.tokens_per_step, "pre-training steps") if run.tokens_per_step else (1, "target tokens")
    lines = []
    for arm, content in arms.items():
        points = [point for point in content["tasks"].get(name, []) if point[1] is not None]
        x, y = [point[0] / unit for point in points], [100 * point[1] for point in points]
        error = [100 * (point[2] or 0.0) for point in points]
        lines.append(Line(arm, x, y, run.color(arm), markers=True, error=error))
    goal = {line.label: line.y[-1] for line in lines if line.y}.get(CONTROL)
    chosen = [list(zip(line.x, line.y, strict=True)) for line in lines if line.label == CHOSEN]
    reached = rise_reach(chosen[0], goal) if chosen and goal is not None else None
    boundaries = {text: tokens / unit for text, tokens in run.round_tokens.items()} if is_wide else {}
    marks = Marks(boundaries, goal, None if reached is None else (reached, goal))
    svg = line_chart(lines, title=f"task {name}", x_label=label, marks=marks, wide=is_wide)
    title = "Average over the tasks, percent" if name == AVERAGE else f"{name}, percent"
    caption = "Band: one standard error. The first point is the shared warm-up."
    caption += f" Dashed: where {CONTROL} ends; ring: where {CHOSEN} first is there." if goal is not None else ""
    return figure(title, escape(caption), svg, {line.label: line.color for line in lines})


def _perplexity_figure(run: RunData, arms: Mapping[str, Mapping], name: str) -> str:
    unit, label = (run.tokens_per_step, "pre-training steps") if run.tokens_per_step else (1, "target tokens")
    lines = []
    for arm, content in arms.items():
        points = finite_points(_perplexities(content).get(name, []))
        lines.append(Line(arm, [x / unit for x, _ in points], [y for _, y in points], run.color(arm), markers=True))
    svg = line_chart(lines, title=f"perplexity {name}", x_label=label, log_y=True)
    caption = "Of the word to be told; lower is better."
    return figure(f"{name}, perplexity", caption, svg, {line.label: line.color for line in lines})
