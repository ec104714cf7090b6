"""The most memory that an arm's stages took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_bliss.config.stages import SELECTION_STAGES
from megatron_bliss.report.arm_costs import SHARED


def peaks(stages: Sequence[Mapping], arm: str) -> dict[str, int | None]:
    """{"selection": peak bytes of the largest process in the arm's selection, "all": in all of its stages}.

    stages: records of a summary. To selection belongs the warm-up of the proxy where the arm begins from it; to all,
    the target's warm-up, too. None where no stage noted it.
    """
    own = [one for one in stages if one["arm"] == arm]
    needed = {name.replace("/", " ") for one in own for name in one.get("needs") or ()}
    shared = [one for one in stages if one["arm"] == SHARED and one["stage"] in needed]
    selection = [one for one in own if one["stage"] in SELECTION_STAGES]
    selection += [one for one in shared if one["stage"] == "warmup proxy"]
    return {"selection": _largest(selection), "all": _largest([*own, *shared])}


def largest(study: Mapping, place: str) -> dict[str, int | None]:
    """The same over all seeds of VARIANT/ARM of a study."""
    found = [point.get("peak_bytes", {}) for point in study["points"] if f"{point['variant']}/{point['arm']}" == place]
    return {
        key: max((one[key] for one in found if one.get(key) is not None), default=None) for key in ("selection", "all")
    }


def _largest(records: Sequence[Mapping]) -> int | None:
    return max((one["peak_bytes"] for one in records if one.get("peak_bytes") is not None), default=None)
