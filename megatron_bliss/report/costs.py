"""What the stages of a run took: one record per finished stage, and sums over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_bliss.base.files import read_json
from megatron_bliss.base.text import format_bytes, format_flops, format_seconds
from megatron_bliss.config.stages import ROUND_STAGES, WARMUP_STAGES
from megatron_bliss.report.speedups import CHOSEN, CONTROL

KEYS = ("seconds", "peak_bytes", "flops", "evaluation_seconds", "needs", "drift", "domain_weights")
"""What a record takes from ``done.json``; evaluation_seconds: the part of seconds in which a target was measured;
needs: folders of the stages that it required; drift: of a score stage, how far its scorer is from the one
of the round before; domain_weights: {domain: mean of n P_i} at the end of a bilevel stage."""
STAGE_ORDER = ("warmup", *(f"warmup {name}" for name in WARMUP_STAGES), *ROUND_STAGES)


def read_stages(run_folder: Path | str) -> list[dict]:
    """Return one record {arm, round, stage} with its :data:`KEYS` per finished stage, from each ``done.json``.

    The warm-up (``warmup/done.json`` or ``warmup/NAME/done.json``) has arm "shared" and round 0. Numbers that a stage
    did not note are None.
    """
    folder = Path(run_folder)
    records = []
    for path in [*folder.glob("warmup/done.json"), *folder.glob("warmup/*/done.json")]:
        parts = path.relative_to(folder).parts[:-1]
        records.append({"arm": "shared", "round": 0, "stage": " ".join(parts), **_read_cost(path)})
    for path in folder.glob("*/round_*/*/done.json"):
        arm, round_name, stage = path.relative_to(folder).parts[:-1]
        number = round_name.removeprefix("round_")
        if number.isdigit():
            records.append({"arm": arm, "round": int(number), "stage": stage, **_read_cost(path)})
    return sorted(records, key=stage_key)


def _read_cost(path: Path) -> dict:
    done = read_json(path)
    return {key: done.get(key) for key in KEYS}


def stage_key(record: Mapping) -> tuple:
    """Sort key of stage records: the shared warm-up, then bliss, other arms and random, each in order of work."""
    arm_rank = {"shared": 0, CHOSEN: 1, CONTROL: 3}.get(record["arm"], 2)
    stage_rank = STAGE_ORDER.index(record["stage"]) if record["stage"] in STAGE_ORDER else len(STAGE_ORDER)
    return arm_rank, record["arm"], record["round"], stage_rank, record["stage"]


class Cost(NamedTuple):
    """Seconds (the sum), peak bytes (the largest) and FLOPs (the sum) of some stages; None where no stage noted it."""

    seconds: float | None
    peak_bytes: float | None
    flops: float | None

    @property
    def cells(self) -> list[str]:
        """Time, peak memory and work as text."""
        time = "-" if self.seconds is None else format_seconds(self.seconds)
        return [time, format_bytes(self.peak_bytes), format_flops(self.flops)]


def total_cost(records: Sequence[Mapping]) -> Cost:
    """The cost of some stages together."""

    def over(key: str, function: Callable) -> float | None:
        values = [record[key] for record in records if record.get(key) is not None]
        return function(values) if values else None

    return Cost(over("seconds", sum), over("peak_bytes", max), over("flops", sum))
