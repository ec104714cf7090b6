"""Tasks through lm-eval's evaluator, and what it found as one document."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

import lm_eval
from lm_eval.api.metrics import mean_stderr
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from megatron_bliss.base.parallel import Groups, failing_together
from megatron_bliss.evaluation.adapter import Adapter
from megatron_bliss.evaluation.data_files import TaskData, read_task
from megatron_bliss.evaluation.likelihoods import bits_per_byte
from megatron_bliss.evaluation.tasks import make_task, templates_compiled_once, without_progress_bars

PINNED_LM_EVAL = "0.4.13"
"""The version whose tasks the definitions here repeat and whose parts the adapter uses."""
PAPER_TASKS = (
    "sciq", "arc_easy", "arc_challenge", "logiqa", "openbookqa", "boolq", "hellaswag", "piqa", "winogrande",
)  # fmt: skip
"""The nine whose mean the paper prints."""


def evaluate_tasks(
    model: LM,
    tasks: Sequence[str],
    data_dir: Path | str,
    *,
    limit: int | None = None,
    groups: Groups | None = None,
    show_progress: bool = False,
    request_cache: Path | None = None,
    allow_unknown_data: bool = False,
) -> dict:
    """Evaluate zero-shot and return, on every rank, the same document; collective over the ranks of the model.

    ``tasks``: lm-eval's ten names or those of a user's files in ``data_dir``; ``limit``: the first so many items of
    each task (None: all); ``request_cache``: folder of finished requests; ``allow_unknown_data``: take copies of the
    ten sets that are neither known nor recorded in the folder.

    ``average`` is over ``average_tasks``: those of the paper's nine that were asked for, or, without any, all tasks.
    Raises FileNotFoundError and ValueError about the data files, on every rank.
    """
    _check_version()
    with failing_together(groups) if groups is not None else contextlib.nullcontext():
        data = _read(tasks, data_dir, limit, allow_unknown_data)
    settings = _settings(model, show_progress, request_cache)
    with settings, tempfile.TemporaryDirectory() as folder, without_progress_bars(), templates_compiled_once():
        made = {name: make_task(name, data[name], Path(folder), limit) for name in data}
        found = evaluate(model, made, bootstrap_iters=0, log_samples=True)
    results = {name: _result(made[name], found["samples"][name], found["results"][name], data[name]) for name in data}
    averaged = [name for name in results if name in PAPER_TASKS] or list(results)
    return {
        "format": 1,
        "lm_eval_version": lm_eval.__version__,
        "tasks": results,
        "average": mean(results[name]["value"] for name in averaged),
        "average_tasks": averaged,
    }


def _check_version() -> None:
    if lm_eval.__version__ != PINNED_LM_EVAL:
        warnings.warn(
            f"found lm-eval {lm_eval.__version__}, expected {PINNED_LM_EVAL}: results may not compare with others; "
            f"pip install lm-eval=={PINNED_LM_EVAL}",
            stacklevel=3,
        )


def _read(tasks: Sequence[str], data_dir: Path | str, limit: int | None, allow_unknown: bool) -> dict[str, TaskData]:
    names = list(dict.fromkeys(tasks))
    if not names:
        raise ValueError("found no tasks, expected at least one: change evaluation.tasks")
    if limit is not None and limit < 1:
        raise ValueError(f"found a limit of {limit} items, expected at least 1: change evaluation.limit")
    return {name: read_task(name, data_dir, allow_unknown=allow_unknown) for name in names}


@contextlib.contextmanager
def _settings(model: LM, show_progress: bool, request_cache: Path | None) -> Iterator[None]:
    """The call's settings on our own models, for its duration."""
    if not isinstance(model, Adapter):
        if request_cache is not None:
            raise ValueError(f"found a request cache for a {type(model).__name__}, expected a model of this package")
        yield
        return
    before = model.show_progress, model.request_cache
    model.show_progress, model.request_cache = show_progress, request_cache
    try:
        yield
    finally:
        model.show_progress, model.request_cache = before


def _result(task: ConfigurableTask, samples: list[dict], aggregated: dict, data: TaskData) -> dict:
    """acc_norm where the task has it, else acc, with the standard error of the mean; every metric; bits per byte."""
    metrics: dict[str, float] = {}
    for name in samples[0]["metrics"]:
        metrics[name] = float(aggregated[f"{name},none"])
        if name in ("acc", "acc_norm"):
            values = [sample[name] for sample in samples]
            metrics[f"{name}_stderr"] = mean_stderr(values) if len(values) > 1 else 0.0
    main = "acc_norm" if "acc_norm" in metrics else "acc"
    bits, bits_error = bits_per_byte(task, samples)
    return {
        "metric": main,
        "value": metrics[main],
        "stderr": metrics[f"{main}_stderr"],
        "num_items": len(samples),
        "metrics": metrics,
        "bits_per_byte": bits,
        "bits_per_byte_stderr": bits_error,
        "data": {"file": data.file.name, "sha256": data.sha256, "known": data.known},
    }
