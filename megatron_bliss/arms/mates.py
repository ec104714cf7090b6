"""Data selection by influence on the model as it is now (MATES, arXiv 2406.06046), each round anew.

1. **Probe** a random part of the shard: by how much does one step of the arm's present target on a unit alone lower its
   loss on the reference set? (probing.py)
2. **Regress**: a small data influence model learns that from the unit's tokens, by mean squared error.
3. **Score** the whole shard by it.

As in the paper, a probe's step is what the target's next training step would be (Adam from its saved moments, clipped
gradient), influences are standardised, and a tenth of the probes is held out to rank-correlate predictions with them.
Unlike there, the data influence model is the warmed-up proxy's trunk and not a pre-trained BERT, so that no outside
judge is used, and its last state is taken, not its best. The paper draws its selection with Gumbel noise:
``--selection.policy gumbel`` does (a score of 1 is one standard deviation of the probes), any other policy works, too.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_bliss.arms.inputs import Inputs, Scores
from megatron_bliss.arms.probing import Probe, Step
from megatron_bliss.base import checkpoint
from megatron_bliss.base.metrics import Progress, progress
from megatron_bliss.base.parallel import all_gather_object, broadcast_object, failing_together
from megatron_bliss.bilevel import vector
from megatron_bliss.bilevel.hypergradient import score_batch
from megatron_bliss.config.baselines import FEWEST_PROBES, HELD_OUT, BaselinesConfig, MatesConfig
from megatron_bliss.config.config import OptimizerConfig
from megatron_bliss.data.batches import Batch, BatchSchedule, UnitDataset, rank_share
from megatron_bliss.models.flops import mates_flops
from megatron_bliss.models.optimizer import Optimizer
from megatron_bliss.models.score import ScoreModel
from megatron_bliss.selection.scoring import gather_scores, save_array, score_units
from megatron_bliss.target.model import Target

PROBES_PER_FILE = 16
"""Small enough to lose little by a kill: a probe of a large target takes seconds."""
NOISE = 0.1
"""A held-out rank correlation below this is warned of."""


def mates_scores(config: BaselinesConfig, inputs: Inputs) -> Scores:
    """Predicted influences, in standard deviations of the probed ones."""
    options, groups = config.mates, inputs.groups
    units = _draw(len(inputs.source), options.probe_units, inputs.seed, 0)
    if len(units) < FEWEST_PROBES:
        raise ValueError(
            f"found {len(units)} units to probe in the shard, expected {FEWEST_PROBES} or more: use fewer rounds or a "
            "larger corpus, or leave out the arm mates"
        )
    reference = _reference_batches(options, inputs)
    influences = _probe(options, inputs, units, reference)
    model, correlation = _influence_model(options, inputs, units, influences)
    blocks = inputs.folder / "blocks"
    with failing_together(groups):
        score_units(
            model,
            inputs.source,
            blocks,
            micro_batch_size=inputs.micro_batch_size,
            rank=groups.rank,
            world_size=groups.world_size,
            device=groups.device,
            show_progress=inputs.show_progress,
            description=f"{inputs.description} mates",
        )
    flops = _flops(options, inputs, model, units, reference)
    with failing_together(groups):  # by now every rank has written its blocks
        values = gather_scores(blocks, len(inputs.source)) if groups.is_main else None
    settings = {
        "method": "mates",
        "probes": len(units),
        "reference_samples": sum(len(batch) for batch in reference),
        "optimizer": options.optimizer,
        "lr": _learning_rate(options, inputs),
        "clip_grad": options.clip_grad,
        "regressor_iters": options.regressor_iters,
        "influence_mean": float(influences.mean()),
        "influence_std": float(influences.std()),
        "held_out_spearman": correlation,
    }
    return Scores(values, settings, flops, _warnings(correlation, inputs))


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Correlation of ranks, those of equal values averaged; 0 where one side is constant."""
    ranks = [_ranks(values) - (len(values) - 1) / 2 for values in (left, right)]
    norm = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / norm) if norm else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes + 1) / 2)[group]


def _draw(size: int, count: int, seed: int, purpose: int) -> np.ndarray:
    """``count`` of ``size`` numbers without replacement, in random order; all of them where there are fewer."""
    return np.random.Generator(np.random.PCG64([seed, purpose])).permutation(size)[:count]


