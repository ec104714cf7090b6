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
from megatron_bliss.target.model import Target
from megatron_bliss.target.segment import evaluate_loss, load_target, train_segment


def warm_up_target(session: Session, folder: Path) -> dict:
    """Train the target on the random warm-up shard."""
    return _train_target(warmup(session), folder, shard_prefix(session, 0), start=None)


def pretrain_target(this: Round, folder: Path) -> dict:
    """Train the target on this round's selection, from the last round's checkpoint."""
    return _train_target(this, folder, _selected_prefix(this), start=target_checkpoint(this.before))


def decay_target(this: Round, folder: Path) -> dict:
    """Train a copy of the target on while its learning rate falls, and evaluate it in the main line's place."""
    session, training = this.session, this.session.config.pretraining
    prefix = _selected_prefix(this) if this.number else shard_prefix(session, 0)
    result = train_decay_branch(
        **_segment_options(this, folder),
        start=target_checkpoint(this),
        data_prefix=prefix,
        seed=derive_seed(session.config.seed, "decay branch data", this.number),
        first_iteration=training.warmup_iters + this.number * training.train_iters,
    )
    evaluation = _evaluation(this, result.evaluations[-1][2])
    return {"evaluation": evaluation, "checkpoint": Path(result.checkpoint).name, "flops": result.flops}


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
    session.metrics.truncate(
        this.arm, this.number, "evaluate", -1
    )  # of an attempt that was killed before it was finished
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
    training = this.session.config.pretraining
    iteration = training.warmup_iters + this.number * training.train_iters
    tokens = iteration * training.global_batch_size * this.session.config.data.seq_length
    return {"iteration": iteration, "tokens": tokens, "losses": losses}


def _selected_prefix(this: Round) -> str:
    folder, record = this.require("select", "pretrain")
    return str(folder / record["prefix"])


def _train_target(this: Round, folder: Path, prefix: str, start: Path | None) -> dict:
    session, number, training = this.session, this.number, this.session.config.pretraining
    result = train_segment(
        **_segment_options(this, folder),
        start=start,
        pretrained=session.config.target.pretrained_checkpoint if number == 0 else None,
        data_prefix=prefix,
        seed=derive_seed(session.config.seed, "target data", number),
        first_iteration=0 if number == 0 else training.warmup_iters + (number - 1) * training.train_iters,
        last_iteration=training.warmup_iters + number * training.train_iters,
        stage="pretrain" if number else "target",
    )
    points = [{"iteration": step, "tokens": tokens, "losses": losses} for step, tokens, losses in result.evaluations]
    record = {"evaluations": points, "checkpoint": Path(result.checkpoint).name, "flops": result.flops}
    return {**record, "skipped_iterations": result.skipped, "kernels": result.kernels}


def _segment_options(this: Round, folder: Path) -> dict:
    """What the main line and its decay branches have in common."""
    session, config = this.session, this.session.config
    return {
        "config": config.pretraining,
        "target_config": config.target,
        "architecture": session.target_architecture,
        "groups": session.groups,
        "platform": config.platform,
        "seq_length": config.data.seq_length,
        "total_iterations": config.pretraining.warmup_iters + config.rounds * config.pretraining.train_iters,
        "folder": folder,
        "save_interval": config.checkpoint.save_interval,
        "keep": config.checkpoint.keep,
        "async_save": config.checkpoint.async_save,
        "metrics": session.metrics,
        "log_interval": config.logging.log_interval,
        "evaluate": _test_losses(session),
        **this.labels,
        "progress": session.show_progress,
        "num_workers": config.data.num_workers,
        "blend": blend(config.data),
        "init_seed": derive_seed(config.seed, "target"),
        "device_peak_tflops": config.logging.device_peak_tflops,
    }


def target_checkpoint(this: Round) -> Path:
    """The target as a round left it (round 0: the warm-up, shared by all arms)."""
    folder, record = this.require("pretrain" if this.number else "target", "a stage that needs this target")
    return folder / record["checkpoint"]


def load_saved_target(session: Session, path: Path, params_dtype: str | None = None) -> Target:
    """A checkpoint of the target, read back and not to be trained; in the run's precision unless another is named."""
    config = session.config
    platform = dataclasses.replace(config.platform, params_dtype=params_dtype or config.platform.params_dtype)
    return load_target(
        path,
        target_config=config.target,
        architecture=session.target_architecture,
        groups=session.groups,
        platform=platform,
        seq_length=config.data.seq_length,
        seed=config.seed,
    )


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
