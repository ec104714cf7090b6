"""Whether an iteration of the target may change its weights: numbers that are not finite, and spikes of the loss.

Every rank brings the same loss and gradient norm and keeps the same record, so all decide alike without a word.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from megatron_bliss.config.training import PretrainingConfig

UPDATE, WARN, SKIP, STOP = "update", "warn", "skip", "stop"


class TrainingHealth:
    """Judges iterations one by one; its record is part of a checkpoint."""

    def __init__(self, config: PretrainingConfig) -> None:
        _check(config)
        self.config = config
        self.recent: deque[float] = deque(maxlen=config.loss_spike_window)
        """Losses of the last iterations that changed the weights."""
        self.skipped = self.skipped_in_a_row = 0
        self.verdict, self.reason = UPDATE, ""
        """What was decided about the last iteration, and why if it was not an ordinary one."""

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether the iteration's update is to be made; ``verdict`` and ``reason`` say more."""
        self.verdict, self.reason = self._judge(loss, grad_norm)
        if self.verdict == SKIP:
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row > self.config.max_consecutive_skips:
                self.verdict = STOP
                self.reason += f", with no update in {self.skipped_in_a_row} iterations in a row"
        elif self.verdict in (UPDATE, WARN):
            self.skipped_in_a_row = 0
            self.recent.append(loss)
        return self.verdict in (UPDATE, WARN)

    def _judge(self, loss: float, grad_norm: float) -> tuple[str, str]:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            reason = f"found loss {loss} and gradient norm {grad_norm}, expected finite numbers"
            return self.config.on_nonfinite, reason
        factor = self.config.loss_spike_factor
        if factor and len(self.recent) == self.recent.maxlen:
            median = statistics.median(self.recent)
            if loss > factor * median:
                reason = (
                    f"found loss {loss:.4f}, expected at most {factor:g} x {median:.4f} (the median of the last "
                    f"{len(self.recent)})"
                )
                return self.config.on_loss_spike, reason
        return UPDATE, ""

    def state(self) -> dict[str, Any]:
        """Plain values from which :meth:`load` goes on bit for bit."""
        return {"recent": list(self.recent), "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.recent.clear()
        self.recent.extend(state["recent"])
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]


def _check(config: PretrainingConfig) -> None:
    if config.loss_spike_factor and config.loss_spike_factor <= 1:
        raise ValueError(
            f"found pretraining.loss_spike_factor={config.loss_spike_factor}, expected more than 1, or 0 for none: "
            "change it"
        )
