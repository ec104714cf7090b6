"""The plots of a study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_bliss.study.curves_plot import write_curves
from megatron_bliss.study.plot import write_plot
from megatron_bliss.study.sweep_plot import write_sweep


def write_plots(study: Mapping, folder: Path) -> dict[str, str]:
    """Write those that a study has something to show on; returns {file name: title}."""
    found = {"curves.png": "Loss against FLOPs in all, mean over the seeds; bands: standard errors"}
    write_curves(study, folder / "curves.png")
    if study["other"]:
        write_plot(study, folder / "pareto.png")
        found = {"pareto.png": "Gain on the guide against loss elsewhere"} | found
    if study.get("sweep"):
        write_sweep(study, folder / "sweep.png")
        found["sweep.png"] = f"Loss at equal tokens against {study['sweep']['option']}; bars: standard errors"
    return found
