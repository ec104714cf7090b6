"""``X.pieces/``: what an unfinished run has made so far, and what it was asked to make."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence

from megatron_bliss.base.files import read_json, write_json
from megatron_bliss.data.ingest.piece_files import PieceSummary, piece_path, read_summary


class WorkFolder:
    """The folder beside the outputs where pieces wait. It goes when the run is finished, manifest and all."""

    def __init__(self, prefix: str) -> None:
        self.path = f"{prefix}.pieces"
        self._plan = os.path.join(self.path, "plan.json")

    def exists(self) -> bool:
        """Whether a run was begun and not finished: outputs without a manifest are then its own."""
        return os.path.isfile(self._plan)

    def remove(self) -> None:
        """Delete the folder, if there is one."""
        shutil.rmtree(self.path, ignore_errors=False) if os.path.isdir(self.path) else None

    @contextlib.contextmanager
    def open(self, wanted: dict, files: Sequence[str]) -> Iterator[WorkFolder]:
        """Begin a run or go on with it, alone.

        wanted: what decides what the pieces hold; files: the sources. Raises ValueError when the folder belongs to
        other work, a source has changed since, or another process is at it.
        """
        os.makedirs(self.path, exist_ok=True)
        with open(os.path.join(self.path, "lock"), "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(f"{self.path} is in use by another process; wait for it to end") from error
            plan = {"wanted": json.loads(json.dumps(wanted)), "sources": [source_state(file) for file in files]}
            if self.exists():
                self._compare(read_json(self._plan), plan)
            else:
                write_json(self._plan, plan)
            for name in os.listdir(self.path):
                if name.endswith(".tmp") or name.startswith("corpus."):  # a killed run's
                    os.unlink(os.path.join(self.path, name))
            yield self

    def _compare(self, begun: dict, plan: dict) -> None:
        again = f"remove {self.path} to begin again"
        different = [key for key, value in plan["wanted"].items() if begun["wanted"].get(key) != value]
        if different:
            raise ValueError(
                f"{self.path} holds unfinished work with another {' and '.join(different)}: give the same options, "
                f"change --output-prefix, or {again}"
            )
        before, now = ({entry["file"]: entry for entry in part["sources"]} for part in (begun, plan))
        for file, entry in before.items():
            if file not in now:
                raise ValueError(f"{file} was a source when {self.path} was begun, and is missing now: {again}")
            if entry != now[file]:
                raise ValueError(
                    f"{file} has changed since {self.path} was begun: found {_describe(now[file])}, expected "
                    f"{_describe(entry)}; bring it back or {again}"
                )
        if list(before) != list(now):
            new = next((file for file in now if file not in before), None)
            found = f"{new} is a new source" if new else "the sources are in another order"
            raise ValueError(f"{found} since {self.path} was begun: give the same --input or {again}")

    def pieces(self, sources: int) -> list[dict[int, PieceSummary]]:
        """Finished pieces of every source; a file that is not whole is removed."""
        found: list[dict[int, PieceSummary]] = [{} for _ in range(sources)]
        for name in os.listdir(self.path):
            stem, suffix = os.path.splitext(name)
            if suffix != ".piece":
                continue
            source, piece = map(int, stem.split("-"))
            summary = read_summary(piece_path(self.path, source, piece))
            if summary is None:
                os.unlink(os.path.join(self.path, name))
            else:
                found[source][piece] = summary
        return found


def source_state(file: str) -> dict:
    """By what a change of a source is noticed without reading it."""
    status = os.stat(file)
    return {"file": file, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _describe(entry: dict) -> str:
    return f"{entry['bytes']} bytes, changed at {entry['modified_ns'] / 1e9:.3f}"
