"""The stages of proxy and score model: each reads the folders of earlier stages, works, and writes its own folder.

The configuration is cut into sections here; the modules that do the work receive theirs only. Round 0 is the warm-up.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_bliss.arms import BASELINES, Inputs, Scores
from megatron_bliss.base import checkpoint
from megatron_bliss.base.files import read_json, sha256_file, write_json
from megatron_bliss.base.parallel import failing_together
from megatron_bliss.bilevel.flops import bilevel_flops
from megatron_bliss.bilevel.monitors import validation_advice
from megatron_bliss.bilevel.precision import DTYPES
from megatron_bliss.bilevel.teacher import TargetTeacher
from megatron_bliss.bilevel.train import BilevelTrainer, ProxyWarmup
from megatron_bliss.data.batches import UnitDataset, open_labelled
from megatron_bliss.data.manifest import corpus_digest, read_manifest
from megatron_bliss.data.samples import best_and_worst
from megatron_bliss.data.subset import write_subset
from megatron_bliss.models.flops import proxy_warmup_flops, scoring_flops
from megatron_bliss.models.loop import Bookkeeping, Trainer, run_steps
from megatron_bliss.models.score import ScoreModel, build_score_model
from megatron_bliss.models.transformer import LanguageModel, build_lm
from megatron_bliss.run.corpora import guiding_prefix, shard_prefix, shares_by_field
from megatron_bliss.run.session import Session, derive_seed
from megatron_bliss.run.target_stages import load_saved_target, target_checkpoint
from megatron_bliss.selection.choose import choose_units, repetition_warnings
from megatron_bliss.selection.scoring import gather_scores, save_array, score_units
from megatron_bliss.target.checkpoint import load_moments
from megatron_bliss.target.pretrained import load_pretrained_proxy

FINAL_STATE = "final.pt"
"""Where a stage that trains proxy and score model leaves them."""


def warm_up_proxy(session: Session, folder: Path) -> dict:
    """Train the proxy on the random warm-up shard."""
    config = session.config
    proxy = _new_proxy(session)
    if config.proxy.pretrained_checkpoint:
        load_pretrained_proxy(proxy, config.proxy.pretrained_checkpoint)
    source = UnitDataset(shard_prefix(session, 0), config.data.seq_length, session.vocab_size)
    batches = session.schedule(source, config.proxy.warmup_batch_size, "proxy warm-up")
    trainer = ProxyWarmup(config.proxy, proxy, batches, session.groups)
    _run_trainer(session, trainer, config.proxy.warmup_iters, folder, "shared", 0, "proxy")
    _save_final(session, folder, {"proxy": proxy.state_dict(), "architecture": asdict(proxy.architecture)})
    return {"flops": proxy_warmup_flops(config.proxy, session.proxy_architecture, config.data.seq_length)}


def learn_scores(session: Session, folder: Path, arm: str, round_number: int) -> dict:
    """Train the score model (and the proxy) by bilevel optimisation on this round's shard."""
    config = session.config
    proxy = _start_proxy(session, arm, round_number)
    score_model = _start_score_model(session, arm, round_number, proxy)
    teacher = _teacher(session, arm, round_number) if config.bilevel.kl_weight > 0 else None
    train = UnitDataset(shard_prefix(session, round_number), config.data.seq_length, session.vocab_size)
    validation = open_labelled(guiding_prefix(session), config.data.seq_length, session.vocab_size)
    trainer = BilevelTrainer(
        config.bilevel,
        proxy,
        score_model,
        teacher,
        session.schedule(train, config.bilevel.global_batch_size, "bilevel", round_number),
        session.schedule(validation, config.bilevel.validation_batch_size, "validation", round_number),
        session.groups,
    )
    warnings = trainer.check_precision()
    for warning in warnings if session.groups.is_main else []:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    _run_trainer(session, trainer, config.bilevel.upper_iters, folder, arm, round_number, "bilevel")
    state = {"proxy": proxy.state_dict(), "score_model": score_model.state_dict()}
    described = {"architecture": asdict(proxy.architecture), "activation": config.score.activation}
    _save_final(session, folder, state | described)
    models = session.proxy_architecture, session.target_architecture
    flops = bilevel_flops(config.bilevel, *models, config.data.seq_length)
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
    prefix = shard_prefix(session, round_number)
    source, parts = UnitDataset(prefix, session.config.data.seq_length, session.vocab_size), folder / "parts"
    score = _score_by_model if arm == "bliss" else _score_by_baseline
    scores = score(session, parts, arm, round_number, source)
    with failing_together(session.groups):
        if session.groups.is_main:
            settings = {"corpus_digest": corpus_digest(prefix), "arm": arm, "round": round_number}
            save_array(folder / "scores.npy", scores.values)
            write_json(folder / "scores.json", settings | scores.settings)
            shutil.rmtree(parts, ignore_errors=True)
    return {"flops": scores.flops, "warnings": scores.warnings}


def _score_by_model(session: Session, parts: Path, arm: str, round_number: int, source: UnitDataset) -> Scores:
    """One forward pass of the round's score model."""
    config, groups = session.config, session.groups
    bilevel_folder = session.folder.stage_folder(arm, round_number, "bilevel")
    session.folder.require(bilevel_folder, "score")
    state_path = bilevel_folder / FINAL_STATE
    settings = {"model_digest": sha256_file(state_path), "activation": config.score.activation}
    settings["params_dtype"] = config.scoring.params_dtype
    blocks = parts / settings["model_digest"][:12]  # blocks of another model are not taken for this one's
    model = _new_score_model(session, None)
    model.load_state_dict(checkpoint.load_state(state_path)["score_model"])
    model.to(DTYPES[config.scoring.params_dtype])
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
    flops = scoring_flops(source.corpus.num_tokens, session.proxy_architecture, config.data.seq_length)
    with failing_together(groups):  # by now every rank has written its blocks
        return Scores(gather_scores(blocks, len(source)) if groups.is_main else None, settings, flops)


