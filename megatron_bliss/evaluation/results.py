"""Results as the paper prints them: a row per checkpoint, a column per task and their average, in percent ± error.

A *result* is the document that ``evaluate_tasks`` returns and ``results.json`` holds; its format is 1.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_bliss.base.files import atomic_file, read_json, write_json
from megatron_bliss.evaluation.checksums import KNOWN

FORMAT = 1
AVERAGE = "average"
RESULTS_FILE, TABLE_FILE = "results.json", "results.md"


class Cell(NamedTuple):
    """A value and its standard error as shares of 1; None where they are not known."""

    value: float | None = None
    stderr: float | None = None

    @property
    def text(self) -> str:
        """In percent: ``43.4 ± 1.6``, without its error ``43.4``, ``-`` where there is none."""
        if self.value is None:
            return "-"
        error = "" if self.stderr is None else f" ± {100 * self.stderr:.1f}"
        return f"{100 * self.value:.1f}{error}"


def write_results(folder: Path | str, result: Mapping, label: str) -> None:
    """Write ``results.json`` and ``results.md`` into a folder."""
    write_json(Path(folder) / RESULTS_FILE, dict(result))
    with atomic_file(Path(folder) / TABLE_FILE, "w") as file:
        file.write(markdown({label: result}))


def read_results(path: Path | str) -> dict:
    """Read a ``results.json``; ValueError where it is not one."""
    result = read_json(path)
    if result.get("format") != FORMAT or not isinstance(result.get("tasks"), dict) or not result["tasks"]:
        raise ValueError(f"found no results of format {FORMAT} in {path}, expected a file that an evaluation wrote")
    for name, task in result["tasks"].items():
        missing = [key for key in ("metric", "value", "num_items") if key not in task]
        if missing:
            raise ValueError(f"found task {name} without {', '.join(missing)} in {path}, expected a whole file")
    return result


def find_results(path: Path | str, *, every_round: bool = False) -> dict[str, dict]:
    """{label: result} of a file, of a folder with ``results.json``, or of a run folder: its arms' last rounds, or all.

    ValueError where nothing was evaluated there.
    """
    path = Path(path)
    if path.is_file():
        return {path.parent.name if path.name == RESULTS_FILE else path.stem: read_results(path)}
    if (path / RESULTS_FILE).is_file():
        return {path.resolve().name: read_results(path / RESULTS_FILE)}
    found: dict[str, dict[str, dict]] = {}
    for file in sorted(path.glob(f"*/round_*/evaluate/{RESULTS_FILE}")):
        arm, number = file.parts[-4], file.parts[-3].removeprefix("round_").lstrip("0")
        label, result = f"{arm}, round {number}", read_results(file)
        found[arm] = {**found.get(arm, {}), label: result} if every_round else {label: result}
    warmup = path / "warmup" / "evaluate" / RESULTS_FILE
    if warmup.is_file() and (every_round or not found):
        found = {"warmup": {"warm-up": read_results(warmup)}, **found}
    if not found:
        raise ValueError(
            f"found no {RESULTS_FILE} in {path}, expected a run that was evaluated on tasks, or what "
            "tools/evaluate.py wrote"
        )
    name = path.resolve().name
    return {f"{name}: {label}": result for rows in found.values() for label, result in rows.items()}


def cells(result: Mapping) -> dict[str, Cell]:
    """{task: cell} of a result in its order, then the average with the standard error of independent tasks."""
    found = {name: Cell(task["value"], task.get("stderr")) for name, task in result["tasks"].items()}
    return {**found, AVERAGE: average([found[name] for name in result.get("average_tasks", found)])}


def average(parts: Sequence[Cell]) -> Cell:
    """Mean of several cells; its standard error is that of a mean of independent numbers."""
    if not parts or any(part.value is None for part in parts):
        return Cell()
    errors = [part.stderr for part in parts]
    stderr = None if None in errors else math.hypot(*errors) / len(parts)
    return Cell(sum(part.value for part in parts) / len(parts), stderr)


def best(rows: Mapping[Hashable, Mapping[str, Cell]]) -> set[tuple[Hashable, str]]:
    """(row, column) of the highest value of each column that several rows have; ties are all best."""
    marked = set()
    for column in columns(rows.values()):
        values = {label: row[column].value for label, row in rows.items() if column in row}
        values = {label: value for label, value in values.items() if value is not None}
        if len(values) > 1:
            top = max(values.values())
            marked |= {(label, column) for label, value in values.items() if value == top}
    return marked


def columns(rows: Iterable[Mapping[str, Cell]]) -> list[str]:
    """Columns of all rows in the order they come, the average last."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name != AVERAGE] + [AVERAGE] * (AVERAGE in names)


