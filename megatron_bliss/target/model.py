"""The LLM that is pre-trained: a megatron-core GPTModel under tensor, pipeline and data parallelism.

Weights have the same shapes at every parallel size (the vocabulary is padded to ``make_vocab_size_divisible_by``, not
to a multiple of the tensor-parallel size) and start from the same numbers: each is drawn whole, from a generator
seeded by the run's seed and the weight's name, and cut. Padding has no part in the softmax, so the model is one over
``vocab_size`` tokens.

Shapes: b samples, s tokens, w width, v vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_bliss.base.parallel import Groups, all_gather
from megatron_bliss.config.models import TargetConfig
from megatron_bliss.models.presets import Architecture
from megatron_bliss.target.layers import (
    LAYER_PARTS,
    VocabularyParallelCrossEntropy,
    branch_mask,
    choose_transformer_impl,
    layer_spec,
)
from megatron_bliss.target.layout import check_layout, padded_vocab_size, rotary_percent, transformer_config

T = TypeVar("T")
Target = list["TargetChunk"]
"""The chunks of the target that this rank holds, in the order of their layers: several in an interleaved pipeline."""


class TargetChunk(GPTModel):
    """This rank's part of the target: GPTModel with a forward pass that ends in hidden states or per-token losses."""

    def __init__(self, *args, architecture: Architecture, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.architecture = architecture
        self.real_vocab_size = architecture.vocab_size

    def forward(
        self,
        tokens: Tensor | None,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        branches: Tensor | None = None,
    ) -> Tensor:
        """tokens [b, s], labels [b, s] -> on the last stage fp32 losses [b, s]; else hidden states [s, b, w].

        Without labels the last stage, too, gives hidden states, after the final norm. Under sequence parallelism the
        hidden states are this rank's part of the sequence. Tokens are read by the first stage, labels by the last.

        ``positions`` and ``branches`` (int64 [b, s], both or none) lay out rows in which several texts share their
        beginning, branch 0: a token sees the tokens before it that are in branch 0 or in its own branch.
        """
        embedded = self.embedding(input_ids=tokens, position_ids=None) if self.pre_process else None
        seq_length = self.rotary_pos_emb.get_rotary_seq_len(None, self.decoder, embedded, self.config)
        rotary, attention_mask = self.rotary_pos_emb(seq_length), None
        if positions is not None:
            rotary, attention_mask = rotary[positions.t(), 0], branch_mask(branches)
        hidden_states = self.decoder(hidden_states=embedded, attention_mask=attention_mask, rotary_pos_emb=rotary)
        if not self.post_process or labels is None:
            return hidden_states
        shared = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden_states, weight=shared)
        losses = VocabularyParallelCrossEntropy.apply(
            logits, labels.t().contiguous(), self.real_vocab_size, self.pg_collection.tp
        )
        return losses.t()


def build_target(
    config: TargetConfig,
    architecture: Architecture,
    groups: Groups,
    *,
    seq_length: int,
    params_dtype: torch.dtype,
    seed: int,
) -> Target:
    """The target with initial weights, on ``groups.device``; ValueError where its sizes don't fit the layout."""
    target = build_chunks(config, architecture, groups, seq_length=seq_length, params_dtype=params_dtype)
    for chunk in target:
        initialize_weights(chunk, architecture, groups, seed)
    return [chunk.to(groups.device) for chunk in target]


def build_chunks(
    config: TargetConfig, architecture: Architecture, groups: Groups, *, seq_length: int, params_dtype: torch.dtype
) -> Target:
    """This rank's chunks with weights that are yet to be drawn, on torch's default device, ``meta`` if you like;
    ValueError where the target's sizes don't fit the layout."""
    check_layout(config, architecture, seq_length)
    model_config = transformer_config(config, architecture, params_dtype)
    chunks = config.virtual_pipeline_model_parallel_size
    return [
        _build_chunk(config, model_config, architecture, groups, seq_length, part, chunks) for part in range(chunks)
    ]


def _build_chunk(
    config: TargetConfig,
    model_config: TransformerConfig,
    architecture: Architecture,
    groups: Groups,
    seq_length: int,
    part: int,
    parts: int,
) -> TargetChunk:
    """Chunk ``part`` of this rank's ``parts``, with weights that are yet to be drawn."""
    is_llama = architecture.architecture == "llama"
    parts_of_layers = LAYER_PARTS[choose_transformer_impl(config.transformer_impl, groups.device)]()
    block = layer_spec(parts_of_layers, parallel_residual=not is_llama, rms_norm=is_llama)
    stage = part if parts > 1 else None
    layers = get_num_layers_to_build(model_config, vp_stage=stage, pp_rank=groups.pipeline_model_parallel_rank)
    return TargetChunk(
        model_config,
        TransformerBlockSubmodules(layer_specs=[block] * layers, layer_norm=block.submodules.input_layernorm),
        padded_vocab_size(architecture.vocab_size, config.make_vocab_size_divisible_by),
        seq_length,
        architecture=architecture,
        pre_process=groups.is_first_pipeline_stage and part == 0,
        post_process=groups.is_last_pipeline_stage and part == parts - 1,
        share_embeddings_and_output_weights=not architecture.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=rotary_percent(architecture),
        rotary_base=architecture.rotary_base,
        pg_collection=groups.collection,
        vp_stage=stage,
    )


