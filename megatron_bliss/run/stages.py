"""The stages of proxy and score model: each reads the folders of earlier stages, works, and writes its own folder.

The configuration is cut into sections here; the modules that do the work receive theirs only. Round 0 is the warm-up.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_bliss.arms import ARMS
from megatron_bliss.arms.inputs import Inputs
from megatron_bliss.base import checkpoint
from megatron_bliss.base.files import read_json, sha256_file, write_json
from megatron_bliss.base.parallel import failing_together
from megatron_bliss.base.platform import DTYPES
from megatron_bliss.bilevel.domain_weights import DomainWeights
from megatron_bliss.bilevel.guide_weightings import GUIDE_WEIGHTINGS
from megatron_bliss.bilevel.monitors import validation_advice
from megatron_bliss.bilevel.teacher import TargetTeacher
from megatron_bliss.bilevel.train import ProxyWarmup
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.models import ScoreConfig
from megatron_bliss.data.batches import UnitDataset
from megatron_bliss.data.manifest import corpus_digest, read_manifest
from megatron_bliss.data.samples import best_and_worst
from megatron_bliss.data.subset import write_subset
from megatron_bliss.models.families import FAMILIES
from megatron_bliss.models.flops import proxy_warmup_flops
from megatron_bliss.models.loop import Trainer
from megatron_bliss.models.score import ScoreModel, build_score_model, describe, saved_score_model
from megatron_bliss.models.transformer import LanguageModel, build_lm
from megatron_bliss.run.corpora import open_guide, open_upper_level, shard_domains, shard_prefix, shares_by_field
from megatron_bliss.run.order import round_tokens, selection_of
from megatron_bliss.run.score_starts import Start, start_score_model
from megatron_bliss.run.scorers import drift, keep_scorer
from megatron_bliss.run.session import FINAL_STATE, Round, Session, derive_seed, warmup
from megatron_bliss.run.target_stages import load_saved_target, target_checkpoint
from megatron_bliss.selection.score_files import load_unit_scores
from megatron_bliss.selection.score_pass import save_array
from megatron_bliss.selection.select import apply_policy, repetition_warnings, selection_lines
from megatron_bliss.target.checkpoint import load_moments
from megatron_bliss.target.pretrained import load_pretrained_proxy


def warm_up_proxy(session: Session, folder: Path) -> dict:
    """Train the proxy on the random warm-up shard."""
    config = session.config
    proxy = _new_proxy(session)
    if config.proxy.pretrained_checkpoint:
        load_pretrained_proxy(proxy, config.proxy.pretrained_checkpoint)
    source = UnitDataset(shard_prefix(session, 0), config.data.seq_length, session.vocab_size)
    batches = session.schedule(source, config.proxy.warmup_batch_size, "proxy warm-up")
    trainer = ProxyWarmup(config.proxy, proxy, batches, session.groups)
    warmup(session).train(trainer, config.proxy.warmup_iters, folder, "proxy")
    _save_final(session, folder, {"proxy": proxy.state_dict(), "architecture": asdict(proxy.architecture)})
    return {"flops": proxy_warmup_flops(config.proxy, session.proxy_architecture, config.data.seq_length)}


def learn_scores(this: Round, folder: Path) -> dict:
    """Train the score model (and the proxy) by bilevel optimisation on this round's shard."""
    session, config = this.session, this.session.config
    arm = ARMS[this.arm]
    settings = arm.bilevel_options(config.bilevel)
    if not settings.upper_iters:
        return _keep_start(this, folder, settings)
    proxy = _start_proxy(this)
    start = start_score_model(this, proxy, folder, settings) if arm.scheme.learns_scores else Start(None)
    score_model, warnings = start.model, start.warnings
    teacher = _teacher(this, settings) if settings.kl_weight > 0 else None
    train = UnitDataset(shard_prefix(session, this.number), config.data.seq_length, session.vocab_size)
    validation = open_upper_level(session, settings.guide_weighting)
    domains = DomainWeights(shard_domains(session, this.number) if arm.scheme.learns_scores else None)
    trainer = arm.scheme.trainer(
        settings,
        proxy,
        score_model,
        teacher,
        session.schedule(train, settings.global_batch_size, "bilevel", this.number),
        session.schedule(validation, settings.validation_batch_size, "validation", this.number),
        session.groups,
        *([domains] if arm.scheme.learns_scores else []),
    )
    if GUIDE_WEIGHTINGS[settings.guide_weighting].against_control and _goes_on(this):
        trainer.upper.carry_on(checkpoint.load_state(this.before.folder("bilevel") / FINAL_STATE))
    warnings = [*warnings, *trainer.check_precision()]
    _warn(this, warnings)
    this.train(trainer, settings.upper_iters, folder, "bilevel")
    described = _described(session) if score_model is not None else {"architecture": asdict(proxy.architecture)}
    _save_final(session, folder, trainer.learned() | described)
    models = session.proxy_architecture, session.target_architecture
    score = score_model.score_architecture if score_model is not None else None
    flops = start.flops + arm.scheme.flops(settings, *models, config.data.seq_length, score)
    loss, warnings = trainer.monitors.validation_loss, [*warnings, *trainer.monitors.warnings]
    advice = validation_advice([value for value in (*_validation_losses(this), loss) if value is not None])
    if advice:
        warnings = [*warnings, advice]
        if session.groups.is_main:
            print(f"warning: {advice}", file=sys.stderr, flush=True)
    return {"flops": flops, "validation_loss": loss, "warnings": warnings, "domain_weights": domains.last}


