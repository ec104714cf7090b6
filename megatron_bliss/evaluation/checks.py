"""What an evaluation needs, looked at before anything is computed: lm-eval, the tasks' files and the tokenizer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from megatron_bliss.config.evaluation import EvaluationConfig
from megatron_bliss.data.manifest import manifest_path, read_manifest
from megatron_bliss.data.tokenizers import Tokenizer, load_recorded_tokenizer
from megatron_bliss.evaluation.data_files import read_task
from megatron_bliss.evaluation.results import AVERAGE


def check_evaluation(config: EvaluationConfig, train_prefix: str) -> None:
    """Refuse tasks that could not be evaluated hours later; ValueError names the option to change."""
    check_installed()
    if AVERAGE in config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise ValueError(
            f"found evaluation.tasks {', '.join(config.tasks)}, expected different names, none of them {AVERAGE!r}: "
            "change it"
        )
    check_files(config.tasks, config.data_dir, allow_unknown=config.allow_unknown_data)
    load_evaluation_tokenizer(config.tokenizer_model, train_prefix)


def check_installed() -> None:
    """ValueError where lm-eval, an optional extra of this package, is missing."""
    if find_spec("lm_eval") is None:
        raise ValueError(
            "found tasks to evaluate but no lm-eval, expected it to be installed: pip install 'megatron_bliss[eval]', "
            "or leave evaluation.tasks empty"
        )


def check_files(tasks: list[str], data_dir: str, *, allow_unknown: bool) -> None:
    """Read every task's file; ValueError names what is missing, damaged or another set than expected."""
    if not Path(data_dir).is_dir() or not data_dir:
        raise ValueError(
            f"found evaluation.data_dir {data_dir!r}, expected a folder with the data files of {', '.join(tasks)}: "
            "make it with tools/prepare_evaluation.py"
        )
    for task in tasks:
        try:
            read_task(task, data_dir, allow_unknown=allow_unknown)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error


def load_evaluation_tokenizer(tokenizer_model: str | None, train_prefix: str) -> Tokenizer:
    """The tokenizer that made the corpus, from ``tokenizer_model`` or from where its manifest says it was."""
    identity = read_manifest(train_prefix).get("tokenizer")
    if not identity:
        raise ValueError(
            f"found no tokenizer in {manifest_path(train_prefix)}, expected the one that made the corpus: adopt the "
            "corpus with its tokenizer (tools/inspect_index.py)"
        )
    place = tokenizer_model or identity["file"]
    if place and not Path(place).exists():
        raise ValueError(
            f"found no file {place}, expected the tokenizer with digest {identity['sha256'][:12]} that made "
            f"{train_prefix}: set evaluation.tokenizer_model to where it lies now"
        )
    try:
        return load_recorded_tokenizer(identity, tokenizer_model)
    except ValueError as error:
        raise ValueError(str(error).replace("--tokenizer-model", "evaluation.tokenizer_model")) from error