def _score_by_baseline(session: Session, parts: Path, arm: str, round_number: int, source: UnitDataset) -> Scores:
    """The arm's own method on the same shard and guiding set."""
    config, groups = session.config, session.groups

    def checkpoint_path() -> Path:  # asked for by methods that look at the target only
        return target_checkpoint(session, arm, round_number - 1)

    def train(trainer: Trainer, steps: int) -> None:
        folder = parts / "training"
        folder.mkdir(parents=True, exist_ok=True)
        _run_trainer(session, trainer, steps, folder, arm, round_number, "score")

    inputs = Inputs(
        source=source,
        reference=open_labelled(guiding_prefix(session), config.data.seq_length, session.vocab_size),
        eod=int(read_manifest(config.data.train_prefix)["tokenizer"]["eod"]),
        seed=derive_seed(config.seed, "score", arm, round_number),
        folder=parts,
        groups=groups,
        micro_batch_size=config.scoring.micro_batch_size,
        show_progress=session.show_progress,
        description=f"round {round_number}",
        load_target=lambda: load_saved_target(session, checkpoint_path(), params_dtype="fp32"),
        load_moments=lambda target: load_moments(checkpoint_path(), target, groups),
        target_architecture=session.target_architecture,
        target_optimizer=config.pretraining.optimizer,
        new_score_model=lambda: _new_regressor(session, arm, round_number),
        train=train,
    )
    return BASELINES[arm](config.baselines, inputs)


def _new_regressor(session: Session, arm: str, round_number: int) -> ScoreModel:
    """A score model without activation on the warmed-up proxy's trunk."""
    proxy = _saved_proxy(session, session.folder.stage_folder("shared", 0, "proxy"), "score")
    config = dataclasses.replace(session.config.score, activation="identity", head_init_std=0.0)
    seed = derive_seed(session.config.seed, "regressor", arm, round_number)
    return build_score_model(
        config, session.proxy_architecture, seed=seed, trunk_from=proxy, device=session.groups.device
    )


def select_units(session: Session, folder: Path, arm: str, round_number: int) -> dict:
    """Rewrite the shard's index to the units that the policy keeps; keep samples of both ends for the report."""
    config, prefix, selected = session.config, shard_prefix(session, round_number), ""
    round_tokens = config.pretraining.train_iters * config.pretraining.global_batch_size * config.data.seq_length
    score_folder = session.folder.stage_folder(arm, round_number, "score")
    session.folder.require(score_folder, "select")
    with failing_together(session.groups):
        if session.groups.is_main:
            settings = read_json(score_folder / "scores.json")
            _check_scores_belong(settings, prefix, score_folder)
            scores = np.load(score_folder / "scores.npy", allow_pickle=False)
            seed = derive_seed(config.seed, "select", arm, round_number)
            selection = dataclasses.replace(config.selection, tokens=config.selection.tokens or round_tokens)
            ids, policy, label = choose_units(prefix, scores, selection, seed=seed)
            selected = write_subset(prefix, ids, folder, label=label, policy=policy, extra={"scores": settings})
            write_json(folder / "samples.json", best_and_worst(prefix, scores))
    if not session.groups.is_main:
        return {}
    counts = read_manifest(selected)["counts"]
    warnings = repetition_warnings(round_tokens, counts["tokens"], config.selection.epoch_warning)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return {
        "prefix": Path(selected).name,
        "units": counts["units"],
        "tokens": counts["tokens"],
        "domains": shares_by_field(selected),
        "warnings": warnings,
        "flops": 0.0,
    }


def _new_proxy(session: Session) -> LanguageModel:
    seed = derive_seed(session.config.seed, "proxy")
    return build_lm(session.proxy_architecture, seed=seed, device=session.groups.device)


def _start_proxy(session: Session, arm: str, round_number: int) -> LanguageModel:
    """The proxy a round starts from: its warm-up, or the last round's where the options say so."""
    folder = session.folder.stage_folder("shared", 0, "proxy")
    if not session.config.proxy.restart_each_round and round_number > 1:
        folder = session.folder.stage_folder(arm, round_number - 1, "bilevel")
    return _saved_proxy(session, folder, "bilevel")


def _saved_proxy(session: Session, folder: Path, needed_for: str) -> LanguageModel:
    """The proxy as a finished stage left it."""
    session.folder.require(folder, needed_for)
    proxy = _new_proxy(session)
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
    target = load_saved_target(session, target_checkpoint(session, arm, round_number - 1))
    return TargetTeacher(target, session.groups, session.vocab_size, offload=session.config.bilevel.offload_target)


def _run_trainer(session: Session, trainer, steps: int, folder: Path, arm: str, round_number: int, stage: str) -> None:
    books = Bookkeeping(
        folder=folder,
        save_interval=session.config.checkpoint.save_interval,
        log_interval=session.config.logging.log_interval,
        metrics=session.metrics,
        labels={"arm": arm, "round": round_number, "stage": stage},
        show_progress=session.show_progress,
    )
    run_steps(trainer, steps, books, session.groups)


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
