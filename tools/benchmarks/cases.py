"""What ``benchmark.py bilevel`` measures: one model, one batch, and one function per operation.

gradient            one plain autograd gradient: fused attention, linear head, cross-entropy, ordinary backward pass
double_backward     Hessian product by reverse over reverse, with attention that can be differentiated twice
published_step      the whole upper step of the published scheme (megatron_bliss/bilevel/published.py)
engine_gradient     the engine's gradient
hessian             the engine's Hessian product, with gradient and influences, blocks recomputed
hessian_kept        the same, graphs kept instead of recomputed
gauss_newton        the engine's Gauss-Newton product, with gradient and influences
step                the default whole upper step: score forward, validation gradient, one walk, hypergradient, step of
                    z, both AdamW steps
step_limited        the same under ``bilevel.memory_limit_gib``, which splits the batch
hessian_compiled, gauss_newton_compiled, step_compiled: with element-wise work compiled (``bilevel.compile``)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bliss.base.parallel import World
from megatron_bliss.bilevel import curvature, published
from megatron_bliss.bilevel.execution import ALONE, Execution
from megatron_bliss.bilevel.head import Teacher
from megatron_bliss.bilevel.objective import Loss, Objective
from megatron_bliss.bilevel.train import BilevelTrainer
from megatron_bliss.bilevel.vector import parameter_total
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.models import ModelConfig, ScoreConfig
from megatron_bliss.data.batches import Batch, language_model_mask
from megatron_bliss.models.presets import resolve_architecture
from megatron_bliss.models.score import build_score_model
from megatron_bliss.models.transformer import LanguageModel, build_lm

REFERENCE_TOKENS = 256
"""Length of the one sample on which errors are taken against fp64."""


@dataclass(frozen=True)
class Settings:
    """One point of the grid."""

    model: ModelConfig
    vocab: int
    seq: int
    batch: int
    device: torch.device = torch.device("cpu")
    memory_limit_gib: float = 0.5
    teacher: str | None = None
    """Preset of the frozen target; None: no KL term."""


@dataclass(frozen=True)
class Same:
    """A schedule that has one batch for every step."""

    batch: Batch
    start = 0

    @property
    def stop(self) -> int:
        """Samples of a step."""
        return len(self.batch)

    @property
    def source(self) -> Same:
        """What the batches come from: this."""
        return self

    @property
    def seq_length(self) -> int:
        """Tokens of a sample."""
        return self.batch.tokens.shape[1]

    def at(self, step: int) -> Batch:
        """The batch."""
        return self.batch


class Problem:
    """The model and batch of one grid point; everything else is made when a case asks for it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        arch = resolve_architecture(settings.model, settings.vocab)
        self.model = build_lm(arch, seed=1, device=settings.device)
        self.batch = random_batch(settings, seed=2)
        generator = torch.Generator().manual_seed(3)
        self.weights = torch.softmax(torch.randn(settings.batch, generator=generator), 0).to(settings.device)
        self.vector = torch.randn(parameter_total(self.model), generator=generator).to(settings.device)

    @property
    def loss(self) -> Loss:
        """sum_i P_i l_i: G without KL and L2."""
        return Loss(Objective(), self.batch, self.weights)

    @cached_property
    def target(self) -> LanguageModel | None:
        """The frozen target of the KL term."""
        if self.settings.teacher is None:
            return None
        return build_lm(self.settings.teacher, vocab_size=self.settings.vocab, seed=5, device=self.settings.device)

    @torch.no_grad()
    def teach(self, tokens: Tensor) -> Teacher:
        """The target's view of a batch."""
        return Teacher(self.target.hidden_states(tokens), self.target.output_weight.detach())

    def bilevel(self) -> tuple:
        """Proxy and score model of their own, teacher, train and validation schedule: arguments of a trainer."""
        proxy = copy.deepcopy(self.model)
        score_model = build_score_model(
            ScoreConfig(head_init_std=0.02), proxy.architecture, seed=4, trunk_from=proxy, device=self.settings.device
        )
        teacher = None if self.target is None else self.teach
        return proxy, score_model, teacher, Same(self.batch), Same(random_batch(self.settings, seed=6))

    def config(self, **changes) -> BilevelConfig:
        """The default bilevel stage at this batch size; KL only with a teacher."""
        kl_weight = BilevelConfig().kl_weight if self.target is not None else 0.0
        size = self.settings.batch
        return BilevelConfig(kl_weight=kl_weight, global_batch_size=size, validation_batch_size=size, **changes)


