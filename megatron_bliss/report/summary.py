"""``summary.json``: what a run was worth, as plain data, and the same as a table for the terminal.

A *curve* is a list of [target tokens, loss], in the order of the evaluations. Numbers that are not finite are not JSON:
in a summary they are null (:func:`build_summary` sees to it), and every function here leaves them out.
"""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import orjson

from megatron_bliss.base.files import read_json
from megatron_bliss.base.metrics import format_seconds
from megatron_bliss.config.stages import ROUND_STAGES, WARMUP_STAGES
from megatron_bliss.evaluation.results import Cell, columns
from megatron_bliss.report.curves import Curve, finite_points, first_reach, loss_at, speedup
from megatron_bliss.report.task_summary import (
    Measured,
    perplexity_curves,
    task_curves,
    task_facts,
    task_rows,
    task_speedup,
    task_speedup_sentence,
)

STAGE_ORDER = ("warmup", *(f"warmup {name}" for name in WARMUP_STAGES), *ROUND_STAGES)
PACKAGES = ("torch", "megatron-core", "lm-eval", "numpy", "tokenizers", "sentencepiece", "pyarrow", "jsonargparse")
CHOSEN, CONTROL = "bliss", "random"
"""The arms that the speed-up compares."""


def shares(labels: Iterable[str | None]) -> dict[str, float]:
    """Return the share of each label, the largest first; units without a label count as "(none)"."""
    counts = Counter("(none)" if label is None else str(label) for label in labels)
    total = counts.total()
    return {label: count / total for label, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}


