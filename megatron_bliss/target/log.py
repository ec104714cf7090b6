"""The numbers of a training segment on their way to metrics.jsonl and to the progress line."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_bliss.base.metrics import MetricsLogger
from megatron_bliss.base.platform import peak_memory_bytes
from megatron_bliss.base.progress import Progress, progress

MEASURED = (
    "tokens_per_second",
    "milliseconds_per_iteration",
    "flops_per_second_per_device",
    "model_flops_utilisation",
    "peak_memory_bytes",
)
"""Metrics that differ between two runs of the same options."""


@dataclass(frozen=True)
class Workload:
    """What one iteration takes and what it runs on: its seconds are judged by this."""

    tokens: int
    flops: float
    """The model's own, over all devices: recomputed activations don't count."""
    devices: int
    peak_flops: float | None
    """FLOP/s that one device could do at best; None where nobody knows."""


class TrainingLog:
    """Where the numbers of a segment go, and how fast it runs."""

    def __init__(
        self,
        metrics: MetricsLogger | None,
        labels: Mapping[str, str | int],
        workload: Workload,
        *,
        interval: int,
        show_progress: bool,
        speaks: bool,
    ) -> None:
        """``labels``: arm, round and stage. ``interval``: iterations between lines. ``speaks`` on the one rank whose
        warnings are heard."""
        self.metrics, self.labels, self.workload = metrics, labels, workload
        self.interval, self.show_progress, self.speaks = interval, show_progress, speaks
        self._seconds, self._iterations = 0.0, 0

    @property
    def name(self) -> str:
        """What is being trained, for people."""
        arm, number = self.labels["arm"], self.labels["round"]
        name = f"{arm} round {number} target" if number else "warm-up target"
        return f"{name}, decay branch" if self.labels["stage"].endswith("decay_branch") else name

    def bar(self, total: int, done: int) -> Progress:
        """The progress line of the segment."""
        return progress(total, description=self.name, unit="steps", enabled=self.show_progress, initial=done)

    def count(self, seconds: float) -> None:
        """Add an iteration's time (evaluations and checkpoints are left out)."""
        self._seconds, self._iterations = self._seconds + seconds, self._iterations + 1

    def speed(self) -> dict[str, float]:
        """Means since the last call: tokens/s, ms per iteration, FLOP/s of one device and the share of its peak that
        was used (MFU; NaN, which is null in the file, where the peak is unknown); peak memory in bytes."""
        seconds = self._seconds / self._iterations
        self._seconds, self._iterations = 0.0, 0
        workload = self.workload
        flops, peak = workload.flops / workload.devices / seconds, workload.peak_flops
        return {
            "tokens_per_second": workload.tokens / seconds,
            "milliseconds_per_iteration": 1000 * seconds,
            "flops_per_second_per_device": flops,
            "model_flops_utilisation": math.nan if peak is None else flops / peak,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def show(self, bar: Progress, values: dict[str, float]) -> None:
        """Put the few numbers that one watches on the progress line."""
        shown = {
            "loss": values["loss"],
            "norm": values["grad_norm"],
            "lr": values["lr"],
            "tokens/s": values["tokens_per_second"],
            "TFLOP/s": values["flops_per_second_per_device"] / 1e12,
            "GiB": values["peak_memory_bytes"] / 2**30,
        }
        if self.workload.peak_flops is not None:
            shown["MFU"] = values["model_flops_utilisation"]
        if values["skipped_iterations"]:
            shown["skipped"] = values["skipped_iterations"]
        bar.set(**shown)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log values at a step of the segment."""
        if self.metrics is not None:
            self.metrics.log(step, values, **self.labels)

    def say(self, text: str) -> None:
        """One line on standard error."""
        if self.speaks:
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def drop_after(self, step: int) -> None:
        """Forget what a killed run logged after the checkpoint that this one goes on from."""
        if self.metrics is not None:
            self.metrics.truncate(step=step, **self.labels)
