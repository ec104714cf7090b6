"""Process groups and seeds: the only importer of ``megatron.core.parallel_state``.

One layout for the whole run: the target uses tensor x pipeline x data parallelism through megatron-core; proxy and
score are replicated on every rank and data-parallel over the world.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_bliss.base import platform as machine
from megatron_bliss.config.models import TargetConfig
from megatron_bliss.config.platform import PlatformConfig


@dataclass(frozen=True)
class World:
    """All ranks, over which proxy and score model are data-parallel, and this rank's place among them."""

    world_group: dist.ProcessGroup | None
    """None: this process is alone, without a process group."""
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes what all share."""
        return self.rank == 0


@dataclass(frozen=True)
class Groups(World):
    """The world with the target's layout. A model-parallel group is one replica of it: its tensor x pipeline ranks."""

    local_rank: int
    tensor_model_parallel_group: dist.ProcessGroup
    pipeline_model_parallel_group: dist.ProcessGroup
    data_parallel_group: dist.ProcessGroup
    model_parallel_group: dist.ProcessGroup
    collection: ProcessGroupCollection
    """The same groups as megatron-core wants them."""

    @property
    def tensor_model_parallel_rank(self) -> int:
        return self.tensor_model_parallel_group.rank()

    @property
    def tensor_model_parallel_size(self) -> int:
        return self.tensor_model_parallel_group.size()

    @property
    def pipeline_model_parallel_rank(self) -> int:
        return self.pipeline_model_parallel_group.rank()

    @property
    def pipeline_model_parallel_size(self) -> int:
        return self.pipeline_model_parallel_group.size()

    @property
    def data_parallel_rank(self) -> int:
        return self.data_parallel_group.rank()

    @property
    def data_parallel_size(self) -> int:
        return self.data_parallel_group.size()

    @property
    def model_parallel_ranks(self) -> list[int]:
        """World ranks of this replica, in the order of ``model_parallel_group``."""
        return dist.get_process_group_ranks(self.model_parallel_group)

    @property
    def pipeline_ranks(self) -> list[int]:
        """World ranks of this pipeline, first stage first."""
        return dist.get_process_group_ranks(self.pipeline_model_parallel_group)

    @property
    def is_first_pipeline_stage(self) -> bool:
        return self.pipeline_model_parallel_rank == 0

    @property
    def is_last_pipeline_stage(self) -> bool:
        return self.pipeline_model_parallel_rank == self.pipeline_model_parallel_size - 1

    @property
    def sizes(self) -> dict[str, int]:
        """The layout, as checkpoints record it."""
        return {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "data_parallel_size": self.data_parallel_size,
        }


def initialize(platform: PlatformConfig, target: TargetConfig, seed: int) -> Groups:
    """Set up device, process groups and seeds, under torchrun, as a lone process, or in an initialised process group.

    Raises ValueError where the number of processes does not fit the target's tensor and pipeline sizes.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = machine.prepare(platform, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    timeout = timedelta(minutes=platform.distributed_timeout_minutes)
    _join_world(device, timeout)
    try:
        check_world_size(target, dist.get_world_size())
    except ValueError:
        destroy()
        raise
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=target.tensor_model_parallel_size,
        pipeline_model_parallel_size=target.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=_chunks(target),
        distributed_timeout_minutes=math.ceil(platform.distributed_timeout_minutes),  # whole minutes there
        create_gloo_process_groups=False,
    )
    set_seeds(seed)
    model_parallel_cuda_manual_seed(seed)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return Groups(
        world_group=dist.group.WORLD,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        local_rank=local_rank,
        tensor_model_parallel_group=collection.tp,
        pipeline_model_parallel_group=collection.pp,
        data_parallel_group=collection.dp,
        model_parallel_group=collection.mp,
        collection=collection,
    )


_joined_world = False
"""Whether :func:`initialize` made the default process group, which torch keeps one of per process."""


def _join_world(device: torch.device, timeout: timedelta) -> None:
    """Enter the default process group: the one there is, torchrun's, or one of this process alone.

    The device is the one that ``platform.prepare`` has set. A ``device_id`` here would make torch open a communicator
    for each of megatron-core's groups at once, most of which are never used, and send all of a pipeline's exchanges
    over one of them, in one stream: an interleaved pipeline's would no longer overlap and could wait for each other.
    """
    global _joined_world
    if dist.is_initialized():
        return
    _joined_world = True
    backend = machine.BACKENDS[device.type]
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def check_world_size(target: TargetConfig, world_size: int) -> None:
    """ValueError where the number of processes does not fit the target's tensor and pipeline sizes."""
    tensor, pipeline = target.tensor_model_parallel_size, target.pipeline_model_parallel_size
    if tensor < 1 or pipeline < 1:
        raise ValueError(
            f"found target.tensor_model_parallel_size={tensor} and target.pipeline_model_parallel_size={pipeline}, "
            "expected both to be at least 1"
        )
    if world_size % (tensor * pipeline):
        raise ValueError(
            f"found {world_size} processes, expected a multiple of {tensor * pipeline} "
            f"(target.tensor_model_parallel_size={tensor} x target.pipeline_model_parallel_size={pipeline}): start "
            "another number of processes with torchrun --nproc-per-node, or change one of the two sizes"
        )


