"""Documents beside the lines they were read from, so that some can be written again as they were."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import orjson

from megatron_bliss.base.files import sha256_file
from megatron_bliss.data.ingest.documents import Documents, json_documents, plain_documents
from megatron_bliss.data.ingest.line_files import LineFileReader
from megatron_bliss.data.ingest.parquet import ParquetReader
from megatron_bliss.data.ingest.provenance import FIELDS
from megatron_bliss.data.ingest.sources import file_kind

ONE_PIECE = 1 << 62
"""A piece as long as any file, so that lines are counted from the file's beginning."""


class OriginalReader:
    """Reads one file of any kind that preprocessing reads, front to back. Memory: one block, or one line."""

    def __init__(self, path: str, keys: Sequence[str], block_bytes: int) -> None:
        self.path, self._data, self._first_line = path, b"", 1
        self._kind = file_kind(path)
        if self._kind == ".parquet":
            self._reader = ParquetReader(path, keys, ONE_PIECE, block_bytes)
        else:
            self._parse = plain_documents if self._kind == ".txt" else json_documents
            self._reader = LineFileReader(path, keys, ONE_PIECE, block_bytes, self._keep)

    def _keep(self, data: bytes, first_line: int, keys: Sequence[str]) -> Documents:
        self._data, self._first_line = data, first_line
        return self._parse(data, first_line, keys)

    def documents(self) -> Iterator[Documents]:
        """The documents, a block at a time; line numbers count from 1 in the file."""
        for found, _ in self._reader.documents(0):
            yield found

    def originals(self, documents: Documents) -> list[bytes]:
        """A JSON line, without its end, for each document of the block that came last.

        That is the line itself of a JSON file; of others ``text`` and what fields of the provenance a document has.
        """
        if self._kind in (".json", ".jsonl"):
            lines = self._data.split(b"\n")
            return [lines[line - self._first_line].removesuffix(b"\r") for line in documents.lines]
        return [
            orjson.dumps(
                {"text": text} | {name: one for name, one in zip(FIELDS, values, strict=True) if one is not None}
            )
            for text, values in zip(documents.texts, documents.values, strict=True)
        ]

    @property
    def file_bytes(self) -> int:
        """Bytes of the file, as it is on disk, that were read; 0 of a parquet file."""
        return self._reader.file_bytes

    def finish(self) -> dict:
        """{file, bytes, sha256} after the last block, and closes the file."""
        sha256 = self._reader.finish() or sha256_file(self.path)
        self._reader.close()
        return {"file": self.path, "bytes": os.path.getsize(self.path), "sha256": sha256}
