"""What ``summary.json`` says of task results: curves per arm over target tokens, and the speed-up on their average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_bliss.evaluation.results import AVERAGE, Cell, cells
from megatron_bliss.report.curves import rise_reach, rise_speedup

Measured = Mapping[str, Sequence[Mapping]]
"""Per arm its checkpoints in order, the shared warm-up's first: {"tokens": int, "result": document of a result}."""


def task_curves(measured: Sequence[Mapping]) -> dict[str, list[list[float | None]]]:
    """{task: [[tokens, value, stderr], ...]} of an arm, "average" last."""
    curves: dict[str, list] = {}
    for one in measured:
        for name, cell in cells(one["result"]).items():
            curves.setdefault(name, []).append([one["tokens"], *cell])
    if AVERAGE in curves:
        curves[AVERAGE] = curves.pop(AVERAGE)
    return curves


def perplexity_curves(measured: Sequence[Mapping]) -> dict[str, list[list[float]]]:
    """{task: [[tokens, perplexity], ...]} of the tasks that have one."""
    curves: dict[str, list] = {}
    for one in measured:
        for name, task in one["result"]["tasks"].items():
            if "perplexity" in task["metrics"]:
                curves.setdefault(name, []).append([one["tokens"], task["metrics"]["perplexity"]])
    return curves


def bits_curves(measured: Sequence[Mapping]) -> dict[str, list[list[float]]]:
    """{task: [[tokens, bits per byte of the right answer, stderr], ...]}; results of before have none."""
    curves: dict[str, list] = {}
    for one in measured:
        for name, task in one["result"]["tasks"].items():
            if task.get("bits_per_byte") is not None:
                bits = task["bits_per_byte"], task["bits_per_byte_stderr"]
                curves.setdefault(name, []).append([one["tokens"], *bits])
    return curves


def all_task_curves(measured: Sequence[Mapping]) -> dict[str, dict]:
    """What an arm of a summary has of its tasks."""
    curves = {"tasks": task_curves(measured), "perplexities": perplexity_curves(measured)}
    return curves | {"bits_per_byte": bits_curves(measured)}


def task_facts(measured: Measured) -> dict:
    """What the numbers are: lm-eval's version, and per task its metric, items and data file; {} without results."""
    results = [one["result"] for points in measured.values() for one in points]
    if not results:
        return {}
    keys = ("metric", "num_items", "chance", "data")
    tasks = {name: {key: task.get(key) for key in keys} for name, task in results[-1]["tasks"].items()}
    averaged = results[-1]["average_tasks"]
    return {"lm_eval_version": results[-1]["lm_eval_version"], "average_tasks": averaged, "tasks": tasks}


def average_curve(arm: Mapping) -> list:
    """[[tokens, value, stderr], ...] of an arm of a summary; empty without tasks."""
    return arm.get("tasks", {}).get(AVERAGE, [])


def task_speedup(arms: Mapping[str, Mapping], chosen: str, other: str) -> float | None:
    """Steps at which ``other`` ends / steps at which ``chosen`` first has the average that it ends with, or None."""
    return rise_speedup(*(average_curve(arms.get(name, {})) for name in (other, chosen)))


def task_speedup_sentence(arms: Mapping[str, Mapping], chosen: str, other: str) -> str:
    """Say in words what :func:`task_speedup` says in a number, with the averages and their errors; "" without tasks."""
    curves = {name: average_curve(arms.get(name, {})) for name in (chosen, other)}
    if not all(curves.values()):
        return ""
    ends = {name: Cell(*curve[-1][1:]) for name, curve in curves.items()}
    said = f"Average over the tasks: {chosen} ends at {ends[chosen].text}, {other} at {ends[other].text}"
    reached, end = rise_reach(curves[chosen], ends[other].value or 0.0), curves[other][-1][0]
    if reached is None:
        return f"{said}; {chosen} never reached {other}'s."
    ratio = task_speedup(arms, chosen, other)
    if ratio is None or reached <= curves[chosen][0][0]:
        return f"{said}; the shared warm-up had as much: no speed-up can be told."
    change = f"{ratio:.2f}x fewer steps" if ratio >= 1 else f"{1 / ratio:.2f}x more steps"
    return f"{said}; {chosen} reached {other}'s at {reached:,.0f} of {end:,.0f} tokens: {change}."


def task_rows(arms: Mapping[str, Mapping]) -> dict[tuple[float, str], dict[str, Cell]]:
    """{(tokens, arm): {task: cell}} in order of tokens; the warm-up, which all arms share, stands once as arm ""."""
    return _rows(arms, "tasks")


def bits_rows(arms: Mapping[str, Mapping]) -> dict[tuple[float, str], dict[str, Cell]]:
    """The same with bits per byte of the right answers in the cells; without an average, since bytes are not alike."""
    return _rows(arms, "bits_per_byte")


def bits_text(cell: Cell) -> str:
    """Such as ``1.234 ± 0.010``; ``-`` where there is none."""
    return "-" if cell.value is None else f"{cell.value:.3f} ± {cell.stderr or 0.0:.3f}"


def _rows(arms: Mapping[str, Mapping], key: str) -> dict[tuple[float, str], dict[str, Cell]]:
    rows: dict[tuple[float, str], dict[str, Cell]] = {}
    for arm, content in arms.items():
        for name, curve in content.get(key, {}).items():
            for tokens, value, stderr in curve:
                rows.setdefault((tokens, arm), {})[name] = Cell(value, stderr)
    first = min((tokens for tokens, _ in rows), default=None)
    same = [key for key in rows if key[0] == first]
    if len(same) > 1 and all(rows[key] == rows[same[0]] for key in same):
        rows[first, ""] = rows[same[0]]
        for key in same:
            del rows[key]
    return dict(sorted(rows.items(), key=lambda item: item[0][0]))
