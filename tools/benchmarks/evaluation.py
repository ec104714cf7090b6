"""``benchmark.py evaluation``: requests a second of the target's adapter against lm-eval's own ``hf`` backend.

Same weights, same requests as tokens, equal tokens in the largest batch, one process, in turns. The requests have the
lengths and choices of the paper's tasks, or come from local files with --data-dir and --tokenizer-model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from megatron_bliss.base import parallel
from megatron_bliss.config.models import ModelConfig, TargetConfig
from megatron_bliss.config.platform import PlatformConfig
from megatron_bliss.data.tokenizers import BytesTokenizer, load_tokenizer
from megatron_bliss.models.convert import huggingface_layout, reader, target_layout
from megatron_bliss.models.huggingface import config_json, open_huggingface
from megatron_bliss.models.presets import Architecture, resolve_architecture
from megatron_bliss.target.model import build_target
from megatron_bliss.target.weights import load_full_weights
from tools.benchmarks import measure

LENGTHS = {
    "sciq": (119, 1.9, 4),
    "arc_easy": (28, 4.6, 4),
    "arc_challenge": (31, 5.9, 4),
    "logiqa": (190, 16.7, 4),
    "openbookqa": (12, 3.4, 4),
    "boolq": (141, 1.0, 2),
    "hellaswag": (30, 14.0, 4),
    "piqa": (14, 23.1, 2),
    "winogrande": (17, 5.7, 2),
    "lambada_openai": (80, 1.4, 1),
}
"""Task -> (mean tokens of a context, of a continuation, choices), over 300 items with GPT-NeoX's tokenizer."""
CASES = {
    "huggingface": "lm-eval's hf backend",
    "alone": "adapter, every request by itself",
    "adapter": "adapter",
}
Encoded = tuple[None, list[int], list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options; the defaults are the reference case."""
    add = parser.add_argument
    add("--preset", default="pythia-31m", help="architecture")
    add("--vocab", type=int, help="vocabulary size instead of the preset's")
    add("--items", type=int, default=20, help="items of each task")
    add("--tasks", nargs="+", choices=list(LENGTHS), default=list(LENGTHS), help="what to ask")
    add("--data-dir", help="ask the items of these local files (needs --tokenizer-model)")
    add("--tokenizer-model", help="tokenizer.json for --data-dir")
    add("--batch-size", type=int, default=8, help="requests in a batch of lm-eval's backend")
    add("--repetitions", type=int, default=3, help="times each case is timed, after one call to warm up")


def run(options: argparse.Namespace) -> dict:
    """Time all cases; the answers of both sides are compared, too."""
    if min(options.repetitions, options.batch_size, options.items) < 1:
        raise ValueError("found --repetitions, --batch-size or --items below 1, expected at least 1")
    architecture = resolve_architecture(ModelConfig(preset=options.preset), options.vocab or 50304)
    requests = _local_requests(options) if options.data_dir else invented_requests(options, architecture.vocab_size)
    longest = max(len(context) + len(continuation) for _, context, continuation in requests) - 1
    description = measure.machine(torch.device("cpu"))
    groups = parallel.initialize(PlatformConfig(), TargetConfig(), seed=1)
    try:
        cases, answers = _cases(architecture, requests, longest, options.batch_size, groups), {}
        for name, case in cases.items():
            answers[name] = case()
        times = measure.interleaved_times(cases, options.repetitions, torch.device("cpu"))
    finally:
        parallel.destroy()
    return _result(options, description, requests, longest, answers, times)


def invented_requests(options: argparse.Namespace, vocab_size: int) -> list[Encoded]:
    """Random tokens; lengths vary about those of the tasks, the choices of an item share its context."""
    generator, requests = np.random.default_rng(0), []
    for task in options.tasks:
        context_length, continuation_length, choices = LENGTHS[task]
        for _ in range(options.items):
            context = generator.integers(vocab_size, size=1 + generator.poisson(context_length - 1)).tolist()
            for _ in range(choices):
                size = 1 + generator.poisson(continuation_length - 1)
                requests.append((None, context, generator.integers(vocab_size, size=size).tolist()))
    return requests


def _local_requests(options: argparse.Namespace) -> list[Encoded]:
    from megatron_bliss.evaluation.adapter import encode_pairs
    from megatron_bliss.evaluation.data_files import read_task
    from megatron_bliss.evaluation.tasks import make_task, without_progress_bars

    if not options.tokenizer_model:
        raise ValueError("found --data-dir without --tokenizer-model, expected both: give --tokenizer-model")
    tokenizer, pairs = load_tokenizer("huggingface", options.tokenizer_model), []
    with tempfile.TemporaryDirectory() as folder, without_progress_bars():
        for name in options.tasks:
            data = read_task(name, options.data_dir, allow_unknown=True)
            task = make_task(name, data, Path(folder), options.items)
            task.build_all_requests(rank=0, world_size=1)
            pairs += [instance.args for instance in task.instances]
    found = encode_pairs(pairs, lambda texts, **_: tokenizer.encode_batch(texts), tokenizer.eod)
    return [(None, context, continuation) for _, context, continuation in found]


def _cases(architecture: Architecture, requests: list[Encoded], longest: int, batch_size: int, groups) -> dict:
    from megatron_bliss.evaluation import TargetModel

    reference = _huggingface(architecture, longest, batch_size)
    target = build_target(TargetConfig(), architecture, groups, seq_length=longest, params_dtype=torch.float32, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        reference.model.save_pretrained(folder)
        _, weights = open_huggingface(folder)
        read = reader(weights, huggingface_layout(architecture), target_layout(architecture))
        load_full_weights(target, read, groups)
    options = {"max_length": longest, "batch_tokens": batch_size * longest}
    adapter = TargetModel(target, groups, BytesTokenizer(), **options)
    alone = TargetModel(target, groups, BytesTokenizer(), **options)
    alone.backbone.shares_beginnings = False
    return {
        "huggingface": lambda: reference._loglikelihood_tokens(requests, disable_tqdm=True),
        "alone": lambda: alone._loglikelihood_tokens(requests),
        "adapter": lambda: adapter._loglikelihood_tokens(requests),
    }


def _huggingface(architecture: Architecture, longest: int, batch_size: int):
    """lm-eval's model around random weights; its tokenizer is never asked."""
    import tokenizers
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = config_json(architecture, torch.float32, longest)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=end, eos_token=end)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=longest)


