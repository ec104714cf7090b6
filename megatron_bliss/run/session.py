"""What all stages of one process share: options, ranks, run folder, metrics, and what follows from them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property

from megatron_bliss.base.metrics import MetricsLogger
from megatron_bliss.base.parallel import Groups
from megatron_bliss.config.config import Config
from megatron_bliss.data.batches import BatchSchedule, BatchSource
from megatron_bliss.data.manifest import read_manifest
from megatron_bliss.models.presets import Architecture
from megatron_bliss.run.folder import RunFolder
from megatron_bliss.target.pretrained import configured_architecture


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
    def target_architecture(self) -> Architecture:
        return configured_architecture("target", self.config.target, self.vocab_size)

    @cached_property
    def proxy_architecture(self) -> Architecture:
        return configured_architecture("proxy", self.config.proxy, self.vocab_size)

    @property
    def show_progress(self) -> bool:
        return self.groups.is_main and self.config.logging.progress != "none"

    def schedule(self, source: BatchSource, batch_size: int, *purpose: object) -> BatchSchedule:
        """This rank's batches of a source, in an order that ``purpose`` and the run's seed determine."""
        seed = derive_seed(self.config.seed, *purpose)
        return BatchSchedule(source, batch_size, seed=seed, rank=self.groups.rank, world_size=self.groups.world_size)
