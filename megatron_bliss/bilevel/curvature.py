"""Gradients, Hessian and Gauss-Newton products of the lower level, and influences, without a graph of a graph.

(3) G(theta) = sum_i P_i l_i + gamma (1/n) sum_i KL_i + lambda ||theta||²,  l_i and KL_i means over labelled tokens
(6) d_i = <grad l_i, z>: a directional derivative, so one forward-mode pass gives all of them

One walk: dual numbers forward through the blocks (walk.py), the analytic head (head.py), and back. Everything is a sum
over samples, so it splits over micro-batches and ranks exactly; the ranks' sums meet in one all-reduce.

A batch has ``tokens`` int64 [b, s], ``label_mask`` bool [b, s] (token t is to be predicted from tokens before t),
``slice(i, j)`` and ``len()``. Options shared by the functions:

teacher           the frozen target's hidden states on the same batch (head.Teacher); none: no KL term
kl_weight         gamma
kl_direction      proxy_to_target: KL(proxy || target); target_to_proxy: KL(target || proxy)
num_samples       n; default: the samples of the batch, over the whole group
l2_weight         lambda
group             process group over which local sums are added; none: this rank alone
micro_batch_size  samples that are worked on at once; 0: all
recompute         recompute each block on the way back (True), keep graphs (False), or keep them while small (None)
compiled          element-wise work by torch.compile (kernels.py)
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bliss.bilevel.head import head_curvature, head_gradient
from megatron_bliss.bilevel.memory import keeps_graph
from megatron_bliss.bilevel.micro_batch import LowerLevel, MicroBatch, lower_level
from megatron_bliss.bilevel.vector import ParameterVector, accumulation_dtype, as_vector, parameter_total
from megatron_bliss.bilevel.walk import DualWalk, GaussNewtonWalk, Walk
from megatron_bliss.config.bilevel import Curvature
from megatron_bliss.models.transformer import LanguageModel

CURVATURES = get_args(Curvature)


class ValueAndGradient(NamedTuple):
    """G, its gradient by parameter name, this rank's l_i [b] and KL_i [b], and the mean KL over all n samples."""

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


def gradient(model: LanguageModel, batch, weights: Tensor, **options) -> tuple[Tensor, ParameterVector]:
    """G (eq. 3) and its gradient by parameter name; ``weights`` [b] are P_i. Options: those of the module."""
    return value_and_gradient(model, batch, weights, **options)[:2]


@torch.no_grad()
def value_and_gradient(
    model: LanguageModel,
    batch,
    weights: Tensor,
    *,
    l2_weight: float = 0.0,
    group=None,
    **options,
) -> ValueAndGradient:
    """G (eq. 3), its gradient, and the samples' losses for logging; ``weights`` [b] are P_i. Options: the module's."""
    lower = lower_level(model, batch, weights, group=group, **options)
    sums = _Sums(model, vectors=1)
    samples = [_gradient_pass(model, part, lower, sums) for part in lower.micro_batches(batch, weights)]
    losses, kl = _join(model, samples)
    sums.finish(model, losses, kl, weights, lower, group)
    sums.add_l2(model, l2_weight, None)
    return ValueAndGradient(sums.loss, sums.vectors[0], losses, kl, sums.kl)


@torch.no_grad()
def curvature_product(
    model: LanguageModel,
    batch,
    weights: Tensor,
    vector: Tensor | dict[str, Tensor],
    *,
    curvature: str = "hessian",
    l2_weight: float = 0.0,
    group=None,
    **options,
) -> CurvatureProduct:
    """C z for z = ``vector`` (flat or by name), with G, its gradient and d_i = <grad l_i, z> (eq. 6), in one pass.

    C is the Hessian of G, or its Gauss-Newton matrix, which is positive semi-definite: the Jacobian of the logits on
    both sides of m (diag p - p pᵀ), m the mass of cross-entropy and KL at each position; l2 adds 2 lambda z to both.
    Options: the module's.
    """
    if curvature not in CURVATURES:
        raise ValueError(f"found curvature {curvature!r}, expected {' or '.join(CURVATURES)}: change bilevel.curvature")
    lower = lower_level(model, batch, weights, group=group, **options)
    direction = as_vector(model, vector)
    sums = _Sums(model, vectors=2)
    samples = [
        _curvature_pass(model, part, lower, direction, sums, gauss_newton=curvature == "gauss_newton")
        for part in lower.micro_batches(batch, weights)
    ]
    losses, kl, influences = _join(model, samples, 3)
    sums.finish(model, losses, kl, weights, lower, group)
    sums.add_l2(model, l2_weight, direction)
    return CurvatureProduct(sums.loss, *sums.vectors, influences, losses, kl, sums.kl)


