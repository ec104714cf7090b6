"""Text to ``X.bin``/``X.idx`` with manifest, provenance and rejects: streaming, several processes, one result.

Every source is cut into pieces of its text. Workers read, parse and tokenise pieces, each into a file of its own in
``X.pieces/``; this process appends the finished ones in order. What is finished stays when the run is killed, and the
same command goes on from there. Neither the number of workers nor where a run was stopped shows in the result. Memory:
a worker holds a block of text and what is made of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from megatron_bliss.data.indexed import token_dtype
from megatron_bliss.data.ingest.assembly import CorpusAssembler
from megatron_bliss.data.ingest.piece_files import PieceReader, PieceSummary, piece_path
from megatron_bliss.data.ingest.piece_maker import MAX_UNIT_TOKENS, Digest, Piece, PieceMaker, PieceSettings
from megatron_bliss.data.ingest.progress import IngestProgress
from megatron_bliss.data.ingest.provenance import ROW_GROUP, with_file
from megatron_bliss.data.ingest.schedule import Schedule
from megatron_bliss.data.ingest.shards import deal, shard_prefix
from megatron_bliss.data.ingest.sources import check_rejects, expand_inputs, known_pieces, reject
from megatron_bliss.data.ingest.windows import WindowCutter
from megatron_bliss.data.ingest.work_folder import WorkFolder, source_state
from megatron_bliss.data.ingest.workers import Workers
from megatron_bliss.data.manifest import finished_manifest, manifest_path, write_manifest
from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer

SIDECARS = (".rejected.jsonl", ".provenance.parquet", ".documents.parquet")


@dataclass(frozen=True)
class PreprocessSettings:
    """What makes a corpus; workers, backend and the size of a piece change nothing in it."""

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
    provenance: bool = True
    shard: tuple[int, int] | None = None
    tokenizer_backend: Literal["auto", "own"] = "auto"
    piece_megabytes: float = 64

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
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise ValueError(f"shard {self.shard[0]} of {self.shard[1]}, expected 1/n to n/n: change --shard")
        if self.piece_bytes < 1:
            raise ValueError(f"pieces of {self.piece_megabytes} MB, expected more than 0: change --piece-megabytes")

    @property
    def ends_documents(self) -> bool:
        """Whether every document ends with EOD: always in windows, which join documents."""
        return self.append_eod or self.unit == "window"

    @property
    def piece_bytes(self) -> int:
        """Size of a piece in bytes of text."""
        return int(self.piece_megabytes * 1e6)

    @property
    def prefix(self) -> str:
        """Of the files that are written."""
        return shard_prefix(self.output_prefix, *self.shard) if self.shard else self.output_prefix


def preprocess(settings: PreprocessSettings, *, progress: Literal["auto", "none", "json"] = "none") -> dict:
    """Make the corpus ``settings.prefix``, or go on with it; returns its manifest.

    A finished corpus of the same inputs and settings is left as it is. Raises ValueError when outputs of anything
    else are in the way, when a source changed under an unfinished run, when more than ``max_bad_fraction`` of the
    lines cannot be used, or when nothing is left.
    """
    tokenizer = load_tokenizer(settings.tokenizer_type, settings.tokenizer_model, eod_token=settings.eod_token)
    files = [file for file in expand_inputs(settings.inputs) if not _is_output(file, settings.output_prefix)]
    if settings.shard:
        files = deal(files, *settings.shard)
    identity = _identity(settings, tokenizer)
    work = WorkFolder(settings.prefix)
    if os.path.exists(manifest_path(settings.prefix)) or not work.exists():
        finished = finished_manifest(settings.prefix, identity, files)
        if finished is not None:
            work.remove()
            return finished
    os.makedirs(os.path.dirname(settings.prefix) or ".", exist_ok=True)
    wanted = {**identity, "tokenizer": {**identity["tokenizer"], "file": None}, "pieces": settings.piece_bytes}
    with work.open({**wanted, "provenance": settings.provenance}, files):
        run = _Run(settings, files, tokenizer, work.path)
        try:
            manifest = run.make(work.pieces(len(files)), identity, progress)
        except _NoText as error:
            work.remove()  # there is nothing in it to go on with
            raise ValueError("the input holds no text: change --input") from error
        work.remove()
    return manifest


def _is_output(file: str, prefix: str) -> bool:
    """Whether a file in an input folder is an output of this very command."""
    return os.path.abspath(file).startswith(f"{os.path.abspath(prefix)}.") and file.endswith(SIDECARS)


class _NoText(Exception):
    """No document at all."""


class _Run:
    """One run over the pieces that are still missing, and the corpus from all of them."""

    def __init__(self, settings: PreprocessSettings, files: list[str], tokenizer: Tokenizer, folder: str) -> None:
        self.settings, self.files, self.tokenizer, self.folder = settings, files, tokenizer, folder
        self.states = [source_state(file) for file in files]
        cutter = WindowCutter(settings.window_length) if settings.unit == "window" else None
        self.assembler = CorpusAssembler(
            folder,
            token_dtype(tokenizer.vocab_size),
            cutter,
            provenance=settings.provenance,
            keep_documents=settings.shard is not None and cutter is not None,
        )
        self.order = _InOrder(self)
        self.warnings: set[str] = set()

    def make(self, done: list[dict[int, PieceSummary]], identity: dict, progress: str) -> dict:
        """Everything that is not done yet; returns the manifest."""
        settings = self.settings
        bar = IngestProgress(progress, sum(state["bytes"] for state in self.states))
        for summary in (summary for pieces in done for summary in pieces.values()):
            bar.add(summary, self.states[summary.source]["bytes"], earlier=True)
        tokenizer = self.tokenizer if settings.workers == 1 else None  # other processes load their own
        with Workers(settings.workers, PieceMaker, (self._piece_settings(), tokenizer)) as workers:
            for summary in self._pieces(workers, done):
                bar.add(summary, self.states[summary.source]["bytes"])
            sources = self._sources(workers, done)
        bar.finish()
        totals = self.order.totals
        self._check(totals)
        counts = {"documents": totals["documents"], "rejected": totals["rejected"]}
        record = self.assembler.finish(counts)
        self.assembler.publish(settings.prefix)
        shard = {"shard": list(settings.shard)} if settings.shard else {}
        return write_manifest(settings.prefix, {**identity, **record, **shard, "sources": sources})

    def _piece_settings(self) -> PieceSettings:
        settings = self.settings
        return PieceSettings(
            folder=self.folder,
            files=self.files,
            json_keys=list(settings.json_keys),
            tokenizer=(settings.tokenizer_type, settings.tokenizer_model, settings.eod_token),
            backend=settings.tokenizer_backend,
            ends_documents=settings.ends_documents,
            max_document_tokens=MAX_UNIT_TOKENS if settings.unit == "document" else None,
            piece_bytes=settings.piece_bytes,
            provenance=settings.provenance,
        )

    def _pieces(self, workers: Workers, done: list[dict[int, PieceSummary]]) -> Iterator[PieceSummary]:
        """Make the pieces that are missing, and append all that are next in order."""
        known = [known_pieces(file, self.settings.json_keys, self.settings.piece_bytes) for file in self.files]
        schedule = Schedule(known, done)
        for pieces in done:
            for summary in pieces.values():
                if summary.last:
                    schedule.ended(summary.source, summary.piece + 1)
        self.order.append(done)

        def next_task(worker: int) -> Piece | None:
            chosen = schedule.next(worker)
            return chosen and Piece(*chosen)

        for _, summary, warning in workers.run(next_task):
            done[summary.source][summary.piece] = summary
            if summary.last:
                schedule.ended(summary.source, summary.piece + 1)
            self.warn(warning)
            self.order.append(done)
            yield summary

    def _sources(self, workers: Workers, done: list[dict[int, PieceSummary]]) -> list[dict]:
        """What the manifest says of the sources; digests that no single reader took are taken now."""
        digests = {summary.source: summary.sha256 for pieces in done for summary in pieces.values() if summary.sha256}
        missing = [source for source in range(len(self.files)) if source not in digests]
        tasks = iter([Digest(source) for source in missing])
        for task, digest, _ in workers.run(lambda worker: next(tasks, None)):
            digests[task.source] = digest
        for before in self.states:
            if source_state(before["file"]) != before:
                raise ValueError(f"{before['file']} has changed while it was read: remove {self.folder} and run again")
        return [
            {"file": state["file"], "bytes": state["bytes"], "sha256": digests[source]}
            for source, state in enumerate(self.states)
        ]

    def warn(self, warning: str | None) -> None:
        """Say something once."""
        if warning and warning not in self.warnings:
            self.warnings.add(warning)
            print(f"warning: {warning}", file=sys.stderr, flush=True)

    def _check(self, totals: dict[str, int]) -> None:
        """Raise when too much was set aside; the list of it is published then, too, and the pieces stay."""
        lines, limit = totals["documents"] + totals["rejected"], self.settings.max_bad_fraction
        if totals["rejected"] <= limit * lines and totals["documents"]:
            return
        path = self.assembler.publish_rejects(self.settings.prefix)
        if totals["rejected"] > limit * lines:
            check_rejects(totals["rejected"], lines, limit, path)
        raise _NoText


class _InOrder:
    """Appends pieces to the corpus in the order of the sources, as soon as all before them are there."""

    def __init__(self, run: _Run) -> None:
        self._run, self._source, self._piece, self._lines = run, 0, 0, 0
        self.totals = {"documents": 0, "rejected": 0}

    def append(self, done: list[dict[int, PieceSummary]]) -> None:
        """Append what can be appended now."""
        while self._source < len(done) and (summary := done[self._source].get(self._piece)):
            self._append_one(summary)
            self._lines += summary.lines
            self._piece += 1
            if summary.last:
                self._run.warn(summary.damage and f"{self._run.files[self._source]}: {summary.damage}")
                self._source, self._piece, self._lines = self._source + 1, 0, 0

    def _append_one(self, summary: PieceSummary) -> None:
        run, file = self._run, self._run.files[self._source]
        path = piece_path(run.folder, summary.source, summary.piece)
        piece = PieceReader(path, summary)
        run.assembler.add_tokens(path, summary.sizes[0])
        lengths, rows = piece.lengths(), piece.rows() if run.settings.provenance else None
        for start in range(0, len(lengths), ROW_GROUP):
            part = rows and with_file(rows.slice(start, ROW_GROUP), file, self._lines)
            run.assembler.add_documents(lengths[start : start + ROW_GROUP], part)
        run.assembler.add_rejects(reject(file, line + self._lines, reason) for line, reason in piece.rejects())
        self.totals["documents"] += summary.documents
        self.totals["rejected"] += summary.rejected


def _identity(settings: PreprocessSettings, tokenizer: Tokenizer) -> dict:
    """What decides, together with the sources, whether a finished corpus is the one asked for."""
    options = {"json_keys": list(settings.json_keys), "append_eod": settings.ends_documents}
    return {
        "kind": "corpus",
        "unit": settings.unit,
        "window_length": settings.window_length if settings.unit == "window" else None,
        "tokenizer": tokenizer.identity(),
        "settings": options if settings.provenance else {**options, "provenance": False},
    }
