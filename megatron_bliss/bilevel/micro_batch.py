"""One micro-batch of the lower level: its loss terms, its labelled positions, and the way in and out of the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bliss.bilevel.head import KL_DIRECTIONS, HeadResult, Positions, Teacher, Terms
from megatron_bliss.bilevel.kernels import kernels
from megatron_bliss.bilevel.vector import accumulation_dtype
from megatron_bliss.bilevel.walk import Scene
from megatron_bliss.models.operations import rotary_table
from megatron_bliss.models.transformer import LanguageModel


@dataclass(frozen=True)
class LowerLevel:
    """The coefficients of G for one rank's batch."""

    teacher: Teacher | None
    kl_weight: float
    kl_direction: str
    num_samples: int
    micro_batch_size: int
    recompute: bool | None
    compiled: bool = False

    def micro_batches(self, batch, weights: Tensor) -> Iterator[tuple]:
        """(batch, weights, teacher) of each micro-batch."""
        size = self.micro_batch_size or max(len(batch), 1)
        for start in range(0, len(batch), size):
            stop = min(start + size, len(batch))
            teacher = None if self.teacher is None else self.teacher.slice(start, stop)
            yield batch.slice(start, stop), weights[start:stop], teacher


def lower_level(
    model: LanguageModel,
    batch,
    weights: Tensor,
    *,
    group,
    teacher: Teacher | None = None,
    kl_weight: float = 0.0,
    kl_direction: str = "proxy_to_target",
    num_samples: int | None = None,
    micro_batch_size: int = 0,
    recompute: bool | None = None,
    compiled: bool = False,
) -> LowerLevel:
    """Check the options (curvature.py lists them), with ValueErrors that say what to change, and settle n."""
    check_direction(kl_direction)
    if weights.shape != (len(batch),):
        raise ValueError(f"found weights of shape {tuple(weights.shape)}, expected ({len(batch)},): one a sample")
    if kl_weight and teacher is None:
        raise ValueError(f"found kl_weight {kl_weight} without a teacher, expected its hidden states: set kl_weight 0")
    if teacher is not None and kl_weight and len(teacher.output_weight) != model.architecture.vocab_size:
        raise ValueError(
            f"found a teacher with {len(teacher.output_weight)} tokens, expected the proxy's"
            f" {model.architecture.vocab_size}: cut padding rows off its output matrix"
        )
    if num_samples is None:
        count = torch.tensor(len(batch), device=batch.tokens.device)
        if group is not None:
            dist.all_reduce(count, group=group)
        num_samples = int(count)
    teacher = teacher if kl_weight else None
    return LowerLevel(teacher, kl_weight, kl_direction, num_samples, micro_batch_size, recompute, compiled)


def check_direction(kl_direction: str) -> None:
    """ValueError unless ``kl_direction`` is one of KL_DIRECTIONS."""
    if kl_direction not in KL_DIRECTIONS:
        expected = " or ".join(KL_DIRECTIONS)
        raise ValueError(f"found kl_direction {kl_direction!r}, expected {expected}: change bilevel.kl_direction")


class MicroBatch:
    """One micro-batch, cut after its last labelled position (causal: nothing later matters), and its loss terms."""

    def __init__(self, model: LanguageModel, part: tuple, lower: LowerLevel):
        batch, weights, teacher = part
        samples, targets = batch.label_mask[:, 1:].nonzero(as_tuple=True)
        self.count = len(batch)
        needed = int(targets.max()) + 1 if len(targets) else 1
        self.length = min(batch.tokens.shape[1], -(-needed // 8) * 8)
        self.tokens = batch.tokens[:, : self.length]
        labels = batch.tokens[samples, targets + 1]
        dtype = accumulation_dtype(next(model.parameters()).dtype)
        self.share = 1.0 / batch.label_mask[:, 1:].sum(1).clamp(min=1).to(dtype)
        self.rows = samples * self.length + targets
        cross_entropy = (weights.detach().to(dtype) * self.share)[samples]
        divergence = (self.share * (lower.kl_weight / lower.num_samples))[samples]
        positions = Positions(samples, targets, labels)
        self.kernels = kernels(lower.compiled)
        self.terms = Terms(positions, cross_entropy, divergence, teacher, lower.kl_direction, self.kernels)

    def scene(self, model: LanguageModel, **vectors) -> Scene:
        """What the operations of a pass over this micro-batch need."""
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        weight = parameters["embedding.weight"]
        rotary = rotary_table(model.architecture, self.length, weight.dtype, weight.device)
        return Scene(model.architecture, parameters, rotary, kernels=self.kernels, **vectors)

    def embed(self, scene: Scene, *, dual: bool) -> Tensor:
        """Embeddings [b, s, w], or with tangents [2, b, s, w]."""
        weight = scene.parameters["embedding.weight"]
        if not dual:
            return weight[self.tokens]
        return torch.stack((weight[self.tokens], scene.vector["embedding.weight"][self.tokens]))

    def embed_backward(self, adjoint: Tensor, sums: Tensor) -> None:
        """Add the adjoint [b, s, w] of the embeddings to the embedding's ``sums`` [v, w]."""
        sums.index_add_(0, self.tokens.reshape(-1), adjoint.reshape(-1, adjoint.shape[-1]).to(sums.dtype))

    def select(self, x: Tensor) -> Tensor:
        """Labelled positions of [..., b, s, w]: [..., N, w]."""
        return x.flatten(-3, -2).index_select(-2, self.rows)

    def scatter(self, rows: Tensor) -> Tensor:
        """The adjoint of ``select``."""
        out = rows.new_zeros(*rows.shape[:-2], self.count * self.length, rows.shape[-1])
        return out.index_copy_(-2, self.rows, rows).unflatten(-2, (self.count, self.length))

    def mean(self, values: Tensor) -> Tensor:
        """Means [b] over each sample's labelled positions of values [N]; 0 where there is none."""
        return torch.zeros_like(self.share).index_add_(0, self.terms.positions.samples, values) * self.share

    def per_sample(self, result: HeadResult) -> tuple[Tensor, ...]:
        """l_i, KL_i and, where there are tangents, d_i; each [b]."""
        values = [result.cross_entropy, result.kl] + ([] if result.tangent is None else [result.tangent])
        return tuple(self.mean(value) for value in values)
