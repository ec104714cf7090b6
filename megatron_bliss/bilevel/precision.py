"""Lower precision for passes over the small models, and the guard that it is good enough for second order.

Weights, sums and optimiser states are fp32; a pass may run on a copy in bf16. Second-order products are more sensitive
than losses, so before a stage one product on a small slice is held against fp64, parameter by parameter.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bliss.bilevel import curvature
from megatron_bliss.bilevel.objective import Loss, Objective
from megatron_bliss.bilevel.vector import ParameterVector, parameter_total
from megatron_bliss.data.batches import Batch
from megatron_bliss.models.transformer import LanguageModel

SLICE_SAMPLES, SLICE_TOKENS = 2, 128
"""Size of the slice: large enough to reach every layer, small enough to be free."""
WARN_BELOW, FAIL_BELOW = 0.99, 0.9
"""Cosines with the fp64 product."""


class ComputeCopy:
    """The model that passes run on: the master itself, or a copy in another precision."""

    def __init__(self, master: nn.Module, dtype: torch.dtype) -> None:
        self.master = master
        self._copy = None
        if dtype != torch.float32 and any(parameter.dtype != dtype for parameter in master.parameters()):
            low = copy.deepcopy(master).to(dtype)  # a score model's table of n-grams stays as it is
            pairs = zip(low.parameters(), master.parameters(), strict=True)
            # trained weights stay fp32: an update is often smaller than half a bf16 step, and would be lost
            self._copy = low.requires_grad_(True) if any(new.dtype != old.dtype for new, old in pairs) else None

    @torch.no_grad()
    def refresh(self) -> nn.Module:
        """The model with the master's present weights."""
        if self._copy is None:
            return self.master
        for low, master in zip(self._copy.parameters(), self.master.parameters(), strict=True):
            low.copy_(master)
        return self._copy


def product_cosines(model: LanguageModel, batch: Batch, dtype: torch.dtype, kind: str) -> dict[str, float]:
    """Cosine between C z in ``dtype`` and in fp64, by parameter, for one random z; C is ``kind`` of the mean loss.

    Parameters whose product is 0 (such as the bias of keys, which softmax does not see) are left out.
    """
    batch = _cut(batch)
    weights = torch.full((len(batch),), 1 / len(batch), device=batch.tokens.device)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(parameter_total(model), generator=generator).to(batch.tokens.device)
    # by parameter: one layer that is wrong would not show in a cosine over all
    exact = _product(model, torch.float64, batch, weights, z, kind)
    found = _product(model, dtype, batch, weights, z, kind)
    largest = max(float(value.norm()) / value.numel() ** 0.5 for value in exact.values())
    return {
        name: float(F.cosine_similarity(found[name].double().flatten(), value.flatten(), dim=0))
        for name, value in exact.items()
        if float(value.norm()) / value.numel() ** 0.5 > 1e-6 * largest
    }


def precision_warnings(model: LanguageModel, batch: Batch, dtype: torch.dtype, kind: str) -> list[str]:
    """Warnings that name the parameters whose products are off; ``ValueError`` where one is wrong."""
    cosines = product_cosines(model, batch, dtype, kind)
    low = sorted((value, name) for name, value in cosines.items() if not value >= WARN_BELOW)  # NaN is low, too
    if not low:
        return []
    described = ", ".join(f"{name} {value:.3f}" for value, name in low[:5])
    text = f"second-order products in {str(dtype).removeprefix('torch.')} have a low cosine with fp64 in {described}"
    if not low[0][0] >= FAIL_BELOW:
        raise ValueError(f"found that {text}, expected at least {FAIL_BELOW}: set bilevel.params_dtype to fp32")
    return [f"{text}: consider bilevel.params_dtype fp32"]


def _product(
    model: LanguageModel, dtype: torch.dtype, batch: Batch, weights: Tensor, z: Tensor, kind: str
) -> ParameterVector:
    local = model if next(model.parameters()).dtype == dtype else copy.deepcopy(model).to(dtype)
    loss = Loss(Objective(), batch, weights.to(dtype))
    return curvature.curvature_product(local, loss, z.to(dtype), curvature=kind).product


def _cut(batch: Batch) -> Batch:
    tokens = batch.tokens[:, :SLICE_TOKENS]
    return Batch(tokens, batch.label_mask[:, :SLICE_TOKENS], batch.lengths.clamp(max=tokens.shape[1]), batch.unit_ids)
