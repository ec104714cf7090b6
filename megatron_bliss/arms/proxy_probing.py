"""Influence on the proxy: by how much one step of it on one unit alone lowers its loss on the reference set.

I(x) of probing.py, with the proxy in the place of the target: a plain module in fp32, whole on every rank, so that each
rank measures units of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_bliss.arms.inputs import Inputs
from megatron_bliss.arms.probing import Oracle, Step, finite
from megatron_bliss.bilevel import curvature
from megatron_bliss.bilevel.losses import total_loss
from megatron_bliss.bilevel.objective import validation_loss
from megatron_bliss.data.batches import Batch
from megatron_bliss.models.transformer import LanguageModel
from megatron_bliss.target.state import Moments


def proxy_step(model: LanguageModel, adam: dict, optimizer: str, lr: float, clip_grad: float) -> Step:
    """The step that the proxy's training would take next (adam), or one along the gradient (sgd); lr 0: its own.

    adam: as ``TiedProxyTrainer.learned`` gives it; its moments become one flat pair in the order of the parameters.
    """
    moments, rate = None, lr or adam["lr"]
    if optimizer == "adam":
        names = [name for name, _ in model.named_parameters()]
        flat = (torch.cat([adam["moments"][name][part].flatten() for name in names]) for part in (0, 1))
        moments = Moments(adam["step"], [tuple(flat)])
    beta1, beta2 = adam["betas"]
    return Step(rate, clip_grad, moments, beta1=beta1, beta2=beta2, eps=adam["eps"])


class ProxyProbe:
    """The proxy with its weights kept aside; every measurement leaves them as they were."""

    def __init__(self, model: LanguageModel, step: Step, reference: Sequence[Batch], device: torch.device) -> None:
        self.model, self.step = model.requires_grad_(True), step
        self.reference = [batch.to(device) for batch in reference]
        self.device = device
        self.start = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        self.loss = self._reference_loss()
        """Of the reference set before any step."""

    def influence(self, unit: Batch) -> float:
        """Reduction of the reference loss by one step on ``unit``; FloatingPointError where it is no finite number."""
        gradient = curvature.gradient(self.model, validation_loss(unit.to(self.device))).gradient.flat
        gradient *= self.step.clipping(float(gradient.norm()))
        try:
            self._place(self.start - self.step.update(0, gradient))
            influence = self.loss - self._reference_loss()
        finally:
            self._place(self.start)
        return finite(influence, unit, "mates_kl")

    @torch.no_grad()
    def _place(self, weights: torch.Tensor) -> None:
        """Copy flat weights into the model, which keeps its tensors."""
        for parameter, part in zip(
            self.model.parameters(), weights.split([p.numel() for p in self.model.parameters()]), strict=True
        ):
            parameter.copy_(part.view_as(parameter))

    def _reference_loss(self) -> float:
        total, count = sum(total_loss(self.model, batch) for batch in self.reference).tolist()
        if not count:
            raise ValueError("found no labelled token in the reference samples, expected some: check the reference set")
        return total / count


def proxy_oracle(
    inputs: Inputs, model: LanguageModel, step_of: Callable[[LanguageModel], Step], reference: Sequence[Batch]
) -> Oracle:
    """Every rank measures by a proxy of its own."""
    groups = inputs.groups

    def open_proxy() -> Callable[[Batch], float]:
        return ProxyProbe(model, step_of(model), reference, groups.device).influence

    return Oracle(open_proxy, groups.rank, groups.world_size, is_writer=True)
