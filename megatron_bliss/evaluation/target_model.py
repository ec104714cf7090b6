"""The target in its own layout, tensor x pipeline x data parallel, as a model for lm-eval: no weights are converted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_bliss.base.parallel import Groups, all_gather_object
from megatron_bliss.data.tokenizers import Tokenizer
from megatron_bliss.evaluation.adapter import Adapter
from megatron_bliss.evaluation.backbone import Backbone, Replicas, weights_digest
from megatron_bliss.evaluation.packing import Batch
from megatron_bliss.evaluation.vocabulary import VocabularyPart
from megatron_bliss.target.layers import FusedCausalAttention
from megatron_bliss.target.model import Target, forward_only


class TargetBackbone(Backbone):
    """A model-parallel group is a replica; its ranks make the same calls."""

    def __init__(self, target: Target, groups: Groups) -> None:
        self.target, self.groups = target, groups
        self.device, self.replicas = groups.device, Replicas.of_target(groups)
        # Other kernels than ours take no notice of a mask beside the causal one.
        layers = [layer for chunk in target for layer in chunk.decoder.layers]
        self.shares_beginnings = all(
            isinstance(layer.self_attention.core_attention, FusedCausalAttention) for layer in layers
        )
        stages = groups.pipeline_model_parallel_size
        self.batches_in_flight = 1 if stages == 1 else 2 * stages
        self.width_multiple = groups.tensor_model_parallel_size if target[0].config.sequence_parallel else 1

    def hidden_states(self, batches: Sequence[Batch]) -> list[Tensor]:
        def collect(output: Tensor, index: int) -> Tensor:
            if self.target[0].config.sequence_parallel:
                output = gather_from_sequence_parallel_region(output, group=self.groups.tensor_model_parallel_group)
            batch = batches[index]
            return output[batch.columns.to(self.device), batch.rows.to(self.device)]

        inputs = [(batch.tokens, None, batch.positions, batch.branches) for batch in batches]
        return forward_only(self.target, inputs, collect, self.groups)

    def vocabulary(self) -> VocabularyPart:
        chunk = self.target[-1]
        tied = chunk.share_embeddings_and_output_weights
        weight = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
        first = self.groups.tensor_model_parallel_rank * len(weight)
        known = min(max(chunk.real_vocab_size - first, 0), len(weight))
        return VocabularyPart(weight.detach()[:known], first, self.groups.tensor_model_parallel_group)

    def digest(self) -> str:
        named = [item for chunk in self.target for item in chunk.named_parameters()]
        parts = all_gather_object(weights_digest(named), self.groups)
        return hashlib.sha256(" ".join([str(self.groups.sizes), *parts]).encode()).hexdigest()


class TargetModel(Adapter):
    """The target for :func:`megatron_bliss.evaluation.evaluate_tasks`; every rank makes one and makes the same calls.

    ``max_length``: tokens that the model may see at once. ``batch_tokens``: tokens of one forward pass of one replica,
    padding included. ``add_bos`` puts the prefix token before every text, for targets that were trained so.
    """

    def __init__(
        self,
        target: Target,
        groups: Groups,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_tokens: int,
        add_bos: bool = False,
        prefix_token: int | None = None,
    ) -> None:
        super().__init__(
            TargetBackbone(target, groups),
            tokenizer,
            vocab_size=target[-1].real_vocab_size,
            max_length=max_length,
            batch_tokens=batch_tokens,
            add_bos=add_bos,
            prefix_token=prefix_token,
        )
