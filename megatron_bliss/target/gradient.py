"""The gradient of the target's loss outside of training, in any tensor x pipeline layout, on chunks as they are.

In training, megatron-core's data parallelism and optimizer finish what a backward pass leaves. Here is the same without
them: no replica waits for another, and gradients are the weights' own ``.grad``.

Shapes: b samples, s tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from megatron_bliss.base.parallel import Groups
from megatron_bliss.data.batches import Batch
from megatron_bliss.target.model import Target, TargetChunk
from megatron_bliss.target.trainer import squared_norm


def parameters(target: Target) -> list[nn.Parameter]:
    """This rank's weights, each once."""
    return [parameter for chunk in target for parameter in chunk.parameters()]


def loss_gradient(target: Target, batch: Batch, groups: Groups) -> None:
    """Leave in every weight's ``.grad`` the gradient of the mean of -log p over the batch's labelled tokens.

    Collective over a model-parallel group, whose ranks all bring the same batch [b, s]. Gradients that are there are
    replaced. A batch without a label has the gradient 0.
    """
    multiple = groups.tensor_model_parallel_size if target[0].config.sequence_parallel else 1
    padding = (0, -batch.tokens.shape[1] % multiple)  # on the right: no labelled token sees it
    tokens, mask = F.pad(batch.tokens, padding).to(groups.device), F.pad(batch.label_mask, padding).to(groups.device)
    labels, weights = tokens.roll(-1, 1), F.pad(mask[:, 1:], (0, 1)).float()
    weights /= weights.sum().clamp(min=1)
    chunks, stages = len(target), groups.pipeline_model_parallel_size
    count = stages if chunks > 1 else 1  # megatron-core interleaves whole rounds of the pipeline only

    def step(numbered: Iterator[int], chunk: TargetChunk):
        weight = weights if next(numbered) == 0 else torch.zeros_like(weights)

        def total_loss(losses: Tensor) -> tuple[Tensor, Tensor, None]:
            return (losses * weight).sum(), torch.ones((), dtype=torch.int, device=losses.device), None

        return chunk(tokens, labels), total_loss

    for parameter in parameters(target):
        parameter.grad = None
    numbers = [iter(range(count)) for _ in target]
    with torch.enable_grad():
        get_forward_backward_func(stages, chunks if chunks > 1 else None)(
            forward_step_func=step,
            data_iterator=numbers if chunks > 1 else numbers[0],
            model=target,
            num_microbatches=count,
            seq_length=tokens.shape[1],
            micro_batch_size=len(tokens),
            forward_only=False,
            p2p_communicator=(
                P2PCommunicator(groups.pipeline_model_parallel_group, target[0].config) if stages > 1 else None
            ),
            pg_collection=groups.collection,
        )
    _sum_over_ranks(target, groups)


def _sum_over_ranks(target: Target, groups: Groups) -> None:
    """Add up the gradients of weights that several ranks hold whole, but see a part of the work with each.

    Under sequence parallelism every tensor-parallel rank has its tokens' part of the gradient of norms and of biases
    behind a reduction; the first and the last stage have each their own part of a tied matrix's.
    """
    for parameter in parameters(target):
        if target[0].config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=groups.tensor_model_parallel_group)
        if getattr(parameter, "shared_embedding", False):
            dist.all_reduce(parameter.grad, group=groups.collection.embd)


def gradient_norm(target: Target, groups: Groups) -> float:
    """Norm of the whole model's gradient, every weight counted once; collective over a model-parallel group."""
    total = torch.zeros((), dtype=torch.float64, device=groups.device)
    for parameter in parameters(target):
        is_first_copy = param_is_not_tensor_parallel_duplicate(parameter, groups.tensor_model_parallel_group)
        if is_first_copy and param_is_not_shared(parameter):
            total += squared_norm(parameter.grad)
    dist.all_reduce(total, group=groups.model_parallel_group)
    return math.sqrt(total.item())