def package_versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of those that decide the numbers."""
    from megatron_bliss import __version__

    versions = {"python": platform.python_version(), "megatron_bliss": __version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def config_digest(config_text: str) -> str:
    """Return the SHA-256 of a resolved config as it stands in ``config.yaml``."""
    return hashlib.sha256(config_text.encode()).hexdigest()


def read_stages(run_folder: Path | str) -> list[dict]:
    """Return one record {arm, round, stage, seconds, peak_bytes, flops} per finished stage, from each ``done.json``.

    The warm-up (``warmup/done.json`` or ``warmup/NAME/done.json``) has arm "shared" and round 0. Numbers that a stage
    did not note are None.
    """
    folder = Path(run_folder)
    records = []
    for path in [*folder.glob("warmup/done.json"), *folder.glob("warmup/*/done.json")]:
        parts = path.relative_to(folder).parts[:-1]
        records.append({"arm": "shared", "round": 0, "stage": " ".join(parts), **_read_cost(path)})
    for path in folder.glob("*/round_*/*/done.json"):
        arm, round_name, stage = path.relative_to(folder).parts[:-1]
        number = round_name.removeprefix("round_")
        if number.isdigit():
            records.append({"arm": arm, "round": int(number), "stage": stage, **_read_cost(path)})
    return sorted(records, key=stage_key)


def _read_cost(path: Path) -> dict:
    done = read_json(path)
    return {key: done.get(key) for key in ("seconds", "peak_bytes", "flops")}


def stage_key(record: Mapping) -> tuple:
    """Sort key of stage records: the shared warm-up, then bliss, other arms and random, each in order of work."""
    arm_rank = {"shared": 0, CHOSEN: 1, CONTROL: 3}.get(record["arm"], 2)
    stage_rank = STAGE_ORDER.index(record["stage"]) if record["stage"] in STAGE_ORDER else len(STAGE_ORDER)
    return arm_rank, record["arm"], record["round"], stage_rank, record["stage"]


def build_summary(
    evaluations: Mapping[str, Sequence[Mapping]],
    *,
    stages: Sequence[Mapping],
    domains_by_field: Mapping[str, Mapping],
    task_results: Measured | None = None,
    seed: int,
    config_text: str,
    versions: Mapping[str, str] | None = None,
) -> dict:
    """Return the content of ``summary.json``.

    evaluations: per arm the measurements of its target in order, each {"iteration": int, "tokens": int, "losses":
        {test set: loss}}; the shared warm-up's stand at the start of every arm. The first test set is the headline.
    stages: records as :func:`read_stages` returns them.
    domains_by_field: {"domain": {"pool": {label: share}, "selected": {arm: {label: share}}}, "format": ...}; the first
        field is the one of the key ``domains``, as the bliss arm selected (or the first arm, where there is none).
    task_results: per arm its checkpoints evaluated on tasks; gives every such arm ``tasks`` and ``perplexities``.
    """
    task_results = task_results or {}
    arms = {arm: _arm_summary(measured) for arm, measured in evaluations.items()}
    for arm, measured in task_results.items():
        arms[arm] |= {"tasks": task_curves(measured), "perplexities": perplexity_curves(measured)}
    losses = {arm: content["losses"] for arm, content in arms.items()}
    test_sets = list(losses.get(CONTROL, {}))
    speedups = {name: speedup(losses[CONTROL][name], losses.get(CHOSEN, {}).get(name, [])) for name in test_sets}
    first_field = next(iter(domains_by_field.values()), {"pool": {}, "selected": {}})
    selected = first_field["selected"]
    summary = {
        "arms": arms,
        "speedup": speedups[test_sets[0]] if test_sets else None,
        "speedups": speedups,
        "task_speedup": task_speedup(arms, CHOSEN, CONTROL),
        "task_speedups": {arm: task_speedup(arms, CHOSEN, arm) for arm in task_results if arm != CHOSEN},
        "task_facts": task_facts(task_results),
        "domains": {
            "pool": first_field["pool"],
            "selected": selected.get(CHOSEN, next(iter(selected.values()), {})),
        },
        "domains_by_field": domains_by_field,
        "stages": [dict(record) for record in stages],
        "seed": seed,
        "versions": dict(package_versions() if versions is None else versions),
        "config_digest": config_digest(config_text),
    }
    return orjson.loads(orjson.dumps(summary, option=orjson.OPT_SERIALIZE_NUMPY))  # NaN and infinity become null


def _arm_summary(measured: Sequence[Mapping]) -> dict:
    names = list(dict.fromkeys(name for one in measured for name in one["losses"]))
    losses = {
        name: [[one["tokens"], one["losses"][name]] for one in measured if name in one["losses"]] for name in names
    }
    return {
        "validation_loss": losses[names[0]] if names else [],
        "losses": losses,
        "iterations": [one["iteration"] for one in measured],
    }


def final_losses(summary: Mapping) -> dict[str, dict[str, float | None]]:
    """Return {test set: {arm: last finite loss}} in the order of the summary."""
    names = dict.fromkeys(name for arm in summary["arms"].values() for name in arm["losses"])
    result = {}
    for name in names:
        curves = {arm: finite_points(content["losses"].get(name, [])) for arm, content in summary["arms"].items()}
        result[name] = {arm: points[-1][1] if points else None for arm, points in curves.items()}
    return result


def speedup_sentence(summary: Mapping, test_set: str | None = None, chosen: str = CHOSEN) -> str:
    """Say an arm's speed-up on a test set (default: the first) in one plain sentence, also where there is none."""
    arms = summary["arms"]
    for arm in (CONTROL, chosen):
        if arm not in arms or not finite_points(_curve(arms[arm], test_set)):
            return f"No speed-up: it needs losses of the arms {chosen} and {CONTROL}; those of {arm} are missing."
    control, curve = _curve(arms[CONTROL], test_set), _curve(arms[chosen], test_set)
    end, goal = finite_points(control)[-1]
    reached = first_reach(curve, goal)
    if reached is None:
        best = min(loss for _, loss in finite_points(curve))
        return f"No speed-up: {chosen} never reached {CONTROL}'s final loss {goal:.4g} (its best: {best:.4g})."
    step, last = _step(arms[chosen], reached), _step(arms[CONTROL], end)
    place = f"at {reached:,.0f} of {end:,.0f} tokens" if None in (step, last) else f"at step {step:,.0f} of {last:,.0f}"
    ratio = speedup(control, curve)
    if ratio is None:
        return f"No speed-up: {chosen} had {CONTROL}'s final loss {goal:.4g} before its first step."
    change = f"{ratio:.2f}x fewer steps" if ratio >= 1 else f"{1 / ratio:.2f}x more steps"
    return f"{chosen} reached {CONTROL}'s final loss {goal:.4g} {place}: {change}."


def other_speedups(summary: Mapping) -> list[str]:
    """The same for every other arm of a run with a control."""
    others = [arm for arm in summary["arms"] if arm not in (CHOSEN, CONTROL)]
    return [speedup_sentence(summary, chosen=arm) for arm in others if CONTROL in summary["arms"]]


