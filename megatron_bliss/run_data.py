"""What is in a run folder, read for a report: every piece may be missing, and what is missing has a name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import yaml

from megatron_bliss.metrics import read_metrics
from megatron_bliss.summary import read_stages

MOST_SCORES = 1_000_000
"""A larger score file is thinned evenly to about this many before it is drawn."""
MOST_DOMAINS = 40
FEWEST_UNITS = 20
"""Domains with fewer scored units have no distribution to show."""


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
    scores_by_domain: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
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
        named = [arm.strip() for arm in str(self.option("arms") or "").split(",") if arm.strip()]
        found = [entry["arm"] for entry in [*self.stages, *self.metrics] if entry["arm"] != "shared"]
        return named or list(dict.fromkeys(found))

    @property
    def rounds(self) -> int | None:
        return self.option("rounds")

    @property
    def is_finished(self) -> bool:
        """Every arm has evaluated its last round."""
        done = {(record["arm"], record["round"]) for record in self.stages if record["stage"] == "evaluate"}
        return bool(self.arms) and all((arm, self.rounds) in done for arm in self.arms)

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
    run.config_text = (
        _piece(run, folder / "config.yaml", lambda path: path.read_text(encoding="utf-8"), "the config") or ""
    )
    run.config = _read_config(run)
    run.metrics = _piece(run, folder / "metrics.jsonl", read_metrics, "curves of the stages") or []
    run.summary = _piece(run, folder / "summary.json", _read_summary, "losses, speed-up and shares of domains")
    run.stages = _attempt(run, "finished stages", lambda: read_stages(folder)) or []
    for path in sorted(folder.glob("*/round_*/score/scores.npy")):
        scores = _attempt(run, path.relative_to(folder), lambda path=path: _read_scores(path))
        if scores is not None and len(scores):
            run.scores.setdefault(path.parts[-4], {})[_round(path.parent)] = scores
    for path in sorted(folder.glob("*/round_*/select/samples.json")):
        samples = _attempt(run, path.relative_to(folder), lambda path=path: _read_samples(path))
        if samples is not None:
            run.samples[path.parts[-4], _round(path.parent)] = samples
    run.scores_by_domain = _attempt(run, "scores by domain", lambda: _read_scores_by_domain(run)) or {}
    _note_unfinished(run)
    return run


def joined(entries: Sequence[dict], key: str) -> tuple[list[int], list[float]]:
    """Return steps and values of a metric with the rounds one after the other, whether or not steps restart."""
    starts = _offsets(entries)
    points = [(starts[e["round"]] + e["step"], e[key]) for e in entries if key in e]
    return [step for step, _ in points], [value for _, value in points]


def round_starts(entries: Sequence[dict]) -> dict[str, float]:
    """Return {"round 1": step at which it starts, ...} on the axis of :func:`joined`."""
    starts = _offsets(entries)
    first = {number: min(e["step"] for e in entries if e["round"] == number) for number in starts}
    return {f"round {number}": starts[number] + first[number] for number in starts} if len(starts) > 1 else {}


def _offsets(entries: Sequence[dict]) -> dict[int, int]:
    offsets, end = {}, 0
    for number in sorted({e["round"] for e in entries}):
        steps = [e["step"] for e in entries if e["round"] == number]
        offsets[number] = end if min(steps) < end else 0
        end = offsets[number] + max(steps)
    return offsets


def _attempt(run: RunData, name: object, read: Callable) -> Any:
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError) as error:  # damaged or foreign content, named on the page
        run.missing.append(f"{name}: could not be read ({error})")
        return None


def _piece(run: RunData, path: Path, read: Callable, what: str) -> Any:
    if not path.exists():
        run.missing.append(f"{what}: {path.name} is not there yet")
        return None
    return _attempt(run, path.name, lambda: read(path))


def _read_config(run: RunData) -> dict:
    try:
        config = yaml.safe_load(run.config_text)
    except yaml.YAMLError as error:
        run.missing.append(f"config.yaml: could not be read ({error})")
        return {}
    return config if isinstance(config, dict) else {}


def _read_summary(path: Path) -> dict:
    summary = json.loads(path.read_text(encoding="utf-8"))
    for arm in summary["arms"].values():
        assert_curves = [arm["validation_loss"], *arm["losses"].values()]
        if not all(len(point) == 2 for curve in assert_curves for point in curve):
            raise ValueError("found a curve whose points are not [tokens, loss]")
    return {"speedups": {}, "domains_by_field": {}, **summary}


def _read_samples(path: Path) -> dict:
    samples = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(samples, dict) or not all(isinstance(s, dict) for kind in samples.values() for s in kind):
        raise ValueError("expected {best: [{text, score, ...}], worst: [...]}")
    return samples


def _round(stage_folder: Path) -> int:
    return int(stage_folder.parent.name.removeprefix("round_"))


def _thin(count: int) -> slice:
    return slice(None, None, max(1, math.ceil(count / MOST_SCORES)))


def _read_scores(path: Path) -> np.ndarray:
    scores = np.load(path, mmap_mode="r", allow_pickle=False)
    scores = np.asarray(scores[_thin(len(scores))], dtype=np.float64)
    return scores[np.isfinite(scores)]


def _read_scores_by_domain(run: RunData) -> dict[str, dict[str, np.ndarray]]:
    """Scores of each arm's last scored round by the domain that the corpus's provenance notes for the unit.

    ``score/units.npy`` has the corpus unit of each score; without it, the scores are of the whole corpus in order.
    """
    provenance = Path(str(run.option("data", "train_prefix")) + ".provenance.parquet")
    if not run.scores or not provenance.exists() or "domain" not in parquet.read_schema(provenance).names:
        return {}
    column = parquet.read_table(provenance, columns=["domain"], read_dictionary=["domain"])["domain"].combine_chunks()
    names, codes = column.dictionary.to_pylist(), column.indices.fill_null(-1).to_numpy()
    result = {}
    for arm, rounds in run.scores.items():
        folder = run.folder / arm / f"round_{max(rounds):02d}" / "score"
        scores = np.load(folder / "scores.npy", mmap_mode="r", allow_pickle=False)
        units = folder / "units.npy"
        ids = np.load(units, mmap_mode="r", allow_pickle=False) if units.exists() else np.arange(len(codes))
        if len(ids) != len(scores):
            continue
        kept = _thin(len(scores))
        of_unit, values = codes[np.asarray(ids[kept])], np.asarray(scores[kept], dtype=np.float64)
        groups = {name: values[(of_unit == code) & np.isfinite(values)] for code, name in enumerate(names)}
        large = sorted((g for g in groups.items() if len(g[1]) >= FEWEST_UNITS), key=lambda item: -len(item[1]))
        if large:
            result[arm] = dict(large[:MOST_DOMAINS])
    return result


def _note_unfinished(run: RunData) -> None:
    """Say which arms still have rounds to go."""
    for arm in run.arms if run.rounds else []:
        done = [record["round"] for record in run.stages if record["arm"] == arm and record["stage"] == "evaluate"]
        if len(done) < run.rounds:
            run.missing.append(f"arm {arm}: {len(done)} of {run.rounds} rounds are evaluated")
