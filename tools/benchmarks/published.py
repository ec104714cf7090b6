"""The upper step of the published BLISS code, as the peer that the bilevel engine is measured against.

The proxy is a plain module with materialised attention; b is the batch of one process.

1. T lower steps: teacher, proxy and score forward, loss sum_i P_i l_i + lambda ||theta||² + gamma KL, backward,
   gradient clipped to a global norm of 1, AdamW
2. gradient of one validation batch
3. on an outer batch of its own: the gradient of the lower loss with its graph kept (``create_graph``)
4. three times: a Hessian product on the retained graph, residual H z - grad Phi + 0.01 z, clipped to norm 1 tensor by
   tensor, z <- z - 0.01 residual; z starts anew at 1 / numel in every tensor
5. (z averaged over ranks: this is one process)
6. for each of the b samples alone: score forward and full gradient, proxy forward and full gradient, all kept
7. - sum_i P_i (d_i - sum_j P_j d_j) grad s_i from those gradients, d_i = <grad l_i, z>; clipped tensor by tensor; AdamW

Two things differ from the released code, so that both sides compute the same: attention is causal, and the softmax of
P is the current one over the batch at hand, not the previous step's. Nothing is done to slow it down: scores that need
no gradient are made without a graph, the head sees predicting positions alone, the graph is freed after its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bliss.bilevel.head import Teacher
from megatron_bliss.bilevel.hypergradient import score_batch
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.data.batches import Batch, BatchSchedule
from megatron_bliss.models.optimizer import Optimizer
from megatron_bliss.models.score import ScoreModel
from megatron_bliss.models.transformer import LanguageModel

SOLVER_STEPS = 3
SOLVER_STEP_SIZE = 0.01
DAMPING = 0.01
LARGEST_NORM = 1.0
"""Of a residual or of the hypergradient, in each tensor by itself."""


class PublishedTrainer:
    """The published upper step with the interface of ``BilevelTrainer``: ``step()`` is one upper-level step.

    Of ``config`` the lower level, the optimisers and the numbers of steps are used; the solver is the published one.
    """

    def __init__(
        self,
        config: BilevelConfig,
        proxy: LanguageModel,
        score_model: ScoreModel,
        teacher: Callable[[Tensor], Teacher] | None,
        train: BatchSchedule,
        validation: BatchSchedule,
    ) -> None:
        self.config, self.proxy, self.score_model, self.teacher = config, proxy, score_model, teacher
        self.train, self.validation = train, validation
        self.proxy_optimizer = Optimizer(proxy, config.proxy_optimizer, config.upper_iters * config.lower_iters)
        unclipped = replace(config.score_optimizer, clip_grad=0.0)
        self.score_optimizer = Optimizer(score_model, unclipped, config.upper_iters)
        self.steps_done = 0

    def step(self) -> dict[str, float]:
        """T lower steps and one upper step; a step draws T + 1 batches."""
        first = self.steps_done * (self.config.lower_iters + 1)
        for lower in range(self.config.lower_iters):
            lower_loss = self._lower_step(self.train.at(first + lower))
        outer = self.train.at(first + self.config.lower_iters)
        validation_loss, b = validation_gradient(self.proxy, self.validation.at(self.steps_done))
        z = self._solve(outer, b)
        upper = clip_each(hypergradient(self.proxy, self.score_model, outer, z))
        norm, _ = self.score_optimizer.step(_named(self.score_model, upper))
        self.steps_done += 1
        return {"lower_loss": lower_loss, "validation_loss": validation_loss, "hypergradient_norm": norm}

    def _lower_step(self, batch: Batch) -> float:
        loss = self._lower_loss(batch)
        self.proxy_optimizer.step(_named(self.proxy, torch.autograd.grad(loss, list(self.proxy.parameters()))))
        return float(loss.detach())

    def _solve(self, outer: Batch, b: Sequence[Tensor]) -> list[Tensor]:
        parameters = list(self.proxy.parameters())
        gradient = torch.autograd.grad(self._lower_loss(outer), parameters, create_graph=True)
        return solve(gradient, parameters, b)

    def _lower_loss(self, batch: Batch) -> Tensor:
        """G (eq. 3) at this batch's own weights."""
        weights = torch.softmax(score_batch(self.score_model, batch), 0)
        teacher = self.teacher(batch.tokens) if self.teacher else None
        losses, kl = sample_losses(self.proxy, batch, teacher, self.config.kl_direction)
        loss = weights @ losses
        if teacher is not None:
            loss = loss + self.config.kl_weight * kl.mean()
        if self.config.l2_weight:
            loss = loss + self.config.l2_weight * sum(p.square().sum() for p in self.proxy.parameters())
        return loss


