"""The target with what trains it: megatron-core's data parallelism, optimizer and learning-rate schedule.

One object per segment; nothing of it outlives the segment or is shared between two of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_bliss.base.parallel import Groups
from megatron_bliss.config.training import PretrainingConfig
from megatron_bliss.target.learning_rate import build_scheduler, set_iteration
from megatron_bliss.target.model import Target
from megatron_bliss.target.sequences import MicroBatch


@dataclass(frozen=True)
class Step:
    """What one iteration gave, the same numbers on every rank: mean loss over the batch's real tokens, the norm of the
    whole gradient before clipping, the learning rate, and whether the weights were updated."""

    loss: float
    grad_norm: float
    lr: float
    updated: bool


class TargetTrainer:
    """Trains the target's chunks in place."""

    def __init__(
        self,
        target: Target,
        config: PretrainingConfig,
        groups: Groups,
        *,
        seq_length: int,
        total_iterations: int,
    ) -> None:
        self.target, self.groups, self.config, self.seq_length = target, groups, config, seq_length
        sizes = groups.data_parallel_size, groups.pipeline_model_parallel_size
        self.num_micro_batches = num_micro_batches(config, *sizes, len(target))
        ddp_config = data_parallel_config(config)
        if groups.data_parallel_size == 1:
            # There is nothing to divide: megatron-core would copy weights and gradients onto themselves.
            config = replace(config, use_distributed_optimizer=False, overlap_param_gather=False)
            ddp_config, self.config = data_parallel_config(config), config
        self.wrapped = [
            DistributedDataParallel(
                chunk.config, ddp_config, chunk, disable_bucketing=i > 0, pg_collection=groups.collection
            )
            for i, chunk in enumerate(target)  # only the first chunk's gradients are the last to be ready
        ]
        model_config = target[0].config
        model_config.finalize_model_grads_func = finalize_model_grads
        if config.overlap_grad_reduce:
            model_config.no_sync_func = [chunk.no_sync for chunk in self.wrapped]
            if len(target) == 1:
                model_config.no_sync_func = self.wrapped[0].no_sync
        self.optimizer = get_megatron_optimizer(
            _optimizer_config(config, model_config.params_dtype),
            self.wrapped,
            use_gloo_process_groups=False,
            pg_collection=groups.collection,
        )
        for inner in self._inner_optimizers():
            _use_fused_kernel(inner)
        self.scheduler = build_scheduler(self.optimizer, config.optimizer, total_iterations)
        interleaved = len(target) > 1
        self._schedule = get_forward_backward_func(groups.pipeline_model_parallel_size, 2 if interleaved else None)
        pipelined = groups.pipeline_model_parallel_size > 1
        self._p2p = P2PCommunicator(groups.pipeline_model_parallel_group, model_config) if pipelined else None
        self.loss_sum = torch.zeros(2, dtype=torch.float64, device=groups.device)
        """[summed loss, tokens] of the updates since :meth:`take_loss` last asked, over all ranks."""

    def step(self, micro_batches: Iterator[MicroBatch], accepts: Callable[[float, float], bool]) -> Step:
        """One iteration over the next ``num_micro_batches``.

        ``accepts(loss, gradient norm)`` decides, alike on every rank, whether weights and optimizer are updated.
        """
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        parts = self._schedule(
            forward_step_func=self._forward,
            # Of a rank's chunks only one reads data: the pipeline's first or its last.
            data_iterator=[micro_batches] * len(self.wrapped) if len(self.wrapped) > 1 else micro_batches,
            model=self.wrapped,
            num_microbatches=self.num_micro_batches,
            seq_length=self.seq_length,
            micro_batch_size=self.config.micro_batch_size,
            forward_only=False,
            p2p_communicator=self._p2p,
            pg_collection=self.groups.collection,
        )
        return self._update(parts, accepts)

    def _forward(self, micro_batches: Iterator[MicroBatch], chunk: DistributedDataParallel):
        reads_data = chunk.module.pre_process or chunk.module.post_process
        batch = next(micro_batches) if reads_data else None
        output = chunk(None, None) if batch is None else chunk(batch.tokens, batch.labels)

        def total_loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total, count = (losses * batch.loss_mask).sum(), batch.loss_mask.sum()
            return total, count.int(), torch.stack((total.detach().double(), count.double()))

        return output, total_loss

    def _update(self, parts: list[Tensor], accepts: Callable[[float, float], bool]) -> Step:
        """Clip and step, as the optimizer's own ``step`` does, but look at loss and gradient norm before the update."""
        self.optimizer.prepare_grads()
        total, grad_norm = self._measure(parts)
        summed, tokens = total.tolist()
        loss, rate = summed / tokens if tokens else math.nan, self.scheduler.get_lr({})
        updated = accepts(loss, grad_norm)
        if updated:
            self.loss_sum += total
            _clip(self.optimizer.get_parameters(), self.config.optimizer.clip_grad, grad_norm)
            self.optimizer.step_with_ready_grads()
        self.scheduler.step(1)
        return Step(loss, grad_norm, rate, updated)

    def _measure(self, parts: list[Tensor]) -> tuple[Tensor, float]:
        """[summed loss, tokens] of the batch and the norm of the whole model's gradient, by one exchange: the same
        bits on every rank, so that all decide alike.

        megatron-core's own norm, without Apex, adds in fp32 (4e-4 off for an embedding's few large rows, so that the
        result depends on how the rows are split) and waits for the device once per weight.
        """
        mine = torch.zeros(3, dtype=torch.float64, device=self.groups.device)
        if parts and self.groups.tensor_model_parallel_rank == 0:
            mine[:2] = torch.stack(parts).sum(0)
        for outer in self.optimizer.chained_optimizers:
            for gradient in outer.get_main_grads_for_grad_norm():
                mine[2] += squared_norm(gradient)
        # Without the distributed optimizer every data-parallel rank holds the whole gradient.
        mine[2] /= self.groups.world_size // self.optimizer.get_grad_stats_parallel_group().size()
        dist.all_reduce(mine, group=self.groups.world_group)
        return mine[:2], math.sqrt(mine[2].item())

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Collective: inside, every rank holds all of its weights and may run the target as it likes.

        With ``overlap_param_gather`` weights are otherwise gathered when the next training step reads them.
        """
        overlapped = self.wrapped if self.config.overlap_param_gather else []
        for chunk in overlapped:
            chunk.disable_forward_pre_hook()
        yield
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()

    def set_iteration(self, iteration: int) -> None:
        """Put the learning rate where ``iteration`` finished iterations leave it."""
        set_iteration(self.scheduler, self.config.optimizer, iteration)

    def describe(self) -> str:
        """Which layers, attention and optimizer kernels are in use."""
        chunk = self.target[0]
        optimizers = {kernel_name(inner) for inner in self._inner_optimizers()} or {"none on this rank"}
        attention = type(chunk.decoder.layers[0].self_attention.core_attention).__name__
        norm = type(chunk.decoder.layers[0].input_layernorm)
        return (
            f"layers {type(chunk.decoder.layers[0]).__name__} with {norm.__module__.split('.')[0]}'s {norm.__name__}, "
            f"attention {attention}, optimizer {', '.join(sorted(optimizers))}"
        )

    def take_loss(self) -> float:
        """Mean loss over all tokens of the updates since the last call; NaN where there were none."""
        summed, tokens = self.loss_sum.tolist()
        self.loss_sum.zero_()
        return summed / tokens if tokens else math.nan

    def _inner_optimizers(self) -> list[torch.optim.Optimizer]:
        """torch's (or Apex's) optimizers inside megatron-core's; none for a rank that holds no part of them."""
        return [outer.optimizer for outer in self.optimizer.chained_optimizers if outer.optimizer is not None]

    def resume(self, iteration: int, loss_sum: list[float]) -> None:
        """Go on after ``iteration`` iterations, with the loss not yet taken; call it when the weights are loaded."""
        self.loss_sum.copy_(torch.tensor(loss_sum, dtype=torch.float64))
        self.set_iteration(iteration)


