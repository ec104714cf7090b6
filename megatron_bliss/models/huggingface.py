"""Folders of Hugging Face transformers: config.json and safetensors of GPT-NeoX (Pythia) and LLaMA models.

A folder comes from anywhere, so nothing in it is run or believed: safetensors only (a pickle can hold a program), every
name and shape is compared with the architecture before a tensor is read, and files lie in the folder itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_bliss.base.files import read_json, write_json
from megatron_bliss.data.tokenizers import load_tokenizer
from megatron_bliss.models.convert import Layout, huggingface_layout, shapes
from megatron_bliss.models.presets import Architecture

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
LARGEST = {"num_hidden_layers": 1024, "vocab_size": 1 << 24}
LARGEST_WIDTH = 1 << 18
"""Sizes above these are taken for a damaged or hostile config.json, not for a model."""
BUFFERS = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")
"""Ends of names that old checkpoints hold and the model computes by itself."""


# -- config.json ------------------------------------------------------------------------------------------------------


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture of a folder's config.json; ValueError for what this package's models do not compute."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"found no {CONFIG} in {folder}, expected a folder of a Hugging Face model")
    config = read_json(path)
    families = {"gpt_neox": _gpt_neox, "llama": _llama}
    family = config.get("model_type")
    if family not in families:
        raise ValueError(f"found model_type {family!r} in {path}, expected {' or '.join(families)}")
    try:
        return families[family](config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _gpt_neox(config: dict) -> Architecture:
    _require(config, "use_parallel_residual", True, True)
    _require(config, "attention_bias", True, True)
    _require(config, "hidden_act", "gelu", "gelu")
    base, percent = _rotary(config, "rotary_emb_base", "rotary_pct", 0.25)
    heads = _size(config, "num_attention_heads")
    return Architecture(
        architecture="gpt_neox",
        ffn_hidden_size=_size(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=heads,
        rotary_percent=percent,
        rotary_base=base,
        norm_epsilon=_number(config, "layer_norm_eps", 1e-5),
        **_common(config),
    )


def _llama(config: dict) -> Architecture:
    _require(config, "attention_bias", False, False)
    _require(config, "mlp_bias", False, False)
    _require(config, "hidden_act", "silu", "silu")
    base, percent = _rotary(config, "rope_theta", "partial_rotary_factor", 1.0)
    heads, width = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    if config.get("head_dim") is not None:
        _require(config, "head_dim", width // heads, width // heads)
    return Architecture(
        architecture="llama",
        ffn_hidden_size=_size(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=heads if config.get("num_key_value_heads") is None else _size(config, "num_key_value_heads"),
        rotary_percent=percent,
        rotary_base=base,
        norm_epsilon=_number(config, "rms_norm_eps", 1e-6),
        **_common(config),
    )


def _common(config: dict) -> dict[str, Any]:
    return {
        "num_layers": _size(config, "num_hidden_layers"),
        "hidden_size": _size(config, "hidden_size"),
        "vocab_size": _size(config, "vocab_size"),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "init_method_std": _number(config, "initializer_range", 0.02),
    }


def _rotary(config: dict, base_name: str, share_name: str, share: float) -> tuple[float, float]:
    """(base, rotated share of a head), as transformers 5 (rope_parameters) and earlier ones write them."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict) or given.get("rope_type", given.get("type", "default")) != "default":
        raise ValueError(f"found rope scaling {given}, expected none: these models compute plain rotary positions only")
    merged = {
        base_name: given.get("rope_theta", config.get(base_name, 10000.0)),
        share_name: given.get("partial_rotary_factor", config.get(share_name, share)),
    }
    return _number(merged, base_name, 10000.0), _number(merged, share_name, share)


def _require(config: dict, name: str, expected: object, default: object) -> None:
    found = config.get(name, default)
    if found != expected:
        raise ValueError(f"found {name}={found!r}, expected {expected!r}: these models compute nothing else")


def _size(config: dict, name: str) -> int:
    value, largest = config.get(name), LARGEST.get(name, LARGEST_WIDTH)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise ValueError(f"found {name}={value!r}, expected a whole number from 1 to {largest}")
    return value


def _number(config: dict, name: str, default: float) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"found {name}={value!r}, expected a number")
    return float(value)


