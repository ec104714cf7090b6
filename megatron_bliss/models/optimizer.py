"""AdamW, gradient clipping and learning-rate schedule for the two small models."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from megatron_bliss.config.training import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of 0-based ``step`` of ``total_steps``: megatron-core's schedule, a step ahead during warm-up.

    The first step has 1 / lr_warmup_iters of the rate, where the target's has 0: no step of a small model is lost. The
    decay begins with the step after the warm-up, as the target's.
    """
    from megatron_bliss.base.learning_rate import rate_after  # here: it loads megatron-core, which takes seconds

    room = max(0, total_steps - config.lr_warmup_iters)
    settings = replace(config, lr_wsd_decay_iters=min(config.lr_wsd_decay_iters, room))
    return rate_after(settings, step + (step < config.lr_warmup_iters), total_steps)


class Optimizer:
    """AdamW on a small model, with gradients given by name rather than left in ``.grad`` by autograd."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, total_steps: int) -> None:
        if not 0 <= config.min_lr <= config.lr:
            raise ValueError(
                f"found min_lr={config.min_lr} and lr={config.lr} in an optimizer of the small models, expected min_lr "
                "from 0 to lr: lower it"
            )
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
        # in fp64, so that the scale is rounded once
        total_norm = get_total_norm(gradient.values()).double()
        norm = float(total_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"found gradient norm {norm} at step {self.steps_done}, expected a finite number: lower the learning "
                "rate or, if it came from the linear system, bilevel.solver_max_step_size"
            )
        for name, parameter in self.parameters.items():
            parameter.grad = gradient[name]
        if self.config.clip_grad > 0:
            clip_grads_with_norm_(self.parameters.values(), self.config.clip_grad, total_norm)
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
