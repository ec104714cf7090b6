"""The few numbers of a study that others compare with, seed by seed, as plain data."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_bliss.study.paired import at_equal_tokens, label, spread


def headline(study: Mapping) -> dict:
    """{"seeds": [...], "arms": {NAME: {"guided_mean", "other_mean", "total_flops", "seconds": [one per seed]}}}.

    NAME is an arm where it stands for the first variant that runs it, else VARIANT/ARM. Losses are means over the sets
    of either side where all arms of the seed have seen the same tokens, None where one is not finite or missing; work
    and time are those of everything up to the arm's end. ``study``: what ``study.json`` holds; longer runs are left
    out.
    """
    points = [point for point in study["points"] if label(point) not in study["longer"].values()]
    first = {}
    for point in points:
        first.setdefault(point["arm"], label(point))
    found: dict[str, dict[str, list]] = {}
    for seed in study["seeds"]:
        own = [point for point in points if point["seed"] == seed]
        losses = at_equal_tokens(study, own).losses if own else {}
        for point in own:
            place, cost = label(point), point["cost"]
            name = point["arm"] if first[point["arm"]] == place else place
            values = {
                "guided_mean": spread([losses[place].get(one) for one in study["guided"]]).mean,
                "other_mean": spread([losses[place].get(one) for one in study["other"]]).mean,
                "total_flops": cost["flops"][-1][1],
                "seconds": cost["seconds"][-1][1],
            }
            for key, value in values.items():
                found.setdefault(name, {}).setdefault(key, []).append(value)
    return {"seeds": study["seeds"], "arms": found}
