"""Documents found again by their line numbers: the texts that preprocessing read, from files of every kind."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_bliss.data.ingest import line_texts as module
from megatron_bliss.data.ingest.line_texts import LostText, line_texts
from megatron_bliss.data.ingest.sources import READERS, open_source
from tests.data.ingest.source_files import COMPRESS, FORMATS, write_source

HOSTILE = [
    b'\xef\xbb\xbf{"text": "first"}',
    b"",
    b"{broken",
    b"  \t",
    b'{"text": "a\\nb"}',
    b'{"text": ""}',
    b"[1]",
    b'{"text": 3}',
    b'{"no": "text"}',
    b"\xff\xfe",
    b'{"text": "\xc3\xbc\\u00fc"}\r',
    b'{"text": "last"}',
]


def documents_of(path: str, keys: list[str], **sizes: int) -> dict[int, str]:
    """{line: text} as preprocessing reads the file, piece by piece."""
    reader, found, before = open_source(path, keys, **sizes), {}, 0
    for piece in itertools.count():
        lines = 0
        for documents, count in reader.documents(piece):
            found |= dict(zip((line + before for line in documents.lines), documents.texts, strict=True))
            lines += count
        before += lines
        if reader.at_end(piece):
            reader.close()
            return found


def write_raw(path: Path, lines: list[bytes], end: bytes = b"\n") -> str:
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](b"\n".join(lines) + end))
    return str(path)


def test_every_kind_of_source_has_a_reader():
    assert module._READERS.keys() == READERS.keys()


@pytest.mark.parametrize("suffix", FORMATS)
def test_some_lines_of_every_format(tmp_path, suffix):
    texts = [f"text {number} " + "x" * (number * 37 % 101) for number in range(200)]
    path = write_source(tmp_path / f"a.{suffix}", [{"text": text, "title": f"t{text}"} for text in texts])
    for lines in ([1], [200], [3, 4, 50, 199], range(1, 201), []):
        for block_bytes in (1, 300, 1 << 20):
            found = list(line_texts(path, ["text"], lines, block_bytes=block_bytes))
            assert found == [texts[line - 1] for line in lines]
    if "txt" not in suffix:
        assert list(line_texts(path, ["title", "text"], [7])) == [f"t{texts[6]}\n{texts[6]}"]


@pytest.mark.parametrize("end", [b"\n", b"", b"\n\n\n"])
@pytest.mark.parametrize("suffix", ["jsonl", "json.gz", "jsonl.zst", "txt", "txt.gz", "txt.zst"])
def test_lines_are_counted_as_preprocessing_counts_them(tmp_path, suffix, end):
    generator = np.random.default_rng(3)
    lines = [HOSTILE[0], *(HOSTILE[1 + int(place)] for place in generator.integers(0, len(HOSTILE) - 1, 300))]
    path = write_raw(tmp_path / f"a.{suffix}", lines, end)
    for sizes in ({}, {"piece_bytes": 500, "block_bytes": 64}):
        expected = documents_of(path, ["text"], **sizes)
        for block_bytes in (1, 100, 1 << 20):
            assert list(line_texts(path, ["text"], expected, block_bytes=block_bytes)) == list(expected.values())
    others = sorted(set(range(1, len(lines) + 1)) - expected.keys())
    assert len(expected) > 50 and len(others) > 50
    for line in (*others[:40], len(lines) + 3):
        with pytest.raises(LostText, match=rf"found no text at line {line} of .* \(.*\), expected the one"):
            list(line_texts(path, ["text"], [line]))


def test_rows_that_were_set_aside_count_too(tmp_path):
    texts = pa.array(["a", None, "", " ", "b", "c", None, "d"])
    pq.write_table(pa.table({"text": texts, "n": range(8)}), tmp_path / "a.parquet", row_group_size=3)
    path = str(tmp_path / "a.parquet")
    expected = documents_of(path, ["text"])
    assert expected == {1: "a", 5: "b", 6: "c", 8: "d"}
    assert list(line_texts(path, ["text"], [1, 5, 6, 8])) == ["a", "b", "c", "d"]
    for line, reason in ((2, "NoneType"), (3, "empty text"), (9, "the file has 8 rows")):
        with pytest.raises(LostText, match=reason):
            list(line_texts(path, ["text"], [line]))
    with pytest.raises(ValueError, match="has no column 'body', expected one of text, n: change --json-keys"):
        list(line_texts(path, ["body"], [1]))


def test_rows_that_are_no_utf8_spoil_their_row_alone(tmp_path):
    pq.write_table(pa.table({"text": pa.array([b"a", b"\xff", b"b"], pa.binary())}), tmp_path / "a.parquet")
    assert list(line_texts(str(tmp_path / "a.parquet"), ["text"], [1, 3])) == ["a", "b"]
    with pytest.raises(LostText, match="invalid UTF-8 at byte 0"):
        list(line_texts(str(tmp_path / "a.parquet"), ["text"], [2]))


def test_row_groups_without_a_wanted_row_are_skipped(tmp_path, monkeypatch):
    path = write_source(tmp_path / "a.parquet", [{"text": f"t{number}"} for number in range(70)], row_group_size=7)
    read, batches = [], module.group_batches
    monkeypatch.setattr(module, "group_batches", lambda *given: read.append(given[1]) or batches(*given))
    assert list(line_texts(path, ["text"], [8, 14, 70])) == ["t7", "t13", "t69"] and read == [1, 9]


def test_lines_are_taken_one_at_a_time(tmp_path):
    path, taken = write_raw(tmp_path / "a.txt", [b"a", b"b", b"c"]), []
    texts = line_texts(path, [], (taken.append(line) or line for line in (1, 3)))
    assert taken == [] and next(texts) == "a" and taken == [1] and next(texts) == "c" and list(texts) == []


@pytest.mark.parametrize("lines", [[2, 2], [2, 1], [0], [-1]])
def test_numbers_have_to_increase(tmp_path, lines):
    path = write_raw(tmp_path / "a.txt", [b"a", b"b", b"c"])
    with pytest.raises(ValueError, match="expected increasing numbers from 1"):
        list(line_texts(path, [], lines))


def test_damaged_files_and_other_kinds(tmp_path):
    lines = [json.dumps({"text": f"{number:x>2000}"}).encode() for number in np.random.default_rng(0).permutation(4000)]
    for suffix in (".jsonl.gz", ".jsonl.zst"):
        path = tmp_path / f"a{suffix}"
        write_raw(path, lines)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(LostText, match="damaged .* file, the rest cannot be read"):
            list(line_texts(str(path), ["text"], [1, 4000]))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 junk PAR1")
    with pytest.raises(LostText, match="expected a parquet file: put it back"):
        list(line_texts(str(tmp_path / "a.parquet"), ["text"], [1]))
    with pytest.raises(ValueError, match="a.csv, expected a file of .jsonl, .json, .txt, .parquet"):
        list(line_texts(str(tmp_path / "a.csv"), ["text"], [1]))
    with pytest.raises(FileNotFoundError):
        list(line_texts(str(tmp_path / "gone.jsonl"), ["text"], [1]))
