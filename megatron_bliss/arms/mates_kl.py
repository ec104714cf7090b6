"""MATES (arXiv 2406.06046) with the proxy in the place of the target: does alignment matter, or convergence?

1. **Tie**: the round's bilevel stage trains the proxy on random samples with equal weights and the KL to the target
   (bilevel/tied.py), for as many steps as the lower level of the arm bliss has.
2. **Probe, regress, score** as mates.py does, with one step of that proxy in the place of the target's.

Its gain over mates at bilevel.kl_weight 0 is what more training of a small model brings; what a weight above 0 adds is
what the tie to the target brings. A probe costs the proxy's passes, not the target's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_bliss.arms.arm import Arm, Memory, Shard, Sizes
from megatron_bliss.arms.inputs import Inputs, Scores
from megatron_bliss.arms.mates import MatesConfig, draw_probes, mates_flops, predict
from megatron_bliss.bilevel.scheme import Scheme
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.bounds import bounded
from megatron_bliss.models.presets import Architecture, parameter_count
from megatron_bliss.models.score_architecture import ScoreArchitecture


@dataclass(frozen=True)
class MatesKlConfig(MatesConfig):
    """The arm mates_kl: as mates, but a proxy that is tied to the target by bilevel.kl_weight is probed.

    The proxy is trained with the numbers of steps and samples, the optimiser and the KL of the section bilevel.
    """

    micro_batch_size: int = bounded(16, minimum=1)
    """Reference samples of one forward pass of the proxy."""
    lr: float = bounded(0.0, minimum=0)
    """Learning rate of a probe's step (0: bilevel.proxy_optimizer.lr)."""


def scores(options: MatesKlConfig, inputs: Inputs) -> Scores:
    """Predicted influences on the tied proxy, in standard deviations of the probed ones."""
    from megatron_bliss.arms.probing import measure_influences
    from megatron_bliss.arms.proxy_probing import proxy_oracle, proxy_step

    probes = draw_probes("mates_kl", options, inputs)
    proxy, adam = inputs.load_tied_proxy()
    lr = options.lr or adam["lr"]
    step_of = partial(proxy_step, adam=adam, optimizer=options.optimizer, lr=lr, clip_grad=options.clip_grad)
    oracle = proxy_oracle(inputs, proxy, step_of, probes.reference)
    influences = measure_influences(inputs, probes.units, oracle, "mates_kl")
    return predict("mates_kl", options, inputs, probes, influences, lr, proxy.architecture)


def work(options: MatesKlConfig, shard: Shard) -> tuple[int, float]:
    """The shard, once, and the FLOPs of probes whose units are as long as they can be."""
    probed = min(options.probe_units, shard.units)
    return shard.tokens, mates_flops(
        options,
        shard.proxy,
        shard.proxy,
        shard.seq_length,
        probed_units=probed,
        probed_tokens=probed * shard.seq_length,
        reference_tokens=shard.reference_tokens(options.reference_samples),
        shard_tokens=shard.tokens,
    )


def memory(options: MatesKlConfig, sizes: Sizes) -> Memory:
    """Probes: the proxy in fp32, a gradient on one unit, Adam's moments, and the weights to go back to."""
    from megatron_bliss.arms.losses import working_bytes
    from megatron_bliss.bilevel.memory import StepShape, planned_gradient_bytes
    from megatron_bliss.target.memory import FP32_BYTES, MOMENT_BYTES

    weights = FP32_BYTES * parameter_count(sizes.proxy)
    moments = weights // FP32_BYTES * MOMENT_BYTES if options.optimizer == "adam" else 0
    shape = StepShape(sizes.proxy, sizes.seq_length, FP32_BYTES, sizes.device)
    backward = planned_gradient_bytes(shape, 1, None, 0)
    forward = working_bytes(sizes.proxy, options.micro_batch_size * sizes.seq_length, FP32_BYTES, sizes.device)
    advice = "lower baselines.mates_kl.micro_batch_size, or set baselines.mates_kl.optimizer sgd"
    return Memory("mates_kl probes", weights, weights, moments, weights + max(backward, forward), advice)


def options(run: BilevelConfig) -> BilevelConfig:
    """The run's; nothing is learnt on the guide in this stage, so there is nothing to weight its sets by."""
    return replace(run, guide_weighting="fixed")


def _trainer(*arguments: Any) -> Any:
    from megatron_bliss.bilevel.tied import TiedProxyTrainer

    return TiedProxyTrainer(*arguments)


def _flops(
    config: BilevelConfig, proxy: Architecture, target: Architecture, seq_length: int, score: ScoreArchitecture | None
) -> float:
    from megatron_bliss.bilevel.tied import tied_flops

    return tied_flops(config, proxy, target, seq_length, score)


def _working(config: BilevelConfig, shape: Any, samples: int, kept: int) -> tuple[int, int]:
    from megatron_bliss.bilevel.tied import tied_bytes

    return tied_bytes(config, shape, samples, kept)


ARM = Arm(
    "as mates, but what is probed is a proxy that was tied to the target by bilevel.kl_weight",
    scores,
    settings=MatesKlConfig,
    reads_proxy=True,
    stages=("bilevel",),
    bilevel_options=options,
    scheme=Scheme(
        trainer=_trainer,
        flops=_flops,
        batches=lambda config: config.lower_iters,
        working=_working,
        held_vectors=0,
        summed_vectors=lambda config: config.lower_iters,  # gradients
        to_shrink="set bilevel.micro_batch_size",
        learns_scores=False,
    ),
    work=work,
    params_dtype="fp32",
    memory=memory,
)
