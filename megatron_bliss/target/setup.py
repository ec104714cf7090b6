"""What a target is built from, and targets built so: with initial weights, or with a checkpoint's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_bliss.base.parallel import Groups
from megatron_bliss.base.platform import choose_dtype
from megatron_bliss.config.models import TargetConfig
from megatron_bliss.config.platform import PlatformConfig
from megatron_bliss.models.presets import Architecture
from megatron_bliss.target.checkpoint import load_target_weights_from
from megatron_bliss.target.model import Target, build_target


@dataclass(frozen=True)
class TargetSetup:
    """All that a target is built from."""

    config: TargetConfig
    architecture: Architecture
    groups: Groups
    platform: PlatformConfig
    seq_length: int
    seed: int = 0
    """Of the initial weights."""

    def build(self) -> Target:
        """The target with initial weights; ValueError where its sizes don't fit the layout."""
        return build_target(
            self.config,
            self.architecture,
            self.groups,
            seq_length=self.seq_length,
            params_dtype=choose_dtype(self.platform),
            seed=self.seed,
        )


def load_target(path: str | Path, setup: TargetSetup) -> Target:
    """Collective: the target with the weights of a checkpoint of any layout, to be used as it is (not trained)."""
    target = setup.build()
    load_target_weights_from(path, target, setup.groups)
    for chunk in target:
        chunk.requires_grad_(False)
    return target
