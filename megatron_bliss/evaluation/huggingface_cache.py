"""Tasks' data files from a cache that the Hugging Face ``datasets`` library left on this machine, read as Arrow files.

The library itself is not used: it would ask the network whether its cache is still current.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from megatron_bliss.data.text_tasks import write_items
from megatron_bliss.evaluation.checksums import KNOWN, digest
from megatron_bliss.evaluation.data_files import STEMS, read_rows, write_checksums


class Source(NamedTuple):
    """Where a task's rows are on Hugging Face: names that the data set has had, its config and the scored split."""

    datasets: tuple[str, ...]
    config: str
    split: str


SOURCES: dict[str, Source] = {
    "sciq": Source(("allenai/sciq", "sciq"), "default", "test"),
    "arc_easy": Source(("allenai/ai2_arc", "ai2_arc"), "ARC-Easy", "test"),
    "arc_challenge": Source(("allenai/ai2_arc", "ai2_arc"), "ARC-Challenge", "test"),
    "logiqa": Source(("EleutherAI/logiqa",), "logiqa", "test"),
    "openbookqa": Source(("allenai/openbookqa", "openbookqa"), "main", "test"),
    "boolq": Source(("aps/super_glue", "super_glue"), "boolq", "validation"),
    "hellaswag": Source(("Rowan/hellaswag", "hellaswag"), "default", "validation"),
    "piqa": Source(("baber/piqa", "ybisk/piqa", "piqa"), "*", "validation"),
    "winogrande": Source(("allenai/winogrande", "winogrande"), "winogrande_xl", "validation"),
    "lambada_openai": Source(("EleutherAI/lambada_openai",), "default", "test"),
}
"""The same data sets as the tasks of lm-eval read."""


def default_cache() -> Path:
    """Where the datasets library keeps its cache, by its environment variables."""
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    home = Path(os.environ.get("HF_HOME", home))
    return Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()


def export_tasks(cache_dir: Path | str, output: Path | str, tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Write what there is as ``STEM.jsonl.gz`` with its checksums; returns a line per task found, and per task missing.

    ValueError where the cache's rows are not the task's.
    """
    if not Path(cache_dir).is_dir():
        raise ValueError(
            f"found no folder {cache_dir}, expected the cache of the datasets library: give --cache-dir, or set "
            "HF_DATASETS_CACHE"
        )
    found, missing = [], []
    for task in tasks:
        files = cached_files(cache_dir, SOURCES[task])
        if files:
            found.append(_export(task, files, Path(output)))
        else:
            missing.append(f"{task}: {_wanted(SOURCES[task])}")
    return found, missing


def cached_files(cache_dir: Path | str, source: Source) -> list[Path]:
    """Arrow files of a data set's split in order, those of the copy written last; empty where there is none."""
    for name in source.datasets:
        pattern = f"{name.replace('/', '___')}/{source.config}*/*/*/*-{source.split}*.arrow"
        copies: dict[Path, list[Path]] = {}
        for path in sorted(Path(cache_dir).glob(pattern)):
            if (
                path.parts[-4] == source.config
                or path.parts[-4].startswith(f"{source.config}-")
                or source.config == "*"
            ):
                copies.setdefault(path.parent, []).append(path)
        if copies:
            return copies[max(copies, key=lambda folder: (folder.stat().st_mtime_ns, str(folder)))]
    return []


def _export(task: str, files: Sequence[Path], output: Path) -> str:
    rows = [row for path in files for row in _read_arrow(path)]
    path = output / f"{STEMS[task]}.jsonl.gz"
    write_items(path, rows)
    try:
        _, checked = read_rows(task, output)
    except ValueError:
        path.unlink()
        raise
    write_checksums(output, [task])
    known = KNOWN[task].sha256 == digest(checked)
    state = "the known set" if known else f"not the known set ({KNOWN[task].rows:,} rows): recorded as it is"
    return f"{path}: task {task}, {len(checked):,} items, {state}"


def _read_arrow(path: Path) -> list[dict]:
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            return reader.read_all().to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is no Arrow file of the datasets library ({error}): remove it and fill the cache anew"
        ) from error


def _wanted(source: Source) -> str:
    folder = source.datasets[0].replace("/", "___")
    config = "CONFIG" if source.config == "*" else source.config
    arguments = f'"{source.datasets[0]}"' + ("" if source.config in ("*", "default") else f', "{source.config}"')
    return (
        f"expected {folder}/{config}/VERSION/HASH/*-{source.split}.arrow, left on a machine with internet by: "
        f"python -c 'import datasets; datasets.load_dataset({arguments})'"
    )
