"""What all stages of one process share: options, ranks, run folder, metrics, and what follows from them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_bliss.base.metrics import MetricsLogger
from megatron_bliss.base.parallel import Groups
from megatron_bliss.config.config import Config
from megatron_bliss.data.batches import BatchSchedule, BatchSource
from megatron_bliss.data.guide import GuideSchedule, GuideSets
from megatron_bliss.data.manifest import read_manifest
from megatron_bliss.models.loop import Bookkeeping, Trainer, run_steps
from megatron_bliss.models.presets import Architecture
from megatron_bliss.run.folder import RunFolder
from megatron_bliss.target.pretrained import configured_architecture
from megatron_bliss.target.setup import TargetSetup

FINAL_STATE = "final.pt"
"""Where a stage that trains proxy and score model leaves them."""


def derive_seed(seed: int, *names: object) -> int:
    """A seed of its own for every purpose of a run, the same on all ranks and for all arms."""
    return zlib.crc32(repr((seed, *names)).encode())


@dataclass(frozen=True)
class Session:
    """What all stages of one process share."""

    config: Config
    groups: Groups
    folder: RunFolder
    metrics: MetricsLogger

    @cached_property
    def vocab_size(self) -> int:
        """Ids of the tokenizer that made the corpus."""
        tokenizer = read_manifest(self.config.data.train_prefix).get("tokenizer")
        if not tokenizer:
            raise ValueError(
                f"found no tokenizer in {self.config.data.train_prefix}.manifest.json, expected its vocabulary size: "
                "make the corpus with tools/preprocess_data.py, or adopt it with its tokenizer (tools/inspect_index.py)"
            )
        return int(tokenizer["vocab_size"])

    @cached_property
    def eod(self) -> int:
        """Id of the token that ends documents."""
        return int(read_manifest(self.config.data.train_prefix)["tokenizer"]["eod"])

    @cached_property
    def target_architecture(self) -> Architecture:
        return configured_architecture("target", self.config.target, self.vocab_size)

    @property
    def target_setup(self) -> TargetSetup:
        config = self.config
        return TargetSetup(
            config.target,
            self.target_architecture,
            self.groups,
            config.platform,
            config.data.seq_length,
            seed=derive_seed(config.seed, "target"),
        )

    @cached_property
    def proxy_architecture(self) -> Architecture:
        return configured_architecture("proxy", self.config.proxy, self.vocab_size)

    @property
    def show_progress(self) -> bool:
        return self.groups.is_main and self.config.logging.progress != "none"

    def schedule(self, source: BatchSource, batch_size: int, *purpose: object) -> BatchSchedule:
        """This rank's batches of a source, in an order that ``purpose`` and the run's seed determine."""
        seed = derive_seed(self.config.seed, *purpose)
        kind = GuideSchedule if isinstance(source, GuideSets) else BatchSchedule
        return kind(source, batch_size, seed=seed, rank=self.groups.rank, world_size=self.groups.world_size)


SHARED = "shared"
"""In the place of an arm: what all arms have in common, which is the warm-up."""


@dataclass(frozen=True)
class Round:
    """One round of one arm, which most stages work for. Round 0 is the warm-up, which all arms share."""

    session: Session
    arm: str
    number: int

    @property
    def before(self) -> Round:
        """The round that this one goes on from."""
        return Round(self.session, self.arm, self.number - 1)

    @property
    def training_stage(self) -> str:
        """The stage that trains the target."""
        return "pretrain" if self.number else "target"

    @property
    def first_iteration(self) -> int:
        """Iterations of the target, counted over the whole run, that are done when the round begins."""
        return self.before.last_iteration if self.number else 0

    @property
    def last_iteration(self) -> int:
        """Iterations of the target that are done when the round ends."""
        training = self.session.config.pretraining
        return training.warmup_iters + self.number * training.train_iters

    @property
    def labels(self) -> dict[str, object]:
        """What names the round in ``metrics.jsonl``."""
        return {"arm": self.arm, "round": self.number}

    def folder(self, stage: str) -> Path:
        """``ARM/round_01/STAGE``, or ``warmup/STAGE``."""
        return self.session.folder.stage_folder(self.arm, self.number, stage)

    def record(self, stage: str) -> dict | None:
        """What a finished stage of the round left in ``done.json``, or None."""
        return self.session.folder.record(self.folder(stage))

    def require(self, stage: str, needed_by: str) -> tuple[Path, dict]:
        """Folder and record of a stage that has to be finished before ``needed_by`` can start."""
        folder = self.folder(stage)
        return folder, self.session.folder.require(folder, needed_by)

    def train(self, trainer: Trainer, steps: int, folder: Path, stage: str) -> None:
        """Train to ``steps``, with states in ``folder`` to go on from and metrics of ``stage``."""
        config = self.session.config
        books = Bookkeeping(
            folder=folder,
            save_interval=config.checkpoint.save_interval,
            log_interval=config.logging.log_interval,
            metrics=self.session.metrics,
            labels={**self.labels, "stage": stage},
            show_progress=self.session.show_progress,
        )
        run_steps(trainer, steps, books, self.session.groups)

    def seed(self, *purpose: object) -> int:
        """A seed of its own for a purpose of this round."""
        return derive_seed(self.session.config.seed, *purpose, self.arm, self.number)


def warmup(session: Session) -> Round:
    """The round that every arm begins from."""
    return Round(session, SHARED, 0)
