"""The bilevel stage: lower steps of the proxy, one upper step of the score model, and the loop of one round.

One upper step at (theta_p, theta_s), with 𝓑 the global batch over all ranks:

    P = softmax over 𝓑 of s_i(theta_s)                                           (1), (2)
    b = gradient of Phi at theta_p                                               (4)
    one walk over the proxy: gradient of G, C·z, d_i = <grad l_i, z>             (3), (5), (6)
    theta_s <- AdamW with - sum_i P_i (d_i - sum_j P_j d_j) grad s_i             (7)
    z <- z - eta ((C + delta) z - b)                                             (5), warm-started across steps
    theta_p <- AdamW with the gradient of G

All three unknowns move once per pass, as in SOBA (arXiv 2201.13409): the gradient that the walk makes anyway is the
lower step's, so an upper step costs one walk, one validation gradient, and the score model's forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_bliss.base.platform import DTYPES
from megatron_bliss.bilevel import curvature, vector
from megatron_bliss.bilevel.head import Teacher
from megatron_bliss.bilevel.hypergradient import hypergradient, hypergradient_coefficients, score_batch
from megatron_bliss.bilevel.memory import plan_step
from megatron_bliss.bilevel.monitors import Limits, Monitors, check_replicas
from megatron_bliss.bilevel.precision import SLICE_SAMPLES, ComputeCopy, precision_warnings
from megatron_bliss.bilevel.softmax import global_softmax
from megatron_bliss.bilevel.solve import SolveInfo, SolverState, sgd_step_, solve
from megatron_bliss.config.config import BilevelConfig, ProxyConfig
from megatron_bliss.data.batches import Batch, BatchSchedule
from megatron_bliss.models.optimizer import Optimizer
from megatron_bliss.models.presets import Architecture
from megatron_bliss.models.score import ScoreModel
from megatron_bliss.models.transformer import LanguageModel


@dataclass(frozen=True)
class World:
    """The ranks over which proxy and score model are data-parallel."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    device: torch.device


