"""Parts of a corpus, in order, into its files.

Token data are written once by the worker that made them and copied once, by the kernel (``copy_file_range``: no copy at
all where the file system shares blocks, such as XFS and Btrfs), while the digest is taken of what lies in the page
cache. A shared ``.bin`` that workers write into would save that copy, but the place of a piece is known only when all
before it are tokenised; and a part of its own is what makes a killed run go on. Everything is put together in a folder
of its own and published at the end by renaming.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_bliss.base.files import DigestWriter, publish
from megatron_bliss.data.indexed import write_index
from megatron_bliss.data.ingest.provenance import ROW_GROUP, ProvenanceWriter
from megatron_bliss.data.ingest.sources import write_rejects
from megatron_bliss.data.ingest.windows import WindowCutter

COPY_BYTES = 1 << 22
NO_COPY_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


class CorpusAssembler:
    """Takes tokens and documents in order; :meth:`finish`, then :meth:`publish`. Memory: constant.

    cutter: cuts the documents into windows (None: a document is a unit). keep_documents: also keep the lengths of
    documents and their provenance, which joining shards of windows needs.
    """

    def __init__(
        self, folder: str, dtype: np.dtype, cutter: WindowCutter | None, *, provenance: bool, keep_documents: bool
    ) -> None:
        self._folder, self.dtype, self._cutter = folder, dtype, cutter
        self._tokens, self._lengths, self._rejects = map(self._open, (".bin", ".lengths", ".rejected.jsonl"))
        self._provenance = ProvenanceWriter(self._name(".provenance.parquet")) if provenance else None
        self._documents = DocumentWriter(self._name(".documents.parquet")) if keep_documents else None
        self._digest, self._held = hashlib.sha256(), b""  # the last token may be in no window
        self.units = self.tokens = 0
        self.record: dict = {}

    def _name(self, suffix: str) -> str:
        return os.path.join(self._folder, f"corpus{suffix}")

    def _open(self, suffix: str) -> IO[bytes]:
        return open(self._name(suffix), "wb")

    def add_tokens(self, path: str, size: int) -> None:
        """Append the first ``size`` bytes of a file."""
        self._tokens.flush()
        with open(path, "rb", buffering=0) as source:
            self._hash(source, size, path)
            copy_range(source.fileno(), self._tokens.fileno(), size)

    def add_token(self, token: int) -> None:
        """Append one token."""
        data = np.array([token], self.dtype.newbyteorder("<")).tobytes()
        self._tokens.write(data)
        self._update(data)

    def _hash(self, source: IO[bytes], size: int, path: str) -> None:
        left, buffer = size, bytearray(min(size, COPY_BYTES))
        while left:
            count = source.readinto(memoryview(buffer)[: min(left, COPY_BYTES)])
            if not count:
                raise ValueError(f"{path} ends {left} bytes early: it was cut or replaced; remove it and run again")
            self._update(memoryview(buffer)[:count])
            left -= count

    def _update(self, data: bytes | memoryview) -> None:
        """Hash all but the last token, which is held back."""
        if len(data) < self.dtype.itemsize:
            data = self._held + bytes(data)
        else:
            self._digest.update(self._held)
        self._digest.update(data[: len(data) - self.dtype.itemsize])
        self._held = bytes(data[len(data) - self.dtype.itemsize :])

    def add_documents(self, lengths: np.ndarray, rows: pa.Table | None) -> None:
        """Append documents: int64 lengths in tokens, and their provenance if it is kept."""
        if self._documents is not None:
            self._documents.add(lengths, rows)
        if self._cutter is not None:
            lengths, rows = self._cutter.add(lengths, rows)
        self._add_units(lengths, rows)

    def _add_units(self, lengths: np.ndarray, rows: pa.Table | None) -> None:
        self._lengths.write(np.ascontiguousarray(lengths, "<i4"))
        self.units += len(lengths)
        self.tokens += int(lengths.sum())
        if self._provenance is not None and rows is not None:
            assert len(rows) == len(lengths)
            self._provenance.add(rows)

    def add_rejects(self, entries: Iterable[dict]) -> None:
        """Append entries of ``X.rejected.jsonl``."""
        write_rejects(self._rejects, entries)

    def copy_rejects(self, stream: IO[bytes]) -> None:
        """Append another list of rejects."""
        shutil.copyfileobj(stream, self._rejects)

    def finish(self, counts: dict) -> dict:
        """Complete and flush the files; returns what a manifest says of them."""
        unused = 0
        if self._cutter is not None:
            self._add_units(*self._cutter.finish())
            unused = self._cutter.tokens
        self._digest.update(b"" if unused else self._held)
        self._tokens.flush()
        size = self.tokens * self.dtype.itemsize
        assert os.fstat(self._tokens.fileno()).st_size == size + unused * self.dtype.itemsize
        self._tokens.truncate(size)
        _close(self._tokens)
        self.finish_rejects()
        for writer in (self._provenance, self._documents):
            if writer is not None:
                writer.finish()
        return {
            "dtype": self.dtype.name,
            "counts": {"units": self.units, "tokens": self.tokens, **counts},
            **self._write_index(),
            "bin_bytes": size,
            "bin_sha256": self._digest.hexdigest(),
        }

    def finish_rejects(self) -> None:
        """Complete the list of rejects alone."""
        if not self._rejects.closed:
            _close(self._rejects)

    def _write_index(self) -> dict[str, str | int]:
        """Write the index; its digests."""
        self._lengths.close()
        lengths = np.memmap(self._name(".lengths"), "<i4", mode="r") if self.units else np.zeros(0, "<i4")
        with open(self._name(".idx"), "wb") as index:
            digests = DigestWriter(index)
            write_index(digests, self.dtype, lengths)
            index.flush()
            os.fsync(index.fileno())
        return {"index_sha256": digests.sha256, "index_crc32": digests.crc32}

    def publish(self, prefix: str) -> None:
        """Give the files their final names."""
        suffixes = [".bin", ".idx", ".rejected.jsonl"]
        suffixes += [".provenance.parquet"] if self._provenance is not None else []
        suffixes += [".documents.parquet"] if self._documents is not None else []
        for suffix in suffixes:
            publish(self._name(suffix), f"{prefix}{suffix}")

    def publish_rejects(self, prefix: str) -> str:
        """Give the list of rejects alone its final name, and return that."""
        self.finish_rejects()
        publish(self._name(".rejected.jsonl"), f"{prefix}.rejected.jsonl")
        return f"{prefix}.rejected.jsonl"


class DocumentWriter:
    """``X.documents.parquet``: length and provenance of every document of a shard of windows."""

    def __init__(self, path: str) -> None:
        self._stream, self._writer = open(path, "wb"), None  # noqa: SIM115 - lives as long as the writer

    def add(self, lengths: np.ndarray, rows: pa.Table | None) -> None:
        """Append documents."""
        table = pa.table({"length": lengths})
        for name in rows.column_names if rows is not None else ():
            table = table.append_column(name, rows.column(name))
        self._writer = self._writer or pq.ParquetWriter(self._stream, table.schema, compression="zstd")
        if len(table):
            self._writer.write_table(table, row_group_size=ROW_GROUP)

    def finish(self) -> None:
        """Complete the file and flush it to disk."""
        assert self._writer is not None, "a shard without documents"
        self._writer.close()
        _close(self._stream)


def copy_range(source: int, target: int, size: int) -> None:
    """Copy the first ``size`` bytes of one file to the end of another, in the kernel where it can."""
    offset = 0
    while offset < size:
        try:
            offset += os.copy_file_range(source, target, size - offset, offset)
        except OSError as error:
            if error.errno not in NO_COPY_RANGE:
                raise
            offset += os.write(target, os.pread(source, min(size - offset, COPY_BYTES), offset))


def _close(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
