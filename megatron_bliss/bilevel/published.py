"""The upper step of the published BLISS code (arXiv 2510.06048): the arm published, and the peer of the engine.

The proxy is a plain module with materialised attention; b are the samples of one rank, all at once.

1. T lower steps: teacher, proxy and score forward, loss sum_i P_i l_i + lambda ||theta||² + gamma KL, backward,
   gradient clipped to a global norm of 1, AdamW
2. gradient of one validation batch
3. on an outer batch of its own: the gradient of the lower loss with its graph kept (``create_graph``)
4. three times: a Hessian product on the retained graph, residual H z - grad Phi + 0.01 z, clipped to norm 1 tensor by
   tensor, z <- z - 0.01 residual; z starts anew at 1 / numel in every tensor
5. z averaged over ranks
6. for each of the b samples alone: score forward and full gradient, proxy forward and full gradient, all kept
7. - sum_i P_i (d_i - sum_j P_j d_j) grad s_i from those gradients, d_i = <grad l_i, z>, summed over ranks; clipped
   tensor by tensor; AdamW

On W ranks, steps 1 and 7 are those of the whole batch. But every rank solves a system of its own, with its samples and
its share of the validation samples, and the mean of W solutions is not the solution of the whole batch's system: so
results depend on the number of ranks, as the released code's do. A rank's lower loss is its part of G (eq. 3) in such a
scale that the mean over the ranks is G: W sum_i P_i l_i + (W / n) gamma sum_i KL_i + lambda ||theta||².

Three things differ from the released code, so that both sides compute the same: attention is causal, the softmax of P
is the current one over the batch at hand, not the previous step's, and the number of ranks does not change what
cross-entropy, KL and lambda count against each other. Nothing is done to slow it down: scores that need no gradient are
made without a graph, the head sees predicting positions alone, the graph is freed after its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_bliss.base.parallel import all_gather
from megatron_bliss.bilevel.domain_weights import DomainWeights
from megatron_bliss.bilevel.head import Teacher
from megatron_bliss.bilevel.hypergradient import score_batch
from megatron_bliss.bilevel.monitors import Limits, Monitors, batch_metrics, check_replicas
from megatron_bliss.bilevel.weights import WEIGHTINGS
from megatron_bliss.bilevel.weights.weighting import GlobalBatch
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.data.batches import Batch, BatchSchedule
from megatron_bliss.models.optimizer import Optimizer
from megatron_bliss.models.score import ScoreModel
from megatron_bliss.models.transformer import LanguageModel

if TYPE_CHECKING:
    from megatron_bliss.base.parallel import World

SOLVER_STEPS = 3
SOLVER_STEP_SIZE = 0.01
DAMPING = 0.01
LARGEST_NORM = 1.0
"""Of a residual or of the hypergradient, in each tensor by itself."""


class PublishedTrainer:
    """The published upper step with the interface of ``BilevelTrainer``: ``step()`` is one upper-level step.

    Of ``config`` the lower level, the optimisers and the numbers of steps are used; the solver is the published one.
    Every rank needs a sample of each batch.
    """

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
        """``domains``: of the units of ``train``, whose weights in lower steps are logged; None: of none."""
        self.config, self.proxy, self.score_model, self.teacher = config, proxy, score_model, teacher
        self.train, self.validation, self.world = train, validation, world
        self.proxy_optimizer = Optimizer(proxy, config.proxy_optimizer, config.upper_iters * config.lower_iters)
        unclipped = replace(config.score_optimizer, clip_grad=0.0)
        self.score_optimizer = Optimizer(score_model, unclipped, config.upper_iters)
        sigmoid = score_model.activation == "sigmoid"
        self.monitors = Monitors(Limits(config.global_batch_size, config.kl_warning_threshold, sigmoid))
        self.domains = domains or DomainWeights()
        self.steps_done = 0

    def step(self) -> dict[str, float]:
        """T lower steps and one upper step, which draw T + 1 batches; what to log, the same on every rank."""
        first, device = self.steps_done * (self.config.lower_iters + 1), self.world.device
        for lower in range(self.config.lower_iters):
            values = self._lower_step(self.train.at(first + lower).to(device))
        outer = self.train.at(first + self.config.lower_iters).to(device)
        phi, b = validation_gradient(self.proxy, self.validation.at(self.steps_done).to(device))
        z = self._solve(outer, b)
        upper = hypergradient(self.proxy, self.score_model, outer, z, self.world.world_group)
        upper = clip_each(add_over_ranks(upper, self.world.world_group))
        values["hypergradient_norm"], _ = self.score_optimizer.step(_named(self.score_model, upper))
        values["validation_loss"] = self._mean(phi)
        self.steps_done += 1
        return values

    def check_precision(self) -> list[str]:
        """Nothing to warn of: passes run in the precision of the weights."""
        return []

    def watch(self, values: dict[str, float]) -> list[str]:
        """Warnings that have become due with what the last step logged; collective.

        Means over steps since the last call start anew. Raises where a number is not finite or replicas differ.
        """
        flat = torch.nn.utils.parameters_to_vector
        models = {"proxy": self.proxy, "score model": self.score_model}
        replicas = {name: flat(model.parameters()).detach() for name, model in models.items()}
        check_replicas(replicas, self.world.world_group)
        self.domains.begin_interval()
        return self.monitors.observe(self.steps_done, values)

    def learned(self) -> dict[str, Any]:
        """Both models, as a stage leaves them."""
        return {"proxy": self.proxy.state_dict(), "score_model": self.score_model.state_dict()}

    def state_dict(self) -> dict:
        """Everything that the next step depends on; z starts anew in each."""
        parts = {name: getattr(self, name).state_dict() for name in _STATE}
        return {"steps_done": self.steps_done, "domains": self.domains.state_dict(), **parts}

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state_dict()``."""
        self.steps_done = int(state["steps_done"])
        for name in _STATE:
            getattr(self, name).load_state_dict(state[name])
        self.domains.load_state_dict(state.get("domains"))  # states of before they were logged have none

    def _lower_step(self, batch: Batch) -> dict[str, float]:
        """One AdamW step of the proxy; what to log of its batch."""
        found, group = self._lower_level(batch), self.world.world_group
        gradient = torch.autograd.grad(found.loss, list(self.proxy.parameters()))
        _, rate = self.proxy_optimizer.step(_named(self.proxy, self._means(gradient)))
        kl = 0.0 if found.kl is None else self._mean(found.kl)
        of_batch = GlobalBatch(self.config.global_batch_size, group)
        self.domains.see(batch.unit_ids, found.weights, of_batch.num_samples)
        of_samples = found.weights, found.scores, found.losses.detach()
        metrics = batch_metrics(*of_samples, kl, of_batch, WEIGHTINGS["softmax"], self.domains)
        return {"lower_loss": self._mean(found.loss), "lr": rate, "residual": float("nan"), **metrics}

    def _solve(self, outer: Batch, b: Sequence[Tensor]) -> list[Tensor]:
        """The mean of all ranks' z."""
        parameters = list(self.proxy.parameters())
        gradient = torch.autograd.grad(self._lower_level(outer).loss, parameters, create_graph=True)
        return self._means(solve(gradient, parameters, b))

    def _lower_level(self, batch: Batch) -> _LowerLevel:
        """This rank's part of G (eq. 3) at the batch's own weights; its mean over ranks is G."""
        config, ranks = self.config, self.world.world_size
        scores = score_batch(self.score_model, batch)
        weights = weights_over_ranks(scores, self.world.world_group)
        teacher = self.teacher(batch.tokens) if self.teacher else None
        losses, kl = sample_losses(self.proxy, batch, teacher, config.kl_direction)
        loss = (ranks * weights) @ losses
        if kl is not None:
            kl = kl.sum() / (config.global_batch_size / ranks)
            loss = loss + config.kl_weight * kl
        if config.l2_weight:
            loss = loss + config.l2_weight * sum(p.square().sum() for p in self.proxy.parameters())
        return _LowerLevel(loss, scores, weights, losses, kl)

    def _mean(self, value: Tensor) -> float:
        """Over ranks, of a scalar."""
        return float(self._means([value.detach().double().clone()])[0])

    def _means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Over ranks; the tensors themselves may be overwritten."""
        return [total.div_(self.world.world_size) for total in add_over_ranks(tensors, self.world.world_group)]


_STATE = "proxy", "score_model", "proxy_optimizer", "score_optimizer", "monitors"
"""Parts of a trainer that change with every step."""


@dataclass(frozen=True)
class _LowerLevel:
    """A rank's part of G on its samples: the loss, s_i, P_i and l_i [b], and the part of the mean KL (None: no KL)."""

    loss: Tensor
    scores: Tensor
    weights: Tensor
    losses: Tensor
    kl: Tensor | None


