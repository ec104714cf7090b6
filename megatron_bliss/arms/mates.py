"""Data selection by influence on the model as it is now (MATES, arXiv 2406.06046), each round anew.

1. **Probe** a random part of the shard: by how much does one step of the arm's present target on a unit alone lower its
   loss on the reference set? (probing.py)
2. **Regress**: a small data influence model learns that from the unit's tokens, by mean squared error.
3. **Score** the whole shard by it.

As in the paper, a probe's step is what the target's next training step would be (Adam from its saved moments, clipped
gradient), influences are standardised, and a tenth of the probes is held out to rank-correlate predictions with them.
Unlike there, the data influence model is the warmed-up proxy's trunk and not a pre-trained BERT, so that no outside
judge is used, and its last state is taken, not its best. The paper draws its selection with Gumbel noise:
``--selection.policy gumbel`` does (a score of 1 is one standard deviation of the probes), any other policy works, too.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from megatron_bliss.arms.arm import Arm, Memory, Shard, Sizes
from megatron_bliss.arms.inputs import Inputs, Scores
from megatron_bliss.config.bounds import bounded
from megatron_bliss.models.flops import BACKWARD_TO_FORWARD
from megatron_bliss.models.presets import Architecture, flops_per_token, trunk_flops_per_token

FEWEST_PROBES = 20
"""So that two are held out; a rank correlation that says something takes hundreds."""
HELD_OUT = 0.1
"""Share of the probes that the data influence model does not see, as in the paper."""
NOISE = 0.1
"""A held-out rank correlation below this is warned of."""


@dataclass(frozen=True)
class MatesConfig:
    """The arm mates: data influence models (arXiv 2406.06046).

    Probing holds the target in fp32 at 20 bytes per parameter of a rank's part (12 with sgd) and takes, per probed
    unit, three forward passes' work on it and one on the reference samples.
    """

    probe_units: int = bounded(10_000, minimum=FEWEST_PROBES)
    """Units of the shard whose influence is measured each round (all, where there are fewer); a tenth is held out."""
    reference_samples: int = bounded(256, minimum=1)
    """Samples of the guide on which a probe's loss is measured (all, where there are fewer), drawn each round."""
    micro_batch_size: int = bounded(16, minimum=1)
    """Reference samples of one forward pass of one replica of the target."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """A probe's step: Adam from the target's saved moments, as training and the paper do, or along the gradient."""
    lr: float = bounded(0.0, minimum=0)
    """Learning rate of a probe's step (0: pretraining.optimizer.lr)."""
    clip_grad: float = bounded(1.0, minimum=0)
    """Largest norm of a probed unit's gradient (0: no clipping)."""
    regressor_iters: int = bounded(1000, minimum=1)
    """Steps of the data influence model (the proxy's trunk with a linear unit) on the probed units."""
    regressor_batch_size: int = bounded(64, minimum=1)
    """Probed units per step over all ranks."""
    regressor_lr: float = bounded(5e-5, above=0)
    """Learning rate of the data influence model at its first step; it falls linearly to 0."""
    regressor_weight_decay: float = bounded(0.01, minimum=0)
    """Its decoupled weight decay (not on norms and biases)."""


def scores(options: MatesConfig, inputs: Inputs) -> Scores:
    """Predicted influences, in standard deviations of the probed ones."""
    from megatron_bliss.arms import probing

    probes = draw_probes("mates", options, inputs)
    lr = options.lr or inputs.target_optimizer.lr
    step_of = partial(probing.make_step, inputs, options.optimizer, lr, options.clip_grad)
    oracle = probing.target_oracle(inputs, probes.reference, step_of)
    influences = probing.measure_influences(inputs, probes.units, oracle, "mates")
    return predict("mates", options, inputs, probes, influences, lr, inputs.target_architecture)


@dataclass(frozen=True)
class Probes:
    """What a round measures: units of the shard, int64 [n] in random order, on batches of reference samples."""

    units: np.ndarray
    reference: list[Any]
    """Batch objects; their type would load torch when options are read (arm.py)."""


def draw_probes(name: str, options: MatesConfig, inputs: Inputs) -> Probes:
    """The round's probes for the arm ``name``; ValueError where the shard is too small."""
    from megatron_bliss.arms import probing

    units = probing.draw(len(inputs.source), options.probe_units, inputs.seed, 0)
    if len(units) < FEWEST_PROBES:
        raise ValueError(
            f"found {len(units)} units to probe in the shard, expected {FEWEST_PROBES} or more: use fewer rounds or a "
            f"larger corpus, or leave out the arm {name}"
        )
    return Probes(units, probing.reference_batches(inputs, options.reference_samples, options.micro_batch_size))


