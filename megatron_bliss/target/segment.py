"""One segment of the target's training: from checkpoint to checkpoint over one corpus, resumable, measured on the way.

Iterations are counted over the whole run: a segment goes from ``first_iteration`` done to ``last_iteration`` done.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_bliss.base import checkpoint
from megatron_bliss.base.metrics import MetricsLogger
from megatron_bliss.base.parallel import broadcast_object
from megatron_bliss.base.progress import Progress
from megatron_bliss.config.output import CheckpointConfig, LoggingConfig
from megatron_bliss.config.training import PretrainingConfig
from megatron_bliss.models.flops import training_flops
from megatron_bliss.target.checkpoint import Save, load_target_and_optimizer, start_save
from megatron_bliss.target.health import SKIP, STOP, WARN, TrainingHealth
from megatron_bliss.target.log import TrainingLog, Workload
from megatron_bliss.target.model import Target
from megatron_bliss.target.pretrained import load_pretrained
from megatron_bliss.target.sequences import MicroBatch, SequenceSource, TrainingSequences
from megatron_bliss.target.setup import TargetSetup
from megatron_bliss.target.throughput import peak_flops
from megatron_bliss.target.trainer import Step, TargetTrainer


@dataclass(frozen=True)
class Segment:
    """What is trained on, over which iterations of the run, and from which weights."""

    data_prefix: str
    seed: int
    """Of the order of the data."""
    first_iteration: int
    last_iteration: int
    total_iterations: int
    """Of the whole run: the learning-rate schedule spans them."""
    start: str | Path | None = None
    """Checkpoint that the segment goes on from: weights and optimizer, or weights alone."""
    pretrained: str | Path | None = None
    """Weights to begin from where there is no ``start`` (see pretrained.py); without either, initial ones."""
    blend: Sequence[tuple[str, float]] = ()
    """Further (prefix, share of the sequences); ``data_prefix`` has the rest."""
    num_workers: int = 0
    """Processes that read the data."""

    @property
    def iterations(self) -> int:
        """How many the segment has."""
        return self.last_iteration - self.first_iteration

    def check(self) -> None:
        """ValueError where the iterations are none of the run's."""
        first, last, total = self.first_iteration, self.last_iteration, self.total_iterations
        if not 0 <= first < last <= total:
            raise ValueError(
                f"found a segment from iteration {first} to {last} of {total}, expected 0 <= first < last <= total: "
                "set pretraining.warmup_iters and pretraining.train_iters to at least 1"
            )


@dataclass(frozen=True)
class Recording:
    """What is kept of a segment, and where: checkpoints in ``folder``, numbers in ``metrics`` under the labels."""

    folder: Path
    saving: CheckpointConfig
    logging: LoggingConfig
    metrics: MetricsLogger | None = None
    evaluate: Callable[[Target], dict[str, float]] | None = None
    """The target's losses by test set, asked for every ``eval_interval`` iterations and at the end."""
    arm: str = ""
    round: int = 0
    stage: str = "pretrain"

    @property
    def labels(self) -> dict[str, str | int]:
        """What names the segment in ``metrics.jsonl``."""
        return {"arm": self.arm, "round": self.round, "stage": self.stage}


class Evaluation(NamedTuple):
    """``tokens``: trained on since the start of the run. ``losses``: by test set."""

    iteration: int
    tokens: int
    losses: dict[str, float]


@dataclass(frozen=True)
class SegmentResult:
    """What a segment left: evaluations in order, FLOPs, its last checkpoint."""

    evaluations: list[Evaluation]
    flops: float
    checkpoint: Path
    skipped: int
    """Iterations that left the weights alone."""
    kernels: str
    """Layers, attention and optimizer that were in use."""
    evaluation_seconds: float
    """Of this attempt: what measuring took, which is no part of training."""


