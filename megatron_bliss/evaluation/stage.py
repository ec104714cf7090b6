"""A checkpoint of a run on the tasks that the run asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from lm_eval.api.model import LM

from megatron_bliss.base.parallel import Groups, failing_together
from megatron_bliss.config.evaluation import EvaluationConfig
from megatron_bliss.evaluation import TargetModel, evaluate_tasks
from megatron_bliss.evaluation.checks import load_evaluation_tokenizer
from megatron_bliss.evaluation.data_files import read_task
from megatron_bliss.evaluation.results import AVERAGE, write_results
from megatron_bliss.target.model import Target


def evaluate_checkpoint(
    config: EvaluationConfig,
    target: Target,
    groups: Groups,
    folder: Path,
    *,
    train_prefix: str,
    max_length: int,
    label: str,
    show_progress: bool,
) -> dict:
    """Collective: the target's results on the tasks, the same on every rank; the main rank writes them to ``folder``.

    max_length: tokens the target sees at once; train_prefix: the corpus, whose tokenizer is used; label: of the row of
    ``results.md``.
    """
    with failing_together(groups):
        tokenizer = load_evaluation_tokenizer(config.tokenizer_model, train_prefix)
    model = TargetModel(target, groups, tokenizer, max_length=max_length, batch_tokens=config.batch_tokens)
    result = evaluate_model(model, config, groups=groups, show_progress=show_progress)
    with failing_together(groups):
        if groups.is_main:
            write_results(folder, result, label)
    return result


def evaluate_model(
    model: LM,
    config: EvaluationConfig,
    *,
    groups: Groups | None,
    show_progress: bool,
    request_cache: Path | None = None,
) -> dict:
    """Collective: results of any model on the tasks of a config, with what guessing would give as ``chance``."""
    limit, allow_unknown = config.limit or None, config.allow_unknown_data
    result = evaluate_tasks(
        model,
        config.tasks,
        config.data_dir,
        limit=limit,
        groups=groups,
        show_progress=show_progress,
        request_cache=request_cache,
        allow_unknown_data=allow_unknown,
    )
    for name, task in result["tasks"].items():
        task["chance"] = chance(read_task(name, config.data_dir, allow_unknown=allow_unknown).rows[:limit])
    return result


def chance(rows: Sequence[Mapping]) -> float | None:
    """Expected accuracy of guessing; None for tasks without choices, whose words nobody guesses."""
    sizes = [_num_choices(row) for row in rows]
    return None if None in sizes else mean(1 / size for size in sizes)


def _num_choices(row: Mapping) -> int | None:
    listed = row.get("choices", row.get("options"))
    if listed is not None:
        return len(listed)
    two = {"sol1", "option1", "passage"} & row.keys()  # PIQA, WinoGrande, BoolQ
    return 2 if two else 4 if "distractor1" in row else None


def task_metrics(result: dict) -> dict[str, float]:
    """What metrics.jsonl says of a result: tasks/NAME, tasks/NAME_bits_per_byte, tasks/NAME_perplexity where there is
    one, tasks/average."""
    metrics = {}
    for name, task in result["tasks"].items():
        metrics[f"tasks/{name}"] = task["value"]
        metrics[f"tasks/{name}_bits_per_byte"] = task["bits_per_byte"]
        if "perplexity" in task["metrics"]:
            metrics[f"tasks/{name}_perplexity"] = task["metrics"]["perplexity"]
    return metrics | {f"tasks/{AVERAGE}": result["average"]}
