"""What the stages of the target do: warm-up, training on selections, decay branches, evaluation.

Round 0 is the warm-up. As in stages.py, a stage reads the folders of earlier ones and writes its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_bliss.data.batches import Batch, open_labelled
from megatron_bliss.data.splits import blend
from megatron_bliss.run.corpora import held_out_prefixes, shard_prefix
from megatron_bliss.run.session import Round, Session, derive_seed, warmup
from megatron_bliss.target.decay_branch import STAGE as DECAY_BRANCH
from megatron_bliss.target.decay_branch import train_decay_branch
from megatron_bliss.target.loss import evaluate_loss
from megatron_bliss.target.model import Target
from megatron_bliss.target.segment import Evaluation, Recording, Segment, train_segment
from megatron_bliss.target.setup import load_target


def warm_up_target(session: Session, folder: Path) -> dict:
    """Train the target on the random warm-up shard."""
    return _train_target(warmup(session), folder, start=None)


def pretrain_target(this: Round, folder: Path) -> dict:
    """Train the target on this round's selection, from the last round's checkpoint."""
    return _train_target(this, folder, start=target_checkpoint(this.before))


def _train_target(this: Round, folder: Path, start: Path | None) -> dict:
    config = this.session.config
    result = train_segment(
        this.session.target_setup, config.pretraining, _main_line(this, start), _recording(this, folder)
    )
    return {
        "evaluations": [point._asdict() for point in result.evaluations],
        "checkpoint": result.checkpoint.name,
        "flops": result.flops,
        "evaluation_seconds": round(result.evaluation_seconds, 3),
        "skipped_iterations": result.skipped,
        "kernels": result.kernels,
    }


def decay_target(this: Round, folder: Path) -> dict:
    """Train a copy of the target on while its learning rate falls, and evaluate it in the main line's place."""
    session, training = this.session, this.session.config.pretraining
    branch = dataclasses.replace(
        _main_line(this, start=target_checkpoint(this)),
        seed=derive_seed(session.config.seed, "decay branch data", this.number),
        first_iteration=this.last_iteration,
        last_iteration=this.last_iteration + training.decay_branch_iters,
    )
    result = train_decay_branch(session.target_setup, training, branch, _recording(this, folder))
    evaluation = _evaluation(this, result.evaluations[-1].losses)
    return {"evaluation": evaluation, "checkpoint": result.checkpoint.name, "flops": result.flops}


def _main_line(this: Round, start: Path | None) -> Segment:
    """The round's segment of the target's training; without ``start`` it begins from pretrained or initial weights."""
    config = this.session.config
    return Segment(
        _training_prefix(this),
        seed=derive_seed(config.seed, "target data", this.number),
        first_iteration=this.first_iteration,
        last_iteration=this.last_iteration,
        total_iterations=dataclasses.replace(this, number=config.rounds).last_iteration,
        start=start,
        pretrained=config.target.pretrained_checkpoint if start is None else None,
        blend=blend(config.data),
        num_workers=config.data.num_workers,
    )


def _training_prefix(this: Round) -> str:
    """The round's selection, or the warm-up's shard."""
    if not this.number:
        return shard_prefix(this.session, 0)
    folder, record = this.require("select", "pretrain")
    return str(folder / record["prefix"])


def _recording(this: Round, folder: Path) -> Recording:
    session = this.session
    return Recording(
        folder,
        session.config.checkpoint,
        session.config.logging,
        session.metrics,
        _test_losses(session),
        arm=this.arm,
        round=this.number,
        stage=this.training_stage,
    )


def evaluate_target(this: Round, folder: Path) -> dict:
    """Losses and task results of the checkpoint that stands for the round, as read back from disk (0: the warm-up)."""
    session, config = this.session, this.session.config
    target = load_saved_target(session, evaluation_checkpoint(this))
    evaluation = _evaluation(this, _test_losses(session)(target))
    if not config.evaluation.tasks:
        return {"evaluation": evaluation, "flops": 0.0}
    from megatron_bliss.evaluation.stage import evaluate_checkpoint, task_metrics  # lm-eval takes seconds to import

    result = evaluate_checkpoint(
        config.evaluation,
        target,
        session.groups,
        folder,
        train_prefix=config.data.train_prefix,
        max_length=config.data.seq_length,
        label=f"{this.arm}, round {this.number}" if this.number else "warm-up",
        show_progress=session.show_progress,
    )
    # Drop what an attempt logged that was killed before it was finished.
    session.metrics.truncate(this.arm, this.number, "evaluate", -1)
    session.metrics.log(evaluation["iteration"], task_metrics(result), **this.labels, stage="evaluate")
    return {"evaluation": evaluation, "tasks": result, "flops": 0.0}


def evaluation_checkpoint(this: Round) -> Path:
    """The target by which a round is judged (round 0: the warm-up): its decay branch, where the run has them."""
    if not this.session.config.pretraining.decay_branch_iters:
        return target_checkpoint(this)
    folder, record = this.require(DECAY_BRANCH, "an evaluation of this target")
    return folder / record["checkpoint"]


def _evaluation(this: Round, losses: dict[str, float]) -> dict:
    """A point of the arm's curve. It stands at the main line's tokens: what a decay branch read is not counted."""
    config = this.session.config
    tokens = this.last_iteration * config.pretraining.global_batch_size * config.data.seq_length
    return Evaluation(this.last_iteration, tokens, losses)._asdict()


def target_checkpoint(this: Round) -> Path:
    """The target as a round left it (round 0: the warm-up, shared by all arms)."""
    folder, record = this.require(this.training_stage, "a stage that needs this target")
    return folder / record["checkpoint"]


def load_saved_target(session: Session, path: Path, params_dtype: str | None = None) -> Target:
    """A checkpoint of the target, read back and not to be trained; in the run's precision unless another is named."""
    setup = session.target_setup
    if params_dtype is not None:
        setup = dataclasses.replace(setup, platform=dataclasses.replace(setup.platform, params_dtype=params_dtype))
    return load_target(path, setup)


def _test_losses(session: Session) -> Callable[[Target], dict[str, float]]:
    """A function target -> {test set: mean loss over labelled tokens}."""
    groups = session.groups
    sets = {Path(prefix).name: _test_batches(session, prefix) for prefix in held_out_prefixes(session)}

    def losses(target: Target) -> dict[str, float]:
        return {name: evaluate_loss(target, batches, groups) for name, batches in sets.items()}

    return losses


def _test_batches(session: Session, prefix: str) -> list[Batch]:
    source = open_labelled(prefix, session.config.data.seq_length, session.vocab_size)
    limit, size = session.config.evaluation.max_samples or len(source), session.config.evaluation.micro_batch_size
    count = min(limit, len(source))
    return [source.batch(np.arange(start, min(start + size, count))) for start in range(0, count, size)]
