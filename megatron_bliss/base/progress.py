"""How far a stage has come: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping

from tqdm import tqdm

from megatron_bliss.base.text import format_seconds

SECONDS_BETWEEN_LINES = 5.0
"""Without a terminal, a progress line comes at most this often."""


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
