"""A corpus through the score model: one forward pass, ``scores.npy`` with one float32 per unit.

Units are scored in blocks with fixed bounds; ranks take blocks in turn and each finished block is a file, so a killed
pass goes on where it was and the scores do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_bliss.base.files import atomic_file
from megatron_bliss.base.progress import progress
from megatron_bliss.data.batches import BatchSource
from megatron_bliss.models.score import ScoreModel

BLOCK_UNITS = 4096
"""Units per block: small enough to lose little, large enough that a corpus of 10^8 units gives a few 10^4 files."""


@dataclass(frozen=True)
class ScorePass:
    """How a pass over a corpus runs on this rank."""

    rank: int
    world_size: int
    """Ranks that share the blocks."""
    device: torch.device
    micro_batch_size: int
    """Units per forward pass."""
    show_progress: bool = False
    description: str = "score"
    """Begins the line of progress."""


def score_units(
    model: ScoreModel,
    source: BatchSource,
    folder: Path,
    how: ScorePass,
) -> None:
    """Score this rank's blocks of ``source`` into ``folder``, one file each; blocks that are there are not made again.

    Raises ``FloatingPointError`` naming the units when a score is not finite.
    """
    score_blocks(lambda ids: _score_block(model, source, ids, how), len(source), folder, how)


def score_blocks(
    score: Callable[[np.ndarray], np.ndarray],
    num_units: int,
    folder: Path,
    how: ScorePass,
) -> None:
    """:func:`score_units` by any function from unit ids (int64 [n], in order) to scores (float32 [n])."""
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
    """Join the blocks of all ranks: float32 [num_units]. Call once every rank has finished :func:`score_units`."""
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


def _score_block(model: ScoreModel, source: BatchSource, ids: np.ndarray, how: ScorePass) -> np.ndarray:
    parts = []
    for first in range(0, len(ids), how.micro_batch_size):
        batch = source.batch(ids[first : first + how.micro_batch_size]).to(how.device)
        with torch.no_grad():
            scores = model(batch.tokens, batch.lengths).float()
        if not torch.isfinite(scores).all():
            bad = batch.unit_ids[~torch.isfinite(scores)].tolist()
            raise FloatingPointError(
                f"found scores that are not finite for units {bad[:10]}, expected numbers: the score model diverged; "
                "lower bilevel.score_optimizer.lr and run the bilevel stage again"
            )
        parts.append(scores.cpu().numpy())
    return np.concatenate(parts)


def _block_bounds(num_units: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_units, BLOCK_UNITS):
        yield start, min(start + BLOCK_UNITS, num_units)


def _block_path(folder: Path, start: int, stop: int) -> Path:
    return folder / f"{start:012d}-{stop:012d}.npy"
