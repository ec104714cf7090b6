"""Source files: which there are, in what order, how each kind is read, and the lines of one that cannot be used."""

from __future__ import annotations

import functools
import glob
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import orjson

from megatron_bliss.data.ingest.documents import (
    BadLine,
    Documents,
    json_documents,
    numbered_lines,
    parse_line,
    plain_documents,
)
from megatron_bliss.data.ingest.line_files import LineFileReader, count_pieces
from megatron_bliss.data.ingest.lines import LineReader
from megatron_bliss.data.ingest.parquet import ParquetReader
from megatron_bliss.data.ingest.streams import COMPRESSION

__all__ = ["BadLine", "parse_line"]  # from documents.py, for the readers of single lines

BLOCK_BYTES = 8 << 20
PIECE_BYTES = 64 << 20
READERS = {
    ".jsonl": functools.partial(LineFileReader, parse=json_documents),
    ".json": functools.partial(LineFileReader, parse=json_documents),
    ".txt": functools.partial(LineFileReader, parse=plain_documents),
    ".parquet": ParquetReader,
}
JSON_SUFFIXES = tuple(kind + end for kind in (".jsonl", ".json") for end in ("", *COMPRESSION))
SUFFIXES = (*JSON_SUFFIXES, *(".txt" + end for end in ("", *COMPRESSION)), ".parquet")


def open_source(path: str, keys: Sequence[str], piece_bytes: int = PIECE_BYTES, block_bytes: int = BLOCK_BYTES):
    """The reader of a file, by its suffix: :class:`LineFileReader` or :class:`ParquetReader`."""
    return READERS[file_kind(path)](path, keys, piece_bytes, block_bytes)


def file_kind(path: str) -> str:
    """The suffix that says what a file holds, without that of its compression: ".jsonl" of "a.jsonl.gz"."""
    stem, suffix = os.path.splitext(path)
    return os.path.splitext(stem)[1] if suffix in COMPRESSION else suffix


def known_pieces(path: str, keys: Sequence[str], piece_bytes: int) -> int | None:
    """How many pieces a file has; None where only reading it can tell."""
    suffix = os.path.splitext(path)[1]
    if suffix in COMPRESSION:
        return None
    if suffix != ".parquet":
        return count_pieces(path, piece_bytes)
    reader = ParquetReader(path, keys, piece_bytes, BLOCK_BYTES)
    reader.close()
    return reader.pieces


def read_documents(path: str, keys: Sequence[str]) -> Iterator[Documents]:
    """All documents of a file of any kind, a block at a time; line numbers count from the block's piece on."""
    reader = open_source(path, keys)
    piece = 0
    while True:
        for found, _ in reader.documents(piece):
            yield found
        if reader.at_end(piece):
            break
        piece += 1
    reader.close()


def expand_inputs(patterns: Sequence[str], suffixes: Sequence[str] = SUFFIXES, option: str = "--input") -> list[str]:
    """Files, folders (their files with a known suffix, recursively) and globs as a list of files.

    The order is that of the arguments, sorted within a folder or glob. Raises ValueError for a pattern without a
    file, a file given twice or an unknown suffix; it names the ``option`` that gave them.
    """
    suffixes = tuple(suffixes)
    files: list[str] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            inside = glob.glob(os.path.join(glob.escape(pattern), "**", "*"), recursive=True)
            found = sorted(path for path in inside if path.endswith(suffixes) and os.path.isfile(path))
        elif os.path.isfile(pattern):
            found = [pattern]
        else:
            found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if not found:
            raise ValueError(
                f"no input file at {pattern}, expected a file, folder or glob of {', '.join(suffixes)}: change {option}"
            )
        files += found
    for path in files:
        if not path.endswith(suffixes):
            raise ValueError(f"{path} has an unknown suffix, expected one of {', '.join(suffixes)}: change {option}")
    given: dict[str, str] = {}
    for path in files:
        real = os.path.realpath(path)
        if real in given:
            other = f" ({given[real]} is the same file)" if given[real] != path else ""
            raise ValueError(f"{path} is given more than once{other}, expected each file once: change {option}")
        given[real] = path
    return files


@dataclass(frozen=True)
class LineBlock:
    """Whole lines of one file: ``first_line`` counts from 1. ``damage`` says why the file could not be read further."""

    file: str
    first_line: int
    data: bytes
    damage: str | None = None

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number, content) of every line that is not blank."""
        return numbered_lines(self.data, self.first_line)


@dataclass
class SourceState:
    """What is known of one file once it has been read to its end."""

    file: str
    bytes: int = 0
    sha256: str = ""

    def record(self) -> dict:
        """For a manifest."""
        return {"file": self.file, "bytes": self.bytes, "sha256": self.sha256}


def read_blocks(state: SourceState, block_bytes: int = BLOCK_BYTES) -> Iterator[LineBlock]:
    """Blocks of whole JSON lines of ``state.file``, compressed or not; ``state`` is complete at the end.

    A file that cannot be decompressed to its end gives a last block without data whose ``damage`` says why; the lines
    before are delivered. Memory: one block, or the longest line. Raises ValueError for files of another kind.
    """
    if not state.file.endswith(JSON_SUFFIXES):
        raise ValueError(f"{state.file} has no JSON lines, expected one of {', '.join(JSON_SUFFIXES)}: change --input")
    reader, line = LineReader(state.file), 1
    for block in reader.blocks(0, 1 << 62, block_bytes):
        line = block.first_line + 1
        yield LineBlock(state.file, line, block.data, block.problem)
        line += block.data.count(b"\n")
    if reader.damage:
        yield LineBlock(state.file, line, b"", reader.damage)
    state.bytes, state.sha256 = os.path.getsize(state.file), reader.finish()
    reader.close()


def reject(file: str, line: int, reason: str) -> dict:
    """One line of ``X.rejected.jsonl``."""
    return {"file": file, "line": line, "reason": reason}


def write_rejects(stream: io.BufferedIOBase, rejects: Iterable[dict]) -> None:
    """Append lines to ``X.rejected.jsonl``."""
    for entry in rejects:
        stream.write(orjson.dumps(entry) + b"\n")


def check_rejects(rejected: int, lines: int, max_bad_fraction: float, path: str) -> None:
    """Raise ValueError when more than the allowed share of lines was set aside, or none is left."""
    if rejected > max_bad_fraction * lines:
        raise ValueError(
            f"{rejected} of {lines} lines could not be used, expected at most {max_bad_fraction:.2%}; "
            f"{path} lists them with reasons: mend the input or raise --max-bad-fraction"
        )
    if rejected == lines:
        raise ValueError("the input holds no text: change --input")