def _reference_batches(options: MatesConfig, inputs: Inputs) -> list[Batch]:
    """The round's reference samples, those of like length together, so that little of a batch is padding."""
    ids = _draw(len(inputs.reference), options.reference_samples, inputs.seed, 1)
    ids = ids[np.argsort(inputs.reference.batch(ids).lengths.numpy(), kind="stable")]
    size = options.micro_batch_size
    return [inputs.reference.batch(ids[start : start + size]) for start in range(0, len(ids), size)]


def _learning_rate(options: MatesConfig, inputs: Inputs) -> float:
    return options.lr or inputs.target_optimizer.lr


# Probe


def _probe(options: MatesConfig, inputs: Inputs, units: np.ndarray, reference: list[Batch]) -> np.ndarray:
    """Influence of every unit, fp64 in their order, on every rank; what files have already is not measured again."""
    groups, folder = inputs.groups, inputs.folder / "probes"
    parts = [units[start : start + PROBES_PER_FILE] for start in range(0, len(units), PROBES_PER_FILE)]
    paths = [folder / f"{number:06d}.npy" for number in range(len(parts))]
    missing = broadcast_object([number for number, path in enumerate(paths) if not path.is_file()], groups)
    work = [(paths[number], parts[number]) for number in missing]
    with progress(
        len(units),
        description=f"{inputs.description} mates probes",
        unit="probes",
        enabled=inputs.show_progress,
        initial=len(units) - sum(len(part) for _, part in work),
    ) as bar:
        if work:
            folder.mkdir(parents=True, exist_ok=True)
            _measure(options, inputs, reference, work, bar)
    with failing_together(groups):
        influences = np.concatenate([np.load(path) for path in paths]) if groups.is_main else None
    return broadcast_object(influences, groups)


def _measure(
    options: MatesConfig, inputs: Inputs, reference: list[Batch], work: list[tuple[Path, np.ndarray]], bar: Progress
) -> None:
    """Replicas take files in turn; after each turn all ranks meet, so that an error of one ends the others, too."""
    groups = inputs.groups
    target = inputs.load_target()
    probe = Probe(target, _step(options, inputs, target), reference, groups)
    is_writer = groups.is_last_pipeline_stage and groups.tensor_model_parallel_rank == 0
    for first in range(0, len(work), groups.data_parallel_size):
        turn = work[first : first + groups.data_parallel_size]
        with failing_together(groups):
            for path, units in turn[groups.data_parallel_rank :][:1]:  # none, where the last turn is not full
                influences = [probe.influence(inputs.source.batch(units[i : i + 1])) for i in range(len(units))]
                if is_writer:
                    save_array(path, np.array(influences))
        bar.update(sum(len(units) for _, units in turn))
    del probe, target
    gc.collect()  # megatron-core's hooks hold weights in reference cycles


def _step(options: MatesConfig, inputs: Inputs, target: Target) -> Step:
    """The step that the target's training would take next, or one along the gradient."""
    moments = inputs.load_moments(target) if options.optimizer == "adam" else None
    adam = inputs.target_optimizer
    return Step(
        _learning_rate(options, inputs),
        options.clip_grad,
        moments,
        beta1=adam.adam_beta1,
        beta2=adam.adam_beta2,
        eps=adam.adam_eps,
    )


# Regress


