"""Chosen units as rows with their text, for other software."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_bliss.data.ingest.shards import merge_shards
from megatron_bliss.data.merge import merge_corpora
from megatron_bliss.data.provenance import read_provenance
from megatron_bliss.data.subset import root_units, write_subset
from megatron_bliss.selection import export, row_files
from megatron_bliss.selection.export import export_scored_text, export_units, plan_text
from megatron_bliss.selection.row_files import export_rows
from tests.data.corpora import documents, write_corpus
from tests.data.ingest.source_files import FORMATS, make, write_source
from tests.selection.scored_texts import source, write_scored_text

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
COLUMNS = ["id", "text", "url", "domain", "format", "label", "file", "line", "unit", "tokens", "score", "rank"]


def read_rows(path: str | Path) -> list[dict]:
    """Rows of an exported file, without null fields."""
    path = Path(path)
    if path.suffix == ".parquet":
        return [{k: v for k, v in row.items() if v is not None} for row in pq.read_table(path).to_pylist()]
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.parametrize("suffix", FORMATS)
def test_text_is_that_of_the_source_between_lines_set_aside(tmp_path, suffix):
    texts = [f"Ünit {number}\u2028 of text" for number in range(60)]
    (first, lines), (second, more) = (source(tmp_path / f"{n}.{suffix}", texts[30 * n :][:30], n) for n in range(2))
    places = [*((first, line) for line in lines), *((second, line) for line in more)]
    scores = np.random.default_rng(0).normal(size=60).astype(np.float32)
    ids = np.sort(np.random.default_rng(1).choice(60, 25, replace=False))
    for keys in (["text"], ["title", "text"]) if "txt" not in suffix else (["text"],):
        _, corpus = make(tmp_path, [first, second], "".join(keys), json_keys=keys, max_bad_fraction=0.9)
        assert len(corpus) == 60
        done = export_units(corpus.prefix, ids, scores, tmp_path / "out.jsonl")
        assert (done.rows, done.text, done.why) == (25, "source", "text of the source files")
        rows = read_rows(tmp_path / "out.jsonl")
        expected = [f"title of {texts[unit]}\n{texts[unit]}" if "title" in keys else texts[unit] for unit in ids]
        assert [row["text"] for row in rows] == expected
        assert [(row["file"], row["line"]) for row in rows] == [places[unit] for unit in ids]
        assert [row["id"] for row in rows] == [f"{Path(f).name}:{line}" for f, line in (places[unit] for unit in ids)]
        assert [row["tokens"] for row in rows] == [len(text.encode()) for text in expected]
        assert [row["unit"] for row in rows] == ids.tolist()
        np.testing.assert_array_equal(np.float32([row["score"] for row in rows]), scores[ids])
        assert [row["rank"] for row in rows] == [1 + int((scores[ids] > scores[unit]).sum()) for unit in ids]


@pytest.fixture
def corpus(tmp_path):
    """A corpus of 30 documents with url and domain; its prefix."""
    return make(tmp_path, [write_source(tmp_path / "a.jsonl", documents(30))])[1].prefix


def test_every_kind_of_file_holds_the_same_rows(tmp_path, corpus):
    pandas = pytest.importorskip("pandas")
    scores, ids = np.arange(30, dtype=np.float64)[::-1] / 3, np.array([2, 3, 28])
    found = []
    for suffix in SUFFIXES:
        path = tmp_path / "new" / f"out{suffix}"
        assert export_units(corpus, ids, scores, path).rows == 3
        found.append(read_rows(path))
        frame = pandas.read_parquet(path) if suffix == ".parquet" else pandas.read_json(path, lines=True)
        assert frame["rank"].tolist() == [1, 2, 3] and frame["text"].tolist() == [row["text"] for row in found[0]]
    assert all(rows == found[0] for rows in found)
    wanted = documents(30)
    assert found[0][2] == {
        **wanted[28], "id": "a.jsonl:29", "file": str(tmp_path / "a.jsonl"), "line": 29, "unit": 28, "rank": 3,
        "score": scores[28], "tokens": len(wanted[28]["text"].encode()),
    }  # fmt: skip
    assert pq.read_schema(tmp_path / "new" / "out.parquet").names == COLUMNS
    assert list(found[0][0]) == [name for name in COLUMNS if name not in ("format", "label")]
    assert sorted(os.listdir(tmp_path / "new")) == sorted(f"out{suffix}" for suffix in SUFFIXES)


def test_the_same_rows_give_the_same_bytes_without_isal_too(tmp_path, corpus, monkeypatch):
    for suffix in SUFFIXES:
        for name in ("one", "two"):
            export_units(corpus, np.arange(30), np.zeros(30), tmp_path / f"{name}{suffix}")
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    monkeypatch.setattr(row_files, "igzip", None)
    export_units(corpus, np.arange(30), np.zeros(30), tmp_path / "three.jsonl.gz")
    assert read_rows(tmp_path / "three.jsonl.gz") == read_rows(tmp_path / "one.jsonl.gz")


def test_a_subset_is_exported_by_its_own_numbers(tmp_path, corpus):
    part = write_subset(corpus, [4, 9, 11, 20], tmp_path, label="part", compact=True)
    for text in ("auto", "tokens"):
        export_units(part, np.array([1, 3]), np.array([0.0, 1, 2, 3]), tmp_path / "out.jsonl", text=text)
        rows = read_rows(tmp_path / "out.jsonl")
        assert [(row["unit"], row["line"], row["score"], row["rank"]) for row in rows] == [
            (9, 10, 1, 2),
            (20, 21, 3, 1),
        ]
        assert [row["text"] for row in rows] == [documents(30)[unit]["text"] for unit in (9, 20)]


def test_small_batches_and_row_groups_change_nothing(tmp_path, corpus, monkeypatch):
    export_units(corpus, np.arange(30), np.zeros(30), tmp_path / "whole.parquet")
    monkeypatch.setattr(export, "FACTS_BLOCK", 7)
    monkeypatch.setattr("megatron_bliss.selection.row_texts.PLACES_BLOCK", 4)
    monkeypatch.setattr(export, "ROWS", 3)
    monkeypatch.setattr(export, "CHARACTERS", 300)
    monkeypatch.setattr(row_files, "ROW_GROUP_ROWS", 8)
    for text in ("source", "tokens", "none"):
        export_units(corpus, np.arange(30), np.zeros(30), tmp_path / "parts.parquet", text=text)
        expected = pq.read_table(tmp_path / "whole.parquet")
        assert pq.read_table(tmp_path / "parts.parquet").equals(expected.drop("text") if text == "none" else expected)
    file = pq.ParquetFile(tmp_path / "parts.parquet")
    assert file.num_row_groups == 4


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece", "bytes"])
def test_windows_are_decoded_and_named_by_their_number(tmp_path, tokenizer_files, kind):
    texts = [record["text"] for record in documents(12)]
    path = write_source(tmp_path / "a.jsonl", documents(12))
    options = {"unit": "window", "window_length": 16, "tokenizer_type": kind, "tokenizer_model": tokenizer_files[kind]}
    manifest, corpus = make(tmp_path, [path], **options)
    done = export_units(corpus.prefix, np.arange(len(corpus)), np.zeros(len(corpus)), tmp_path / "out.jsonl")
    assert done.text == "tokens" and "windows of several documents" in done.why
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == [f"X:{unit}" for unit in range(len(corpus))]
    assert [row["line"] for row in rows] == read_provenance(corpus.prefix).column("line").to_pylist()
    assert texts[0].startswith(rows[0]["text"]) and len(rows[0]["text"]) > 10
    with pytest.raises(ValueError, match="windows of several documents, expected text of source files: change"):
        plan_text(corpus.prefix, np.arange(3), "source")


def test_an_end_of_document_is_no_text(tmp_path, tokenizer_files):
    path = write_source(tmp_path / "a.jsonl", documents(5))
    how = {"tokenizer_type": "huggingface", "tokenizer_model": tokenizer_files["huggingface"], "append_eod": True}
    _, corpus = make(tmp_path, [path], **how)
    for text in ("tokens", "source"):
        export_units(corpus.prefix, np.arange(5), np.zeros(5), tmp_path / "out.jsonl", text=text)
        assert [row["text"] for row in read_rows(tmp_path / "out.jsonl")] == [row["text"] for row in documents(5)]


def test_sources_that_changed_or_are_gone_give_decoded_text(tmp_path):
    files = [write_source(tmp_path / f"{name}.jsonl", documents(5)) for name in "ab"]
    prefix = make(tmp_path, files)[1].prefix
    with open(files[1], "ab") as stream:
        stream.write(b"\n")
    assert plan_text(prefix, np.arange(5)).text == "source"  # of the first file
    assert plan_text(prefix, np.arange(4, 6)).text == "tokens"
    with pytest.raises(ValueError, match=r"found .*b.jsonl with \d+ bytes, \d+ when it was read, expected text of sou"):
        plan_text(prefix, np.arange(10), "source")
    os.unlink(files[1])
    done = export_units(prefix, np.arange(10), np.zeros(10), tmp_path / "out.jsonl")
    assert done.text == "tokens" and f"no file {files[1]}" in done.why
    assert [row["text"] for row in read_rows(tmp_path / "out.jsonl")] == [row["text"] for row in documents(5)] * 2


def test_a_line_that_changed_under_the_same_size_is_an_error_and_leaves_nothing(tmp_path, corpus):
    text = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(text[:-20] + b"\n" * 20)
    (tmp_path / "out.jsonl").write_text("before")
    with pytest.raises(ValueError, match="found no text at line 30 of .*a.jsonl"):
        export_units(corpus, np.arange(30), np.zeros(30), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "before"
    assert not list(tmp_path.glob("*.tmp"))


def test_corpora_without_provenance_or_tokenizer(tmp_path):
    path = write_source(tmp_path / "a.jsonl", documents(5))
    _, corpus = make(tmp_path, [path], provenance=False)
    done = export_units(corpus.prefix, np.array([1, 4]), np.arange(5.0), tmp_path / "out.jsonl")
    assert done.text == "tokens" and "no " in done.why
    rows = read_rows(tmp_path / "out.jsonl")
    assert [(row["id"], row["text"]) for row in rows] == [(f"X:{n}", documents(5)[n]["text"]) for n in (1, 4)]
    assert "file" not in rows[0] and "line" not in rows[0]
    write_corpus(tmp_path / "Y", [2, 3])
    with pytest.raises(ValueError, match="has digest .* or leave the text out: --export-text none"):
        export_units(tmp_path / "Y", np.array([1]), np.zeros(2), tmp_path / "y.jsonl")
    assert export_units(tmp_path / "Y", np.array([1]), np.zeros(2), tmp_path / "y.jsonl", text="none").text == "none"
    assert read_rows(tmp_path / "y.jsonl") == [{"id": "Y:1", "unit": 1, "tokens": 3, "score": 0, "rank": 1}]
    with pytest.raises(ValueError, match="expected one of auto, source, tokens, none"):
        plan_text(corpus.prefix, np.array([1]), "words")


def test_merged_corpora_and_joined_shards(tmp_path):
    files = [write_source(tmp_path / f"{name}.jsonl", documents(6, seed)) for seed, name in enumerate("ab")]
    for shard in (1, 2):
        make(tmp_path, files, "joined", shard=(shard, 2))
    merge_shards(str(tmp_path / "joined"), 2)
    done = export_units(tmp_path / "joined", np.arange(12), np.zeros(12), tmp_path / "joined.jsonl")
    texts = [row["text"] for seed in range(2) for row in documents(6, seed)]
    assert done.text == "source" and [row["text"] for row in read_rows(tmp_path / "joined.jsonl")] == texts
    parts = [make(tmp_path, [file], f"part{number}")[1].prefix for number, file in enumerate(files)]
    merged = merge_corpora(parts, tmp_path)
    done = export_units(merged, np.arange(12), np.zeros(12), tmp_path / "merged.jsonl")
    assert done.text == "tokens" and [row["text"] for row in read_rows(tmp_path / "merged.jsonl")] == texts


def test_what_the_rows_come_from_is_not_overwritten(tmp_path, corpus):
    os.symlink(tmp_path / "a.jsonl", tmp_path / "link.jsonl")
    for name in ("a.jsonl", "link.jsonl", "X.provenance.parquet"):
        with pytest.raises(ValueError, match="which the rows come from, expected another name: change --export"):
            export_units(corpus, np.arange(3), np.zeros(30), tmp_path / name)
    for name in ("out.csv", "out", ".jsonl", "out.jsonl.bz2"):
        with pytest.raises(ValueError, match="expected a name with one of .jsonl, .jsonl.gz, .jsonl.zst, .parquet: ch"):
            export_units(corpus, np.arange(3), np.zeros(30), tmp_path / name)


@pytest.mark.parametrize("ids", [[], [3, 2], [1, 1], [-1], [30]])
def test_units_have_to_be_some_of_the_corpus(tmp_path, corpus, ids):
    with pytest.raises((ValueError, IndexError)):
        export_units(corpus, np.array(ids, dtype=np.int64), np.zeros(30), tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=r"found scores \[29\] for .*X, expected one for each of its 30 units"):
        export_units(corpus, np.arange(3), np.zeros(29), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_equal_scores_rank_in_order():
    assert export.ranks_of(np.array([1.0, 3, 1, 3, 2])).tolist() == [4, 1, 5, 2, 3]


def test_rows_of_anything_are_written(tmp_path):
    table = pa.table({"id": ["a", "b"], "n": [1, None]})
    for rows in ([table, table.slice(0, 0), table], [*table.to_batches(), table]):
        assert export_rows(tmp_path / "x.jsonl.zst", iter(rows)) == 4
        assert read_rows(tmp_path / "x.jsonl.zst") == [{"id": "a", "n": 1}, {"id": "b"}] * 2
        assert export_rows(tmp_path / "x.parquet", rows) == 4
        assert read_rows(tmp_path / "x.parquet") == [{"id": "a", "n": 1}, {"id": "b"}] * 2
    with pytest.raises(ValueError, match="found no row for .*, expected at least one"):
        export_rows(tmp_path / "y.jsonl", [table.slice(0, 0)])

    def broken():
        yield table
        raise OSError("the disk is full")

    for suffix in SUFFIXES:
        with pytest.raises(OSError, match="the disk is full"):
            export_rows(tmp_path / f"z{suffix}", broken())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.jsonl.zst", "x.parquet"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_memory_does_not_follow_the_text(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(row_files, "ROW_GROUP_BYTES", 1 << 20)
    monkeypatch.setattr(export, "CHARACTERS", 1 << 18)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as stream:
        for number in range(3000):
            stream.write(json.dumps({"text": f"{number} " * 6000}).encode() + b"\n")
    prefix, peaks = make(tmp_path, [str(tmp_path / "a.jsonl.gz")])[1].prefix, []
    for count in (1500, 3000):
        tracemalloc.start()
        export_units(prefix, np.arange(count), np.zeros(3000), tmp_path / f"out{suffix}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0], [peak >> 20 for peak in peaks]


@pytest.fixture
def scored_text(tmp_path):
    """A folder of 40 documents of two files, and their texts."""
    texts = [f"text {number}" + " word" * (number % 7) for number in range(40)]
    files = [source(tmp_path / "a.jsonl.gz", texts[:25], 0), source(tmp_path / "b.parquet", texts[25:], 1)]
    write_scored_text(tmp_path / "S", files, np.random.default_rng(0).normal(size=40).astype(np.float32))
    return tmp_path / "S", texts


def test_scored_text_is_exported_by_one_call(tmp_path, scored_text):
    folder, texts = scored_text
    ids, scores = np.array([0, 3, 24, 25, 39]), np.load(folder / "scores.npy")
    for given in (scores, None):
        done = export_scored_text(folder, ids, given, ["text"], tmp_path / "out.jsonl")
        rows = read_rows(tmp_path / "out.jsonl")
        assert (done.rows, done.text) == (5, "source") and [row["text"] for row in rows] == [texts[i] for i in ids]
        assert [row["unit"] for row in rows] == ids.tolist() and rows[1]["domain"] == "river"
        assert [row["tokens"] for row in rows] == [len(texts[i].split()) for i in ids]
        assert rows[3]["id"].startswith("b.parquet:") and "label" not in rows[0]
        np.testing.assert_array_equal(np.float32([row["score"] for row in rows]), scores[ids])
        assert sorted(row["rank"] for row in rows) == [1, 2, 3, 4, 5]
    export_scored_text(folder, ids, -np.arange(40), ["title", "text"], tmp_path / "out.parquet")
    rows = read_rows(tmp_path / "out.parquet")
    assert rows[0]["text"] == f"title of {texts[0]}\n{texts[0]}" and [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    export_scored_text(folder, ids, None, ["text"], tmp_path / "none.jsonl", text="none")
    assert "text" not in read_rows(tmp_path / "none.jsonl")[0]
    with pytest.raises(ValueError, match="which has no tokens, expected source or none"):
        export_scored_text(folder, ids, None, ["text"], tmp_path / "none.jsonl", text="tokens")
    for name in ("a.jsonl.gz", "b.parquet", "S/provenance.parquet"):
        with pytest.raises(ValueError, match="which the rows come from"):
            export_scored_text(folder, ids, None, ["text"], tmp_path / name)
    os.unlink(tmp_path / "a.jsonl.gz")
    with pytest.raises(OSError, match="a.jsonl.gz"):
        export_scored_text(folder, ids, None, ["text"], tmp_path / "gone.jsonl")
    assert not (tmp_path / "gone.jsonl").exists()


def test_what_was_exported_is_complete(tmp_path, corpus):
    """Fields of the record, which other tools print."""
    done = export_units(corpus, np.arange(2), np.zeros(30), tmp_path / "out.jsonl")
    assert dataclasses.asdict(done) == {
        "path": str(tmp_path / "out.jsonl"),
        "rows": 2,
        "text": "source",
        "why": "text of the source files",
    }
    assert root_units(corpus, np.array([3, 4])).tolist() == [3, 4]
