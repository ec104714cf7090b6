"""Runs of one seed that differ only in how they select begin from the same shards and warm-up: they are made once.

What has no part in shards and warm-up is named here; every other option, also one that is new, has to agree.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import orjson
import yaml

from megatron_bliss.base.files import atomic_file, sync_folder
from megatron_bliss.base.metrics import read_metrics
from megatron_bliss.config.config import Config
from megatron_bliss.config.parse import dump_yaml, to_dict
from megatron_bliss.run.order import needs_proxy
from megatron_bliss.run.session import SHARED
from megatron_bliss.study.runs import StudyRun

FREE = ("run_folder", "arms", "bilevel", "score", "scoring", "baselines", "selection")
"""Sections and options that neither shards nor warm-up depend on."""
FREE_DATA = ("validation_prefix", "guide_weights", "reference_prefix")
"""The same in the section ``data``: the guide and what it is held against have a part in rounds only."""
PARTS = ("shards", "warmup")
"""Folders of a run that others take over."""


def share_warmup(run: StudyRun, earlier: Sequence[StudyRun]) -> StudyRun | None:
    """Let a run that has not begun start with the shards and the warm-up of an earlier one; returns that one.

    The new run folder appears whole or not at all. Its files are links to the same content where the file system has
    links: a finished stage's files are never written again.
    """
    if run.folder.exists():
        return None
    source = next((one for one in earlier if _is_usable(one, run.config)), None)
    if source is None:
        return None
    begun = run.beside(".begun")  # beside it, because links to the corpus are relative
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(parents=True)
    for part in PARTS:
        shutil.copytree(source.folder / part, begun / part, symlinks=True, copy_function=_link)
    _copy_metrics(source.folder / "metrics.jsonl", begun / "metrics.jsonl")
    with atomic_file(begun / "config.yaml", "w") as file:
        file.write(dump_yaml(run.config))
    os.rename(begun, run.folder)
    sync_folder(run.folder.parent)
    return source


def warmup_source(run: StudyRun, earlier: Sequence[StudyRun]) -> StudyRun | None:
    """The run whose warm-up :func:`share_warmup` will take for one that has not begun, once that warm-up is there."""
    wanted = warmup_options(to_dict(run.config))
    return next((one for one in earlier if warmup_options(to_dict(one.config)) == wanted), None)


def warmup_options(config: dict) -> dict:
    """Of a resolved configuration, all that shards and warm-up may depend on."""
    options = {name: value for name, value in config.items() if name not in FREE}
    data = {name: value for name, value in options["data"].items() if name not in FREE_DATA}
    return options | {"data": data}


def _is_usable(source: StudyRun, config: Config) -> bool:
    """Whether a run's shards and warm-up are finished, and made with the same options."""
    folder, written = source.folder, source.folder / "config.yaml"
    stages = ["shards", "warmup/target"]
    stages += ["warmup/proxy"] if needs_proxy(source.config) else []  # where there is none, this run makes its own
    stages += ["warmup/decay_branch"] if config.pretraining.decay_branch_iters else []
    stages += ["warmup/evaluate"] if config.evaluation.tasks else []
    if not written.is_file() or not all((folder / stage / "done.json").is_file() for stage in stages):
        return False
    found = yaml.safe_load(written.read_text(encoding="utf-8"))
    return warmup_options(found) == warmup_options(to_dict(config))


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # a file system without hard links
        shutil.copy2(source, destination)


def _copy_metrics(source: Path, destination: Path) -> None:
    """The lines of the warm-up."""
    lines = [line for line in read_metrics(source) if line["arm"] == SHARED]
    with atomic_file(destination) as file:
        file.writelines(orjson.dumps(line) + b"\n" for line in lines)
