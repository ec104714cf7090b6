"""The trainers: the proxy's warm-up, and the bilevel stage with its lower and upper steps.

One upper step at (theta_p, z, theta_s), with 𝓑 the global batch over all ranks and the default solver:

    P = softmax over 𝓑 of s_i(theta_s)                                           (1), (2)
    b = gradient of Phi at theta_p                                               (4)
    one walk over the proxy at z: gradient of G, C z, d_i = <grad l_i, z>        (3), (5), (6)
    z <- z + eta (b - (C + delta) z)                                             (5), warm-started across steps
    theta_p <- AdamW with the gradient of G                                      (3)
    theta_s <- AdamW with - sum_i P_i (d_i - sum_j P_j d_j) grad s_i             (7)

What stands on the right was all computed at the old values. All three unknowns move once per walk, as in SOBA (arXiv
2201.13409): the gradient that the walk makes anyway is the lower step's, so an upper step costs one walk, one
validation gradient, and the score model's forward and backward.

Shapes: b samples of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_bliss.base.platform import DTYPES
from megatron_bliss.bilevel import curvature, vector
from megatron_bliss.bilevel.domain_weights import DomainWeights
from megatron_bliss.bilevel.execution import Execution
from megatron_bliss.bilevel.guide_weightings import GUIDE_WEIGHTINGS
from megatron_bliss.bilevel.head import Teacher
from megatron_bliss.bilevel.hypergradient import hypergradient, score_batch
from megatron_bliss.bilevel.memory import StepShape, plan_step
from megatron_bliss.bilevel.monitors import Limits, Monitors, batch_metrics, check_replicas
from megatron_bliss.bilevel.objective import Loss, Objective
from megatron_bliss.bilevel.precision import SLICE_SAMPLES, ComputeCopy, precision_warnings
from megatron_bliss.bilevel.solvers import SOLVERS, solve
from megatron_bliss.bilevel.solvers.solver import LinearSystem, SolveInfo, SolverState
from megatron_bliss.bilevel.weights import WEIGHTINGS
from megatron_bliss.bilevel.weights.weighting import GlobalBatch
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.models import ProxyConfig
from megatron_bliss.data.batches import Batch, BatchSchedule
from megatron_bliss.models.optimizer import Optimizer
from megatron_bliss.models.presets import Architecture
from megatron_bliss.models.score import ScoreModel
from megatron_bliss.models.score_architecture import ScoreArchitecture
from megatron_bliss.models.transformer import LanguageModel

if TYPE_CHECKING:
    from megatron_bliss.base.parallel import World


class ProxyWarmup:
    """Plain next-token training of the proxy: the lower level with equal weights and no KL."""

    def __init__(self, config: ProxyConfig, proxy: LanguageModel, train: BatchSchedule, world: World) -> None:
        self.proxy, self.train, self.world = proxy, train, world
        self.optimizer = Optimizer(proxy, config.warmup_optimizer, config.warmup_iters)
        self.execution = Execution(world.world_group, config.warmup_micro_batch_size)
        self._passes = ComputeCopy(proxy, DTYPES[config.warmup_params_dtype])
        self.steps_done = 0

    def step(self) -> dict[str, float]:
        """One AdamW step; returns what to log."""
        batch = self.train.at(self.steps_done).to(self.world.device)
        weights = torch.full((len(batch),), 1 / self.train.global_batch_size, device=self.world.device)  # [b]
        found = curvature.gradient(self._passes.refresh(), Loss(Objective(), batch, weights), self.execution)
        norm, rate = self.optimizer.step(found.gradient)
        self.steps_done += 1
        return {"loss": float(found.loss), "grad_norm": norm, "lr": rate}

    def watch(self, values: dict[str, float]) -> list[str]:
        """Nothing to warn of: the optimiser stops at a gradient that is not finite."""
        return []

    def state_dict(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "steps_done": self.steps_done,
            "proxy": self.proxy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state_dict()``."""
        self.steps_done = int(state["steps_done"])
        self.proxy.load_state_dict(state["proxy"])
        self.optimizer.load_state_dict(state["optimizer"])


