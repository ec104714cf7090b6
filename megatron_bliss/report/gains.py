"""What each arm gained over the control on every held-out set, and where it lost more than is passed over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_bliss.report.curves import loss_at
from megatron_bliss.report.speedups import CONTROL


@dataclass(frozen=True)
class HeldOut:
    """The sets that arms are measured on, by name, and what counts as a loss."""

    guide: Sequence[str] = ()
    """Of the guide's kind; none named: all that were measured but the others."""
    other: Sequence[str] = ()
    """Those that the guide does not speak for."""
    loss_margin: float = 0.01
    """Nats per token by which an arm may be above the control before it is called worse."""

    def sets(self, measured: Sequence[str]) -> dict[str, list[str]]:
        """``summary.json``'s ``sets``."""
        guide = list(self.guide) or [name for name in measured if name not in self.other]
        return {"guide": guide, "other": list(self.other)}


def gains(arms: Mapping[str, Mapping]) -> dict[str, dict[str, dict]]:
    """Return {arm: {set: {"tokens", "loss", "control", "gain"}}} of a summary's arms; empty without the control.

    At equal target tokens: the most that both were measured at or beyond. A gain is the control's loss less the arm's;
    None where one of them is not a number there.
    """
    control = arms.get(CONTROL, {}).get("losses", {})
    found: dict[str, dict[str, dict]] = {}
    for arm, content in arms.items() if CONTROL in arms else ():
        if arm != CONTROL:
            shared = [name for name, curve in content["losses"].items() if curve and control.get(name)]
            found[arm] = {name: _gain(content["losses"][name], control[name]) for name in shared}
    return found


def _gain(curve: Sequence, control: Sequence) -> dict:
    tokens = min(curve[-1][0], control[-1][0])
    own, other = loss_at(curve, tokens), loss_at(control, tokens)
    return {"tokens": tokens, "loss": own, "control": other, "gain": difference(other, own)}


def difference(first: float | None, second: float | None) -> float | None:
    """first - second, None where one is missing."""
    return None if first is None or second is None else first - second


def is_worse(gain: float | None, margin: float) -> bool:
    """Whether an arm lost more than the margin."""
    return gain is not None and math.isfinite(gain) and gain < -margin


def loss_warnings(found: Mapping[str, Mapping[str, Mapping]], margin: float) -> list[str]:
    """A line for each arm and set where the arm is worse than the control by more than ``margin``, or diverged."""
    lines = []
    for arm, by_set in found.items():
        for name, one in by_set.items():
            if is_worse(one["gain"], margin):
                lines.append(f"{arm} is worse than {CONTROL} on {name} by {-one['gain']:.3f}")
            elif one["loss"] is None and one["control"] is not None:
                lines.append(f"{arm} has no finite loss on {name} where {CONTROL} has {one['control']:.3f}")
    return lines