class InfluenceRegression:
    """Trains a data influence model by mean squared error: a trainer for models/loop.py, data-parallel over the world.

    ``targets``: fp64 [n], of ``units``; the batches are the same for every number of ranks.
    """

    def __init__(
        self, options: MatesConfig, model: ScoreModel, inputs: Inputs, units: np.ndarray, targets: np.ndarray
    ) -> None:
        self.model, self.groups, self.micro_batch_size = model, inputs.groups, inputs.micro_batch_size
        source = _Probed(inputs.source, units)
        self.batch_size, self.targets = options.regressor_batch_size, torch.from_numpy(targets).float()
        self.batches = BatchSchedule(
            source,
            self.batch_size,
            seed=inputs.seed,
            rank=self.groups.rank,
            world_size=self.groups.world_size,
        )
        schedule = OptimizerConfig(
            lr=options.regressor_lr, lr_decay_style="linear", weight_decay=options.regressor_weight_decay
        )
        self.optimizer = Optimizer(model, schedule, options.regressor_iters)
        self.steps_done = 0

    def step(self) -> dict[str, float]:
        """One AdamW step; returns what to log."""
        batch = self.batches.at(self.steps_done).to(self.groups.device)
        targets = self.targets.to(self.groups.device)[batch.unit_ids]
        gradient, loss = vector.zeros(self.model), torch.zeros((), dtype=torch.float64, device=self.groups.device)
        for rows, part in batch.micro_batches(self.micro_batch_size):
            errors = self.model(part.tokens, part.lengths) - targets[rows]
            part_loss = errors.square().sum() / self.batch_size
            found = torch.autograd.grad(part_loss, list(self.model.parameters()))
            for total, added in zip(gradient.values(), found, strict=True):
                total += added
            loss += part_loss.detach()
        dist.all_reduce(gradient.flat, group=self.groups.world_group)
        dist.all_reduce(loss, group=self.groups.world_group)
        norm, rate = self.optimizer.step(gradient)
        self.steps_done += 1
        return {"loss": loss.item(), "grad_norm": norm, "lr": rate}

    def watch(self, values: dict[str, float]) -> list[str]:
        """Nothing to warn of before the held-out probes are predicted."""
        return []

    def state_dict(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "steps_done": self.steps_done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state_dict()``."""
        self.steps_done = int(state["steps_done"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class _Probed:
    """The probed units of a shard as a batch source of their own; a batch's ``unit_ids`` are places among them."""

    def __init__(self, source: UnitDataset, units: np.ndarray) -> None:
        self.source, self.units, self.seq_length = source, units, source.seq_length

    def __len__(self) -> int:
        return len(self.units)

    def batch(self, ids: np.ndarray) -> Batch:
        """The probed units at ``ids``."""
        found = self.source.batch(self.units[ids])
        return Batch(found.tokens, found.label_mask, found.lengths, torch.from_numpy(np.array(ids)))


def _influence_model(
    options: MatesConfig, inputs: Inputs, units: np.ndarray, influences: np.ndarray
) -> tuple[ScoreModel, float]:
    """The trained data influence model and its rank correlation on the held-out probes, the same on every rank."""
    groups, path = inputs.groups, inputs.folder / "influence_model.pt"
    held_out = round(HELD_OUT * len(units))  # the units are in random order
    mean, deviation = influences[held_out:].mean(), influences[held_out:].std()
    if not deviation > 0:
        raise ValueError(
            f"found the same influence {mean:g} for all probed units, expected different ones: raise "
            "baselines.mates.lr, or warm the target up longer"
        )
    model = inputs.new_score_model()
    if broadcast_object(path.is_file(), groups):
        state = checkpoint.load_state(path, groups.device)
        model.load_state_dict(state["model"])
        return model, state["correlation"]
    trainer = InfluenceRegression(options, model, inputs, units[held_out:], (influences[held_out:] - mean) / deviation)
    inputs.train(trainer, options.regressor_iters)
    correlation = _held_out_correlation(inputs, model, units[:held_out], influences[:held_out])
    with failing_together(groups):
        if groups.is_main:
            checkpoint.save_state(path, {"model": model.state_dict(), "correlation": correlation})
    return model, correlation


def _held_out_correlation(inputs: Inputs, model: ScoreModel, units: np.ndarray, influences: np.ndarray) -> float:
    groups = inputs.groups
    start, stop = rank_share(len(units), groups.rank, groups.world_size)
    batch = inputs.source.batch(units[start:stop]).to(groups.device)
    mine = score_batch(model, batch, micro_batch_size=inputs.micro_batch_size).cpu().numpy()
    return spearman(np.concatenate(all_gather_object(mine, groups)), influences)


def _warnings(correlation: float, inputs: Inputs) -> list[str]:
    if correlation >= NOISE:
        return []
    warning = (
        f"{inputs.description}: predicted influences have a rank correlation of {correlation:.3f} with measured ones "
        f"on held-out probes, below {NOISE}: the scores of mates are noise; raise baselines.mates.probe_units, "
        "reference_samples or regressor_iters, or use a larger proxy"
    )
    if inputs.groups.is_main:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return [warning]


def _flops(options: MatesConfig, inputs: Inputs, model: ScoreModel, units: np.ndarray, reference: list[Batch]) -> float:
    source, length = inputs.source, inputs.source.seq_length
    return mates_flops(
        options,
        model.architecture,
        inputs.target_architecture,
        length,
        probed_units=len(units),
        probed_tokens=int(np.minimum(source.corpus.lengths[units], length).sum()),
        reference_tokens=sum(int(batch.lengths.sum()) for batch in reference),
        shard_tokens=source.corpus.num_tokens,
    )
