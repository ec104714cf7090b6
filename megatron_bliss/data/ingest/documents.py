"""Texts of JSON lines, plain lines and table rows, and what can be wrong with one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import orjson

from megatron_bliss.data.ingest.lines import MAX_LINE_BYTES
from megatron_bliss.data.ingest.provenance import FIELDS, field_values


class BadLine(ValueError):
    """A line that cannot be used; its text is the reason."""


@dataclass
class Documents:
    """Some documents of a file, in order: texts, their line numbers and provenance values; and lines set aside.

    ``rejects`` holds (line, reason). ``bytes`` is the size of the text as it was read, lines that were set aside
    included.
    """

    bytes: int = 0
    texts: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    values: list[tuple[str | None, ...]] = field(default_factory=list)
    rejects: list[tuple[int, str]] = field(default_factory=list)

    def without(self, bad: dict[int, str]) -> Documents:
        """The documents but those at these places, which are set aside with a reason."""
        kept = [index for index in range(len(self.texts)) if index not in bad]
        picked = ([items[index] for index in kept] for items in (self.texts, self.lines, self.values))
        rejects = self.rejects + [(self.lines[index], reason) for index, reason in bad.items()]
        return Documents(self.bytes, *picked, sorted(rejects))


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
    return record_text(record, keys), record


def record_text(record: dict, keys: Sequence[str]) -> str:
    """The text under ``keys``, several joined by a newline. Raises BadLine."""
    parts = []
    for key in keys:
        if key not in record:
            raise BadLine(f"no key {key!r}")
        if not isinstance(record[key], str):
            raise BadLine(f"{key!r} is {type(record[key]).__name__}, expected a string")
        parts.append(record[key])
    text = parts[0] if len(parts) == 1 else "\n".join(parts)
    if not text or text.isspace():
        raise BadLine("empty text")
    return text


def plain_text(line: bytes) -> str:
    """The text of one line of plain text. Raises BadLine."""
    try:
        return line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(f"invalid UTF-8 at byte {error.start}") from error


def numbered_lines(data: bytes, first_line: int) -> Iterator[tuple[int, bytes]]:
    """(line number, content) of every line that is not blank."""
    for number, line in enumerate(data.split(b"\n"), first_line):
        if line and not line.isspace():
            yield number, line


def json_documents(data: bytes, first_line: int, keys: Sequence[str]) -> Documents:
    """Documents of JSON lines, the first of which has number ``first_line``."""
    found = Documents(len(data))
    for number, line in numbered_lines(data, first_line):
        try:
            text, record = parse_line(line, keys)
        except BadLine as error:
            found.rejects.append((number, str(error)))
            continue
        found.texts.append(text)
        found.lines.append(number)
        found.values.append(field_values(record))
    return found


def plain_documents(data: bytes, first_line: int, keys: Sequence[str]) -> Documents:
    """Documents of plain text: every line that is not blank is one. ``keys`` mean nothing here."""
    found = Documents(len(data))
    nothing = (None,) * len(FIELDS)
    for number, line in numbered_lines(data, first_line):
        try:
            text = plain_text(line)
        except BadLine as error:
            found.rejects.append((number, str(error)))
            continue
        found.texts.append(text)
        found.lines.append(number)
        found.values.append(nothing)
    return found


def row_documents(rows: Sequence[dict | BadLine], first_row: int, keys: Sequence[str]) -> Documents:
    """Documents of table rows; a row that could not be read comes as its BadLine."""
    found = Documents()
    for number, row in enumerate(rows, first_row):
        try:
            if isinstance(row, BadLine):
                raise row
            text = record_text(row, keys)
            if len(text) > MAX_LINE_BYTES:
                raise BadLine(f"a text of {len(text)} characters, expected at most {MAX_LINE_BYTES}")
        except BadLine as error:
            found.rejects.append((number, str(error)))
            continue
        found.bytes += len(text)
        found.texts.append(text)
        found.lines.append(number)
        found.values.append(field_values(row))
    return found
