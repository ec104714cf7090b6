"""What the target's step says of itself: the norm of its gradient, the kernels of its optimizer."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_bliss.target.trainer import kernel_name, squared_norm


def test_a_gradients_norm_does_not_depend_on_its_size():
    """torch's fp32 norm of so many elements is 1e-3 off, megatron-core's for an embedding's few large rows 4e-4."""
    gradient = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    gradient[::100_000] = 1000.0
    exact = gradient.double().square().sum().item()
    assert squared_norm(gradient).dtype == torch.float64
    assert squared_norm(gradient).item() == pytest.approx(exact, rel=5e-6)
    assert squared_norm(gradient.view(-1, 1)[: 2 * 10**6].view(1000, -1).t()).item() == pytest.approx(
        gradient[: 2 * 10**6].double().square().sum().item(), rel=5e-6
    )
    gradient[-1] = torch.nan
    assert math.isnan(squared_norm(gradient).item())


def test_the_optimizer_s_kernel_is_named():
    class FusedAdam(torch.optim.AdamW):
        __module__ = "transformer_engine.pytorch.optimizers.fused_adam"

    weights = [torch.nn.Parameter(torch.zeros(2))]
    assert kernel_name(torch.optim.AdamW(weights)) == "torch AdamW"
    assert kernel_name(torch.optim.AdamW(weights, fused=True)) == "torch AdamW (fused)"
    assert kernel_name(FusedAdam(weights)) == "transformer_engine FusedAdam"
