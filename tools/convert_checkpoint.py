"""Convert models between Hugging Face folders (GPT-NeoX, LLaMA; safetensors) and this package.

  convert_checkpoint.py --from huggingface DIR --to target OUT
  convert_checkpoint.py --from target CHECKPOINT --to huggingface OUT --tokenizer tokenizer.json
  convert_checkpoint.py --from proxy RUN/warmup/proxy/final.pt --to huggingface OUT
  convert_checkpoint.py --from score RUN/bliss/round_01/bilevel/final.pt --to huggingface OUT

A score model becomes the headless model of its trunk (transformers' AutoModel loads it), score_head.safetensors with
the linear unit (weight [1, width], bias [1]) and score_head.json, which says what they compute. OUT must not exist; it
appears when it is complete. Every conversion is checked: what was written is read again, and its digest compared.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_bliss.base import checkpoint, parallel
from megatron_bliss.base.command import command
from megatron_bliss.base.files import publish, sync_folder, write_json
from megatron_bliss.config.models import TargetConfig
from megatron_bliss.config.platform import PlatformConfig
from megatron_bliss.models.convert import (
    Layout,
    converted,
    huggingface_layout,
    proxy_layout,
    reader,
    shapes,
    target_layout,
    without_output,
)
from megatron_bliss.models.huggingface import (
    DTYPES,
    TOKENIZER_FILES,
    WeightFiles,
    config_json,
    copy_tokenizer,
    open_huggingface,
    write_weights,
)
from megatron_bliss.models.presets import Architecture
from megatron_bliss.target.checkpoint import load_target_weights_from, save_target
from megatron_bliss.target.model import Target, build_target
from megatron_bliss.target.pretrained import checkpoint_architecture, find_checkpoint
from megatron_bliss.target.weights import full_weights, load_full_weights

Tensors = Iterable[tuple[str, Tensor]]
BASE_MODELS = {"gpt_neox": ("GPTNeoXModel", "gpt_neox."), "llama": ("LlamaModel", "model.")}
"""transformers' model without a head, and what it leaves out of the names."""


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    arch: Architecture
    parameters: int
    dtype: torch.dtype
    digest: str
    notes: tuple[str, ...] = ()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--from", dest="source", nargs=2, required=True, metavar=("FORMAT", "PATH"), help=" | ".join(_formats(0)))
    add("--to", dest="to", nargs=2, required=True, metavar=("FORMAT", "OUT"), help=" | ".join(_formats(1)))
    add("--dtype", choices=list(DTYPES), help="precision of what is written (default: as it is read; fp16 as fp32)")
    add("--tokenizer", help="to huggingface: tokenizer.json, or a folder that holds it, to copy (default: none)")
    add("--max-positions", type=int, default=2048, help="to huggingface: longest sequence, for config.json")
    add("--max-shard-gb", type=float, default=5.0, help="to huggingface: largest file")
    return parser.parse_args(arguments)


def weights_digest(tensors: Tensors) -> str:
    """SHA-256 over names, precisions, shapes and bits of tensors."""
    digest = hashlib.sha256()
    for _ in _digesting(tensors, digest):
        pass
    return digest.hexdigest()


def _digesting(tensors: Tensors, digest: hashlib._Hash) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        yield name, tensor


def _cast(tensors: Tensors, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor.detach().cpu().to(dtype)) for name, tensor in tensors)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends without an error, and vanishes otherwise."""
    if path.exists():
        raise ValueError(f"found {path}, expected a name that is free: remove it, or change --to")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        _flush(temporary)
        publish(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


# -- to a target ------------------------------------------------------------------------------------------------------


def huggingface_to_target(source: Path, folder: Path, options: argparse.Namespace) -> Converted:
    """A checkpoint of weights alone, which any parallel layout loads; the tokenizer's files are copied beside it."""
    arch, files = open_huggingface(source)
    dtype = _target_dtype(options.dtype, files.dtype)
    layout = huggingface_layout(arch)
    with _one_process() as groups:
        target = _build(arch, dtype, groups)
        load_full_weights(target, reader(files, layout, target_layout(arch)), groups)
        save_target(folder, 0, target, groups, shared={"converted_from": str(source)})
        for chunk in target:  # so that what is compared is what was written
            for parameter in chunk.parameters():
                torch.nn.init.zeros_(parameter)
        load_target_weights_from(checkpoint.step_folder(folder, 0), target, groups)
        found = weights_digest(_of_target(target, arch, groups))
    expected = weights_digest(_cast(((name, files(name)) for name in layout), dtype))
    _compare(found, expected, folder)
    copied = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, folder / name)
    return Converted(arch, _count(files), dtype, found, tuple(f"copied {name}" for name in copied))


