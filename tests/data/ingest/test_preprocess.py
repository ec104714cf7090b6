import datetime
import gzip
import json
import os
from decimal import Decimal

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_bliss.base.files import sha256_file
from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.ingest import sources, streams
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.ingest.provenance import field_values
from megatron_bliss.data.manifest import read_manifest
from megatron_bliss.data.provenance import read_provenance
from megatron_bliss.data.subset import write_subset
from megatron_bliss.data.tokenizers import load_tokenizer
from tests.data.corpora import documents, write_lines
from tools import inspect_index, preprocess_data


def make(tmp_path, inputs, name="X", **changes):
    """Preprocess with the bytes tokenizer, or what ``changes`` say; returns the manifest and the corpus."""
    prefix = str(tmp_path / name)
    settings = {"tokenizer_type": "bytes", **changes}
    manifest = preprocess(PreprocessSettings(inputs=inputs, output_prefix=prefix, **settings))
    return manifest, IndexedCorpus(prefix)


def rejected(tmp_path, name="X"):
    """Entries of X.rejected.jsonl."""
    return [orjson.loads(line) for line in (tmp_path / f"{name}.rejected.jsonl").read_bytes().splitlines()]


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece", "bytes"])
@pytest.mark.parametrize("append_eod", [False, True])
def test_documents_are_byte_identical_to_megatron_core(tmp_path, tokenizer_files, kind, append_eod):
    records = documents(30)
    files = [write_lines(tmp_path / "a.jsonl.gz", records[:20]), write_lines(tmp_path / "b.json", records[20:])]
    make(tmp_path, files, tokenizer_type=kind, tokenizer_model=tokenizer_files[kind], append_eod=append_eod)
    tokenizer = load_tokenizer(kind, tokenizer_files[kind])
    builder = IndexedDatasetBuilder(str(tmp_path / "Y.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for record in records:
        ids = tokenizer.encode_batch([record["text"]])[0] + [tokenizer.eod] * append_eod
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "Y.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"X{suffix}").read_bytes() == (tmp_path / f"Y{suffix}").read_bytes()


def test_windows_are_the_joined_documents_cut_up(tmp_path):
    records = documents(25)
    source = write_lines(tmp_path / "a.jsonl", records)
    manifest, corpus = make(tmp_path, [source], unit="window", window_length=50)
    joined = b"".join(record["text"].encode() + b"\xff" for record in records)
    stream = np.frombuffer(joined, np.uint8).astype(np.int64)
    stream[stream == 255] = 256  # EOD
    np.testing.assert_array_equal(corpus.tokens, stream[: len(corpus.tokens)])
    assert len(stream) - len(corpus.tokens) in (0, 1) and (corpus.lengths[:-1] == 50).all() and corpus.lengths[-1] >= 2
    assert manifest["counts"]["tokens"] == len(corpus.tokens) and manifest["window_length"] == 50
    starts = np.cumsum([0] + [len(record["text"].encode()) + 1 for record in records])
    lines = np.searchsorted(starts, np.arange(len(corpus)) * 50, side="right")
    assert read_provenance(corpus.prefix).column("line").to_pylist() == lines.tolist()


@pytest.mark.parametrize("extra, units", [(0, 1), (1, 1), (2, 2), (3, 2)])
def test_a_last_window_of_one_token_is_left_out(tmp_path, extra, units):
    text = "x" * (7 + extra)  # and one EOD: a window of 8 and what is over
    _, corpus = make(tmp_path, [write_lines(tmp_path / "a.jsonl", [{"text": text}])], unit="window", window_length=8)
    assert len(corpus) == units and corpus.num_tokens == 8 + (extra if units == 2 else 0)


def test_the_result_depends_neither_on_workers_nor_on_pieces(tmp_path, tokenizer_files, monkeypatch):
    files = [write_lines(tmp_path / f"{name}.jsonl.gz", documents(200, seed)) for seed, name in enumerate("ab")]
    files.append(write_lines(tmp_path / "c.jsonl", [*documents(50, 3), b"{"]))
    options = {"tokenizer_type": "huggingface", "tokenizer_model": tokenizer_files["huggingface"]}
    for unit in ("document", "window"):
        _, whole = make(tmp_path, files, f"{unit}1", unit=unit, window_length=32, **options)
        monkeypatch.setattr(streams, "READ_BYTES", 1000)
        changes = {"workers": 2 if unit == "document" else 1, "piece_megabytes": 0.003}
        _, parts = make(tmp_path, files, f"{unit}2", unit=unit, window_length=32, **changes, **options)
        monkeypatch.undo()
        for suffix in (".bin", ".idx", ".rejected.jsonl", ".provenance.parquet"):
            assert sha256_file(whole.prefix + suffix) == sha256_file(parts.prefix + suffix)
        assert read_provenance(whole.prefix).column("line").to_pylist()[-1] > 40
        first, second = read_manifest(whole.prefix), read_manifest(parts.prefix)
        assert first == second
        assert not os.path.exists(f"{parts.prefix}.pieces")


def test_what_cannot_be_used_is_set_aside_with_file_line_and_reason(tmp_path):
    bad = [
        (b'{"text": "unfinished', "broken JSON"),
        (b"\xff\xfe{}", "invalid UTF-8 at byte 0"),
        (b'{"text": "caf\xe9"}', "invalid UTF-8 at byte 13"),
        (b'{"text": "\\ud800"}', "broken JSON"),
        (b"[1, 2]", "a JSON list, expected an object"),
        (b'{"url": "x"}', "no key 'text'"),
        (b'{"text": null}', "'text' is NoneType, expected a string"),
        (b'{"text": 3}', "'text' is int, expected a string"),
        (b'{"text": ""}', "empty text"),
        (b'{"text": " \\n\\t"}', "empty text"),
    ]
    good = documents(3)
    lines = [good[0], *[line for line, _ in bad], b"", good[1], good[2]]
    source = write_lines(tmp_path / "a.jsonl", lines)
    manifest, corpus = make(tmp_path, [source], max_bad_fraction=0.9)
    assert [(entry["file"], entry["line"]) for entry in rejected(tmp_path)] == [(source, line) for line in range(2, 12)]
    for entry, (_, reason) in zip(rejected(tmp_path), bad, strict=True):
        assert reason in entry["reason"]
    assert manifest["counts"]["rejected"] == 10 and manifest["counts"]["documents"] == len(corpus) == 3
    assert read_provenance(corpus.prefix).column("line").to_pylist() == [1, 13, 14]


def test_a_run_fails_past_the_limit_and_publishes_nothing(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [*documents(9), b"{"])
    with pytest.raises(
        ValueError, match=r"1 of 10 lines could not be used, expected at most 5.00%; .*X.rejected.jsonl"
    ):
        make(tmp_path, [source], max_bad_fraction=0.05)
    assert len(rejected(tmp_path)) == 1
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".bin", ".idx", ".tmp", ".manifest.json"))]
    assert make(tmp_path, [source], max_bad_fraction=0.1)[0]["counts"]["documents"] == 9


