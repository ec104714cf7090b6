"""One segment of the target's training: from checkpoint to checkpoint over one corpus, resumable, measured on the way.

Iterations are counted over the whole run: a segment goes from ``first_iteration`` done to ``last_iteration`` done.
Shapes: b samples, s tokens.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_bliss.base import checkpoint
from megatron_bliss.base.metrics import MetricsLogger
from megatron_bliss.base.parallel import Groups, broadcast_object
from megatron_bliss.base.platform import choose_dtype
from megatron_bliss.base.progress import Progress
from megatron_bliss.config.config import PlatformConfig, PretrainingConfig, TargetConfig
from megatron_bliss.data.batches import Batch
from megatron_bliss.models.flops import training_flops
from megatron_bliss.models.presets import Architecture
from megatron_bliss.target.checkpoint import Save, load_target_and_optimizer, load_target_weights_from, start_save
from megatron_bliss.target.health import SKIP, STOP, WARN, TrainingHealth
from megatron_bliss.target.log import TrainingLog
from megatron_bliss.target.model import Target, build_target, forward_only
from megatron_bliss.target.pretrained import load_pretrained
from megatron_bliss.target.sequences import MicroBatch, SequenceSource, TrainingSequences
from megatron_bliss.target.throughput import peak_flops
from megatron_bliss.target.trainer import Step, TargetTrainer

Evaluation = list[Any]
"""[iteration, tokens trained on since the start of the run, {test set: loss}]."""


@dataclass(frozen=True)
class SegmentResult:
    """What a segment left: evaluations in order, tokens, seconds (all parts of a resumed one), FLOPs, checkpoint."""

    evaluations: list[Evaluation]
    tokens: int
    seconds: float
    flops: float
    checkpoint: Path
    skipped: int
    """Iterations that left the weights alone."""
    kernels: str
    """Layers, attention and optimizer that were in use."""


def train_segment(
    *,
    config: PretrainingConfig,
    target_config: TargetConfig,
    architecture: Architecture,
    groups: Groups,
    platform: PlatformConfig,
    data_prefix: str,
    seq_length: int,
    seed: int,
    start: str | Path | None,
    pretrained: str | Path | None = None,
    first_iteration: int,
    last_iteration: int,
    total_iterations: int,
    folder: str | Path,
    save_interval: int,
    metrics: MetricsLogger | None = None,
    log_interval: int = 10,
    evaluate: Callable[[Target], dict[str, float]] | None = None,
    arm: str = "",
    round: int = 0,
    stage: str = "pretrain",
    progress: bool = False,
    num_workers: int = 0,
    blend: Sequence[tuple[str, float]] = (),
    init_seed: int | None = None,
    keep: int = 2,
    async_save: bool = False,
    device_peak_tflops: float = 0.0,
) -> SegmentResult:
    """Collective: train the target on ``data_prefix`` and leave ``folder/step_LAST/``.

    Starts from the newest checkpoint in ``folder``, else from the checkpoint ``start`` (weights and optimizer, or
    weights alone), else from the weights of ``pretrained`` (see pretrained.py), else from initial weights. Checkpoints
    of any parallel layout will do; the newest ``keep`` stay, and ``async_save`` writes them while training goes on.
    ``seed`` orders the data (and, unless ``init_seed`` is given, draws the weights). ``total_iterations`` spans the
    learning-rate schedule over all segments. Losses are means over real tokens of the whole batch.

    A run that was killed and started again gives the same weights, evaluations and metrics, bit for bit. Raises
    ValueError for options that don't fit, RuntimeError on every rank where ``config`` says to stop: at a loss or
    gradient that is not finite, at a spike of the loss, after too many updates left out in a row.
    """
    _check_span(first_iteration, last_iteration, total_iterations)
    init_seed = seed if init_seed is None else init_seed
    target = build_target(
        target_config, architecture, groups, seq_length=seq_length, params_dtype=choose_dtype(platform), seed=init_seed
    )
    trainer = TargetTrainer(target, config, groups, seq_length=seq_length, total_iterations=total_iterations)
    num_samples = (last_iteration - first_iteration) * config.global_batch_size
    source = SequenceSource(data_prefix, architecture.vocab_size, seq_length, num_samples, seed, blend)
    data = TrainingSequences(source, groups, cache_folder=Path(folder) / "data_cache", num_workers=num_workers)
    segment = _Segment(trainer, data, Path(folder), first_iteration, last_iteration, keep, async_save)
    segment.load(start, pretrained)
    flops = training_flops(config, architecture, seq_length)
    labels = {"arm": arm, "round": round, "stage": stage}
    log = TrainingLog(
        metrics,
        log_interval,
        progress and groups.is_main,
        tokens_per_iteration=segment.tokens_per_iteration,
        flops_per_iteration=flops,
        devices=groups.world_size,
        peak_flops=peak_flops(platform, groups.device, device_peak_tflops),
        speaks=groups.is_main,
        **labels,
    )
    segment.run(config.eval_interval, save_interval, evaluate, log)
    result = segment.result(flops)
    del segment, trainer, target
    gc.collect()  # megatron-core's hooks hold weights, gradients and optimizer in reference cycles
    return result


def _check_span(first: int, last: int, total: int) -> None:
    if not 0 <= first < last <= total:
        raise ValueError(
            f"found a segment from iteration {first} to {last} of {total}, expected 0 <= first < last <= total: set "
            "pretraining.warmup_iters and pretraining.train_iters to at least 1"
        )


class _Segment:
    """Progress of one segment: its counters, and the loop that moves them."""

    def __init__(
        self,
        trainer: TargetTrainer,
        data: TrainingSequences,
        folder: Path,
        first: int,
        last: int,
        keep: int,
        async_save: bool,
    ) -> None:
        self.trainer, self.data, self.folder, self.first, self.last = trainer, data, folder, first, last
        self.keep, self.async_save = keep, async_save
        self.pending: Save | None = None
        self.groups, self.config = trainer.groups, trainer.config
        self.iteration, self.seconds = first, 0.0
        self.evaluations: list[Evaluation] = []
        self.health = TrainingHealth(trainer.config)
        self.tokens_per_iteration = trainer.config.global_batch_size * trainer.seq_length

    def load(self, start: str | Path | None, pretrained: str | Path | None = None) -> None:
        """Go on from this folder's newest checkpoint, or begin from ``start``, or from ``pretrained`` weights."""
        own = broadcast_object(checkpoint.latest(self.folder), self.groups)
        path = own or start
        trainer = self.trainer
        if path is None:
            if pretrained is not None:
                load_pretrained(trainer.target, pretrained, self.groups)
                trainer.optimizer.reload_model_params()
            return
        shared = load_target_and_optimizer(path, trainer.target, trainer.optimizer, self.groups)
        if own is None and "iteration" not in shared:  # weights alone: where training begins
            trainer.set_iteration(self.first)
            return
        if own is None and shared["iteration"] != self.first:
            raise ValueError(
                f"found iteration {shared['iteration']} in checkpoint {path}, expected {self.first}: the segment "
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
            self.seconds, self.evaluations = shared["seconds"], shared["evaluations"]

    def save(self) -> None:
        """Collective: write a checkpoint of this iteration, or begin to."""
        self.finish_save()
        shared = {
            "iteration": self.iteration,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
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
            keep=self.keep,
            asynchronous=self.async_save,
        )
        if not self.async_save or self.iteration == self.last:
            self.finish_save()

    def finish_save(self) -> None:
        """Collective: give the checkpoint that is being written its name; raises where it could not be written."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.finish()

    def result(self, flops_per_iteration: float) -> SegmentResult:
        """What the finished segment left."""
        iterations = self.last - self.first
        return SegmentResult(
            evaluations=self.evaluations,
            tokens=iterations * self.tokens_per_iteration,
            seconds=self.seconds,
            flops=iterations * flops_per_iteration,
            checkpoint=checkpoint.step_folder(self.folder, self.last),
            skipped=self.health.skipped,
            kernels=self.trainer.describe(),
        )

    def run(
        self,
        eval_interval: int,
        save_interval: int,
        evaluate: Callable[[Target], dict[str, float]] | None,
        log: TrainingLog,
    ) -> None:
        """Train to the last iteration."""
        log.drop_after(self.iteration - self.first)
        if self.iteration < self.last:
            log.say(f"kernels: {self.trainer.describe()}")
        consumed = (self.iteration - self.first) * self.config.global_batch_size
        batches = self.data.micro_batches(consumed, self.config.global_batch_size, self.config.micro_batch_size)
        seconds_before, began = self.seconds, time.perf_counter()
        try:
            with log.bar(self.last - self.first, self.iteration - self.first) as bar:
                while self.iteration < self.last:
                    self._iterate(batches, log, bar)
                    is_last = self.iteration == self.last
                    evaluates = evaluate is not None and (is_last or self.iteration % eval_interval == 0)
                    saves = is_last or self.iteration % save_interval == 0
                    with self.trainer.settled() if evaluates or saves else contextlib.nullcontext():
                        if evaluates:
                            self._evaluate(evaluate, log)
                        self.seconds = seconds_before + time.perf_counter() - began
                        if saves:
                            self.save()
        finally:
            if self.pending is not None:  # an error: leave no thread that writes where the next attempt does
                self.pending.wait()

    def _iterate(self, batches: Iterator[MicroBatch], log: TrainingLog, bar: Progress) -> None:
        began = time.perf_counter()
        step = self.trainer.step(batches, self.health.accepts)
        log.count(time.perf_counter() - began)
        self.iteration += 1
        if self.pending is not None and self.pending.is_written():
            self.finish_save()
        self._tell(step, log)
        bar.update()
        if self.iteration % log.interval == 0 or self.iteration == self.last:
            values = {"loss": self.trainer.take_loss(), "grad_norm": step.grad_norm, "lr": step.lr}
            values |= {"skipped_iterations": self.health.skipped, **log.speed()}
            log.show(bar, values)
            log.write(self.iteration - self.first, values)

    def _tell(self, step: Step, log: TrainingLog) -> None:
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
            log.say(f"iteration {self.iteration} left out ({health.skipped} so far): {health.reason}")
        if health.verdict == WARN:
            log.say(f"warning: iteration {self.iteration}: {health.reason}")
        if health.verdict in (SKIP, WARN):
            values = {"unusual_loss": step.loss, "unusual_grad_norm": step.grad_norm, "left_out": not step.updated}
            log.write(self.iteration - self.first, values)

    def _evaluate(self, evaluate: Callable[[Target], dict[str, float]], log: TrainingLog) -> None:
        losses = evaluate(self.trainer.target)
        self.evaluations.append([self.iteration, self.iteration * self.tokens_per_iteration, losses])
        log.write(self.iteration - self.first, {f"evaluation/{name}": loss for name, loss in losses.items()})


def load_target(
    path: str | Path,
    *,
    target_config: TargetConfig,
    architecture: Architecture,
    groups: Groups,
    platform: PlatformConfig,
    seq_length: int,
    seed: int = 0,
) -> Target:
    """Collective: the target with the weights of a checkpoint of any layout, to be used as it is (not trained)."""
    dtype = choose_dtype(platform)
    target = build_target(target_config, architecture, groups, seq_length=seq_length, params_dtype=dtype, seed=seed)
    load_target_weights_from(path, target, groups)
    for chunk in target:
        chunk.requires_grad_(False)
    return target


def evaluate_loss(target: Target, batches: Sequence[Batch], groups: Groups) -> float:
    """Collective: mean of -log p over the labelled tokens of all batches, which every rank brings; eq. (4)'s measure.

    Data-parallel replicas take turns by batch. Exact, and the same at every parallel layout but for rounding in a
    forward pass. ValueError where no token is labelled.
    """
    mine = list(batches)[groups.data_parallel_rank :: groups.data_parallel_size]
    total = label_losses(target, mine, groups)
    dist.all_reduce(total, group=groups.world_group)
    if not total[1]:
        raise ValueError("found no labelled token in the evaluation batches, expected at least one: check the test set")
    return (total[0] / total[1]).item()


def label_losses(target: Target, batches: Sequence[Batch], groups: Groups) -> Tensor:
    """[sum of -log p, count], fp64, over the labelled tokens of batches that a model-parallel group brings.

    Collective over that group; one of its ranks has the numbers, the others zeros: a sum over ranks is exact.
    """
    rows = max((len(batch) for batch in batches), default=0)
    width = max((batch.tokens.shape[1] for batch in batches), default=0)
    multiple = groups.tensor_model_parallel_size if target[0].config.sequence_parallel else 1
    width += -width % multiple
    micro_batches, masks = [], []
    for batch in batches:
        tokens, mask = batch.tokens, batch.label_mask
        if groups.pipeline_model_parallel_size > 1 or multiple > 1:  # one shape for all micro-batches of a pipeline
            tokens, mask = _pad(tokens, rows, width), _pad(mask, rows, width)
        micro_batches.append((tokens, tokens.roll(-1, 1)))
        masks.append(F.pad(mask[:, 1:], (0, 1)))

    def collect(losses: Tensor, index: int) -> tuple[float, float]:
        mask = masks[index].to(losses.device)
        return losses.double()[mask].sum().item(), float(mask.sum().item())

    parts = forward_only(target, micro_batches, collect, groups)
    counted = groups.is_last_pipeline_stage and groups.tensor_model_parallel_rank == 0
    sums = [math.fsum(part[i] for part in parts) if counted else 0.0 for i in (0, 1)]
    return torch.tensor(sums, dtype=torch.float64, device=groups.device)


def _pad(tensor: Tensor, rows: int, width: int) -> Tensor:
    return F.pad(tensor, (0, width - tensor.shape[1], 0, rows - tensor.shape[0]))
