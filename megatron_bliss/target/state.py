"""The target's weights and optimizer state as boxes of whole tensors, which any parallel layout can read.

A weight has one name and one shape for the whole model: ``decoder.layers.3.mlp.linear_fc1.weight``. Beside it lie
``optimizer.exp_avg.NAME``, ``optimizer.exp_avg_sq.NAME`` and, where the model trains in bf16, ``optimizer.param.NAME``
(the fp32 weight). A rank's share of each is a handful of boxes, whether tensor parallelism cuts the matrix, pipeline
parallelism moves the layer or the distributed optimizer cuts the flattened matrix in the middle of a row. So no rank
gathers anything to save, and a rank reads just its own share.

megatron-core's own optimizer formats either keep the layout (``dp_reshardable``) or gather the whole replica's state
on every rank (``fully_reshardable``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import DistributedOptimizer, Float16OptimizerWithFloat16Params, MegatronOptimizer
from torch import Tensor

from megatron_bliss.base.parallel import Groups
from megatron_bliss.target.model import Target

MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZER_PREFIX = "optimizer."
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a box starts in a tensor, and its size."""


@dataclass(frozen=True)
class Piece:
    """A part of one of this rank's parameters that is a box of the whole weight.

    A parameter is one piece, but for the gate and up projections of a gated MLP, which lie in one parameter and at two
    places of the whole weight.
    """

    parameter: torch.nn.Parameter
    start: int
    """Its first element in the flattened parameter."""
    shard: ShardedTensor


def pieces(target: Target, groups: Groups) -> list[Piece]:
    """All of this rank's weights, by megatron-core's own description of them; layers count from the model's start."""
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": groups.collection.dp_cp}
    found = []
    for chunk in target:
        for entry in chunk.sharded_state_dict(metadata=metadata).values():
            if isinstance(entry, ShardedTensor):
                found.append(Piece(entry.data, 0, entry))
            elif isinstance(entry, ShardedTensorFactory):
                first = entry.data.data_ptr()
                parts = entry.build()
                starts = [(part.data.data_ptr() - first) // part.data.element_size() for part in parts]
                found += [Piece(entry.data, start, part) for start, part in zip(starts, parts, strict=True)]
    return found


def weight_shards(parts: list[Piece]) -> list[ShardedTensor]:
    """The weights themselves: reading into a shard changes the model."""
    return [replace(part.shard, data=part.shard.data.detach()) for part in parts]


def optimizer_shards(optimizer: MegatronOptimizer, parts: list[Piece]) -> list[ShardedTensor]:
    """Moments, and fp32 weights where the model's are not, of what this rank's optimizer owns; its state must exist."""
    by_parameter: dict[int, list[Piece]] = {}
    for part in parts:
        by_parameter.setdefault(id(part.parameter), []).append(part)
    shards = []
    for outer in optimizer.chained_optimizers:
        for parameter, main, first in _owned(outer):
            tensors = {name: outer.optimizer.state[main][name] for name in MOMENTS}
            if main.dtype != parameter.dtype:
                tensors["param"] = main
            for name, tensor in tensors.items():
                for part in by_parameter[id(parameter)]:
                    shards += _boxes_of(tensor, name, first, part, isinstance(outer, DistributedOptimizer))
    return shards


@dataclass(frozen=True)
class Moments:
    """Adam's moments of this rank's weights, fp32, one pair per parameter in order, after ``step`` updates."""

    step: int
    pairs: list[tuple[Tensor, Tensor]]


def moment_shards(parts: list[Piece], pairs: dict[int, tuple[Tensor, Tensor]]) -> list[ShardedTensor]:
    """The moments of whole parameters, by a parameter's id: reading into a shard fills them."""
    return [
        shard
        for part in parts
        for name, tensor in zip(MOMENTS, pairs[id(part.parameter)], strict=True)
        for shard in _boxes_of(tensor, name, 0, part, False)
    ]


def _owned(outer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, Tensor, int]]:
    """(model parameter, the inner optimizer's parameter, where that begins in the flattened model parameter)."""
    if outer.optimizer is None:
        return
    if isinstance(outer, DistributedOptimizer):
        for parameter, (group, order) in outer.model_param_group_index_map.items():
            main = outer.optimizer.param_groups[group]["params"][order]
            yield parameter, main, outer._get_model_param_range_map(parameter)["param"].start
    elif isinstance(outer, Float16OptimizerWithFloat16Params):
        for models, mains in zip(outer.float16_groups, outer.fp32_from_float16_groups, strict=True):
            yield from ((parameter, main, 0) for parameter, main in zip(models, mains, strict=True))
        yield from ((parameter, parameter, 0) for group in outer.fp32_from_fp32_groups for parameter in group)
    else:
        yield from ((parameter, parameter, 0) for parameter in outer.get_parameters())


