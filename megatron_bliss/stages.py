"""What each stage of a run does: it reads the folders of earlier stages, works, and writes its own folder.

The configuration is cut into sections here; the modules that do the work receive theirs only. Round 0 is the warm-up.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_bliss import checkpoint
from megatron_bliss.baselines import BASELINES
from megatron_bliss.bilevel.loop import run_steps
from megatron_bliss.bilevel.monitors import validation_advice
from megatron_bliss.bilevel.teacher import TargetTeacher
from megatron_bliss.bilevel.train import BilevelTrainer, ProxyWarmup
from megatron_bliss.data.batches import Batch, UnitDataset, ValidationSet
from megatron_bliss.data.manifest import corpus_digest, read_manifest
from megatron_bliss.data.samples import best_and_worst
from megatron_bliss.data.subset import read_provenance, root_prefix, write_subset
from megatron_bliss.decay_branch import STAGE as DECAY_BRANCH
from megatron_bliss.decay_branch import train_decay_branch
from megatron_bliss.files import read_json, sha256_file, write_json
from megatron_bliss.models.presets import flops_per_token, trunk_flops_per_token
from megatron_bliss.models.score import ScoreModel, build_score_model
from megatron_bliss.models.target import Target
from megatron_bliss.models.transformer import LanguageModel, build_lm
from megatron_bliss.parallel import failing_together
from megatron_bliss.pretraining import evaluate_loss, load_target, train_segment
from megatron_bliss.scoring import gather_scores, save_array, score_units
from megatron_bliss.selection import domain_shares, shards, top_fraction
from megatron_bliss.session import Session, derive_seed

PROVENANCE_FIELDS = ("domain", "format", "label")
"""Columns of the provenance by which selections are described."""
FINAL_STATE = "final.pt"
"""Where a stage that trains proxy and score model leaves them."""


# -- shards -----------------------------------------------------------------------------------------------------------


def make_shards(session: Session, folder: Path) -> dict:
    """Deal the corpus to rounds + 1 disjoint index views; the first is for the warm-up."""
    config, prefixes = session.config, []
    with failing_together(session.groups):
        if session.groups.is_main:
            prefix, count = config.data.train_prefix, config.rounds + 1
            num_units = read_manifest(prefix)["counts"]["units"]
            seed = derive_seed(config.seed, "shards")
            parts = shards(num_units, count, by=config.data.shard_by, seed=seed)
            for number, ids in enumerate(parts):
                policy = {"name": "shard", "number": number, "of": count, "by": config.data.shard_by, "seed": seed}
                prefixes.append(write_subset(prefix, ids, folder, label=f"shard{number}", policy=policy))
    names = [Path(prefix).name for prefix in prefixes]
    return {"prefixes": names, "domains": _shares_by_field(config.data.train_prefix)}


def _shares_by_field(prefix: str) -> dict[str, dict[str, float]]:
    """{provenance field: {value: share of units}} of a corpus; empty where it does not know its sources."""
    if not os.path.isfile(f"{root_prefix(prefix)}.provenance.parquet"):
        return {}
    provenance = read_provenance(prefix)
    shares = {field: domain_shares(provenance, field=field) for field in PROVENANCE_FIELDS}
    return {field: share for field, share in shares.items() if share}


def shard_prefix(session: Session, round_number: int) -> str:
    """The shard of a round (0: the warm-up's)."""
    folder = session.folder.path / "shards"
    record = session.folder.require(folder, "any other stage")
    return str(folder / record["prefixes"][round_number])


# -- warm-up ----------------------------------------------------------------------------------------------------------


def warm_up_target(session: Session, folder: Path) -> dict:
    """Train the target on the random warm-up shard."""
    return _train_target(session, folder, "shared", 0, shard_prefix(session, 0), start=None)


def warm_up_proxy(session: Session, folder: Path) -> dict:
    """Train the proxy on the random warm-up shard."""
    config = session.config
    proxy = _new_proxy(session)
    source = UnitDataset(shard_prefix(session, 0), config.data.seq_length)
    batches = session.schedule(source, config.proxy.warmup_batch_size, "proxy warm-up")
    trainer = ProxyWarmup(config.proxy, proxy, batches, session.world)
    _run_trainer(session, trainer, config.proxy.warmup_iters, folder, "shared", 0, "proxy")
    tokens = config.proxy.warmup_iters * config.proxy.warmup_batch_size * config.data.seq_length
    _save_final(session, folder, {"proxy": proxy.state_dict()})
    return {"flops": 3 * tokens * flops_per_token(session.proxy_architecture, config.data.seq_length)}


# -- bilevel ----------------------------------------------------------------------------------------------------------


def learn_scores(session: Session, folder: Path, arm: str, round_number: int) -> dict:
    """Train the score model (and the proxy) by bilevel optimisation on this round's shard."""
    config = session.config
    proxy = _start_proxy(session, arm, round_number)
    score_model = _start_score_model(session, arm, round_number, proxy)
    teacher = _teacher(session, arm, round_number) if config.bilevel.kl_weight > 0 else None
    train = UnitDataset(shard_prefix(session, round_number), config.data.seq_length)
    validation = ValidationSet(config.data.validation_prefix, config.data.seq_length)
    trainer = BilevelTrainer(
        config.bilevel,
        proxy,
        score_model,
        teacher,
        session.schedule(train, config.bilevel.global_batch_size, "bilevel", round_number),
        session.schedule(validation, config.bilevel.validation_batch_size, "validation", round_number),
        session.world,
    )
    warnings = trainer.check_precision()
    for warning in warnings if session.groups.is_main else []:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    _run_trainer(session, trainer, config.bilevel.upper_iters, folder, arm, round_number, "bilevel")
    _save_final(session, folder, {"proxy": proxy.state_dict(), "score_model": score_model.state_dict()})
    flops = trainer.flops(session.target_architecture, config.data.seq_length)
    loss, warnings = trainer.monitors.validation_loss, [*warnings, *trainer.monitors.warnings]
    advice = validation_advice([*_validation_losses(session, arm, round_number), loss])
    if advice:
        warnings = [*warnings, advice]
        if session.groups.is_main:
            print(f"warning: {advice}", file=sys.stderr, flush=True)
    return {"flops": flops, "validation_loss": loss, "warnings": warnings}


def _validation_losses(session: Session, arm: str, round_number: int) -> list[float]:
    """The proxy's validation loss at the end of every round before this one."""
    folders = [session.folder.stage_folder(arm, number, "bilevel") for number in range(1, round_number)]
    return [session.folder.require(folder, "bilevel")["validation_loss"] for folder in folders]


def score_shard(session: Session, folder: Path, arm: str, round_number: int) -> dict:
    """Give every unit of this round's shard a score, by the score model or by the arm's baseline."""
    config, groups, prefix = session.config, session.groups, shard_prefix(session, round_number)
    source = UnitDataset(prefix, config.data.seq_length)
    settings, flops = {"corpus_digest": corpus_digest(prefix), "arm": arm, "round": round_number}, 0.0
    blocks = folder / "blocks"
    if arm == "bliss":
        bilevel_folder = session.folder.stage_folder(arm, round_number, "bilevel")
        session.folder.require(bilevel_folder, "score")
        state_path = bilevel_folder / FINAL_STATE
        settings |= {"model_digest": sha256_file(state_path), "activation": config.score.activation}
        blocks = folder / f"blocks-{settings['model_digest'][:12]}"  # those of another model are not taken for ours
        model = _new_score_model(session, None)
        model.load_state_dict(checkpoint.load_state(state_path)["score_model"])
        with failing_together(groups):
            score_units(
                model,
                source,
                blocks,
                micro_batch_size=config.scoring.micro_batch_size,
                rank=groups.rank,
                world_size=groups.world_size,
                device=groups.device,
                show_progress=session.show_progress,
                description=f"round {round_number} score",
            )
        tokens = read_manifest(prefix)["counts"]["tokens"]
        flops = tokens * trunk_flops_per_token(session.proxy_architecture, config.data.seq_length)
    with failing_together(groups):
        if groups.is_main:
            seed = derive_seed(config.seed, "score", arm, round_number)
            scores = gather_scores(blocks, len(source)) if arm == "bliss" else BASELINES[arm](len(source), seed)
            save_array(folder / "scores.npy", scores)
            write_json(folder / "scores.json", settings)
            shutil.rmtree(blocks, ignore_errors=True)
    return {"flops": flops}


def select_units(session: Session, folder: Path, arm: str, round_number: int) -> dict:
    """Rewrite the shard's index to the units with the highest scores; keep samples of both ends for the report."""
    config, prefix, selected = session.config, shard_prefix(session, round_number), ""
    score_folder = session.folder.stage_folder(arm, round_number, "score")
    session.folder.require(score_folder, "select")
    with failing_together(session.groups):
        if session.groups.is_main:
            settings = read_json(score_folder / "scores.json")
            _check_scores_belong(settings, prefix, score_folder)
            scores = np.load(score_folder / "scores.npy", allow_pickle=False)
            seed = derive_seed(config.seed, "select", arm, round_number)
            ids = top_fraction(scores, fraction=config.selection.fraction, seed=seed)
            policy = {"name": "top_fraction", "fraction": config.selection.fraction, "seed": seed}
            policy["threshold"] = float(scores[ids].min())
            label = f"top{config.selection.fraction * 100:g}".replace(".", "p")
            selected = write_subset(prefix, ids, folder, label=label, policy=policy, extra={"scores": settings})
            write_json(folder / "samples.json", best_and_worst(prefix, scores))
    if not session.groups.is_main:
        return {}
    units = read_manifest(selected)["counts"]["units"]
    return {"prefix": Path(selected).name, "units": units, "domains": _shares_by_field(selected), "flops": 0.0}


# -- target -----------------------------------------------------------------------------------------------------------


def pretrain_target(session: Session, folder: Path, arm: str, round_number: int) -> dict:
    """Train the target on this round's selection, from the last round's checkpoint."""
    start = _target_checkpoint(session, arm, round_number - 1)
    return _train_target(session, folder, arm, round_number, _selected_prefix(session, arm, round_number), start)


def decay_target(session: Session, folder: Path, arm: str, round_number: int) -> dict:
    """Train a copy of the target on while its learning rate falls, and evaluate it in the main line's place."""
    training = session.config.pretraining
    prefix = _selected_prefix(session, arm, round_number) if round_number else shard_prefix(session, 0)
    result = train_decay_branch(
        **_segment_options(session, folder, arm, round_number),
        start=_target_checkpoint(session, arm, round_number),
        data_prefix=prefix,
        seed=derive_seed(session.config.seed, "decay branch data", round_number),
        first_iteration=training.warmup_iters + round_number * training.train_iters,
    )
    evaluation = _evaluation(session, round_number, result.evaluations[-1][2])
    return {"evaluation": evaluation, "checkpoint": Path(result.checkpoint).name, "flops": result.flops}


def evaluate_target(session: Session, folder: Path, arm: str, round_number: int) -> dict:
    """Losses and task results of the checkpoint that stands for the round, as read back from disk (0: the warm-up)."""
    config = session.config
    target = _load_target(session, evaluation_checkpoint(session, arm, round_number))
    evaluation = _evaluation(session, round_number, _test_losses(session)(target))
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
        label=f"{arm}, round {round_number}" if round_number else "warm-up",
        show_progress=session.show_progress,
    )
    session.metrics.truncate(arm, round_number, "evaluate", -1)  # of an attempt that was killed before it was finished
    session.metrics.log(evaluation["iteration"], task_metrics(result), arm=arm, round=round_number, stage="evaluate")
    return {"evaluation": evaluation, "tasks": result, "flops": 0.0}