@torch.no_grad()
def initialize_weights(chunk: TargetChunk, architecture: Architecture, groups: Groups, seed: int) -> None:
    """Draw every weight whole and keep this rank's part: the numbers don't depend on the parallel layout.

    Matrices are normal with ``init_method_std``, those that end a residual branch with that / sqrt(2 x layers); norms
    start at 1, biases and the vocabulary's padding at 0.
    """
    for name, parameter in chunk.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = architecture.init_method_std
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2 * architecture.num_layers)
        size = groups.tensor_model_parallel_size
        shape = list(parameter.shape)
        shape[parameter.partition_dim] *= size
        whole = torch.empty(shape)
        whole.normal_(0.0, std, generator=named_generator(seed, global_name(chunk, name)))
        if shape[0] == chunk.vocab_size and name.endswith(("word_embeddings.weight", "output_layer.weight")):
            whole[chunk.real_vocab_size :] = 0.0
        pieces = whole.chunk(size * parameter.partition_stride, dim=parameter.partition_dim)
        mine = pieces[groups.tensor_model_parallel_rank :: size]
        parameter.copy_(torch.cat(mine, dim=parameter.partition_dim))


def global_name(chunk: TargetChunk, name: str) -> str:
    """A parameter's name with its layer counted from the start of the model; tied matrices have one name."""
    if chunk.share_embeddings_and_output_weights and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that belongs to this seed and name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@torch.no_grad()
def forward_only(
    target: Target,
    micro_batches: Sequence[tuple[Tensor | None, ...]],
    collect: Callable[[Tensor, int], T],
    groups: Groups,
) -> list[T]:
    """Run micro-batches, the arguments of :meth:`TargetChunk.forward`; collective over a model-parallel group.

    All micro-batches must have one shape where there are several pipeline stages, and s must be a multiple of the
    tensor-parallel size under sequence parallelism. ``collect(output, i)`` is called on the last stage with the chunk's
    output for micro-batch i; returned is the list of its answers, empty on the other stages.
    """
    if not micro_batches:
        return []
    config, chunks, count = target[0].config, len(target), len(micro_batches)
    if chunks > 1:  # megatron-core interleaves whole rounds of the pipeline only
        micro_batches = [*micro_batches, *micro_batches[-1:] * (-count % groups.pipeline_model_parallel_size)]

    def step(numbered: Iterator[int], chunk: TargetChunk):
        index = next(numbered)
        inputs = (None if tensor is None else tensor.to(groups.device) for tensor in micro_batches[index])
        return chunk(*inputs), lambda output, non_loss_data: collect(output, index) if index < count else None

    numbers = [iter(range(len(micro_batches))) for _ in target]  # every chunk sees every micro-batch
    batch, seq_length = micro_batches[0][0].shape
    pipelined = groups.pipeline_model_parallel_size > 1
    parts = get_forward_backward_func(groups.pipeline_model_parallel_size, chunks if chunks > 1 else None)(
        forward_step_func=step,
        data_iterator=numbers if chunks > 1 else numbers[0],
        model=target,
        num_microbatches=len(micro_batches),
        seq_length=seq_length,
        micro_batch_size=batch,
        forward_only=True,
        collect_non_loss_data=True,
        p2p_communicator=P2PCommunicator(groups.pipeline_model_parallel_group, config) if pipelined else None,
        pg_collection=groups.collection,
    )
    return parts[:count]


def last_stage_hidden_states(target: Target, tokens: Tensor, groups: Groups, micro_batch_size: int) -> Tensor | None:
    """tokens [b, s] -> hidden states [b, s, w] after the final norm on the ranks of the last stage, None elsewhere.

    Collective over a model-parallel group, whose ranks all bring the same tokens.
    """
    sequence_parallel = target[0].config.sequence_parallel
    multiple = groups.tensor_model_parallel_size if sequence_parallel else 1
    rows, seq_length = tokens.shape
    if not rows:  # no rank of this replica has a sample: there is nothing to send through the stages
        shape = (0, seq_length, target[0].config.hidden_size)
        dtype = target[0].config.params_dtype
        return torch.empty(shape, dtype=dtype, device=groups.device) if groups.is_last_pipeline_stage else None
    micro_batch_size = min(micro_batch_size, rows)
    # Every micro-batch of a pipeline has one shape; padding on the right changes nothing before it.
    padded = F.pad(tokens, (0, -seq_length % multiple, 0, -rows % micro_batch_size))

    def collect(hidden_states: Tensor, _: int) -> Tensor:
        if sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, group=groups.tensor_model_parallel_group
            )
        return hidden_states.transpose(0, 1)

    parts = forward_only(target, [(part, None) for part in padded.split(micro_batch_size)], collect, groups)
    if not groups.is_last_pipeline_stage:
        return None
    return torch.cat(parts)[:rows, :seq_length]


@torch.no_grad()
def output_weight(target: Target, groups: Groups, vocab_size: int) -> Tensor:
    """The output matrix [v, w] without its padding, gathered on every rank of the model-parallel group."""
    chunk = target[-1]
    config, tied = chunk.config, chunk.share_embeddings_and_output_weights
    if groups.is_last_pipeline_stage:
        mine = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
        whole = all_gather(mine.detach(), groups.tensor_model_parallel_group).flatten(0, 1)
    else:
        whole = torch.empty(chunk.vocab_size, config.hidden_size, dtype=config.params_dtype, device=groups.device)
    return _broadcast_from_last_stage(whole, groups)[:vocab_size]


def _broadcast_from_last_stage(tensor: Tensor, groups: Groups) -> Tensor:
    if groups.pipeline_model_parallel_size > 1:
        dist.broadcast(tensor, src=groups.pipeline_ranks[-1], group=groups.pipeline_model_parallel_group)
    return tensor
