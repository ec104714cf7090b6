"""What can be wrong with the input of preprocess_data.py: each kind has its line of X.rejected.jsonl or its error."""

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_bliss.data.ingest import documents, encoding, lines, piece_maker, preprocess
from megatron_bliss.data.ingest.shards import merge_shards
from tests.data.ingest.source_files import COMPRESS, make, rejected, same_files, write_source

GOOD = [{"text": f"Nothing is wrong with line {number}."} for number in range(6)]
LINES = [b'{"text": "%s"}' % record["text"].encode() for record in GOOD]

BAD_LINES = {
    "cut off": (b'{"text": "unfinished', "broken JSON"),
    "not JSON": (b"text: none", "broken JSON"),
    "two objects on a line": (b'{"text": "a"} {"text": "b"}', "broken JSON"),
    "NaN": (b'{"text": "a", "score": NaN}', "broken JSON"),
    "zero bytes": (bytes(40), "broken JSON"),
    "control character": (b'{"text": "a\x01"}', "broken JSON"),
    "lone surrogate": (b'{"text": "\\ud800"}', "broken JSON"),
    "nested too deeply": (b"[" * 5000, "broken JSON"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16")[:-1], "invalid UTF-8 at byte 0"),
    "Latin-1": (b'{"text": "caf\xe9"}', "invalid UTF-8 at byte 13"),
    "a list": (b"[1, 2]", "a JSON list, expected an object"),
    "a number": (b"17", "a JSON int, expected an object"),
    "no key": (b'{"url": "x"}', "no key 'text'"),
    "null": (b'{"text": null}', "'text' is NoneType, expected a string"),
    "an integer": (b'{"text": 3}', "'text' is int, expected a string"),
    "an object": (b'{"text": {"en": "a"}}', "'text' is dict, expected a string"),
    "empty": (b'{"text": ""}', "empty text"),
    "white space": (b'{"text": " \\n\\t\\u3000"}', "empty text"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_set_aside_with_its_reason(tmp_path, kind):
    line, reason = BAD_LINES[kind]
    source = tmp_path / "a.jsonl.gz"
    source.write_bytes(gzip.compress(b"\n".join([*LINES[:2], line, b"", *LINES[2:]])))
    manifest, corpus = make(tmp_path, [str(source)], max_bad_fraction=0.5)
    (entry,) = rejected(tmp_path)
    assert (entry["file"], entry["line"]) == (str(source), 3) and reason in entry["reason"]
    assert manifest["counts"]["rejected"] == 1 and len(corpus) == len(GOOD)


def truncated(data: bytes) -> bytes:
    """The first two thirds."""
    return data[: len(data) * 2 // 3]


def spoilt(data: bytes) -> bytes:
    """Some bytes in the middle replaced."""
    return data[: len(data) // 2] + bytes(60) + data[len(data) // 2 + 60 :]


DAMAGE = {
    "truncated gzip": (".jsonl.gz", truncated, "damaged gzip file, the rest cannot be read"),
    "spoilt gzip": (".jsonl.gz", spoilt, "damaged gzip file, the rest cannot be read"),
    "wrong gzip checksum": (".jsonl.gz", lambda data: data[:-8] + b"checksum", "damaged gzip file"),
    "garbage after gzip": (".jsonl.gz", lambda data: data + b"garbage" * 9, "damaged gzip file"),
    "not gzip": (".json.gz", lambda data: LINES[0], "damaged gzip file"),
    "empty gzip": (".json.gz", lambda data: b"", "damaged gzip file: it is empty"),
    "truncated zstandard": (".jsonl.zst", truncated, "damaged zstandard file, the rest cannot be read"),
    "spoilt zstandard": (".jsonl.zst", lambda data: data[:6] + b"\xff" * 9 + data[15:], "damaged zstandard file"),
    "not zstandard": (".json.zst", lambda data: LINES[0], "damaged zstandard file"),
    "empty zstandard": (".txt.zst", lambda data: b"", "damaged zstandard file: it is empty"),
    "truncated parquet": (".parquet", truncated, "damaged parquet file, nothing of it can be read"),
    "spoilt parquet": (".parquet", lambda data: data[:4] + b"\xff" * 200 + data[204:], "damaged parquet file"),
    "not parquet": (".parquet", lambda data: LINES[0], "damaged parquet file, nothing of it can be read"),
    "empty parquet": (".parquet", lambda data: b"", "damaged parquet file, nothing of it can be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_a_damaged_file_still_gives_is_kept(tmp_path, kind, capsys):
    suffix, damage, reason = DAMAGE[kind]
    records = [{"text": os.urandom(60).hex()} for _ in range(400)]
    bad, good = tmp_path / f"a{suffix}", write_source(tmp_path / "b.jsonl", GOOD)
    write_source(bad, records, row_group_size=100)
    bad.write_bytes(damage(bad.read_bytes()))
    manifest, corpus = make(tmp_path, [str(bad), good], max_bad_fraction=0.5, piece_megabytes=0.01)
    entries, kept = rejected(tmp_path), len(corpus) - len(GOOD)
    assert all(entry["file"] == str(bad) and reason in entry["reason"] for entry in entries)
    assert reason in capsys.readouterr().err
    if kind == "spoilt parquet":  # one row group of four
        assert [entry["line"] for entry in entries] == list(range(1, 101)) and kept == 300
    else:  # what could be read before is kept
        assert [entry["line"] for entry in entries] == [kept + 1]
    if kind in ("garbage after gzip", "truncated gzip"):
        assert kept == 400 if "garbage" in kind else 200 < kept < 300


def test_a_bad_line_of_plain_text_is_set_aside_with_its_reason(tmp_path):
    source = tmp_path / "a.txt"
    source.write_bytes(b"good\r\n\ncaf\xe9\nalso good\n")
    _, corpus = make(tmp_path, [str(source)], max_bad_fraction=0.5)
    assert rejected(tmp_path) == [{"file": str(source), "line": 3, "reason": "invalid UTF-8 at byte 3"}]
    assert [bytes(corpus[unit].astype("u1")) for unit in range(2)] == [b"good", b"also good"]


@pytest.mark.parametrize("storage", [pa.binary(), pa.large_binary()])
def test_bad_rows_of_parquet_are_set_aside_with_their_reasons(tmp_path, storage):
    values = [b"good", None, b"caf\xe9", b"", b"fine"]
    pq.write_table(pa.table({"text": pa.array(values, storage)}), tmp_path / "a.parquet")
    _, corpus = make(tmp_path, [str(tmp_path / "a.parquet")], max_bad_fraction=0.7)
    reasons = [(entry["line"], entry["reason"]) for entry in rejected(tmp_path)]
    assert reasons == [
        (2, "'text' is NoneType, expected a string"), (3, "invalid UTF-8 at byte 3"), (4, "empty text"),
    ]  # fmt: skip
    assert len(corpus) == 2


def test_a_parquet_column_that_is_no_text_gives_no_document(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="2 of 2 lines could not be used"):
        make(tmp_path, [str(tmp_path / "a.parquet")])
    assert rejected(tmp_path)[0]["reason"] == "'text' is int, expected a string"


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "url": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has no column 'text', expected one of body, url: change --json-keys"):
        make(tmp_path, [str(tmp_path / "a.parquet")])


def test_a_line_that_is_too_long_is_not_even_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 500)
    monkeypatch.setattr(piece_maker, "BLOCK_BYTES", 100)
    monkeypatch.setattr("megatron_bliss.data.ingest.streams.READ_BYTES", 64)
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join([*LINES[:3], b'{"text": "%s"}' % (b"x" * 5000), *LINES[3:]]))
    for pieces in (64, 0.0004):
        _, corpus = make(tmp_path, [str(source)], f"X{pieces}", max_bad_fraction=0.5, piece_megabytes=pieces)
        (entry,) = rejected(tmp_path, f"X{pieces}")
        assert entry["line"] == 4 and "a line of 5013 bytes, expected at most 500" in entry["reason"]
        assert len(corpus) == len(GOOD)


def test_a_row_that_is_too_long_is_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 500)
    source = write_source(tmp_path / "a.parquet", [*GOOD, {"text": "x" * 501}])
    make(tmp_path, [source], max_bad_fraction=0.5)
    assert rejected(tmp_path)[0]["reason"] == "a text of 501 characters, expected at most 500"


@pytest.mark.parametrize("unit", ["document", "window"])
def test_a_document_longer_than_the_index_can_say_is_set_aside_or_cut_to_windows(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(preprocess, "MAX_UNIT_TOKENS", 30)
    source = write_source(tmp_path / "a.jsonl", [*GOOD, {"text": "x" * 30}, {"text": "y" * 29}])
    _, corpus = make(tmp_path, [source], max_bad_fraction=0.5, append_eod=True, unit=unit, window_length=8)
    assert len(rejected(tmp_path)) == (1 if unit == "document" else 0)
    if unit == "document":
        assert rejected(tmp_path)[0]["reason"] == "a document of 30 tokens, expected at most 29"
        assert rejected(tmp_path)[0]["line"] == 7 and corpus.lengths.max() == 30


def test_ids_outside_the_vocabulary_set_their_document_aside(tmp_path, monkeypatch):
    encode = encoding.BytesEncoder.encode

    def wrong(self, texts):
        tokens, lengths = encode(self, texts)
        tokens = tokens.astype("i8")
        tokens[tokens == ord("3")] = 300
        return tokens, lengths

    monkeypatch.setattr(encoding.BytesEncoder, "encode", wrong)
    _, corpus = make(tmp_path, [write_source(tmp_path / "a.jsonl", GOOD)], max_bad_fraction=0.5)
    (entry,) = rejected(tmp_path)
    assert entry["line"] == 4 and entry["reason"] == "token id 300 outside the vocabulary of 257"
    assert [chr(corpus[unit][-2]) for unit in range(5)] == ["0", "1", "2", "4", "5"]


def test_a_text_without_a_token_is_set_aside(tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "river": 1, "</s>": 2}, unk_token="[UNK]"))
    words.normalizer = normalizers.Replace("!", "")
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    source = write_source(tmp_path / "a.jsonl", [{"text": "river"}, {"text": "!!"}])
    make(
        tmp_path, [source], tokenizer_type="huggingface", tokenizer_model=str(tmp_path / "words.json"),
        max_bad_fraction=0.5,
    )  # fmt: skip
    assert rejected(tmp_path) == [{"file": source, "line": 2, "reason": "text without a token"}]


def unfinished(folder: Path, files: list[str], **changes) -> None:
    """A run that stops past the limit of bad lines: its pieces stay."""
    with pytest.raises(ValueError, match="could not be used"):
        make(folder, files, max_bad_fraction=0.0, **changes)
    assert os.path.isdir(folder / "X.pieces")


def shorten(path: Path) -> None:
    """Leave out the first line."""
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])


RESUMED = {
    "a changed source": (lambda folder: shorten(folder / "a.jsonl"), {}, r"a.jsonl has changed since .*X.pieces"),
    "a touched source": (lambda folder: os.utime(folder / "a.jsonl"), {}, r"a.jsonl has changed since"),
    "a missing source": (lambda folder: os.unlink(folder / "b.jsonl"), {}, r"b.jsonl was a source .*missing now"),
    "a new source": (lambda folder: write_source(folder / "c.jsonl", GOOD), {}, r"c.jsonl is a new source since"),
    "another unit": (lambda folder: None, {"unit": "window"}, "another unit and window_length and settings"),
    "other keys": (lambda folder: None, {"json_keys": ["url"]}, "unfinished work with another settings"),
    "another tokenizer": (lambda folder: None, {"tokenizer_type": "huggingface"}, "work with another tokenizer"),
    "other pieces": (lambda folder: None, {"piece_megabytes": 1}, "unfinished work with another pieces"),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_change_under_an_unfinished_run_is_refused(tmp_path, tokenizer_files, kind):
    happens, changes, message = RESUMED[kind]
    write_source(tmp_path / "a.jsonl", GOOD)
    write_source(tmp_path / "b.jsonl", [*GOOD, {"text": ""}])
    unfinished(tmp_path, [str(tmp_path / "*.jsonl")])
    happens(tmp_path)
    if "tokenizer_type" in changes:
        changes = {**changes, "tokenizer_model": tokenizer_files["huggingface"]}
    with pytest.raises(ValueError, match=message):
        make(tmp_path, [str(tmp_path / "*.jsonl")], max_bad_fraction=0.5, **changes)


def test_a_piece_that_was_not_whole_on_disk_is_made_again(tmp_path):
    files = [write_source(tmp_path / "a.jsonl", [*GOOD, {"text": ""}])]
    _, whole = make(tmp_path, files, "whole", max_bad_fraction=0.5)
    unfinished(tmp_path, files, piece_megabytes=0.0001)
    pieces = sorted((tmp_path / "X.pieces").glob("*.piece"))
    assert len(pieces) >= 3
    pieces[0].write_bytes(pieces[0].read_bytes()[:-20])
    pieces[1].write_bytes(bytes(len(pieces[1].read_bytes())))
    (tmp_path / "X.pieces" / f"{pieces[2].name}.123.tmp").write_bytes(b"half")
    _, corpus = make(tmp_path, files, max_bad_fraction=0.5, piece_megabytes=0.0001)
    assert same_files(whole.prefix, corpus.prefix) and not os.path.exists(tmp_path / "X.pieces")


def test_a_source_that_changes_while_it_is_read_ends_the_run(tmp_path, monkeypatch):
    source = Path(write_source(tmp_path / "a.jsonl", GOOD))
    encode = encoding.BytesEncoder.encode

    def disturbed(self, texts):
        with open(source, "ab") as stream:
            stream.write(LINES[0] + b"\n")
        return encode(self, texts)

    monkeypatch.setattr(encoding.BytesEncoder, "encode", disturbed)
    with pytest.raises(ValueError, match="a.jsonl has changed while it was read"):
        make(tmp_path, [str(source)])
    assert not os.path.exists(tmp_path / "X.bin")


def test_shards_that_do_not_fit_together_are_refused(tmp_path, tokenizer_files):
    files = [write_source(tmp_path / f"{name}.jsonl", GOOD) for name in "ab"]
    with pytest.raises(ValueError, match="3 shards of 2 files"):
        make(tmp_path, files, shard=(1, 3))
    with pytest.raises(ValueError, match="shard 3 of 2, expected 1/n to n/n"):
        make(tmp_path, files, shard=(3, 2))
    make(tmp_path, files, shard=(1, 2))
    prefix = str(tmp_path / "X")
    with pytest.raises(ValueError, match="finish shard 2/2 first"):
        merge_shards(prefix, 2)
    make(tmp_path, [files[1], files[0]], shard=(2, 2))
    with pytest.raises(ValueError, match=r"a.jsonl is in two shards"):
        merge_shards(prefix, 2)
    for path in tmp_path.glob("X.shard_0002*"):
        path.unlink()
    make(tmp_path, files, shard=(2, 2), append_eod=True)
    with pytest.raises(ValueError, match="shard_0002_of_0002 has another settings than"):
        merge_shards(prefix, 2)


def test_a_shard_that_was_cut_is_refused(tmp_path):
    files = [write_source(tmp_path / f"{name}.jsonl", GOOD) for name in "ab"]
    for shard in (1, 2):
        make(tmp_path, files, shard=(shard, 2))
    path = tmp_path / "X.shard_0001_of_0002.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="is truncated or was replaced"):
        merge_shards(str(tmp_path / "X"), 2)


def test_zstandard_of_several_frames_and_gzip_of_several_members_are_whole_files(tmp_path):
    content = [b"\n".join(LINES[:3]) + b"\n", b"\n".join(LINES[3:])]
    for suffix, compress in ((".gz", gzip.compress), (".zst", zstandard.compress), ("", COMPRESS[""])):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(b"".join(map(compress, content)))
        _, corpus = make(tmp_path, [str(path)], f"X{suffix}")
        assert len(corpus) == len(GOOD)
