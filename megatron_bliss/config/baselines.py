"""Options of the selection methods that runs compare with: the section ``baselines`` of config.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_bliss.config.bounds import bounded

BASELINE_NAMES = ("random", "dsir", "mates")
"""Arms beside bliss: keys of ``baselines.BASELINES``, named here so that options are read without loading models."""
FEWEST_PROBES = 20
"""Of mates, so that two are held out; a rank correlation that says something takes hundreds."""
HELD_OUT = 0.1
"""Share of the probes of mates that its data influence model does not see, as in the paper."""


@dataclass(frozen=True)
class DsirConfig:
    """The arm dsir: importance resampling on hashed n-grams (arXiv 2302.03169), of tokens."""

    buckets: int = bounded(10_000, minimum=1)
    """m, buckets that n-grams are hashed into."""
    max_ngram: int = bounded(2, minimum=1)
    """Longest n-gram counted, in tokens; all shorter ones are, too."""
    noise: float = bounded(1.0, minimum=0)
    """Scale of the Gumbel noise on the log-weights: 1 samples units by weight, 0 takes the heaviest."""


@dataclass(frozen=True)
class MatesConfig:
    """The arm mates: data influence models (arXiv 2406.06046).

    Probing holds the target in fp32 at 20 bytes per parameter of a rank's part (12 with sgd) and takes, per probed
    unit, three forward passes' work on it and one on the reference samples.
    """

    probe_units: int = bounded(10_000, minimum=FEWEST_PROBES)
    """Units of the shard whose influence is measured each round (all, where there are fewer); a tenth is held out."""
    reference_samples: int = bounded(256, minimum=1)
    """Samples of the guiding set on which a probe's loss is measured (all, where there are fewer), drawn each round."""
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


@dataclass(frozen=True)
class BaselinesConfig:
    """Options of selection methods that runs compare with, each an arm of its own."""

    dsir: DsirConfig = field(default_factory=DsirConfig)
    mates: MatesConfig = field(default_factory=MatesConfig)
