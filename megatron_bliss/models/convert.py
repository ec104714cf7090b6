"""The same weights under three sets of names: Hugging Face's, the target's (megatron-core), the proxy's.

A layout says how one architecture is stored: stored name -> the parts it is packed from. The parts are the same in all
layouts (a query matrix, a norm's bias), so any layout is made from any other, one tensor at a time, without arithmetic:
a way there and back gives the same bits.

Rows of the fused query-key-value matrix, for G groups of r query heads and one key and value head each:

==============  =====================================================================================================
by group        for each group r queries, key, value: the target; Hugging Face's GPT-NeoX (r = 1: head by head)
by kind         all queries, all keys, all values: the proxy
apart           three matrices: Hugging Face's LLaMA
==============  =====================================================================================================

All four models turn channel i of a head together with channel i + half ("rotate half"), so no rows are permuted.
Vocabulary matrices have exactly ``vocab_size`` rows here: padding belongs to the target alone (target/weights.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from megatron_bliss.models.presets import Architecture

Read = Callable[[str], Tensor]
"""Stored name -> tensor."""


def _only(parts: list[Tensor]) -> Tensor:
    return parts[0]


def _as_list(packed: Tensor) -> list[Tensor]:
    return [packed]


@dataclass(frozen=True)
class Packed:
    """One stored tensor: the parts it holds, how they are joined, and how they are taken apart again."""

    parts: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor] = _only
    split: Callable[[Tensor], list[Tensor]] = _as_list


Layout = dict[str, Packed]
"""Stored name -> what it holds, in the order of the model."""


def join_by_group(parts: list[Tensor], num_groups: int) -> Tensor:
    """Queries [G r d, ...], keys and values [G d, ...] -> [G (r + 2) d, ...], group by group."""
    return torch.cat([part.unflatten(0, (num_groups, -1)) for part in parts], 1).flatten(0, 1)


def split_by_group(packed: Tensor, num_groups: int, channels: int) -> list[Tensor]:
    """The inverse of :func:`join_by_group`, for heads of d = ``channels``."""
    grouped = packed.unflatten(0, (num_groups, -1))
    sizes = (grouped.shape[1] - 2 * channels, channels, channels)
    return [part.flatten(0, 1) for part in grouped.split(sizes, 1)]


def _by_group(arch: Architecture, parts: tuple[str, ...]) -> Packed:
    groups = arch.num_query_groups
    join, split = partial(join_by_group, num_groups=groups), partial(split_by_group, num_groups=groups)
    return Packed(parts, join, partial(split, channels=arch.kv_channels))


def _in_a_row(parts: tuple[str, ...], *sizes: int) -> Packed:
    return Packed(parts, torch.cat, lambda packed: list(packed.split(sizes)))


BLOCK_NAMES = {
    "target": {
        "attention_norm": "input_layernorm",
        "query_key_value": "self_attention.linear_qkv",
        "attention_output": "self_attention.linear_proj",
        "feed_forward_norm": "pre_mlp_layernorm",
        "feed_forward_in": "mlp.linear_fc1",
        "feed_forward_out": "mlp.linear_fc2",
    },
    "gpt_neox": {
        "attention_norm": "input_layernorm",
        "query_key_value": "attention.query_key_value",
        "attention_output": "attention.dense",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward_in": "mlp.dense_h_to_4h",
        "feed_forward_out": "mlp.dense_4h_to_h",
    },
    "llama": {
        "attention_norm": "input_layernorm",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "attention_output": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "feed_forward_out": "mlp.down_proj",
    },
}
BLOCK_NAMES["proxy"] = {name: name for name in BLOCK_NAMES["target"]}
OUTER_NAMES = {
    "target": ("embedding.word_embeddings", "decoder.layers", "decoder.final_layernorm", "output_layer"),
    "proxy": ("embedding", "blocks", "final_norm", "output"),
    "gpt_neox": ("gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm", "embed_out"),
    "llama": ("model.embed_tokens", "model.layers", "model.norm", "lm_head"),
}
"""Embedding, blocks, final norm, output matrix."""


def target_layout(arch: Architecture) -> Layout:
    """Global names of the target's weights (``models.target.global_name``)."""
    return _layout(arch, "target")