def num_micro_batches(config: PretrainingConfig, replicas: int, stages: int, chunks: int = 1) -> int:
    """Forward passes of one replica per iteration, of ``replicas`` over pipelines of ``stages`` ranks with ``chunks``
    model chunks each; ValueError where the batch sizes don't divide."""
    at_once = config.micro_batch_size * replicas
    if config.global_batch_size % at_once:
        raise ValueError(
            f"found pretraining.global_batch_size={config.global_batch_size}, expected a multiple of {at_once} "
            f"(micro_batch_size={config.micro_batch_size} x {replicas} data-parallel ranks): change "
            "pretraining.global_batch_size or pretraining.micro_batch_size"
        )
    count = config.global_batch_size // at_once
    if chunks > 1 and count % stages:
        raise ValueError(
            f"found {count} micro-batches per iteration, expected a multiple of target.pipeline_model_parallel_size="
            f"{stages} for an interleaved pipeline: change pretraining.global_batch_size or micro_batch_size, or set "
            "target.virtual_pipeline_model_parallel_size=1"
        )
    return count


def data_parallel_config(config: PretrainingConfig) -> DistributedDataParallelConfig:
    """megatron-core's options of data parallelism; ValueError where ours contradict each other."""
    if config.overlap_param_gather and not (config.use_distributed_optimizer and config.overlap_grad_reduce):
        raise ValueError(
            "found pretraining.overlap_param_gather without use_distributed_optimizer and overlap_grad_reduce, "
            "expected both with it: set them, or leave it out"
        )
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
    )