def _curve(arm: Mapping, test_set: str | None) -> Curve:
    return arm["validation_loss"] if test_set is None else arm["losses"].get(test_set, [])


def _step(arm: Mapping, tokens: float) -> float | None:
    """Target step of an arm at which it had seen ``tokens``, between its evaluations."""
    curve = arm["validation_loss"]
    if len(curve) != len(arm["iterations"]):
        return None
    return loss_at([[x, step] for (x, _), step in zip(curve, arm["iterations"], strict=True)], tokens)


def lift(selected: float, pool: float) -> float | None:
    """Return by what factor selection raised a label's share; None for a label that is not in the pool."""
    return selected / pool if pool else None


def by_lift(pool: Mapping[str, float], selected: Mapping[str, float]) -> list[tuple[str, float, float, float | None]]:
    """Return (label, share of the pool, share of the selection, lift), the most favoured label first."""
    labels = dict.fromkeys([*pool, *selected])
    rows = [(label, pool.get(label, 0.0), selected.get(label, 0.0)) for label in labels]
    rows = [(label, a, b, lift(b, a)) for label, a, b in rows]
    return sorted(rows, key=lambda row: (-(row[3] or 0.0), -row[1], row[0]))


def format_bytes(count: float | None) -> str:
    """Return a size as "812 MiB" or "1.4 GiB"; "-" where it is not known."""
    if count is None:
        return "-"
    for unit, size in (("TiB", 2**40), ("GiB", 2**30)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**20:.0f} MiB"


def format_flops(count: float | None) -> str:
    """Return a number of operations as "1.2 TFLOP"; "-" where it is not known."""
    if not count:
        return "-"
    for unit, size in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if count >= size:
            return f"{count / size:.1f} {unit}FLOP"
    return f"{count / 1e6:.1f} MFLOP"


def format_table(summary: Mapping, *, loss_rows: int = 6, label_rows: int = 16) -> str:
    """Return the summary as plain text of at most about 100 columns, for the end of a run.

    loss_rows, label_rows: most rows of the table of losses and of each table of shares (the extremes are kept).
    """
    blocks = [_loss_block(summary, loss_rows), _final_block(summary), _speedup_block(summary), _task_block(summary)]
    blocks += [_shares_block(field, content, label_rows) for field, content in summary["domains_by_field"].items()]
    return "\n\n".join(block for block in [*blocks, _stage_block(summary["stages"])] if block)


def align(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a titled table as aligned text; the first ``left`` columns are flush left, the others flush right."""
    cells = [[_clip(str(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join(
        [title, *(f"  {line}" for line in [lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])]
    )


def _clip(text: str, width: int = 36) -> str:
    """Cut a cell to a width and drop what could move a terminal's cursor."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= width else text[: width - 3] + "..."


def _loss_text(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


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
        row = [f"{x:,.0f}", *map(_loss_text, losses.values())]
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
        row = [name, *(_loss_text(losses[arm]) for arm in arms)]
        if _versus(arms):
            ratio = summary["speedups"].get(name)
            row += [_difference(losses[CHOSEN], losses[CONTROL]), "-" if ratio is None else f"{ratio:.2f}x"]
        rows.append(row)
    header = ["test set", *arms, *([f"{CHOSEN} - {CONTROL}", "speed-up"] if _versus(arms) else [])]
    return align("Final losses", header, rows)


def _speedup_block(summary: Mapping) -> str:
    return "\n  ".join([f"Speed-up ({_first_test_set(summary)})", speedup_sentence(summary), *other_speedups(summary)])


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
    rows = [[arm, stage, str(len(records)), *_cost_cells(records)] for (arm, stage), records in groups.items()]
    rows.append(["total", "", str(len(stages)), *_cost_cells(stages)])
    header = ["arm", "stage", "runs", "time", "peak memory", "work"]
    return align("Time, peak memory of a process and work per stage", header, rows, left=2)


def _cost_cells(records: Sequence[Mapping]) -> list[str]:
    """Seconds and FLOPs add up over the runs of a stage; of the peaks the largest counts."""
    seconds = [record["seconds"] for record in records if record.get("seconds") is not None]
    peaks = [record["peak_bytes"] for record in records if record.get("peak_bytes") is not None]
    flops = [record["flops"] for record in records if record.get("flops") is not None]
    time = format_seconds(sum(seconds)) if seconds else "-"
    return [time, format_bytes(max(peaks, default=None)), format_flops(sum(flops))]
