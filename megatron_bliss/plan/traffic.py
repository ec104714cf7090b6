"""Bytes that a rank sends to others in one step of each stage that trains, for a plan.

Nothing of it is measured in a plan: the counts are those of the collectives that the code makes, held against counted
ones in tests/plan/test_traffic.py. Left out is what is small whatever the models' sizes: single numbers, a batch's
tokens, object exchanges of checkpoints. The score stage exchanges nothing: ranks meet in files.

Symbols: w width of the target, t tensor-, P pipeline-parallel size, d data-parallel replicas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from megatron_bliss.base.platform import choose_dtype
from megatron_bliss.bilevel.scheme import Scheme
from megatron_bliss.bilevel.teacher import TEACHER_MICRO_BATCH
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.config import Config
from megatron_bliss.models.presets import parameter_count
from megatron_bliss.plan.exchanges import (
    ALL_REDUCE,
    forward_rings,
    pipeline_sends,
    replicated_elements,
    ring_bytes,
    training_rings,
)
from megatron_bliss.plan.memory import Models, bilevel_stages
from megatron_bliss.plan.sharing import largest_union
from megatron_bliss.run.order import needs_proxy
from megatron_bliss.target.layout import padded_vocab_size
from megatron_bliss.target.memory import FP32_BYTES, training_state, weight_count


@dataclass(frozen=True)
class Flow:
    """What a rank sends in a step, of one kind."""

    what: str
    among: str
    """tensor, pipeline, data or world: the ranks that it is exchanged among; host: between a device and its host."""
    ranks: int
    bytes: int


def traffic_plan(config: Config, layout: dict, models: Models) -> list[dict]:
    """[{"stage", "step", "flows": [{what, among, ranks, bytes}], "total"}], in bytes of the rank that sends most.

    ``total`` leaves out what only goes to the host. A stage whose ranks send nothing has no flows.
    """
    plan = [_entry("target training", "iteration", training_flows(config, layout, models))]
    world = layout["world_size"]
    if needs_proxy(config):
        size = FP32_BYTES * parameter_count(models.proxy)
        flow = Flow("gradient of the proxy", "world", world, ring_bytes(size, world, ALL_REDUCE))
        plan.append(_entry("proxy warm-up", "step", [flow]))
    for name, (settings, scheme) in bilevel_stages(config).items():
        plan.append(_entry(name, "upper step", bilevel_flows(config, settings, scheme, layout, models)))
    return plan


def _entry(stage: str, step: str, flows: Iterable[Flow]) -> dict:
    sent = [flow for flow in flows if flow.bytes]
    total = sum(flow.bytes for flow in sent if flow.among != "host")
    return {"stage": stage, "step": step, "flows": [asdict(flow) for flow in sent], "total": total}


def training_flows(config: Config, layout: dict, models: Models) -> list[Flow]:
    """Those of the pipeline rank that sends most in an iteration of the target's training."""
    stages = range(layout["pipeline_model_parallel_size"])
    return max(
        (stage_flows(config, layout, models, stage) for stage in stages), key=lambda one: sum(f.bytes for f in one)
    )


