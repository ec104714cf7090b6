"""Arms x sets: losses and gains over the control, at equal target tokens and at equal total cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from megatron_bliss.report.gains import difference, is_worse
from megatron_bliss.report.speedups import CONTROL
from megatron_bliss.report.summary import final_losses

MEASURES = {"tokens": "at equal tokens", "flops": "at equal FLOPs", "seconds": "at equal seconds"}
"""What is held equal between arms."""


class GainCell(NamedTuple):
    """An arm on a set: its loss, and the control's loss less that."""

    loss: float | None
    gain: float | None
    is_worse: bool

    @property
    def gain_text(self) -> str:
        """The gain with its sign, and in words where it is a loss that counts."""
        return "-" if self.gain is None else f"{self.gain:+.3f}{' worse' if self.is_worse else ''}"

    @property
    def text(self) -> str:
        """Loss and gain."""
        return "-" if self.loss is None else f"{self.loss:.3f} {self.gain_text}"


def set_kinds(summary: Mapping) -> dict[str, str]:
    """{set: guide or other}, those of the guide's kind first."""
    return {name: kind for kind in ("guide", "other") for name in summary.get("sets", {}).get(kind, [])}


def gain_cells(summary: Mapping, measure: str) -> dict[str, dict[str, GainCell]]:
    """Return {set: {arm: cell}} of a summary with a control, in order; its own cells have no gain."""
    if not any(summary["gains"].values()):
        return {}
    losses, gained = _losses(summary, measure)
    return {
        name: {arm: _cell(summary, losses[arm].get(name), gained.get(arm, {}).get(name)) for arm in losses}
        for name in set_kinds(summary)
        if any(of_arm.get(name) is not None for of_arm in losses.values())
    }


def _losses(summary: Mapping, measure: str) -> tuple[dict[str, dict], dict[str, dict]]:
    """({arm: {set: loss}}, {arm: {set: gain}})."""
    if measure == "tokens":
        losses = {arm: {name: one["loss"] for name, one in by_set.items()} for arm, by_set in summary["gains"].items()}
        control = {name: by_arm[CONTROL] for name, by_arm in final_losses(summary).items()}
        gained = {arm: {name: one["gain"] for name, one in by_set.items()} for arm, by_set in summary["gains"].items()}
        return {CONTROL: control} | losses, gained
    found = summary["equal_compute"].get(measure, {}).get("losses", {})
    control = found.get(CONTROL, {})
    others = {arm: by_set for arm, by_set in found.items() if arm != CONTROL}
    gained = {
        arm: {n: difference(control.get(n), loss) for n, loss in by_set.items()} for arm, by_set in others.items()
    }
    return {CONTROL: control} | others, gained


def _cell(summary: Mapping, loss: float | None, gain: float | None) -> GainCell:
    return GainCell(loss, gain, is_worse(gain, summary["loss_margin"]))


def gain_rows(summary: Mapping) -> list[tuple[str, str, str, list[GainCell]]]:
    """(set, its kind, arm, a cell per measure) for every arm but the control."""
    cells = {measure: gain_cells(summary, measure) for measure in MEASURES}
    missing = GainCell(None, None, False)
    return [
        (name, kind, arm, [cells[measure].get(name, {}).get(arm, missing) for measure in MEASURES])
        for name, kind in set_kinds(summary).items()
        for arm in summary["gains"]
        if arm in cells["tokens"].get(name, {})
    ]
