"""What a worker does with a piece of a source: read it, tokenise it, write it to a file of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from megatron_bliss.base.files import sha256_file
from megatron_bliss.data.ingest.piece_files import PieceSummary, PieceWriter, piece_path, write_piece
from megatron_bliss.data.ingest.provenance import document_rows
from megatron_bliss.data.ingest.sources import BLOCK_BYTES, open_source
from megatron_bliss.data.ingest.tokenised import DocumentTokens
from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer

MAX_UNIT_TOKENS = np.iinfo(np.int32).max  # of the index


@dataclass(frozen=True)
class PieceSettings:
    """What a worker has to know: the tokenizer, the sources by number, and how to cut and where to put pieces."""

    folder: str
    files: list[str]
    json_keys: list[str]
    tokenizer: tuple[str, str | None, str | None]  # kind, file, EOD token
    backend: str
    ends_documents: bool
    max_document_tokens: int | None
    piece_bytes: int
    provenance: bool


@dataclass(frozen=True)
class Piece:
    """A task: this piece of this source."""

    source: int
    piece: int


@dataclass(frozen=True)
class Digest:
    """A task: the SHA-256 of this source."""

    source: int


class PieceMaker:
    """Does tasks; keeps the tokenizer, given or loaded, and the reader of the last source."""

    def __init__(self, settings: PieceSettings, tokenizer: Tokenizer | None = None) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one core
        kind, path, eod_token = settings.tokenizer
        self.settings = settings
        tokenizer = tokenizer or load_tokenizer(kind, path, eod_token=eod_token)
        limits = {"ends_documents": settings.ends_documents, "longest": settings.max_document_tokens}
        self._tokens = DocumentTokens(tokenizer, settings.backend, **limits)
        self._source, self._reader = None, None

    def __call__(self, task: Piece | Digest) -> tuple[Piece | Digest, PieceSummary | str, str | None]:
        """The task, the piece's summary or the source's digest, and a warning if there is one."""
        if isinstance(task, Digest):
            return task, sha256_file(self.settings.files[task.source]), None
        self._open(task.source)
        path = piece_path(self.settings.folder, task.source, task.piece)
        summary = write_piece(path, self._tokens.dtype, lambda writer: self._fill(writer, task))
        return task, summary, self._tokens.warning

    def _open(self, source: int) -> None:
        if self._source == source:
            return
        if self._reader is not None:
            self._reader.close()
        settings = self.settings
        self._reader = open_source(settings.files[source], settings.json_keys, settings.piece_bytes, BLOCK_BYTES)
        self._source = source

    def _fill(self, writer: PieceWriter, task: Piece) -> PieceSummary:
        lines = 0
        for found, count in self._reader.documents(task.piece):
            lines += count
            writer.text_bytes += found.bytes
            tokens, lengths, found = self._tokens.of(found)
            rows = document_rows(found.lines, found.values) if self.settings.provenance else None
            writer.add(tokens, lengths, rows)
            for line, reason in found.rejects:
                writer.reject(line, reason)
        last = self._reader.at_end(task.piece)
        return writer.finish(
            source=task.source,
            piece=task.piece,
            lines=lines,
            last=last,
            file_bytes=self._reader.file_bytes,
            damage=self._reader.damage,
            sha256=self._reader.finish() if last else None,
        )