def test_input_without_any_text_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no text"):
        make(tmp_path, [write_lines(tmp_path / "a.jsonl", [])])
    with pytest.raises(ValueError, match="holds no text"):
        make(tmp_path, [write_lines(tmp_path / "b.jsonl", [b"{"])], max_bad_fraction=1.0)


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "not gzip"])
def test_damaged_gzip_keeps_what_was_readable_and_is_reported(tmp_path, damage):
    generator = np.random.default_rng(0)
    records = [{"text": generator.bytes(200).hex()} for _ in range(300)]
    data = gzip.compress(b"".join(json.dumps(record).encode() + b"\n" for record in records))
    half = len(data) // 2
    content = {"truncated": data[:half], "corrupted": data[:half] + bytes(80) + data[half + 80 :], "not gzip": b"{}\n"}
    (tmp_path / "a.jsonl.gz").write_bytes(content[damage])
    good = write_lines(tmp_path / "b.jsonl", documents(5))
    manifest, corpus = make(tmp_path, [str(tmp_path / "a.jsonl.gz"), good], max_bad_fraction=0.5)
    entries = rejected(tmp_path)
    assert "damaged gzip file" in entries[-1]["reason"] and entries[-1]["file"].endswith("a.jsonl.gz")
    kept = manifest["counts"]["documents"] - 5
    if damage == "truncated":
        assert 100 < kept < 200 and entries == [{**entries[-1], "line": kept + 1}]
    assert bytes(corpus[len(corpus) - 1].astype(np.uint8)).decode() == documents(5)[-1]["text"]
    assert manifest["sources"][0]["sha256"] == sha256_file(tmp_path / "a.jsonl.gz")


def test_provenance_follows_units_into_subsets(tmp_path):
    records = [{**documents(1)[0], "domain": f"d{number}", "meta": {"url": f"u{number}"}} for number in range(8)]
    for record in records[::2]:
        del record["url"]
    records[3]["label"] = 7
    _, corpus = make(tmp_path, [write_lines(tmp_path / "a.jsonl", records)])
    shard = write_subset(corpus.prefix, [1, 3, 4, 6], tmp_path / "run", label="shard")
    subset = write_subset(shard, [1, 2], tmp_path / "run", label="top")
    rows = read_provenance(subset).to_pylist()
    assert [row["domain"] for row in rows] == ["d3", "d4"] and [row["line"] for row in rows] == [4, 5]
    assert rows[0]["url"] == "https://example.org/0" and rows[1]["url"] == "u4"
    assert rows[0]["label"] == "7" and rows[1]["format"] is None
    picked = read_provenance(shard, np.array([3, 0, 3]), ["domain"])
    assert picked.column_names == ["domain"] and picked.column(0).to_pylist() == ["d6", "d1", "d6"]


