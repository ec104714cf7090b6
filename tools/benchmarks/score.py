"""Scoring: a model's windows against a plain Hugging Face forward, and n-grams from tokens and from raw text.

Units have the lengths of C4's documents (log-normal: median 280, mean 488 tokens), cut into windows; both models read
the same windows, weights random. The peer is a GPT-NeoX model of transformers with SDPA, its mean over tokens and a
linear unit, in batches of as many places, in the corpus's order, as wide as each batch's longest window. The n-gram
figures are CPU seconds of this process. Raw text is JSON lines of this Python installation, gzipped, as in `data`.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.data.manifest import adopt_manifest
from megatron_bliss.data.tokenizers import load_tokenizer
from megatron_bliss.models.presets import PRESETS, Architecture
from megatron_bliss.models.score import score_model_of
from megatron_bliss.models.score_architecture import ScoreArchitecture
from megatron_bliss.scorers.corpus_job import score_corpus
from megatron_bliss.scorers.folder import ScorerFolder, load_scorer, save_scorer
from megatron_bliss.scorers.job import Share
from megatron_bliss.scorers.models import ModelScorer, Reading
from megatron_bliss.scorers.ngrams import NgramForm, NgramScorer
from megatron_bliss.scorers.scorer import Scorer
from megatron_bliss.scorers.text_job import TextSettings, score_text
from megatron_bliss.scorers.windows import Windows, cut
from tools import train_tokenizer
from tools.benchmarks import measure
from tools.benchmarks.data import ROOT, cost_of, installation_lines
from tools.benchmarks.index import synthetic_corpus

MEDIAN, DEVIATION = 280, 1.05
"""Of C4's documents in tokens of GPT-NeoX's tokenizer, and of their logarithms."""
BUCKETS = 2**19


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``benchmark.py score``."""
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="pythia-14m", help="size of the score model")
    add("--units", type=int, default=500, help="units that the models read")
    add("--window", type=int, default=1024, help="tokens of a window")
    add("--batch-tokens", type=int, default=16384, help="places of a batch, of both models")
    add("--params-dtype", choices=["fp32", "bf16"], default="fp32", help="precision of both models")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=0, help="of torch (0: as it chooses)")
    add("--ngram-tokens", type=int, default=20_000_000, help="tokens of an indexed corpus for the n-gram scorer")
    add("--megabytes", type=float, default=96.0, help="raw text for the n-gram scorer")
    add("--scale-units", type=int, default=2_000_000, help="units of a synthetic corpus whose scoring's memory is told")
    add("--repetitions", type=int, default=3, help="runs of each, in turns; the best counts")


def run(options: argparse.Namespace) -> dict:
    """Measure; raises ValueError where the two models do not agree on how many scores there are."""
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = measure.machine(torch.device(options.device))
    with tempfile.TemporaryDirectory(prefix="benchmark-score-") as folder:
        models = _models(options)
        figures = _ngrams(options, Path(folder))
        figures |= _scale(options, Path(folder))
    return {"machine": machine, "preset": options.preset, "params_dtype": options.params_dtype, **models, **figures}