def _result(options, description: dict, requests: list, longest: int, answers: dict, times: dict) -> dict:
    medians = {name: statistics.median(values) for name, values in times.items()}
    rates = {name: len(requests) / seconds for name, seconds in medians.items()}
    reference = np.array(answers["huggingface"])
    return {
        "machine": description,
        "model": options.preset,
        "source": "local files" if options.data_dir else "invented tokens",
        "tasks": options.tasks,
        "requests": len(requests),
        "batch_tokens": options.batch_size * longest,
        "requests_per_second": rates,
        "speedup": rates["adapter"] / rates["huggingface"],
        "speedup_alone": rates["alone"] / rates["huggingface"],
        "largest_difference": float(np.abs(np.array(answers["adapter"])[:, 0] - reference[:, 0]).max()),
        "greedy_equal": bool((np.array(answers["adapter"])[:, 1] == reference[:, 1]).all()),
        "times": {name: [round(value, 6) for value in values] for name, values in times.items()},
    }


def _description(result: dict) -> str:
    agreement = "equal" if result["greedy_equal"] else "differ"
    return (
        f"{result['model']}, fp32, {result['requests']:,} requests ({result['source']}) like those of"
        f" {', '.join(result['tasks'])}; largest batch {result['batch_tokens']:,} tokens on both sides. Largest"
        f" difference of a log-likelihood {result['largest_difference']:.1e}; greedy answers {agreement}.\n"
    )


def markdown(result: dict, command: str) -> str:
    """The whole page."""
    described = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["machine"].items())
    rows = [
        f"| {label} | {result['requests_per_second'][name]:.1f} |"
        f" {result['requests_per_second'][name] / result['requests_per_second']['huggingface']:.2f} |"
        f" {statistics.median(result['times'][name]):.2f}"
        f" ({min(result['times'][name]):.2f}-{max(result['times'][name]):.2f}) |"
        for name, label in CASES.items()
    ]
    return "\n".join(
        [
            "# Evaluation",
            f"\n`{command}`\n\n{described}.\n",
            _description(result),
            "| | requests/s | ratio | seconds, median (least-most) |",
            "| --- | ---: | ---: | ---: |",
            *rows,
            "",
        ]
    )