def _boxes_of(tensor: Tensor, name: str, first: int, part: Piece, is_divided: bool) -> list[ShardedTensor]:
    """``tensor`` holds elements ``first`` and on of a flattened parameter: its share of one piece, box by box."""
    shard, flat = part.shard, tensor.detach().view(-1)
    start = max(first, part.start)
    stop = min(first + flat.numel(), part.start + shard.data.numel())
    shards = []
    for offset, size in boxes(start - part.start, stop - part.start, tuple(shard.local_shape)):
        numel = torch.Size(size).numel()
        values = flat[start - first : start - first + numel].view(size)
        start += numel
        shards.append(
            replace(
                shard,
                key=f"{OPTIMIZER_PREFIX}{name}.{shard.key}",
                data=values,
                dtype=values.dtype,
                local_shape=size,
                global_offset=tuple(a + b for a, b in zip(shard.global_offset, offset, strict=True)),
                axis_fragmentations=None,  # boxes of any size, not a regular grid
                # Data-parallel ranks hold the same, unless the optimizer is divided between them.
                replica_id=(*shard.replica_id[:-1], 0) if is_divided else shard.replica_id,
            )
        )
    return shards


def boxes(start: int, stop: int, shape: tuple[int, ...]) -> list[Box]:
    """Elements start to stop of a flattened vector or matrix as boxes, in order: part of a row, whole rows, part."""
    if stop <= start:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    _, columns = shape
    (row, column), (last_row, end) = divmod(start, columns), divmod(stop, columns)
    if row == last_row:
        return [((row, column), (1, stop - start))]
    found = []
    if column:
        found.append(((row, column), (1, columns - column)))
        row += 1
    if row < last_row:
        found.append(((row, 0), (last_row - row, columns)))
    if end:
        found.append(((last_row, 0), (1, end)))
    return found


def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Updates made so far by what this rank owns, 0 where it owns nothing."""
    steps = [0]
    for inner in _inner_optimizers(optimizer):
        steps += [int(state["step"]) for state in inner.state.values() if "step" in state]
        steps += [int(group["step"]) for group in inner.param_groups if "step" in group]
    return max(steps)


def make_optimizer_state(optimizer: MegatronOptimizer, step: int | None = None) -> None:
    """Give the optimizer the state that its first update would make, where it has none; set the number of updates."""
    for inner in _inner_optimizers(optimizer):
        # Apex's and Transformer Engine's count updates per group, torch's per parameter.
        counts_per_parameter = isinstance(inner, torch.optim.Adam)
        for group in inner.param_groups:
            if not counts_per_parameter and step is not None:
                group["step"] = step
            for parameter in group["params"]:
                state = inner.state[parameter]
                for name in MOMENTS:
                    if name not in state:
                        state[name] = torch.zeros_like(parameter)
                if counts_per_parameter and (step is not None or "step" not in state):
                    on_device = group.get("fused") or group.get("capturable")
                    device = parameter.device if on_device else "cpu"
                    state["step"] = torch.tensor(float(step or 0), dtype=torch.float32, device=device)


def _inner_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    return [outer.optimizer for outer in optimizer.chained_optimizers if outer.optimizer is not None]
