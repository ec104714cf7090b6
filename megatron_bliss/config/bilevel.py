"""The bilevel problem and how it is solved: the section ``bilevel``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_bliss.config.bounds import bounded
from megatron_bliss.config.platform import Precision
from megatron_bliss.config.training import OptimizerConfig

KlDirection = Literal["proxy_to_target", "target_to_proxy"]
Curvature = Literal["gauss_newton", "hessian"]


@dataclass(frozen=True)
class BilevelConfig:
    """The bilevel stage: equations (1) to (7) of BLISS (arXiv 2510.06048)."""

    upper_iters: int = bounded(3000, minimum=0)
    """Upper-level steps a round (0: the scores stay those of score.init_from, importance or counts)."""
    lower_iters: int = bounded(1, minimum=1)
    """T, lower-level steps of the proxy per upper-level step."""
    global_batch_size: int = bounded(32, minimum=1)
    """|B|, samples per step over all ranks: the softmax of eq. (2) runs over all of them."""
    micro_batch_size: int = bounded(0, minimum=0)
    """Samples that are on a device at once inside a step (0: all that the rank owns)."""
    offload_target: bool = False
    """Keep the frozen target in the host's memory between its forward passes, when it is too large beside the proxy."""
    params_dtype: Precision = "fp32"
    """Precision of passes over proxy and score model; their weights, sums and optimiser states stay fp32."""
    compile: bool = False
    """Fuse the element-wise work of the second-order passes with torch.compile: half a minute at the start (and a C++
    compiler on a CPU), then faster steps."""
    memory_limit_gib: float = bounded(0.0, minimum=0)
    """Instead of micro_batch_size: the largest split whose step is estimated to stay under this, parameters, optimiser
    states and z not counted (0: no limit)."""
    validation_batch_size: int = bounded(32, minimum=1)
    """Validation samples per upper-level step over all ranks (eq. 4)."""
    guide_weighting: str = "fixed"
    """How the guide's sets are weighted in Phi = sum_k w_k Phi_k."""
    minimax_rate: float = bounded(0.5, above=0)
    """minimax: growth of the log of a set's multiplier per upper step and nat above the control."""
    minimax_slack: float = bounded(0.0)
    """minimax: nats by which a set may be worse than the control (below 0: by which it has to be better)."""
    kl_weight: float = bounded(0.01, minimum=0)
    """gamma, weight of the KL term that ties the proxy to the frozen target (0: no target forward at all)."""
    kl_direction: KlDirection = "proxy_to_target"
    """KL(proxy || target) as the paper writes it, or KL(target || proxy) as its released code computes it."""
    kl_warning_threshold: float = bounded(0.2, minimum=0)
    """A mean KL that stays above this is warned of: the proxy no longer speaks for the target."""
    l2_weight: float = bounded(1e-7, minimum=0)
    """lambda, weight of ||theta_p||^2 in the lower level."""
    weights: str = "softmax"
    """How the weights P of eq. (2) are made of the scores of n samples; a shard's scores are a(f) always."""
    solver: str = "sgd"
    """How eq. (5) is solved."""
    curvature: Curvature = "gauss_newton"
    """C in eq. (5): the positive semi-definite Gauss-Newton matrix, or the Hessian (the paper)."""
    damping: float = bounded(0.05, minimum=0)
    """delta in (C + delta I) z = grad Phi."""
    solver_steps: int = bounded(1, minimum=1)
    """Products of C per upper-level step."""
    solver_max_step_size: float = bounded(1.0, above=0)
    """Largest step eta of the sgd solver, which takes min(this, 0.5 / (largest eigenvalue seen + delta))."""
    proxy_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, lr_decay_style="cosine"))
    """Optimiser of the lower level."""
    score_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, lr_decay_style="cosine"))
    """Optimiser of the upper level. score.family ngram takes far larger steps than a transformer: lr 1e-2 and
    weight_decay 0 worked, with score.activation identity."""
