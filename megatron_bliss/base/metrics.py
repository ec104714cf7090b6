"""What a run logs while it goes on: ``metrics.jsonl`` and TensorBoard scalars.

``metrics.jsonl`` is the record; the TensorBoard folder is a copy of it, one TensorBoard run per round, made anew where
a resumed stage takes lines back.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import orjson

from megatron_bliss.base.files import atomic_file

KEYS = ("time", "arm", "round", "stage", "step")
"""Keys of every line; all others are metrics."""
DOMAIN_WEIGHT = "domain_weight_"
"""Begins the metric that tells what a domain's samples weigh; the domain's name follows, which may be any text."""


def read_metrics(path: Path | str) -> list[dict]:
    """Return the lines of ``metrics.jsonl``; a number that was not finite is NaN.

    A last line cut short by a kill is left out. Raises ``ValueError`` where any other line is not a JSON object.
    """
    content = Path(path).read_bytes()
    lines = content[: _whole_length(content)].splitlines()
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _parse(line: bytes, place: str) -> dict:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{place}: found {line[:60]!r}, expected a JSON object; remove this line ({error})") from None
    if not isinstance(entry, dict) or any(key not in entry for key in KEYS):
        raise ValueError(f"{place}: found {line[:60]!r}, expected an object with {', '.join(KEYS)}; remove this line")
    return {key: math.nan if value is None and key not in KEYS else value for key, value in entry.items()}


def _whole_length(content: bytes) -> int:
    """Bytes up to the end of the last whole line: a line counts once its newline is there and it parses."""
    end = content.rfind(b"\n") + 1
    start = content.rfind(b"\n", 0, max(end - 1, 0)) + 1
    try:
        orjson.loads(content[start:end] or b"{}")
    except orjson.JSONDecodeError:  # a block that never reached the disk reads as zero bytes
        return start
    return end


class MetricsLogger:
    """Append metrics of a run to ``folder/metrics.jsonl`` and mirror them in ``folder/tensorboard``.

    Every rank may hold one and call it; only the rank with ``is_writer`` touches files. Opening drops a torn last line.
    """

    def __init__(self, folder: Path | str, *, is_writer: bool, tensorboard: bool):
        self.path = Path(folder) / "metrics.jsonl"
        self._tensorboard = _TensorBoard(Path(folder) / "tensorboard") if is_writer and tensorboard else None
        self._file = None
        if is_writer:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                os.truncate(self.path, _whole_length(self.path.read_bytes()))
            self._file = open(self.path, "ab")  # noqa: SIM115 (kept open until close())

    def log(self, step: int, metrics: Mapping[str, float], *, arm: str, round: int, stage: str) -> None:
        """Append one line. ``step`` counts within the stage; values are numbers or tensors of one element."""
        if self._file is None:
            return
        assert not set(metrics) & set(KEYS), f"metrics may not be named {sorted(set(metrics) & set(KEYS))}"
        values = {name: float(value) for name, value in metrics.items()}
        entry = {"time": time.time(), "arm": arm, "round": round, "stage": stage, "step": int(step), **values}
        self._file.write(orjson.dumps(entry) + b"\n")
        self._file.flush()
        if self._tensorboard is not None:
            self._tensorboard.add(entry)

    def truncate(self, arm: str, round: int, stage: str, step: int) -> None:
        """Drop the lines of a stage with a larger step: it goes on from its checkpoint of ``step`` (-1: drop all)."""
        if self._file is None:
            return
        entries = read_metrics(self.path)
        kept = [e for e in entries if (e["arm"], e["round"], e["stage"]) != (arm, round, stage) or e["step"] <= step]
        if len(kept) == len(entries):
            return
        self._file.close()
        with atomic_file(self.path) as file:
            file.writelines(orjson.dumps(entry) + b"\n" for entry in kept)
        self._file = open(self.path, "ab")  # noqa: SIM115 (kept open until close())
        if self._tensorboard is not None:
            self._tensorboard.rewrite(round, [entry for entry in kept if entry["round"] == round])

    def close(self) -> None:
        """Close the files; nothing may be logged afterwards."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._tensorboard is not None:
            self._tensorboard.close()


class _TensorBoard:
    """Scalars ``arm/stage/name`` in one TensorBoard run per round, so that the same stage of all rounds overlays."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._writers: dict[int, object] = {}

    def _run_folder(self, round: int) -> Path:
        return self._folder / (f"round_{round:02d}" if round else "warmup")

    def add(self, entry: dict) -> None:
        if entry["round"] not in self._writers:
            from torch.utils.tensorboard import SummaryWriter  # here, because it takes a second to import

            self._writers[entry["round"]] = SummaryWriter(str(self._run_folder(entry["round"])))
        writer = self._writers[entry["round"]]
        for name, value in entry.items():
            if name not in KEYS:
                writer.add_scalar(f"{entry['arm']}/{entry['stage']}/{name}", value, entry["step"], entry["time"])

    def rewrite(self, round: int, entries: list[dict]) -> None:
        """Make a round's run anew: event files can only grow, and old points would stay beside the new ones."""
        if round in self._writers:
            self._writers.pop(round).close()
        if self._run_folder(round).exists():
            shutil.rmtree(self._run_folder(round))
        for entry in entries:
            self.add(entry)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