def _keep_start(this: Round, folder: Path, settings: BilevelConfig) -> dict:
    """Leave the score model as it starts; the proxy is looked at for its trunk only, where the family has one."""
    session, family = this.session, FAMILIES[this.session.config.score.family]
    start = start_score_model(this, _start_proxy(this) if family.has_trunk else None, folder, settings)
    _warn(this, start.warnings)
    _save_final(session, folder, {"score_model": start.model.state_dict(), **_described(session)})
    return {"flops": start.flops, "validation_loss": None, "warnings": start.warnings}


def _warn(this: Round, warnings: list[str]) -> None:
    for warning in warnings if this.session.groups.is_main else []:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _described(session: Session) -> dict:
    """What the file of a score model has to say beside its weights."""
    score = session.config.score
    architecture = asdict(session.proxy_architecture)
    return {"architecture": architecture, "activation": score.activation, "score": describe(score, session.eod)}


def _validation_losses(this: Round) -> list[float | None]:
    """The proxy's validation loss at the end of every round before this one; None: no upper step was made."""
    before = [dataclasses.replace(this, number=number) for number in range(1, this.number)]
    return [one.require("bilevel", "bilevel")[1]["validation_loss"] for one in before]


def score_shard(this: Round, folder: Path) -> dict:
    """Give every unit of this round's shard a score, by its arm's way."""
    session = this.session
    prefix = shard_prefix(session, this.number)
    source, parts = UnitDataset(prefix, session.config.data.seq_length, session.vocab_size), folder / "parts"
    scores, moved = ARMS[this.arm].scores(session.config.baselines.get(this.arm), _inputs(this, source, parts)), None
    with failing_together(session.groups):
        if session.groups.is_main:
            settings = {"corpus_digest": corpus_digest(prefix), **this.labels}
            if scores.scorer is not None:
                keep_scorer(this, scores.scorer, folder)
                moved = drift(this, source, scores.values)
            save_array(folder / "scores.npy", scores.values)
            write_json(folder / "scores.json", settings | scores.settings)
            shutil.rmtree(parts, ignore_errors=True)
    return {"flops": scores.flops, "warnings": scores.warnings, "drift": moved}


def _inputs(this: Round, source: UnitDataset, parts: Path) -> Inputs:
    """What every arm is given; models are loaded for those that ask for them."""
    session, config, groups = this.session, this.session.config, this.session.groups

    def checkpoint_path() -> Path:
        return target_checkpoint(this.before)

    def train(trainer: Trainer, steps: int) -> None:
        folder = parts / "training"
        folder.mkdir(parents=True, exist_ok=True)
        this.train(trainer, steps, folder, "score")

    return Inputs(
        source=source,
        reference=open_guide(session),
        train_prefix=config.data.train_prefix,
        eod=session.eod,
        seed=this.seed("score"),
        folder=parts,
        groups=groups,
        micro_batch_size=config.scoring.micro_batch_size,
        params_dtype=config.scoring.params_dtype,
        show_progress=session.show_progress,
        description=f"round {this.number}",
        load_target=lambda: load_saved_target(session, checkpoint_path(), params_dtype="fp32"),
        load_moments=lambda target: load_moments(checkpoint_path(), target, groups),
        target_architecture=session.target_architecture,
        target_optimizer=config.pretraining.optimizer,
        load_proxy=lambda: _warm_proxy(session),
        load_score_model=lambda: _trained_score_model(this),
        load_tied_proxy=lambda: _tied_proxy(this),
        new_score_model=lambda: _new_regressor(this),
        train=train,
    )


