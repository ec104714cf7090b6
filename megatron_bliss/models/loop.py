"""The loop around a trainer of the small models: resume, step, watch, log, save."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_bliss.base import checkpoint
from megatron_bliss.base.metrics import MetricsLogger
from megatron_bliss.base.parallel import Groups, failing_together
from megatron_bliss.base.progress import progress

SHOWN = ("loss", "train_loss", "validation_loss")
"""Numbers on the progress line."""


class Trainer(Protocol):
    """Something that is trained step by step and can be saved between two steps."""

    steps_done: int

    def step(self) -> dict[str, float]: ...

    def watch(self, values: dict[str, float]) -> list[str]: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


@dataclass(frozen=True)
class Bookkeeping:
    """Where a trainer's state and numbers are kept, and how often."""

    folder: Path
    save_interval: int
    """Steps between two states on disk."""
    log_interval: int
    """Steps between two lines of metrics."""
    metrics: MetricsLogger
    labels: dict
    """arm, round and stage of every line; round 0 is the warm-up."""
    show_progress: bool

    @property
    def description(self) -> str:
        """What the progress line and warnings call the training."""
        labels = self.labels
        return " ".join(["warm-up" if not labels["round"] else f"round {labels['round']}", labels["stage"]])


def run_steps(trainer: Trainer, total_steps: int, books: Bookkeeping, groups: Groups) -> None:
    """Train to ``total_steps``, from the state in the folder if any; a resumed run equals an uninterrupted one.

    The state is the same on every rank and written once, so that any number of ranks can go on from it.
    """
    path, description = books.folder / "latest.pt", books.description
    with failing_together(groups):
        if path.is_file():
            trainer.load_state_dict(checkpoint.load_state(path, groups.device))
    books.metrics.truncate(**books.labels, step=trainer.steps_done)
    with progress(
        total_steps, description=description, unit="steps", enabled=books.show_progress, initial=trainer.steps_done
    ) as bar:
        while trainer.steps_done < total_steps:
            values = trainer.step()
            step, is_last = trainer.steps_done, trainer.steps_done == total_steps
            if step % books.log_interval == 0 or is_last:
                for warning in trainer.watch(values):
                    if groups.is_main:
                        print(f"warning: {description}, {warning}", file=sys.stderr, flush=True)
                books.metrics.log(step, values, **books.labels)
                bar.set(**{name: values[name] for name in SHOWN if name in values})
            bar.update(1)
            if step % books.save_interval == 0 and not is_last:
                with failing_together(groups):
                    if groups.is_main:
                        checkpoint.save_state(path, trainer.state_dict())
