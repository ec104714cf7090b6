"""The loop around a trainer of the small models: resume, step, watch, log, save."""

from __future__ import annotations

import sys
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


def run_steps(
    trainer: Trainer,
    total_steps: int,
    *,
    folder: Path,
    save_interval: int,
    log_interval: int,
    metrics: MetricsLogger,
    labels: dict,
    groups: Groups,
    show_progress: bool,
) -> None:
    """Train to ``total_steps``, from the state in ``folder`` if any; a resumed run equals an uninterrupted one.

    The state is the same on every rank and written once, so that any number of ranks can go on from it.
    """
    path = folder / "latest.pt"
    with failing_together(groups):
        if path.is_file():
            trainer.load_state_dict(checkpoint.load_state(path, groups.device))
    metrics.truncate(**labels, step=trainer.steps_done)
    description = " ".join(["warm-up" if not labels["round"] else f"round {labels['round']}", labels["stage"]])
    with progress(
        total_steps, description=description, unit="steps", enabled=show_progress, initial=trainer.steps_done
    ) as bar:
        while trainer.steps_done < total_steps:
            values = trainer.step()
            step, is_last = trainer.steps_done, trainer.steps_done == total_steps
            if step % log_interval == 0 or is_last:
                for warning in trainer.watch(values):
                    if groups.is_main:
                        print(f"warning: {description}, {warning}", file=sys.stderr, flush=True)
                metrics.log(step, values, **labels)
                bar.set(**{name: values[name] for name in SHOWN if name in values})
            bar.update(1)
            if step % save_interval == 0 and not is_last:
                with failing_together(groups):
                    if groups.is_main:
                        checkpoint.save_state(path, trainer.state_dict())
