"""The run folder: where each stage writes, what is finished, and whether a rerun is the same run.

Layout: ``config.yaml``, ``shards/``, ``warmup/{target,proxy}`` shared by all arms, ``ARM/round_01/STAGE/``. A stage
writes only in its own folder and ``done.json`` last, so a folder without it is unfinished work to go on with.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from megatron_bliss.base.files import atomic_file, read_json, write_json
from megatron_bliss.base.parallel import Groups, barrier, failing_together, max_over_ranks
from megatron_bliss.base.platform import peak_memory_bytes, reset_peak_memory
from megatron_bliss.config.config import Config
from megatron_bliss.config.parse import dump_yaml, to_dict

CHANGEABLE = (
    "arms",
    "stage",
    "round",
    "arm",
    "logging",
    "checkpoint",
    "run_folder",
    "platform.distributed_timeout_minutes",
    "target.tensor_model_parallel_size",
    "target.pipeline_model_parallel_size",
    "target.virtual_pipeline_model_parallel_size",
    "target.sequence_parallel",
    "target.recompute_granularity",
    "target.recompute_method",
    "target.recompute_num_layers",
    "target.recompute_modules",
    "pretraining.micro_batch_size",
    "pretraining.use_distributed_optimizer",
    "pretraining.overlap_grad_reduce",
    "pretraining.overlap_param_gather",
)
"""Options that may differ when a run is continued: none changes a number (the target's layout: but for rounding)."""


class RunFolder:
    """Paths and completion markers of one run; every method that writes does so on the main rank only."""

    def __init__(self, path: str | Path, groups: Groups) -> None:
        self.path, self.groups = Path(path), groups
        self._needed: dict[str, None] = {}

    def open(self, config: Config) -> None:
        """Write ``config.yaml`` in a new folder; in an old one, refuse options that would make it another run."""
        with failing_together(self.groups):
            if self.groups.is_main:
                self._open(config)

    def stage_folder(self, arm: str, round_number: int, stage: str) -> Path:
        """``ARM/round_01/STAGE``; round 0 is the warm-up, shared by all arms."""
        if round_number == 0:
            return self.path / "warmup" / stage
        return self.path / arm / f"round_{round_number:02d}" / stage

    def record(self, folder: Path) -> dict | None:
        """What a finished stage left in ``done.json``, or None."""
        marker = folder / "done.json"
        return read_json(marker) if marker.is_file() else None

    def require(self, folder: Path, needed_by: str) -> dict:
        """The record of a stage that has to be finished before ``needed_by`` can start."""
        record = self.record(folder)
        if record is None:
            raise ValueError(
                f"found no {folder / 'done.json'}, expected that stage to be finished before {needed_by}: run it first "
                "(without --stage everything that is missing is run in order)"
            )
        self._needed[folder.relative_to(self.path).as_posix()] = None
        return record

    def run_stage(self, folder: Path, work: Callable[[Path], dict]) -> None:
        """Run ``work(folder)`` unless it is finished; its result becomes ``done.json``.

        Beside it stand seconds, peak bytes, and the folders of the stages that it required (``needs``). Seconds are
        this attempt's: those of attempts that were killed were measured by nobody.
        """
        if (folder / "done.json").is_file():
            return
        if self.groups.is_main:
            folder.mkdir(parents=True, exist_ok=True)
        barrier(self.groups)
        reset_peak_memory()
        self._needed.clear()
        start = time.monotonic()
        result = work(folder)
        seconds = round(time.monotonic() - start, 3)
        peak = int(max_over_ranks(peak_memory_bytes(), self.groups))
        if self.groups.is_main:
            cost = {"seconds": seconds, "peak_bytes": peak, "needs": list(self._needed)}
            write_json(folder / "done.json", {**result, **cost})
        barrier(self.groups)

    def _open(self, config: Config) -> None:
        path = self.path / "config.yaml"
        if path.is_file():
            check_same_run(yaml.safe_load(path.read_text(encoding="utf-8")), to_dict(config), path)
            return
        if self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(
                f"found files but no config.yaml in {self.path}, expected an empty folder or an earlier run: "
                "choose another --run_folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, "w") as file:
            file.write(dump_yaml(config))


def check_same_run(old: dict, new: dict, path: Path) -> None:
    differences = [
        f"{name}: {json.dumps(before)} there, {json.dumps(after)} now"
        for name, before, after in _differences(old, new)
        if not any(name == free or name.startswith(free + ".") for free in CHANGEABLE)
    ]
    if differences:
        raise ValueError(
            f"found a run with other options in {path} ({'; '.join(differences)}), expected the same ones: continue "
            "with the old options, or choose another --run_folder"
        )


def _differences(old: object, new: object, name: str = "") -> Iterator[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new
