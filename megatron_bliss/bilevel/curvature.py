"""Gradient and curvature products of an objective, and the influences (6), without a graph of a graph.

One walk: dual numbers forward through the blocks (walk.py), the analytic head (head.py), and back. An objective
(objective.py) is a sum over samples, so each micro-batch adds its part to vectors in parameter space, and the ranks'
sums meet in one all-reduce.

Shapes: b samples, s tokens, w hidden size, N labelled positions, v vocabulary. A leading 2 is [value, tangent] of
activations and [tangent of the adjoint, adjoint] of what comes back (dual.py).
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from megatron_bliss.bilevel.execution import ALONE, Execution
from megatron_bliss.bilevel.head import head_curvature, head_gradient, head_losses
from megatron_bliss.bilevel.memory import keeps_graph
from megatron_bliss.bilevel.micro_batch import MicroBatch
from megatron_bliss.bilevel.objective import Loss, Objective
from megatron_bliss.bilevel.vector import ParameterVector, accumulation_dtype, as_vector, parameter_total
from megatron_bliss.bilevel.walk import DualWalk, GaussNewtonWalk, Walk
from megatron_bliss.config.bilevel import Curvature
from megatron_bliss.models.transformer import LanguageModel, block_prefixes

CURVATURES = get_args(Curvature)


class Gradient(NamedTuple):
    """The objective's value, its gradient by parameter name, this rank's l_i and KL_i [b], the mean KL over all n."""

    loss: Tensor
    gradient: ParameterVector
    sample_losses: Tensor
    sample_kl: Tensor
    kl: Tensor


class CurvatureProduct(NamedTuple):
    """One pass at z: G, its gradient, C z, and for this rank's samples d_i, l_i and KL_i [b]; the mean KL over n."""

    loss: Tensor
    gradient: ParameterVector
    product: ParameterVector
    influence: Tensor
    sample_losses: Tensor
    sample_kl: Tensor
    kl: Tensor


@torch.no_grad()
def gradient(model: LanguageModel, loss: Loss, execution: Execution = ALONE) -> Gradient:
    """An objective, (3) or (4), and its gradient by the model's parameters, summed over the ranks."""
    loss.check_vocabulary(model.architecture.vocab_size)
    sums = _Sums(model, vectors=1)
    found = [_gradient_pass(model, part, execution, sums) for part in loss.micro_batches(execution.micro_batch_size)]
    losses, kl = _join(model, found, 2)
    sums.finish(loss, losses, kl, execution)
    sums.add_l2(model, loss.objective, None)
    return Gradient(sums.loss, sums.vectors[0], losses, kl, sums.kl)


@torch.no_grad()
def curvature_product(
    model: LanguageModel,
    loss: Loss,
    vector: Tensor | dict[str, Tensor],
    execution: Execution = ALONE,
    *,
    curvature: str = "hessian",
) -> CurvatureProduct:
    """C z of (5) for z = ``vector`` (flat or by name), with G, its gradient and d_i (6), in one pass.

    C is the Hessian of G, or its Gauss-Newton matrix, which is positive semi-definite where no weight is negative: the
    Jacobian of the logits on both sides of m (diag p - p pᵀ), m the mass of cross-entropy and KL at each position; L2
    adds 2 lambda z to both.
    """
    if curvature not in CURVATURES:
        raise ValueError(f"found curvature {curvature!r}, expected {' or '.join(CURVATURES)}: change bilevel.curvature")
    loss.check_vocabulary(model.architecture.vocab_size)
    direction = as_vector(model, vector)
    sums, gauss_newton = _Sums(model, vectors=2), curvature == "gauss_newton"
    found = [
        _curvature_pass(model, part, execution, direction, sums, gauss_newton=gauss_newton)
        for part in loss.micro_batches(execution.micro_batch_size)
    ]
    losses, kl, influences = _join(model, found, 3)
    sums.finish(loss, losses, kl, execution)
    sums.add_l2(model, loss.objective, direction)
    return CurvatureProduct(sums.loss, *sums.vectors, influences, losses, kl, sums.kl)


@torch.no_grad()
def sample_losses(model: LanguageModel, loss: Loss, execution: Execution = ALONE) -> Tensor:
    """l_i [b] of this rank's samples by a forward pass alone, the numbers that ``gradient`` gives; not collective."""
    loss.check_vocabulary(model.architecture.vocab_size)
    parts = loss.micro_batches(execution.micro_batch_size)
    return _join(model, [(_forward_pass(model, part, execution),) for part in parts], 1)[0]


def influence(micro: MicroBatch, tangents: Tensor) -> Tensor:
    """(6) d_i = <grad l_i, z> [b], the derivative of l_i along z, from those of the tokens' cross-entropies [N].

    <grad l_i, z> is a directional derivative: forward mode gives the tangent of every token's cross-entropy along z in
    the head (head.HeadResult), and l_i is their mean. No gradient of a single sample ever exists.
    """
    return micro.mean(tangents)


