"""Whole runs on a tiny corpus, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml

from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.validation import ValidationSettings, prepare_validation
from megatron_bliss.target.log import MEASURED

ROOT = Path(__file__).parents[1]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dogs", "that", "ran", "to", "red", "houses"]


def write_texts(path: Path, count: int, seed: int) -> None:
    """Half word sequences (domain words), half digits (domain digits)."""
    generator = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            domain = "words" if number % 2 else "digits"
            source = WORDS if domain == "words" else [str(n) for n in range(100)]
            text = " ".join(generator.choice(source, 40))
            file.write(json.dumps({"text": text, "domain": domain, "url": f"test://{number}"}) + "\n")


def write_tasks(folder: Path) -> None:
    """A choice task and a cloze task of ten items each."""
    folder.mkdir()
    generator = np.random.default_rng(4)
    with open(folder / "next.choice.jsonl", "w") as choice, open(folder / "last.last_word.jsonl", "w") as cloze:
        for number in range(10):
            words = generator.choice(WORDS, 6, replace=False).tolist()
            choice.write(json.dumps({"query": "the cat", "choices": words[:4], "answer": number % 4}) + "\n")
            cloze.write(json.dumps({"text": " ".join(words)}) + "\n")


def write_corpus(folder: Path) -> None:
    """Corpus, validation sets, tasks and the config of a run on them."""
    write_texts(folder / "pool.jsonl", 120, 1)
    write_texts(folder / "held.jsonl", 12, 2)
    write_texts(folder / "other.jsonl", 6, 5)
    write_tasks(folder / "tasks")
    preprocess(
        PreprocessSettings(
            inputs=[str(folder / "pool.jsonl")],
            output_prefix=str(folder / "pool"),
            tokenizer_type="bytes",
            unit="window",
            window_length=32,
        ),
        progress="none",
    )
    for name, source, label in (
        ("guide", "held", "last-word"),
        ("held", "held", "all"),
        ("held_other", "other", "all"),
    ):
        prepare_validation(
            ValidationSettings(
                inputs=[str(folder / f"{source}.jsonl")],
                output_prefix=str(folder / name),
                tokenizer_type="bytes",
                label=label,
                max_length=32,
            )
        )
    sizes = {"architecture": "llama", "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    config = {
        "seed": 3,
        "rounds": 2,
        "data": {
            "train_prefix": str(folder / "pool"),
            "validation_prefix": str(folder / "guide"),
            "test_prefixes": [str(folder / "held")],
            "other_prefixes": [str(folder / "held_other")],
            "seq_length": 32,
        },
        "target": sizes,
        "proxy": {**sizes, "warmup_iters": 6, "warmup_batch_size": 4},
        "bilevel": {"upper_iters": 8, "global_batch_size": 4, "validation_batch_size": 4},
        "pretraining": {
            "warmup_iters": 4,
            "train_iters": 6,
            "micro_batch_size": 4,
            "global_batch_size": 4,
            "eval_interval": 3,
            "optimizer": {"lr_warmup_iters": 2},
        },
        "evaluation": {"tasks": ["next", "last"], "data_dir": str(folder / "tasks")},
        "checkpoint": {"save_interval": 2},
        "logging": {"log_interval": 1, "progress": "none", "tensorboard": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def command(corpus: Path, run_folder: Path, *options: str) -> list[str]:
    config = ["--config", str(corpus / "config.yaml"), "--run_folder", str(run_folder)]
    return [sys.executable, str(ROOT / "pretrain_bliss.py"), *config, *options]


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = [str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])]  # a machine may have its packages there
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def run(corpus: Path, run_folder: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(corpus, run_folder, *options), env=environment(), capture_output=True, text=True)


def kill_when(corpus: Path, run_folder: Path, pattern: str, *options: str) -> None:
    """Start the run and SIGKILL it as soon as a file that matches ``pattern`` is there."""
    log = run_folder.with_suffix(".log")
    with open(log, "w") as output:
        started = command(corpus, run_folder, *options)
        process = subprocess.Popen(started, env=environment(), stdout=output, stderr=output)
    try:
        while not list(run_folder.glob(pattern)):
            assert process.poll() is None, f"the run ended before {pattern} was there:\n{log.read_text()}"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def metric_lines(run_folder: Path) -> list[dict]:
    timed = ("time", *MEASURED)
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]
