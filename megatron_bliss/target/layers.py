"""What the target's layers are made of, where megatron-core's own parts would be slower or are missing.

Shapes: s tokens (divided by the tensor-parallel size under sequence parallelism), b samples, w width, n heads and g
key-value groups of this rank, d channels per head, v vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    checkpoint,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityFuncOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_bliss.base.parallel import all_gather


def _mark_sequence_parallel(norm: torch.nn.Module, config: TransformerConfig) -> None:
    """A norm sees its rank's part of the sequence: megatron-core sums the gradients of parameters marked so."""
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm in megatron-core's shape; unlike its own wrapper it allows sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        _mark_sequence_parallel(self, config)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in megatron-core's shape; unlike its own wrapper it allows sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        _mark_sequence_parallel(self, config)


class FusedCausalAttention(torch.nn.Module):
    """Causal attention by ``scaled_dot_product_attention``: no s x s matrix, flash kernels on CPU and CUDA."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.enable_gqa = config.num_query_groups != config.num_attention_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: object) -> Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n * d].

        A mask [b, 1, s, s], true where a query sees a key, stands in for the causal one.
        """
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self.softmax_scale,
            enable_gqa=self.enable_gqa,
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def branch_mask(branches: Tensor) -> Tensor:
    """int64 [b, s] -> bool [b, 1, s, s]: a token sees itself and what is before it in branch 0 or its own branch."""
    causal = torch.ones(branches.shape[1], branches.shape[1], dtype=torch.bool, device=branches.device).tril()
    keys, queries = branches.unsqueeze(1), branches.unsqueeze(2)
    return (((keys == 0) | (keys == queries)) & causal).unsqueeze(1)


class UnreducedRowParallelLinear(RowParallelLinear):
    """A row-parallel linear that leaves the sum over tensor-parallel ranks, and the bias, to its caller."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        partial = self._forward_impl(
            input=input_,
            weight=self.weight,
            bias=None,
            gradient_accumulation_fusion=self.gradient_accumulation_fusion,
            allreduce_dgrad=False,
            sequence_parallel=False,
            grad_output_buffer=None,
            tp_group=self.tp_group,
        )
        return partial, self.bias


class ParallelResidualLayer(TransformerLayer):
    """GPT-NeoX: x + attention(norm1(x)) + mlp(norm2(x)), with one sum over tensor-parallel ranks for both branches."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """[s, b, w] -> [s, b, w]; the second value is megatron-core's cross-attention context, unused here."""
        attention, attention_bias = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb
        )
        mlp, mlp_bias = self._mlp(self.pre_mlp_layernorm(hidden_states))
        reduce = (
            reduce_scatter_to_sequence_parallel_region
            if self.config.sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        branches = reduce(attention + mlp, group=self.tp_group)
        return hidden_states + (branches + (attention_bias + mlp_bias)), None

    def _mlp(self, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.recompute_mlp:
            return self.mlp(normed)
        # A bias that left the checkpointed function would be taken for one of its results, with a history.
        return checkpoint(lambda x: self.mlp(x)[0], False, normed), self.mlp.linear_fc2.bias


def residual_add(training: bool, fused: bool):
    """megatron-core's bias-dropout-add for layers without bias and dropout, in autograd's current mode."""

    def add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_with_bias
        assert dropout == 0.0
        return residual + (output if bias is None else output + bias)

    return add


@dataclass(frozen=True)
class LayerParts:
    """The parts of a layer for which there is a choice; they hold weights of the same names and shapes."""

    layer_norm: type
    rms_norm: type
    core_attention: type


def local_parts() -> LayerParts:
    """torch's own norms and attention kernels, on any device."""
    return LayerParts(LayerNorm, RMSNorm, FusedCausalAttention)


def transformer_engine_parts() -> LayerParts:
    """Transformer Engine's norms and attention; ImportError where it is not installed. Written against
    megatron-core's wrappers and not run yet: no machine with it was at hand.

    The linear maps stay megatron-core's: Transformer Engine's are as fast in bf16, but fold the norm's weights into
    the map after it, so that a checkpoint would depend on what is installed, and always sum a branch over
    tensor-parallel ranks, where GPT-NeoX's two branches need one sum.
    """
    from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm

    return LayerParts(TENorm, TENorm, TEDotProductAttention)


LAYER_PARTS: dict[str, Callable[[], LayerParts]] = {
    "local": local_parts,
    "transformer_engine": transformer_engine_parts,
}


def choose_transformer_impl(option: str, device: torch.device) -> str:
    """The key of :data:`LAYER_PARTS` for ``target.transformer_impl``; ValueError where it can't be had."""
    usable = device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    if option == "auto":
        return "transformer_engine" if usable else "local"
    if option == "transformer_engine" and not usable:
        raise ValueError(
            f"found target.transformer_impl=transformer_engine on {device.type}, expected a CUDA device and the "
            "package transformer-engine: install it, or set target.transformer_impl=local"
        )
    return option


def layer_spec(parts: LayerParts, *, parallel_residual: bool, rms_norm: bool) -> ModuleSpec:
    """One block for megatron-core's TransformerBlock."""
    norm = parts.rms_norm if rms_norm else parts.layer_norm
    row_parallel = UnreducedRowParallelLinear if parallel_residual else RowParallelLinear
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=parts.core_attention, linear_proj=row_parallel
        ),
    )
    mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=row_parallel))
    add = IdentityFuncOp if parallel_residual else residual_add
    return ModuleSpec(
        module=ParallelResidualLayer if parallel_residual else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=add,
        ),
    )


