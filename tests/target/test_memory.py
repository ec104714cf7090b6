"""Weights, gradients and optimizer states are what megatron-core really allocates; activations what autograd keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_bliss.base.platform import choose_dtype
from megatron_bliss.config.models import TargetConfig
from megatron_bliss.config.platform import PlatformConfig
from megatron_bliss.target.memory import (
    Weight,
    activation_bytes,
    chunk_weights,
    flat_buffer,
    layer_elements,
    micro_batches_in_flight,
    training_state,
    weight_count,
)
from megatron_bliss.target.model import build_target
from megatron_bliss.target.state import make_optimizer_state
from megatron_bliss.target.trainer import TargetTrainer
from tests.distributed import run_distributed
from tests.targets import LLAMA, NEOX, PRETRAINING, SEQ_LENGTH, grouped

DEEP = replace(NEOX, num_layers=4)
TIED = replace(LLAMA, num_layers=4)


def options(tensor: int = 1, pipeline: int = 1, chunks: int = 1) -> TargetConfig:
    return TargetConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=chunks,
    )


CASES = [
    ("one", options(), NEOX, "fp32", True),
    ("replicas", options(), NEOX, "bf16", True),
    ("replicas in fp32", options(), LLAMA, "fp32", True),
    ("whole optimizers", options(), NEOX, "bf16", False),
    ("tensor", options(tensor=2), NEOX, "bf16", True),
    ("tensor, gated", options(tensor=2), LLAMA, "fp32", True),
    ("pipeline", options(pipeline=2), DEEP, "bf16", True),
    ("pipeline, tied", options(pipeline=2), TIED, "fp32", True),
    ("interleaved", options(pipeline=2, chunks=2), DEEP, "fp32", True),
]


def allocated(rank: int, world_size: int, cases: list) -> list[dict]:
    """What a rank holds of each case's target once its optimizer has its states."""
    return [_allocated(*case[1:]) for case in cases]


def _allocated(config: TargetConfig, architecture, dtype: str, shards: bool) -> dict:
    platform = PlatformConfig(params_dtype=dtype)
    training = replace(PRETRAINING, use_distributed_optimizer=shards, overlap_grad_reduce=shards)
    with grouped(config, platform) as groups:
        settings = {"seq_length": SEQ_LENGTH, "params_dtype": choose_dtype(platform), "seed": 1}
        target = build_target(config, architecture, groups, **settings)
        trainer = TargetTrainer(target, training, groups, seq_length=SEQ_LENGTH, total_iterations=9)
        make_optimizer_state(trainer.optimizer)
        weights = [parameter for chunk in target for parameter in chunk.parameters()]
        return {
            "stage": groups.pipeline_model_parallel_rank,
            "replica": groups.data_parallel_rank,
            "sizes": [[parameter.numel() for parameter in chunk.parameters()] for chunk in target],
            "parameters": _storage(weights),
            "gradients": _storage([weight.main_grad for weight in weights]),
            "optimizer": _optimizer_bytes(trainer, weights),
        }


def _storage(tensors: list[torch.Tensor]) -> int:
    """Bytes behind tensors, what several of them share counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _optimizer_bytes(trainer: TargetTrainer, weights: list[torch.Tensor]) -> int:
    """Moments and fp32 weights that are no views of the model's; step counters left out."""
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    held = []
    for inner in trainer._inner_optimizers():
        held += [parameter for group in inner.param_groups for parameter in group["params"]]
        held += [value for state in inner.state.values() for value in state.values() if value.ndim]
    return _storage([tensor for tensor in held if tensor.untyped_storage().data_ptr() not in own])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rank_holds_what_was_foretold(world_size: int) -> None:
    cases = CASES[:1] if world_size == 1 else CASES[1:]
    for rank in run_distributed(allocated, world_size, cases):
        for (name, config, architecture, dtype, shards), found in zip(cases, rank, strict=True):
            stage, place = found["stage"], f"{name}, rank of stage {found['stage']}"
            chunks = range(config.virtual_pipeline_model_parallel_size)
            weights = [chunk_weights(config, architecture, stage, chunk) for chunk in chunks]
            assert [[weight.size for weight in chunk] for chunk in weights] == found["sizes"], place
            assert weight_count(config, architecture, stage) == sum(map(sum, found["sizes"]))
            replicas = world_size // (config.tensor_model_parallel_size * config.pipeline_model_parallel_size)
            states = training_state(
                config,
                replace(PRETRAINING, use_distributed_optimizer=shards, overlap_grad_reduce=shards),
                architecture,
                stage=stage,
                replicas=replicas,
                element_size={"fp32": 4, "bf16": 2}[dtype],
            )
            state = states[found["replica"]]
            expected = (found["parameters"], found["gradients"], found["optimizer"])
            assert (state.parameters, state.gradients, state.optimizer) == expected, place


