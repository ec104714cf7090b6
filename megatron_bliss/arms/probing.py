"""Oracle influence: by how much one step of the target on one unit alone lowers its loss on the reference set.

    I(x) = L(theta) - L(theta - lr u(g_x)),   g_x: gradient of the mean next-token loss of unit x, clipped
    sgd:   u(g) = g
    adam:  u(g) = m' / (1 - beta1^t) / (sqrt(v' / (1 - beta2^t)) + eps),
           m' = beta1 m + (1 - beta1) g,  v' = beta2 v + (1 - beta2) g^2

with m, v and t - 1 of the checkpoint. Weight decay is left out: it takes the same away whatever the unit.

Every data-parallel replica measures units of its own; inside one, the target lies as it does in training.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bliss.arms.inputs import Inputs
from megatron_bliss.base.parallel import Groups, broadcast_object, failing_together
from megatron_bliss.base.progress import Progress, progress
from megatron_bliss.data.batches import Batch
from megatron_bliss.data.guide import draw_samples
from megatron_bliss.selection.score_pass import save_array
from megatron_bliss.target.gradient import gradient_norm, loss_gradient, parameters
from megatron_bliss.target.loss import label_losses
from megatron_bliss.target.model import Target
from megatron_bliss.target.state import Moments

PROBES_PER_FILE = 16
"""Small enough to lose little by a kill: a probe of a large target takes seconds."""


@dataclass(frozen=True)
class Step:
    """The optimisation step of a probe: learning rate, largest gradient norm (0: any), and Adam's constants.

    ``moments`` None: the step is along the gradient.
    """

    lr: float
    clip_grad: float
    moments: Moments | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def clipping(self, norm: float) -> float:
        """What a gradient of this norm is multiplied by."""
        return min(1.0, self.clip_grad / (norm + 1e-6)) if self.clip_grad > 0 else 1.0

    def update(self, number: int, gradient: Tensor) -> Tensor:
        """lr u(g) of the weight ``number``; the gradient's memory may be used for it."""
        if self.moments is None:
            return gradient.mul_(self.lr)
        first, second = self.moments.pairs[number]
        count = self.moments.step + 1
        denominator = second.mul(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        denominator.div_(1 - self.beta2**count).sqrt_().add_(self.eps)
        mean = gradient.mul_(1 - self.beta1).add_(first, alpha=self.beta1)
        return mean.div_(denominator).mul_(self.lr / (1 - self.beta1**count))


class Probe:
    """One replica of the target, in fp32, with its weights kept aside; every measurement leaves them as they were."""

    def __init__(self, target: Target, step: Step, reference: Sequence[Batch], groups: Groups) -> None:
        """Collective over a model-parallel group, whose ranks all bring the same reference batches."""
        self.target, self.step, self.groups = target, step, groups
        self.reference = [batch.to(groups.device) for batch in reference]
        for chunk in target:
            chunk.requires_grad_(True)
        self.start = [parameter.detach().clone() for parameter in parameters(target)]
        self.loss = self._reference_loss()
        """Of the reference set before any step."""

    def influence(self, unit: Batch) -> float:
        """Reduction of the reference loss by one step on ``unit``; collective over a model-parallel group.

        FloatingPointError, on every rank of the group, where it is no finite number.
        """
        try:
            loss_gradient(self.target, unit, self.groups)
            self._move(gradient_norm(self.target, self.groups))
            influence = self.loss - self._reference_loss()
        finally:
            self._restore()
        return finite(influence, unit, "mates")

    @torch.no_grad()
    def _move(self, norm: float) -> None:
        scale = self.step.clipping(norm)
        for number, parameter in enumerate(parameters(self.target)):
            parameter.sub_(self.step.update(number, parameter.grad.mul_(scale)))
            parameter.grad = None

    @torch.no_grad()
    def _restore(self) -> None:
        for parameter, start in zip(parameters(self.target), self.start, strict=True):
            parameter.copy_(start)
            parameter.grad = None

    def _reference_loss(self) -> float:
        total = label_losses(self.target, self.reference, self.groups)
        dist.all_reduce(total, group=self.groups.model_parallel_group)
        if not total[1]:
            raise ValueError("found no labelled token in the reference samples, expected some: check the reference set")
        return (total[0] / total[1]).item()


def finite(influence: float, unit: Batch, arm: str) -> float:
    """The influence; FloatingPointError where it is no finite number."""
    if not math.isfinite(influence):
        raise FloatingPointError(
            f"found influence {influence} of unit {unit.unit_ids.tolist()}, expected a finite number: lower "
            f"baselines.{arm}.lr"
        )
    return influence


def draw(size: int, count: int, seed: int, purpose: int) -> np.ndarray:
    """``count`` of ``size`` numbers without replacement, in random order; all of them where there are fewer."""
    return np.random.Generator(np.random.PCG64([seed, purpose])).permutation(size)[:count]


def reference_batches(inputs: Inputs, samples: int, size: int) -> list[Batch]:
    """The round's reference samples, those of like length together, so that little of a batch is padding."""
    ids = draw_samples(inputs.reference, samples, np.random.Generator(np.random.PCG64([inputs.seed, 1])))
    ids = ids[np.argsort(inputs.reference.batch(ids).lengths.numpy(), kind="stable")]
    return [inputs.reference.batch(ids[start : start + size]) for start in range(0, len(ids), size)]


def make_step(inputs: Inputs, optimizer: str, lr: float, clip_grad: float, target: Target) -> Step:
    """The step that the target's training would take next (adam), or one along the gradient (sgd)."""
    moments = inputs.load_moments(target) if optimizer == "adam" else None
    adam = inputs.target_optimizer
    return Step(lr, clip_grad, moments, beta1=adam.adam_beta1, beta2=adam.adam_beta2, eps=adam.adam_eps)


@dataclass(frozen=True)
class Oracle:
    """Who measures influences: this rank's replica of the model, which opens where a unit is to be measured."""

    open: Callable[[], Callable[[Batch], float]]
    """Loads the model and returns unit -> influence; collective."""
    replica: int
    replicas: int
    is_writer: bool
    """Whether this rank writes what its replica has measured."""


def target_oracle(inputs: Inputs, reference: Sequence[Batch], step_of: Callable[[Target], Step]) -> Oracle:
    """The arm's target: a replica is what data parallelism makes one."""
    groups = inputs.groups

    def open_target() -> Callable[[Batch], float]:
        target = inputs.load_target()
        return Probe(target, step_of(target), reference, groups).influence

    is_writer = groups.is_last_pipeline_stage and groups.tensor_model_parallel_rank == 0
    return Oracle(open_target, groups.data_parallel_rank, groups.data_parallel_size, is_writer)


def measure_influences(inputs: Inputs, units: np.ndarray, oracle: Oracle, name: str) -> np.ndarray:
    """Influence of every unit, fp64 in their order, on every rank; what files have already is not measured again.

    name: the arm, for the line of progress.
    """
    groups, folder = inputs.groups, inputs.folder / "probes"
    parts = [units[start : start + PROBES_PER_FILE] for start in range(0, len(units), PROBES_PER_FILE)]
    paths = [folder / f"{number:06d}.npy" for number in range(len(parts))]
    missing = broadcast_object([number for number, path in enumerate(paths) if not path.is_file()], groups)
    work = [(paths[number], parts[number]) for number in missing]
    with progress(
        len(units),
        description=f"{inputs.description} {name} probes",
        unit="probes",
        enabled=inputs.show_progress,
        initial=len(units) - sum(len(part) for _, part in work),
    ) as bar:
        if work:
            folder.mkdir(parents=True, exist_ok=True)
            _measure(inputs, work, oracle, bar)
    with failing_together(groups):
        influences = np.concatenate([np.load(path) for path in paths]) if groups.is_main else None
    return broadcast_object(influences, groups)


def _measure(inputs: Inputs, work: list[tuple[Path, np.ndarray]], oracle: Oracle, bar: Progress) -> None:
    """Replicas take files in turn; after each turn all ranks meet, so that an error of one ends the others, too."""
    influence = oracle.open()
    for first in range(0, len(work), oracle.replicas):
        turn = work[first : first + oracle.replicas]
        with failing_together(inputs.groups):
            for path, units in turn[oracle.replica :][:1]:  # none, where the last turn is not full
                influences = [influence(inputs.source.batch(units[i : i + 1])) for i in range(len(units))]
                if oracle.is_writer:
                    save_array(path, np.array(influences))
        bar.update(sum(len(units) for _, units in turn))
    del influence
    gc.collect()  # megatron-core's hooks hold weights in reference cycles
