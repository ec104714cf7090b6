"""Architectures by name, with their true parameter counts."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import get_args

from megatron_bliss.config.models import Family, ModelConfig


@dataclass(frozen=True)
class Architecture:
    """Every size of a decoder-only language model, resolved."""

    architecture: str
    """Block family: gpt_neox or llama."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    rotary_percent: float = 1.0
    rotary_base: float = 10000.0
    norm_epsilon: float = 1e-5
    untie_embeddings_and_output_weights: bool = True
    init_method_std: float = 0.02

    def __post_init__(self):
        _validate(self)

    @property
    def kv_channels(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_channels(self) -> int:
        """Leading channels of each head that are rotated; even."""
        return int(self.kv_channels * self.rotary_percent) // 2 * 2

    @property
    def query_key_value_size(self) -> int:
        """Rows of the packed projection [queries | keys | values]."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def has_bias(self) -> bool:
        """Whether linear maps carry a bias (GPT-NeoX) or not (LLaMA)."""
        return self.architecture == "gpt_neox"


def _validate(arch: Architecture) -> None:
    """Raise ValueError naming the option that makes the sizes impossible."""
    if arch.architecture not in get_args(Family):
        expected = " or ".join(get_args(Family))
        raise ValueError(f"found architecture {arch.architecture!r}, expected {expected}: change architecture")
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"):
        if getattr(arch, name) < 1:
            raise ValueError(f"found {name} {getattr(arch, name)}, expected at least 1: change {name}")
    if arch.vocab_size < 2:
        raise ValueError(f"found a vocabulary of {arch.vocab_size}, expected at least 2 tokens")
    if arch.hidden_size % arch.num_attention_heads:
        raise ValueError(
            f"found hidden_size {arch.hidden_size} with {arch.num_attention_heads} heads, expected a multiple of the"
            " heads: change hidden_size or num_attention_heads"
        )
    if arch.num_attention_heads % arch.num_query_groups:
        raise ValueError(
            f"found {arch.num_attention_heads} heads in {arch.num_query_groups} query groups, expected a divisor of"
            " the heads: change num_query_groups"
        )
    if not 0.0 <= arch.rotary_percent <= 1.0:
        raise ValueError(f"found rotary_percent {arch.rotary_percent}, expected 0 to 1: change rotary_percent")
    if arch.norm_epsilon <= 0 or arch.rotary_base <= 0:
        raise ValueError(
            f"found norm_epsilon {arch.norm_epsilon} and rotary_base {arch.rotary_base}, expected positive numbers"
        )


def _pythia(num_layers: int, hidden_size: int, num_attention_heads: int, vocab_size: int = 50304) -> Architecture:
    return Architecture(
        architecture="gpt_neox",
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=4 * hidden_size,
        num_attention_heads=num_attention_heads,
        num_query_groups=num_attention_heads,
        vocab_size=vocab_size,
        rotary_percent=0.25,
    )


def _llama(num_layers: int, hidden_size: int, ffn: int, heads: int, groups: int) -> Architecture:
    return Architecture(
        architecture="llama",
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=32000,
    )


# The Pythia sizes are EleutherAI's, with their padded vocabulary. Of the LLaMA sizes, 13b and 70b are LLaMA 2's (arXiv
# 2307.09288), 134m is the 12 x 768 of the pre-training literature, and the others are ours: each holds the number of
# parameters in its name at 32,000 tokens, untied.
PRESETS: dict[str, Architecture] = {
    "pythia-14m": _pythia(6, 128, 4),  # 14,067,712
    "pythia-31m": _pythia(6, 256, 8),  # 30,494,720
    "pythia-70m": _pythia(6, 512, 8),  # 70,426,624
    "pythia-160m": _pythia(12, 768, 12),  # 162,322,944
    "pythia-410m": _pythia(24, 1024, 16),  # 405,334,016
    "pythia-1b": _pythia(16, 2048, 8),  # 1,011,781,632
    "pythia-2.8b": _pythia(32, 2560, 32),  # 2,775,208,960
    "pythia-6.9b": _pythia(32, 4096, 32, vocab_size=50432),  # 6,857,302,016
    "llama-134m": _llama(12, 768, 2048, heads=12, groups=12),  # 134,105,856
    "llama-300m": _llama(20, 1024, 2944, heads=16, groups=4),  # 298,886,144
    "llama-0.5b": _llama(24, 1280, 3456, heads=20, groups=4),  # 494,859,520
    "llama-1b": _llama(20, 2048, 5632, heads=32, groups=4),  # 1,011,959,808
    "llama-13b": _llama(40, 5120, 13824, heads=40, groups=40),  # 13,015,864,320
    "llama-70b": _llama(80, 8192, 28672, heads=64, groups=8),  # 68,976,648,192
}


def resolve_architecture(config: ModelConfig, vocab_size: int) -> Architecture:
    """All sizes of the model that ``config`` describes, with a vocabulary of ``vocab_size`` tokens.

    A preset gives every size; fields that are set override it, and sizes that follow from an overridden one (the
    feed-forward width, the query groups) are derived anew. Raises ValueError naming the option to change.
    """
    given = {f.name: getattr(config, f.name, None) for f in fields(Architecture)}
    given = {name: value for name, value in given.items() if value is not None} | {"vocab_size": vocab_size}
    if config.preset is not None:
        return _override(_preset(config.preset), given)
    missing = [n for n in ("architecture", "num_layers", "hidden_size", "num_attention_heads") if n not in given]
    if missing:
        raise ValueError(
            f"found no preset and no {', '.join(missing)}, expected either: set preset to one of {', '.join(PRESETS)}"
            f" or give {', '.join(missing)}"
        )
    family = given["architecture"]
    given.setdefault("ffn_hidden_size", _default_ffn(family, given["hidden_size"]))
    given.setdefault("num_query_groups", given["num_attention_heads"])
    given.setdefault("rotary_percent", 0.25 if family == "gpt_neox" else 1.0)
    return Architecture(**given)


def is_sized(config: ModelConfig) -> bool:
    """Whether the configuration names a preset or any size; one that does neither takes a pretrained model's."""
    return any(getattr(config, f.name) is not None for f in fields(ModelConfig))


def _preset(name: str) -> Architecture:
    if name not in PRESETS:
        raise ValueError(f"found preset {name!r}, expected one of {', '.join(PRESETS)}: change preset")
    return PRESETS[name]


def _override(preset: Architecture, given: dict) -> Architecture:
    family = given.get("architecture", preset.architecture)
    if family != preset.architecture:
        given.setdefault("rotary_percent", 0.25 if family == "gpt_neox" else 1.0)
    if family != preset.architecture or given.get("hidden_size", preset.hidden_size) != preset.hidden_size:
        given.setdefault("ffn_hidden_size", _default_ffn(family, given.get("hidden_size", preset.hidden_size)))
    if preset.num_query_groups == preset.num_attention_heads and "num_attention_heads" in given:
        given.setdefault("num_query_groups", given["num_attention_heads"])
    return replace(preset, **given)


def _default_ffn(family: str, hidden_size: int) -> int:
    """4 x hidden for GPT-NeoX; for LLaMA 8/3 of it (three matrices instead of two), up to a multiple of 64."""
    return 4 * hidden_size if family == "gpt_neox" else -(-8 * hidden_size // 3 // 64) * 64


def parameter_count(arch: Architecture) -> int:
    """Exact number of parameters of the language model (a tied matrix counts once)."""
    matrices = 1 + arch.untie_embeddings_and_output_weights
    norm = 2 * arch.hidden_size if arch.has_bias else arch.hidden_size
    return matrices * arch.vocab_size * arch.hidden_size + arch.num_layers * (_linear_sizes(arch) + 2 * norm) + norm


def trunk_count(arch: Architecture) -> int:
    """Those of its trunk: all but an output matrix of its own."""
    return parameter_count(arch) - arch.vocab_size * arch.hidden_size * arch.untie_embeddings_and_output_weights


def _linear_sizes(arch: Architecture) -> int:
    """Weights and biases of the four linear maps of one block."""
    width, ffn_in = arch.hidden_size, arch.ffn_hidden_size * (1 if arch.architecture == "gpt_neox" else 2)
    weights = width * (arch.query_key_value_size + width + ffn_in + arch.ffn_hidden_size)
    return weights + (arch.query_key_value_size + width + ffn_in + width if arch.has_bias else 0)


def flops_per_token(arch: Architecture, seq_length: int) -> float:
    """Floating-point operations of one forward pass per token of a sequence of ``seq_length`` tokens.

    Two per multiply-add of every matrix product, the output matrix included; a causal token attends to
    (seq_length + 1) / 2 tokens on average. Norms, softmax and activations are left out.
    """
    return trunk_flops_per_token(arch, seq_length) + 2.0 * arch.vocab_size * arch.hidden_size


def trunk_flops_per_token(arch: Architecture, seq_length: int) -> float:
    """The same without the output matrix, as the score model runs it."""
    ffn_matrices = 2 if arch.architecture == "gpt_neox" else 3
    linear = arch.hidden_size * (arch.query_key_value_size + arch.hidden_size + ffn_matrices * arch.ffn_hidden_size)
    attention = 2 * arch.hidden_size * (seq_length + 1) / 2
    return 2.0 * arch.num_layers * (linear + attention)
