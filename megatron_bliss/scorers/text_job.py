"""Raw text through a scorer, tokenised once and while it streams: every document's score, and where it stands.

``scores.npy`` float32 [n], ``lengths.npy`` int64 [n] tokens, ``provenance.parquet`` (file, line, url, domain, format,
label, as of a corpus), ``rejected.jsonl``, and ``scores.json``, in the order of the sources. A part is a piece of a
source that is not compressed, or a whole compressed one, whose pieces are kept as they are made.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_bliss.base.files import atomic_file, publish, read_json, write_json
from megatron_bliss.data.ingest.documents import Documents
from megatron_bliss.data.ingest.provenance import ROW_SCHEMA, ProvenanceWriter, document_rows, with_file
from megatron_bliss.data.ingest.sources import (
    BLOCK_BYTES,
    check_rejects,
    expand_inputs,
    known_pieces,
    open_source,
    reject,
    write_rejects,
)
from megatron_bliss.data.ingest.tokenised import DocumentTokens
from megatron_bliss.data.ingest.work_folder import source_state
from megatron_bliss.data.tokenizers import Tokenizer
from megatron_bliss.scorers.corpus_job import identity, is_finished, write_column
from megatron_bliss.scorers.folder import ScorerFolder
from megatron_bliss.scorers.job import PART, Parts, Share, run
from megatron_bliss.scorers.scorer import NotFinite
from megatron_bliss.selection.score_pass import BLOCK_UNITS

PIECE_BYTES = 32 << 20
"""Of text: what a killed process can lose."""
KILO = 1000
"""Progress counts kB of the sources, as they are on the disk."""
SCHEMA = pa.schema([*ROW_SCHEMA, ("score", pa.float32()), ("tokens", pa.int64())])


@dataclass(frozen=True)
class TextSettings:
    """How text is read."""

    inputs: list[str]
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    max_bad_fraction: float = 0.01
    backend: str = "auto"
    """Of the tokenizer, as in tools/preprocess_data.py."""
    piece_bytes: int = PIECE_BYTES


def score_text(
    settings: TextSettings, found: ScorerFolder, tokenizer: Tokenizer, folder: Path, share: Share, *, show: bool
) -> bool:
    """Score every document of the inputs; whether the scores are there now (another shard may be at work).

    Raises ValueError where other scores lie in the folder, a source changes meanwhile, or more than
    ``max_bad_fraction`` of the lines cannot be used.
    """
    files = expand_inputs(settings.inputs)
    states = [source_state(file) for file in files]
    sources = [{"file": state["file"], "bytes": state["bytes"]} for state in states]
    record = {"sources": sources, "json_keys": list(settings.json_keys), "scorer": identity(found)}
    if is_finished(folder, record):
        return True
    maker = _Maker(settings, files, found, tokenizer)
    places = [place for source, file in enumerate(files) for place in _places(settings, source, file)]
    names = [f"{source:08d}" if piece is None else f"{source:08d}-{piece:08d}" for source, piece in places]

    def make(number: int, path: Path, tick: Callable[[int], None]) -> None:
        write_json(path, maker.make(*places[number], path.parent, tick))

    def finish(work: Path) -> None:
        if [source_state(file) for file in files] != states:
            raise ValueError(f"found sources that have changed while they were read: remove {folder} and run again")
        _Result(settings, files, folder).write(work, [read_json(work / f"{name}{PART}") for name in names], record)

    pieces_of = {source: sum(place[0] == source for place in places) for source in range(len(files))}
    sizes = [states[source]["bytes"] // pieces_of[source] // KILO for source, _ in places]
    job = record | {"sources": states, "piece_bytes": settings.piece_bytes}
    parts = Parts(job, names, sizes, "kB", make, finish, lambda: is_finished(folder, record))
    return run(folder, parts, share, show=show)


def _places(settings: TextSettings, source: int, file: str) -> Iterator[tuple[int, int | None]]:
    """The parts that a source is: (source, piece), or (source, None) where only reading tells how many."""
    count = known_pieces(file, settings.json_keys, settings.piece_bytes)
    yield from [(source, None)] if count is None else ((source, piece) for piece in range(count))


def _piece_path(work: Path, source: int, piece: int) -> Path:
    return work / f"{source:08d}-{piece:08d}.rows"


class _Maker:
    """Makes parts; keeps the tokenizer and the reader of the last source."""

    def __init__(self, settings: TextSettings, files: list[str], found: ScorerFolder, tokenizer: Tokenizer) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.settings, self.files, self.scorer = settings, files, found.scorer
        ends = self.scorer.ends_documents
        self._tokens, self._warned = DocumentTokens(tokenizer, settings.backend, ends_documents=ends), False
        self._source, self._reader = None, None

    def make(self, source: int, piece: int | None, work: Path, tick: Callable[[int], None]) -> dict:
        """Score a part into files of rows; what their record says."""
        if self._source != source:
            self._reader = open_source(
                self.files[source], self.settings.json_keys, self.settings.piece_bytes, BLOCK_BYTES
            )
            self._source = source
        if piece is not None:
            return {"source": source, "pieces": [self._piece(source, piece, work)]}
        pieces, last, read = [], False, 0
        while not last:
            pieces.append(self._piece(source, len(pieces), work))
            last, now = pieces[-1]["last"], min(pieces[-1]["file_bytes"], os.path.getsize(self.files[source]))
            tick(max(now - read, 0) // KILO)
            read = max(now, read)
        return {"source": source, "pieces": pieces}

    def _piece(self, source: int, piece: int, work: Path) -> dict:
        path = _piece_path(work, source, piece)
        if path.is_file():
            return json.loads(_open_rows(path).schema.metadata[b"piece"])
        batches, rejects, lines = [], [], 0
        for found, count in self._reader.documents(piece):
            lines += count
            batch, found = self._scored(found, source)
            batches.append(batch)
            rejects += found.rejects
        record = {
            "source": source,
            "piece": piece,
            "documents": sum(len(batch) for batch in batches),
            "tokens": sum(int(batch.column("tokens").to_numpy().sum()) for batch in batches),
            "lines": lines,
            "rejects": rejects,
            "last": self._reader.at_end(piece),
            "file_bytes": self._reader.file_bytes,
            "damage": self._reader.damage,
        }
        with atomic_file(path) as stream:
            schema = SCHEMA.with_metadata({"piece": json.dumps(record)})
            with pa.ipc.new_file(stream, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        return record

    def _scored(self, found: Documents, source: int) -> tuple[pa.RecordBatch, Documents]:
        """Rows of the documents that can be used, and those documents."""
        tokens, lengths, found = self._tokens.of(found)
        self._warn()
        ends, scores = np.cumsum(lengths), np.empty(len(lengths), np.float32)
        for start in range(0, len(lengths), BLOCK_UNITS):
            part = lengths[start : start + BLOCK_UNITS]
            first = int(ends[start] - lengths[start])
            try:
                scores[start : start + len(part)] = self.scorer.score(tokens[first : first + int(part.sum())], part)
            except NotFinite as error:
                line = found.lines[start + int(error.places[0])]
                raise ValueError(
                    f"found a score that is not finite in {self.files[source]} (line {line} of its piece), expected "
                    "numbers: the scorer is damaged or diverged; export another one"
                ) from error
        rows = document_rows(found.lines, found.values)
        columns = [*rows.columns, pa.array(scores), pa.array(lengths, pa.int64())]
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA), found

    def _warn(self) -> None:
        """Say once what the tokenizer's library has to be told of."""
        if self._tokens.warning and not self._warned:
            self._warned = True
            print(f"warning: {self._tokens.warning}", file=sys.stderr, flush=True)


