"""How evenly a stage's samples fall on ranks: the share of all ranks' time that is work, for a plan.

A batch is dealt in contiguous shares that differ by at most a sample (``rank_share``), so a step lasts as long as the
largest share takes, whatever the others have.
"""

from __future__ import annotations

from megatron_bliss.bilevel.teacher import TEACHER_MICRO_BATCH
from megatron_bliss.config.models import TargetConfig
from megatron_bliss.data.batches import rank_share


def busy_share(samples: int, ranks: int) -> float:
    """Mean share of a step in which a rank works, ``samples`` dealt to ``ranks``: 1 where they divide."""
    return samples / (ranks * -(-samples // ranks))


def largest_union(samples: int, layout: dict) -> int:
    """Most samples of a batch that the ranks of one model-parallel group have together.

    megatron-core counts ranks by tensor-parallel rank first, then by replica, then by pipeline stage: a group is a run
    of tensor-parallel ranks out of each stage's block.
    """
    tensor, replicas = layout["tensor_model_parallel_size"], layout["data_parallel_size"]
    unions = [0] * replicas
    for run in range(layout["world_size"] // tensor):
        first, _ = rank_share(samples, run * tensor, layout["world_size"])
        _, last = rank_share(samples, run * tensor + tensor - 1, layout["world_size"])
        unions[run % replicas] += last - first
    return max(unions)


def teacher_share(samples: int, layout: dict, target: TargetConfig) -> float:
    """Mean share of the frozen target's forward passes over a batch in which a rank works.

    The group with most samples decides. It runs them in micro-batches of at most 8, through a pipeline of P stages that
    is full only after P - 1 of them (interleaved in V chunks: after (P - 1) / V, and whole rounds of P run).
    """
    stages, chunks = layout["pipeline_model_parallel_size"], target.virtual_pipeline_model_parallel_size
    union = largest_union(samples, layout)
    at_once = min(TEACHER_MICRO_BATCH, union)
    slots = -(-union // at_once)
    slots = -(-slots // stages) * stages if chunks > 1 else slots
    mean = samples / layout["data_parallel_size"]
    return mean / at_once / (slots + (stages - 1) / chunks)