def evaluation_checkpoint(session: Session, arm: str, round_number: int) -> Path:
    """The target by which a round is judged (round 0: the warm-up): its decay branch, where the run has them."""
    if not session.config.pretraining.decay_branch_iters:
        return _target_checkpoint(session, arm, round_number)
    folder = session.folder.stage_folder(arm, round_number, DECAY_BRANCH)
    return folder / session.folder.require(folder, "an evaluation of this target")["checkpoint"]


def _evaluation(session: Session, round_number: int, losses: dict[str, float]) -> dict:
    """A point of the arm's curve. It stands at the main line's tokens: what a decay branch read is not counted."""
    training = session.config.pretraining
    iteration = training.warmup_iters + round_number * training.train_iters
    tokens = iteration * training.global_batch_size * session.config.data.seq_length
    return {"iteration": iteration, "tokens": tokens, "losses": losses}


def _selected_prefix(session: Session, arm: str, round_number: int) -> str:
    folder = session.folder.stage_folder(arm, round_number, "select")
    return str(folder / session.folder.require(folder, "pretrain")["prefix"])


def _train_target(session: Session, folder: Path, arm: str, round_number: int, prefix: str, start: Path | None) -> dict:
    training = session.config.pretraining
    result = train_segment(
        **_segment_options(session, folder, arm, round_number),
        start=start,
        data_prefix=prefix,
        seed=derive_seed(session.config.seed, "target data", round_number),
        first_iteration=0 if round_number == 0 else training.warmup_iters + (round_number - 1) * training.train_iters,
        last_iteration=training.warmup_iters + round_number * training.train_iters,
        stage="pretrain" if round_number else "target",
    )
    points = [{"iteration": step, "tokens": tokens, "losses": losses} for step, tokens, losses in result.evaluations]
    record = {"evaluations": points, "checkpoint": Path(result.checkpoint).name, "flops": result.flops}
    return {**record, "skipped_iterations": result.skipped, "kernels": result.kernels}


