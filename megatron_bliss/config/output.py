"""What a run writes while it goes on: the sections ``checkpoint`` and ``logging``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_bliss.config.bounds import bounded


@dataclass(frozen=True)
class CheckpointConfig:
    """How often a stage saves its state."""

    save_interval: int = bounded(500, minimum=1)
    """Steps between checkpoints inside a stage; a killed run goes on from the last one."""
    keep: int = bounded(2, minimum=1)
    """Newest checkpoints of the target that stay in a stage's folder."""
    async_save: bool = False
    """Write the target's checkpoints while training goes on, from a copy in host memory (weights, 8 to 12 bytes per
    parameter of optimizer state, shared by the ranks)."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is written and shown while a run goes on."""

    log_interval: int = bounded(10, minimum=1)
    """Steps between lines in metrics.jsonl and TensorBoard."""
    progress: Literal["auto", "none"] = "auto"
    """Progress bars: auto draws them on a terminal and prints a line now and then elsewhere."""
    tensorboard: bool = True
    """Also write tensorboard/ in the run folder."""
    loss_margin: float = bounded(0.01, minimum=0, maximum=100)
    """Nats per token by which an arm may end above the control on a held-out set before the run warns of it."""
    device_peak_tflops: float = bounded(0.0, minimum=0)
    """Peak of one device in params_dtype, for its utilisation (0: by name for known NVIDIA devices, else none)."""
