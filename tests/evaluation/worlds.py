"""What the evaluation's tests work on: data files of all tasks made of invented words, a tokenizer and small models.

Rows are spelled as the Hugging Face data sets are that lm-eval's own tasks read, so that both can be run on them.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_bliss.data.tokenizers import load_tokenizer
from megatron_bliss.evaluation import TASK_NAMES, ProxyModel, TargetModel, evaluate_tasks
from megatron_bliss.evaluation.data_files import STEMS, read_task
from megatron_bliss.evaluation.tasks import make_task, without_progress_bars
from megatron_bliss.models.convert import converted, huggingface_layout, proxy_layout, reader, target_layout
from megatron_bliss.models.huggingface import open_huggingface
from megatron_bliss.models.transformer import build_lm
from megatron_bliss.target.model import build_target
from megatron_bliss.target.weights import load_full_weights
from tests.targets import LLAMA, NEOX

ITEMS = 200
VOCAB_SIZE = 500
MAX_LENGTH = 48
"""Shorter than some prompts: they are cut on the left."""
ARCHITECTURES = {
    "neox": replace(NEOX, vocab_size=VOCAB_SIZE),
    "llama": replace(LLAMA, vocab_size=VOCAB_SIZE),
}
MODELS = [f"{family}_{state}" for family in ARCHITECTURES for state in ("random", "trained")]


class Words:
    """Invented text: a word tells something about the next, so that a model can learn it."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._words = ["".join(self._random.choice(list("abcdeimnorst"), 4)) for _ in range(60)]

    def text(self, least: int, most: int) -> str:
        count, word = self._random.integers(least, most + 1), self._random.integers(60)
        steps = self._random.integers(1, 4, count).cumsum()
        return " ".join(self._words[(word + step) % 60] for step in steps)

    def index(self, size: int) -> int:
        return int(self._random.integers(size))


def _choices(words: Words, size: int = 4) -> dict:
    labels = list("ABCDE"[:size])
    texts = [words.text(1, 5) for _ in labels]
    return {"choices": {"text": texts, "label": labels}, "answerKey": labels[words.index(size)]}


def _distractors(words: Words) -> dict:
    return {f"distractor{number}": words.text(1, 2) for number in (1, 2, 3)}


ROWS = {
    "sciq": lambda w: (
        {"question": w.text(3, 9), "support": w.text(0, 30), "correct_answer": w.text(1, 2)} | _distractors(w)
    ),
    "arc_easy": lambda w: {"id": "x", "question": w.text(4, 14)} | _choices(w, 3 + w.index(3)),
    "arc_challenge": lambda w: {"id": "x", "question": w.text(4, 14)} | _choices(w),
    "logiqa": lambda w: {
        "label": "abcd"[w.index(4)],
        "context": w.text(5, 30),
        "question": w.text(3, 8),
        "options": [w.text(2, 6) for _ in range(4)],
    },
    "openbookqa": lambda w: {"question_stem": w.text(3, 10)} | _choices(w),
    "boolq": lambda w: {"question": w.text(3, 8), "passage": w.text(10, 40), "label": w.index(2), "idx": 0},
    "hellaswag": lambda w: {
        "activity_label": w.text(1, 2),
        "ctx_a": w.text(4, 9) + " [title] " + w.text(2, 3) + " [step]  a.",
        "ctx_b": w.text(1, 3),
        "endings": [w.text(3, 12) for _ in range(4)],
        "label": str(w.index(4)),
    },
    "piqa": lambda w: {"goal": w.text(2, 8), "sol1": w.text(3, 12), "sol2": w.text(3, 12), "label": w.index(2)},
    "winogrande": lambda w: {
        "sentence": f"{w.text(3, 8)} _ {w.text(1, 6)}.",
        "option1": w.text(1, 1),
        "option2": w.text(1, 1),
        "answer": "12"[w.index(2)],
    },
    "lambada_openai": lambda w: {"text": f'{w.text(5, 20)}\n\n"{w.text(5, 20)}'},
}


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Rows as JSON lines, gzipped where the name says so."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_data(folder: Path, items: int = ITEMS, seed: int = 0) -> Path:
    """Files of the ten tasks and two of a user's own, "cloze" and "continuation"."""
    folder.mkdir(parents=True)
    words = Words(seed)
    for name, make in ROWS.items():
        ending = ".jsonl.gz" if name in ("sciq", "hellaswag") else ".jsonl"
        write_jsonl(folder / (STEMS[name] + ending), [make(words) for _ in range(items)])
    write_jsonl(folder / "cloze.last_word.jsonl.gz", [{"text": words.text(5, 30)} for _ in range(items)])
    rows = [
        {"query": words.text(4, 20), "choices": [words.text(2, 6) for _ in range(4)], "answer": words.index(4)}
        for _ in range(items)
    ]
    write_jsonl(folder / "continuation.choice.jsonl", rows)
    return folder


