"""Weights that a run begins from: a Hugging Face folder or a checkpoint of a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_bliss.base import checkpoint
from megatron_bliss.base.parallel import Groups, failing_together
from megatron_bliss.config.models import ProxyConfig, TargetConfig
from megatron_bliss.models.convert import Layout, converted, huggingface_layout, proxy_layout, reader, target_layout
from megatron_bliss.models.huggingface import CONFIG, open_huggingface, read_architecture
from megatron_bliss.models.presets import Architecture, is_sized, resolve_architecture
from megatron_bliss.models.transformer import LanguageModel
from megatron_bliss.target.checkpoint import load_target_weights_from
from megatron_bliss.target.model import Target
from megatron_bliss.target.weights import load_full_weights

MOST_PADDING = 1024
"""Rows past the tokenizer's ids that are taken for padding: Pythia has 27 to 155 of them."""


def is_huggingface(path: str | Path) -> bool:
    """Whether a folder is one of transformers, as against a checkpoint."""
    return (Path(path) / CONFIG).is_file()


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint's folder: ``path`` itself or the newest in it; ValueError where there is none."""
    found = Path(path) if (Path(path) / checkpoint.MANIFEST).is_file() else checkpoint.latest(path)
    if found is None:
        raise ValueError(f"found neither {CONFIG} nor a finished checkpoint in {path}, expected one of the two")
    return found


def checkpoint_architecture(path: str | Path) -> Architecture:
    """The architecture that a target's checkpoint says it is of."""
    path = find_checkpoint(path)
    return described_architecture(checkpoint.read_manifest(path).get("architecture"), path / checkpoint.MANIFEST)


def described_architecture(described: object, where: Path) -> Architecture:
    """The architecture that a checkpoint noted in the file ``where``: as large as it is, whatever the options say."""
    if not isinstance(described, dict) or described.keys() != {field.name for field in fields(Architecture)}:
        raise ValueError(f"found no architecture in {where}, expected a checkpoint of a target or a proxy")
    return Architecture(**described)


def pretrained_architecture(path: str | Path) -> Architecture:
    """The architecture of a Hugging Face folder or of a target's checkpoint."""
    return read_architecture(path) if is_huggingface(path) else checkpoint_architecture(path)


def configured_architecture(name: str, config: TargetConfig | ProxyConfig, vocab_size: int) -> Architecture:
    """All sizes of the target or proxy (``name``), which a pretrained checkpoint gives where the options don't.

    ValueError where the two differ, or the checkpoint's vocabulary is not the tokenizer's.
    """
    if config.pretrained_checkpoint is None:
        return resolve_architecture(config, vocab_size)
    found = pretrained_architecture(config.pretrained_checkpoint)
    _check_vocabulary(f"{name}.pretrained_checkpoint={config.pretrained_checkpoint}", found.vocab_size, vocab_size)
    found = replace(found, vocab_size=vocab_size, init_method_std=config.init_method_std)
    if not is_sized(config):
        return found
    expected = resolve_architecture(config, vocab_size)
    for option, value in asdict(expected).items():
        if getattr(found, option) != value:
            raise ValueError(
                f"found {option}={getattr(found, option)} in {name}.pretrained_checkpoint="
                f"{config.pretrained_checkpoint}, expected {value}: change {name}.{option}, or set no {name}.preset "
                "and no sizes, to take the checkpoint's"
            )
    return expected


def _check_vocabulary(where: str, rows: int, vocab_size: int) -> None:
    if not vocab_size <= rows < vocab_size + MOST_PADDING:
        raise ValueError(
            f"found {rows} tokens in {where}, expected the {vocab_size} of the corpus's tokenizer (and fewer than "
            f"{MOST_PADDING} rows of padding after them): make the corpus with the tokenizer of that model"
        )


def load_pretrained(target: Target, path: str | Path, groups: Groups) -> None:
    """Collective: copy weights into the target. Rows past its vocabulary are dropped: they are no token's."""
    if not is_huggingface(path):
        load_target_weights_from(find_checkpoint(path), target, groups)
        return
    with failing_together(groups):
        architecture = target[0].architecture
        read, source = _cut(path, architecture)
        load_full_weights(target, reader(read, source, target_layout(architecture)), groups)


@torch.no_grad()
def load_pretrained_proxy(proxy: LanguageModel, path: str | Path) -> None:
    """Copy the weights of a Hugging Face folder into the proxy."""
    if not is_huggingface(path):
        raise ValueError(f"found no {CONFIG} in proxy.pretrained_checkpoint={path}, expected a Hugging Face folder")
    read, source = _cut(path, proxy.architecture)
    parameters = dict(proxy.named_parameters())
    for name, tensor in converted(read, source, proxy_layout(proxy.architecture)):
        parameters[name].copy_(tensor)


def _cut(path: str | Path, architecture: Architecture) -> tuple[Callable[[str], Tensor], Layout]:
    """Reads a folder's tensors, their vocabulary cut to the architecture's, and the layout they are stored in."""
    found, files = open_huggingface(path)
    _check_vocabulary(str(path), found.vocab_size, architecture.vocab_size)
    layout = huggingface_layout(architecture)
    ends = ({"embedding.weight"}, {"output.weight"})
    vocabulary = {name for name, packed in layout.items() if set(packed.parts) in ends}

    def read(name: str) -> Tensor:
        return files(name)[: architecture.vocab_size] if name in vocabulary else files(name)

    return read, layout