def markdown(results: Mapping[str, Mapping]) -> str:
    """Several results side by side as one Markdown table, the best of each column bold; then what they were made with.

    results: {label of the row: result}.
    """
    rows = {label: cells(result) for label, result in results.items()}
    names, marked = columns(rows.values()), best(rows)
    if not do_compare(results):
        marked = {(label, name) for label, name in marked if name != AVERAGE}
    lines = [_line(["", *names]), _line(["---", *["---:"] * len(names)])]
    for label, row in rows.items():
        texts = [row.get(name, Cell()).text for name in names]
        shown = [f"**{text}**" if (label, name) in marked else text for name, text in zip(names, texts, strict=True)]
        lines.append(_line([_escape(label), *shown]))
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes(results)) + "\n"


def notes(results: Mapping[str, Mapping]) -> list[str]:
    """Sentences on what the numbers are: metrics, items, averages, versions, and what does not compare."""
    tasks: dict[str, dict[str, None]] = {}
    for result in results.values():
        for name, task in result["tasks"].items():
            tasks.setdefault(name, {})[measure(task)] = None
    parts = [f"{name}: {' or '.join(kinds)}" for name, kinds in tasks.items()]
    sentences = [f"Percent ± standard error, zero-shot. Metric and items: {'; '.join(parts)}."]
    sentences += [f"Perplexity: {text}." for text in [_perplexities(results)] if text]
    sentences += [f"Bits per byte of the right answer: {text}." for text in [_bits_per_byte(results)] if text]
    if not do_compare(results):
        sentences.append("**The rows are not over the same tasks or items: their averages do not compare.**")
    versions = dict.fromkeys(str(result.get("lm_eval_version", "unknown")) for result in results.values())
    sentences.append(f"lm-eval {' and '.join(versions)}.")
    found = {name: [result["tasks"].get(name) for result in results.values()] for name in tasks if name in KNOWN}
    strange = [name for name, several in found.items() if any(_is_unknown(task) for task in several)]
    if strange:
        sentences.append(f"Other data than the known sets: {', '.join(strange)}.")
    return sentences


def measure(task: Mapping) -> str:
    """What a task's value is, in words: "acc of 1,000 items, chance 25%"."""
    chance = f", chance {task['chance']:.0%}" if task.get("chance") else ""
    return f"{task['metric']} of {task['num_items']:,} items{chance}"


def do_compare(results: Mapping[str, Mapping]) -> bool:
    """Whether all averages are over the same tasks and items."""
    kinds = set()
    for result in results.values():
        averaged = result.get("average_tasks", result["tasks"])
        tasks = result["tasks"]
        kinds.add(tuple((name, tasks[name]["metric"], tasks[name]["num_items"]) for name in averaged))
    return len(kinds) <= 1


def _perplexities(results: Mapping[str, Mapping]) -> str:
    found = [
        f"{label}: {name} {task['metrics']['perplexity']:,.4g}"
        for label, result in results.items()
        for name, task in result["tasks"].items()
        if task.get("metrics", {}).get("perplexity") is not None
    ]
    return "; ".join(_escape(text) for text in found)


def _bits_per_byte(results: Mapping[str, Mapping]) -> str:
    found = [
        f"{label}: {name} {task['bits_per_byte']:.3f} ± {task['bits_per_byte_stderr']:.3f}"
        for label, result in results.items()
        for name, task in result["tasks"].items()
        if task.get("bits_per_byte") is not None
    ]
    return "; ".join(_escape(text) for text in found)


def _is_unknown(task: Mapping | None) -> bool:
    return task is not None and not task.get("data", {}).get("known", True)


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _escape(text: str) -> str:
    """A label that cannot end its cell or begin markup."""
    return "".join(f"\\{mark}" if mark in "|*_<>`[]\\" else mark for mark in " ".join(str(text).split()))