def test_finished_work_is_neither_redone_nor_overwritten(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", documents(5))
    first, corpus = make(tmp_path, [source])
    written = os.stat(corpus.bin_path).st_mtime_ns
    assert make(tmp_path, [source])[0] == first and os.stat(corpus.bin_path).st_mtime_ns == written
    with pytest.raises(ValueError, match="finished with another unit and window_length"):
        make(tmp_path, [source], unit="window", append_eod=True)
    with pytest.raises(ValueError, match="finished with another settings"):
        make(tmp_path, [source], append_eod=True)
    write_lines(tmp_path / "a.jsonl", documents(5, seed=1))
    with pytest.raises(ValueError, match="finished with another sources"):
        make(tmp_path, [source])
    os.unlink(tmp_path / "X.manifest.json")
    with pytest.raises(ValueError, match="X.bin exists without a manifest"):
        make(tmp_path, [source])


def test_inputs_are_files_globs_and_folders_each_file_once(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    for name in ("in/b.jsonl", "in/a.json", "in/deep/c.jsonl.gz"):
        write_lines(tmp_path / name, documents(1))
    (tmp_path / "in/readme.md").write_text("not data")
    found = sources.expand_inputs([str(tmp_path / "in")])
    assert [os.path.relpath(path, tmp_path / "in") for path in found] == ["a.json", "b.jsonl", "deep/c.jsonl.gz"]
    assert sources.expand_inputs([str(tmp_path / "in/*.js*")]) == found[:2]
    with pytest.raises(ValueError, match="no input file at .*absent"):
        sources.expand_inputs([str(tmp_path / "absent*")])
    with pytest.raises(ValueError, match="readme.md has an unknown suffix"):
        sources.expand_inputs([str(tmp_path / "in/readme.md")])
    with pytest.raises(ValueError, match="a.json is given more than once"):
        sources.expand_inputs([str(tmp_path / "in/a.json"), str(tmp_path / "in")])
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for other in (str(tmp_path / "in/../in/a.json"), str(tmp_path / "link")):
        with pytest.raises(ValueError, match="a.json is given more than once .*in/a.json is the same file"):
            sources.expand_inputs([str(tmp_path / "in/a.json"), other])


def test_columns_that_json_has_no_form_for_are_kept_as_text(tmp_path):
    """Bytes, decimals, times, and numbers of more than 64 bits, on their own and inside of metadata."""
    for number, value in enumerate([b"\xff\x00", Decimal("1.5"), datetime.timedelta(1)]):
        file = str(tmp_path / f"{number}.parquet")
        pq.write_table(pa.Table.from_pylist([{"text": "a", "metadata": {"url": value, "label": value}}]), file)
        (found,) = next(sources.read_documents(file, ["text"])).values
        assert found[0] == found[3] == json.dumps(str(value))
    assert field_values({"label": 1 << 70})[3] == str(1 << 70)


def test_lines_are_whole_whatever_the_block(tmp_path, monkeypatch):
    content = (
        b"\xef\xbb\xbf"
        + b"".join(b'{"text": "%d %s"}\n' % (n, b"x" * (n % 50)) for n in range(100))
        + b'{"text": "end"}'
    )
    (tmp_path / "a.jsonl").write_bytes(content)
    for size in (1, 17, 1000, 1 << 20):
        monkeypatch.setattr(streams, "READ_BYTES", min(size * 3, 1 << 20))
        state = sources.SourceState(str(tmp_path / "a.jsonl"))
        lines = [entry for block in sources.read_blocks(state, size) for entry in block.lines()]
        assert [number for number, _ in lines] == list(range(1, 102))
        assert orjson.loads(lines[0][1])["text"] == "0 " and orjson.loads(lines[-1][1])["text"] == "end"
        assert state.bytes == len(content) and state.sha256 == sha256_file(tmp_path / "a.jsonl")


def test_several_keys_are_joined_by_a_newline(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"title": "T", "text": "body"}, {"text": "no title"}])
    _, corpus = make(tmp_path, [source], json_keys=["title", "text"], max_bad_fraction=0.5)
    assert bytes(corpus[0].astype(np.uint8)) == b"T\nbody" and len(corpus) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"unit": "page"}, "--unit"),
        ({"unit": "window", "window_length": 1}, "--window-length"),
        ({"workers": 0}, "--workers"),
        ({"max_bad_fraction": 1.5}, "--max-bad-fraction"),
    ],
)
def test_impossible_settings_name_their_option(changes, message):
    with pytest.raises(ValueError, match=message):
        PreprocessSettings(inputs=[], output_prefix="X", tokenizer_type="bytes", **changes)


def test_the_command_makes_what_the_inspection_shows(tmp_path, tokenizer_files, capsys):
    source = write_lines(tmp_path / "a.jsonl.gz", documents(40))
    prefix = str(tmp_path / "X")
    options = ["--input", source, "--output-prefix", prefix, "--tokenizer-model", tokenizer_files["huggingface"]]
    assert preprocess_data.main([*options, "--unit", "window", "--window-length", "16", "--progress", "none"]) == 0
    assert "40 documents, 0 rejected" in capsys.readouterr().out
    for command in ("show", "sample", "verify"):
        assert inspect_index.main([command, prefix]) == 0
    output = capsys.readouterr().out
    assert "contiguous  yes" in output and "https://example.org/" in output and "as its manifest says" in output
    assert preprocess_data.main([*options, "--unit", "document"]) == 1
    assert "change --output-prefix" in capsys.readouterr().err
