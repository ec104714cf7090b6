"""AdamW, gradient clipping and learning-rate schedule for the two small models."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from megatron_bliss.config.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of 0-based ``step`` of ``total_steps``: linear warm-up, then as ``lr_decay_style`` says."""
    if step < config.lr_warmup_iters:
        return config.lr * (step + 1) / config.lr_warmup_iters
    decay, first = config.lr_decay_style, config.lr_warmup_iters
    if decay == "constant":
        return config.lr
    if decay == "WSD":
        decay, first = config.lr_wsd_decay_style, max(first, total_steps - config.lr_wsd_decay_iters)
    done = min(1.0, max(0, step - first) / max(1, total_steps - first))
    return config.min_lr + (config.lr - config.min_lr) * DECAYS[decay](done)


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "exponential": lambda done: 2.0 * 0.5**done - 1.0,
    "minus_sqrt": lambda done: 1.0 - math.sqrt(done),
}
"""The share of the way from min_lr to lr that is left, by the share of the decay that is done; as in megatron-core."""


class Optimizer:
    """AdamW on a small model, with gradients given by name rather than left in ``.grad`` by autograd."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, total_steps: int) -> None:
        self.config, self.total_steps, self.steps_done = config, total_steps, 0
        self.parameters = dict(model.named_parameters())
        decayed = [p for p in self.parameters.values() if p.ndim > 1]
        plain = [p for p in self.parameters.values() if p.ndim <= 1]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )

    def step(self, gradient: dict[str, torch.Tensor]) -> tuple[float, float]:
        """Clip ``gradient`` to a global norm of ``clip_grad`` and update; returns (norm before, learning rate).

        ``gradient`` must be the same on every rank; it is clipped in place, because a copy would be as large as the
        model. Raises ``FloatingPointError`` when its norm is not finite, before anything is changed.
        """
        norm = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradient.values()])))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"found gradient norm {norm} at step {self.steps_done}, expected a finite number: lower the learning "
                "rate or, if it came from the linear system, bilevel.solver_max_step_size"
            )
        scale = min(1.0, self.config.clip_grad / (norm + 1e-6)) if self.config.clip_grad > 0 else 1.0
        for name, parameter in self.parameters.items():
            parameter.grad = gradient[name].mul_(scale)
        rate = learning_rate(self.config, self.steps_done, self.total_steps)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.steps_done += 1
        return norm, rate

    def state_dict(self) -> dict:
        """Moments and step count."""
        return {"adamw": self.adamw.state_dict(), "steps_done": self.steps_done}

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state_dict()``."""
        self.adamw.load_state_dict(state["adamw"])
        self.steps_done = int(state["steps_done"])
