"""One micro-batch of an objective: its labelled positions, their loss terms, and the way in and out of the blocks.

Shapes: b samples, s tokens, w hidden size, N labelled positions of all samples, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_bliss.bilevel.head import Positions, Terms
from megatron_bliss.bilevel.kernels import kernels
from megatron_bliss.bilevel.objective import Loss
from megatron_bliss.bilevel.vector import accumulation_dtype
from megatron_bliss.bilevel.walk import Scene
from megatron_bliss.models.operations import rotary_table
from megatron_bliss.models.transformer import LanguageModel

LENGTH_MULTIPLE = 8
"""Lengths are rounded up to it: matrix products of odd sizes are slower, and fewer shapes are compiled."""


class MicroBatch:
    """One micro-batch, cut after its last labelled position (causal: nothing later matters), and its loss terms."""

    def __init__(self, model: LanguageModel, loss: Loss, *, compiled: bool):
        batch, objective = loss.batch, loss.objective
        samples, targets = batch.label_mask[:, 1:].nonzero(as_tuple=True)  # [N] each; position t predicts token t + 1
        self.count = len(batch)
        needed = int(targets.max()) + 1 if len(targets) else 1
        self.length = min(batch.tokens.shape[1], -(-needed // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
        self.tokens = batch.tokens[:, : self.length]  # [b, s]
        labels = batch.tokens[samples, targets + 1]  # [N]
        dtype = accumulation_dtype(next(model.parameters()).dtype)
        # a sample without labels has loss 0, not 0 / 0
        self.token_share = 1.0 / batch.label_mask[:, 1:].sum(1).clamp(min=1).to(dtype)  # [b]
        self.rows = samples * self.length + targets  # [N], in [b s]
        cross_entropy = objective.cross_entropy_coefficients(loss.weights.detach().to(dtype), self.token_share)
        divergence = objective.kl_coefficients(self.token_share)  # [b]
        self.kernels = kernels(compiled)
        self.terms = Terms(
            Positions(samples, targets, labels),
            cross_entropy[samples],
            divergence[samples],
            loss.teacher if objective.kl_weight else None,
            objective.kl_direction,
            self.kernels,
        )

    def scene(
        self,
        model: LanguageModel,
        *,
        gradient: dict[str, Tensor],
        vector: dict[str, Tensor] | None = None,
        product: dict[str, Tensor] | None = None,
        gauss_newton: bool = False,
    ) -> Scene:
        """What the operations of a pass over this micro-batch need; ``vector`` and ``product``: of a dual pass."""
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        weight = parameters["embedding.weight"]
        rotary = rotary_table(model.architecture, self.length, weight.dtype, weight.device)
        return Scene(
            model.architecture, parameters, rotary, vector or {}, gradient, product or {}, gauss_newton, self.kernels
        )

    def embed(self, scene: Scene, *, dual: bool) -> Tensor:
        """Embeddings [b, s, w], or with tangents [2, b, s, w]."""
        weight = scene.parameters["embedding.weight"]  # [v, w]
        if not dual:
            return weight[self.tokens]
        return torch.stack((weight[self.tokens], scene.vector["embedding.weight"][self.tokens]))

    def embed_backward(self, adjoint: Tensor, sums: Tensor) -> None:
        """Add the adjoint [b, s, w] of the embeddings to the embedding's ``sums`` [v, w]."""
        sums.index_add_(0, self.tokens.reshape(-1), adjoint.reshape(-1, adjoint.shape[-1]).to(sums.dtype))

    def select(self, x: Tensor) -> Tensor:
        """Labelled positions of [..., b, s, w]: [..., N, w]. The head, which costs most, sees no others."""
        return x.flatten(-3, -2).index_select(-2, self.rows)

    def scatter(self, rows: Tensor) -> Tensor:
        """[..., N, w] to [..., b, s, w], 0 elsewhere: the adjoint of ``select``."""
        out = rows.new_zeros(*rows.shape[:-2], self.count * self.length, rows.shape[-1])  # [..., b s, w]
        return out.index_copy_(-2, self.rows, rows).unflatten(-2, (self.count, self.length))

    def mean(self, values: Tensor) -> Tensor:
        """Means [b] over each sample's labelled positions of values [N]; 0 where there is none."""
        sums = torch.zeros_like(self.token_share).index_add_(0, self.terms.positions.samples, values)
        return sums * self.token_share
