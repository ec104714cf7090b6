"""What the stages of a study's runs took: time, memory, FLOPs and tokens, as plain data and as a part of the page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from megatron_bliss.base.files import read_json
from megatron_bliss.base.text import format_bytes, format_flops, format_seconds
from megatron_bliss.plan.plan import planned_stages
from megatron_bliss.report.arm_costs import SHARED
from megatron_bliss.report.costs import total_cost
from megatron_bliss.study.runs import StudyRun

COSTS = ("seconds", "peak_bytes", "flops")
"""What a stage has noted."""
HEADER = ("arm", "stage", "time", "peak memory", "FLOPs", "tokens")
NOTE = (
    "All rounds of an arm together{seeds}. Time is wall time, that of `pretrain` with its evaluations. Memory is the "
    "most that one process held: allocated on its GPU, or resident on a machine without. FLOPs are those that stages "
    "record, tokens those that a model trained on, drew or read. A warm-up that several variants share is listed once; "
    "`all` is without it."
)


def read_stage_costs(runs: Sequence[StudyRun]) -> list[dict]:
    """One record per finished stage of the runs' arms and warm-ups, as ``summary.json`` has them.

    {"seed", "variant", "arm", "round", "stage"} with :data:`COSTS` and "tokens"; None: not noted.
    """
    found = []
    for run in runs:
        tokens = {_place(one): one["tokens"] for one in planned_stages(run.config)}
        for one in read_json(run.folder / "summary.json")["stages"]:
            if one["arm"] in (SHARED, *run.config.arms):
                place = {"seed": run.seed, "variant": run.variant}
                place |= {key: one[key] for key in ("arm", "round", "stage")}
                found.append(place | {key: one[key] for key in COSTS} | {"tokens": tokens.get(_place(one))})
    return found


def _place(record: Mapping) -> tuple:
    return record["arm"], record["round"], record["stage"]


def stage_costs_section(study: Mapping) -> list[str]:
    """Blocks of the page: a heading, what the numbers are, and a row per arm and stage; none of an older study."""
    records = study.get("stages")
    if not records:
        return []
    seeds = len({one["seed"] for one in records})
    note = NOTE.format(seeds=f", means over {seeds} seeds, of memory the most" if seeds > 1 else "")
    lines = [HEADER, ["---"] * 2 + ["---:"] * (len(HEADER) - 2), *_rows(records)]
    return ["## What the stages took", note, "\n".join("| " + " | ".join(line) + " |" for line in lines)]


def _rows(records: Sequence[Mapping]) -> Iterator[list[str]]:
    """The warm-ups, each variant's as far as no earlier one has it, then each arm's stages in order and their sum."""
    shown = set()
    for variant in dict.fromkeys(one["variant"] for one in records):
        own = [one for one in records if one["variant"] == variant]
        for stage, group in _by_stage([one for one in own if one["arm"] == SHARED]).items():
            taken = tuple((one["seed"], *(one[key] for key in COSTS)) for one in group)
            if (stage, taken) not in shown:
                shown.add((stage, taken))
                yield [f"{variant}, all arms", stage, *_cells(group)]
        for arm in dict.fromkeys(one["arm"] for one in own if one["arm"] != SHARED):
            stages = _by_stage([one for one in own if one["arm"] == arm])
            for stage, group in stages.items():
                yield [f"{variant}/{arm}", stage, *_cells(group)]
            yield [f"{variant}/{arm}", "all", *_cells([one for group in stages.values() for one in group])[:-1], "-"]


def _by_stage(records: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    groups: dict[str, list[Mapping]] = {}
    for one in records:
        groups.setdefault(one["stage"], []).append(one)
    return groups


def _cells(records: Sequence[Mapping]) -> list[str]:
    """Time, memory, FLOPs and tokens of some stages: sums in each seed and their mean; of memory the most."""
    by_seed: dict[int, list[Mapping]] = {}
    for one in records:
        by_seed.setdefault(one["seed"], []).append(one)
    costs = [total_cost(own) for own in by_seed.values()]
    read = [[one["tokens"] for one in own if one["tokens"] is not None] for own in by_seed.values()]
    seconds, flops = (_mean([getattr(cost, key) for cost in costs]) for key in ("seconds", "flops"))
    tokens = _mean([sum(own) if own else None for own in read])
    peak = total_cost(records).peak_bytes
    return [
        "-" if seconds is None else format_seconds(seconds),
        format_bytes(peak),
        format_flops(flops),
        f"{round(tokens):,}" if tokens else "-",
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
