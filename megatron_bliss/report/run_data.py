"""What is in a run folder, read for a report: every piece may be missing, and what is missing has a name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_bliss.base.files import read_json
from megatron_bliss.base.metrics import read_metrics
from megatron_bliss.data.provenance import read_provenance
from megatron_bliss.report.costs import read_stages
from megatron_bliss.report.speedups import CHOSEN, CONTROL

MOST_SCORES = 1_000_000
"""A larger score file is thinned evenly to about this many before it is drawn."""
FIELDS = ("domain", "format", "label")
"""Fields of the provenance by which scores are shown."""
MOST_LABELS = 40
FEWEST_UNITS = 20
"""Labels with fewer scored units have no distribution to show."""


@dataclass
class RunData:
    """The content of a run folder. ``missing`` has a line for every piece that is not there or cannot be read."""

    folder: Path
    name: str
    config_text: str = ""
    config: dict = field(default_factory=dict)
    metrics: list[dict] = field(default_factory=list)
    summary: dict | None = None
    stages: list[dict] = field(default_factory=list)
    scores: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    scores_by_field: dict[tuple[str, str], dict[str, np.ndarray]] = field(default_factory=dict)
    correlations: dict[str, dict[int, float]] = field(default_factory=dict)
    """Per arm and round, where scores predict something: rank correlation with it on held-out units."""
    samples: dict[tuple[str, int], dict] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def option(self, *names: str) -> Any:
        """Return an option of the resolved config, None where it is not known."""
        value: Any = self.config
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    @property
    def arms(self) -> list[str]:
        """The arms of the config; without one, those that left something in the folder."""
        named = self.option("arms") or []
        named = named if isinstance(named, list) else str(named).split(",")  # as older runs wrote them
        named = [str(arm).strip() for arm in named]
        found = [entry["arm"] for entry in [*self.stages, *self.metrics] if entry["arm"] != "shared"]
        return named or list(dict.fromkeys(found))

    def color(self, arm: str) -> int:
        """Series colour of an arm; bliss and random keep theirs in every plot and every run."""
        others = [name for name in self.arms if name not in (CHOSEN, CONTROL)]
        return {CHOSEN: 0, CONTROL: 1}.get(arm, 2 + others.index(arm) if arm in others else 5)

    @property
    def rounds(self) -> int | None:
        return self.option("rounds")

    @property
    def is_finished(self) -> bool:
        """Every arm has evaluated its last round."""
        done = {(record["arm"], record["round"]) for record in self.stages if record["stage"] == "evaluate"}
        return bool(self.arms) and all((arm, self.rounds) in done for arm in self.arms)

    @property
    def tokens_per_step(self) -> int | None:
        """Target tokens of one iteration, None where the config does not say."""
        batch, length = self.option("pretraining", "global_batch_size"), self.option("data", "seq_length")
        return batch * length if batch and length else None

    @property
    def round_tokens(self) -> dict[str, float]:
        """Target tokens at which each round's segment starts: {"round 1": tokens, ...}."""
        names = ("warmup_iters", "train_iters", "global_batch_size")
        warmup, train, batch = (self.option("pretraining", name) for name in names)
        length = self.option("data", "seq_length")
        if None in (warmup, train, batch, length, self.rounds):
            return {}
        return {f"round {r + 1}": (warmup + r * train) * batch * length for r in range(self.rounds)}


def read_run(folder: Path) -> RunData:
    """Read what there is in a run folder; never fails on a missing or damaged piece of it."""
    run = RunData(folder, folder.resolve().name)
    run.config_text = _piece(run, folder / "config.yaml", _read_text, "the config") or ""
    run.config = _attempt(run, "config.yaml", _parse_config, run.config_text) or {}
    run.metrics = _piece(run, folder / "metrics.jsonl", read_metrics, "curves of the stages") or []
    run.summary = _piece(run, folder / "summary.json", _read_summary, "losses, speed-up and shares of domains")
    run.stages = _attempt(run, "finished stages", read_stages, folder) or []
    for arm, number, path in _stage_files(folder, "score/scores.npy"):
        scores = _attempt(run, path.relative_to(folder), _read_scores, path)
        if scores is not None and len(scores):
            run.scores.setdefault(arm, {})[number] = scores
    for arm, number, path in _stage_files(folder, "score/scores.json"):
        correlation = _attempt(run, path.relative_to(folder), _read_correlation, path)
        if correlation is not None:
            run.correlations.setdefault(arm, {})[number] = correlation
    for arm, number, path in _stage_files(folder, "select/samples.json"):
        samples = _attempt(run, path.relative_to(folder), _read_samples, path)
        if samples is not None:
            run.samples[arm, number] = samples
    for arm, rounds in run.scores.items():
        fields = _attempt(run, f"scores of {arm} by domain", _scores_by_field, folder, arm, max(rounds))
        run.scores_by_field |= {(arm, name): groups for name, groups in (fields or {}).items()}
    _note_unfinished(run)
    return run