def random_batch(settings: Settings, seed: int) -> Batch:
    """Full rows of random tokens, every token but the first a prediction target."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, settings.vocab, (settings.batch, settings.seq), generator=generator)
    lengths = torch.full((settings.batch,), settings.seq)
    batch = Batch(tokens, language_model_mask(lengths, settings.seq), lengths, torch.arange(settings.batch))
    return batch.to(settings.device)


def autograd_gradient(model: LanguageModel, batch: Batch, weights: Tensor) -> tuple[Tensor, ...]:
    """The gradient of sum_i P_i l_i as one trains a model: fused attention, whole batch, whole logits."""
    hidden = model.hidden_states(batch.tokens)[:, :-1]
    logits = F.linear(hidden.flatten(0, 1), model.output_weight)
    losses = F.cross_entropy(logits, batch.tokens[:, 1:].flatten(), reduction="none").view(len(batch), -1)
    return torch.autograd.grad(weights @ losses.mean(1), list(model.parameters()))


def double_backward(model: LanguageModel, batch: Batch, weights: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
    """H v by reverse over reverse, a tensor per parameter."""
    parameters = list(model.parameters())
    loss = weights @ published.sample_losses(model, batch)[0]
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    parts = vector.split([parameter.numel() for parameter in parameters])
    direction = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
    return published.hessian_product(gradient, parameters, direction, retain_graph=False)


def _product(problem: Problem, kind: str = "hessian", execution: Execution = ALONE) -> Callable:
    return lambda: curvature.curvature_product(problem.model, problem.loss, problem.vector, execution, curvature=kind)


def _step(problem: Problem, trainer: type = BilevelTrainer, **changes) -> Callable:
    world = World(None, 0, 1, problem.settings.device)
    return trainer(problem.config(**changes), *problem.bilevel(), world).step


CASES: dict[str, Callable[[Problem], Callable[[], object]]] = {
    "gradient": lambda p: lambda: autograd_gradient(p.model, p.batch, p.weights),
    "double_backward": lambda p: lambda: double_backward(p.model, p.batch, p.weights, p.vector),
    "published_step": lambda p: _step(p, published.PublishedTrainer),
    "engine_gradient": lambda p: lambda: curvature.gradient(p.model, p.loss),
    "hessian": lambda p: _product(p, execution=Execution(recompute=True)),
    "hessian_kept": lambda p: _product(p, execution=Execution(recompute=False)),
    "gauss_newton": lambda p: _product(p, "gauss_newton"),
    "step": _step,
    "step_limited": lambda p: _step(p, memory_limit_gib=p.settings.memory_limit_gib),
    "hessian_compiled": lambda p: _product(p, execution=Execution(recompute=True, compiled=True)),
    "gauss_newton_compiled": lambda p: _product(p, "gauss_newton", Execution(compiled=True)),
    "step_compiled": lambda p: _step(p, compile=True),
}
"""Case name -> function that makes the case ready and returns what is to be measured."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in fp64."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def error_against_double_backward(product: curvature.CurvatureProduct, reference: tuple[Tensor, ...]) -> float:
    """Relative error of a Hessian product of the engine against double backward on the same batch."""
    return relative_error(product.product.flat, _flat(reference))


def errors_against_fp64(problem: Problem) -> dict[str, float]:
    """Relative errors of both Hessian products against fp64 double backward, on part of one sample."""
    settings = replace(problem.settings, batch=1, seq=min(problem.settings.seq, REFERENCE_TOKENS))
    batch, weights = random_batch(settings, seed=2), problem.weights[:1]
    precise = copy.deepcopy(problem.model).double()
    reference = _flat(double_backward(precise, batch, weights.double(), problem.vector.double()))
    engine = curvature.curvature_product(problem.model, Loss(Objective(), batch, weights), problem.vector).product.flat
    peer = _flat(double_backward(problem.model, batch, weights, problem.vector))
    return {
        "relative_error_fp64": relative_error(engine, reference),
        "double_backward_error_fp64": relative_error(peer, reference),
    }


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
