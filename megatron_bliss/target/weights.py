"""The target's whole weights by global name: cut for this rank's part of it, or gathered from all parts.

Whole vocabulary matrices have the vocabulary's own rows; the target's padding is added as zeros and taken off again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bliss.base.parallel import Groups, all_gather
from megatron_bliss.target.model import Target, TargetChunk, global_name

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@torch.no_grad()
def load_full_weights(target: Target, read: Callable[[str], Tensor], groups: Groups) -> None:
    """Copy ``read(global name)``, whole and without the vocabulary's padding, into this rank's part of the target.

    No collective: every rank reads what it needs, one tensor at a time. ValueError for a tensor of another shape.
    """
    for chunk in target:
        for name, parameter in chunk.named_parameters():
            stored = global_name(chunk, name)
            whole = read(stored)
            if stored in VOCABULARY:
                whole = F.pad(whole, (0, 0, 0, chunk.vocab_size - whole.shape[0]))
            expected = _whole_shape(parameter, groups)
            if tuple(whole.shape) != expected:
                raise ValueError(f"found {stored} of shape {tuple(whole.shape)}, expected {expected}")
            parameter.copy_(_slice(whole, parameter, groups))


def _is_split(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def _whole_shape(parameter: nn.Parameter, groups: Groups) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if _is_split(parameter):
        shape[parameter.partition_dim] *= groups.tensor_model_parallel_size
    return tuple(shape)


def _slice(whole: Tensor, parameter: nn.Parameter, groups: Groups) -> Tensor:
    """This tensor-parallel rank's part; a matrix packed of ``partition_stride`` others is cut in each of them."""
    if not _is_split(parameter):
        return whole
    size, dim = groups.tensor_model_parallel_size, parameter.partition_dim
    pieces = whole.chunk(size * parameter.partition_stride, dim=dim)
    return torch.cat(pieces[groups.tensor_model_parallel_rank :: size], dim=dim)


def _join(parts: Tensor, parameter: nn.Parameter) -> Tensor:
    """The inverse of :func:`_slice` on every rank's part [t, ...]."""
    dim, stride = parameter.partition_dim, parameter.partition_stride
    pieces = [part.chunk(stride, dim=dim) for part in parts]
    return torch.cat([piece[i] for i in range(stride) for piece in pieces], dim=dim)


@torch.no_grad()
def full_weights(target: Target, names: list[str], groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """Collective over a model-parallel group: every (global name, whole tensor without padding), on every rank of it.

    One tensor is on a device at a time; a caller that drops it again needs no memory for the whole model.
    """
    own = {global_name(chunk, name): (chunk, p) for chunk in target for name, p in chunk.named_parameters()}
    owners = _owners(list(own), groups)
    missing = [name for name in names if name not in owners]
    assert not missing, f"no stage holds {missing[0]}"
    for name in names:
        stage = owners[name]
        whole = _gathered(*own[name], groups) if stage == groups.pipeline_model_parallel_rank else None
        yield name, _from_stage(whole, stage, groups)


def _owners(names: list[str], groups: Groups) -> dict[str, int]:
    """{global name: first pipeline stage that holds it}."""
    stages = [None] * groups.pipeline_model_parallel_size
    dist.all_gather_object(stages, names, group=groups.pipeline_model_parallel_group)
    return {name: stage for stage in reversed(range(len(stages))) for name in stages[stage]}


def _gathered(chunk: TargetChunk, parameter: nn.Parameter, groups: Groups) -> Tensor:
    whole = parameter.detach()
    if _is_split(parameter) and groups.tensor_model_parallel_size > 1:
        whole = _join(all_gather(whole, groups.tensor_model_parallel_group), parameter)
    is_vocabulary = any(parameter is own for name, own in chunk.named_parameters() if name in VOCABULARY)
    return whole[: chunk.real_vocab_size] if is_vocabulary else whole


def _from_stage(tensor: Tensor | None, stage: int, groups: Groups) -> Tensor:
    """A pipeline stage's tensor on all stages."""
    if groups.pipeline_model_parallel_size == 1:
        return tensor
    source, group = groups.pipeline_ranks[stage], groups.pipeline_model_parallel_group
    described = [None if tensor is None else (tuple(tensor.shape), tensor.dtype)]
    dist.broadcast_object_list(described, src=source, group=group)
    if tensor is None:
        shape, dtype = described[0]
        tensor = torch.empty(shape, dtype=dtype, device=groups.device)
    tensor = tensor.contiguous()
    dist.broadcast(tensor, src=source, group=group)
    return tensor
