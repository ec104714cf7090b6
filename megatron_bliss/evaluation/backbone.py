"""What the adapter needs of a model: hidden states at chosen tokens, its part of the vocabulary, and its replicas."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bliss.base.parallel import Groups
from megatron_bliss.evaluation.packing import Batch
from megatron_bliss.evaluation.vocabulary import VocabularyPart


@dataclass(frozen=True)
class Replicas:
    """Copies of the model, each of which takes its share of the requests."""

    rank: int = 0
    size: int = 1
    answers: bool = True
    """Whether this rank is the one of its replica that hands on what the replica found."""
    world_group: dist.ProcessGroup | None = None
    replica_group: dist.ProcessGroup | None = None
    is_main: bool = True

    @staticmethod
    def of_target(groups: Groups) -> Replicas:
        """Model-parallel groups, in order of their data-parallel rank."""
        return Replicas(
            groups.data_parallel_rank,
            groups.data_parallel_size,
            groups.is_last_pipeline_stage and groups.tensor_model_parallel_rank == 0,
            groups.world_group,
            groups.model_parallel_group,
            groups.is_main,
        )

    @staticmethod
    def of_ranks(groups: Groups | None) -> Replicas:
        """A whole model on every rank."""
        return (
            Replicas()
            if groups is None
            else Replicas(groups.rank, groups.world_size, world_group=groups.world_group, is_main=groups.is_main)
        )

    def sum_over_world(self, values: Tensor) -> Tensor:
        """In place; exact where at most one rank has something other than zero."""
        return _sum(values, self.world_group)

    def sum_over_replica(self, values: Tensor) -> Tensor:
        """In place, over the ranks that hold this rank's copy."""
        return _sum(values, self.replica_group)

    def gather_texts(self, texts: list[str]) -> list[list[str]]:
        """What every replica found, by replica."""
        if self.world_group is None:
            return [texts]
        found: list = [None] * self.world_group.size()
        dist.all_gather_object(found, (self.rank, texts) if self.answers else None, group=self.world_group)
        by_replica = dict(entry for entry in found if entry is not None)
        return [by_replica[rank] for rank in range(self.size)]


def _sum(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(values, group=group)
    return values


class Backbone(ABC):
    """A language model up to its last hidden states."""

    device: torch.device
    replicas: Replicas
    shares_beginnings = False
    """Whether batches may hold branches."""
    batches_in_flight = 1
    """Batches of one shape that a replica should be given at once, to fill its pipeline."""
    width_multiple = 1
    """Rows must be padded to a multiple of this."""

    @abstractmethod
    def hidden_states(self, batches: Sequence[Batch]) -> list[Tensor]:
        """For each batch the picked hidden states [u, w]; an empty list on ranks without the last layer."""

    @abstractmethod
    def vocabulary(self) -> VocabularyPart:
        """This rank's part of the output matrix, on ranks with the last layer."""

    @abstractmethod
    def digest(self) -> str:
        """What identifies the weights and how they are computed with; collective."""


def weights_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, types and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
