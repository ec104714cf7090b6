"""A summary as text for the terminal: aligned tables of losses, speed-ups, shares and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_bliss.base.text import align, format_loss
from megatron_bliss.evaluation.results import Cell, columns
from megatron_bliss.report.costs import stage_key, total_cost
from megatron_bliss.report.curves import finite_points, loss_at
from megatron_bliss.report.gain_table import MEASURES, gain_rows
from megatron_bliss.report.savings import savings_sentences
from megatron_bliss.report.speedups import CHOSEN, CONTROL, other_speedups, speedup_sentence
from megatron_bliss.report.summary import by_lift, final_losses, lift
from megatron_bliss.report.task_summary import bits_rows, bits_text, task_rows, task_speedup_sentence


def format_table(summary: Mapping, *, loss_rows: int = 6, label_rows: int = 16) -> str:
    """Return the summary as plain text of at most about 100 columns, for the end of a run.

    loss_rows, label_rows: most rows of the table of losses and of each table of shares (the extremes are kept).
    """
    blocks = [_loss_block(summary, loss_rows), _final_block(summary), _speedup_block(summary), _gain_block(summary)]
    blocks += [_task_block(summary), _bits_block(summary)]
    blocks += [_shares_block(field, content, label_rows) for field, content in summary["domains_by_field"].items()]
    blocks += [_stage_block(summary["stages"]), "\n".join(f"warning: {text}" for text in summary["warnings"])]
    return "\n\n".join(block for block in blocks if block)


def _difference(first: float | None, second: float | None) -> str:
    return "-" if first is None or second is None else f"{first - second:+.4f}"


def _versus(arms: Sequence[str]) -> bool:
    return CHOSEN in arms and CONTROL in arms


def _loss_block(summary: Mapping, most: int) -> str:
    arms = summary["arms"]
    if not arms:
        return "Validation loss: no evaluation has finished yet."
    curves = {arm: content["validation_loss"] for arm, content in arms.items()}
    tokens = sorted({x for curve in curves.values() for x, _ in finite_points(curve)})
    if len(tokens) > most:
        tokens = [tokens[round(i * (len(tokens) - 1) / (most - 1))] for i in range(most)]
    rows = []
    for x in tokens:
        losses = {arm: loss_at(curve, x) for arm, curve in curves.items()}
        row = [f"{x:,.0f}", *map(format_loss, losses.values())]
        rows.append(row + [_difference(losses.get(CHOSEN), losses.get(CONTROL))] * _versus(arms))
    header = ["target tokens", *arms, *[f"{CHOSEN} - {CONTROL}"] * _versus(arms)]
    return align(f"Validation loss at equal target tokens ({_first_test_set(summary)})", header, rows, left=0)


def _first_test_set(summary: Mapping) -> str:
    return next((name for content in summary["arms"].values() for name in content["losses"]), "no test set")


def _final_block(summary: Mapping) -> str:
    finals = final_losses(summary)
    if not finals:
        return ""
    arms = list(summary["arms"])
    rows = []
    for name, losses in finals.items():
        row = [name, *(format_loss(losses[arm]) for arm in arms)]
        if _versus(arms):
            ratio = summary["speedups"].get(name)
            row += [_difference(losses[CHOSEN], losses[CONTROL]), "-" if ratio is None else f"{ratio:.2f}x"]
        rows.append(row)
    header = ["test set", *arms, *([f"{CHOSEN} - {CONTROL}", "speed-up"] if _versus(arms) else [])]
    return align("Final losses", header, rows)


def _speedup_block(summary: Mapping) -> str:
    return "\n  ".join([f"Speed-up ({_first_test_set(summary)})", speedup_sentence(summary), *other_speedups(summary)])


def _gain_block(summary: Mapping) -> str:
    """Gain and loss of every arm on every set, and what selection cost, as far as they are known."""
    rows = gain_rows(summary)
    lines = [[name, kind, arm, *(cell.text for cell in cells)] for name, kind, arm, cells in rows]
    title = f"Loss, and gain over {CONTROL}, of every arm on every set"
    table = align(title, ["set", "kind", "arm", *MEASURES.values()], lines, left=3) if rows else ""
    sentences = savings_sentences(summary)
    costs = "\n  ".join(["Cost of selection", *sentences]) if sentences else ""
    return "\n\n".join(block for block in (table, costs) if block)


def _task_block(summary: Mapping) -> str:
    """Task results of the last checkpoints, or "" where there are none."""
    rows = task_rows(summary["arms"])
    names = columns(rows.values())
    if not names:
        return ""
    shown = [(tokens, arm or "warm-up", row) for (tokens, arm), row in rows.items()]
    lines = [[arm, f"{tokens:,.0f}", *(row.get(name, Cell()).text for name in names)] for tokens, arm, row in shown]
    sentences = [task_speedup_sentence(summary["arms"], CHOSEN, arm) for arm in summary["task_speedups"]]
    table = align("Tasks, zero-shot, percent ± standard error", ["arm", "target tokens", *names], lines)
    return "\n  ".join([table, *(text for text in sentences if text)])


def _bits_block(summary: Mapping) -> str:
    """Bits per byte of the right answers of the last checkpoints, or "" where there are none."""
    rows = bits_rows(summary["arms"])
    names = columns(rows.values())
    lines = [
        [arm or "warm-up", f"{tokens:,.0f}", *(bits_text(row.get(name, Cell())) for name in names)]
        for (tokens, arm), row in rows.items()
    ]
    title = "Tasks, bits per byte of the right answer ± standard error, lower is better"
    return align(title, ["arm", "target tokens", *names], lines) if names else ""


def _shares_block(field: str, content: Mapping, most: int) -> str:
    selected = content["selected"]
    if not content["pool"] or not selected:
        return ""
    first = CHOSEN if CHOSEN in selected else next(iter(selected))
    arms = [first, *(arm for arm in selected if arm != first)]
    table = []
    for label, pool, _, _ in by_lift(content["pool"], selected[first]):
        row = [label, f"{pool:.1%}"]
        for arm in arms:
            share = selected[arm].get(label, 0.0)
            factor = lift(share, pool)
            row += [f"{share:.1%}", "-" if factor is None else f"{factor:.2f}x"]
        table.append(row)
    header = [field, "pool", *(text for arm in arms for text in (arm, "ratio"))]
    if len(table) > most:
        left_out = len(table) - most
        middle = [f"({left_out} more in summary.json)", *[""] * (len(header) - 1)]
        table = [*table[: most - most // 2], middle, *table[-(most // 2) :]]
    return align(f"Share of units in the pool and in the selection, by {field}", header, table)


def _stage_block(stages: Sequence[Mapping]) -> str:
    if not stages:
        return ""
    groups: dict[tuple[str, str], list[Mapping]] = {}
    for record in sorted(stages, key=stage_key):
        groups.setdefault((record["arm"], record["stage"]), []).append(record)
    rows = [[arm, stage, str(len(records)), *total_cost(records).cells] for (arm, stage), records in groups.items()]
    rows.append(["total", "", str(len(stages)), *total_cost(stages).cells])
    header = ["arm", "stage", "runs", "time", "peak memory", "work"]
    return align("Time, peak memory of a process and work per stage", header, rows, left=2)
