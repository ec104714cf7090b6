"""Text to ``X.bin``/``X.idx`` with manifest, provenance and rejects: streaming, several processes, one result.

The main process decompresses and writes; workers parse and tokenise blocks of lines. Results are written in the order
of the input, so the output does not depend on the number of workers. Memory: a few blocks per worker, and 4 bytes per
unit.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa

from megatron_bliss.data.indexed import CorpusWriter
from megatron_bliss.data.manifest import finished_manifest, write_manifest
from megatron_bliss.data.provenance import ProvenanceWriter, WindowCutter, document_table, field_values
from megatron_bliss.data.sources import (
    BadLine,
    LineBlock,
    SourceState,
    check_rejects,
    expand_inputs,
    parse_line,
    read_blocks,
    reject,
    write_rejects,
)
from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bliss.files import atomic_file


@dataclass(frozen=True)
class PreprocessSettings:
    """What makes a corpus; the number of workers is the only field that changes nothing in it."""

    inputs: list[str]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str | None = None
    eod_token: str | None = None
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    unit: Literal["document", "window"] = "document"
    window_length: int = 1024
    append_eod: bool = False
    max_bad_fraction: float = 0.01
    workers: int = 1

    def __post_init__(self) -> None:
        if self.unit not in ("document", "window"):
            raise ValueError(f"unit is {self.unit!r}, expected document or window: change --unit")
        if self.unit == "window" and self.window_length < 2:
            raise ValueError(f"window length is {self.window_length}, expected at least 2: change --window-length")
        if self.workers < 1:
            raise ValueError(f"{self.workers} workers, expected at least 1: change --workers")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"largest bad fraction is {self.max_bad_fraction}, expected 0 to 1: change --max-bad-fraction"
            )

    @property
    def ends_documents(self) -> bool:
        """Whether every document ends with EOD: always in windows, which join documents."""
        return self.append_eod or self.unit == "window"


@dataclass
class TokenizedBlock:
    """Documents of one block: tokens int64[t] one after another, lengths int64[n], provenance rows, rejects."""

    tokens: np.ndarray
    lengths: np.ndarray
    rows: pa.Table
    rejects: list[dict]


class BlockTokenizer:
    """Parses and tokenises blocks; one per process."""

    def __init__(self, settings: PreprocessSettings) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one core
        self.settings = settings
        self.tokenizer = load_tokenizer(settings.tokenizer_type, settings.tokenizer_model, eod_token=settings.eod_token)

    def __call__(self, block: LineBlock) -> TokenizedBlock:
        """Tokenise one block; lines that cannot be used become rejects."""
        texts, numbers, values, rejects = [], [], [], []
        for number, line in block.lines():
            try:
                text, record = parse_line(line, self.settings.json_keys)
            except BadLine as error:
                rejects.append(reject(block.file, number, str(error)))
                continue
            texts.append(text)
            numbers.append(number)
            values.append(field_values(record))
        if block.damage:
            rejects.append(reject(block.file, block.first_line, block.damage))
        documents = self.tokenizer.encode_batch(texts)
        empty = {index for index, ids in enumerate(documents) if not ids}
        if empty:
            rejects += [reject(block.file, numbers[index], "text without a token") for index in sorted(empty)]
            rejects.sort(key=lambda entry: entry["line"])
            documents, numbers, values = (
                [item for index, item in enumerate(items) if index not in empty]
                for items in (documents, numbers, values)
            )
        return TokenizedBlock(*self._flatten(documents), document_table(block.file, numbers, values), rejects)

    def _flatten(self, documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        end = [self.tokenizer.eod] if self.settings.ends_documents else []
        lengths = np.array([len(ids) + len(end) for ids in documents], dtype=np.int64)
        flat = itertools.chain.from_iterable(itertools.chain(ids, end) for ids in documents)
        return np.fromiter(flat, dtype=np.int64, count=int(lengths.sum())), lengths


_worker: BlockTokenizer | None = None


def _start_worker(settings: PreprocessSettings) -> None:
    global _worker
    _worker = BlockTokenizer(settings)


def _work(block: LineBlock) -> TokenizedBlock:
    return _worker(block)


def _tokenized(blocks: Iterator[LineBlock], settings: PreprocessSettings) -> Iterator[TokenizedBlock]:
    """Results in the order of ``blocks``, with a bounded number of blocks under way."""
    if settings.workers == 1:
        yield from map(BlockTokenizer(settings), blocks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.workers, context, _start_worker, (settings,)) as pool:
        waiting: deque = deque()
        try:
            for block in blocks:
                waiting.append(pool.submit(_work, block))
                if len(waiting) > 2 * settings.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a tokenising process died (out of memory, or killed): nothing was published; run again "
                "with fewer --workers"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def preprocess(settings: PreprocessSettings, *, show_progress: bool = False) -> dict:
    """Make the corpus ``settings.output_prefix``; returns its manifest.

    A finished corpus of the same inputs and settings is left as it is. Raises ValueError when outputs of anything
    else are in the way, when more than ``max_bad_fraction`` of the lines cannot be used, or when nothing is left.
    """
    prefix = settings.output_prefix
    tokenizer = load_tokenizer(settings.tokenizer_type, settings.tokenizer_model, eod_token=settings.eod_token)
    sources = [SourceState(file) for file in expand_inputs(settings.inputs)]
    identity = _identity(settings, tokenizer)
    finished = finished_manifest(prefix, identity, [source.file for source in sources])
    if finished is not None:
        return finished
    os.makedirs(os.path.dirname(prefix) or ".", exist_ok=True)
    totals, rejected_path = _Totals(), f"{prefix}.rejected.jsonl"
    with contextlib.ExitStack() as outputs:
        writer = outputs.enter_context(CorpusWriter(prefix, tokenizer.vocab_size))
        provenance = outputs.enter_context(ProvenanceWriter(f"{prefix}.provenance.parquet"))
        with atomic_file(rejected_path) as rejected:
            blocks = (block for source in sources for block in read_blocks(source))
            cutter = WindowCutter(settings.window_length) if settings.unit == "window" else None
            for block in _with_progress(_tokenized(blocks, settings), sources, totals, show_progress):
                write_rejects(rejected, block.rejects)
                units = (block.tokens, block.lengths, block.rows)
                _write(writer, provenance, cutter.add(*units) if cutter else units)
            if cutter:
                _write(writer, provenance, cutter.finish())
        check_rejects(totals.rejected, totals.lines, settings.max_bad_fraction, rejected_path)
    counts = {"documents": totals.documents, "rejected": totals.rejected}
    return write_manifest(
        prefix, {**identity, **writer.record(counts), "sources": [source.record() for source in sources]}
    )


@dataclass
class _Totals:
    documents: int = 0
    rejected: int = 0

    @property
    def lines(self) -> int:
        return self.documents + self.rejected

    def add(self, block: TokenizedBlock) -> None:
        self.documents += len(block.lengths)
        self.rejected += len(block.rejects)


def _write(writer: CorpusWriter, provenance: ProvenanceWriter, units: tuple[np.ndarray, np.ndarray, pa.Table]) -> None:
    tokens, lengths, rows = units
    assert len(lengths) == len(rows)
    writer.add(tokens, lengths)
    provenance.add(rows)


def _with_progress(
    results: Iterator[TokenizedBlock], sources: list[SourceState], totals: _Totals, enabled: bool
) -> Iterator[TokenizedBlock]:
    """Count results, and show how much of the source files has been read, in kilobytes as they are on disk."""
    from megatron_bliss.metrics import progress

    size = sum(os.path.getsize(source.file) for source in sources)
    done = tokens = 0
    with progress(size // 1000, description="tokenise", unit="KB", enabled=enabled) as bar:
        for block in results:
            totals.add(block)
            tokens += len(block.tokens)
            bar.set(documents=totals.documents, tokens=tokens, rejected=totals.rejected)
            read = sum(source.bytes for source in sources) // 1000
            bar.update(read - done)
            done = read
            yield block


def _identity(settings: PreprocessSettings, tokenizer: Tokenizer) -> dict:
    """What decides, together with the sources, whether a finished corpus is the one asked for."""
    return {
        "kind": "corpus",
        "unit": settings.unit,
        "window_length": settings.window_length if settings.unit == "window" else None,
        "tokenizer": tokenizer.identity(),
        "settings": {"json_keys": list(settings.json_keys), "append_eod": settings.ends_documents},
    }