def test_buckets_end_where_they_are_full_and_around_a_tied_matrix() -> None:
    weights = [Weight(100, True), Weight(50), Weight(30)]
    # 30 at 0, 50 at 64 (to 114, padded to 128); the tied one alone in its bucket, 128 to 228, padded to 256
    assert flat_buffer(weights, 2, None) == (256, [30 + 64, 50 + 36])
    # a bucket of its own for each: 30 in [0, 128), 50 in [128, 256), 100 in [256, 384)
    assert flat_buffer(weights, 2, 1) == (384, [30 + 50 + 64, 36])


@pytest.mark.parametrize("recomputed", [None, "core_attn", "mlp"])
@pytest.mark.parametrize("architecture", [NEOX, LLAMA], ids=["neox", "llama"])
def test_a_layer_keeps_about_what_was_foretold(architecture, recomputed: str | None) -> None:
    """Elements that autograd saves of one more layer, parameters and rotary tables left out."""
    config = options()
    if recomputed:
        config = replace(config, recompute_granularity="selective", recompute_modules=[recomputed])
    wide = replace(architecture, hidden_size=64, ffn_hidden_size=192, num_attention_heads=4, num_query_groups=4)
    two, three = (_saved(config, replace(wide, num_layers=layers)) for layers in (2, 3))
    foretold = layer_elements(config, wide, recomputes_mlp=recomputed == "mlp")
    assert 0.75 < foretold / ((three - two) / (2 * SEQ_LENGTH)) < 1.1


def _saved(config: TargetConfig, architecture) -> int:
    with grouped(config) as groups:
        settings = {"seq_length": SEQ_LENGTH, "params_dtype": torch.float32, "seed": 1}
        (chunk,) = build_target(config, architecture, groups, **settings)
        weights, saved = {p.untyped_storage().data_ptr() for p in chunk.parameters()}, {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes() // 4, tensor  # kept, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            chunk(torch.zeros(2, SEQ_LENGTH, dtype=torch.int64))
    return sum(size for size, _ in saved.values())


def test_a_pipeline_s_first_rank_holds_most_micro_batches() -> None:
    assert [micro_batches_in_flight(options(pipeline=4), stage, 99) for stage in range(4)] == [4, 3, 2, 1]
    assert [micro_batches_in_flight(options(pipeline=4), stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    # Korthikanti et al.: all layers' activations times 1 + (P - 1) / (P V), in chunks of 1 / (P V) of the layers
    assert micro_batches_in_flight(options(pipeline=4, chunks=2), 0, 99) == 8 + 3


def test_what_saves_activations_is_counted() -> None:
    def size(architecture=DEEP, tokens: int = 4096, **changes) -> int:
        config = replace(options(), **changes)
        return activation_bytes(config, architecture, stage=0, micro_batches=8, tokens=tokens, element_size=2)

    whole = size()
    assert size(tokens=8192) > 1.9 * whole
    assert size(tensor_model_parallel_size=2) < whole
    split = size(tensor_model_parallel_size=2, sequence_parallel=True)
    assert split < size(tensor_model_parallel_size=2)
    assert size(recompute_granularity="selective") == whole  # fused attention keeps no s x s matrix to recompute
    full = size(recompute_granularity="full")
    assert full < size(recompute_granularity="selective", recompute_modules=["mlp"]) < whole
    assert full < size(recompute_granularity="full", recompute_method="block", recompute_num_layers=2) < whole
