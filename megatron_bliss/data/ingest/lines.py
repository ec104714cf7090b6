"""Whole lines of a source file, by ranges of its decompressed text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_bliss.data.ingest.streams import ByteStream, DamagedSource

MAX_LINE_BYTES = 32 << 20  # parsed and tokenised, a line takes several times its size in memory
UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextBlock:
    """Whole lines, the first of them number ``first_line`` (from 0, in its range); or none, and a ``problem`` there."""

    first_line: int
    data: bytes
    problem: str | None = None


class LineReader:
    """Reads the lines of one file that start in a range of bytes.

    Ranges that follow each other are read on; a range elsewhere is found by a seek, or in a compressed file by
    decompressing what lies before. Memory: one block, or the longest line up to ``MAX_LINE_BYTES``.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        self._stream, self._buffer = ByteStream(self.path), bytearray()
        self._position = 0  # of the buffer's first byte in the text
        self._range_end = 0  # where the last range that was read ended
        self._ended, self.damage = False, None

    def blocks(self, start: int, stop: int, block_bytes: int) -> Iterator[TextBlock]:
        """Lines that start in [start, stop), in blocks of about ``block_bytes``; the reader stands at their end."""
        if start != self._range_end:
            self._go_to(start)
        line = 0
        while self._position < stop:
            first = self._position == 0
            data, problem = self._take(min(block_bytes, stop - self._position))
            if problem is None and not data:
                break
            yield TextBlock(line, data.removeprefix(UTF8_MARK) if first else data, problem)
            line += 1 if problem else data.count(b"\n") + (not data.endswith(b"\n"))
        self._range_end = stop

    @property
    def at_end(self) -> bool:
        """Whether the text ends here; tries to read on."""
        return not self._buffer and not self._fill()

    @property
    def file_bytes(self) -> int:
        """Bytes of the file, as it is on disk, that were read."""
        return self._stream.file_bytes

    def finish(self) -> str | None:
        """SHA-256 of the file if all of it passed through this reader, else None."""
        return self._stream.finish()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _fill(self) -> bool:
        """Read some more; False at the end of what can be read. A last line cut off by damage is dropped."""
        if self._ended:
            return False
        try:
            data = self._stream.read()
        except DamagedSource as error:
            self.damage, data = str(error), b""
            del self._buffer[self._buffer.rfind(b"\n") + 1 :]
        self._ended = not data
        self._buffer += data
        return bool(data)

    def _drop(self, count: int) -> None:
        del self._buffer[:count]
        self._position += count

    def _go_to(self, start: int) -> None:
        """Stand at the first line that starts at ``start`` or after it."""
        before = max(start - 1, 0)  # a line starts at ``start`` if the byte before ends one
        if before < self._position:
            self.close()
            self._open()
        if self._stream.compression is None and before > self._position + len(self._buffer):
            self._stream.jump(before)
            self._buffer.clear()
            self._position = before
        while self._position < before and (self._buffer or self._fill()):
            self._drop(min(before - self._position, len(self._buffer)))
        if start:
            self._drop_line()

    def _drop_line(self) -> int:
        """Drop what is left of a line, and its end; returns how much that was."""
        begin = self._position
        while (end := self._buffer.find(b"\n")) < 0:
            self._drop(len(self._buffer))
            if not self._fill():
                break
        self._drop(end + 1)
        return self._position - begin

    def _take(self, wanted: int) -> tuple[bytes, str | None]:
        """All lines that start in the next ``wanted`` bytes, or before one that is too long; no bytes at the end."""
        while len(self._buffer) < wanted and self._fill():
            pass
        searched = wanted - 1
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = max(wanted - 1, len(self._buffer))
            if len(self._buffer) > wanted + MAX_LINE_BYTES:
                end = self._buffer.rfind(b"\n", 0, wanted)
                if end < 0:
                    return b"", f"a line of {self._drop_line()} bytes, expected at most {MAX_LINE_BYTES}"
                break
            if not self._fill():
                end = len(self._buffer) - 1
                break
        data = bytes(memoryview(self._buffer)[: end + 1])
        self._drop(end + 1)
        return data, None