def predict(
    name: str,
    options: MatesConfig,
    inputs: Inputs,
    probes: Probes,
    influences: np.ndarray,
    lr: float,
    probed: Architecture,
) -> Scores:
    """Scores of the whole shard by a small model that has learned ``influences`` [n] of the probes.

    lr: of a probe's step; probed: the model that was probed.
    """
    from megatron_bliss.arms.influence_model import Regression, learn_influences
    from megatron_bliss.arms.reading import score_by_scorer, scorer_of

    regression = Regression(
        name,
        options.regressor_iters,
        options.regressor_batch_size,
        options.regressor_lr,
        options.regressor_weight_decay,
        HELD_OUT,
    )
    model, correlation = learn_influences(regression, inputs, probes.units, influences)
    scorer = scorer_of(model, inputs)
    values = score_by_scorer(scorer, inputs, inputs.folder / "blocks", name)
    settings = {
        "method": name,
        "probes": len(probes.units),
        "reference_samples": sum(len(batch) for batch in probes.reference),
        "optimizer": options.optimizer,
        "lr": lr,
        "clip_grad": options.clip_grad,
        "regressor_iters": options.regressor_iters,
        "influence_mean": float(influences.mean()),
        "influence_std": float(influences.std()),
        "held_out_spearman": correlation,
    }
    lengths = np.minimum(inputs.source.corpus.lengths[probes.units], inputs.source.seq_length)
    flops = mates_flops(
        options,
        model.architecture,
        probed,
        inputs.source.seq_length,
        probed_units=len(probes.units),
        probed_tokens=int(lengths.sum()),
        reference_tokens=sum(int(batch.lengths.sum()) for batch in probes.reference),
        shard_tokens=inputs.source.corpus.num_tokens,
    )
    return Scores(values, settings, flops, _warnings(name, correlation, inputs), scorer)


def _warnings(name: str, correlation: float, inputs: Inputs) -> list[str]:
    if correlation >= NOISE:
        return []
    warning = (
        f"{inputs.description}: predicted influences have a rank correlation of {correlation:.3f} with measured ones "
        f"on held-out probes, below {NOISE}: the scores of {name} are noise; raise baselines.{name}.probe_units, "
        "reference_samples or regressor_iters, or use a larger proxy"
    )
    if inputs.groups.is_main:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return [warning]


# Work and memory


def mates_flops(
    options: MatesConfig,
    proxy: Architecture,
    probed: Architecture,
    seq_length: int,
    *,
    probed_units: int,
    probed_tokens: int,
    reference_tokens: int,
    shard_tokens: int,
) -> float:
    """One round: probes (a gradient each, and the reference set before all and after each), the data
    influence model's training and held-out predictions, and its pass over the shard."""
    training = 1 + BACKWARD_TO_FORWARD
    read_by_probed = training * probed_tokens + (probed_units + 1) * reference_tokens
    regressed = training * options.regressor_iters * options.regressor_batch_size * probed_tokens / probed_units
    read_by_model = regressed + HELD_OUT * probed_tokens + shard_tokens
    return read_by_probed * flops_per_token(probed, seq_length) + read_by_model * trunk_flops_per_token(
        proxy, seq_length
    )


def work(options: MatesConfig, shard: Shard) -> tuple[int, float]:
    """The shard, once, and the FLOPs of probes whose units are as long as they can be."""
    probed = min(options.probe_units, shard.units)
    return shard.tokens, mates_flops(
        options,
        shard.proxy,
        shard.target,
        shard.seq_length,
        probed_units=probed,
        probed_tokens=probed * shard.seq_length,
        reference_tokens=shard.reference_tokens(options.reference_samples),
        shard_tokens=shard.tokens,
    )


def memory(options: MatesConfig, sizes: Sizes) -> Memory:
    """Probes: the target in fp32, a gradient on one unit, Adam's moments, and the weights to go back to."""
    from megatron_bliss.target.memory import FP32_BYTES, MOMENT_BYTES, activation_bytes, forward_bytes

    weights = FP32_BYTES * sizes.target_weights
    moments = MOMENT_BYTES * sizes.target_weights if options.optimizer == "adam" else 0
    one_unit = {"stage": 0, "micro_batches": 1, "tokens": sizes.seq_length, "element_size": FP32_BYTES}
    backward = activation_bytes(sizes.target_config, sizes.target, **one_unit)
    tokens = options.micro_batch_size * sizes.seq_length
    forward = forward_bytes(sizes.target_config, sizes.target, tokens, FP32_BYTES, with_logits=True)
    advice = (
        "raise target.tensor_model_parallel_size or target.pipeline_model_parallel_size, lower "
        "baselines.mates.micro_batch_size, or set baselines.mates.optimizer sgd"
    )
    return Memory("mates probes", weights, weights, moments, weights + max(backward, forward), advice)


ARM = Arm(
    "what one training step on a unit does for the target's loss, measured on some, learned by a small model",
    scores,
    paper="2406.06046",
    settings=MatesConfig,
    reads_proxy=True,
    work=work,
    params_dtype="fp32",
    memory=memory,
)
