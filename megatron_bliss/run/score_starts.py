"""The score model that a round's bilevel stage starts with: carried over, new, or with what counts say."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from megatron_bliss.arms.distilled_start import (
    distillation_warnings,
    held_back_units,
    rank_correlation,
    split_units,
)
from megatron_bliss.arms.score_starts import TABLES, fill_table
from megatron_bliss.base import checkpoint
from megatron_bliss.base.parallel import broadcast_object, failing_together
from megatron_bliss.base.platform import DTYPES
from megatron_bliss.bilevel.distillation import Distillation
from megatron_bliss.bilevel.execution import Execution
from megatron_bliss.bilevel.flops import distillation_flops
from megatron_bliss.bilevel.train import split_batch
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.models import ScoreConfig
from megatron_bliss.data.batches import ChosenUnits, UnitDataset
from megatron_bliss.models.families import FAMILIES
from megatron_bliss.models.score import ScoreModel, build_score_model
from megatron_bliss.models.transformer import LanguageModel
from megatron_bliss.run.corpora import open_guide, shard_prefix
from megatron_bliss.run.order import ASSUMED_SHARE, distils, round_tokens, selection_of, starts_anew
from megatron_bliss.run.session import FINAL_STATE, Round, Session, derive_seed
from megatron_bliss.selection.select import kept_share

STAGE = "distillation"
"""What metrics and the folder beside the bilevel stage's own states are called."""
DISTILLED = "distilled.pt"


@dataclass(frozen=True)
class Start:
    """A score model before the first upper step."""

    model: ScoreModel | None
    """None: the stage trains none."""
    warnings: list[str] = field(default_factory=list)
    flops: float = 0.0
    """What its distillation took."""


def start_score_model(this: Round, proxy: LanguageModel | None, folder: Path, settings: BilevelConfig) -> Start:
    """The score model a round starts from: the last round's, or a new one on the warmed-up proxy's or a fresh trunk.

    ``folder``: of the bilevel stage, where a distillation keeps its states; ``settings``: of that stage. Collective.
    """
    session, config = this.session, this.session.config.score
    model = _new_score_model(session, config, None if config.init_from == "fresh" else proxy)
    if not starts_anew(config, this.number):
        before, _ = this.before.require("bilevel", f"bilevel of round {this.number}")
        model.load_state_dict(checkpoint.load_state(before / FINAL_STATE)["score_model"])
    elif distils(config, this.number):
        return _distil(this, model, folder, settings)
    elif config.init_from in TABLES:
        return Start(model, _count_start(this, model))
    return Start(model)


def _new_score_model(session: Session, config: ScoreConfig, trunk: LanguageModel | None) -> ScoreModel:
    return build_score_model(
        config,
        session.proxy_architecture,
        seed=derive_seed(session.config.seed, "score model"),
        trunk_from=trunk,
        eod=session.eod,
        device=session.groups.device,
    )


def _shard(this: Round) -> UnitDataset:
    session = this.session
    return UnitDataset(shard_prefix(session, this.number), session.config.data.seq_length, session.vocab_size)


def _count_start(this: Round, model: ScoreModel) -> list[str]:
    """Start the model's table from counts of the round's shard and the guide; warnings."""
    session, config, source = this.session, this.session.config, _shard(this)
    selection = selection_of(config, this.arm, this.number)
    share = kept_share(selection, float(source.corpus.lengths.sum(dtype=np.int64)), round_tokens(config))
    return fill_table(model.ngrams, config.score, source, open_guide(session), share or ASSUMED_SHARE, session.groups)


def _distil(this: Round, model: ScoreModel, folder: Path, settings: BilevelConfig) -> Start:
    """Train ``model`` to give the scores of a table that starts from counts; done once, even if the stage is killed."""
    config, groups = this.session.config, this.session.groups
    path, units = folder / DISTILLED, len(_shard(this))
    sizes = model.score_architecture, config.data.seq_length, held_back_units(units)
    flops = distillation_flops(config.score, *sizes)
    if broadcast_object(path.is_file(), groups):
        state = checkpoint.load_state(path, groups.device)
        model.load_state_dict(state["score_model"])
        return Start(model, state["warnings"], flops)
    warnings = _train_on_counts(this, model, folder / STAGE, settings)
    with failing_together(groups):
        if groups.is_main:
            checkpoint.save_state(path, {"score_model": model.state_dict(), "warnings": warnings})
    return Start(model, warnings, flops)


def _train_on_counts(this: Round, model: ScoreModel, folder: Path, settings: BilevelConfig) -> list[str]:
    """The distillation itself, and how near it has come; warnings."""
    session, config, groups = this.session, this.session.config, this.session.groups
    source, score = _shard(this), config.score
    seed = derive_seed(config.seed, STAGE, "units", this.number)
    held_back, units = split_units(len(source), score.distil_iters * score.distil_batch_size, seed)
    table = _new_score_model(session, replace(score, family="ngram"), None)
    warnings = _count_start(this, table)
    train = session.schedule(ChosenUnits(source, units), score.distil_batch_size, STAGE, this.number)
    execution = Execution(groups.world_group, _samples_at_once(session, settings, train.stop - train.start))
    dtype = DTYPES[settings.params_dtype]
    trainer = Distillation(score, model, table, train, groups, execution, dtype)
    with failing_together(groups):
        folder.mkdir(parents=True, exist_ok=True)
    this.train(trainer, score.distil_iters, folder, STAGE)
    correlation = rank_correlation(model, table, source, held_back, groups, config.scoring.micro_batch_size)
    session.metrics.log(trainer.steps_done, {"rank_correlation": correlation}, **this.labels, stage=STAGE)
    if groups.is_main:
        print(
            f"{this.arm}, round {this.number}: scores have a rank correlation of {correlation:.3f} with those of the "
            f"counts on {len(held_back):,} units held back",
            file=sys.stderr,
            flush=True,
        )
    return [*warnings, *distillation_warnings(correlation)]


def _samples_at_once(session: Session, settings: BilevelConfig, samples: int) -> int:
    """Of a rank's ``samples`` of a batch: split as those of an upper step are, which takes more memory."""
    proxy, seq_length, device = session.proxy_architecture, session.config.data.seq_length, session.groups.device.type
    parts = FAMILIES[session.config.score.family].architecture(session.config.score, proxy)
    return split_batch(settings, proxy, max(1, samples), seq_length, device=device, score=parts)[0]