def _count(files: WeightFiles) -> int:
    return sum(torch.Size(shape).numel() for shape in files.shapes.values())


def _target_dtype(asked: str | None, stored: torch.dtype) -> torch.dtype:
    if asked == "fp16":
        raise ValueError("found --dtype fp16 for a target, expected fp32 or bf16, in which targets train")
    if asked:
        return DTYPES[asked]
    return torch.bfloat16 if stored == torch.bfloat16 else torch.float32


# -- to Hugging Face --------------------------------------------------------------------------------------------------


def target_to_huggingface(source: Path, folder: Path, options: argparse.Namespace) -> Converted:
    """transformers' causal language model from a checkpoint saved at any parallel layout."""
    path = find_checkpoint(source)
    arch = checkpoint_architecture(path)
    stored = getattr(torch, checkpoint.read_manifest(path)["params_dtype"])
    with _one_process() as groups:
        target = _build(arch, stored, groups)
        load_target_weights_from(path, target, groups)
        return _write_language_model(_of_target(target, arch, groups), arch, stored, folder, options)


def proxy_to_huggingface(source: Path, folder: Path, options: argparse.Namespace) -> Converted:
    """transformers' causal language model from the final.pt of a proxy's warm-up or of a bilevel stage."""
    arch, weights, _ = _small_model(source, "proxy")
    tensors = converted(weights.__getitem__, proxy_layout(arch), huggingface_layout(arch))
    return _write_language_model(tensors, arch, torch.float32, folder, options)


def score_to_huggingface(source: Path, folder: Path, options: argparse.Namespace) -> Converted:
    """transformers' headless model from a score model's trunk, and its linear unit in a file of its own."""
    arch, weights, state = _small_model(source, "score_model")
    dtype = DTYPES[options.dtype] if options.dtype else torch.float32
    model, prefix = BASE_MODELS[arch.architecture]
    layout = _headless(arch, prefix)
    tensors = _cast(converted(weights.__getitem__, without_output(proxy_layout(arch)), layout), dtype)
    eod, notes = _tokenizer(folder, options)
    write_json(
        folder / "config.json", config_json(arch, dtype, options.max_positions, eod) | {"architectures": [model]}
    )
    digest = hashlib.sha256()
    count = write_weights(folder, _digesting(tensors, digest), int(options.max_shard_gb * 1e9))
    files = WeightFiles(folder, arch, layout)
    _compare(weights_digest((name, files(name)) for name in layout), digest.hexdigest(), folder)
    head = {name: weights[f"head.{name}"].to(torch.float32).contiguous() for name in ("weight", "bias")}
    save_file(head, folder / "score_head.safetensors")
    described = {
        "activation": state["activation"],
        "formula": "activation(mean over real tokens of last_hidden_state . weight + bias)",
    }
    write_json(folder / "score_head.json", described)
    notes = (*notes, f"score_head.safetensors: weight [1, {arch.hidden_size}], bias [1]; {state['activation']}")
    return Converted(arch, count, dtype, digest.hexdigest(), notes)


def _headless(arch: Architecture, prefix: str) -> Layout:
    layout = without_output(huggingface_layout(arch))
    return {name.removeprefix(prefix): packed for name, packed in layout.items()}


def _small_model(path: Path, key: str) -> tuple[Architecture, dict[str, Tensor], dict]:
    path = path / "final.pt" if path.is_dir() else path
    state = checkpoint.load_state(path)
    described = state.get("architecture") if isinstance(state, dict) else None
    if key not in (state or ()) or not isinstance(described, dict):
        raise ValueError(f"found no {key} with its architecture in {path}, expected the final.pt of a run's stage")
    family = state.get("score", {}).get("family", "transformer")
    if key == "score_model" and family != "transformer":
        raise ValueError(
            f"found a score model of family {family} in {path}, expected transformer: the others have no such form"
        )
    arch = Architecture(**{field.name: described[field.name] for field in fields(Architecture)})
    layout = proxy_layout(arch) if key == "proxy" else without_output(proxy_layout(arch))
    for name, shape in shapes(arch, layout).items():
        if name not in state[key] or tuple(state[key][name].shape) != shape:
            raise ValueError(f"found no {name} of shape {shape} in {path}, expected what its architecture says")
    return arch, state[key], state


