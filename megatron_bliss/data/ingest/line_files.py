"""Files of lines (JSON or plain text, compressed or not) as documents, piece by piece."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from megatron_bliss.data.ingest.documents import Documents
from megatron_bliss.data.ingest.lines import LineReader


class LineFileReader:
    """Reads one file by pieces: the lines that start in ``piece_bytes`` of its text. Pieces may be read in any order.

    parse: what makes :class:`Documents` of (data, first line number, keys). Memory: one block of text, or one line.
    """

    def __init__(self, path: str, keys: Sequence[str], piece_bytes: int, block_bytes: int, parse: Callable) -> None:
        self.keys, self.piece_bytes, self.block_bytes, self._parse = list(keys), piece_bytes, block_bytes, parse
        self._reader = LineReader(path)

    def documents(self, piece: int) -> Iterator[tuple[Documents, int]]:
        """Documents of one piece and the lines they were; line numbers count from 1 in the piece."""
        start, lines = piece * self.piece_bytes, 0
        for block in self._reader.blocks(start, start + self.piece_bytes, self.block_bytes):
            number = block.first_line + 1
            if block.problem:
                found = Documents(rejects=[(number, block.problem)])
                lines = number
            else:
                found = self._parse(block.data, number, self.keys)
                lines = block.first_line + block.data.count(b"\n") + (not block.data.endswith(b"\n"))
            yield found, lines - block.first_line
        if self._reader.at_end and self.damage:
            yield Documents(rejects=[(lines + 1, self.damage)]), 0

    @property
    def damage(self) -> str | None:
        """Why the file could not be read to its end."""
        return self._reader.damage

    @property
    def file_bytes(self) -> int:
        """Bytes of the file, as it is on disk, that were read."""
        return self._reader.file_bytes

    def at_end(self, piece: int) -> bool:
        """Whether the text ends with this piece, which was the last one read."""
        return self._reader.at_end

    def finish(self) -> str | None:
        """SHA-256 of the file if all of it was read from front to back, else None."""
        return self._reader.finish()

    def close(self) -> None:
        """Close the file."""
        self._reader.close()


def count_pieces(path: str, piece_bytes: int) -> int:
    """Pieces of a file that is not compressed."""
    return max(1, -(-os.path.getsize(path) // piece_bytes))
