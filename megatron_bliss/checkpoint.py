"""Atomic saving, verified loading and step-numbered checkpoint folders, for every model and optimiser.

A state is a nest of dicts and lists with tensors, numbers, strings and None. One file holds one state (``save_state``). A
checkpoint is a folder ``step_00000100/`` that appears under its name only when every rank's file in it is on disk.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from megatron_bliss.files import atomic_file, publish, read_json, sync_folder
from megatron_bliss.files import write_json as write_json_atomic
from megatron_bliss.parallel import Groups, barrier, fail_together, failing_together

__all__ = [
    "keep_last",
    "latest",
    "load_checkpoint",
    "load_state",
    "read_json",
    "read_manifest",
    "save_checkpoint",
    "save_state",
    "step_folder",
    "write_json_atomic",
]

FORMAT = 1
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
        shutil.rmtree(path)
    for path in Path(folder).glob(".step_*.tmp"):
        shutil.rmtree(path)


def save_checkpoint(
    folder: str | Path, step: int, groups: Groups, *, shared: dict, sharded: dict[str, Any], keep: int = 1
) -> Path:
    """Collective: write checkpoint ``step`` and drop all but the ``keep`` newest.

    ``shared`` is the same on every rank and written once. ``sharded`` belongs to this rank; an empty one writes no file.
    Where a rank cannot write (a full disk), every rank raises and the checkpoints there are stay as they were.
    """
    path = step_folder(folder, step)
    temporary = path.parent / f".{path.name}.tmp"
    with failing_together(groups):
        if groups.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    with failing_together(groups):
        if sharded:
            save_state(temporary / _shard_name(groups), sharded)
    with failing_together(groups):
        if groups.is_main:
            save_state(temporary / "shared.pt", shared)
            manifest = {"format": FORMAT, "step": step, "world_size": groups.world_size, **groups.sizes}
            write_json_atomic(temporary / MANIFEST, manifest)
            sync_folder(temporary)
            if path.exists():
                shutil.rmtree(path)
            publish(temporary, path)
            keep_last(folder, keep)
    return path


def _shard_name(groups: Groups) -> str:
    return (
        f"tensor_{groups.tensor_model_parallel_rank:03d}_pipeline_{groups.pipeline_model_parallel_rank:03d}"
        f"_data_{groups.data_parallel_rank:05d}.pt"
    )


def read_manifest(path: str | Path) -> dict:
    """A checkpoint's format, step and parallel sizes; ValueError where it is not one."""
    manifest = read_json(Path(path) / MANIFEST) if (Path(path) / MANIFEST).is_file() else None
    if manifest is None:
        raise ValueError(f"found no {MANIFEST} in {path}, expected a finished checkpoint")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"found checkpoint format {manifest.get('format')} in {path}, expected {FORMAT}")
    return manifest


def load_checkpoint(path: str | Path, groups: Groups) -> tuple[dict, dict[str, Any]]:
    """Collective: the ``shared`` and this rank's ``sharded`` state of a checkpoint.

    Every rank raises ValueError where the parallel sizes differ from those it was saved at, or a file is damaged.
    """
    error, states = None, None
    try:
        _check_sizes(path, read_manifest(path), groups)
        shard = Path(path) / _shard_name(groups)
        states = load_state(Path(path) / "shared.pt"), load_state(shard) if shard.is_file() else {}
    except (OSError, ValueError) as problem:
        error = problem
    fail_together(error, groups)
    barrier(groups)
    return states


def _check_sizes(path: str | Path, manifest: dict, groups: Groups) -> None:
    for option, size in groups.sizes.items():
        if manifest.get(option) != size:
            hint = (
                f"start {manifest['world_size']} processes as when it was saved"
                if option == "data_parallel_size"
                else f"set target.{option}={manifest.get(option)}"
            )
            raise ValueError(f"found {option}={manifest.get(option)} in checkpoint {path}, expected {size}: {hint}")