class _Result:
    """Puts pieces together, in order, with the memory of one."""

    def __init__(self, settings: TextSettings, files: list[str], folder: Path) -> None:
        self.settings, self.files, self.folder = settings, files, folder

    def write(self, work: Path, parts: list[dict], record: dict) -> None:
        """All files of the result, scores.json last."""
        pieces = [piece for part in parts for piece in part["pieces"]]
        documents = sum(piece["documents"] for piece in pieces)
        rejected = sum(len(piece["rejects"]) for piece in pieces)
        self._write_rejects(pieces)
        check_rejects(
            rejected, documents + rejected, self.settings.max_bad_fraction, str(self.folder / "rejected.jsonl")
        )
        write_column(self.folder / "scores.npy", documents, "<f4", self._columns(work, pieces, "score"))
        write_column(self.folder / "lengths.npy", documents, "<i8", self._columns(work, pieces, "tokens"))
        self._write_provenance(work, pieces)
        counts = {"units": documents, "tokens": sum(piece["tokens"] for piece in pieces), "rejected": rejected}
        write_json(self.folder / "scores.json", record | {"counts": counts})

    def _columns(self, work: Path, pieces: list[dict], name: str) -> Iterator[np.ndarray]:
        for piece in pieces:
            yield _rows(work, piece).column(name).to_numpy()

    def _write_provenance(self, work: Path, pieces: list[dict]) -> None:
        temporary = self.folder / f"provenance.parquet.{os.getpid()}.tmp"
        writer = ProvenanceWriter(str(temporary))
        for piece, before in self._in_order(pieces):
            rows = _rows(work, piece).select(ROW_SCHEMA.names)
            writer.add(with_file(rows, self.files[piece["source"]], before))
        writer.finish()
        publish(temporary, self.folder / "provenance.parquet")

    def _write_rejects(self, pieces: list[dict]) -> None:
        with atomic_file(self.folder / "rejected.jsonl") as stream:
            for piece, before in self._in_order(pieces):
                file = self.files[piece["source"]]
                write_rejects(stream, (reject(file, line + before, reason) for line, reason in piece["rejects"]))

    def _in_order(self, pieces: list[dict]) -> Iterator[tuple[dict, int]]:
        """Pieces, and the lines of their source before each."""
        source, before = None, 0
        for piece in pieces:
            if piece["source"] != source:
                source, before = piece["source"], 0
            yield piece, before
            before += piece["lines"]


def _open_rows(path: Path) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(str(path)))


def _rows(work: Path, piece: dict) -> pa.Table:
    return _open_rows(_piece_path(work, piece["source"], piece["piece"])).read_all()