def _optimizer_config(config: PretrainingConfig, params_dtype: torch.dtype) -> MegatronOptimizerConfig:
    settings = config.optimizer
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=params_dtype == torch.bfloat16,
        params_dtype=params_dtype,
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_param_gather=config.overlap_param_gather,
    )


def _clip(parameters: list[Tensor], limit: float, grad_norm: float) -> None:
    """Scale gradients down to the norm ``limit`` (0: never), in place; megatron-core without Apex makes copies."""
    scale = limit / (grad_norm + 1e-6)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients or not 0 < scale < 1:
        return
    if gradients[0].is_cuda:
        torch._foreach_mul_(gradients, scale)
        return
    for gradient in gradients:
        gradient.mul_(scale)


def _use_fused_kernel(optimizer: torch.optim.Optimizer) -> None:
    """megatron-core makes torch's AdamW with its slowest loop on a CPU; the fused kernel computes the same update."""
    if isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            group.update(fused=True, foreach=False)


def squared_norm(tensor: Tensor) -> Tensor:
    """fp64 scalar, right to about 1e-6 whatever the tensor's size.

    torch's norm in fp64 first makes a copy of twice the size, which the largest gradient leaves no room for on a GPU,
    and adds at a thirtieth of its speed in fp32 on a CPU (a second per step for 70M weights); in fp32 it is 1e-3 off at
    25M elements. Norms of short pieces in fp32, added in fp64, are lean, fast and right.
    """
    flat = tensor.flatten()
    whole = flat.numel() // NORM_PIECE * NORM_PIECE
    pieces = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_PIECE), dim=1)
    return torch.cat((pieces, flat[whole:].norm().view(1))).double().square().sum()


NORM_PIECE = 2**12


def kernel_name(optimizer: torch.optim.Optimizer) -> str:
    """``torch AdamW (fused)``, ``transformer_engine FusedAdam``, ``apex FusedAdam``: megatron-core takes the last two
    where they are installed."""
    name = f"{type(optimizer).__module__.split('.')[0]} {type(optimizer).__name__}"
    return f"{name} (fused)" if any(group.get("fused") for group in optimizer.param_groups) else name
