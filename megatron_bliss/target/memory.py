"""What the target takes on a rank: weights, gradients and optimizer exactly, activations by estimate.

Sizes follow from the layout alone; nothing is built. Elements of activations are those that autograd keeps of this
package's layers, per token: the count of Korthikanti et al. (arXiv 2205.05198, section 4) without dropout masks and,
because attention is fused, without the s x s matrix. As there, tensor parallelism divides what lies inside attention
and MLP, sequence parallelism the rest, and the first rank of a pipeline holds as many micro-batches as it has stages.

Symbols: w width, v vocabulary with padding, t tensor-, P pipeline-parallel size, V chunks per pipeline rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_bliss.config.models import TargetConfig
from megatron_bliss.config.training import PretrainingConfig
from megatron_bliss.models.presets import Architecture
from megatron_bliss.target.layout import padded_vocab_size

FP32_BYTES = 4
MOMENT_BYTES = 2 * FP32_BYTES
PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128
"""Elements to which megatron-core pads a parameter and a bucket for the distributed optimizer."""
LEAST_BUCKET, BUCKET_PER_REPLICA = 40_000_000, 1_000_000
"""Elements of a bucket where gradients are reduced while the backward pass goes on."""


@dataclass(frozen=True)
class Weight:
    """One parameter of a rank: its elements, and whether it is a tied matrix that two pipeline stages hold."""

    size: int
    is_shared: bool = False


@dataclass(frozen=True)
class TargetState:
    """Bytes that a rank holds between two iterations of training."""

    parameters: int
    gradients: int
    optimizer: int


def chunk_weights(config: TargetConfig, arch: Architecture, stage: int, chunk: int = 0) -> list[Weight]:
    """Parameters of model chunk ``chunk`` of pipeline rank ``stage`` on any tensor-parallel rank, in the model's order.

    The layout must be one that ``check_layout`` accepts.
    """
    stages, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    is_first, is_last = (stage, chunk) == (0, 0), (stage, chunk) == (stages - 1, chunks - 1)
    tied = not arch.untie_embeddings_and_output_weights
    vocabulary = padded_vocab_size(arch.vocab_size, config.make_vocab_size_divisible_by)
    matrix = Weight(vocabulary // config.tensor_model_parallel_size * arch.hidden_size, tied and stages > 1)
    layers = arch.num_layers // (stages * chunks)
    weights = [matrix] if is_first else []
    weights += [Weight(size) for size in _layer_sizes(config, arch)] * layers
    weights += [Weight(size) for size in _norm_sizes(arch)] if is_last else []
    return weights + ([matrix] if is_last and not (tied and is_first) else [])


def _norm_sizes(arch: Architecture) -> list[int]:
    return [arch.hidden_size] * (2 if arch.has_bias else 1)


def _layer_sizes(config: TargetConfig, arch: Architecture) -> list[int]:
    """Elements of one layer's parameters: norm, projection, queries-keys-values, norm, the two maps of the MLP."""
    width, split = arch.hidden_size, config.tensor_model_parallel_size
    inner, packed = _inner_size(arch), arch.query_key_value_size
    linear = {
        "projection": (width * width // split, width),
        "query_key_value": (width * packed // split, packed // split),
        "in": (width * inner // split, inner // split),
        "out": (width * arch.ffn_hidden_size // split, width),
    }
    sizes = {name: list(pair) if arch.has_bias else [pair[0]] for name, pair in linear.items()}
    attention = _norm_sizes(arch) + sizes["projection"] + sizes["query_key_value"]
    return attention + _norm_sizes(arch) + sizes["in"] + sizes["out"]


def _inner_size(arch: Architecture) -> int:
    """Rows of the MLP's first map: gate and up projection lie in one."""
    return arch.ffn_hidden_size * (1 if arch.architecture == "gpt_neox" else 2)


def stage_weights(config: TargetConfig, arch: Architecture, stage: int) -> list[list[Weight]]:
    """Parameters of every chunk of a pipeline rank."""
    chunks = range(config.virtual_pipeline_model_parallel_size)
    return [chunk_weights(config, arch, stage, chunk) for chunk in chunks]


def weight_count(config: TargetConfig, arch: Architecture, stage: int) -> int:
    """Elements of all parameters of a pipeline rank."""
    return sum(weight.size for chunk in stage_weights(config, arch, stage) for weight in chunk)


def training_state(
    config: TargetConfig,
    training: PretrainingConfig,
    arch: Architecture,
    *,
    stage: int,
    replicas: int,
    element_size: int,
) -> list[TargetState]:
    """What each data-parallel rank of a pipeline stage holds; ``element_size``: bytes of a weight (2: bf16, 4: fp32).

    Gradients and moments are fp32; so are the weights that the optimizer moves, a copy of its own in bf16.
    """
    chunks = stage_weights(config, arch, stage)
    owned_bytes = MOMENT_BYTES + (FP32_BYTES if element_size < FP32_BYTES else 0)
    if replicas == 1 or not training.use_distributed_optimizer:
        count = sum(weight.size for chunk in chunks for weight in chunk)
        return [TargetState(element_size * count, FP32_BYTES * count, owned_bytes * count)] * replicas
    count, owned = 0, [0] * replicas
    for number, chunk in enumerate(chunks):
        overlaps = training.overlap_grad_reduce and stage == 0 and number == 0
        bucket = max(LEAST_BUCKET, BUCKET_PER_REPLICA * replicas) if overlaps else None
        buffer, shares = flat_buffer(chunk, replicas, bucket)
        count, owned = count + buffer, [sum(pair) for pair in zip(owned, shares, strict=True)]
    return [TargetState(element_size * count, FP32_BYTES * count, owned_bytes * mine) for mine in owned]


def flat_buffer(weights: list[Weight], replicas: int, bucket_size: int | None) -> tuple[int, list[int]]:
    """Elements of the buffer that holds a chunk's weights, and its gradients, under the distributed optimizer, and how
    many weights each data-parallel rank's optimizer owns.

    As megatron-core 0.16 lays it out: last weight first, each padded; a bucket ends where it has ``bucket_size``
    elements, and around a tied matrix; each bucket is dealt to the ranks in equal parts.
    """
    multiple, owned = math.lcm(replicas, BUCKET_ALIGNMENT), [0] * replicas
    start, end, spans = 0, 0, []
    for weight in reversed(weights):
        end = _padded(end, PARAMETER_ALIGNMENT)
        if weight.is_shared and spans:
            _deal(spans, start, end := _padded(end, multiple), owned)
            start, spans = end, []
        spans.append((end, end + weight.size))
        end += weight.size
        if weight.is_shared or (bucket_size is not None and end - start >= bucket_size):
            _deal(spans, start, end := _padded(end, multiple), owned)
            start, spans = end, []
    if spans:
        _deal(spans, start, end := _padded(end, multiple), owned)
    return end, owned


def _deal(spans: list[tuple[int, int]], start: int, stop: int, owned: list[int]) -> None:
    """Add to ``owned`` what each rank's equal part of the bucket [start, stop) holds of the weights at ``spans``."""
    share = (stop - start) // len(owned)
    for first, last in spans:
        for rank in range((first - start) // share, (last - 1 - start) // share + 1):
            low = start + rank * share
            owned[rank] += min(last, low + share) - max(first, low)


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def layer_elements(config: TargetConfig, arch: Architecture, *, recomputes_mlp: bool = False) -> float:
    """Elements per token that a layer keeps for its backward pass, those of the MLP's inside unless recomputed.

    Outside attention and MLP: what the norms read (the same for both of GPT-NeoX's) and write, divided by t under
    sequence parallelism. Inside, divided by t: packed queries, keys and values, rotated queries and keys, attention's
    output, and what the MLP's activation function reads and writes. That is 2 ffn for GELU, and 5 for a gated MLP:
    gate and up projection in one, the gate's activation, the up projection once more (megatron-core adds an offset of
    0 to it), and their product.
    """
    split, width, ffn = config.tensor_model_parallel_size, arch.hidden_size, arch.ffn_hidden_size
    is_neox = arch.architecture == "gpt_neox"
    outside = (1 if is_neox else 2) * width + 2 * width
    rotated = (arch.num_attention_heads + arch.num_query_groups) * arch.kv_channels
    inside = arch.query_key_value_size + rotated + width
    inside += 0 if recomputes_mlp else (2 if is_neox else 5) * ffn
    return outside / _sequence_split(config) + inside / split


def _sequence_split(config: TargetConfig) -> int:
    return config.tensor_model_parallel_size if config.sequence_parallel else 1


def micro_batches_in_flight(config: TargetConfig, stage: int, micro_batches: int) -> int:
    """Chunk passes whose activations pipeline rank ``stage`` holds at once: 1F1B, or interleaved 1F1B."""
    stages, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    after = stages - 1 - stage
    held = 2 * after + (chunks - 1) * stages + 1 if chunks > 1 else after + 1
    return min(held, chunks * micro_batches)


def activation_bytes(
    config: TargetConfig, arch: Architecture, *, stage: int, micro_batches: int, tokens: int, element_size: int
) -> int:
    """Estimated peak of an iteration above :func:`training_state` on a rank of pipeline stage ``stage``.

    tokens: those of one micro-batch. The peak comes where the last stage has its logits and the output matrix's
    gradient, or where a layer's backward pass has its adjoints and a weight's gradient, whichever is larger.
    Recomputing core_attn saves nothing: fused attention keeps nothing else than what its neighbours read.
    """
    layers = arch.num_layers // (config.pipeline_model_parallel_size * config.virtual_pipeline_model_parallel_size)
    layer, entry = layer_elements(config, arch), arch.hidden_size / _sequence_split(config)
    recomputes_mlp = config.recompute_granularity == "selective" and "mlp" in config.recompute_modules
    kept, at_once = layers * layer_elements(config, arch, recomputes_mlp=recomputes_mlp), 1
    if config.recompute_granularity == "full" and config.recompute_method == "uniform":
        at_once = config.recompute_num_layers + 1
        kept = layers // config.recompute_num_layers * entry
    elif config.recompute_granularity == "full":
        at_once = 2
        kept = config.recompute_num_layers * entry + (layers - config.recompute_num_layers) * layer
    elif recomputes_mlp:
        at_once = 2
    held = micro_batches_in_flight(config, stage, micro_batches) * kept * tokens * element_size
    largest = max(_layer_sizes(config, arch)) * element_size
    peak = at_once * layer * tokens * element_size + largest
    if stage == config.pipeline_model_parallel_size - 1:
        held += 2 * entry * tokens * element_size  # what the final norm reads and writes
        peak = max(peak, head_bytes(config, arch, tokens, element_size))
    return int(held + peak)


def head_bytes(
    config: TargetConfig, arch: Architecture, tokens: int, element_size: int, *, backward: bool = True
) -> int:
    """Logits of ``tokens`` tokens on a rank of the last stage, with what is made beside them.

    The loss is fp32 in place of the logits where they are fp32, else a copy beside them; the output matrix's gradient
    comes when the copy is gone.
    """
    columns = padded_vocab_size(arch.vocab_size, config.make_vocab_size_divisible_by)
    columns //= config.tensor_model_parallel_size
    logits, copy = columns * tokens * element_size, columns * tokens * FP32_BYTES if element_size < FP32_BYTES else 0
    gradient = columns * arch.hidden_size * element_size if backward else 0
    return max(logits + copy, logits + gradient)


def forward_bytes(
    config: TargetConfig, arch: Architecture, tokens: int, element_size: int, *, with_logits: bool
) -> int:
    """Estimated peak of a forward pass over ``tokens`` tokens that keeps nothing for a way back."""
    layer = layer_elements(config, arch) * tokens * element_size
    head = head_bytes(config, arch, tokens, element_size, backward=False) if with_logits else 0
    return int(max(layer, head + 2 * arch.hidden_size * tokens * element_size))