def _segment_options(session: Session, folder: Path, arm: str, round_number: int) -> dict:
    """What the main line and its decay branches have in common."""
    config = session.config
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
        "metrics": session.metrics,
        "log_interval": config.logging.log_interval,
        "evaluate": _test_losses(session),
        "arm": arm,
        "round": round_number,
        "progress": session.show_progress,
        "num_workers": config.data.num_workers,
        "init_seed": derive_seed(config.seed, "target"),
        "device_peak_tflops": config.logging.device_peak_tflops,
    }


def _target_checkpoint(session: Session, arm: str, round_number: int) -> Path:
    """The target as a round left it (round 0: the warm-up, shared by all arms)."""
    stage = "target" if round_number == 0 else "pretrain"
    folder = session.folder.stage_folder(arm, round_number, stage)
    return folder / session.folder.require(folder, "a stage that needs this target")["checkpoint"]


def _load_target(session: Session, path: Path) -> Target:
    """A checkpoint of the target, read back and not to be trained."""
    config = session.config
    return load_target(
        path,
        target_config=config.target,
        architecture=session.target_architecture,
        groups=session.groups,
        platform=config.platform,
        seq_length=config.data.seq_length,
        seed=config.seed,
    )


def _test_losses(session: Session) -> Callable[[Target], dict[str, float]]:
    """A function target -> {test set: mean loss over labelled tokens}."""
    config, groups = session.config, session.groups
    sets = {Path(prefix).name: _test_batches(session, prefix) for prefix in config.data.test_prefixes}

    def losses(target: Target) -> dict[str, float]:
        return {name: evaluate_loss(target, batches, groups) for name, batches in sets.items()}

    return losses