def all_tasks() -> list[str]:
    return [*TASK_NAMES, "cloze", "continuation"]


def make_requests(data_dir: Path, folder: Path, tasks: list[str] | None = None) -> list:
    """lm-eval's requests for all tasks, in order."""
    requests = []
    folder.mkdir(parents=True, exist_ok=True)
    with without_progress_bars():
        for name in tasks or all_tasks():
            task = make_task(name, read_task(name, data_dir, allow_unknown=True), folder)
            task.build_all_requests(rank=0, world_size=1)
            requests += task.instances
    return requests


def recorded_run(model, data_dir: Path, groups=None) -> tuple[list, dict]:
    """One evaluation of all tasks: the answers to its requests, in order, and its document."""
    answers, ask = [], model.loglikelihood

    def asking(requests: list, **options) -> list:
        found = ask(requests, **options)
        answers.extend(found)
        return found

    model.loglikelihood = asking
    document = evaluate_tasks(model, all_tasks(), data_dir, groups=groups, allow_unknown_data=True)
    model.loglikelihood = ask
    return answers, document


def train_tokenizer(folder: Path) -> Path:
    """A byte-level BPE with an end of text, as a folder that transformers reads, too."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    words = Words(0)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words.text(20, 40) for _ in range(100)], trainer)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(folder)
    return folder


def save_model(folder: Path, tokenizer_folder: Path, family: str, *, train_steps: int) -> Path:
    """A Hugging Face model with its tokenizer, random or trained for some steps."""
    import transformers

    from tests.huggingface import huggingface_config

    config = huggingface_config(ARCHITECTURES[family])
    config.max_position_embeddings = MAX_LENGTH
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if train_steps:
        _train(model, load_tokenizer("huggingface", tokenizer_folder), train_steps)
    else:
        with torch.no_grad():  # far from uniform, so that likelihoods differ
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.15)
    model.save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _train(model: torch.nn.Module, tokenizer, steps: int) -> None:
    words, optimizer = Words(0), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        texts = tokenizer.encode_batch([words.text(60, 60) for _ in range(8)])
        tokens = torch.tensor([text[:40] for text in texts])
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def load_target(folder: Path, config, groups, dtype: torch.dtype = torch.float32):
    """The target of this layout with a folder's weights."""
    arch, files = open_huggingface(folder)
    target = build_target(config, arch, groups, seq_length=MAX_LENGTH, params_dtype=dtype, seed=99)
    load_full_weights(target, reader(files, huggingface_layout(arch), target_layout(arch)), groups)
    return target


def target_model(folder: Path, config, groups, batch_tokens: int = 200, **options) -> TargetModel:
    tokenizer = load_tokenizer("huggingface", folder)
    target = load_target(folder, config, groups)
    return TargetModel(target, groups, tokenizer, max_length=MAX_LENGTH, batch_tokens=batch_tokens, **options)


def proxy_model(folder: Path, groups=None) -> ProxyModel:
    """A model folder's weights as a proxy."""
    arch, files = open_huggingface(folder)
    lm = build_lm(arch)
    lm.load_state_dict(dict(converted(files, huggingface_layout(arch), proxy_layout(arch))))
    tokenizer = load_tokenizer("huggingface", folder)
    return ProxyModel(lm, tokenizer, max_length=MAX_LENGTH, batch_tokens=200, groups=groups)
