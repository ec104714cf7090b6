"""Checkpoints outside of a run, as models for an evaluation: a target in its parallel layout, a proxy, an export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lm_eval.api.model import LM

from megatron_bliss.base import checkpoint
from megatron_bliss.base.files import read_json
from megatron_bliss.base.parallel import Groups
from megatron_bliss.config.config import Config
from megatron_bliss.config.models import TargetConfig
from megatron_bliss.data.tokenizers import Tokenizer
from megatron_bliss.evaluation import HuggingFaceModel, ProxyModel, TargetModel
from megatron_bliss.evaluation.checks import load_evaluation_tokenizer
from megatron_bliss.models.transformer import build_lm
from megatron_bliss.target.pretrained import checkpoint_architecture, described_architecture
from megatron_bliss.target.setup import TargetSetup, load_target


@dataclass(frozen=True)
class Checkpoint:
    """What to evaluate and how: ``max_length`` None takes the run's sequence length, or an export's own."""

    kind: str
    path: Path
    run: Path | None = None
    """Folder of the run that left the checkpoint, and its options; None for an export."""
    config: Config | None = None
    tokenizer_model: str | None = None
    max_length: int | None = None
    batch_tokens: int = 16384

    @property
    def target(self) -> TargetConfig:
        """Parallel layout that it needs."""
        return self.config.target if self.config is not None and self.kind == "target" else TargetConfig()


def find_run(path: Path) -> Path:
    """The run folder that a checkpoint lies in; ValueError where there is none above it."""
    for folder in path.resolve().parents:
        if (folder / "config.yaml").is_file() and (folder / "shards").is_dir():
            return folder
    raise ValueError(f"found no run folder above {path}, expected its config.yaml and shards: give --run")


def load_model(wanted: Checkpoint, groups: Groups) -> LM:
    """Collective: the model, ready for ``evaluate_tasks``."""
    return MODELS[wanted.kind](wanted, groups)


def _tokenizer(wanted: Checkpoint) -> Tokenizer:
    """The run's tokenizer, by the manifest in its own folder."""
    shards = wanted.run / "shards"
    prefix = str(shards / read_json(shards / "done.json")["prefixes"][0])
    return load_evaluation_tokenizer(wanted.tokenizer_model, prefix)


def _target(wanted: Checkpoint, groups: Groups) -> LM:
    config = wanted.config
    tokenizer, architecture = _tokenizer(wanted), checkpoint_architecture(wanted.path)
    setup = TargetSetup(config.target, architecture, groups, config.platform, config.data.seq_length)
    target = load_target(wanted.path, setup)
    max_length = wanted.max_length or setup.seq_length
    return TargetModel(target, groups, tokenizer, max_length=max_length, batch_tokens=wanted.batch_tokens)


def _proxy(wanted: Checkpoint, groups: Groups) -> LM:
    config = wanted.config
    tokenizer, state = _tokenizer(wanted), checkpoint.load_state(wanted.path)
    if "proxy" not in state:
        raise ValueError(f"found {', '.join(state)} in {wanted.path}, expected a proxy: give a final.pt of a run")
    lm = build_lm(described_architecture(state.get("architecture"), wanted.path), seed=0, device=groups.device)
    lm.load_state_dict(state["proxy"])
    max_length = wanted.max_length or config.data.seq_length
    return ProxyModel(lm, tokenizer, max_length=max_length, batch_tokens=wanted.batch_tokens, groups=groups)


def _huggingface(wanted: Checkpoint, groups: Groups) -> LM:
    return HuggingFaceModel(wanted.path, max_length=wanted.max_length, batch_tokens=wanted.batch_tokens, groups=groups)


MODELS: dict[str, Callable[[Checkpoint, Groups], LM]] = {
    "target": _target,
    "proxy": _proxy,
    "huggingface": _huggingface,
}
