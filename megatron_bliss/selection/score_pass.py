"""A shard is scored: one pass, ``scores.npy`` with one float32 per unit.

Units are scored in blocks with fixed bounds; ranks take blocks in turn and each finished block is a file, so a killed
pass goes on where it was and the scores do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_bliss.base.files import atomic_file
from megatron_bliss.base.progress import progress

BLOCK_UNITS = 4096
"""Units per block: small enough to lose little, large enough that a corpus of 10^8 units gives a few 10^4 files."""


@dataclass(frozen=True)
class ScorePass:
    """How a pass over a corpus runs on this rank."""

    rank: int
    world_size: int
    """Ranks that share the blocks."""
    show_progress: bool = False
    description: str = "score"
    """Begins the line of progress."""


def score_blocks(
    score: Callable[[np.ndarray], np.ndarray],
    num_units: int,
    folder: Path,
    how: ScorePass,
) -> None:
    """Score this rank's blocks of units into ``folder``, one file each; blocks that are there are not made again.

    score: any function from unit ids (int64 [n], in order) to scores (float32 [n]).
    """
    folder.mkdir(parents=True, exist_ok=True)
    bounds = list(_block_bounds(num_units))[how.rank :: how.world_size]
    count = sum(stop - start for start, stop in bounds)
    with progress(count, description=how.description, unit="units", enabled=how.show_progress) as bar:
        for start, stop in bounds:
            path = _block_path(folder, start, stop)
            if not path.is_file():
                save_array(path, score(np.arange(start, stop)))
            bar.update(stop - start)


def gather_scores(folder: Path, num_units: int) -> np.ndarray:
    """Join the blocks of all ranks: float32 [num_units]. Call once every rank has finished :func:`score_blocks`."""
    paths = [_block_path(folder, *bounds) for bounds in _block_bounds(num_units)]
    parts = [np.load(path, allow_pickle=False) for path in paths]
    scores = np.concatenate(parts).astype(np.float32, copy=False)
    if scores.shape != (num_units,) or not np.isfinite(scores).all():
        raise ValueError(
            f"found {scores.size} scores, {int(np.isfinite(scores).sum())} of them finite, in {folder}, "
            f"expected {num_units} finite ones: delete that folder and run the stage again"
        )
    return scores


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file so that no reader ever sees half of it."""
    with atomic_file(path) as file:
        np.save(file, array, allow_pickle=False)


def _block_bounds(num_units: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_units, BLOCK_UNITS):
        yield start, min(start + BLOCK_UNITS, num_units)


def _block_path(folder: Path, start: int, stop: int) -> Path:
    return folder / f"{start:012d}-{stop:012d}.npy"