def sample_losses(
    proxy: LanguageModel, batch: Batch, teacher: Teacher | None = None, kl_direction: str = "proxy_to_target"
) -> tuple[Tensor, Tensor | None]:
    """l_i [b] and, with a teacher, KL_i [b] by ordinary autograd over materialised attention and logits."""
    mask = batch.label_mask[:, 1:]
    hidden = proxy.hidden_states(batch.tokens, fused=False)[:, :-1]
    logits = F.linear(hidden.flatten(0, 1), proxy.output_weight)
    labels = batch.tokens[:, 1:].masked_fill(~mask, -100).flatten()
    entropy = _sample_means(F.cross_entropy(logits, labels, reduction="none", ignore_index=-100), mask)
    if teacher is None:
        return entropy, None
    with torch.no_grad():
        log_t = F.linear(teacher.hidden_states[:, :-1].flatten(0, 1), teacher.output_weight).log_softmax(-1)
    log_p = logits.log_softmax(-1)
    order = (log_t, log_p) if kl_direction == "proxy_to_target" else (log_p, log_t)
    return entropy, _sample_means(F.kl_div(*order, reduction="none", log_target=True).sum(-1), mask)


def validation_gradient(proxy: LanguageModel, batch: Batch) -> tuple[float, tuple[Tensor, ...]]:
    """Phi (eq. 4) and its gradient, a tensor per parameter."""
    labelled = batch.label_mask[:, 1:].sum(1)
    losses, _ = sample_losses(proxy, batch)
    loss = (losses * labelled / labelled.sum()).sum()
    return float(loss.detach()), torch.autograd.grad(loss, list(proxy.parameters()))


def solve(gradient: Sequence[Tensor], parameters: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """Step 4: z from ``gradient``, which carries its graph; the graph is freed by the last product."""
    z = [torch.full_like(parameter, 1 / parameter.numel()) for parameter in parameters]
    for step in range(SOLVER_STEPS):
        product = hessian_product(gradient, parameters, z, retain_graph=step + 1 < SOLVER_STEPS)
        with torch.no_grad():
            residual = clip_each([h - g + DAMPING * v for h, g, v in zip(product, b, z, strict=True)])
            z = [v - SOLVER_STEP_SIZE * r for v, r in zip(z, residual, strict=True)]
    return z


def hessian_product(
    gradient: Sequence[Tensor], parameters: Sequence[Tensor], vector: Sequence[Tensor], *, retain_graph: bool
) -> tuple[Tensor, ...]:
    """H v, a tensor per parameter: reverse over reverse, through the graph of ``gradient``."""
    return torch.autograd.grad(gradient, parameters, vector, retain_graph=retain_graph, materialize_grads=True)


def hypergradient(proxy: LanguageModel, score_model: ScoreModel, batch: Batch, z: Sequence[Tensor]) -> list[Tensor]:
    """Steps 6 and 7: eq. (7) from full gradients of both models, sample by sample; a tensor per score parameter."""
    scores, proxy_gradients, score_gradients = [], [], []
    for index in range(len(batch)):
        sample = batch.slice(index, index + 1)
        score = score_model(sample.tokens, sample.lengths).sum()
        score_gradients.append(torch.autograd.grad(score, list(score_model.parameters())))
        loss = sample_losses(proxy, sample)[0].sum()
        proxy_gradients.append(torch.autograd.grad(loss, list(proxy.parameters())))
        scores.append(score.detach())
    weights = torch.softmax(torch.stack(scores), 0)
    influence = torch.stack([influence_of(gradient, z) for gradient in proxy_gradients])
    coefficients = -weights * (influence - weights @ influence)
    return [
        sum(c * gradient for c, gradient in zip(coefficients, rows, strict=True))
        for rows in zip(*score_gradients, strict=True)
    ]


def influence_of(gradient: Sequence[Tensor], z: Sequence[Tensor]) -> Tensor:
    """d_i = <grad l_i, z> (eq. 6)."""
    return torch.stack([torch.dot(g.flatten(), v.flatten()) for g, v in zip(gradient, z, strict=True)]).sum()


def clip_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Every tensor scaled to a norm of at most 1 by itself."""
    return [tensor * (LARGEST_NORM / (tensor.norm() + 1e-6)).clamp(max=1.0) for tensor in tensors]


def _sample_means(values: Tensor, mask: Tensor) -> Tensor:
    """Means [b] over labelled positions of values [b (s - 1)]."""
    return (values.view(mask.shape) * mask).sum(1) / mask.sum(1).clamp(min=1)


def _named(model: torch.nn.Module, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {name: tensor for (name, _), tensor in zip(model.named_parameters(), tensors, strict=True)}
