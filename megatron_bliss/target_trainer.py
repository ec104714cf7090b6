"""The target with what trains it: megatron-core's data parallelism, optimizer and learning-rate schedule.

One object per segment; nothing of it outlives the segment or is shared between two of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_bliss.config import OptimizerConfig, PretrainingConfig
from megatron_bliss.data.sequences import MicroBatch
from megatron_bliss.models.target import Target, TargetChunk
from megatron_bliss.parallel import Groups, all_gather_object


@dataclass(frozen=True)
class Step:
    """What one iteration gave: the norm of the whole gradient before clipping, and the learning rate it was used at."""

    grad_norm: float
    lr: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.grad_norm)


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
        self.num_micro_batches = num_micro_batches(config, groups)
        # With one replica there is nothing to divide: megatron-core would copy weights and gradients onto themselves.
        is_divided = config.use_distributed_optimizer and groups.data_parallel_size > 1
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=is_divided)
        self.wrapped = [
            DistributedDataParallel(chunk.config, ddp_config, chunk, pg_collection=groups.collection)
            for chunk in target
        ]
        model_config = target[0].config
        model_config.finalize_model_grads_func = finalize_model_grads
        self.optimizer = get_megatron_optimizer(
            _optimizer_config(config, model_config.params_dtype, is_divided),
            self.wrapped,
            use_gloo_process_groups=False,
            pg_collection=groups.collection,
        )
        for inner in self._inner_optimizers():
            _use_fused_kernel(inner)
        self.scheduler = _scheduler(self.optimizer, config.optimizer, total_iterations)
        self._schedule = get_forward_backward_func(groups.pipeline_model_parallel_size, None)
        pipelined = groups.pipeline_model_parallel_size > 1
        self._p2p = P2PCommunicator(groups.pipeline_model_parallel_group, model_config) if pipelined else None
        self.loss_sum = torch.zeros(2, dtype=torch.float64, device=groups.device)
        """[summed loss, tokens] that this rank saw since :meth:`take_loss` last asked (last pipeline stage only)."""

    def step(self, micro_batches: Iterator[MicroBatch]) -> Step:
        """One iteration over the next ``num_micro_batches``; a gradient that is not finite leaves the weights alone."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        parts = self._schedule(
            forward_step_func=self._forward,
            data_iterator=micro_batches,
            model=self.wrapped,
            num_microbatches=self.num_micro_batches,
            seq_length=self.seq_length,
            micro_batch_size=self.config.micro_batch_size,
            forward_only=False,
            p2p_communicator=self._p2p,
            pg_collection=self.groups.collection,
        )
        for part in parts:
            self.loss_sum += part
        return self._update()

    def _forward(self, micro_batches: Iterator[MicroBatch], chunk: TargetChunk):
        batch = next(micro_batches) if self.needs_data else None
        output = chunk(None, None) if batch is None else chunk(batch.tokens, batch.labels)

        def total_loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total, count = (losses * batch.loss_mask).sum(), batch.loss_mask.sum()
            return total, count.int(), torch.stack((total.detach().double(), count.double()))

        return output, total_loss

    @property
    def needs_data(self) -> bool:
        """Whether this rank's stage embeds tokens or compares with labels."""
        return self.groups.is_first_pipeline_stage or self.groups.is_last_pipeline_stage

    def _update(self) -> Step:
        """Clip and step, as the optimizer's own ``step`` does, but look at the gradient's norm before the update."""
        self.optimizer.prepare_grads()
        step = Step(self._gradient_norm(), self.scheduler.get_lr({}))
        if step.is_finite:
            _clip(self.optimizer.get_parameters(), self.config.optimizer.clip_grad, step.grad_norm)
            self.optimizer.step_with_ready_grads()
            self.scheduler.step(1)
        return step

    def _gradient_norm(self) -> float:
        """Norm of the whole model's gradient, the same number on every rank.

        megatron-core's own, without Apex, adds in fp32 (4e-4 off for an embedding's few large rows, so that the result
        depends on how the rows are split) and waits for the device once per weight.
        """
        squares = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        for outer in self.optimizer.chained_optimizers:
            norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in outer.get_main_grads_for_grad_norm()]
            if norms:
                squares += torch.stack(norms).square().sum()
        dist.all_reduce(squares, group=self.optimizer.get_grad_stats_parallel_group())
        return math.sqrt(squares.item())

    def take_loss(self) -> float:
        """Collective: mean loss over all tokens since the last call, on every rank."""
        counted = self.groups.is_last_pipeline_stage and self.groups.tensor_model_parallel_rank == 0
        total = self.loss_sum.clone() if counted else torch.zeros_like(self.loss_sum)
        dist.all_reduce(total, group=self.groups.world_group)
        self.loss_sum.zero_()
        summed, tokens = total.tolist()
        return summed / tokens if tokens else math.nan

    def _inner_optimizers(self) -> list[torch.optim.Optimizer]:
        """torch's (or Apex's) optimizers inside megatron-core's; none for a rank that holds no part of them."""
        return [outer.optimizer for outer in self.optimizer.chained_optimizers if outer.optimizer is not None]

    def loss_parts(self) -> list[list[float]]:
        """Collective: what each data-parallel replica summed up for the next :meth:`take_loss`, by its rank."""
        counted = self.groups.is_last_pipeline_stage and self.groups.tensor_model_parallel_rank == 0
        mine = (self.groups.data_parallel_rank, self.loss_sum.tolist()) if counted else None
        return [part for _, part in sorted(filter(None, all_gather_object(mine, self.groups)))]

    def resume(self, iteration: int, loss_parts: list[list[float]]) -> None:
        """Go on after ``iteration`` iterations, with the losses not yet taken; weights and optimizer are loaded before.

        With another number of replicas the first one takes all of them.
        """
        rank = self.groups.data_parallel_rank
        if len(loss_parts) == self.groups.data_parallel_size:
            mine = loss_parts[rank]
        else:
            mine = [math.fsum(column) if rank == 0 else 0.0 for column in zip(*loss_parts, strict=True)]
        self.loss_sum.copy_(torch.tensor(mine, dtype=torch.float64))
        self.scheduler.num_steps = iteration
        self.scheduler.step(0)


