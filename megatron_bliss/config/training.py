"""The target's training, and the optimiser that every model has: the section ``pretraining``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_bliss.config.bounds import bounded

DecayStyle = Literal["constant", "linear", "cosine", "WSD"]
WsdDecayStyle = Literal["linear", "cosine", "exponential", "minus_sqrt"]
BranchDecayStyle = Literal["linear", "minus_sqrt"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with gradient clipping."""

    lr: float = bounded(1e-3, above=0)
    """Peak learning rate."""
    min_lr: float = bounded(0.0, minimum=0)
    """Learning rate at the end of the decay."""
    lr_decay_style: DecayStyle = "constant"
    """What happens to the learning rate after warm-up; WSD is constant until the last lr_wsd_decay_iters."""
    lr_wsd_decay_iters: int = bounded(0, minimum=0)
    """With WSD: iterations at the end over which the learning rate falls to min_lr."""
    lr_wsd_decay_style: WsdDecayStyle = "exponential"
    """With WSD: how it falls; minus_sqrt is 1 - sqrt(share of the decay that is done)."""
    lr_warmup_iters: int = bounded(0, minimum=0)
    """Iterations over which the learning rate rises linearly from 0."""
    weight_decay: float = bounded(0.1, minimum=0)
    """Decoupled weight decay (not on norms and biases)."""
    adam_beta1: float = bounded(0.9, minimum=0, below=1)
    """Decay of the first moment."""
    adam_beta2: float = bounded(0.95, minimum=0, below=1)
    """Decay of the second moment."""
    adam_eps: float = bounded(1e-8, above=0)
    """Added to the root of the second moment."""
    clip_grad: float = bounded(1.0, minimum=0)
    """Largest global gradient norm (0: no clipping)."""


@dataclass(frozen=True)
class PretrainingConfig:
    """The target's training: one warm-up segment and one segment per round."""

    warmup_iters: int = bounded(10000, minimum=1)
    """Iterations on the random warm-up shard, shared by all arms."""
    train_iters: int = bounded(10000, minimum=1)
    """Iterations a round on the selection."""
    micro_batch_size: int = bounded(8, minimum=1)
    """Samples of one forward pass of one model replica."""
    global_batch_size: int = bounded(512, minimum=1)
    """Samples per iteration over all replicas."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr_warmup_iters=2000))
    """Optimiser and learning-rate schedule over all segments together."""
    use_distributed_optimizer: bool = True
    """Shard optimiser states over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights from data-parallel ranks while the next forward pass goes on (needs both above)."""
    decay_branch_iters: int = bounded(0, minimum=0)
    """After every segment, train a copy this much longer while its learning rate falls to optimizer.min_lr, to be
    evaluated in the main line's place (0: none; the paper: 200)."""
    decay_branch_style: BranchDecayStyle = "linear"
    """How the decay branch's learning rate falls."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite: end the run, or leave the iteration's update out and go on."""
    max_consecutive_skips: int = bounded(10, minimum=0)
    """A run that leaves out more updates than this in a row is stopped."""
    loss_spike_factor: float = bounded(0.0, minimum=0)
    """A loss above this many times the median of recent ones is a spike (0: none is)."""
    loss_spike_window: int = bounded(100, minimum=1)
    """Iterations whose losses count as recent; before a segment has so many, nothing is a spike."""
    on_loss_spike: Literal["warn", "skip", "stop"] = "warn"
    """At a loss spike: say so, leave the iteration's update out, or end the run."""
    eval_interval: int = bounded(1000, minimum=1)
    """Iterations between evaluations on data.test_prefixes."""