def config_json(arch: Architecture, dtype: torch.dtype, max_positions: int, eod: int | None = None) -> dict[str, Any]:
    """What config.json says of an architecture, for transformers 4 and 5; ValueError where it cannot say it."""
    _check_exportable(arch)
    neox = arch.architecture == "gpt_neox"
    config = {
        "architectures": ["GPTNeoXForCausalLM" if neox else "LlamaForCausalLM"],
        "model_type": arch.architecture,
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "hidden_act": "gelu" if neox else "silu",
        "layer_norm_eps" if neox else "rms_norm_eps": arch.norm_epsilon,
        "initializer_range": arch.init_method_std,
        "tie_word_embeddings": not arch.untie_embeddings_and_output_weights,
        "max_position_embeddings": max_positions,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    rope = {"rope_type": "default", "rope_theta": arch.rotary_base}
    if neox:
        rope["partial_rotary_factor"] = arch.rotary_percent
        old = {"rotary_emb_base": arch.rotary_base, "rotary_pct": arch.rotary_percent}
        return config | old | {"use_parallel_residual": True, "attention_bias": True, "rope_parameters": rope}
    own = {"num_key_value_heads": arch.num_query_groups, "rope_theta": arch.rotary_base, "rope_parameters": rope}
    return config | own | {"attention_bias": False, "mlp_bias": False, "head_dim": arch.kv_channels}


def _check_exportable(arch: Architecture) -> None:
    if arch.architecture == "gpt_neox" and arch.num_query_groups != arch.num_attention_heads:
        raise ValueError(
            f"found a GPT-NeoX model with {arch.num_query_groups} query groups for {arch.num_attention_heads} heads, "
            "expected one per head: transformers has no such model"
        )
    if arch.architecture == "llama" and arch.rotary_channels != arch.kv_channels:
        raise ValueError(
            f"found a LLaMA model that rotates {arch.rotary_channels} of {arch.kv_channels} channels, expected all: "
            "older transformers would rotate all of them"
        )
    if int(arch.kv_channels * arch.rotary_percent) % 2:
        raise ValueError(
            f"found rotary_percent={arch.rotary_percent} of {arch.kv_channels} channels, expected an even number of "
            "rotated channels: transformers and this package round an odd one differently"
        )


# -- weights ----------------------------------------------------------------------------------------------------------


class WeightFiles:
    """The safetensors of a folder: ``files(name)`` reads one tensor. Names and shapes are checked on opening."""

    def __init__(self, folder: str | Path, arch: Architecture, layout: Layout | None = None) -> None:
        """ValueError for pickles, paths that leave the folder, and anything but the architecture's tensors.

        ``layout`` is that of a causal language model where none is given.
        """
        self.folder = Path(folder)
        self._file_of = _files_by_name(self.folder)
        self._open: dict[str, Any] = {}
        self.shapes = shapes(arch, huggingface_layout(arch) if layout is None else layout)
        spare = "embed_out.weight" if arch.architecture == "gpt_neox" else "lm_head.weight"
        tied = () if arch.untie_embeddings_and_output_weights else (spare,)
        unknown = [n for n in self._file_of if n not in self.shapes and n not in tied and not n.endswith(BUFFERS)]
        missing = [name for name in self.shapes if name not in self._file_of]
        if unknown or missing:
            problem = f"a tensor {unknown[0]!r} too many" if unknown else f"no tensor {missing[0]!r}"
            raise ValueError(f"found {problem} in {self.folder}, expected what its {CONFIG} describes")
        self.dtype = self._check_tensors()
        """The one precision of all tensors, or the widest."""

    def _check_tensors(self) -> torch.dtype:
        found = set()
        for name, shape in self.shapes.items():
            piece = self._opened(name).get_slice(name)
            if tuple(piece.get_shape()) != shape:
                raise ValueError(
                    f"found {name} of shape {tuple(piece.get_shape())} in {self.folder}, expected {shape} as its "
                    f"{CONFIG} says"
                )
            if piece.get_dtype() not in STORED_DTYPES:
                raise ValueError(
                    f"found {name} in {piece.get_dtype()} in {self.folder}, expected one of {', '.join(STORED_DTYPES)}"
                )
            found.add(STORED_DTYPES[piece.get_dtype()])
        return found.pop() if len(found) == 1 else torch.float32

    def _opened(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = _open_safetensors(self.folder / file)
        if name not in self._open[file].keys():  # noqa: SIM118 (not a dict)
            raise ValueError(f"found no {name} in {self.folder / file}, expected it there as {INDEX} says")
        return self._open[file]

    def __call__(self, name: str) -> Tensor:
        """The tensor stored under ``name``."""
        return self._opened(name).get_tensor(name)


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"found a damaged file {path} ({error}), expected safetensors: copy it here again") from error


def _files_by_name(folder: Path) -> dict[str, str]:
    """{tensor: file in the folder}, from the index or from the one file."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"found no weight_map in {folder / INDEX}, expected the file of every tensor")
        for file in set(map(str, weight_map.values())):
            # A model hub keeps files as links elsewhere: the name, not its target, has to stay in the folder.
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"found file {file!r} in {folder / INDEX}, expected names of safetensors beside it")
            if not (folder / file).is_file():
                raise ValueError(f"found no {file} in {folder}, expected it as {INDEX} says: copy the whole folder")
        return weight_map
    if not (folder / WEIGHTS).is_file():
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
        hint = f"; {pickles[0]} can run a program when read and is not opened" if pickles else ""
        raise ValueError(
            f"found no {WEIGHTS} and no {INDEX} in {folder}, expected safetensors{hint}: save the model again with "
            "save_pretrained(safe_serialization=True)"
        )
    return dict.fromkeys(_open_safetensors(folder / WEIGHTS).keys(), WEIGHTS)


def open_huggingface(folder: str | Path) -> tuple[Architecture, WeightFiles]:
    """Architecture and weights of a folder."""
    arch = read_architecture(folder)
    return arch, WeightFiles(folder, arch)


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = 5 * 10**9) -> int:
    """Write tensors as one file, or as several and their index; returns the number of parameters.

    At most ``max_shard_bytes`` (or one tensor) are in memory at once.
    """
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    sizes = {"bytes": 0, "parameters": 0, "waiting": 0}

    def flush() -> None:
        save_file(waiting, folder / _shard_name(len(shards)), metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()
        sizes["waiting"] = 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if waiting and sizes["waiting"] + size > max_shard_bytes:
            flush()
        waiting[name] = tensor.contiguous().clone()  # its own memory: safetensors refuses tensors that share theirs
        for key, value in (("bytes", size), ("parameters", tensor.numel()), ("waiting", size)):
            sizes[key] += value
    flush()
    _name_shards(folder, shards, sizes["bytes"])
    return sizes["parameters"]


def _shard_name(index: int, of: int | None = None) -> str:
    return f"model-{index + 1:05d}-of-{of or 0:05d}.safetensors"


def _name_shards(folder: Path, shards: list[list[str]], size: int) -> None:
    """Give the files their final names, which hold their number, and write the index."""
    if len(shards) == 1:
        (folder / _shard_name(0)).rename(folder / WEIGHTS)
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file = _shard_name(index, len(shards))
        (folder / _shard_name(index)).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


# -- tokenizer --------------------------------------------------------------------------------------------------------


def copy_tokenizer(source: str | Path, folder: Path) -> tuple[list[str], int | None]:
    """Copy a tokenizer's files from a folder, or a tokenizer.json alone; returns their names and the EOD id.

    Where there is no tokenizer_config.json, one is written that transformers (and lm-eval through it) loads.
    """
    source = Path(source)
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()] if source.is_dir() else [source]
    if not files or not all(path.is_file() for path in files):
        raise ValueError(f"found no tokenizer in {source}, expected tokenizer.json or a folder that holds it")
    for path in files:
        shutil.copyfile(path, folder / ("tokenizer.json" if path == source else path.name))
    if not (folder / "tokenizer.json").is_file():
        return [path.name for path in files], None
    tokenizer = load_tokenizer("huggingface", folder)
    if not (folder / "tokenizer_config.json").is_file():
        eod = tokenizer.decode([tokenizer.eod])
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), eod)
        write_json(folder / "tokenizer_config.json", described | tokens)
    return sorted(path.name for path in folder.iterdir() if path.name in TOKENIZER_FILES), tokenizer.eod