def stage_flows(config: Config, layout: dict, models: Models, stage: int) -> list[Flow]:
    """Those of a rank of pipeline stage ``stage`` in an iteration; m micro-batches of n tokens, bytes of an element e.

    * layers: :func:`training_rings` x m over [n, w] e; the loss: an all-gather of two fp32 numbers a token and rank;
    * norms, under sequence parallelism: an all-reduce of their fp32 gradients;
    * pipeline: :func:`pipeline_sends` x m of [n, w] e, a t-th of it under sequence parallelism; a tied matrix's
      gradient: an all-reduce between first and last stage;
    * gradients: with the distributed optimizer a reduce-scatter of the fp32 buffer and an all-gather of the weights'
      (both with megatron-core's padding), else an all-reduce.
    """
    target, arch, training = config.target, models.target, config.pretraining
    tensor, stages, replicas = target.tensor_model_parallel_size, *_sizes(layout)
    element_size, micro_batches = choose_dtype(config.platform).itemsize, layout["micro_batches"]
    tokens = training.micro_batch_size * config.data.seq_length
    message = tokens * arch.hidden_size * element_size
    layers = ring_bytes(message, tensor, training_rings(target, arch, stage) * micro_batches)
    loss = ring_bytes(2 * FP32_BYTES * tokens * tensor, tensor, micro_batches) * (stage == stages - 1)
    norms = FP32_BYTES * replicated_elements(arch, stage, stages) * target.sequence_parallel
    part = message // (tensor if target.sequence_parallel else 1)
    flows = [
        Flow("activations and adjoints of layers", "tensor", tensor, layers + loss),
        Flow("gradients of norms", "tensor", tensor, ring_bytes(norms, tensor, ALL_REDUCE)),
        Flow("between stages", "pipeline", stages, sum(pipeline_sends(target, stage)) * micro_batches * part),
    ]
    if not arch.untie_embeddings_and_output_weights and stages > 1 and stage in (0, stages - 1):
        rows = padded_vocab_size(arch.vocab_size, target.make_vocab_size_divisible_by) // tensor
        matrix = FP32_BYTES * rows * arch.hidden_size
        flows.append(Flow("gradient of the tied matrix", "pipeline", 2, ring_bytes(matrix, 2, ALL_REDUCE)))
    options = {"stage": stage, "replicas": replicas, "element_size": element_size}
    state = training_state(target, training, arch, **options)[0]
    if training.use_distributed_optimizer:
        scattered, gathered = ring_bytes(state.gradients, replicas), ring_bytes(state.parameters, replicas)
        flows.append(Flow("gradients, scattered", "data", replicas, scattered))
        flows.append(Flow("weights, gathered", "data", replicas, gathered))
    else:
        flows.append(Flow("gradients", "data", replicas, ring_bytes(state.gradients, replicas, ALL_REDUCE)))
    return flows


def _sizes(layout: dict) -> tuple[int, int]:
    return layout["pipeline_model_parallel_size"], layout["data_parallel_size"]


def bilevel_flows(config: Config, settings: BilevelConfig, scheme: Scheme, layout: dict, models: Models) -> list[Flow]:
    """Those of an upper step: sums over all ranks, and what the frozen target's forward passes take.

    Sums: all-reduces of ``scheme.summed_vectors`` vectors of the proxy's size and of one of the score model's, in fp32.
    """
    world = layout["world_size"]
    proxy = FP32_BYTES * parameter_count(models.proxy) * scheme.summed_vectors(settings)
    score = FP32_BYTES * models.score.parameters * scheme.learns_scores
    flows = [
        Flow("vectors of the proxy", "world", world, ring_bytes(proxy, world, ALL_REDUCE)),
        Flow("gradient of the score model", "world", world, ring_bytes(score, world, ALL_REDUCE)),
    ]
    return flows + (_teacher_flows(config, settings, scheme, layout, models) if settings.kl_weight > 0 else [])


def _teacher_flows(config: Config, settings: BilevelConfig, scheme: Scheme, layout: dict, models: Models) -> list[Flow]:
    """The frozen target's, in the replica that has most samples, u, in micro-batches of at most 8.

    Rings of a forward pass over [u, s, w]; messages between stages; from the last stage to each other one the hidden
    states of its ranks' samples; and the weights to the device and back where they are offloaded.
    """
    target, arch = config.target, models.target
    tensor, (stages, _) = target.tensor_model_parallel_size, _sizes(layout)
    element_size, draws = choose_dtype(config.platform).itemsize, scheme.batches(settings)
    union = largest_union(settings.global_batch_size, layout)
    at_once = min(TEACHER_MICRO_BATCH, union)
    sample = config.data.seq_length * arch.hidden_size * element_size
    message = -(-union // at_once) * at_once * sample
    last = stages - 1
    rings = max(forward_rings(target, arch, stage) for stage in range(stages))
    sends = max(pipeline_sends(target, stage)[0] for stage in range(stages))
    part = message // (tensor if target.sequence_parallel else 1)
    handed = min(union, last * -(-settings.global_batch_size // layout["world_size"])) * sample
    weights = element_size * max(weight_count(target, arch, stage) for stage in range(stages))
    return [
        Flow("frozen target: layers", "tensor", tensor, draws * ring_bytes(message, tensor, rings)),
        Flow("frozen target: between stages", "pipeline", stages, draws * sends * part),
        Flow("frozen target: states to owners", "pipeline", stages, draws * handed),
        Flow("frozen target: weights in and out", "host", 1, draws * 2 * weights * settings.offload_target),
    ]