def train_segment(
    setup: TargetSetup, config: PretrainingConfig, segment: Segment, recording: Recording
) -> SegmentResult:
    """Collective: train the target over the segment and leave ``recording.folder/step_LAST/``.

    Starts from the newest checkpoint in that folder, else from where ``segment`` says. Checkpoints of any parallel
    layout will do. Losses are means over real tokens of the whole batch.

    A run that was killed and started again gives the same weights, evaluations and metrics, bit for bit. Raises
    ValueError for options that don't fit, RuntimeError on every rank where ``config`` says to stop: at a loss or
    gradient that is not finite, at a spike of the loss, after too many updates left out in a row.
    """
    segment.check()
    groups, seq_length = setup.groups, setup.seq_length
    target = setup.build()
    trainer = TargetTrainer(target, config, groups, seq_length=seq_length, total_iterations=segment.total_iterations)
    source = SequenceSource(
        segment.data_prefix,
        setup.architecture.vocab_size,
        seq_length,
        segment.iterations * config.global_batch_size,
        segment.seed,
        segment.blend,
    )
    cache = recording.folder / "data_cache"
    data = TrainingSequences(source, groups, cache_folder=cache, num_workers=segment.num_workers)
    loop = _Loop(trainer, data, segment, recording, _make_log(setup, config, recording))
    loop.load()
    loop.run()
    result = loop.result()
    del loop, trainer, target
    gc.collect()  # megatron-core's hooks hold weights, gradients and optimizer in reference cycles
    return result


def _make_log(setup: TargetSetup, config: PretrainingConfig, recording: Recording) -> TrainingLog:
    groups, logging = setup.groups, recording.logging
    workload = Workload(
        tokens=config.global_batch_size * setup.seq_length,
        flops=training_flops(config, setup.architecture, setup.seq_length),
        devices=groups.world_size,
        peak_flops=peak_flops(setup.platform, groups.device, logging.device_peak_tflops),
    )
    return TrainingLog(
        recording.metrics,
        recording.labels,
        workload,
        interval=logging.log_interval,
        show_progress=groups.is_main and logging.progress != "none",
        speaks=groups.is_main,
    )