class ProxyWarmup:
    """Plain next-token training of the proxy: the lower level with equal weights and no KL."""

    def __init__(self, config: ProxyConfig, proxy: LanguageModel, train: BatchSchedule, world: World) -> None:
        self.proxy, self.train, self.world = proxy, train, world
        self.optimizer = Optimizer(proxy, config.warmup_optimizer, config.warmup_iters)
        self.micro_batch_size = config.warmup_micro_batch_size
        self._passes = ComputeCopy(proxy, DTYPES[config.warmup_params_dtype])
        self.steps_done = 0

    def step(self) -> dict[str, float]:
        """One AdamW step; returns what to log."""
        batch = self.train.at(self.steps_done).to(self.world.device)
        weights = torch.full((len(batch),), 1 / self.train.global_batch_size, device=self.world.device)
        options = {"group": self.world.group, "micro_batch_size": self.micro_batch_size}
        loss, gradient = curvature.gradient(self._passes.refresh(), batch, weights, **options)
        norm, rate = self.optimizer.step(gradient)
        self.steps_done += 1
        return {"loss": float(loss), "grad_norm": norm, "lr": rate}

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
        teacher: Callable[[torch.Tensor], Teacher] | None,
        train: BatchSchedule,
        validation: BatchSchedule,
        world: World,
    ) -> None:
        """``teacher(tokens[b, s])``: the frozen target's hidden states for this rank's samples; None without KL."""
        self.config, self.proxy, self.score_model, self.teacher = config, proxy, score_model, teacher
        self.train, self.validation, self.world = train, validation, world
        lower_steps = config.upper_iters * config.lower_iters
        self.proxy_optimizer = Optimizer(proxy, config.proxy_optimizer, lower_steps)
        self.score_optimizer = Optimizer(score_model, config.score_optimizer, config.upper_iters)
        dtype = DTYPES[config.params_dtype]
        self._proxy_passes, self._score_passes = ComputeCopy(proxy, dtype), ComputeCopy(score_model, dtype)
        self.z = vector.zeros(proxy).flat
        self.solver = SolverState()
        self.micro_batch_size, self.recompute = _split(config, proxy, train, validation)
        self.monitors = Monitors(Limits(config.global_batch_size, config.kl_warning_threshold))
        self.steps_done = 0

    def step(self) -> dict[str, float]:
        """T lower steps and one upper step; returns what to log, the same on every rank."""
        first = self.steps_done * self.config.lower_iters
        for lower in range(self.config.lower_iters - 1):
            self._lower_step(first + lower)
        sample = self._sample(first + self.config.lower_iters - 1)
        values, influence = self._move_proxy(sample)
        values["hypergradient_norm"] = self._move_score_model(sample, influence)
        self.steps_done += 1
        return values

    def _move_proxy(self, sample: _Sample) -> tuple[dict[str, float], torch.Tensor]:
        """Validation gradient, a step on the linear system and the last lower step; what to log, and d_i [b].

        The walk's gradient and product, each as large as the proxy, are freed before the score model needs room.
        """
        validation_loss, b = self._validation_gradient()
        info, walk = self._solve(sample, b)
        _, rate = self.proxy_optimizer.step(walk.gradient)
        values = {
            "validation_loss": float(validation_loss),
            "lower_loss": float(walk.loss),
            "lr": rate,
            "residual": info.relative_residual,
            "largest_eigenvalue": info.state.eigenvalue,
            **self._batch_metrics(sample, walk),
        }
        return values, walk.influence

    def _move_score_model(self, sample: _Sample, influence: torch.Tensor) -> float:
        """One AdamW step along the hypergradient (eq. 7); its norm before clipping."""
        coefficients = hypergradient_coefficients(sample.weights, influence, self.world.group)
        upper = hypergradient(
            self._score_passes.refresh(),
            sample.batch,
            coefficients,
            group=self.world.group,
            micro_batch_size=self.micro_batch_size,
        )
        return self.score_optimizer.step(upper)[0]

    def check_precision(self) -> list[str]:
        """Hold one product on the first samples against fp64; warnings, or ``ValueError`` if it is wrong.

        The same samples on every rank, which need not have any of its own.
        """
        batch = self.train.source.batch(self.train.order.ids(0, SLICE_SAMPLES)).to(self.world.device)
        return precision_warnings(self.proxy, batch, DTYPES[self.config.params_dtype], self.config.curvature)

    def watch(self, values: dict[str, float]) -> list[str]:
        """Warnings that have become due with what the last step logged; collective.

        Raises where a number is not finite or replicas differ.
        """
        replicas = {"proxy": _flat(self.proxy), "score model": _flat(self.score_model), "z": self.z}
        check_replicas(replicas, self.world.group)
        return self.monitors.observe(self.steps_done, values)

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

    def _lower_step(self, number: int) -> None:
        """One AdamW step on G alone (eq. 3), with the weights of its own batch."""
        sample = self._sample(number)
        proxy, options = self._proxy_passes.refresh(), self._lower_options(sample)
        _, gradient = curvature.gradient(proxy, sample.batch, sample.weights, **options)
        self.proxy_optimizer.step(gradient)

    def _sample(self, number: int) -> _Sample:
        """The batch of a lower step with scores (1), weights (2) and, with KL, the target's view of it."""
        batch = self.train.at(number).to(self.world.device)
        size = self.micro_batch_size
        scores = score_batch(self._score_passes.refresh(), batch, micro_batch_size=size)
        weights = global_softmax(scores, self.world.group, unit_ids=batch.unit_ids, micro_batch_size=size)
        return _Sample(batch, scores, weights, self.teacher(batch.tokens) if self.teacher else None)

    def _lower_options(self, sample: _Sample) -> dict:
        config = self.config
        return {
            "teacher": sample.teacher,
            "kl_weight": config.kl_weight,
            "kl_direction": config.kl_direction,
            "num_samples": config.global_batch_size,
            "l2_weight": config.l2_weight,
            "group": self.world.group,
            "micro_batch_size": self.micro_batch_size,
            "recompute": self.recompute,
            "compiled": config.compile,
        }

    def _validation_gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Phi and b = grad Phi (eq. 4) on this step's validation batch."""
        batch = self.validation.at(self.steps_done).to(self.world.device)
        weights = curvature.validation_weights(batch, self.world.group)
        options = {"group": self.world.group, "micro_batch_size": self.micro_batch_size, "recompute": self.recompute}
        options["compiled"] = self.config.compile
        loss, gradient = curvature.gradient(self._proxy_passes.refresh(), batch, weights, **options)
        return loss, gradient.flat

    def _solve(self, sample: _Sample, b: torch.Tensor) -> tuple[SolveInfo, curvature.CurvatureProduct]:
        """Move z towards the solution of (C + delta I) z = b; the walk that comes back has d_i and the lower gradient.

        With sgd the walk that measures C z gives d_i at that z, so nothing is computed for them alone.
        """
        config = self.config
        if config.solver == "sgd":
            for index in range(config.solver_steps):
                walk = self._walk(sample, self.z)
                is_last = index == config.solver_steps - 1
                info = sgd_step_(
                    self.z,
                    walk.product.flat,
                    b if is_last else b.clone(),
                    self.solver,
                    config.damping,
                    config.solver_max_step_size,
                    decay=index == 0,
                )
                self.solver = info.state
            return info, walk
        self.z, info = solve(
            lambda z: self._walk(sample, z).product.flat,
            b,
            self.z,
            solver=config.solver,
            steps=config.solver_steps,
            damping=config.damping,
            max_step_size=config.solver_max_step_size,
            state=self.solver,
        )
        self.solver = info.state
        return info, self._walk(sample, self.z)

    def _walk(self, sample: _Sample, z: torch.Tensor) -> curvature.CurvatureProduct:
        options = self._lower_options(sample)
        return curvature.curvature_product(
            self._proxy_passes.refresh(), sample.batch, sample.weights, z, curvature=self.config.curvature, **options
        )

    def _batch_metrics(self, sample: _Sample, walk: curvature.CurvatureProduct) -> dict[str, float]:
        """Sums over the global batch, in one small all-reduce."""
        n, p, s = self.config.global_batch_size, sample.weights.double(), sample.scores.double()
        sums = torch.stack(
            [
                walk.sample_losses.double().sum() / n,
                -(p * p.log()).sum(),
                (p * p).sum(),
                s.sum() / n,
                (s * s).sum() / n,
            ]
        )
        if self.world.group is not None:
            dist.all_reduce(sums, group=self.world.group)
        train_loss, entropy, square, mean, second_moment = sums.tolist()
        return {
            "train_loss": train_loss,
            "kl": float(walk.kl),
            "entropy": entropy,
            "effective_samples": 1 / square,
            "score_mean": mean,
            "score_std": max(0.0, second_moment - mean * mean) ** 0.5,
        }


