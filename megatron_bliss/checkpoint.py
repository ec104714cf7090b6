"""Atomic saving, verified loading and step-numbered checkpoint folders, for every model and optimiser.

A state is a nest of dicts and lists with tensors, numbers, strings and None. One file holds one state
(``save_state``). A checkpoint is a folder ``step_00000100/`` that appears under its name only when every rank's file
in it is on disk.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from megatron_bliss.files import atomic_file, publish, read_json, sync_folder, write_json
from megatron_bliss.parallel import Groups, failing_together

__all__ = [
    "keep_last",
    "latest",
    "load_checkpoint",
    "load_state",
    "load_weights",
    "read_manifest",
    "save_checkpoint",
    "save_state",
    "step_folder",
]

FORMAT = 1
MANIFEST = "manifest.json"
SHARED = "shared.pt"
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
    folder: str | Path,
    step: int,
    groups: Groups,
    *,
    shared: dict[str, Any],
    weights: dict[str, Any],
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Collective: write checkpoint ``step`` and drop all but the ``keep`` newest.

    ``shared`` is the same on every rank and written once; ``weights`` are the same on every data-parallel rank and
    written by the first; ``state`` is this rank's own. Where a rank cannot write (a full disk), every rank raises and
    the checkpoints there are stay as they were.
    """
    path = step_folder(folder, step)
    temporary = path.parent / f".{path.name}.tmp"
    with failing_together(groups):
        if groups.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    with failing_together(groups):
        save_state(temporary / _state_name(groups), state)
        if groups.data_parallel_rank == 0:
            save_state(temporary / _weights_name(groups), weights)
    with failing_together(groups):
        if groups.is_main:
            save_state(temporary / SHARED, shared)
            manifest = {"format": FORMAT, "step": step, **groups.sizes}
            write_json(temporary / MANIFEST, manifest)
            sync_folder(temporary)
            if path.exists():
                shutil.rmtree(path)
            publish(temporary, path)
            keep_last(folder, keep)
    return path


def _weights_name(groups: Groups) -> str:
    tensor, pipeline = groups.tensor_model_parallel_rank, groups.pipeline_model_parallel_rank
    return f"weights_tensor_{tensor:03d}_pipeline_{pipeline:03d}.pt"


def _state_name(groups: Groups) -> str:
    tensor, pipeline = groups.tensor_model_parallel_rank, groups.pipeline_model_parallel_rank
    return f"state_tensor_{tensor:03d}_pipeline_{pipeline:03d}_data_{groups.data_parallel_rank:05d}.pt"


def read_manifest(path: str | Path) -> dict:
    """A checkpoint's format, step and parallel sizes; ValueError where it is not one."""
    manifest = read_json(Path(path) / MANIFEST) if (Path(path) / MANIFEST).is_file() else None
    if manifest is None:
        raise ValueError(f"found no {MANIFEST} in {path}, expected a finished checkpoint")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"found checkpoint format {manifest.get('format')} in {path}, expected {FORMAT}")
    return manifest


def load_checkpoint(path: str | Path, groups: Groups) -> tuple[dict, dict, dict]:
    """Collective: ``shared``, ``weights`` and this rank's ``state`` of a checkpoint.

    Every rank raises ValueError where the parallel sizes differ from those it was saved at, or a file is damaged.
    """
    return _load_together(path, groups, (SHARED, _weights_name(groups), _state_name(groups)), groups.sizes)


def load_weights(path: str | Path, groups: Groups) -> dict[str, Any]:
    """Collective: the ``weights`` of a checkpoint, which any data-parallel size can use."""
    sizes = {option: size for option, size in groups.sizes.items() if option != "data_parallel_size"}
    (weights,) = _load_together(path, groups, (_weights_name(groups),), sizes)
    return weights


def _load_together(path: str | Path, groups: Groups, names: tuple[str, ...], sizes: dict[str, int]) -> tuple:
    states = ()
    with failing_together(groups):
        _check_sizes(path, read_manifest(path), sizes)
        states = tuple(load_state(Path(path) / name) for name in names)
    return states


def _check_sizes(path: str | Path, manifest: dict, sizes: dict[str, int]) -> None:
    for option, size in sizes.items():
        saved = manifest.get(option)
        if saved != size:
            mend = (
                f"start {saved} times the ranks of one replica"
                if option.startswith("data")
                else f"set target.{option}={saved}"
            )
            raise ValueError(f"found {option}={saved} in checkpoint {path}, expected this run's {size}: {mend}")