def joined(entries: Sequence[dict], key: str) -> dict[int, tuple[list[int], list[float]]]:
    """Return {round: (steps, values)} of a metric with rounds one after the other, whether or not steps restart."""
    curves, end = {}, 0
    for number in sorted({entry["round"] for entry in entries}):
        points = [(entry["step"], entry[key]) for entry in entries if entry["round"] == number and key in entry]
        if points:
            offset = end if min(step for step, _ in points) < end else 0
            curves[number] = ([offset + step for step, _ in points], [value for _, value in points])
            end = max(curves[number][0])
    return curves


def _stage_files(folder: Path, name: str) -> list[tuple[str, int, Path]]:
    """(arm, round, path) of a file in each round of each arm that chooses: the control's scores are noise."""
    found = []
    for path in sorted(folder.glob(f"*/round_*/{name}")):
        arm, round_name = path.relative_to(folder).parts[:2]
        number = round_name.removeprefix("round_")
        if arm != CONTROL and number.isdigit():
            found.append((arm, int(number), path))
    return found


def _attempt(run: RunData, name: object, read: Callable, *arguments: object) -> Any:
    try:
        return read(*arguments)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # damaged or foreign content: named
        run.missing.append(f"{name}: could not be read ({error})")
        return None


def _piece(run: RunData, path: Path, read: Callable, what: str) -> Any:
    if not path.exists():
        run.missing.append(f"{what}: {path.name} is not there yet")
        return None
    return _attempt(run, path.name, read, path)


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _parse_config(text: str) -> dict:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    return config if isinstance(config, dict) else {}


def _read_summary(path: Path) -> dict:
    summary = json.loads(_read_text(path))
    for arm in summary["arms"].values():
        if not all(len(point) == 2 for curve in [arm["validation_loss"], *arm["losses"].values()] for point in curve):
            raise ValueError("found a curve whose points are not [tokens, loss]")
        if not all(len(point) == 3 for curve in arm.get("tasks", {}).values() for point in curve):
            raise ValueError("found a curve of a task whose points are not [tokens, value, standard error]")
        if not all(len(point) == 2 for curve in arm.get("cost", {}).values() for point in curve):
            raise ValueError("found a curve of costs whose points are not [tokens, cost]")
    tables = ("speedups", "domains_by_field", "task_speedups", "task_facts", "sets", "gains", "equal_compute")
    return {name: {} for name in tables} | {"warnings": [], "loss_margin": 0.0} | summary


def _read_samples(path: Path) -> dict:
    samples = json.loads(_read_text(path))
    if not isinstance(samples, dict) or not all(isinstance(s, dict) for kind in samples.values() for s in kind):
        raise ValueError("expected {best: [{text, score, ...}], worst: [...]}")
    return samples


def _thin(count: int) -> slice:
    return slice(None, None, max(1, math.ceil(count / MOST_SCORES)))


def _read_scores(path: Path) -> np.ndarray:
    scores = np.load(path, mmap_mode="r", allow_pickle=False)
    scores = np.asarray(scores[_thin(len(scores))], dtype=np.float64)
    return scores[np.isfinite(scores)]


def _read_correlation(path: Path) -> float | None:
    correlation = read_json(path).get("held_out_spearman")
    return None if correlation is None else float(correlation)


def _scores_by_field(folder: Path, arm: str, number: int) -> dict[str, dict[str, np.ndarray]]:
    """Scores of one round by what the provenance of its shard says: {"domain": {label: scores}, "format": ...}."""
    shards = read_json(folder / "shards" / "done.json")
    scores = np.load(folder / arm / f"round_{number:02d}" / "score" / "scores.npy", mmap_mode="r", allow_pickle=False)
    ids = np.arange(len(scores))[_thin(len(scores))]
    table = read_provenance(str(folder / "shards" / shards["prefixes"][number]), ids)
    values = np.asarray(scores[ids], dtype=np.float64)
    result = {}
    for name in (name for name in FIELDS if name in table.column_names):
        labels = np.array([str(label) if label is not None else "" for label in table[name].to_pylist()])
        groups = {label: values[(labels == label) & np.isfinite(values)] for label in np.unique(labels) if label}
        large = sorted((g for g in groups.items() if len(g[1]) >= FEWEST_UNITS), key=lambda item: -len(item[1]))
        if len(large) > 1:
            result[name] = {str(label): group for label, group in large[:MOST_LABELS]}
    return result


def _note_unfinished(run: RunData) -> None:
    """Say which arms still have rounds to go."""
    for arm in run.arms if run.rounds else []:
        done = [record["round"] for record in run.stages if record["arm"] == arm and record["stage"] == "evaluate"]
        if len(done) < run.rounds:
            run.missing.append(f"arm {arm}: {len(done)} of {run.rounds} rounds are evaluated")