def _test_batches(session: Session, prefix: str) -> list[Batch]:
    source = ValidationSet(prefix, session.config.data.seq_length)
    limit, size = session.config.evaluation.max_samples or len(source), session.config.evaluation.micro_batch_size
    count = min(limit, len(source))
    return [source.batch(np.arange(start, min(start + size, count))) for start in range(0, count, size)]


# -- proxy and score model --------------------------------------------------------------------------------------------


def _new_proxy(session: Session) -> LanguageModel:
    seed = derive_seed(session.config.seed, "proxy")
    return build_lm(session.proxy_architecture, seed=seed, device=session.groups.device)


def _start_proxy(session: Session, arm: str, round_number: int) -> LanguageModel:
    """The proxy a round starts from: its warm-up, or the last round's where the options say so."""
    proxy = _new_proxy(session)
    folder = session.folder.stage_folder("shared", 0, "proxy")
    if not session.config.proxy.restart_each_round and round_number > 1:
        folder = session.folder.stage_folder(arm, round_number - 1, "bilevel")
    session.folder.require(folder, "bilevel")
    proxy.load_state_dict(checkpoint.load_state(folder / FINAL_STATE)["proxy"])
    return proxy


def _new_score_model(session: Session, trunk: LanguageModel | None) -> ScoreModel:
    seed = derive_seed(session.config.seed, "score model")
    device = session.groups.device
    return build_score_model(
        session.config.score, session.proxy_architecture, seed=seed, trunk_from=trunk, device=device
    )


def _start_score_model(session: Session, arm: str, round_number: int, proxy: LanguageModel) -> ScoreModel:
    """The score model a round starts from: the last round's, or a new one on the warmed-up proxy's or a fresh trunk."""
    config = session.config.score
    model = _new_score_model(session, proxy if config.init_from == "proxy" else None)
    if config.carry_over and round_number > 1:
        folder = session.folder.stage_folder(arm, round_number - 1, "bilevel")
        session.folder.require(folder, f"bilevel of round {round_number}")
        model.load_state_dict(checkpoint.load_state(folder / FINAL_STATE)["score_model"])
    return model


def _teacher(session: Session, arm: str, round_number: int) -> TargetTeacher:
    """The frozen target of the KL term: as the round before left it."""
    target = _load_target(session, _target_checkpoint(session, arm, round_number - 1))
    return TargetTeacher(target, session.groups, session.vocab_size, offload=session.config.bilevel.offload_target)


def _run_trainer(session: Session, trainer, steps: int, folder: Path, arm: str, round_number: int, stage: str) -> None:
    run_steps(
        trainer,
        steps,
        folder=folder,
        save_interval=session.config.checkpoint.save_interval,
        log_interval=session.config.logging.log_interval,
        metrics=session.metrics,
        labels={"arm": arm, "round": round_number, "stage": stage},
        groups=session.groups,
        show_progress=session.show_progress,
    )


def _save_final(session: Session, folder: Path, state: dict) -> None:
    with failing_together(session.groups):
        if session.groups.is_main:
            checkpoint.save_state(folder / FINAL_STATE, state)


def _check_scores_belong(settings: dict, prefix: str, score_folder: Path) -> None:
    digest = corpus_digest(prefix)
    if settings["corpus_digest"] != digest:
        raise ValueError(
            f"found scores of corpus {settings['corpus_digest'][:12]} in {score_folder}, expected those of {prefix} "
            f"({digest[:12]}): the shard was changed after it was scored; use a new run folder"
        )
