"""The points of a study: what each arm of each run came to, as plain data out of the runs' ``summary.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_bliss.base.files import read_json
from megatron_bliss.study.agreement import read_agreement
from megatron_bliss.study.bits import read_bytes_per_token
from megatron_bliss.study.description import LONGER, Study
from megatron_bliss.study.peaks import peaks
from megatron_bliss.study.runs import StudyRun
from megatron_bliss.study.stage_costs import read_stage_costs
from megatron_bliss.study.sweep import read_sweep
from megatron_bliss.study.task_results import last_results


def read_points(study: Study, runs: Sequence[StudyRun]) -> dict:
    """{"control", "longer", "seeds", "guided", "other", "points", "bytes_per_token", "tasks", "agreement",
    "sweep", "stages"}: all that tables and plots are made from.

    A point is one arm of one run: {"seed", "variant", "arm", "losses": {test set: curve}, "cost": {axis: curve},
    "peak_bytes": {"selection", "all"}, "tasks": {"accuracy", "bits_per_byte"} at its end}, its
    curves as in ``summary.json``.
    """
    points, tasks = [], {}
    for run in runs:
        summary = read_json(run.folder / "summary.json")
        arms = summary["arms"]
        for arm in run.config.arms:
            point = {"seed": run.seed, "variant": run.variant, "arm": arm}
            point |= {key: arms[arm][key] for key in ("losses", "cost")}
            point |= {"peak_bytes": peaks(summary["stages"], arm), "tasks": last_results(arms[arm])}
            points.append(point)
        tasks |= summary["task_facts"].get("tasks", {})
    made = {f"{run.variant}/{arm}" for run in runs for arm in run.config.arms}
    longer = {arm: place for arm, place in study.longer.items() if place in made}
    found = {"control": study.control, "longer": longer, "seeds": study.seeds, **sides(runs), "points": points}
    found |= {"bytes_per_token": read_bytes_per_token(runs), "tasks": tasks}
    variants = {name: options for name, options in study.variants.items() if not name.startswith(LONGER)}
    found |= {"agreement": read_agreement(study, runs), "sweep": read_sweep(variants, runs, study.sweep)}
    return found | {"stages": read_stage_costs(runs)}


def sides(runs: Sequence[StudyRun]) -> dict[str, list[str]]:
    """Names of the test sets of the guide's kind, and of the others: those of all runs alike, or ValueError."""
    found = {}
    for run in runs:
        data = run.config.data
        prefixes = {"guided": data.test_prefixes, "other": data.other_prefixes}
        found[run.name] = {side: [Path(prefix).name for prefix in given] for side, given in prefixes.items()}
    first = next(iter(found))
    for name, names in found.items():
        if names != found[first]:
            raise ValueError(
                f"found test sets {names} of {name} and {found[first]} of {first}, expected the same in all runs of a "
                "study: take data.test_prefixes and data.other_prefixes out of the variants"
            )
    if not found[first]["guided"]:
        raise ValueError("found no test set of the guide's kind, expected one: set data.test_prefixes in base")
    return found[first]
