"""Evaluate one checkpoint on tasks: a target in its parallel layout, a proxy's final.pt, or a Hugging Face folder.

  torchrun --nproc-per-node 2 tools/evaluate.py --target RUN/bliss/round_02/pretrain/step_00000350 --output evaluated
  python tools/evaluate.py --huggingface exported --tasks sciq piqa --data-dir eval-data --output evaluated

Writes results.json and results.md into the output folder. Nothing is fetched from a network.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_bliss.base.command import command
from megatron_bliss.config.evaluation import EvaluationConfig
from megatron_bliss.config.platform import PlatformConfig
from megatron_bliss.evaluation.checks import check_files, check_installed
from megatron_bliss.run.options import read_config

RANK = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
"""Under torchrun: which process speaks."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--target", type=Path, help="checkpoint of the target (a step_... folder)")
    model.add_argument("--proxy", type=Path, help="final.pt of the proxy's warm-up or of a bilevel stage")
    model.add_argument("--huggingface", type=Path, help="folder with config.json, safetensors and tokenizer.json")
    add = parser.add_argument
    add("--run", type=Path, help="run folder of the checkpoint (default: the one it lies in)")
    add("--tasks", nargs="+", help="default: those of the run")
    add("--data-dir", help="folder of the tasks' data files (default: that of the run)")
    add("--output", type=Path, required=True, help="folder for results.json and results.md")
    add("--label", help="of the row of results.md (default: the checkpoint's path)")
    add("--tokenizer-model", help="tokenizer file of the run, where it is no longer where it was")
    add("--max-length", type=int, help="tokens the model sees at once (default: as in training)")
    add("--batch-tokens", type=int, default=EvaluationConfig.batch_tokens, help="tokens of a forward pass")
    add("--limit", type=int, default=0, help="items per task, the first ones (0: all)")
    add("--allow-unknown-data", action="store_true", help="take copies of lm-eval's sets that are not the known ones")
    add("--request-cache", type=Path, help="folder of finished requests, from which a killed evaluation goes on")
    return parser.parse_args(arguments)


def evaluate(options: argparse.Namespace) -> None:
    """Load, evaluate, write, print; ValueError for what the user can mend."""
    check_installed()

    from megatron_bliss.base import parallel  # megatron-core and lm-eval take seconds to import
    from megatron_bliss.evaluation.checkpoints import Checkpoint, find_run, load_model
    from megatron_bliss.evaluation.results import markdown, write_results
    from megatron_bliss.evaluation.stage import evaluate_model

    kind = next(kind for kind in ("target", "proxy", "huggingface") if getattr(options, kind))
    path = getattr(options, kind)
    run = None if kind == "huggingface" else options.run or find_run(path)
    config = None if run is None else read_config(run / "config.yaml")
    wanted = Checkpoint(kind, path, run, config, options.tokenizer_model, options.max_length, options.batch_tokens)
    recorded = config.evaluation if config else EvaluationConfig()
    asked = EvaluationConfig(
        tasks=options.tasks or recorded.tasks,
        data_dir=options.data_dir or recorded.data_dir,
        limit=options.limit,
        batch_tokens=options.batch_tokens,
        allow_unknown_data=options.allow_unknown_data,
    )
    if not asked.tasks:
        raise ValueError("found no tasks, expected at least one: give --tasks")
    check_files(asked.tasks, asked.data_dir, allow_unknown=asked.allow_unknown_data)
    groups = parallel.initialize(config.platform if config else PlatformConfig(), wanted.target, seed=0)
    try:
        model = load_model(wanted, groups)
        result = evaluate_model(
            model, asked, groups=groups, show_progress=groups.is_main, request_cache=options.request_cache
        )
        label = options.label or str(path)
        with parallel.failing_together(groups):
            if groups.is_main:
                options.output.mkdir(parents=True, exist_ok=True)
                write_results(options.output, result, label)
                print(markdown({label: result}), end="")
    finally:
        parallel.destroy()


@command(f"evaluate: error{RANK}", (ValueError, FileNotFoundError), status=2)
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    evaluate(parse_arguments(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
