"""The data plane: tokenising against the stock scheme, and what a subset and its verification cost.

Megabytes are those of the JSON lines after decompression. Our CPU seconds are of the whole command, start of Python,
imports and all processes included; those of the stock scheme (tools/benchmarks/stock.py) leave its imports out. Both
read the same gzipped file with the same tokenizer, and must write the same bytes. Without --input the text is that of
this Python installation, with a byte-level BPE tokenizer trained on it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_bliss.base.files import sha256_file
from megatron_bliss.data.demo.installation import installed_files
from megatron_bliss.data.ingest.sources import JSON_SUFFIXES, expand_inputs
from megatron_bliss.data.ingest.streams import ByteStream
from megatron_bliss.data.tokenizers import load_tokenizer
from tools import train_tokenizer
from tools.benchmarks import index, measure

DOCUMENT = 3000
ROOT = Path(__file__).resolve().parents[2]
COMMAND = ROOT / "tools" / "preprocess_data.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``benchmark.py data``."""
    add = parser.add_argument
    add("--input", nargs="+", help="JSON lines to tokenise: files, folders or globs; they are joined into one .json.gz")
    add("--tokenizer-model", help="byte-level BPE tokenizer.json; trained on the input where none is given")
    add("--megabytes", type=float, default=192.0, help="JSON lines made of this Python installation, without --input")
    add("--vocab-size", type=int, default=8192, help="ids of the tokenizer that is trained")
    add("--workers", type=int, default=1, help="our worker processes")
    add("--repetitions", type=int, default=3, help="runs of both, in turns; the median counts")
    add("--units", type=int, default=10_000_000, help="synthetic units for subset and verify")


