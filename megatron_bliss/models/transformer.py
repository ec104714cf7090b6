"""The small language model in plain PyTorch: GPT-NeoX and LLaMA blocks as pure functions.

A block is written once, over operations that may be plain (``models.operations.Values``) or carry tangents
(``bilevel.dual.Duals``). Nothing here knows about parallelism.

Parameters by name; q = (H + 2G) d rows packed [queries | keys | values], f = ffn_hidden_size, biases for GPT-NeoX only:

=======================================  ==========================================================
embedding.weight                         [v, w]
blocks.N.attention_norm.weight, .bias    [w]
blocks.N.query_key_value.weight, .bias   [q, w]
blocks.N.attention_output.weight, .bias  [w, w]
blocks.N.feed_forward_norm.weight, .bias [w]
blocks.N.feed_forward_in.weight, .bias   [f, w]; LLaMA: [2f, w], packed [gate | up], no bias
blocks.N.feed_forward_out.weight, .bias  [w, f]
final_norm.weight, .bias                 [w]
output.weight                            [v, w]; absent when tied to the embedding
=======================================  ==========================================================
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bliss.config.models import ModelConfig
from megatron_bliss.models.operations import Values, rotary_table
from megatron_bliss.models.presets import PRESETS, Architecture, resolve_architecture


def gpt_neox_block(ops, x):
    """x + Attention(Norm₁ x) + FeedForward(Norm₂ x): the parallel residual of GPT-NeoX and Pythia."""
    packed = ops.linear(ops.norm(x, "attention_norm"), "query_key_value")
    attention = ops.linear(ops.attention(packed), "attention_output")
    inner = ops.gelu(ops.linear(ops.norm(x, "feed_forward_norm"), "feed_forward_in"))
    return x + attention + ops.linear(inner, "feed_forward_out")


def llama_block(ops, x):
    """y = x + Attention(Norm₁ x), then y + FeedForward(Norm₂ y) with a gated feed-forward part."""
    packed = ops.linear(ops.norm(x, "attention_norm"), "query_key_value")
    x = x + ops.linear(ops.attention(packed), "attention_output")
    inner = ops.swiglu(ops.linear(ops.norm(x, "feed_forward_norm"), "feed_forward_in"))
    return x + ops.linear(inner, "feed_forward_out")


BLOCKS = {"gpt_neox": gpt_neox_block, "llama": llama_block}


class _Affine(nn.Module):
    """A weight and an optional bias; the block functions say what they do."""

    def __init__(self, *shape: int, bias: bool, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.zeros(shape[0], dtype=dtype, device=device))


class Trunk(nn.Module):
    """Embedding, blocks and final norm: what the language model and the score model share."""

    def __init__(
        self,
        arch: Architecture,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.architecture = arch
        options = {"dtype": dtype, "device": device}
        self.embedding = _Affine(arch.vocab_size, arch.hidden_size, bias=False, **options)
        self.blocks = nn.ModuleList(_block_parameters(arch, options) for _ in range(arch.num_layers))
        self.final_norm = _Affine(arch.hidden_size, bias=arch.has_bias, **options)
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Normal weights, those that write to the residual stream smaller by √(2 layers); the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                residual = "attention_output" in name or "feed_forward_out" in name
                scale = (2 * self.architecture.num_layers) ** -0.5 if residual else 1.0
                _draw(parameter, self.architecture.init_method_std * scale, generator)

    def hidden_states(self, tokens: Tensor, *, fused: bool = True) -> Tensor:
        """Hidden states [b, s, w] after the final norm of tokens [b, s]; causal.

        ``fused`` takes the fastest kernels, which can be differentiated once only.
        """
        parameters = dict(self.named_parameters())
        x = F.embedding(tokens, self.embedding.weight)
        rotary = rotary_table(self.architecture, tokens.shape[1], x.dtype, x.device)
        block = BLOCKS[self.architecture.architecture]
        for prefix in block_prefixes(self.architecture):
            x = block(Values(parameters, prefix, rotary, self.architecture, fused=fused), x)
        return Values(parameters, "", rotary, self.architecture, fused=fused).norm(x, "final_norm")


class LanguageModel(Trunk):
    """A causal language model: ``model(tokens[b, s]) -> logits[b, s, v]``, ordinary and twice differentiable."""

    def __init__(self, arch: Architecture, **options):
        super().__init__(arch, **options)
        if arch.untie_embeddings_and_output_weights:
            weight = self.embedding.weight
            self.output = _Affine(*weight.shape, bias=False, dtype=weight.dtype, device=weight.device)
            generator = torch.Generator().manual_seed(options.get("seed", 0) + 1)
            _draw(self.output.weight, arch.init_method_std, generator)

    @property
    def output_weight(self) -> Tensor:
        """The output matrix [v, w]: the embedding's when tied."""
        tied = not self.architecture.untie_embeddings_and_output_weights
        return self.embedding.weight if tied else self.output.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [b, s, v] of tokens [b, s]; those at t predict token t + 1."""
        return F.linear(self.hidden_states(tokens, fused=False), self.output_weight)


@torch.no_grad()
def _draw(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    """Normal numbers from the CPU's generator, so that a seed means the same everywhere; none on the meta device."""
    if not parameter.is_meta:
        parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(std))


def block_prefixes(arch: Architecture) -> list[str]:
    """What the parameter names of each block begin with."""
    return [f"blocks.{index}." for index in range(arch.num_layers)]


def _block_parameters(arch: Architecture, options: dict) -> nn.ModuleDict:
    width, ffn, bias = arch.hidden_size, arch.ffn_hidden_size, arch.has_bias
    ffn_in = ffn if arch.architecture == "gpt_neox" else 2 * ffn
    return nn.ModuleDict(
        {
            "attention_norm": _Affine(width, bias=bias, **options),
            "query_key_value": _Affine(arch.query_key_value_size, width, bias=bias, **options),
            "attention_output": _Affine(width, width, bias=bias, **options),
            "feed_forward_norm": _Affine(width, bias=bias, **options),
            "feed_forward_in": _Affine(ffn_in, width, bias=bias, **options),
            "feed_forward_out": _Affine(width, ffn, bias=bias, **options),
        }
    )


def build_lm(
    preset_or_config: str | ModelConfig | Architecture,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """A newly initialised language model from a preset's name, a configuration or an architecture.

    ``vocab_size`` defaults to the preset's or the architecture's own; a ModelConfig needs it unless it names a preset.
    The same seed gives the same weights on every device. Raises ValueError when the sizes do not fit together.
    """
    if isinstance(preset_or_config, str):
        preset_or_config = ModelConfig(preset=preset_or_config)
    if isinstance(preset_or_config, Architecture):
        arch = preset_or_config if vocab_size is None else replace(preset_or_config, vocab_size=vocab_size)
    else:
        if vocab_size is None and preset_or_config.preset in PRESETS:
            vocab_size = PRESETS[preset_or_config.preset].vocab_size
        if vocab_size is None and preset_or_config.preset is None:
            raise ValueError("found no vocab_size, expected one for a model without a preset: pass vocab_size")
        arch = resolve_architecture(preset_or_config, vocab_size)
    return LanguageModel(arch, seed=seed, dtype=dtype, device=device)
