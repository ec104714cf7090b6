"""Parts of a job that any number of processes share out among themselves, through files in a common folder.

A part is done when its file is there. Files appear complete and hold the same bytes whoever makes them, so that a part
that two processes make does no harm: claims only keep that rare. A claim is a file that its owner touches while it
works; one that was not touched for STALE seconds, or whose owner on this machine is dead, may be taken.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType

STALE = 60.0
"""Seconds without a sign of life. Slow file systems show a change a few seconds late."""


class Claims:
    """The claims of this process in ``folder``; use as a context manager, which gives back what it holds."""

    def __init__(self, folder: str | os.PathLike, stale: float = STALE) -> None:
        self.folder, self.stale = Path(folder), stale
        self._mine = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
        self._held: Path | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)

    def __enter__(self) -> Claims:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.give_back()

    def take(self, name: str) -> bool:
        """Whether the part ``name`` is this process's to make now; one part is held at a time."""
        self.give_back()
        path = self.folder / f"{name}.claim"
        if not self._create(path) and not self._take_over(path):
            return False
        self._held = path
        return True

    def give_back(self) -> None:
        """Hold nothing any more."""
        held, self._held = self._held, None
        if held is not None and _content(held) == self._mine:
            with contextlib.suppress(FileNotFoundError):
                held.unlink()

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as stream:
            stream.write(self._mine)
        return True

    def _take_over(self, path: Path) -> bool:
        """Put this process's claim in the place of one that nobody looks after."""
        owner = _content(path)
        if owner is None:
            return self._create(path)
        if not self._is_abandoned(path, owner):
            return False
        own = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        own.write_text(self._mine)
        os.replace(own, path)
        return _content(path) == self._mine

    def _is_abandoned(self, path: Path, owner: str) -> bool:
        words = owner.split()
        if len(words) == 3 and words[0] == socket.gethostname() and words[1].isdigit() and not _lives(int(words[1])):
            return True
        try:
            return self._now() - path.stat().st_mtime > self.stale
        except FileNotFoundError:
            return False

    def _now(self) -> float:
        """By the clock of the file system, which may not be this machine's."""
        probe = self.folder / f".clock.{socket.gethostname()}.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            probe.unlink()
        probe.write_text("")
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _keep_alive(self) -> None:
        while not self._stop.wait(self.stale / 5):
            held = self._held
            if held is not None:
                with contextlib.suppress(OSError):  # given back meanwhile; or a moment's trouble of the file system
                    os.utime(held)


def _content(path: Path) -> str | None:
    """What a claim says of its owner ("" while it is being written); None: there is none."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