class _Loop:
    """Counters of a segment, and the loop that moves them."""

    def __init__(
        self,
        trainer: TargetTrainer,
        data: TrainingSequences,
        segment: Segment,
        recording: Recording,
        log: TrainingLog,
    ) -> None:
        self.trainer, self.data, self.segment, self.recording, self.log = trainer, data, segment, recording, log
        self.groups, self.config, self.folder = trainer.groups, trainer.config, recording.folder
        self.iteration = segment.first_iteration
        self.evaluations: list[Evaluation] = []
        self.evaluation_seconds = 0.0
        self.health = TrainingHealth(trainer.config)
        self.pending: Save | None = None

    @property
    def done(self) -> int:
        """Iterations of the segment that are behind it."""
        return self.iteration - self.segment.first_iteration

    @property
    def is_last(self) -> bool:
        """Whether none is left."""
        return self.iteration == self.segment.last_iteration

    def load(self) -> None:
        """Go on from this folder's newest checkpoint, or begin from where the segment says."""
        own = broadcast_object(checkpoint.latest(self.folder), self.groups)
        path = own or self.segment.start
        if path is None:
            self._load_pretrained()
            return
        trainer, first = self.trainer, self.segment.first_iteration
        shared = load_target_and_optimizer(path, trainer.target, trainer.optimizer, self.groups)
        if own is None and "iteration" not in shared:  # weights alone: where training begins
            trainer.set_iteration(first)
            return
        if own is None and shared["iteration"] != first:
            raise ValueError(
                f"found iteration {shared['iteration']} in checkpoint {path}, expected {first}: the segment "
                "before was trained with another pretraining.warmup_iters or pretraining.train_iters"
            )
        if own is not None and shared["data"] != self.data.digest:
            raise ValueError(
                f"found another index at {self.data.source.prefix}.idx than checkpoint {path} was trained on: put the "
                f"old one back, or remove {self.folder} to train this stage again"
            )
        trainer.resume(shared["iteration"], shared["loss_sum"])
        self.iteration = shared["iteration"]
        if own is not None:
            self.health.load(shared["health"])
            self.evaluations = [Evaluation(*point) for point in shared["evaluations"]]

    def _load_pretrained(self) -> None:
        if self.segment.pretrained is not None:
            load_pretrained(self.trainer.target, self.segment.pretrained, self.groups)
            self.trainer.optimizer.reload_model_params()

    def save(self) -> None:
        """Collective: write a checkpoint of this iteration, or begin to."""
        self.finish_save()
        saving = self.recording.saving
        shared = {
            "iteration": self.iteration,
            "evaluations": [list(point) for point in self.evaluations],
            "data": self.data.digest,
            "loss_sum": self.trainer.loss_sum.tolist(),
            "health": self.health.state(),
        }
        self.pending = start_save(
            self.folder,
            self.iteration,
            self.trainer.target,
            self.groups,
            shared=shared,
            optimizer=self.trainer.optimizer,
            keep=saving.keep,
            asynchronous=saving.async_save,
        )
        if not saving.async_save or self.is_last:
            self.finish_save()

    def finish_save(self) -> None:
        """Collective: give the checkpoint that is being written its name; raises where it could not be written."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.finish()

    def result(self) -> SegmentResult:
        """What the finished segment left."""
        return SegmentResult(
            evaluations=self.evaluations,
            flops=self.segment.iterations * self.log.workload.flops,
            checkpoint=checkpoint.step_folder(self.folder, self.segment.last_iteration),
            skipped=self.health.skipped,
            kernels=self.trainer.describe(),
            evaluation_seconds=self.evaluation_seconds,
        )

    def run(self) -> None:
        """Train to the last iteration."""
        self.log.drop_after(self.done)
        if not self.is_last:
            self.log.say(f"kernels: {self.trainer.describe()}")
        batch_size = self.config.global_batch_size
        batches = self.data.micro_batches(self.done * batch_size, batch_size, self.config.micro_batch_size)
        try:
            with self.log.bar(self.segment.iterations, self.done) as bar:
                while not self.is_last:
                    self._iterate(batches, bar)
                    evaluates = self.recording.evaluate is not None and self._is_due(self.config.eval_interval)
                    saves = self._is_due(self.recording.saving.save_interval)
                    with self.trainer.settled() if evaluates or saves else contextlib.nullcontext():
                        if evaluates:
                            self._evaluate()
                        if saves:
                            self.save()
        finally:
            if self.pending is not None:  # an error: leave no thread that writes where the next attempt does
                self.pending.wait()

    def _is_due(self, interval: int) -> bool:
        """Whether to do now what is done every ``interval`` iterations and after the last one."""
        return self.is_last or self.iteration % interval == 0

    def _iterate(self, batches: Iterator[MicroBatch], bar: Progress) -> None:
        log, began = self.log, time.perf_counter()
        step = self.trainer.step(batches, self.health.accepts)
        log.count(time.perf_counter() - began)
        self.iteration += 1
        if self.pending is not None and self.pending.is_written():
            self.finish_save()
        self._tell(step)
        bar.update()
        if self._is_due(log.interval):
            values = {"loss": self.trainer.take_loss(), "grad_norm": step.grad_norm, "lr": step.lr}
            values |= {"skipped_iterations": self.health.skipped, **log.speed()}
            log.show(bar, values)
            log.write(self.done, values)

    def _tell(self, step: Step) -> None:
        """Say what was unusual about an iteration; RuntimeError on every rank where it ends the run."""
        health = self.health
        if health.verdict == STOP:
            self.finish_save()
            saved = checkpoint.latest(self.folder)
            raise RuntimeError(
                f"{health.reason} at iteration {self.iteration}: nothing was saved after "
                f"{saved or 'the start of the segment'}; lower pretraining.optimizer.lr, lengthen lr_warmup_iters or "
                "lower clip_grad, or leave such updates out (pretraining.on_nonfinite or on_loss_spike: skip), then "
                "run again"
            )
        if health.verdict == SKIP:
            self.log.say(f"iteration {self.iteration} left out ({health.skipped} so far): {health.reason}")
        if health.verdict == WARN:
            self.log.say(f"warning: iteration {self.iteration}: {health.reason}")
        if health.verdict in (SKIP, WARN):
            values = {"unusual_loss": step.loss, "unusual_grad_norm": step.grad_norm, "left_out": not step.updated}
            self.log.write(self.done, values)

    def _evaluate(self) -> None:
        began = time.perf_counter()
        losses = self.recording.evaluate(self.trainer.target)
        self.evaluation_seconds += time.perf_counter() - began
        self.evaluations.append(Evaluation(self.iteration, self.iteration * self.log.workload.tokens, losses))
        self.log.write(self.done, {f"evaluation/{name}": loss for name, loss in losses.items()})