def validation_weights(batch, group=None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights [b] that make sum_i weights_i l_i the mean loss of all labelled tokens of the group: Phi of eq. (4)."""
    labelled = batch.label_mask[:, 1:].sum(1).to(torch.float64)
    total = labelled.sum()
    if group is not None:
        dist.all_reduce(total, group=group)
    return (labelled / total.clamp(min=1.0)).to(dtype)


class _Sums:
    """Sums over micro-batches and ranks: vectors in parameter space, the loss and the KL, in one flat buffer."""

    def __init__(self, model: LanguageModel, vectors: int):
        parameter = next(model.parameters())
        size, dtype = parameter_total(model), accumulation_dtype(parameter.dtype)
        self.buffer = torch.zeros(vectors * size + 2, dtype=dtype, device=parameter.device)
        self.vectors = [ParameterVector(model, self.buffer[i * size : (i + 1) * size]) for i in range(vectors)]

    def finish(self, model, losses: Tensor, kl: Tensor, weights: Tensor, lower: LowerLevel, group) -> None:
        """Add the scalars and bring all ranks' sums together in one all-reduce."""
        mean_kl = kl.sum() / lower.num_samples
        weighted = weights.detach().to(self.buffer.dtype) @ losses.to(self.buffer.dtype)
        self.buffer[-2], self.buffer[-1] = weighted + lower.kl_weight * mean_kl, mean_kl
        if group is not None:
            dist.all_reduce(self.buffer, group=group)
        self.loss, self.kl = self.buffer[-2].clone(), self.buffer[-1].clone()

    def add_l2(self, model: LanguageModel, l2_weight: float, direction: dict[str, Tensor] | None) -> None:
        """lambda ||theta||², 2 lambda theta and 2 lambda z: the same on every rank, so after the all-reduce."""
        if not l2_weight:
            return
        for name, parameter in model.named_parameters():
            value = parameter.detach().to(self.buffer.dtype)
            self.loss += l2_weight * value.pow(2).sum()
            self.vectors[0][name].add_(value, alpha=2 * l2_weight)
            if direction is not None:
                self.vectors[1][name].add_(direction[name], alpha=2 * l2_weight)


def _gradient_pass(model: LanguageModel, part: tuple, lower: LowerLevel, sums: _Sums) -> tuple[Tensor, ...]:
    """One micro-batch of an ordinary gradient."""
    micro, (total,) = MicroBatch(model, part, lower), sums.vectors
    scene = micro.scene(model, gradient=total)
    x = micro.embed(scene, dual=False)
    keep = keeps_graph(scene.arch, micro.tokens.numel(), x, dual=False, recompute=lower.recompute)
    walk = Walk(scene, keep=keep)
    rows = micro.select(walk.forward(x)).requires_grad_()
    leaves = walk.leaves("final_norm.")
    with torch.enable_grad():
        hidden = scene.values("", leaves).norm(rows, "final_norm")
    result = head_gradient(hidden.detach(), model.output_weight.detach(), micro.terms, total[_output_name(model)])
    adjoint = walk.differentiate(hidden, rows, leaves, result.adjoint)
    micro.embed_backward(walk.backward(micro.scatter(adjoint)), total["embedding.weight"])
    return micro.per_sample(result)


def _curvature_pass(
    model: LanguageModel, part: tuple, lower: LowerLevel, direction: dict, sums: _Sums, *, gauss_newton: bool
) -> tuple[Tensor, ...]:
    """One micro-batch of gradient, product and influences."""
    micro, (total, product) = MicroBatch(model, part, lower), sums.vectors
    scene = micro.scene(model, vector=direction, gradient=total, product=product, gauss_newton=gauss_newton)
    x = micro.embed(scene, dual=True)
    keep = keeps_graph(scene.arch, micro.tokens.numel(), x, dual=True, recompute=lower.recompute)
    walk = GaussNewtonWalk(scene) if gauss_newton and not keep else DualWalk(scene, keep=keep)
    rows = micro.select(walk.forward(x)).requires_grad_()
    with torch.enable_grad():
        hidden = scene.duals("").norm(rows, "final_norm")
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
    (adjoint,) = torch.autograd.grad(hidden, rows, result.adjoint)
    adjoint = walk.backward(micro.scatter(adjoint))
    micro.embed_backward(adjoint[1], total["embedding.weight"])
    micro.embed_backward(adjoint[0], product["embedding.weight"])
    return micro.per_sample(result)


def _output_name(model: LanguageModel) -> str:
    return "output.weight" if model.architecture.untie_embeddings_and_output_weights else "embedding.weight"


def _join(model: LanguageModel, parts: list[tuple[Tensor, ...]], count: int = 2) -> list[Tensor]:
    """Per-sample results of the micro-batches put together; empty where this rank has no sample."""
    parameter = next(model.parameters())
    empty = torch.zeros(0, dtype=accumulation_dtype(parameter.dtype), device=parameter.device)
    return [torch.cat([empty, *(part[index] for part in parts)]) for index in range(count)]