def _write_language_model(
    tensors: Tensors, arch: Architecture, stored: torch.dtype, folder: Path, options: argparse.Namespace
) -> Converted:
    dtype = DTYPES[options.dtype] if options.dtype else stored
    eod, notes = _tokenizer(folder, options)
    write_json(folder / "config.json", config_json(arch, dtype, options.max_positions, eod))
    digest = hashlib.sha256()
    count = write_weights(folder, _digesting(_cast(tensors, dtype), digest), int(options.max_shard_gb * 1e9))
    again, files = open_huggingface(folder)
    if again != arch:
        raise ValueError(f"found {again} in the config.json that was written, expected {arch}")
    _compare(weights_digest((name, files(name)) for name in huggingface_layout(arch)), digest.hexdigest(), folder)
    return Converted(arch, count, dtype, digest.hexdigest(), notes)


def _tokenizer(folder: Path, options: argparse.Namespace) -> tuple[int | None, tuple[str, ...]]:
    if options.tokenizer is None:
        return None, ("no tokenizer: give --tokenizer, so that transformers and lm-eval load the folder",)
    names, eod = copy_tokenizer(options.tokenizer, folder)
    return eod, (f"tokenizer: {', '.join(names)}",)


# -- both ways --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _one_process() -> Iterator[parallel.Groups]:
    try:
        yield parallel.initialize(PlatformConfig(), TargetConfig(), seed=0)
    finally:
        parallel.destroy()


def _build(arch: Architecture, dtype: torch.dtype, groups: parallel.Groups) -> Target:
    return build_target(TargetConfig(), arch, groups, seq_length=8, params_dtype=dtype, seed=0)


def _of_target(target: Target, arch: Architecture, groups: parallel.Groups) -> Iterator[tuple[str, Tensor]]:
    """The target's tensors under Hugging Face's names, one at a time."""
    whole = dict(full_weights(target, list(target_layout(arch)), groups))  # views of the target's own, on one process
    return converted(whole.__getitem__, target_layout(arch), huggingface_layout(arch))


def _compare(found: str, expected: str, folder: Path) -> None:
    if found != expected:
        raise ValueError(f"found weights with digest {found[:12]} in {folder}, expected {expected[:12]}: the disk errs")


def _flush(folder: Path) -> None:
    """Every file and folder below ``folder`` to disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


CONVERSIONS: dict[tuple[str, str], Callable[[Path, Path, argparse.Namespace], Converted]] = {
    ("huggingface", "target"): huggingface_to_target,
    ("target", "huggingface"): target_to_huggingface,
    ("proxy", "huggingface"): proxy_to_huggingface,
    ("score", "huggingface"): score_to_huggingface,
}
"""(from, to) -> function (source, new folder, options)."""


def _formats(side: int) -> list[str]:
    return list(dict.fromkeys(pair[side] for pair in CONVERSIONS))


def run(options: argparse.Namespace) -> Converted:
    """Convert; ValueError for formats that don't go together, and for whatever is wrong with the source."""
    (source_format, source), (to_format, out) = options.source, options.to
    if (source_format, to_format) not in CONVERSIONS:
        known = ", ".join(" to ".join(pair) for pair in CONVERSIONS)
        raise ValueError(f"found --from {source_format} --to {to_format}, expected one of: {known}")
    with new_folder(Path(out)) as folder:
        return CONVERSIONS[source_format, to_format](Path(source), folder, options)


@command("convert_checkpoint", (ValueError, OSError))
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    result = run(options)
    arch = result.arch
    print(
        f"{options.to[1]}: {arch.architecture}, {arch.num_layers} layers x {arch.hidden_size}, vocabulary "
        f"{arch.vocab_size:,}, {result.parameters:,} parameters, {str(result.dtype).removeprefix('torch.')}"
    )
    print(f"weights sha256 {result.digest} (read again and compared)")
    for note in result.notes:
        print(note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