class BilevelTrainer:
    """Proxy, score model and linear system of one round; ``step()`` is one upper-level step."""

    def __init__(
        self,
        config: BilevelConfig,
        proxy: LanguageModel,
        score_model: ScoreModel,
        teacher: Callable[[Tensor], Teacher] | None,
        train: BatchSchedule,
        validation: BatchSchedule,
        world: World,
        domains: DomainWeights | None = None,
    ) -> None:
        """``teacher(tokens[b, s])``: the frozen target's hidden states for this rank's samples; None without KL.

        ``domains``: of the units of ``train``, whose weights are logged; None: of none.
        """
        self.config, self.proxy, self.score_model, self.teacher = config, proxy, score_model, teacher
        self.train, self.validation, self.world = train, validation, world
        lower_steps = config.upper_iters * config.lower_iters
        self.proxy_optimizer = Optimizer(proxy, config.proxy_optimizer, lower_steps)
        self.score_optimizer = Optimizer(score_model, config.score_optimizer, config.upper_iters)
        dtype = DTYPES[config.params_dtype]
        self._proxy_passes, self._score_passes = ComputeCopy(proxy, dtype), ComputeCopy(score_model, dtype)
        self.z = vector.zeros(proxy).flat  # of the master's size and dtype, whatever passes run in
        self.solver = SolverState()
        self.objective = Objective(config.kl_weight, config.kl_direction, config.l2_weight, config.global_batch_size)
        split = _split(config, proxy, score_model.score_architecture, train, validation)
        self.execution = Execution(world.world_group, *split, compiled=config.compile)
        weighted = GUIDE_WEIGHTINGS[config.guide_weighting]
        self.upper = weighted.upper_level(config, proxy, validation, world, self.execution)
        self.weighting = WEIGHTINGS[config.weights]
        sigmoid = score_model.activation == "sigmoid" and not self.weighting.of_raw_scores
        self.monitors = Monitors(Limits(config.global_batch_size, config.kl_warning_threshold, sigmoid))
        self.domains = domains or DomainWeights()
        self.steps_done = 0

    def step(self) -> dict[str, float]:
        """T lower steps and one upper step; returns what to log, the same on every rank."""
        first = self.steps_done * self.config.lower_iters
        for lower in range(self.config.lower_iters - 1):
            self._lower_step(first + lower)
        sample = self._sample(first + self.config.lower_iters - 1)
        values, influence = self._move_proxy(sample)
        self.upper.follow(self._lower_loss(sample))  # here, where the walk's vectors are gone
        values["hypergradient_norm"] = self._move_score_model(sample, influence)
        self.steps_done += 1
        return values

    def _move_proxy(self, sample: _Sample) -> tuple[dict[str, float], Tensor]:
        """Validation gradient, a step on the linear system and the last lower step; what to log, and d_i [b].

        The walk's gradient and product, each as large as the proxy, are freed before the score model needs room.
        """
        # at theta_p before its step, as the walk
        upper, of_sets = self.upper.step(self._proxy_passes.refresh(), self.steps_done)
        info, walk = self._solve(sample, upper.gradient.flat)
        _, rate = self.proxy_optimizer.step(walk.gradient)
        values = {
            "validation_loss": float(upper.loss),
            **of_sets,
            "lower_loss": float(walk.loss),
            "lr": rate,
            "residual": info.relative_residual,
            "largest_eigenvalue": info.state.eigenvalue,
            **self._batch_metrics(sample, walk),
        }
        return values, walk.influence

    def _move_score_model(self, sample: _Sample, influence: Tensor) -> float:
        """One AdamW step along the hypergradient (eq. 7); its norm before clipping."""
        scored = sample.scores, sample.weights, influence
        coefficients = self.weighting.coefficients(*scored, self._global_batch(sample.batch))
        raw, model = self.weighting.of_raw_scores, self._score_passes.refresh()
        upper = hypergradient(model, sample.batch, coefficients, self.execution, raw=raw)
        return self.score_optimizer.step(upper)[0]

    def check_precision(self) -> list[str]:
        """Hold one product on the first samples against fp64; warnings, or ``ValueError`` if it is wrong.

        The same samples on every rank, which need not have any of its own.
        """
        batch = self.train.source.batch(self.train.order.ids(0, SLICE_SAMPLES)).to(self.world.device)
        return precision_warnings(self.proxy, batch, DTYPES[self.config.params_dtype], self.config.curvature)

    def watch(self, values: dict[str, float]) -> list[str]:
        """Warnings that have become due with what the last step logged; collective.

        Means over steps since the last call start anew. Raises where a number is not finite or replicas differ.
        """
        replicas = {"proxy": _flat(self.proxy), "score model": _flat(self.score_model), "z": self.z}
        check_replicas(replicas | self.upper.replicas(), self.world.world_group)
        self.domains.begin_interval()
        return self.monitors.observe(self.steps_done, values)

    def learned(self) -> dict[str, Any]:
        """Both models, as a stage leaves them, and a control."""
        models = {"proxy": self.proxy.state_dict(), "score_model": self.score_model.state_dict()}
        return models | self.upper.learned()

    def state_dict(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "steps_done": self.steps_done,
            "proxy": self.proxy.state_dict(),
            "score_model": self.score_model.state_dict(),
            "proxy_optimizer": self.proxy_optimizer.state_dict(),
            "score_optimizer": self.score_optimizer.state_dict(),
            "z": self.z,
            "solver": self.solver.state_dict(),
            "monitors": self.monitors.state_dict(),
            "upper": self.upper.state_dict(),
            "domains": self.domains.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state_dict()``."""
        self.steps_done = int(state["steps_done"])
        self.proxy.load_state_dict(state["proxy"])
        self.score_model.load_state_dict(state["score_model"])
        self.proxy_optimizer.load_state_dict(state["proxy_optimizer"])
        self.score_optimizer.load_state_dict(state["score_optimizer"])
        self.z.copy_(state["z"])
        self.solver = SolverState.from_state_dict(state["solver"])
        self.monitors.load_state_dict(state["monitors"])
        self.upper.load_state_dict(state.get("upper", {}))  # states of before there was a choice have none
        self.domains.load_state_dict(state.get("domains"))

    def _lower_step(self, number: int) -> None:
        """One AdamW step on G alone (eq. 3), with the weights of its own batch."""
        loss = self._lower_loss(self._sample(number))
        self.proxy_optimizer.step(curvature.gradient(self._proxy_passes.refresh(), loss, self.execution).gradient)
        self.upper.follow(loss)

    def _sample(self, number: int) -> _Sample:
        """The batch of a lower step with scores (1), weights (2) and, with KL, the target's view of it."""
        batch = self.train.at(number).to(self.world.device)
        size, raw = self.execution.micro_batch_size, self.weighting.of_raw_scores
        scores = score_batch(self._score_passes.refresh(), batch, micro_batch_size=size, raw=raw)  # [b]
        weights = self.weighting.weights(scores, self._global_batch(batch))
        self.domains.see(batch.unit_ids, weights, self.config.global_batch_size)
        return _Sample(batch, scores, weights, self.teacher(batch.tokens) if self.teacher else None)

    def _global_batch(self, batch: Batch) -> GlobalBatch:
        size = self.execution.micro_batch_size
        return GlobalBatch(self.config.global_batch_size, self.world.world_group, batch.unit_ids, size)

    def _lower_loss(self, sample: _Sample) -> Loss:
        """G (eq. 3) on this rank's samples."""
        return Loss(self.objective, sample.batch, sample.weights, sample.teacher)

    def _solve(self, sample: _Sample, b: Tensor) -> tuple[SolveInfo, curvature.CurvatureProduct]:
        """Move z towards the solution of (C + delta I) z = b (eq. 5), and the walk that the rest of the step uses.

        Every walk gives the gradient of G and the influences d_i at its z beside C z. So no walk is made for d_i alone
        where they are wanted at the z of the last product.
        """
        config, keep_last = self.config, SOLVERS[self.config.solver].last_product_gives_influences
        loss, walk = self._lower_loss(sample), None

        def product(z: Tensor) -> Tensor:
            nonlocal walk
            walk = None  # its vectors are freed before the next walk makes its own
            made = self._walk(loss, z)
            walk = made if keep_last else None
            return made.product.flat

        system = LinearSystem(product, b, config.damping)
        limit = config.solver_max_step_size
        self.z, info = solve(config.solver, system, self.z, self.solver, steps=config.solver_steps, max_step_size=limit)
        self.solver = info.state
        return info, self._walk(loss, self.z) if walk is None else walk

    def _walk(self, loss: Loss, z: Tensor) -> curvature.CurvatureProduct:
        proxy, kind = self._proxy_passes.refresh(), self.config.curvature
        return curvature.curvature_product(proxy, loss, z, self.execution, curvature=kind)

    def _batch_metrics(self, sample: _Sample, walk: curvature.CurvatureProduct) -> dict[str, float]:
        batch, kl = self._global_batch(sample.batch), float(walk.kl)
        of_samples = sample.weights, sample.scores, walk.sample_losses
        return batch_metrics(*of_samples, kl, batch, self.weighting, self.domains)


@dataclass(frozen=True)
class _Sample:
    """A batch of the lower level with its scores s_i [b], weights P_i [b] and the target's view of it."""

    batch: Batch
    scores: Tensor
    weights: Tensor
    teacher: Teacher | None


def _split(
    config: BilevelConfig,
    proxy: LanguageModel,
    score: ScoreArchitecture,
    train: BatchSchedule,
    validation: BatchSchedule,
) -> tuple[int, bool | None]:
    samples = max(1, *(schedule.stop - schedule.start for schedule in (train, validation)))
    seq_length = max(schedule.source.seq_length for schedule in (train, validation))
    device = next(proxy.parameters()).device.type
    return split_batch(config, proxy.architecture, samples, seq_length, device=device, score=score)


def split_batch(
    config: BilevelConfig,
    proxy: Architecture,
    samples: int,
    seq_length: int,
    *,
    device: str,
    score: ScoreArchitecture,
) -> tuple[int, bool | None]:
    """Samples at once of a rank's ``samples``, and whether blocks are recomputed: as asked for (0: all of them; None:
    where graphs are large), or the largest split under the memory limit."""
    if not config.memory_limit_gib:
        return config.micro_batch_size, None
    element_size = DTYPES[config.params_dtype].itemsize
    shape = StepShape(proxy, seq_length, element_size, device, teacher=config.kl_weight > 0, score=score)
    plan = plan_step(shape, samples, config.memory_limit_gib)
    return plan.micro_batch_size, plan.recompute


def _flat(model: torch.nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()