def num_micro_batches(config: PretrainingConfig, groups: Groups) -> int:
    """Forward passes of one replica per iteration; ValueError where the batch sizes don't divide."""
    at_once = config.micro_batch_size * groups.data_parallel_size
    if config.global_batch_size % at_once:
        raise ValueError(
            f"found pretraining.global_batch_size={config.global_batch_size}, expected a multiple of {at_once} "
            f"(micro_batch_size={config.micro_batch_size} x {groups.data_parallel_size} data-parallel ranks): change "
            "pretraining.global_batch_size or pretraining.micro_batch_size"
        )
    return config.global_batch_size // at_once


def _optimizer_config(
    config: PretrainingConfig, params_dtype: torch.dtype, use_distributed_optimizer: bool
) -> MegatronOptimizerConfig:
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
        use_distributed_optimizer=use_distributed_optimizer,
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


def _scheduler(optimizer, settings: OptimizerConfig, total_iterations: int) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then constant or cosine, over all segments of the run together."""
    if settings.lr_decay_style != "constant" and settings.lr_warmup_iters >= total_iterations:
        raise ValueError(
            f"found pretraining.optimizer.lr_warmup_iters={settings.lr_warmup_iters}, expected less than the run's "
            f"{total_iterations} iterations: lower it, or set pretraining.optimizer.lr_decay_style=constant"
        )
    if settings.min_lr > settings.lr:
        raise ValueError(
            f"found pretraining.optimizer.min_lr={settings.min_lr}, expected at most lr={settings.lr}: lower it"
        )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=max(total_iterations, settings.lr_warmup_iters + 1),
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
