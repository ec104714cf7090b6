"""Atomic saving, verified loading and step-numbered checkpoint folders, for every model and optimiser.

A state is a nest of dicts and lists with tensors, numbers, strings and None. One file holds one state
(``save_state``). A checkpoint is a folder ``step_00000100/`` that appears under its name only when every rank's file
in it is on disk; its ``manifest.json`` has the size and SHA-256 of each. What lies in the target's is the business of
target/checkpoint.py.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import zipfile
from pathlib import Path
from typing import Any

import torch

from megatron_bliss.base.files import atomic_file, read_json, sha256_file
from megatron_bliss.base.parallel import Groups, all_gather_object, failing_together

__all__ = [
    "describe_file",
    "keep_last",
    "latest",
    "load_state",
    "read_manifest",
    "save_state",
    "set_aside",
    "step_folder",
    "temporary_folder",
    "verify",
]

FORMAT = 2
MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step_(\d{8,})")


def save_state(path: str | Path, state: Any) -> None:
    """Write a state to a file that no reader ever sees half written."""
    with atomic_file(path) as stream:
        torch.save(state, stream)


def load_state(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """Read a state; ValueError where the file is not what was written (the archive's checksums are verified)."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"found no file {path}, expected a saved state")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise ValueError(f"found a damaged file {path} ({error}), expected a saved state: {_MEND}") from error
    if damaged is not None:
        raise ValueError(f"found a wrong checksum in {path} (record {damaged}), expected a saved state: {_MEND}")
    return torch.load(path, map_location=device, weights_only=True)


_MEND = "remove it, so that the run goes on from the checkpoint before it, or copy it here again"


def step_folder(folder: str | Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return Path(folder) / f"step_{step:08d}"


def _steps(folder: str | Path) -> list[tuple[int, Path]]:
    """Finished checkpoints in a folder, oldest first."""
    found = []
    for path in Path(folder).glob("step_*"):
        match = STEP_NAME.fullmatch(path.name)
        if match and (path / MANIFEST).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def latest(folder: str | Path) -> Path | None:
    """The newest finished checkpoint in a folder, or None."""
    steps = _steps(folder)
    return steps[-1][1] if steps else None


def keep_last(folder: str | Path, k: int) -> None:
    """Remove all but the k newest checkpoints, and what killed saves left behind; call it on the main rank only."""
    assert k > 0, "nothing would be left"
    for _, path in _steps(folder)[:-k]:
        set_aside(path)
    for path in Path(folder).glob(".step_*.tmp"):
        shutil.rmtree(path)


def temporary_folder(path: Path) -> Path:
    """Where the checkpoint ``path`` lies until it is complete; :func:`keep_last` removes it."""
    return path.parent / f".{path.name}.tmp"


def set_aside(path: Path) -> None:
    """Take a checkpoint's name away, so that no kill leaves half of it under that name."""
    if path.exists():
        aside = path.parent / f".{path.name}.old.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def describe_file(path: str | Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file, as the manifest keeps them, after flushing it to disk."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": os.path.getsize(path), "sha256": sha256_file(path)}


def read_manifest(path: str | Path) -> dict:
    """A checkpoint's format, step, parallel sizes and files; ValueError where it is not one."""
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise ValueError(f"found no {MANIFEST} in {path}, expected a finished checkpoint")
    try:
        manifest = read_json(path / MANIFEST)
    except ValueError as error:
        raise ValueError(f"found a damaged {path / MANIFEST} ({error}), expected a manifest: {_mend(path)}") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"found checkpoint format {manifest.get('format')} in {path}, expected {FORMAT}")
    return manifest


def verify(path: str | Path, groups: Groups) -> dict:
    """Collective: the manifest of a checkpoint all of whose files are as they were written.

    Every file is read once per node, by ranks in turn (SHA-256: 1 to 2 GB/s per rank where the processor has
    instructions for it, a third of that elsewhere). ValueError on every rank, naming the file, where one is missing,
    cut off or changed.
    """
    path, manifest, mine = Path(path), {}, {}
    hosts = all_gather_object(socket.gethostname(), groups)
    neighbours = [rank for rank, host in enumerate(hosts) if host == hosts[groups.rank]]
    with failing_together(groups):
        manifest = read_manifest(path)
        by_size = sorted(manifest["files"], key=lambda name: (manifest["files"][name]["bytes"], name), reverse=True)
        for name in by_size:
            _check_size(path, name, manifest["files"][name]["bytes"])
        mine = by_size[neighbours.index(groups.rank) :: len(neighbours)]
    with failing_together(groups):
        for name in mine:
            if sha256_file(path / name) != manifest["files"][name]["sha256"]:
                raise ValueError(f"found a wrong checksum in {path / name}, expected what was saved: {_mend(path)}")
    return manifest


def _check_size(path: Path, name: str, size: int) -> None:
    if Path(name).name != name:
        raise ValueError(f"found a file outside the checkpoint, {name}, in {path / MANIFEST}: {_mend(path)}")
    if not (path / name).is_file():
        raise ValueError(f"found no file {path / name}, expected {size} bytes: {_mend(path)}")
    found = (path / name).stat().st_size
    if found != size:
        raise ValueError(f"found {found} bytes in {path / name}, expected {size}: {_mend(path)}")


def _mend(path: Path) -> str:
    return f"remove the folder {path}, so that the run goes on from the checkpoint before it, or copy it here again"