def run(options: argparse.Namespace) -> dict:
    """Measure; raises ValueError when the two corpora differ or a command fails."""
    if options.repetitions < 1 or options.workers < 1:
        raise ValueError("--repetitions and --workers must be at least 1")
    machine = measure.machine(torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as folder:
        source, size = _source(options, folder)
        tokenizer = options.tokenizer_model or _train(source, options.vocab_size, folder)
        ours, stock, peaks = [], [], []
        for _ in range(options.repetitions):
            seconds, peak = _run_ours(source, f"{folder}/ours", tokenizer, options.workers)
            ours.append(seconds)
            peaks.append(peak)
            stock.append(_run_stock(source, f"{folder}/stock", tokenizer))
            _compare(f"{folder}/ours", f"{folder}/stock")
        costs = [
            measured(options.units, Path(folder) / "units")
            for measured in (index.subset_seconds_per_million, index.verify_seconds_per_million)
        ]
    speed, stock_speed = (size / 1e6 / statistics.median(seconds) for seconds in (ours, stock))
    return {
        "machine": machine,
        "megabytes": round(size / 1e6, 3),
        "workers": options.workers,
        "megabytes_per_cpu_second": speed,
        "stock_megabytes_per_cpu_second": stock_speed,
        "speedup_vs_stock": speed / stock_speed,
        "peak_rss_bytes": max(peaks),
        "units": options.units,
        "subset_seconds_per_million": costs[0]["seconds_per_million"],
        "verify_seconds_per_million": costs[1]["seconds_per_million"],
    }


def markdown(result: dict, command: str) -> str:
    """The result as a page."""
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["machine"].items())
    rows = [
        ("this package, MB per CPU-second", f"{result['megabytes_per_cpu_second']:.1f}"),
        ("stock scheme, MB per CPU-second", f"{result['stock_megabytes_per_cpu_second']:.2f}"),
        ("speedup", f"{result['speedup_vs_stock']:.1f}"),
        ("peak resident memory of the largest process, MiB", f"{result['peak_rss_bytes'] / 2**20:,.0f}"),
        ("subset, seconds per million units", f"{result['subset_seconds_per_million']:.4f}"),
        ("verify, seconds per million units", f"{result['verify_seconds_per_million']:.4f}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    sizes = f"{result['megabytes']} MB of JSON lines, {result['workers']} worker(s), {result['units']:,} units"
    parts = ["# Data plane", f"`{command}`", f"{machine}.", f"{sizes}. {_METHOD}"]
    return "\n\n".join([*parts, f"| figure | value |\n| --- | ---: |\n{table}"]) + "\n"


_METHOD = " ".join(line.strip() for line in __doc__.split("\n\n", 1)[1].splitlines())


def _source(options: argparse.Namespace, folder: str) -> tuple[str, int]:
    """One .json.gz, and its size before compression."""
    path, size = f"{folder}/source.json.gz", 0
    parts = _joined(options.input) if options.input else installation_lines(int(options.megabytes * 1e6))
    with gzip.open(path, "wb", compresslevel=6) as out:
        for part in parts:
            size += out.write(part)
    return path, size


def _joined(patterns: list[str]) -> Iterator[bytes]:
    for file in expand_inputs(patterns, JSON_SUFFIXES):
        stream = ByteStream(file)
        while part := stream.read():
            yield part
        stream.close()


def installation_lines(size: int) -> Iterator[bytes]:
    """JSON lines of text files of this Python installation, mixed, cut into documents of about DOCUMENT characters."""
    for name, path in sorted(installed_files(), key=lambda file: zlib.crc32(file[0].encode())):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # not text, or not ours to read: there is enough without it
        for start in range(0, len(text), DOCUMENT):
            line = json.dumps({"text": text[start : start + DOCUMENT], "url": f"{name}#{start}"}).encode() + b"\n"
            yield line
            size -= len(line)
            if size <= 0:
                return


def _train(source: str, vocab_size: int, folder: str) -> str:
    texts = train_tokenizer.texts([source], ["text"], max_bytes=8_000_000)
    path = Path(folder) / "tokenizer.json"
    path.write_bytes(train_tokenizer.train_byte_level_bpe(texts, vocab_size))
    return str(path)


RUNNER = """
import json, resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""
"""A small process between this one and the command: Linux counts what a parent held when it forked as the child's."""


def _run_ours(source: str, prefix: str, tokenizer: str, workers: int) -> tuple[float, int]:
    """CPU seconds of the command with all its processes, and the peak resident set of the largest of them."""
    for path in Path(prefix).parent.glob(f"{Path(prefix).name}.*"):
        path.unlink()
    options = ["--input", source, "--output-prefix", prefix, "--tokenizer-model", tokenizer, "--append-eod"]
    command = [sys.executable, str(COMMAND), *options, "--workers", str(workers), "--progress", "none"]
    return cost_of(command)


def cost_of(command: list[str]) -> tuple[float, int]:
    """CPU seconds of a command of tools/ with all its processes, and the peak resident set of the largest of them."""
    runner = [sys.executable, "-I", "-S", "-c", RUNNER, *command]
    reported = subprocess.run(runner, env=_environment(), stdout=subprocess.PIPE, text=True, check=True).stdout
    status, seconds, peak = json.loads(reported)
    if status:
        raise ValueError(f"{command[1]} ended with status {status}")
    return seconds, peak * (1 if sys.platform == "darwin" else 1024)


def _run_stock(source: str, prefix: str, tokenizer: str) -> float:
    eod = load_tokenizer("huggingface", tokenizer).eod
    command = [sys.executable, "-W", "ignore", "-m", "tools.benchmarks.stock", source, prefix, tokenizer, str(eod)]
    done = subprocess.run(command, env=_environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"tools/benchmarks/stock.py ended with status {done.returncode}")
    return float(done.stdout.split()[-1])


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _compare(ours: str, stock: str) -> None:
    for suffix in (".bin", ".idx"):
        if sha256_file(ours + suffix) != sha256_file(stock + suffix):
            raise ValueError(f"{suffix} differs between this package and the stock scheme: the figures mean nothing")
