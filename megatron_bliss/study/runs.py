"""The runs of a study: one per seed and variant, with all arms of the variant in it.

STUDY/runs/seed_1/VARIANT/        run folder
STUDY/runs/seed_1/VARIANT.yaml    its options
STUDY/runs/seed_1/VARIANT.log     what it printed
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_bliss.base.files import read_json
from megatron_bliss.config.config import Config
from megatron_bliss.config.parse import to_dict
from megatron_bliss.run.checks import check
from megatron_bliss.run.folder import check_same_run
from megatron_bliss.run.options import parse_options
from megatron_bliss.study.description import Study
from megatron_bliss.study.options import merged


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    seed: int
    variant: str
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run_folder)

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.variant}"

    def beside(self, suffix: str) -> Path:
        """A file of the study beside the run folder."""
        return self.folder.with_name(self.folder.name + suffix)

    def is_finished(self) -> bool:
        """Whether all arms are through their last round. ValueError where another run lies in the folder."""
        path = self.folder / "config.yaml"
        if not path.is_file():
            return False
        check_same_run(yaml.safe_load(path.read_text(encoding="utf-8")), to_dict(self.config), path)
        if not (self.folder / "summary.json").is_file() or not (self.folder / "report.html").is_file():
            return False
        summary = read_json(self.folder / "summary.json")
        done = {(stage["arm"], stage["round"], stage["stage"]) for stage in summary["stages"]}
        ends = {(arm, self.config.rounds, "evaluate") for arm in self.config.arms}
        return ends <= done and set(self.config.arms) <= set(summary["arms"])


def study_runs(study: Study, output: Path, only: Collection[str] = ()) -> list[StudyRun]:
    """All runs in order, seed by seed, checked as the runs would check themselves.

    only: arms to run beside the control, the control that trains on, and those that have begun in the folder already;
    none: all.
    """
    unknown = set(only) - {arm for variant in study.variants for arm in study.arms_of(variant)}
    if unknown:
        raise ValueError(f"found --only {', '.join(sorted(unknown))}, expected arms of the study: change --only")
    configs = {variant: variant_config(study, variant) for variant in study.variants}
    runs = []
    for seed in study.seeds:
        for variant, config in configs.items():
            folder = output / "runs" / f"seed_{seed}" / variant
            arms = [
                arm
                for arm in config.arms
                if not only or arm in only or study.is_reference(variant, arm) or (folder / arm).is_dir()
            ]
            if arms:
                whole = dataclasses.replace(config, seed=seed, run_folder=str(folder), arms=arms)
                runs.append(StudyRun(seed, variant, whole))
    for run in runs:
        try:
            check(run.config)
        except ValueError as error:
            raise ValueError(f"{run.name}: {error}") from error
    return runs


def variant_config(study: Study, variant: str) -> Config:
    """A variant's options, as a run would read them."""
    options = merged(study.base, study.variants[variant]) | {"arms": study.arms_of(variant)}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse_options(["--config", json.dumps(options)])
    except SystemExit as end:
        text = said.getvalue().partition("error: ")[2] or said.getvalue()
        raise ValueError(f"variant {variant} has options that a run refuses: {' '.join(text.split())}") from end