class _Sums:
    """Sums over micro-batches and ranks: vectors in parameter space, the loss and the KL.

    They lie in one flat buffer, so that one all-reduce brings everything of a pass together.
    """

    def __init__(self, model: LanguageModel, vectors: int):
        parameter = next(model.parameters())
        size, dtype = parameter_total(model), accumulation_dtype(parameter.dtype)
        self.buffer = torch.zeros(vectors * size + 2, dtype=dtype, device=parameter.device)
        self.vectors = [ParameterVector(model, self.buffer[i * size : (i + 1) * size]) for i in range(vectors)]

    def finish(self, loss: Loss, sample_losses: Tensor, sample_kl: Tensor, execution: Execution) -> None:
        """Add the scalars and bring all ranks' sums together."""
        objective, weights = loss.objective, loss.weights.detach().to(self.buffer.dtype)
        mean_kl = objective.mean_kl(sample_kl)
        self.buffer[-2] = objective.data_terms(weights, sample_losses.to(self.buffer.dtype), mean_kl)
        self.buffer[-1] = mean_kl
        execution.add_over_ranks(self.buffer)
        self.loss, self.kl = self.buffer[-2].clone(), self.buffer[-1].clone()

    def add_l2(self, model: LanguageModel, objective: Objective, direction: dict[str, Tensor] | None) -> None:
        """lambda ||theta||², 2 lambda theta and 2 lambda z: the same on every rank, so after the all-reduce."""
        if not objective.l2_weight:
            return
        for name, parameter in model.named_parameters():
            value = parameter.detach().to(self.buffer.dtype)
            self.loss += objective.l2_term(value)
            self.vectors[0][name].add_(value, alpha=objective.l2_curvature)
            if direction is not None:
                self.vectors[1][name].add_(direction[name], alpha=objective.l2_curvature)


def _gradient_pass(model: LanguageModel, part: Loss, execution: Execution, sums: _Sums) -> tuple[Tensor, ...]:
    """One micro-batch of an ordinary gradient: l_i and KL_i [b]."""
    micro, (total,) = MicroBatch(model, part, compiled=execution.compiled), sums.vectors
    scene = micro.scene(model, gradient=total)
    x = micro.embed(scene, dual=False)  # [b, s, w]
    keep = keeps_graph(scene.arch, micro.tokens.numel(), x, dual=False, recompute=execution.recompute)
    walk = Walk(scene, keep=keep)
    rows = micro.select(walk.forward(x)).requires_grad_()  # [N, w]
    leaves = walk.leaves("final_norm.")
    with torch.enable_grad():
        hidden = scene.values("", leaves).norm(rows, "final_norm")  # [N, w]
    result = head_gradient(hidden.detach(), model.output_weight.detach(), micro.terms, total[_output_name(model)])
    adjoint = walk.differentiate(hidden, rows, leaves, result.adjoint)  # [N, w]
    micro.embed_backward(walk.backward(micro.scatter(adjoint)), total["embedding.weight"])
    return micro.mean(result.cross_entropy), micro.mean(result.kl)


def _forward_pass(model: LanguageModel, part: Loss, execution: Execution) -> Tensor:
    """One micro-batch without a way back: l_i [b]."""
    micro = MicroBatch(model, part, compiled=execution.compiled)
    scene = micro.scene(model, gradient={})
    x, walk = micro.embed(scene, dual=False), Walk(scene, keep=False)  # [b, s, w]
    for prefix in block_prefixes(scene.arch):
        x = walk.run(prefix, x, {})
    hidden = scene.values("", {}).norm(micro.select(x), "final_norm")  # [N, w]
    return micro.mean(head_losses(hidden, model.output_weight.detach(), micro.terms))


def _curvature_pass(
    model: LanguageModel,
    part: Loss,
    execution: Execution,
    direction: dict[str, Tensor],
    sums: _Sums,
    *,
    gauss_newton: bool,
) -> tuple[Tensor, ...]:
    """One micro-batch of gradient and product: l_i, KL_i and d_i [b]."""
    micro, (total, product) = MicroBatch(model, part, compiled=execution.compiled), sums.vectors
    scene = micro.scene(model, vector=direction, gradient=total, product=product, gauss_newton=gauss_newton)
    x = micro.embed(scene, dual=True)  # [2, b, s, w]
    keep = keeps_graph(scene.arch, micro.tokens.numel(), x, dual=True, recompute=execution.recompute)
    # Where blocks are recomputed anyway, Gauss-Newton needs no dual numbers on the way back: two cotangents through a
    # plain block cost less. Kept graphs are dual already.
    walk = GaussNewtonWalk(scene) if gauss_newton and not keep else DualWalk(scene, keep=keep)
    rows = micro.select(walk.forward(x)).requires_grad_()  # [2, N, w]
    with torch.enable_grad():
        hidden = scene.duals("").norm(rows, "final_norm")  # [2, N, w]
    name = _output_name(model)
    result = head_curvature(
        hidden.detach(),
        scene.parameters[name],
        direction[name],
        micro.terms,
        total[name],
        product[name],
        gauss_newton=gauss_newton,
    )
    (adjoint,) = torch.autograd.grad(hidden, rows, result.adjoint)  # [2, N, w]
    adjoint = walk.backward(micro.scatter(adjoint))  # [2, b, s, w]
    micro.embed_backward(adjoint[1], total["embedding.weight"])
    micro.embed_backward(adjoint[0], product["embedding.weight"])
    return micro.mean(result.cross_entropy), micro.mean(result.kl), influence(micro, result.tangent)


def _output_name(model: LanguageModel) -> str:
    """The output matrix's name; a tied one adds the head's part to the embedding's sums."""
    return "output.weight" if model.architecture.untie_embeddings_and_output_weights else "embedding.weight"


def _join(model: LanguageModel, parts: list[tuple[Tensor, ...]], count: int) -> list[Tensor]:
    """Per-sample results of the micro-batches put together; empty where this rank has no sample."""
    parameter = next(model.parameters())
    empty = torch.zeros(0, dtype=accumulation_dtype(parameter.dtype), device=parameter.device)
    return [torch.cat([empty, *(part[index] for part in parts)]) for index in range(count)]
