"""A job of many parts in a folder, done by any number of processes that may be killed and started again.

``work/job.json`` says what the job is; a process with another job in mind is refused. ``work/NAME.part`` are finished
parts. Who finds the last of them there puts the result together and removes ``work/``.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bliss.base.files import read_json, write_json
from megatron_bliss.base.progress import progress
from megatron_bliss.scorers.claims import Claims

WORK, PART = "work", ".part"
LOOK_EVERY, POLL = 2.0, 0.2
"""Seconds between two looks at what others have done: of a process that has work, and of one that waits."""


@dataclass(frozen=True)
class Share:
    """Which parts a process begins with: the ``index``-th of ``count`` shares, counted from 0."""

    index: int = 0
    count: int = 1
    alone: bool = False
    """It makes no other's parts and waits for nobody: a shard of an array of jobs."""


@dataclass(frozen=True)
class Parts:
    """What a job is, and what it consists of."""

    job: dict
    """For job.json: whatever decides the result."""
    names: Sequence[str]
    """In the order of the result; each makes a file of its own."""
    sizes: Sequence[int]
    """Of each part, in units that progress counts."""
    unit: str
    """Its name, a plural."""
    make: Callable[[int, Path, Callable[[int], None]], None]
    """(number of a part, path, tick) -> writes its file, atomically; tick(n) on the way: n of its units are done."""
    finish: Callable[[Path], None]
    """(folder of the parts) -> makes the result."""
    is_finished: Callable[[], bool]
    """Whether the result is there."""


def run(folder: Path, parts: Parts, share: Share, *, show: bool) -> bool:
    """Do what is left of a job; whether its result is there now (of a share that is alone, it may not be).

    Raises ValueError where another job's work lies in the folder.
    """
    work = folder / WORK
    work.mkdir(parents=True, exist_ok=True)
    try:
        _agree(work / "job.json", parts.job)
        with Claims(work) as claims:
            if not parts.is_finished():  # else another process has finished, and its work/ is gone
                if not _make_parts(work, parts, claims, share, show):
                    return False
                while not claims.take("result"):
                    time.sleep(POLL)
                if not parts.is_finished():
                    for left in folder.glob("*.tmp"):  # of processes that were killed here
                        left.unlink(missing_ok=True)
                    parts.finish(work)
            shutil.rmtree(work, ignore_errors=True)  # the result is there: what stays behind does no harm
    except FileNotFoundError:
        if not parts.is_finished():
            raise
    return True


def _make_parts(work: Path, parts: Parts, claims: Claims, share: Share, show: bool) -> bool:
    """Make parts until none is missing, or none that this process may make; whether all are there."""
    left = _Left(work, parts)
    with progress(
        sum(parts.sizes), description="score", unit=parts.unit, enabled=show, initial=left.size_done
    ) as left.bar:
        for number in _order(len(parts.names), share):
            _make(number, work, parts, claims, left)
        while left.look() and not share.alone:  # others are at work: wait for them, or for their death
            if not any(_make(number, work, parts, claims, left) for number in sorted(left.missing)):
                time.sleep(POLL)
    return not left.missing


def _make(number: int, work: Path, parts: Parts, claims: Claims, left: _Left) -> bool:
    """Make one part, if it is missing and free; whether this process did."""
    if left.is_done(number) or not claims.take(parts.names[number]):
        return False
    path = work / f"{parts.names[number]}{PART}"
    if not path.is_file():  # it may have come since the last look
        parts.make(number, path, left.tick)
    left.count(number)
    return True


class _Left:
    """Which parts are missing."""

    def __init__(self, work: Path, parts: Parts) -> None:
        self._work, self._parts = work, parts
        self._numbers = {f"{name}{PART}": number for number, name in enumerate(parts.names)}
        self.missing, self.size_done, self.bar = set(range(len(parts.names))), 0, None
        self._ticked = 0  # units of the part that is being made
        self.look()

    def look(self) -> int:
        """See what all processes have done; how many parts are missing."""
        self._looked = time.monotonic()
        with os.scandir(self._work) as entries:
            for name in (entry.name for entry in entries):
                if name in self._numbers:
                    self._add(self._numbers[name], 0)
        return len(self.missing)

    def is_done(self, number: int) -> bool:
        """Whether a part is there, as far as this process has seen."""
        if time.monotonic() - self._looked > LOOK_EVERY:
            self.look()
        return number not in self.missing

    def tick(self, units: int) -> None:
        """Count units of the part that is being made."""
        self._ticked += units
        self.bar.update(units)

    def count(self, number: int) -> None:
        """Count the part that was being made as done."""
        ticked, self._ticked = self._ticked, 0
        self._add(number, ticked)

    def _add(self, number: int, ticked: int) -> None:
        if number in self.missing:
            self.missing.remove(number)
            self.size_done += self._parts.sizes[number]
            if self.bar is not None:
                self.bar.update(self._parts.sizes[number] - ticked)


def _order(count: int, share: Share) -> list[int]:
    """Numbers of parts in the order in which a process looks for work: its own share, then the others'."""
    start, stop = count * share.index // share.count, count * (share.index + 1) // share.count
    own = list(range(start, stop))
    return own if share.alone else own + list(range(stop, count)) + list(range(start))


def _agree(path: Path, job: dict) -> None:
    if not path.is_file():
        write_json(path, job)
    found = read_json(path)
    different = [name for name in sorted(found.keys() | job.keys()) if found.get(name) != job.get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"found unfinished work with {name} {found.get(name)!r} in {path.parent}, expected {job.get(name)!r}: give "
            f"the same arguments as before to go on, another --output, or remove {path.parent}"
        )
