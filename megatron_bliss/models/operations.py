"""The operations of a transformer block on plain values.

A block function (transformer.py) names the operations it needs and never says on what: :class:`Values` computes plain
tensors, ``bilevel.dual.Duals`` computes (value, tangent) pairs with the same method names.

Shapes: b batch, s sequence, w hidden size, H query heads, G query groups (key-value heads), d channels of a head,
r = H / G query heads per group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bliss.models.presets import Architecture


class Rotary(NamedTuple):
    """Cosines and sines [s, rotary_channels / 2] of the rotary position embedding."""

    cos: Tensor
    sin: Tensor


def rotary_table(arch: Architecture, length: int, dtype: torch.dtype, device: torch.device) -> Rotary:
    """Angles position / base^(2 i / rotary_channels), in fp32 as Hugging Face and megatron-core have them."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    channels = max(arch.rotary_channels, 2)
    exponents = torch.arange(0, arch.rotary_channels, 2, dtype=precise, device=device) / channels
    positions = torch.arange(length, dtype=precise, device=device)
    angles = torch.outer(positions, 1.0 / arch.rotary_base**exponents)
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading channels of x [..., s, d] in pairs (i, i + half); the adjoint is ``rotate(x, cos, -sin)``."""
    half = cos.shape[-1]
    if half == 0:
        return x
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*rotated, x[..., 2 * half :]] if 2 * half < x.shape[-1] else rotated, -1)


def split_heads(packed: Tensor, arch: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """[..., s, (H + 2G) d], packed [queries | keys | values], to [..., G, r, s, d], [..., G, s, d], [..., G, s, d]."""
    channels, groups = arch.kv_channels, arch.num_query_groups
    query, key, value = packed.split([arch.hidden_size, groups * channels, groups * channels], -1)
    query = query.unflatten(-1, (groups, arch.num_attention_heads // groups, channels)).movedim(-4, -2)
    key = key.unflatten(-1, (groups, channels)).transpose(-3, -2)
    return query, key, value.unflatten(-1, (groups, channels)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """[..., G, r, s, d] to [..., s, G r d]; the inverse of what ``split_heads`` does to queries."""
    return x.movedim(-2, -4).flatten(-3)


class Values:
    """Block operations on plain tensors [b, s, w].

    ``fused`` takes torch's fastest kernels, which can be differentiated once; otherwise every operation is made of
    elementary ones that can be differentiated twice (fused attention has no second derivative, and says so only
    sometimes).
    """

    def __init__(
        self, parameters: dict[str, Tensor], prefix: str, rotary: Rotary, arch: Architecture, *, fused: bool = True
    ):
        self.parameters, self.prefix, self.rotary, self.arch, self.fused = parameters, prefix, rotary, arch, fused

    def linear(self, x: Tensor, name: str) -> Tensor:
        """x Wᵀ + bias."""
        key = self.prefix + name
        return F.linear(x, self.parameters[key + ".weight"], self.parameters.get(key + ".bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        """LayerNorm (GPT-NeoX) or RMSNorm (LLaMA) over the last dimension."""
        key = self.prefix + name
        weight = self.parameters[key + ".weight"]
        if self.arch.architecture == "gpt_neox":
            return F.layer_norm(x, x.shape[-1:], weight, self.parameters[key + ".bias"], self.arch.norm_epsilon)
        if self.fused:
            return F.rms_norm(x, x.shape[-1:], weight, self.arch.norm_epsilon)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.arch.norm_epsilon) * weight

    def gelu(self, x: Tensor) -> Tensor:
        """x Φ(x), with the exact normal distribution function."""
        return F.gelu(x)

    def swiglu(self, x: Tensor) -> Tensor:
        """silu(gate) * up, of x packed [gate | up]."""
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def attention(self, packed: Tensor) -> Tensor:
        """Causal softmax attention of packed [queries | keys | values] with rotary positions: [b, s, w]."""
        query, key, value = split_heads(packed, self.arch)
        query, key = rotate(query, *self.rotary), rotate(key, *self.rotary)
        attend = _fused_attention if self.fused else _math_attention
        return merge_heads(attend(query, key, value))


def _fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, groups, per_group, length, channels = query.shape
    if per_group > 1:
        key, value = (t.unsqueeze(2).expand_as(query).flatten(1, 2) for t in (key, value))
    out = F.scaled_dot_product_attention(query.flatten(1, 2), key, value, is_causal=True)
    return out.view(batch, groups, per_group, length, channels)


def _math_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    length, channels = query.shape[-2:]
    scores = query @ key.unsqueeze(2).transpose(-2, -1) * channels**-0.5
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ value.unsqueeze(2)