def proxy_layout(arch: Architecture) -> Layout:
    """Names of ``models.transformer.LanguageModel``; without the output matrix those of a score model's trunk."""
    return _layout(arch, "proxy")


def huggingface_layout(arch: Architecture) -> Layout:
    """Names of transformers' GPTNeoXForCausalLM or LlamaForCausalLM."""
    return _layout(arch, arch.architecture)


def without_output(layout: Layout) -> Layout:
    """A layout without the output matrix: a trunk."""
    return {name: packed for name, packed in layout.items() if packed.parts != ("output.weight",)}


def _layout(arch: Architecture, style: str) -> Layout:
    embedding, blocks, final_norm, output = OUTER_NAMES[style]
    kinds = ("weight", "bias") if arch.has_bias else ("weight",)
    layout = {f"{embedding}.weight": Packed(("embedding.weight",))}
    for index in range(arch.num_layers):
        for name, stored in BLOCK_NAMES[style].items():
            for kind in kinds:
                packed = _block_part(arch, style, name, f"blocks.{index}.{{}}.{kind}")
                layout[f"{blocks}.{index}.{stored}.{kind}"] = packed
    layout |= {f"{final_norm}.{kind}": Packed((f"final_norm.{kind}",)) for kind in kinds}
    if arch.untie_embeddings_and_output_weights:
        layout[f"{output}.weight"] = Packed(("output.weight",))
    return layout


def _block_part(arch: Architecture, style: str, name: str, pattern: str) -> Packed:
    if name == "query_key_value":
        parts = tuple(pattern.format(part) for part in ("query", "key", "value"))
        key_rows = arch.num_query_groups * arch.kv_channels
        by_kind = style == "proxy"
        return _in_a_row(parts, arch.hidden_size, key_rows, key_rows) if by_kind else _by_group(arch, parts)
    if name == "feed_forward_in" and arch.architecture == "llama":
        return _in_a_row((pattern.format("gate"), pattern.format("up")), arch.ffn_hidden_size, arch.ffn_hidden_size)
    return Packed((pattern.format(name),))


def reader(read: Read, source: Layout, destination: Layout) -> Read:
    """``read`` of tensors stored by ``source`` -> the same weights, stored by ``destination``; made when asked for."""
    where = {part: (name, i) for name, packed in source.items() for i, part in enumerate(packed.parts)}

    @lru_cache(maxsize=1)  # the parts of one tensor are asked for in a row
    def parts_of(name: str) -> list[Tensor]:
        return source[name].split(read(name))

    def part(name: str) -> Tensor:
        stored, index = where[name]
        return parts_of(stored)[index]

    def tensor(name: str) -> Tensor:
        return destination[name].join([part(name) for name in destination[name].parts]).contiguous()

    return tensor


def converted(read: Read, source: Layout, destination: Layout) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of ``destination``, in order, one at a time."""
    tensor = reader(read, source, destination)
    return ((name, tensor(name)) for name in destination)


def shapes(arch: Architecture, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a layout."""
    on_meta = reader(lambda part: torch.empty(_part_shape(arch, part), device="meta"), _plain(layout), layout)
    return {name: tuple(on_meta(name).shape) for name in layout}


def _plain(layout: Layout) -> Layout:
    """The layout in which every part is a tensor of its own."""
    return {part: Packed((part,)) for packed in layout.values() for part in packed.parts}


def _part_shape(arch: Architecture, part: str) -> tuple[int, ...]:
    width, ffn, key_rows = arch.hidden_size, arch.ffn_hidden_size, arch.num_query_groups * arch.kv_channels
    name, kind = part.split(".")[-2:]
    rows_and_columns = {
        "embedding": (arch.vocab_size, width),
        "output": (arch.vocab_size, width),
        "query": (width, width),
        "key": (key_rows, width),
        "value": (key_rows, width),
        "attention_output": (width, width),
        "feed_forward_in": (ffn, width),
        "gate": (ffn, width),
        "up": (ffn, width),
        "feed_forward_out": (width, ffn),
    }
    if name not in rows_and_columns:  # a norm
        return (width,)
    return rows_and_columns[name][:1] if kind == "bias" else rows_and_columns[name]
