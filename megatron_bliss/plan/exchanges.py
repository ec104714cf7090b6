"""How much of a message a rank of a group sends, and what the target's layers exchange in a tensor-parallel group.

Sizes are what a rank sends with ring algorithms, n the message's bytes and g the ranks of the group: (g - 1)/g n for an
all-gather (n: what is gathered) or a reduce-scatter (n: what is scattered), twice that for an all-reduce, which is one
of each. So exchanges are counted in *rings*, of (g - 1)/g n each. It receives as much.

Symbols: t tensor-parallel size, P pipeline-parallel size, V chunks per pipeline rank.
"""

from __future__ import annotations

from megatron_bliss.config.models import TargetConfig
from megatron_bliss.models.presets import Architecture

ALL_REDUCE = 2
"""Rings of an all-reduce."""


def ring_bytes(size: float, ranks: int, rings: int = 1) -> int:
    """Bytes that each of ``ranks`` sends in so many rings over messages of ``size`` bytes; 0 for a rank alone."""
    return round(rings * size * (ranks - 1) / ranks)


def layer_rings(config: TargetConfig, arch: Architecture) -> tuple[int, int]:
    """Rings of a layer over messages of [tokens, width] in its forward and in its backward pass, without recomputation.

    Each branch, attention and MLP, gathers its input and adds up its output over the tensor-parallel ranks; GPT-NeoX
    adds up both branches at once. Without sequence parallelism the input is there, so that a branch has one all-reduce
    forward (both of GPT-NeoX: one) and one backward, of its input's adjoint. With it, forward: an all-gather for each
    input and a reduce-scatter for each sum; backward: an all-gather for each sum, a reduce-scatter for each input, and
    an all-gather of each input once more, for the weights' gradient.
    """
    inputs, sums = 2, 1 if arch.architecture == "gpt_neox" else 2
    if config.sequence_parallel:
        return inputs + sums, sums + 2 * inputs
    return ALL_REDUCE * sums, ALL_REDUCE * inputs


def recomputed_rings(config: TargetConfig, arch: Architecture) -> int:
    """Rings of a forward pass that is made again for a layer, of those that are recomputed.

    full: the whole layer's. selective with mlp: of the MLP, whose sum GPT-NeoX makes outside of it. core_attn: none.
    """
    if config.recompute_granularity == "full":
        return layer_rings(config, arch)[0]
    if config.recompute_granularity != "selective" or "mlp" not in config.recompute_modules:
        return 0
    sums = 0 if arch.architecture == "gpt_neox" else 1
    return 1 + sums if config.sequence_parallel else ALL_REDUCE * sums


def recomputed_layers(config: TargetConfig, layers: int) -> int:
    """Of a rank's ``layers`` those that are recomputed, where any are: all of them but under the method ``block``."""
    chunks = config.virtual_pipeline_model_parallel_size
    if config.recompute_granularity == "full" and config.recompute_method == "block":
        return config.recompute_num_layers * chunks
    return layers


def training_rings(config: TargetConfig, arch: Architecture, stage: int) -> int:
    """Rings of a rank of pipeline stage ``stage`` over messages of [tokens, width] for one micro-batch, in training.

    Beside its layers' the first stage adds up the parts of the embedding (an all-reduce; with sequence parallelism a
    reduce-scatter, and an all-gather on the way back). The last one adds up the adjoint behind the output matrix; with
    sequence parallelism it gathers its input twice and scatters that adjoint.
    """
    stages = config.pipeline_model_parallel_size
    layers = arch.num_layers // stages
    rings = layers * sum(layer_rings(config, arch))
    rings += recomputed_layers(config, layers) * recomputed_rings(config, arch)
    rings += ALL_REDUCE * (stage == 0)
    return rings + (3 if config.sequence_parallel else ALL_REDUCE) * (stage == stages - 1)


def forward_rings(config: TargetConfig, arch: Architecture, stage: int) -> int:
    """The same of a forward pass that ends in hidden states [tokens, width], gathered on the last stage.

    A first stage without sequence parallelism makes an all-reduce of its embeddings, else a reduce-scatter.
    """
    stages, split = config.pipeline_model_parallel_size, config.sequence_parallel
    rings = arch.num_layers // stages * layer_rings(config, arch)[0]
    return rings + (1 if split else ALL_REDUCE) * (stage == 0) + (1 if split else 0) * (stage == stages - 1)


def replicated_elements(arch: Architecture, stage: int, stages: int) -> int:
    """Weights of a pipeline rank that every tensor-parallel rank holds whole: norms, and biases behind a sum.

    Under sequence parallelism each rank has its tokens' part of their gradient.
    """
    norm = (2 if arch.has_bias else 1) * arch.hidden_size
    behind_sums = 2 * arch.hidden_size if arch.has_bias else 0
    return arch.num_layers // stages * (2 * norm + behind_sums) + norm * (stage == stages - 1)


def pipeline_sends(config: TargetConfig, stage: int) -> tuple[int, int]:
    """Messages of [tokens, width] that a rank sends for one micro-batch: forward, backward.

    One for each of its chunks, but none for the model's last chunk forward and for its first backward.
    """
    stages, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    if stages == 1:
        return 0, 0
    return chunks - (stage == stages - 1), chunks - (stage == 0)