@dataclass(frozen=True)
class _Sample:
    """A batch of the lower level with its scores s_i [b], weights P_i [b] and the target's view of it."""

    batch: Batch
    scores: torch.Tensor
    weights: torch.Tensor
    teacher: Teacher | None


def _split(
    config: BilevelConfig, proxy: LanguageModel, train: BatchSchedule, validation: BatchSchedule
) -> tuple[int, bool | None]:
    samples = max(1, *(schedule.stop - schedule.start for schedule in (train, validation)))
    seq_length = max(schedule.source.seq_length for schedule in (train, validation))
    device = next(proxy.parameters()).device.type
    return split_batch(config, proxy.architecture, samples, seq_length, device=device)


def split_batch(
    config: BilevelConfig, proxy: Architecture, samples: int, seq_length: int, *, device: str
) -> tuple[int, bool | None]:
    """Samples at once of a rank's ``samples``, and whether blocks are recomputed: as asked for (0: all of them; None:
    where graphs are large), or the largest split under the memory limit."""
    if not config.memory_limit_gib:
        return config.micro_batch_size, None
    plan = plan_step(
        proxy,
        samples,
        seq_length,
        limit_gib=config.memory_limit_gib,
        element_size=DTYPES[config.params_dtype].itemsize,
        device=device,
        teacher=config.kl_weight > 0,
    )
    return plan.micro_batch_size, plan.recompute


def _flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()
