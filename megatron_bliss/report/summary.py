"""``summary.json``: what a run was worth, as plain data.

A *curve* is a list of [target tokens, loss], in the order of the evaluations. Numbers that are not finite are not JSON:
in a summary they are null (:func:`build_summary` sees to it), and every function here leaves them out.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata

import orjson

from megatron_bliss.report.arm_costs import cost_curves, equal_compute
from megatron_bliss.report.curves import finite_points, speedup
from megatron_bliss.report.gains import HeldOut, gains, loss_warnings
from megatron_bliss.report.speedups import CHOSEN, CONTROL
from megatron_bliss.report.task_summary import (
    Measured,
    all_task_curves,
    task_facts,
    task_speedup,
)

PACKAGES = ("torch", "megatron-core", "lm-eval", "numpy", "tokenizers", "sentencepiece", "pyarrow", "jsonargparse")


def build_summary(
    evaluations: Mapping[str, Sequence[Mapping]],
    *,
    stages: Sequence[Mapping],
    domains_by_field: Mapping[str, Mapping],
    task_results: Measured | None = None,
    held_out: HeldOut | None = None,
    seed: int,
    config_text: str,
    versions: Mapping[str, str] | None = None,
) -> dict:
    """Return the content of ``summary.json``.

    evaluations: per arm the measurements of its target in order, each {"iteration": int, "tokens": int, "losses":
        {test set: loss}}; the shared warm-up's stand at the start of every arm. The first test set is the headline.
        Where they have a "round" (0: the warm-up), the arm has a ``cost``.
    stages: records as :func:`read_stages` returns them. Those of bilevel stages give their arm
        ``domain_weights``, where the corpus has domains: {round: {domain: mean of n P_i at the end of the stage}}.
    domains_by_field: {"domain": {"pool": {label: share}, "selected": {arm: {label: share}}}, "format": ...}; the first
        field is the one of the key ``domains``, as the bliss arm selected (or the first arm, where there is none).
    task_results: per arm its checkpoints evaluated on tasks; gives every such arm the keys of all_task_curves.
    held_out: which of the test sets are of the guide's kind, and by how much an arm may be worse than the control.
    """
    task_results, held_out = task_results or {}, held_out or HeldOut()
    arms = {
        arm: _arm_summary(measured) | {"cost": cost_curves(measured, stages, arm)} | _domain_weights(stages, arm)
        for arm, measured in evaluations.items()
    }
    for arm, measured in task_results.items():
        arms[arm] |= all_task_curves(measured)
    losses = {arm: content["losses"] for arm, content in arms.items()}
    test_sets = list(losses.get(CONTROL, {}))
    speedups = {name: speedup(losses[CONTROL][name], losses.get(CHOSEN, {}).get(name, [])) for name in test_sets}
    gained = gains(arms)
    first_field = next(iter(domains_by_field.values()), {"pool": {}, "selected": {}})
    selected = first_field["selected"]
    summary = {
        "arms": arms,
        "speedup": speedups[test_sets[0]] if test_sets else None,
        "speedups": speedups,
        "sets": held_out.sets(list(dict.fromkeys(name for curves in losses.values() for name in curves))),
        "gains": gained,
        "loss_margin": held_out.loss_margin,
        "warnings": loss_warnings(gained, held_out.loss_margin),
        "equal_compute": equal_compute(arms),
        "task_speedup": task_speedup(arms, CHOSEN, CONTROL),
        "task_speedups": {arm: task_speedup(arms, CHOSEN, arm) for arm in task_results if arm != CHOSEN},
        "task_facts": task_facts(task_results),
        "domains": {
            "pool": first_field["pool"],
            "selected": selected.get(CHOSEN, next(iter(selected.values()), {})),
        },
        "domains_by_field": domains_by_field,
        "stages": [{key: value for key, value in one.items() if key != "domain_weights"} for one in stages],
        "seed": seed,
        "versions": dict(package_versions() if versions is None else versions),
        "config_digest": config_digest(config_text),
    }
    return orjson.loads(orjson.dumps(summary, option=orjson.OPT_SERIALIZE_NUMPY))  # NaN and infinity become null


def _arm_summary(measured: Sequence[Mapping]) -> dict:
    names = list(dict.fromkeys(name for one in measured for name in one["losses"]))
    losses = {
        name: [[one["tokens"], one["losses"][name]] for one in measured if name in one["losses"]] for name in names
    }
    return {
        "validation_loss": losses[names[0]] if names else [],
        "losses": losses,
        "iterations": [one["iteration"] for one in measured],
    }


def _domain_weights(stages: Sequence[Mapping], arm: str) -> dict[str, dict]:
    noted = [one for one in stages if one["arm"] == arm and one.get("domain_weights")]
    weights = {str(one["round"]): one["domain_weights"] for one in noted}
    return {"domain_weights": weights} if weights else {}


def package_versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of those that decide the numbers."""
    from megatron_bliss import __version__

    versions = {"python": platform.python_version(), "megatron_bliss": __version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def config_digest(config_text: str) -> str:
    """Return the SHA-256 of a resolved config as it stands in ``config.yaml``."""
    return hashlib.sha256(config_text.encode()).hexdigest()


def final_losses(summary: Mapping) -> dict[str, dict[str, float | None]]:
    """Return {test set: {arm: last finite loss}} in the order of the summary."""
    names = dict.fromkeys(name for arm in summary["arms"].values() for name in arm["losses"])
    result = {}
    for name in names:
        curves = {arm: finite_points(content["losses"].get(name, [])) for arm, content in summary["arms"].items()}
        result[name] = {arm: points[-1][1] if points else None for arm, points in curves.items()}
    return result


def lift(selected: float, pool: float) -> float | None:
    """Return by what factor selection raised a label's share; None for a label that is not in the pool."""
    return selected / pool if pool else None


def by_lift(pool: Mapping[str, float], selected: Mapping[str, float]) -> list[tuple[str, float, float, float | None]]:
    """Return (label, share of the pool, share of the selection, lift), the most favoured label first."""
    labels = dict.fromkeys([*pool, *selected])
    rows = [(label, pool.get(label, 0.0), selected.get(label, 0.0)) for label in labels]
    rows = [(label, a, b, lift(b, a)) for label, a, b in rows]
    return sorted(rows, key=lambda row: (-(row[3] or 0.0), -row[1], row[0]))
