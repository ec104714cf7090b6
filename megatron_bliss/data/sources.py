"""Source text: JSON lines, plain or gzipped, read in blocks of whole lines, and what can be wrong with a line."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import orjson

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
BLOCK_BYTES = 4 << 20
READ_BYTES = 1 << 20
UTF8_MARK = b"\xef\xbb\xbf"


class BadLine(ValueError):
    """A line that cannot be used; its text is the reason."""


@dataclass(frozen=True)
class LineBlock:
    """Whole lines of one file: ``first_line`` counts from 1. ``damage`` says why the file could not be read further."""

    file: str
    first_line: int
    data: bytes
    damage: str | None = None

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number, content) of every line that is not blank."""
        for number, line in enumerate(self.data.split(b"\n"), self.first_line):
            if line.strip():
                yield number, line


@dataclass
class SourceState:
    """What is known of one file once it has been read to its end."""

    file: str
    bytes: int = 0
    sha256: str = ""

    def record(self) -> dict:
        """For a manifest."""
        return {"file": self.file, "bytes": self.bytes, "sha256": self.sha256}


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files, folders (their files with a known suffix, recursively) and globs as a list of files.

    The order is that of the arguments, sorted within a folder or glob. Raises ValueError for a pattern without a
    file, a file given twice or an unknown suffix.
    """
    files: list[str] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            inside = glob.glob(os.path.join(glob.escape(pattern), "**", "*"), recursive=True)
            found = sorted(path for path in inside if path.endswith(SUFFIXES) and os.path.isfile(path))
        elif os.path.isfile(pattern):
            found = [pattern]
        else:
            found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if not found:
            raise ValueError(f"no input file at {pattern}, expected a file, folder or glob of {', '.join(SUFFIXES)}")
        files += found
    for path in files:
        if not path.endswith(SUFFIXES):
            raise ValueError(f"{path} has an unknown suffix, expected one of {', '.join(SUFFIXES)}: change --input")
    if len({os.path.realpath(path) for path in files}) < len(files):
        repeated = next(path for path in files if files.count(path) > 1 or os.path.islink(path))
        raise ValueError(f"{repeated} is given more than once, expected each file once: change --input")
    return files


class _HashingReader(io.RawIOBase):
    """A file that counts and hashes what is read from it."""

    def __init__(self, path: str) -> None:
        self._file, self._digest, self.count = open(path, "rb", buffering=0), hashlib.sha256(), 0  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._file.readinto(buffer)
        self._digest.update(memoryview(buffer)[:count])
        self.count += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def read_blocks(state: SourceState, block_bytes: int = BLOCK_BYTES) -> Iterator[LineBlock]:
    """Blocks of whole lines of ``state.file``, gzipped or not; ``state`` is kept up to date and complete at the end.

    A file that cannot be decompressed to its end gives a last block without data whose ``damage`` says why; the lines
    before are delivered. Memory: one block, or the longest line.
    """
    raw = _HashingReader(state.file)
    buffered = io.BufferedReader(raw, READ_BYTES)
    first_line, pending, whole = 1, bytearray(), 0  # the first ``whole`` bytes of pending are whole lines
    with raw:
        stream = gzip.GzipFile(fileobj=buffered) if state.file.endswith(".gz") else buffered
        while True:
            chunk, damage = _read(stream)
            if b"\n" in chunk:
                whole = len(pending) + chunk.rfind(b"\n") + 1
            pending += chunk
            state.bytes = raw.count
            if not chunk and not damage:
                whole = len(pending)  # the last line may lack its end
            if whole and (not chunk or len(pending) >= block_bytes):
                data = bytes(memoryview(pending)[:whole])
                yield LineBlock(state.file, first_line, data.removeprefix(UTF8_MARK) if first_line == 1 else data)
                first_line += data.count(b"\n")
                del pending[:whole]
                whole = 0
            if not chunk:
                break
        while buffered.read(READ_BYTES):  # what follows damage still belongs to the file's digest
            pass
        state.bytes, state.sha256 = raw.count, raw.hexdigest()
    if damage:
        yield LineBlock(state.file, first_line, b"", damage)


def _read(stream: io.BufferedIOBase) -> tuple[bytes, str | None]:
    """The next bytes (none at the end), and what is wrong with the file, if anything."""
    try:
        return stream.read1(READ_BYTES), None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        return b"", f"damaged gzip file, the rest cannot be read: {error}"


def parse_line(line: bytes, keys: Sequence[str]) -> tuple[str, dict]:
    """(text, record) of one JSON line; several keys are joined by a newline. Raises BadLine."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as wrong:
            raise BadLine(f"invalid UTF-8 at byte {wrong.start}") from error
        raise BadLine(f"broken JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadLine(f"a JSON {type(record).__name__}, expected an object")
    parts = []
    for key in keys:
        if key not in record:
            raise BadLine(f"no key {key!r}")
        if not isinstance(record[key], str):
            raise BadLine(f"{key!r} is {type(record[key]).__name__}, expected a string")
        parts.append(record[key])
    text = "\n".join(parts)
    if not text.strip():
        raise BadLine("empty text")
    return text, record


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
