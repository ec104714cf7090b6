"""What a run says while it goes on: ``metrics.jsonl``, TensorBoard scalars and progress on the terminal.

``metrics.jsonl`` is the record; the TensorBoard folder is a copy of it, one TensorBoard run per round, made anew where
a resumed stage takes lines back.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import orjson
from tqdm import tqdm

from megatron_bliss.base.files import atomic_file

KEYS = ("time", "arm", "round", "stage", "step")
"""Keys of every line; all others are metrics."""

SECONDS_BETWEEN_LINES = 5.0
"""Without a terminal, a progress line comes at most this often."""


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


def progress(
    iterable_or_total: Iterable | int, *, description: str, unit: str, enabled: bool, initial: int = 0, file=None
) -> Progress:
    """Show how far a stage has come: an iterable to walk, or a context manager with ``update`` and ``set``.

    ``unit`` is a plural ("steps"); ``initial`` are units that an earlier run of the stage has done, which count as done
    but not towards the rate. ``file`` (standard error) gets a bar if it is a terminal, else whole lines now and then.
    """
    return Progress(iterable_or_total, description, unit, enabled, initial, file or sys.stderr)


class Progress:
    """A tqdm bar on a terminal; elsewhere a line at most every five seconds and one at the end."""

    def __init__(self, iterable_or_total, description: str, unit: str, enabled: bool, initial: int, file):
        is_total = isinstance(iterable_or_total, int)
        self._iterable = None if is_total else iterable_or_total
        self.total = iterable_or_total if is_total else getattr(iterable_or_total, "__len__", lambda: None)()
        self.done = self._initial = initial
        self._description, self._unit, self._file = description, unit, file
        self._values: dict[str, float] = {}
        self._is_open = enabled
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if enabled and file.isatty():
            self._bar = _Bar(
                total=self.total, initial=initial, file=file, unit=unit, dynamic_ncols=True, desc=description,
                bar_format="{desc}  {percentage:3.0f}% {bar} {status}" if self.total else "{desc}  {status}",
            )  # fmt: skip

    def __iter__(self) -> Iterator:
        assert self._iterable is not None, "made from a total: use update()"
        with self:
            for item in self._iterable:
                yield item
                self.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Count ``count`` more units as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._is_open and self.done != self.total and self._is_due():
            self._print_line()

    def _is_due(self) -> bool:
        return time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES

    def set(self, **values: float) -> None:
        """Show these numbers from now on, in place of those of the same names."""
        self._values.update({name: float(value) for name, value in values.items()})
        if self._bar is not None:
            self._bar.values = self._values

    def close(self) -> None:
        """Show the last state and stop; closing twice does nothing."""
        if self._is_open:
            self._is_open = False
            if self._bar is not None:
                self._bar.close()
            else:
                self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._start
        rate = (self.done - self._initial) / elapsed if elapsed > 0 else 0.0
        text = _status(self.done, self.total, self._unit, rate, elapsed, self._values)
        with contextlib.suppress(BrokenPipeError):  # a closed log must not end a training run
            print(f"{self._description}  {text}", file=self._file, flush=True)


class _Bar(tqdm):
    """tqdm with our own status text: ``{status}`` in the bar format."""

    values: Mapping[str, float] = {}

    @property
    def format_dict(self) -> dict:
        state = super().format_dict
        since = state["n"] - state["initial"]
        rate = state["rate"] or (since / state["elapsed"] if state["elapsed"] else 0.0)
        state["status"] = _status(state["n"], state["total"], state["unit"], rate, state["elapsed"], self.values)
        return state


def _status(done: int, total: int | None, unit: str, rate: float, elapsed: float, values: Mapping[str, float]) -> str:
    """``120/300 steps  4.1 steps/s  ETA 0:44  loss 5.31``; the time taken instead of ETA when done."""
    parts = [f"{done:,} {unit}" if total is None else f"{done:,}/{total:,} {unit}"]
    if rate >= 1:
        parts.append(f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.1f} {unit}/s")
    elif rate > 0:
        parts.append(f"{1 / rate:,.1f} s/{unit.removesuffix('s')}")
    if total is not None and done < total:
        parts.append(f"ETA {format_seconds((total - done) / rate)}" if rate > 0 else "ETA ?")
    else:
        parts.append(f"in {format_seconds(elapsed)}")
    return "  ".join(parts + [f"{name} {value:.4g}" for name, value in values.items()])


def format_seconds(seconds: float) -> str:
    """Return ``0:44``, ``12:05``, ``3:02:44`` or, beyond a day, ``2d 03:10:00``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