def _chunks(target: TargetConfig) -> int | None:
    """megatron-core's word for chunks per rank; None for a pipeline that is not interleaved (or can't be: see
    ``models.target.check_layout``)."""
    chunks = target.virtual_pipeline_model_parallel_size
    return chunks if chunks > 1 and target.pipeline_model_parallel_size > 1 else None


def set_seeds(seed: int) -> None:
    """Seed Python, NumPy and torch, the same on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def destroy() -> None:
    """Undo :func:`initialize`: a process group that was there before it stays. Harmless if there is nothing to undo."""
    global _joined_world
    parallel_state.destroy_model_parallel()
    if _joined_world and dist.is_initialized():
        dist.destroy_process_group()
    _joined_world = False


def barrier(groups: Groups) -> None:
    """Wait until every rank of the world is here."""
    if groups.device.type == "cuda":
        dist.barrier(groups.world_group, device_ids=[groups.local_rank])
    else:
        dist.barrier(groups.world_group)


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Tensors of one shape [...] on every rank of a group -> [ranks, ...], by rank in the group."""
    gathered = tensor.new_empty(group.size(), *tensor.shape)
    # Gloo wants output pieces in the shape of the input, so both are handed over flat.
    dist.all_gather_into_tensor(gathered.view(-1), tensor.contiguous().view(-1), group=group)
    return gathered


def all_gather_object(value: Any, groups: Groups) -> list[Any]:
    """Every rank's picklable ``value``, by world rank."""
    gathered = [None] * groups.world_size
    dist.all_gather_object(gathered, value, group=groups.world_group)
    return gathered


def max_over_ranks(value: float, groups: Groups) -> float:
    """The largest ``value`` of any rank (exact for integers up to 2^53)."""
    largest = torch.tensor(float(value), dtype=torch.float64, device=groups.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=groups.world_group)
    return largest.item()


def broadcast_object(value: Any, groups: Groups) -> Any:
    """The main rank's picklable ``value``, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=groups.world_group)
    return box[0]


def fail_together(error: BaseException | None, groups: Groups) -> None:
    """Collective: where any rank has an error, every rank raises it, with the rank's number.

    A ValueError (the user's to mend) stays one; anything else becomes a RuntimeError.
    """
    found = None if error is None else (isinstance(error, ValueError), f"{type(error).__name__}: {error}", str(error))
    failures = [(rank, failure) for rank, failure in enumerate(all_gather_object(found, groups)) if failure]
    if not failures:
        return
    rank, (is_value_error, described, message) = failures[0]
    if is_value_error:
        raise ValueError(message if groups.world_size == 1 else f"rank {rank}: {message}") from error
    raise RuntimeError(f"rank {rank} failed with {described}") from error


@contextlib.contextmanager
def failing_together(groups: Groups) -> Iterator[None]:
    """Run a block without collectives on each rank; :func:`fail_together` at its end."""
    error = None
    try:
        yield
    except Exception as problem:
        error = problem
    fail_together(error, groups)