def markdown(result: dict, command: str) -> str:
    """The result as a page."""
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["machine"].items())
    rows = [
        (f"{result['preset']}, {result['params_dtype']}, tokens per second", f"{result['tokens_per_second']:,.0f}"),
        ("transformers, tokens per second", f"{result['huggingface_tokens_per_second']:,.0f}"),
        ("throughput against transformers", f"{result['throughput_vs_huggingface']:.2f}"),
        ("padding, share of places", f"{result['padding_waste']:.1%}"),
        ("the same of transformers' batches", f"{result['huggingface_padding_waste']:.1%}"),
        ("n-grams, tokens per CPU-second, from an indexed corpus", f"{result['ngram_tokens_per_cpu_second']:,.0f}"),
        ("n-grams, MB per CPU-second, from .json.gz", f"{result['raw_megabytes_per_cpu_second']:.1f}"),
    ]
    rows += [
        (f"peak resident memory, {result['scale_units']:,} units, MiB", f"{result['scale_peak_bytes'] / 2**20:,.0f}"),
        ("the same corpus, CPU-seconds of the command", f"{result['scale_cpu_seconds']:.1f}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    method = " ".join(line.strip() for line in __doc__.split("\n\n", 1)[1].splitlines())
    parts = ["# Scoring", f"`{command}`", f"{machine}.", method]
    return "\n\n".join([*parts, f"| figure | value |\n| --- | ---: |\n{table}"]) + "\n"


def c4_lengths(count: int) -> np.ndarray:
    """int64 [count]: tokens of documents."""
    drawn = np.random.default_rng(1).lognormal(np.log(MEDIAN), DEVIATION, count)
    return np.maximum(drawn, 1).astype(np.int64)


def _models(options: argparse.Namespace) -> dict:
    arch, device = PRESETS[options.preset], torch.device(options.device)
    lengths = c4_lengths(options.units)
    tokens = np.random.default_rng(2).integers(0, arch.vocab_size, int(lengths.sum())).astype(np.uint16)
    windows = cut(lengths, options.window, "mean")
    model = score_model_of(ScoreArchitecture(arch), "identity", None)
    scorer = ModelScorer(model, Reading(device, options.batch_tokens, options.params_dtype))
    peer, places = _huggingface(arch, options, tokens, windows)
    cases = {"ours": lambda: scorer.score_windows(tokens, windows), "huggingface": peer}
    for case in cases.values():
        if len(case()) != len(windows):
            raise ValueError("found another number of scores than of windows")
    times = measure.interleaved_times(cases, options.repetitions, device)
    rates = {name: int(lengths.sum()) / min(seconds) for name, seconds in times.items()}
    return {
        "tokens_per_second": rates["ours"],
        "huggingface_tokens_per_second": rates["huggingface"],
        "throughput_vs_huggingface": rates["ours"] / rates["huggingface"],
        "padding_waste": scorer.padding.waste,
        "huggingface_padding_waste": 1 - int(lengths.sum()) / places,
    }


def _huggingface(
    arch: Architecture, options: argparse.Namespace, tokens: np.ndarray, windows: Windows
) -> tuple[Callable[[], np.ndarray], int]:
    """The peer's pass over all windows, and the places of its batches."""
    from transformers import GPTNeoXConfig, GPTNeoXModel

    config = GPTNeoXConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_attention_heads,
        intermediate_size=arch.ffn_hidden_size,
        rotary_pct=arch.rotary_percent,
        max_position_embeddings=options.window,
        attn_implementation="sdpa",
        use_cache=False,
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.params_dtype]
    model = GPTNeoXModel(config).to(options.device, dtype).eval()
    unit = torch.nn.Linear(arch.hidden_size, 1).to(options.device, dtype)
    rows = max(1, options.batch_tokens // options.window)
    parts = [slice(start, start + rows) for start in range(0, len(windows), rows)]

    @torch.no_grad()
    def read() -> np.ndarray:
        found = []
        for part in parts:
            starts, sizes = windows.starts[part], windows.sizes[part]
            ids = torch.zeros(len(sizes), int(sizes.max()), dtype=torch.int64)
            for row, start, size in zip(ids, starts.tolist(), sizes.tolist(), strict=True):
                row[:size] = torch.from_numpy(tokens[start : start + size].astype(np.int64))
            mask = torch.arange(ids.shape[1]) < torch.from_numpy(sizes)[:, None]
            ids, mask = ids.to(options.device), mask.to(options.device)
            hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
            found.append(unit(mean).squeeze(-1).float().cpu().numpy())
        return np.concatenate(found)

    return read, sum(len(windows.sizes[part]) * int(windows.sizes[part].max()) for part in parts)


def _ngrams(options: argparse.Namespace, folder: Path) -> dict:
    source, size = folder / "text.json.gz", 0
    with gzip.open(source, "wb", compresslevel=6) as out:
        for line in installation_lines(int(options.megabytes * 1e6)):
            size += out.write(line)
    texts = train_tokenizer.texts([str(source)], ["text"], max_bytes=8_000_000)
    (folder / "tokenizer.json").write_bytes(train_tokenizer.train_byte_level_bpe(texts, 8192))
    tokenizer = load_tokenizer("huggingface", folder / "tokenizer.json")
    table = np.random.default_rng(1).normal(size=BUCKETS).astype(np.float32)
    scorer = Scorer(NgramScorer(NgramForm(2, tokenizer.vocab_size, tokenizer.eod), table), options.window, "mean")
    save_scorer(folder / "scorer", scorer, tokenizer.identity())
    found = load_scorer(folder / "scorer")
    prefix, tokens = _corpus(options, folder, found)
    settings = TextSettings([str(source)])
    passes = {
        "tokens": lambda out: score_corpus(prefix, found, out, Share(), show=False),
        "raw": lambda out: score_text(settings, found, tokenizer, out, Share(), show=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(options.repetitions):
        for name, case in passes.items():
            start = time.process_time()
            case(folder / f"{name}-{number}")
            seconds[name].append(time.process_time() - start)
    return {
        "ngram_tokens_per_cpu_second": tokens / min(seconds["tokens"]),
        "raw_megabytes_per_cpu_second": size / 1e6 / min(seconds["raw"]),
    }


def _scale(options: argparse.Namespace, folder: Path) -> dict:
    """What tools/score_corpus.py takes for a corpus of many units of 8 tokens, in a process of its own."""
    prefix = synthetic_corpus(options.scale_units, folder / "scale")
    command = [sys.executable, str(ROOT / "tools" / "score_corpus.py"), "--scorer", str(folder / "scorer")]
    command += ["--corpus", prefix, "--output", str(folder / "scale" / "scores"), "--quiet"]
    seconds, peak = cost_of(command)
    return {"scale_units": options.scale_units, "scale_peak_bytes": peak, "scale_cpu_seconds": seconds}


def _corpus(options: argparse.Namespace, folder: Path, found: ScorerFolder) -> tuple[str, int]:
    """An indexed corpus of random tokens, few of them most of the time as in text; its prefix and its tokens."""
    size, prefix = found.scorer.windows.vocab_size, str(folder / "corpus")
    lengths = c4_lengths(max(1, options.ngram_tokens // 488))
    drawn = np.random.default_rng(3).pareto(1.0, int(lengths.sum())) * 50
    with CorpusWriter(prefix, size) as writer:
        writer.add(np.minimum(drawn, size - 1).astype(np.int64), lengths)
    adopt_manifest(prefix, found.tokenizer)
    return prefix, int(lengths.sum())