def weights_over_ranks(scores: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """P (eq. 2) [b] of this rank's scores [b]: the softmax over the samples of all ranks."""
    own = torch.softmax(scores, 0)
    if group is None:
        return own
    sums = all_gather(torch.logsumexp(scores, 0), group)  # [ranks]
    return own * torch.softmax(sums, 0)[group.rank()]


def add_over_ranks(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Sums over the group; the tensors themselves may be overwritten."""
    sums = [tensor.contiguous() for tensor in tensors]
    for tensor in sums if group is not None else ():
        dist.all_reduce(tensor, group=group)
    return sums


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
        hidden, matrix = teacher.hidden_states[:, :-1].to(logits.dtype), teacher.output_weight.to(logits.dtype)
        log_t = F.linear(hidden.flatten(0, 1), matrix).log_softmax(-1)
    log_p = logits.log_softmax(-1)
    order = (log_t, log_p) if kl_direction == "proxy_to_target" else (log_p, log_t)
    return entropy, _sample_means(F.kl_div(*order, reduction="none", log_target=True).sum(-1), mask)


def validation_gradient(proxy: LanguageModel, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Phi (eq. 4) and its gradient, a tensor per parameter."""
    labelled = batch.label_mask[:, 1:].sum(1)
    losses, _ = sample_losses(proxy, batch)
    loss = (losses * labelled / labelled.sum().clamp(min=1)).sum()
    return loss.detach(), torch.autograd.grad(loss, list(proxy.parameters()))


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


def hypergradient(
    proxy: LanguageModel,
    score_model: ScoreModel,
    batch: Batch,
    z: Sequence[Tensor],
    group: dist.ProcessGroup | None = None,
) -> list[Tensor]:
    """Steps 6 and 7: this rank's part of eq. (7) from full gradients of both models, sample by sample; a tensor per
    score parameter."""
    scores, proxy_gradients, score_gradients = [], [], []
    for index in range(len(batch)):
        sample = batch.slice(index, index + 1)
        score = score_model(sample.tokens, sample.lengths).sum()
        score_gradients.append(torch.autograd.grad(score, list(score_model.parameters())))
        loss = sample_losses(proxy, sample)[0].sum()
        proxy_gradients.append(torch.autograd.grad(loss, list(proxy.parameters())))
        scores.append(score.detach())
    weights = weights_over_ranks(torch.stack(scores), group)
    influence = torch.stack([influence_of(gradient, z) for gradient in proxy_gradients])
    (mean,) = add_over_ranks([weights @ influence], group)
    coefficients = -weights * (influence - mean)
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
