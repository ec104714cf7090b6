"""Where and in which precision a run computes: the section ``platform``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_bliss.config.bounds import bounded

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class PlatformConfig:
    """Where and in which precision a run computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA with NCCL when there is a GPU, else the CPU with gloo."""
    params_dtype: Precision = "fp32"
    """Precision of the target's forward and backward pass; master weights and gradients stay fp32."""
    distributed_timeout_minutes: float = bounded(30.0, above=0)
    """A collective that waits longer than this ends the run with an error on every rank."""
    deterministic: bool = True
    """Ask torch for deterministic kernels, so that two runs agree bit for bit."""
