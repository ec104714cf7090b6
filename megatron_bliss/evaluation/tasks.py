"""lm-eval tasks over local files: the ten definitions of this package, and those made for a user's own files.

A definition is data: YAML of this package read without lm-eval's ``!function`` tag, which runs code, or a dictionary
made here. What comes from a data file is only ever the value of a template's variable.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import datasets
import lm_eval.api.task as lm_eval_task
import lm_eval.utils as lm_eval_utils
import orjson
import yaml
from lm_eval.api.task import ConfigurableTask

from megatron_bliss.evaluation.data_files import TASK_NAMES, TaskData

_ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_NORMALISED = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
_PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
_USER_DEFINITIONS = {
    "last_word": {
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "word",
        "metric_list": [_PERPLEXITY, _ACCURACY],
        "metadata": {"version": 1.0},
    },
    "choice": {
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [_ACCURACY, _NORMALISED],
        "metadata": {"version": 1.0},
    },
}


def definition(kind: str) -> dict:
    """The definition of one of lm-eval's tasks, or of a kind of a user's."""
    if kind in TASK_NAMES:
        text = resources.files(__package__).joinpath("task_definitions", f"{kind}.yaml").read_text(encoding="utf-8")
        return yaml.safe_load(text)
    return dict(_USER_DEFINITIONS[kind])


def make_task(name: str, data: TaskData, folder: Path, limit: int | None = None) -> ConfigurableTask:
    """A task over the first ``limit`` rows (None: all); ``folder`` takes them and what the datasets library makes."""
    config = definition(data.kind) | {"task": name}
    split = config.get("test_split") or config["validation_split"]
    path = folder / f"{name}.jsonl"
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in data.rows[:limit]))
    config["dataset_kwargs"] = {"data_files": {split: str(path)}, "cache_dir": str(folder / "datasets")}
    return ConfigurableTask(config=config)


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silence the bars of datasets and of lm-eval's request building, which every rank would draw.

    lm-eval 0.4.13 has no option for its own; goes when it has one.
    """
    shown, bar = datasets.are_progress_bars_disabled(), lm_eval_task.tqdm
    datasets.disable_progress_bars()
    lm_eval_task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        lm_eval_task.tqdm = bar
        if not shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Keep the templates that lm-eval compiles: it does so anew for every item, which takes as long as a small model's
    answers.

    lm-eval 0.4.13 has one jinja2 environment for all tasks, without a cache; goes when it has one.
    """
    environment = lm_eval_utils.env
    environment.from_string = functools.lru_cache(maxsize=256)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # the class has its own