class VocabularyParallelCrossEntropy(torch.autograd.Function):
    """-log p(label) per token from logits split over the vocabulary, without its padding from ``vocab_size`` on.

    One exchange of two numbers a token, where megatron-core makes three exchanges. First order only, and the logits are
    overwritten (fp32) as megatron-core does, because they are the largest tensor of a step: use them for nothing else.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
        """logits [..., v / t] of this rank, labels int64 [...] -> fp32 [...]."""
        first = group.rank() * logits.shape[-1]
        known = min(max(vocab_size - first, 0), logits.shape[-1])
        local = labels - first
        here = (local >= 0) & (local < known)
        local = torch.where(here, local, 0).unsqueeze(-1)
        values = logits.data.float()  # .data: what follows is not autograd's business
        predicted = torch.where(here, values.gather(-1, local).squeeze(-1), 0.0)
        if known:
            values[..., known:] = -torch.inf
            normalizer = softmax_(values)
        else:  # every id of this rank is padding
            values.zero_()
            normalizer = torch.full(labels.shape, -torch.inf, device=logits.device)
        whole, predicted = _combine(normalizer, predicted, group)
        ctx.save_for_backward(values, (normalizer - whole).exp(), local, here)
        ctx.dtype = logits.dtype
        return whole - predicted

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        """d loss / d logit = softmax - one-hot(label), in place of this rank's softmax; 0 where there is padding."""
        probabilities, share, local, here = ctx.saved_tensors
        gradient = probabilities.mul_((share * grad_output).unsqueeze(-1))
        gradient.scatter_add_(-1, local, torch.where(here, -grad_output, 0.0).unsqueeze(-1))
        return gradient.to(ctx.dtype), None, None, None


def softmax_(values: Tensor) -> Tensor:
    """softmax of fp32 values [..., v] in place; returns log Σ exp(values) [...].

    The largest probability is exp(largest value) / Σ, so that no pass is needed for the sum.
    """
    largest = values.amax(-1)
    torch.softmax(values, -1, out=values)
    return largest - values.amax(-1).log()


def _combine(normalizer: Tensor, predicted: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """log Σ exp over the whole vocabulary and the label's logit, from each rank's part; the same bits on every rank."""
    if group.size() == 1:
        return normalizer, predicted
    parts = all_gather(torch.stack((normalizer, predicted)), group)
    return parts[:, 0].logsumexp(0), parts[:, 1].sum(0)