def _warm_proxy(session: Session) -> tuple[LanguageModel, dict]:
    """The proxy as its warm-up left it, in the precision of scoring, and what it is."""
    folder, dtype = warmup(session).folder("proxy"), session.config.scoring.params_dtype
    model = _saved_proxy(session, folder, "score")
    return model.to(DTYPES[dtype]), {"model_digest": sha256_file(folder / FINAL_STATE), "params_dtype": dtype}


def _trained_score_model(this: Round) -> tuple[ScoreModel, dict]:
    """The score model as the round's bilevel stage left it, and what it is."""
    config = this.session.config
    folder, _ = this.require("bilevel", "score")
    path, dtype = folder / FINAL_STATE, config.scoring.params_dtype
    model = saved_score_model(checkpoint.load_state(path), this.session.groups.device)
    described = {"model_digest": sha256_file(path), "family": config.score.family}
    described |= {"activation": config.score.activation, "params_dtype": dtype}
    return model, described


def _tied_proxy(this: Round) -> tuple[LanguageModel, dict]:
    """The proxy as the round's bilevel stage left it, fp32, and its Adam state by name."""
    folder, _ = this.require("bilevel", "score")
    return _saved_proxy(this.session, folder, "score"), checkpoint.load_state(folder / FINAL_STATE)["adam"]


def _new_regressor(this: Round) -> ScoreModel:
    """A score model without activation on the warmed-up proxy's trunk, whatever the run's own is."""
    session = this.session
    proxy = _saved_proxy(session, warmup(session).folder("proxy"), "score")
    config = ScoreConfig(activation="identity")
    seed = this.seed("regressor")
    return build_score_model(
        config, session.proxy_architecture, seed=seed, trunk_from=proxy, device=session.groups.device
    )


def select_units(this: Round, folder: Path) -> dict:
    """Rewrite the shard's index to the units that the policy keeps; keep samples of both ends for the report."""
    session, config, selected = this.session, this.session.config, ""
    prefix, selection = shard_prefix(session, this.number), selection_of(config, this.arm, this.number)
    tokens_needed = round_tokens(config)
    score_folder, _ = this.require("score", "select")
    with failing_together(session.groups):
        if session.groups.is_main:
            settings = read_json(score_folder / "scores.json")
            _check_scores_belong(settings, prefix, score_folder)
            scores = load_unit_scores(score_folder / "scores.npy", prefix)
            seed = this.seed("select")
            ids, policy, label = apply_policy(prefix, scores, selection, seed=seed, round_tokens=tokens_needed)
            selected = write_subset(prefix, ids, folder, label=label, policy=policy, extra={"scores": settings})
            write_json(folder / "samples.json", best_and_worst(prefix, scores))
    if not session.groups.is_main:
        return {}
    manifest = read_manifest(selected)
    counts = manifest["counts"]
    for line in selection_lines(manifest["policy"]):
        print(f"{this.arm}, round {this.number}: {line}", file=sys.stderr, flush=True)
    keeps_all = ARMS[this.arm].keeps_all
    warnings = repetition_warnings(tokens_needed, counts["tokens"], selection, keeps_all=keeps_all)
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


def _start_proxy(this: Round) -> LanguageModel:
    """The proxy a round starts from: its warm-up, or the last round's where the options say so."""
    folder = this.before.folder("bilevel") if _goes_on(this) else warmup(this.session).folder("proxy")
    return _saved_proxy(this.session, folder, "bilevel")


def _goes_on(this: Round) -> bool:
    """Whether proxy and control go on from the last round's."""
    return not this.session.config.proxy.restart_each_round and this.number > 1


def _saved_proxy(session: Session, folder: Path, needed_for: str) -> LanguageModel:
    """The proxy as a finished stage left it."""
    session.folder.require(folder, needed_for)
    proxy = _new_proxy(session)
    proxy.load_state_dict(checkpoint.load_state(folder / FINAL_STATE)["proxy"])
    return proxy


def _teacher(this: Round, settings: BilevelConfig) -> TargetTeacher:
    """The frozen target of the KL term: as the round before left it."""
    session = this.session
    target = load_saved_target(session, target_checkpoint(this.before))
    return TargetTeacher(target, session.groups, session.vocab_size, offload=settings.offload_target)


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
