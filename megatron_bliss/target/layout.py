"""How the target is laid out over ranks and what of it is recomputed, as megatron-core wants to be told."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bliss.config.models import TargetConfig
from megatron_bliss.models.presets import Architecture

RECOMPUTED_MODULES = ("core_attn", "mlp")
"""What selective recomputation can recompute."""


def rotary_percent(architecture: Architecture) -> float:
    """The share of a head that megatron-core rounds down to the architecture's whole number of rotated channels."""
    return min(1.0, (architecture.rotary_channels + 0.5) / architecture.kv_channels)


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """Rows of the embedding and output matrices: the vocabulary, rounded up."""
    return -(-vocab_size // divisible_by) * divisible_by


def check_layout(config: TargetConfig, architecture: Architecture, seq_length: int) -> None:
    """ValueError where the tensor- or pipeline-parallel size does not divide what it has to divide."""
    tensor = config.tensor_model_parallel_size
    divided = {
        "target.make_vocab_size_divisible_by": config.make_vocab_size_divisible_by,
        "target.num_attention_heads": architecture.num_attention_heads,
        "target.num_query_groups": architecture.num_query_groups,
        "target.ffn_hidden_size": architecture.ffn_hidden_size,
    }
    if config.sequence_parallel:
        divided["data.seq_length (with target.sequence_parallel)"] = seq_length
    for option, value in divided.items():
        if value % tensor:
            raise ValueError(
                f"found {option}={value}, expected a multiple of target.tensor_model_parallel_size={tensor}: change "
                "one of the two"
            )
    _check_pipeline(config, architecture.num_layers)


def _check_pipeline(config: TargetConfig, num_layers: int) -> None:
    """ValueError where layers can't be dealt to chunks, or recomputed, as the options say."""
    pipeline, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    if chunks < 1 or (chunks > 1 and pipeline == 1):
        raise ValueError(
            f"found target.virtual_pipeline_model_parallel_size={chunks} with target.pipeline_model_parallel_size="
            f"{pipeline}, expected 1, or more with a pipeline of at least 2 ranks: change one of the two"
        )
    if num_layers % (pipeline * chunks):
        parts = f"target.pipeline_model_parallel_size={pipeline}"
        if chunks > 1:
            parts += f" x target.virtual_pipeline_model_parallel_size={chunks}"
        raise ValueError(f"found target.num_layers={num_layers}, expected a multiple of {parts}: change one of the two")
    unknown = sorted(set(config.recompute_modules) - set(RECOMPUTED_MODULES))
    if unknown:
        raise ValueError(
            f"found target.recompute_modules={unknown}, expected a choice of {', '.join(RECOMPUTED_MODULES)}"
        )
    if config.recompute_granularity != "full":
        return
    at_once, per_chunk = config.recompute_num_layers, num_layers // (pipeline * chunks)
    fits = 1 <= at_once <= per_chunk and (config.recompute_method == "block" or per_chunk % at_once == 0)
    if not fits:
        expected = "at most" if config.recompute_method == "block" else "a divisor of"
        raise ValueError(
            f"found target.recompute_num_layers={at_once}, expected {expected} the {per_chunk} layers of a model chunk "
            f"with target.recompute_method={config.recompute_method}: change it"
        )


def transformer_config(
    config: TargetConfig, architecture: Architecture, params_dtype: torch.dtype
) -> TransformerConfig:
    """megatron-core's description of the architecture and its parallel layout."""
    on_gpu = torch.cuda.is_available()
    is_llama = architecture.architecture == "llama"
    interleaved = config.virtual_pipeline_model_parallel_size > 1
    whole_layers = config.recompute_granularity == "full"
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        normalization="RMSNorm" if is_llama else "LayerNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        activation_func=F.silu if is_llama else F.gelu,
        gated_linear_unit=is_llama,
        add_bias_linear=not is_llama,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=torch.nn.Identity(),  # initialize_weights draws them
        output_layer_init_method=torch.nn.Identity(),
        use_cpu_initialization=True,
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        pipeline_dtype=params_dtype,
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size if interleaved else None,
        # See platform.patch_pipeline_exchanges.
        overlap_p2p_comm=interleaved and on_gpu,
        batch_p2p_comm=not (interleaved and on_gpu),
        sequence_parallel=config.sequence_parallel and config.tensor_model_parallel_size > 1,
        recompute_granularity=None if config.recompute_granularity == "none" else config.recompute_granularity,
        recompute_method=config.recompute_method if whole_layers else None,
        recompute_num_layers=config.recompute_num_layers if whole_layers else None,
        recompute_modules=list(config.recompute_modules),
        calculate_per_token_loss=True,
        cuda_graph_scope=[],  # the default warns that it is deprecated
        deallocate_pipeline_outputs=True,
    )
